"""Where a sleeping thread stands in user space, by its frame pointers.

Only for threads that still sleep when the trace ends: that sleep was not sampled, yet a long one is
what one wants to see. Their registers come from the kernel, their stack from process_vm_readv(2).
The layout of a frame (saved frame pointer, return address) is the System V ABI's, AMD64
supplement, 3.2.2.
"""

from __future__ import annotations

import ctypes
import struct

_libc = ctypes.CDLL(None, use_errno=True)
_MAX_FRAMES = 120
_MAX_FRAME_BYTES = 1 << 20


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def _read(pid: int, address: int, size: int) -> bytes | None:
    buffer = ctypes.create_string_buffer(size)
    local = _Iovec(ctypes.addressof(buffer), size)
    remote = _Iovec(address, size)
    got = _libc.process_vm_readv(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
    return buffer.raw if got == size else None


def user_frames(pid: int, ip: int, fp: int) -> list[int]:
    """Addresses from the leaf `ip` outwards; ends where the chain of frame pointers does.

    The thread may run meanwhile: each frame must lie above the last, and the walk is bounded.
    """
    frames = [ip] if ip else []
    while frames and len(frames) < _MAX_FRAMES:
        raw = _read(pid, fp, 16) if fp and not fp & 7 else None
        if raw is None:
            break
        above, address = struct.unpack("<QQ", raw)
        if not address:
            break
        frames.append(address)
        if not fp < above < fp + _MAX_FRAME_BYTES:
            break
        fp = above
    return frames
