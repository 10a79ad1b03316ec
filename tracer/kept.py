"""Files kept between runs in a directory of root's own, each with a digest of its content.

What is damaged, a link, or what another user owns or can write counts as missing; where there is no
such directory to be had, nothing is kept. Nothing here raises for what is wrong with any of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_DIGEST = hashlib.sha256
_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NEW_FILE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class KeptFiles:
    """The files of one directory: at most so many, of so many bytes in all and each."""

    path: Path
    most_files: int
    most_bytes: int
    largest: int

    @contextlib.contextmanager
    def _directory(self, *, create: bool) -> Iterator[int | None]:
        """A descriptor of the directory; None when there is none that can be trusted."""
        fd = None
        with contextlib.suppress(OSError):
            if create and os.geteuid() == 0:
                with contextlib.suppress(FileExistsError):
                    self.path.mkdir(mode=0o700)
            fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            yield fd if fd is not None and _is_roots(os.fstat(fd)) else None
        finally:
            if fd is not None:
                os.close(fd)

    def find(self, name: str, *, use: bool = False) -> bytes | None:
        """What was kept under this name, None when nothing (whole) was. `use` makes it young."""
        with self._directory(create=False) as directory, contextlib.suppress(OSError):
            if directory is None:
                return None
            with os.fdopen(os.open(name, _FILE_FLAGS, dir_fd=directory), "rb") as stream:
                about = os.fstat(stream.fileno())
                if not _is_roots(about) or not stat.S_ISREG(about.st_mode):
                    return None
                digest = stream.read(_DIGEST().digest_size)
                data = stream.read(self.largest + 1)
                if _DIGEST(data).digest() != digest:
                    return None
                if use:
                    os.utime(stream.fileno())
                return data
        return None

    def keep(self, name: str, data: bytes) -> None:
        """Keep it, and drop the oldest beyond the limits."""
        with self._directory(create=True) as directory, contextlib.suppress(OSError):
            if directory is None or len(data) > self.largest:
                return
            part = f"{name}.{os.getpid()}"
            file = os.open(part, _NEW_FILE_FLAGS, 0o600, dir_fd=directory)
            try:
                with os.fdopen(file, "wb") as stream:
                    stream.write(_DIGEST(data).digest() + data)
                os.rename(part, name, src_dir_fd=directory, dst_dir_fd=directory)
            except OSError:
                os.unlink(part, dir_fd=directory)
                raise
            self._make_room(directory)

    def _make_room(self, directory: int) -> None:
        with os.scandir(directory) as entries:
            files = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
        files.sort(key=lambda file: -file[1].st_mtime_ns)
        total = 0
        for number, (name, about) in enumerate(files, 1):
            total += about.st_size
            if number > self.most_files or total > self.most_bytes:
                os.unlink(name, dir_fd=directory)

    def forget(self, name: str) -> None:
        """Drop it."""
        with self._directory(create=False) as directory, contextlib.suppress(OSError):
            if directory is not None:
                os.unlink(name, dir_fd=directory)


def _is_roots(about: os.stat_result) -> bool:
    return about.st_uid == 0 and not about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
