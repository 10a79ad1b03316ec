"""Read a BPF ring buffer in bulk: its pages are mapped and a whole batch is one numpy array.

Layout (kernel/bpf/ringbuf.c): a page with the consumer's position, a page with the producer's, then
the data, mapped twice in a row so that no record wraps. Each record has an 8-byte header: its
length with a BUSY bit while it is being written, and a page offset.

Memory ordering. The kernel publishes the producer's position with a release store and clears BUSY
with a full barrier (xchg). A reader must therefore not see a record's content older than its
header, nor a header older than the position. x86-64 and s390x never reorder loads with loads, or a
store with earlier loads, and numpy's copies are separate calls that no compiler merges: plain loads
suffice. Elsewhere membarrier(2) stands between the three loads and before the store of our own
position; it makes the calling thread run a full barrier (membarrier(2), NOTES).
"""

from __future__ import annotations

import ctypes
import mmap
import platform

import numpy as np
import numpy.typing as npt

from .records import CELL_BYTES, COPY

_HEADER_BYTES = 8
_STRIDE = _HEADER_BYTES + CELL_BYTES
_BUSY = 1 << 31
_CELL = np.dtype([("len", "<u4"), ("page", "<u4"), ("cell", f"V{CELL_BYTES}")])
_NOTHING = np.empty(0, _CELL["cell"])

_LOADS_STAY_ORDERED = platform.machine() in {"x86_64", "s390x"}
_NR_MEMBARRIER = {"aarch64": 283, "riscv64": 283, "ppc64le": 365}
_PRIVATE_EXPEDITED, _REGISTER_PRIVATE_EXPEDITED = 8, 16


def _no_fence() -> None:
    """Loads stay ordered on this machine."""


def _membarrier() -> None:
    _libc.syscall(_NR_MEMBARRIER[platform.machine()], _PRIVATE_EXPEDITED, 0, 0)


_libc = ctypes.CDLL(None, use_errno=True)
if _LOADS_STAY_ORDERED:
    _fence = _no_fence
else:
    _libc.syscall(_NR_MEMBARRIER[platform.machine()], _REGISTER_PRIVATE_EXPEDITED, 0, 0)
    _fence = _membarrier


class _Pages:
    """The pages of a ring buffer. `size` is its data size in bytes, a power of two."""

    def __init__(self, fd: int, size: int) -> None:
        page = mmap.PAGESIZE
        self.size = size
        self._consumer_map = mmap.mmap(fd, page)
        self._producer_map = mmap.mmap(
            fd, page + 2 * size, mmap.MAP_SHARED, mmap.PROT_READ, offset=page
        )
        self._consumer = np.frombuffer(self._consumer_map, "<u8", 1)
        self._producer = np.frombuffer(self._producer_map, "<u8", 1)
        self._data = np.frombuffer(self._producer_map, "u1", offset=page)

    @property
    def produced(self) -> int:
        """How many bytes the probes have written since the start."""
        return int(self._producer[0])

    def used(self) -> float:
        """The share of the ring that waits to be read, 0 to 1."""
        return (int(self._producer[0]) - int(self._consumer[0])) / self.size

    def close(self) -> None:
        """Unmap it. The arrays handed out are copies and stay valid."""
        del self._consumer, self._producer, self._data
        self._consumer_map.close()
        self._producer_map.close()


class Ring(_Pages):
    """One ring buffer of equal cells."""

    def read(self, max_bytes: int = 4 << 20) -> npt.NDArray[np.void]:
        """All finished cells up to `max_bytes` of ring, copied out; their room is given back.

        Returns an array of shape (n,) of `CELL_BYTES`-byte cells. A cell that is still being
        written ends the batch.
        """
        consumer, producer = int(self._consumer[0]), int(self._producer[0])
        if consumer == producer:
            return _NOTHING
        waiting = min(producer - consumer, max_bytes // _STRIDE * _STRIDE)
        start = consumer & (self.size - 1)
        _fence()
        cells = self._data[start : start + waiting].view(_CELL)
        busy = np.flatnonzero(cells["len"] & _BUSY)
        if len(busy):
            cells = cells[: busy[0]]
        _fence()
        batch = cells["cell"].copy()
        _fence()
        self._consumer[0] = consumer + len(cells) * _STRIDE
        return batch


class CopyRing(_Pages):
    """The ring buffer of stack copies: records of many sizes, and few of them."""

    def read(self) -> list[tuple[npt.NDArray[np.void], npt.NDArray[np.uint8]]]:
        """All finished records, copied out: the head, shape (1,) of COPY, and the stack's bytes.

        Their room is given back, and stays as it is until the probes write there again.
        """
        consumer, producer = int(self._consumer[0]), int(self._producer[0])
        _fence()
        found = []
        while consumer < producer:
            start = consumer & (self.size - 1)
            length = int(self._data[start : start + 4].view("<u4")[0])
            if length & _BUSY:
                break
            _fence()
            record = self._data[start + _HEADER_BYTES : start + _HEADER_BYTES + length]
            head = record[: COPY.itemsize].view(COPY).copy()
            found.append((head, record[COPY.itemsize :][: int(head["bytes"][0])].copy()))
            consumer += _HEADER_BYTES + -(-length // 8) * 8
        _fence()
        self._consumer[0] = consumer
        return found


def page_align(size: int) -> int:
    """The next power of two that is at least `size` and one page: what a ring can have."""
    return max(mmap.PAGESIZE, 1 << (size - 1).bit_length())
