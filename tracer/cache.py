"""Compiled probes kept between runs: compiling takes longer than everything else at the start.

The directory and its files belong to root and nobody else can write them: what they hold is loaded
into the kernel. The key covers all that the instructions depend on, so nothing in here grows
stale; a file that is damaged, or whose keeper is another user, counts as missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from .compiled import Compiled

DIRECTORY = Path("/var/cache/latrace")
_KEEP = 16  # files: one for each kind of target and kernel
_LARGEST = 1 << 20
_DIGEST = hashlib.sha256


def key_of(parts: Iterable[bytes]) -> str:
    """The name under which something made of these parts is kept."""
    digest = _DIGEST()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return f"probes-{digest.hexdigest()}"


@contextlib.contextmanager
def _directory(*, create: bool) -> Iterator[int | None]:
    """A descriptor of the cache's directory; None when there is none that can be trusted."""
    fd = None
    with contextlib.suppress(OSError):
        if create and os.geteuid() == 0:
            with contextlib.suppress(FileExistsError):
                DIRECTORY.mkdir(mode=0o700)
        fd = os.open(DIRECTORY, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield fd if fd is not None and _is_roots(fd) else None
    finally:
        if fd is not None:
            os.close(fd)


def _is_roots(fd: int) -> bool:
    about = os.fstat(fd)
    return about.st_uid == 0 and not about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def find(key: str) -> Compiled | None:
    """What was kept under this key, None when nothing (whole) was."""
    with _directory(create=False) as directory:
        if directory is None:
            return None
        try:
            file = os.open(key, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        except OSError:
            return None
        with os.fdopen(file, "rb") as stream:
            if not _is_roots(file) or not stat.S_ISREG(os.fstat(file).st_mode):
                return None
            digest, _, text = stream.read(_LARGEST).partition(b"\n")
    if _DIGEST(text).hexdigest().encode() != digest:
        return None
    try:
        return Compiled.from_bytes(text)
    except (ValueError, KeyError, TypeError):
        return None


def keep(key: str, compiled: Compiled) -> None:
    """Keep it, and drop the oldest beyond the newest few. Where that fails, nothing is kept."""
    text = compiled.to_bytes()
    with _directory(create=True) as directory, contextlib.suppress(OSError):
        if directory is None:
            return
        part = f"{key}.{os.getpid()}"
        file = os.open(
            part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=directory
        )
        try:
            with os.fdopen(file, "wb") as stream:
                stream.write(_DIGEST(text).hexdigest().encode() + b"\n" + text)
            os.rename(part, key, src_dir_fd=directory, dst_dir_fd=directory)
        except OSError:
            os.unlink(part, dir_fd=directory)
            raise
        with os.scandir(directory) as entries:
            newest_first = sorted(entries, key=lambda entry: -entry.stat().st_mtime_ns)
        for entry in newest_first[_KEEP:]:
            os.unlink(entry.name, dir_fd=directory)


def forget(key: str) -> None:
    """Drop it."""
    with _directory(create=False) as directory, contextlib.suppress(OSError):
        if directory is not None:
            os.unlink(key, dir_fd=directory)
