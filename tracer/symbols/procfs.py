"""Opening what belongs to a target without being led anywhere else.

A file is first pinned with O_PATH, which neither blocks on a FIFO nor wakes a device, then judged
by fstat, and only a regular file of sane size is opened for reading, through the pinned
descriptor. Paths are walked beneath the target's own root (openat2(2), Linux 5.6).
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import threading
from dataclasses import dataclass
from typing import Final

_SYS_OPENAT2: Final = 437
"""The same number on every architecture."""
_RESOLVE_NO_MAGICLINKS, _RESOLVE_IN_ROOT = 0x02, 0x10
_AGAIN_LIMIT: Final = 16

FILE_LIMIT: Final = 16 << 30
"""Larger files are not opened; programs with debug information reach a few GiB."""


class Refused(Exception):
    """The thing exists and is not one we read; the text says why."""


class Fd:
    """A descriptor that is closed with its last reference."""

    __slots__ = ("__weakref__", "number")

    def __init__(self, number: int) -> None:
        self.number = number

    def close(self) -> None:
        """Close now; again is harmless."""
        number, self.number = self.number, -1
        if number >= 0:
            os.close(number)

    def __del__(self) -> None:
        self.close()


class _OpenHow(ctypes.Structure):
    _fields_ = (
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    )


_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def open_beneath(root: int, path: str | bytes, *, flags: int = 0) -> Fd:
    """Pin `path` (O_PATH) as seen by a process whose root directory is descriptor `root`.

    Raises OSError; no magic link (/proc/PID/fd/…) is followed on the way.
    """
    how = _OpenHow(os.O_PATH | os.O_CLOEXEC | flags, 0, _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS)
    raw = os.fsencode(path)
    if b"\0" in raw:
        raise OSError(errno.ENOENT, "a path with a zero byte")
    for _ in range(_AGAIN_LIMIT):
        number = _libc.syscall(
            ctypes.c_long(_SYS_OPENAT2),
            ctypes.c_int(root),
            ctypes.c_char_p(raw),
            ctypes.byref(how),
            ctypes.c_size_t(ctypes.sizeof(how)),
        )
        if number >= 0:
            return Fd(number)
        # A rename somewhere on the host during the walk asks for another try.
        if ctypes.get_errno() != errno.EAGAIN:
            break
    code = ctypes.get_errno()
    raise OSError(code, os.strerror(code))


def regular(pinned: Fd, *, limit: int = FILE_LIMIT) -> os.stat_result:
    """What fstat says of a pinned regular file. Raises Refused for anything else."""
    status = os.fstat(pinned.number)
    if stat.S_ISLNK(status.st_mode):
        raise Refused("a symbolic link")
    if not stat.S_ISREG(status.st_mode):
        raise Refused("not a regular file")
    if status.st_size > limit:
        raise Refused("too big")
    return status


def for_eyes_of(uid: int, status: os.stat_result) -> None:
    """Raises Refused for a file that a user may not read for being its owner, or anybody.

    A target chooses where its paths lead, and must not have us read for it what it can't.
    """
    if status.st_uid != uid and not status.st_mode & stat.S_IROTH:
        raise Refused("not readable by the target")


def reopen(pinned: Fd) -> Fd:
    """The pinned file itself, open for reading. Raises OSError."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
    return Fd(os.open(f"/proc/{_own_name()}/fd/{pinned.number}", flags))


def _own_name() -> str:
    # Descriptors are shared by threads, but a thread's own directory is there even when the
    # thread-group leader has ended.
    return "self" if threading.current_thread() is threading.main_thread() else "thread-self"


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a process is: `start_time` in clock ticks tells it from a later one of the same id.

    `uid` is the one its new files get; `inner_pid` its id in its own PID namespace.
    """

    start_time: int
    uid: int
    inner_pid: int


class ProcessDir:
    """/proc/TGID, held open so that everything read belongs to one process. A context manager.

    Every method raises OSError (ProcessLookupError, FileNotFoundError) once the process is gone.
    """

    def __init__(self, tgid: int) -> None:
        flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
        self._fd = Fd(os.open(f"/proc/{tgid}", flags))

    def __enter__(self) -> ProcessDir:
        return self

    def __exit__(self, *_: object) -> None:
        self._fd.close()

    def read(self, name: str, limit: int) -> bytes:
        """At most `limit` bytes of one of its files."""
        flags = os.O_RDONLY | os.O_CLOEXEC
        fd = Fd(os.open(name, flags, dir_fd=self._fd.number))
        pieces, have = [], 0
        while have < limit and (piece := os.read(fd.number, min(1 << 20, limit - have))):
            pieces.append(piece)
            have += len(piece)
        fd.close()
        return b"".join(pieces)

    def identity(self) -> Identity:
        """Read from `stat` and `status`."""
        # The name in parentheses may hold anything, parentheses included.
        fields = self.read("stat", 4096).rpartition(b")")[2].split()
        uid = inner = -1
        for line in self.read("status", 1 << 16).split(b"\n"):
            key, _, value = line.partition(b":")
            if key == b"Uid":
                uid = int(value.split()[3])
            elif key == b"NSpid":
                inner = int(value.split()[-1])
        return Identity(int(fields[19]), uid, inner)

    def root(self) -> tuple[tuple[int, int, int], Fd]:
        """Its root directory, pinned, with a key that is equal for processes sharing it."""
        flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
        root = Fd(os.open("root", flags, dir_fd=self._fd.number))
        status = os.fstat(root.number)
        namespace = os.stat("ns/mnt", dir_fd=self._fd.number).st_ino
        return (status.st_dev, status.st_ino, namespace), root

    def mapped_file(self, start: int, end: int) -> Fd:
        """The very file mapped there, pinned: deleted, replaced or out of sight as it may be."""
        name = f"map_files/{start:x}-{end:x}"
        return Fd(os.open(name, os.O_PATH | os.O_CLOEXEC, dir_fd=self._fd.number))
