"""Unwinding tables kept between runs: the sections of a few modules take longer than their stacks.

A table is kept under a digest of all that it was made of: the section's bytes, what they are
relative to, and the format; a build id is only what a file says of itself. The directory and its
files are root's alone. A file that is damaged, or whose keeper is another user, counts as missing;
where there is no cache to be had, nothing is kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from .sections import Place
from .table import FORMAT, MAX_BYTES, TableError, UnwindTable

DIRECTORY: Final = Path("/var/cache/latrace-unwinding")
SIZE_LIMIT: Final = 256 << 20
"""Bytes of all files together; the ones unused for longest go first."""
_SUFFIX: Final = ".unwind"
_DIGEST = hashlib.sha256


def key_of(place: Place, section: bytes) -> str:
    """The name under which the table of this section is kept."""
    digest = _DIGEST()
    fields = place.as_dict()
    # Where the section is in its file makes no difference to what is in it.
    del fields["offset"]
    digest.update(repr((FORMAT, sorted(fields.items()))).encode())
    digest.update(section)
    return digest.hexdigest() + _SUFFIX


class TableCache:
    """Tables in a directory. Never raises for what is wrong with it."""

    def __init__(self, directory: Path = DIRECTORY, *, size_limit: int = SIZE_LIMIT) -> None:
        self._path = directory
        self._limit = size_limit

    @contextlib.contextmanager
    def _directory(self, *, create: bool) -> Iterator[int | None]:
        """A descriptor of the directory; None when there is none that can be trusted."""
        fd = None
        with contextlib.suppress(OSError):
            if create and os.geteuid() == 0:
                with contextlib.suppress(FileExistsError):
                    self._path.mkdir(mode=0o700)
            fd = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            yield fd if fd is not None and _is_roots(os.fstat(fd)) else None
        finally:
            if fd is not None:
                os.close(fd)

    def find(self, key: str) -> UnwindTable | None:
        """What was kept under this key, None when nothing (whole) was."""
        with self._directory(create=False) as directory, contextlib.suppress(OSError):
            if directory is None:
                return None
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            with os.fdopen(os.open(key, flags, dir_fd=directory), "rb") as stream:
                about = os.fstat(stream.fileno())
                if not _is_roots(about) or not stat.S_ISREG(about.st_mode):
                    return None
                digest = stream.read(_DIGEST().digest_size)
                data = stream.read(MAX_BYTES + 1)
                if _DIGEST(data).digest() != digest:
                    return None
                # It was of use: the others go first.
                os.utime(stream.fileno())
            with contextlib.suppress(TableError):
                return UnwindTable.from_bytes(data)
        return None

    def keep(self, key: str, data: bytes) -> None:
        """Keep a table's bytes, and drop the oldest beyond the limit."""
        with self._directory(create=True) as directory, contextlib.suppress(OSError):
            if directory is None or len(data) > self._limit:
                return
            part = f"{key}.{os.getpid()}"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            file = os.open(part, flags, 0o600, dir_fd=directory)
            try:
                with os.fdopen(file, "wb") as stream:
                    stream.write(_DIGEST(data).digest() + data)
                os.rename(part, key, src_dir_fd=directory, dst_dir_fd=directory)
            except OSError:
                os.unlink(part, dir_fd=directory)
                raise
            self._make_room(directory)

    def _make_room(self, directory: int) -> None:
        with os.scandir(directory) as entries:
            files = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
        files.sort(key=lambda file: -file[1].st_mtime_ns)
        total = 0
        for name, about in files:
            total += about.st_size
            if total > self._limit:
                os.unlink(name, dir_fd=directory)


def _is_roots(about: os.stat_result) -> bool:
    return about.st_uid == 0 and not about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
