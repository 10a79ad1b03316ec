"""Files that a privileged run makes for the user who typed sudo.

Everything here acts with the rights of that user, not with root's: a name that the user could
not have written is refused by the kernel, and what is made belongs to the user. The switch is of
the file-system ids and the supplementary groups of the calling thread alone (setfsuid(2),
setfsgid(2) and the bare setgroups system call; the C library's wrapper would change every
thread), for the time of one operation. Setting the file-system uid away from 0 also takes root's
file capabilities off that thread. Once a file is open, its descriptor needs no rights any more.

Directories are held by descriptor, so that nobody can exchange them under us; what is made is
made with O_EXCL and O_NOFOLLOW, directories 0700 and files 0600. A link is never followed in the
last component of a name, and nothing is removed that does not look like our own.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import pwd
import re
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from latrace.tracer.errors import LatraceError, UsageError

DEFAULT_NAME = "latrace.data"
OLD_SUFFIX = ".old"
MANIFEST = "manifest.json"

_TABLE_SUFFIX = ".arrows"
_TEMPORARY_PREFIX = ".latrace."
_TEMPORARY_SUFFIX = ".tmp"
_MOST_ENTRIES = 1000  # of a capture; who put in more is not us, and may not cost us memory
_ATTEMPTS = 100

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

_OUT_OF_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)  # what a rename to a name in use says

# setgroups(2) by number: libc's function sends the change to all threads. arch/*/syscall.tbl
# and include/uapi/asm-generic/unistd.h.
_SETGROUPS = {
    "x86_64": 116,
    "aarch64": 159,
    "riscv64": 159,
    "loongarch64": 159,
    "ppc64le": 81,
    "s390x": 206,
}

_libc = ctypes.CDLL(None, use_errno=True)


# --- who the files are for ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Caller:
    """The user behind sudo: ids of the initial user namespace."""

    uid: int
    gid: int
    groups: tuple[int, ...]


def calling_user() -> Caller | None:
    """Tell whose rights outputs are made with; None: this process's own.

    That is SUDO_UID and SUDO_GID when we run as root and they name somebody else.
    """
    if os.geteuid() != 0 or "SUDO_UID" not in os.environ:
        return None
    try:
        uid = int(os.environ["SUDO_UID"])
        gid = int(os.environ.get("SUDO_GID", "-1"))
    except ValueError:
        raise UsageError(
            "SUDO_UID and SUDO_GID must be numbers",
            hint="they are set by sudo; start latrace with sudo, or unset them",
        ) from None
    if uid == 0:
        return None
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        groups: tuple[int, ...] = ()
    else:
        gid = entry.pw_gid if gid < 0 else gid
        groups = tuple(os.getgrouplist(entry.pw_name, gid))
    if gid < 0 or uid < 0:
        raise UsageError(
            f"SUDO_GID is not set and uid {uid} is not in the user database",
            hint="start latrace with sudo, or unset SUDO_UID",
        )
    return Caller(uid, gid, groups or (gid,))


@contextmanager
def acting_as(caller: Caller | None) -> Iterator[None]:
    """Make this thread's file operations those of `caller`; None changes nothing.

    Nothing that runs inside may yield to other code of this thread.
    """
    if caller is None:
        yield
        return
    groups, gid, uid = os.getgroups(), os.getegid(), os.geteuid()
    try:
        _set_groups(caller.groups)
        _set_fs_id(_libc.setfsgid, caller.gid)
        _set_fs_id(_libc.setfsuid, caller.uid)  # last: it takes the capabilities
        yield
    finally:
        _set_fs_id(_libc.setfsuid, uid)
        _set_fs_id(_libc.setfsgid, gid)
        _set_groups(groups)


def _set_fs_id(function: ctypes._NamedFuncPointer, wanted: int) -> None:
    # Both calls return the previous id and tell no error; -1 changes nothing.
    function(ctypes.c_uint32(wanted))
    if ctypes.c_uint32(function(ctypes.c_uint32(0xFFFFFFFF))).value != wanted:
        raise LatraceError(
            f"cannot take on the file-system ids of uid/gid {wanted}",
            hint="CAP_SETUID and CAP_SETGID are needed to write files for the calling user",
        )


def _set_groups(groups: tuple[int, ...] | list[int]) -> None:
    number = _SETGROUPS.get(platform.machine())
    if number is None:
        return  # root's groups stay: they give rights to what root's groups may write, no more
    array = (ctypes.c_uint32 * max(1, len(groups)))(*groups)
    if _libc.syscall(number, len(groups), array) != 0:
        code = ctypes.get_errno()
        raise LatraceError(
            f"cannot take on the groups of the calling user: {os.strerror(code)}",
            hint="CAP_SETGID is needed to write files for the calling user",
        )


# --- the capture's directory -------------------------------------------------------------------


class _InUseError(LatraceError):
    """Another latrace holds it."""


class OutputDir:
    """A new directory, ours alone, held by descriptor. Made by `create_output_dir`."""

    def __init__(self, path: Path, fd: int, caller: Caller | None) -> None:
        self.path = path
        """Where it was made: absolute, for messages."""
        self._fd = fd
        self._caller = caller

    def open_new(self, name: str) -> BinaryIO:
        """Make the file `name` and return it open for writing, without a buffer.

        Raises LatraceError when it exists or cannot be made.
        """
        with _explained(self.path / name), acting_as(self._caller):
            fd = os.open(name, _NEW_FILE, 0o600, dir_fd=self._fd)
        return os.fdopen(fd, "wb", buffering=0)

    def replace(self, name: str, data: bytes) -> None:
        """Make `data` the whole content of `name`, atomically: a reader sees the old or the new.

        Raises LatraceError; the old content then stays.
        """
        with _explained(self.path / name), acting_as(self._caller):
            temporary = _temporary_name()
            try:
                _write_new(self._fd, temporary, data)
                os.rename(temporary, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
            except OSError:
                with suppress(OSError):
                    os.unlink(temporary, dir_fd=self._fd)
                raise

    def close(self) -> None:
        """Let the directory go; what is in it stays. Safe to call again."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def create_output_dir(path: Path | None, *, force: bool) -> OutputDir:
    """Make the directory of a new capture.

    `path` None means `latrace.data` in the working directory; an earlier one is moved to
    `latrace.data.old`, and the one there before is removed. A `path` that exists is refused,
    or with `force` removed first, if it looks like a capture.

    Raises UsageError when the name is taken, LatraceError when it cannot be made.
    """
    caller = calling_user()
    target = Path(DEFAULT_NAME) if path is None else path
    parent_path, name = _split(target)
    shown = Path(os.path.abspath(target))  # noqa: PTH100 - resolve() would follow links
    with _explained(shown), acting_as(caller):
        parent = os.open(parent_path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if _exists(parent, name):
                if path is None:
                    _set_aside(parent, name, shown)
                elif force:
                    _remove_capture(parent, name, shown)
                else:
                    raise UsageError(
                        f"{shown} exists", hint="choose another name, or replace it with --force"
                    )
            fd = _make_directory(parent, name, shown)
        finally:
            os.close(parent)
    return OutputDir(shown, fd, caller)


def _make_directory(parent: int, name: str, shown: Path) -> int:
    os.mkdir(name, 0o700, dir_fd=parent)
    return _hold_new(parent, name, shown)


def _hold_new(parent: int, name: str, shown: Path) -> int:
    """Open and lock a directory that was made just now."""
    fd = os.open(name, _DIRECTORY, dir_fd=parent)
    try:
        # Whoever owns the parent may have put another directory in its place meanwhile.
        status = os.fstat(fd)
        mine = status.st_uid == _file_system_uid() and not stat.S_IMODE(status.st_mode) & 0o077
        if not mine or _entries(fd):
            raise _exchanged(shown)
        _lock(fd, shown)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _exchanged(shown: Path) -> LatraceError:
    return LatraceError(
        f"{shown} was exchanged while it was made",
        hint="choose a directory that only you can write to, with -o",
    )


def _set_aside(parent: int, name: str, shown: Path) -> None:
    """Move an earlier capture to NAME.old, in the place of the one before it."""
    os.close(_open_capture(parent, name, shown))
    old = name + OLD_SUFFIX
    if _exists(parent, old):
        _remove_capture(parent, old, shown.with_name(old))
    os.rename(name, old, src_dir_fd=parent, dst_dir_fd=parent)


def _remove_capture(parent: int, name: str, shown: Path) -> None:
    """Remove a capture file by file: its directory is never descended from, no link followed."""
    fd = _open_capture(parent, name, shown)
    try:
        for entry in _entries(fd):
            os.unlink(entry, dir_fd=fd)
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=parent)


def _open_capture(parent: int, name: str, shown: Path) -> int:
    """Open a directory that looks like a capture: our files and no others, and not in use."""
    hint = "move it away, or choose another name with -o"
    if not stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
        raise LatraceError(f"{shown} is not a capture: it is not a directory", hint=hint)
    fd = os.open(name, _DIRECTORY, dir_fd=parent)
    try:
        entries = _entries(fd)
        strangers = [entry for entry in entries if not _is_ours(fd, entry)]
        if strangers:
            raise LatraceError(
                f"{shown} holds what latrace did not write: {min(strangers)!r}", hint=hint
            )
        if entries and MANIFEST not in entries:
            raise LatraceError(f"{shown} is not a capture: it has no {MANIFEST}", hint=hint)
        _lock(fd, shown)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _entries(directory: int) -> list[str]:
    return os.listdir(directory)


def _is_ours(directory: int, entry: str, more: re.Pattern[str] | None = None) -> bool:
    named = (
        entry == MANIFEST
        or entry.endswith(_TABLE_SUFFIX)
        or _is_temporary(entry)
        or (more is not None and more.fullmatch(entry) is not None)
    )
    return named and stat.S_ISREG(os.stat(entry, dir_fd=directory, follow_symlinks=False).st_mode)


def _lock(fd: int, shown: Path) -> None:
    """Hold the directory as long as `fd` is open, so that no second run takes it away."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _InUseError(
            f"{shown} is being written by another latrace", hint="choose another name with -o"
        ) from None
    except OSError:  # NFS locks no directories: then there is no such guard
        return


# --- a directory of captures -------------------------------------------------------------------


class OutputFolder:
    """A directory that captures are made in and removed from, held by descriptor.

    It may hold anything else, and may belong to anybody: only what `own` says is ours by its name,
    is a directory of the user we act for, and holds nothing but our files is ever touched. Made by
    `open_output_folder`.
    """

    def __init__(self, path: Path, fd: int, caller: Caller | None, files: re.Pattern[str]) -> None:
        self.path = path
        """Absolute, for messages."""
        self._fd = fd
        self._caller = caller
        self._files = files

    def names(self, own: re.Pattern[str]) -> list[str]:
        """What in it has a name of ours, in no order. Raises LatraceError when it cannot be read.

        Also what a `make` or a removal that was cut off has left: give these names to `remove`.
        """
        with _explained(self.path, "read"), acting_as(self._caller), os.scandir(self._fd) as found:
            return [
                entry.name
                for entry in found
                if own.fullmatch(entry.name) or _is_temporary(entry.name)
            ]

    def is_removed(self) -> bool:
        """Whether somebody has removed the directory itself: nothing can be made in it any more."""
        return os.fstat(self._fd).st_nlink == 0

    def make(self, name: str, first: Mapping[str, bytes]) -> OutputDir | None:
        """Make a capture's directory, locked, with the files `first` (name → content) in it.

        They are in it before it has its name: a kill in between leaves what `remove` takes for
        half removed. None when the name is taken, by whatever it is. Raises LatraceError when it
        cannot be made; nothing is left of it then.
        """
        shown = self.path / name
        with _explained(shown), acting_as(self._caller), ExitStack() as undo:
            # A rename would replace an empty directory.
            if _exists(self._fd, name):
                return None
            temporary, fd = self._make_temporary(shown)
            undo.callback(os.close, fd)
            undo.callback(self._clear, temporary, fd, first)
            for entry, data in first.items():
                with _explained(shown / entry):
                    _write_new(fd, entry, data)
            try:
                os.rename(temporary, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
            except OSError as error:
                if error.errno in _TAKEN:
                    return None
                raise
            if not _same(self._fd, name, os.fstat(fd)):
                raise _exchanged(shown)
            undo.pop_all()
        return OutputDir(shown, fd, self._caller)

    def _make_temporary(self, shown: Path) -> tuple[str, int]:
        """Make an empty directory of a temporary name; returns that, and it open and locked."""
        for _ in range(_ATTEMPTS):
            name = _temporary_name()
            os.mkdir(name, 0o700, dir_fd=self._fd)
            try:
                fd = _hold_new(self._fd, name, shown)
            except _InUseError:
                continue  # another of us takes it for half removed, and goes on with that
            except FileNotFoundError:
                if self.is_removed():
                    raise
                continue  # another of us has removed it
            except BaseException:
                self._clear(name)
                raise
            if _same(self._fd, name, os.fstat(fd)):
                return name, fd
            os.close(fd)
        raise LatraceError(
            f"cannot write {shown}: it is removed each time before it is whole",
            hint="choose another place with -o",
        )

    def _clear(self, name: str, fd: int = -1, entries: Iterable[str] = ()) -> None:
        """Take a directory away that did not become one of ours, as far as that works."""
        for entry in entries:
            with suppress(OSError):
                os.unlink(entry, dir_fd=fd)
        with suppress(OSError):
            os.rmdir(name, dir_fd=self._fd)

    def weigh(self, name: str) -> int | None:
        """The bytes that one of ours takes on the disk; None when it is gone or not of our user.

        Raises LatraceError when it holds what latrace did not write, or cannot be read.
        """
        shown = self.path / name
        with _explained(shown, "read"), acting_as(self._caller):
            fd = self._open_own(name)
            if fd is None:
                return None
            try:
                size = _allocated(os.fstat(fd))
                for entry in self._entries_of(fd, shown):
                    with suppress(FileNotFoundError):
                        size += _allocated(os.stat(entry, dir_fd=fd, follow_symlinks=False))
                return size
            finally:
                os.close(fd)

    def remove(self, name: str) -> bool:
        """Remove one of ours; False when it is being written, gone or not of our user.

        Its name goes first: a removal that is cut off leaves no half of a capture behind.
        Raises LatraceError when it holds what latrace did not write, or cannot be removed.
        """
        shown = self.path / name
        with _explained(shown, "remove"), acting_as(self._caller):
            fd = self._open_own(name)
            if fd is None:
                return False
            try:
                try:
                    _lock(fd, shown)
                except _InUseError:
                    return False
                entries = self._entries_of(fd, shown)
                if not _same(self._fd, name, os.fstat(fd)):
                    return False  # another of us was faster
                doomed = name if _is_temporary(name) else _temporary_name()
                if doomed != name:
                    os.rename(name, doomed, src_dir_fd=self._fd, dst_dir_fd=self._fd)
                for entry in entries:
                    with suppress(FileNotFoundError):
                        os.unlink(entry, dir_fd=fd)
                if not _same(self._fd, doomed, os.fstat(fd)):
                    return False  # exchanged under us: what is there now is not ours
                os.rmdir(doomed, dir_fd=self._fd)
            finally:
                os.close(fd)
        return True

    def _open_own(self, name: str) -> int | None:
        """Open one of our directories; None when it is none. OSError when it cannot be read."""
        try:
            if not _is_own_directory(os.stat(name, dir_fd=self._fd, follow_symlinks=False)):
                return None
            fd = os.open(name, _DIRECTORY, dir_fd=self._fd)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                return None
            raise
        if not _is_own_directory(os.fstat(fd)):
            os.close(fd)
            return None
        return fd

    def _entries_of(self, fd: int, shown: Path) -> list[str]:
        """The files of one of ours. Raises LatraceError at the first that is not."""
        entries: list[str] = []
        with os.scandir(fd) as found:
            for entry in found:
                try:
                    ours = _is_ours(fd, entry.name, self._files)
                except FileNotFoundError:  # removed while we look
                    continue
                if not ours or len(entries) >= _MOST_ENTRIES:
                    raise LatraceError(
                        f"{shown} holds what latrace did not write: {entry.name!r}",
                        hint="latrace leaves it alone; remove it yourself when it is of no use",
                    )
                entries.append(entry.name)
        return entries

    def close(self) -> None:
        """Let the directory go. Safe to call again."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def open_output_folder(path: Path, *, files: re.Pattern[str]) -> OutputFolder:
    """Open `path`, or make it: the directory that captures are to be made in.

    `files`: the names that files of these captures have beside those that all captures have.

    Raises UsageError for a name that is none, LatraceError when it cannot be had: a link in its
    place, too.
    """
    caller = calling_user()
    parent_path, name = _split(path)
    shown = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow links
    with _explained(shown), acting_as(caller):
        parent = os.open(parent_path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=parent)
            if stat.S_ISLNK(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            fd = os.open(name, _DIRECTORY, dir_fd=parent)
        finally:
            os.close(parent)
    return OutputFolder(shown, fd, caller, files)


def _same(parent: int, name: str, status: os.stat_result) -> bool:
    """Whether `name` is still what `status` is of."""
    try:
        there = os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (status.st_dev, status.st_ino)


def _is_own_directory(status: os.stat_result) -> bool:
    return stat.S_ISDIR(status.st_mode) and status.st_uid == _file_system_uid()


def _allocated(status: os.stat_result) -> int:
    # Some file systems allocate long after the write: the larger of both is what it comes to.
    return max(status.st_size, status.st_blocks * 512)


# --- single files ------------------------------------------------------------------------------


@contextmanager
def open_output_file(path: Path, *, force: bool) -> Iterator[BinaryIO]:
    """Write a file that appears under its name when it is whole, or not at all.

    An existing one is refused, or with `force` replaced if it is a regular file. Yields it open
    for writing; an exception inside leaves nothing behind.

    Raises UsageError when the name is taken, LatraceError when it cannot be written.
    """
    caller = calling_user()
    parent_path, name = _split(path)
    temporary = _temporary_name()
    with _explained(path), acting_as(caller):
        parent = os.open(parent_path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with _explained(path), acting_as(caller):
            _check_free(parent, name, path, force=force)
            fd = os.open(temporary, _NEW_FILE, 0o600, dir_fd=parent)
        try:
            try:
                with os.fdopen(fd, "wb") as stream:
                    yield stream
            except OSError as error:
                if error.errno in _OUT_OF_ROOM:  # others are the caller's own affairs
                    raise write_error(path, error) from error
                raise
            with _explained(path), acting_as(caller):
                _check_free(parent, name, path, force=force)
                os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
        except BaseException:
            with suppress(OSError), acting_as(caller):
                os.unlink(temporary, dir_fd=parent)
            raise
    finally:
        os.close(parent)


def _check_free(parent: int, name: str, shown: Path, *, force: bool) -> None:
    if not _exists(parent, name):
        return
    if not force:
        raise UsageError(f"{shown} exists", hint="choose another name, or replace it with --force")
    if not stat.S_ISREG(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
        raise UsageError(f"{shown} is not a regular file", hint="choose another name")


# --- small parts -------------------------------------------------------------------------------


def _split(path: Path) -> tuple[Path, str]:
    if path.name in ("", ".."):
        raise UsageError(f"{path} cannot be a name for an output", hint="give it a name of its own")
    return path.parent, path.name


def _exists(parent: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _write_new(directory: int, name: str, data: bytes) -> None:
    with os.fdopen(os.open(name, _NEW_FILE, 0o600, dir_fd=directory), "wb") as stream:
        stream.write(data)


def _temporary_name() -> str:
    return f"{_TEMPORARY_PREFIX}{secrets.token_hex(8)}{_TEMPORARY_SUFFIX}"


def _is_temporary(name: str) -> bool:
    return name.startswith(_TEMPORARY_PREFIX) and name.endswith(_TEMPORARY_SUFFIX)


def _file_system_uid() -> int:
    return ctypes.c_uint32(_libc.setfsuid(ctypes.c_uint32(0xFFFFFFFF))).value


@contextmanager
def _explained(path: Path, what: str = "write") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise write_error(path, error, what=what) from error


def write_error(path: Path, error: OSError, *, what: str = "write") -> LatraceError:
    """Turn what the kernel said about `path`, which we were to `what`, into cause and remedy."""
    elsewhere = "choose another place with -o"
    match error.errno:
        case errno.ENOSPC:
            cause, hint = "the disk is full", f"make room, or {elsewhere}"
        case errno.EDQUOT:
            cause, hint = "the disk quota is used up", f"make room, or {elsewhere}"
        case errno.EFBIG:
            cause, hint = "the file-size limit is reached", "raise it with `ulimit -f`"
        case errno.EROFS:
            cause, hint = "the file system is read-only", elsewhere
        case errno.EACCES | errno.EPERM:
            cause = "permission denied"
            hint = f"under sudo, files are made with the calling user's rights; {elsewhere}"
        case errno.ELOOP:
            cause, hint = "a symbolic link is in the way", elsewhere
        case errno.ENOENT:
            cause, hint = "no such directory", f"make it first, or {elsewhere}"
        case errno.EEXIST:
            cause, hint = "the name is taken", elsewhere
        case _:
            cause, hint = (error.strerror or str(error)).lower(), elsewhere
    return LatraceError(f"cannot {what} {path}: {cause}", hint=hint)
