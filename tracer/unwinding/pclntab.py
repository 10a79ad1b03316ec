"""Frames of Go code from `.gopclntab`: how far each instruction has moved the stack pointer.

The linker writes the same into `.debug_frame`, which stripping takes; this one stays, for the
runtime itself.
Layouts of Go 1.16, 1.18 and 1.20: runtime/symtab.go (`pcHeader`, `_func`, `step`).
"""

from __future__ import annotations

import struct
from typing import Final

import numpy as np
import numpy.typing as npt

from .leb import I64, U64
from .records import CfiError
from .rules import NO_RULE, RETURN, RSP, fixed_rules, simple_rule
from .table import MAX_ROWS, MAX_RULES, UnwindTable

_GO_1_16: Final = 0xFFFF_FFFA
_SINCE_1_18: Final = (0xFFFF_FFF0, 0xFFFF_FFF1)
_HEADER_BYTES: Final = 8
_WORD: Final = 8
_MAX_FUNCTIONS: Final = 4 << 20
_MOST_MOVED: Final = 1 << 30
"""Bytes of a frame; Go's largest stack."""
_LONGEST: Final = 5
"""Bytes of a number of 32 bits."""

Moves = tuple[list[int], list[int]]
"""Where, from the beginning of a function, the stack pointer has moved to a new distance; these."""


class _Functions:
    """starts: (n + 1,) uint64, the end of the last one behind. offsets: (n,) of their moves, 0: of
    them nothing is said. moves: the bytes that those are in."""

    def __init__(self, data: bytes, text: int) -> None:
        """Raises CfiError. `text`: the address of the code, where the table leaves it open."""
        if len(data) < _HEADER_BYTES + 8 * _WORD:
            raise CfiError("too short")
        magic, _, _, self.quantum, pointer = struct.unpack_from("<IBBBB", data)
        if pointer != _WORD or magic not in (_GO_1_16, *_SINCE_1_18):
            raise CfiError("of another version of Go")
        old = magic == _GO_1_16
        header = struct.unpack_from("<8Q", data, _HEADER_BYTES)
        count = header[0]
        moves_at, table_at = header[5:7] if old else header[6:8]
        base, entry = (0, np.dtype("<u8")) if old else (header[2] or text, np.dtype("<u4"))
        if not 0 < count <= _MAX_FUNCTIONS:
            raise CfiError("an absurd number of functions")
        cells = 2 * count + 1
        if moves_at >= len(data) or table_at + cells * entry.itemsize > len(data):
            raise CfiError("it points outside of itself")
        table = np.frombuffer(data, entry, cells, table_at).astype(np.uint64)
        self.starts: U64 = table[0::2] + np.uint64(base)
        # Of a function's record: its address, then three numbers, then where its moves are.
        place = table[1::2] + np.uint64(table_at + entry.itemsize + 12)
        if (self.starts[1:] < self.starts[:-1]).any() or (place > len(data) - 4).any():
            raise CfiError("functions out of order, or outside of it")
        words = np.ndarray((len(data) - 3,), "<u4", data, strides=(1,))
        self.offsets: I64 = words[place.astype(np.int64)].astype(np.int64)
        self.moves = data[moves_at:]


class _Reader:
    """Decodes moves, each only once: many functions share theirs."""

    def __init__(self, functions: _Functions) -> None:
        self._data, self._quantum = functions.moves, functions.quantum
        self._known: dict[int, Moves | None] = {}
        self._left = MAX_ROWS

    def read(self, offset: int) -> Moves | None:
        """The moves there, None for what is damaged. Raises CfiError for more than is real."""
        if offset not in self._known:
            try:
                self._known[offset] = self._decode(offset)
            except IndexError:
                self._known[offset] = None
        return self._known[offset]

    def _decode(self, at: int) -> Moves | None:
        places: list[int] = []
        moved: list[int] = []
        place, value = 0, -1
        while True:
            number, at = self._number(at)
            if number == 0 and places:
                return places, moved
            value += -(number + 1 >> 1) if number & 1 else number >> 1
            if not 0 <= value <= _MOST_MOVED or place >= 1 << 32:
                return None
            places.append(place)
            moved.append(value)
            number, at = self._number(at)
            place += number * self._quantum
            self._left -= 1
            if self._left < 0:
                raise CfiError("more rows than any real section makes")

    def _number(self, at: int) -> tuple[int, int]:
        value = 0
        for index in range(_LONGEST):
            byte = self._data[at + index]
            value |= (byte & 0x7F) << 7 * index
            if byte < 0x80:
                return value, at + index + 1
        raise IndexError


def compile_pclntab(data: bytes, *, text: int, low: int, high: int) -> UnwindTable:
    """The table of a section's bytes; `text`: where the code begins, `low`, `high`: what may hold
    code. Raises CfiError for what is none, or larger than any real one."""
    functions = _Functions(data, text)
    reader = _Reader(functions)
    begins, ends = functions.starts[:-1], functions.starts[1:]
    real = (ends > begins) & (begins >= low) & (ends <= high)
    begins, ends, offsets = begins[real], ends[real], functions.offsets[real]
    empty: Moves = [0], [-1]
    found = [reader.read(offset) or empty if offset else empty for offset in offsets.tolist()]
    counts = np.array([len(places) for places, _ in found], np.int64)
    if int(counts.sum()) + ends.size > MAX_ROWS:
        raise CfiError("more rows than any real section makes")
    owner = np.repeat(np.arange(counts.size), counts)
    flat = np.array([place for places, _ in found for place in places], np.uint64)
    moved = np.array([value for _, values in found for value in values], np.int64)
    pcs = begins[owner] + flat
    inside = pcs < ends[owner]
    return _assemble(
        np.concatenate((ends, pcs[inside])),
        np.concatenate((np.full(ends.size, -1, np.int64), moved[inside])),
    )


def _assemble(pcs: U64, moved: I64) -> UnwindTable:
    """The table; moved: -1 where nothing is said."""
    order = np.argsort(pcs, kind="stable")
    pcs, moved = pcs[order], moved[order]
    # Where a function ends, the next one's row comes behind, and counts.
    last = np.append(pcs[1:] != pcs[:-1], True)[: pcs.size]
    pcs, moved = pcs[last], moved[last]
    fresh = np.append(True, moved[1:] != moved[:-1])[: pcs.size]
    pcs, moved = pcs[fresh], moved[fresh]
    distances, which = np.unique(moved[moved >= 0], return_inverse=True)
    own = fixed_rules()
    if distances.size + len(own) > MAX_RULES or (pcs.size and int(pcs[-1] - pcs[0]) >> 32):
        raise CfiError("larger than any real section")
    rule: npt.NDArray[np.uint16] = np.full(moved.size, NO_RULE, np.uint16)
    rule[moved >= 0] = (which + len(own)).astype(np.uint16)
    base = int(pcs[0]) if pcs.size else 0
    return UnwindTable(
        base,
        (pcs - np.uint64(base)).astype(np.uint32),
        rule,
        np.concatenate(
            [own, *(simple_rule(RSP, 8 + each, saved={RETURN: -8}) for each in distances.tolist())]
        ),
    )
