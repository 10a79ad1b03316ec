"""Numbers of variable length (LEB128, DWARF 5, 7.6) and of fixed length, many at a time."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]

PADDING: Final = 32
"""Zero bytes that follow the data, so that no read near its end needs a check."""
LONGEST: Final = 10
"""Bytes of a LEB128 number: 64 bits need no more."""


def padded(data: bytes) -> Bytes:
    """The data with `PADDING` behind it. (len + PADDING,) uint8."""
    return np.frombuffer(data + bytes(PADDING), dtype=np.uint8)


def fixed(data: Bytes, at: I64, kind: str) -> npt.NDArray[Any]:
    """Numbers of a fixed size ("<u4", …) at positions that need not be aligned. (m,) to (m,)."""
    dtype = np.dtype(kind)
    count = max(data.size - dtype.itemsize + 1, 0)
    numbers: npt.NDArray[Any] = np.ndarray((count,), dtype, data, strides=(1,))[at]
    return numbers


def _groups(data: Bytes, at: I64) -> tuple[U64, I64, Bytes]:
    """Values without sign, how many bytes each one took, and its last byte."""
    last = data[at]
    values = (last & 0x7F).astype(np.uint64)
    lengths = np.ones(at.shape, dtype=np.int64)
    more = np.flatnonzero(last & 0x80)
    for number in range(1, LONGEST):
        if not more.size:
            break
        byte = data[at[more] + number]
        values[more] |= (byte & 0x7F).astype(np.uint64) << np.uint64(7 * number)
        lengths[more] += 1
        last[more] = byte
        more = more[(byte & 0x80) != 0]
    return values, lengths, last


def uleb(data: Bytes, at: I64) -> tuple[U64, I64]:
    """Unsigned numbers at these positions, and the positions behind them. (m,), (m,)."""
    values, lengths, _last = _groups(data, at)
    return values, at + lengths


def sleb(data: Bytes, at: I64) -> tuple[I64, I64]:
    """Signed numbers at these positions, and the positions behind them. (m,), (m,)."""
    values, lengths, last = _groups(data, at)
    negative = ((last & 0x40) != 0) & (lengths < LONGEST)
    values[negative] |= ~np.uint64(0) << (7 * lengths[negative]).astype(np.uint64)
    return values.view(np.int64), at + lengths


def uleb_at(data: bytes, at: int, end: int) -> tuple[int, int]:
    """One unsigned number and the position behind it. Raises IndexError past `end`."""
    value = shift = 0
    while True:
        if at >= end or shift > 63:
            raise IndexError("a number past the end")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            return value, at


def sleb_at(data: bytes, at: int, end: int) -> tuple[int, int]:
    """One signed number and the position behind it. Raises IndexError past `end`."""
    begin = at
    value, at = uleb_at(data, at, end)
    if data[at - 1] & 0x40:
        value -= 1 << 7 * (at - begin)
    return value, at
