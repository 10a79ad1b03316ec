"""Perf maps: the text files in which JIT compilers say what they put where.

A line is `START SIZE name`, both numbers hexadecimal. The file grows, or is written anew (Java's);
it is indexed piece by piece with numpy and the names stay in it until one is asked for. Whoever may
write it may claim anything, so it is believed only when it belongs to the target's own user.
"""

from __future__ import annotations

import os
import stat
from typing import Final

import numpy as np

from latrace.tracer.symbols.frames import NAME_LIMIT, clean
from latrace.tracer.symbols.procfs import Fd, Refused, open_beneath, regular, reopen
from latrace.tracer.symbols.table import I64, U32, U64

SIZE_LIMIT: Final = 256 << 20
ENTRY_LIMIT: Final = 2 << 20
CODE_LIMIT: Final = np.uint64(1 << 30)
"""A longer piece of machine code is a malformed line."""
PIECE: Final = 1 << 20
"""Bytes indexed at a time; also the longest line that is understood."""
_TAIL: Final = 4096
"""Bytes that were indexed last: while the file still has them there, it has only grown."""
_HEAD: Final = 39
"""The longest that a line's numbers can be, with their blanks and the break before."""

_HEX = np.full(256, 255, dtype=np.uint8)
for _digits in (b"0123456789abcdef", b"0123456789ABCDEF"):
    _HEX[np.frombuffer(_digits, dtype=np.uint8)] = np.arange(16, dtype=np.uint8)


def perf_map_path(inner_pid: int) -> str:
    """Where a compiler writes its map, as its own process sees it: perf's convention."""
    return f"/tmp/perf-{inner_pid}.map"  # noqa: S108 - what lies there is judged when opened


def open_perf_map(root: Fd, *, inner_pid: int, uid: int) -> Fd:
    """The target's perf map, open for reading.

    Raises FileNotFoundError without one, Refused for one that must not be believed, OSError.
    """
    pinned = open_beneath(root.number, perf_map_path(inner_pid), flags=os.O_NOFOLLOW)
    status = regular(pinned, limit=SIZE_LIMIT)
    if status.st_uid != uid:
        raise Refused("owned by another user")
    if status.st_mode & stat.S_IWOTH:
        raise Refused("writable by everybody")
    return reopen(pinned)


class PerfMap:
    """An index of one perf map. `malformed` lines and `dropped` entries are counted."""

    def __init__(self, fd: Fd) -> None:
        self._fd = fd
        status = os.fstat(fd.number)
        self.identity = (status.st_dev, status.st_ino)
        self.malformed = 0
        self.dropped = 0
        self._reset()

    def _reset(self) -> None:
        self._offset = 0
        self._tail = b""
        self._skipping = False
        self._pieces: list[tuple[U64, U64, U64, U32]] = []
        self._count = 0
        self._sorted = False
        self._longest = np.uint64(0)
        none = np.zeros(0, dtype=np.uint64)
        self._starts, self._ends, self._names = none, none, none
        self._lengths = np.zeros(0, dtype=np.uint32)
        self._order = np.zeros(0, dtype=np.int64)
        self._order_starts = none

    def __len__(self) -> int:
        return self._count

    def catch_up(self, budget: int) -> bool:
        """Index what was appended, at most `budget` bytes; True when anything was learnt.

        A file that was written anew is read from its beginning. Raises OSError.
        """
        size = min(os.fstat(self._fd.number).st_size, SIZE_LIMIT)
        anew = not self._has(self._tail, self._offset - len(self._tail))
        if anew:
            self._reset()
        before, stop = self._count, min(size, self._offset + budget)
        while self._offset < stop:
            data = os.pread(self._fd.number, min(PIECE, stop - self._offset), self._offset)
            end = data.rfind(b"\n") + 1
            if not end:
                if len(data) < PIECE:
                    break
                # No line is that long: give up on it, once.
                self.malformed += not self._skipping
                self._skipping = True
                self._pass(data)
                continue
            begin = 0
            if self._skipping:
                begin = data.find(b"\n") + 1
                self._skipping = False
            self._index(data[begin:end], self._offset + begin)
            self._pass(data[:end])
        return anew or self._count != before

    def _has(self, text: bytes, at: int) -> bool:
        return os.pread(self._fd.number, len(text), at) == text

    def _pass(self, text: bytes) -> None:
        self._offset += len(text)
        self._tail = (self._tail + text[-_TAIL:])[-_TAIL:]

    def _index(self, text: bytes, base: int) -> None:
        if not text:
            return
        data = np.frombuffer(text, dtype=np.uint8)
        breaks = np.flatnonzero(data == ord("\n"))
        begins = np.concatenate((np.zeros(1, dtype=np.int64), breaks[:-1] + 1))
        blanks = np.append(np.flatnonzero(data == ord(" ")), (len(text), len(text)))
        which = np.searchsorted(blanks[:-2], begins)
        first, second = blanks[which], blanks[np.minimum(which + 1, blanks.size - 1)]
        sound = (first < breaks) & (second + 1 < breaks)
        begins, first, second, breaks = (
            column[sound] for column in (begins, first, second, breaks)
        )
        lines = sound.size
        starts, good = _hexadecimal(data, begins, first)
        sizes, good_sizes = _hexadecimal(data, first + 1, second)
        good &= good_sizes & (sizes > 0) & (sizes <= CODE_LIMIT) & (starts + sizes > starts)
        self.malformed += int(lines - np.count_nonzero(good))
        kept = np.flatnonzero(good)
        room = max(ENTRY_LIMIT - self._count, 0)
        self.dropped += max(kept.size - room, 0)
        kept = kept[:room]
        if not kept.size:
            return
        name_starts = second[kept] + 1
        lengths = np.minimum(breaks[kept] - name_starts, NAME_LIMIT).astype(np.uint32)
        names = (name_starts + base).astype(np.uint64)
        self._pieces.append((starts[kept], starts[kept] + sizes[kept], names, lengths))
        self._count += kept.size
        self._sorted = False

    def sort(self) -> None:
        """Make new entries ready for `lookup`, which else does it: the costly part of growing."""
        if self._sorted:
            return
        if self._pieces:
            self._pieces = [
                (
                    np.concatenate([piece[0] for piece in self._pieces]),
                    np.concatenate([piece[1] for piece in self._pieces]),
                    np.concatenate([piece[2] for piece in self._pieces]),
                    np.concatenate([piece[3] for piece in self._pieces]),
                )
            ]
            self._starts, self._ends, self._names, self._lengths = self._pieces[0]
            self._longest = np.max(self._ends - self._starts)
            self._order = np.argsort(self._starts, kind="stable")
            self._order_starts = self._starts[self._order]
        self._sorted = True

    def lookup(self, addrs: U64) -> I64:
        """Index of the newest entry that holds each address, -1 where none does."""
        self.sort()
        result = np.full(addrs.shape, -1, dtype=np.int64)
        if not self._count:
            return result
        # Code is moved and memory used again, so entries overlap: of all that could reach the
        # address the one written last is right.
        high = np.searchsorted(self._order_starts, addrs, side="right")
        floor = np.where(addrs > self._longest, addrs - self._longest, np.uint64(0))
        low = np.searchsorted(self._order_starts, floor, side="right")
        low[floor == 0] = 0
        for position in range(addrs.size):
            candidates = self._order[low[position] : high[position]]
            candidates = candidates[self._ends[candidates] > addrs[position]]
            if candidates.size:
                result[position] = candidates.max()
        return result

    def start(self, index: int) -> int:
        """Where the code begins."""
        return int(self._starts[index])

    def name(self, index: int) -> str | None:
        """What the compiler called it; None when the file has been written anew since."""
        at, length = int(self._names[index]), int(self._lengths[index])
        before = min(at, _HEAD)
        try:
            raw = os.pread(self._fd.number, before + length + 1, at - before)
            start, _size, nothing = raw[:before].rpartition(b"\n")[2].split(b" ")
            same = not nothing and int(start, 16) == self.start(index)
        except (OSError, ValueError):
            return None
        name, end = raw[before : before + length], raw[before + length :]
        return clean(name) if same and (end == b"\n" or length == NAME_LIMIT) else None

    def close(self) -> None:
        """Close the file."""
        self._fd.close()


def _hexadecimal(data: np.ndarray, begins: I64, ends: I64) -> tuple[U64, np.ndarray]:
    """Numbers written between `begins` and `ends`, with or without `0x`, and which are sound."""
    prefixed = (ends - begins > 2) & (data[begins] == ord("0"))
    prefixed &= (data[np.minimum(begins + 1, data.size - 1)] | 0x20) == ord("x")
    begins = begins + 2 * prefixed
    sound = (ends > begins) & (ends - begins <= 16)
    values = np.zeros(begins.shape, dtype=np.uint64)
    for column in range(16):
        here = begins + column
        active = here < ends
        digits = _HEX[data[np.minimum(here, data.size - 1)]]
        sound &= ~active | (digits < 16)
        values = np.where(active, values << np.uint64(4) | digits.astype(np.uint64), values)
    return values, sound
