"""The memory of a process that runs on meanwhile, by process_vm_readv(2)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Final

PIECES_LIMIT: Final = 1024
"""Of one read: UIO_MAXIOV (include/uapi/linux/uio.h)."""

_libc = ctypes.CDLL(None, use_errno=True)


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def read_pieces(pid: int, pieces: Sequence[tuple[int, int]]) -> bytes:
    """The bytes of pieces (address, length), up to the first one that cannot be read whole.

    At most `PIECES_LIMIT`; nothing of more, of a process that is gone or that we may not read.
    """
    data = ctypes.create_string_buffer(sum(length for _, length in pieces))
    remote = (_Iovec * len(pieces))(*(_Iovec(*piece) for piece in pieces))
    local = _Iovec(ctypes.addressof(data), len(data))
    got: int = _libc.process_vm_readv(pid, ctypes.byref(local), 1, remote, len(pieces), 0)
    return data.raw[: max(0, got)]
