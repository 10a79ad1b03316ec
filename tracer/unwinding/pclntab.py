"""Frames of Go code from `.gopclntab`: how far each instruction has moved the stack pointer.

The linker writes the same into `.debug_frame`, which stripping takes; this one stays, for the
runtime itself. The encoding is that of Go's runtime/symtab.go (`step`).
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from latrace.tracer.symbols.gopclntab import MOVES, FunctionTable, PclntabError

from .leb import I64, U64
from .records import CfiError
from .rules import NO_RULE, RETURN, RSP, fixed_rules, simple_rule
from .table import MAX_ROWS, MAX_RULES, UnwindTable

_WORD: Final = 8
_MOST_MOVED: Final = 1 << 30
"""Bytes of a frame; Go's largest stack."""
_LONGEST: Final = 5
"""Bytes of a number of 32 bits."""

Moves = tuple[list[int], list[int]]
"""Where, from the beginning of a function, the stack pointer has moved to a new distance; these."""


class _Reader:
    """Decodes moves, each only once: many functions share theirs."""

    def __init__(self, data: bytes, quantum: int) -> None:
        self._data, self._quantum = data, quantum
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
    try:
        functions = FunctionTable(data, "<", text)
        offsets = functions.numbers(MOVES)
    except PclntabError as error:
        raise CfiError(str(error)) from error
    if functions.pointer != _WORD or functions.moves_at >= len(data):
        raise CfiError("not for x86-64, or it points outside of itself")
    reader = _Reader(data[functions.moves_at :], functions.quantum)
    begins, ends = functions.starts[:-1], functions.starts[1:]
    real = (ends > begins) & (begins >= low) & (ends <= high)
    begins, ends, offsets = begins[real], ends[real], offsets[real]
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
