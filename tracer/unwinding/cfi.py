"""Compile call frame information into a table: all functions of a section at once.

A section has up to 10^5 functions with ten instructions each, too many for a loop. None is needed:
each column of the state (the CFA's register, its offset, each register's rule) is what the last
instruction that wrote it said, and `restore_state` only points further back, to the matching
`remember_state` (DWARF 5, 6.4.3).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from .instructions import (
    BAD,
    BASE,
    EXTRA,
    HAS_BASE,
    HAS_OFFSET,
    KIND,
    MOVES,
    NO_OFFSET,
    OFFSET_MASK,
    REMEMBER,
    RESTORE_STATE,
    Instructions,
)
from .leb import I64, U64
from .records import CfiError, Programs, Section, read_programs
from .rules import (
    BAD_RULE,
    CFA_OFFSET,
    CFA_UNSUPPORTED,
    COLUMNS,
    NO_RULE,
    RULE,
    Rules,
    fixed_rules,
)
from .table import MAX_ROWS, MAX_RULES, U16, UnwindTable

Mask = npt.NDArray[np.bool_]

CHUNK: Final = 1 << 20
"""Bytes that are looked at together, which takes some 150 times as much memory; no function has
so many instructions."""


@dataclass(frozen=True, slots=True)
class _State:
    """What holds at the end of each CIE: the CFA, and each register, as packed numbers.

    base, offset: (k,) int64. registers: (k, COLUMNS) int64.
    """

    base: I64
    offset: I64
    registers: I64

    @classmethod
    def empty(cls, count: int) -> _State:
        base, offset = np.zeros((2, count), dtype=np.int64)
        return cls(base, offset, np.zeros((count, COLUMNS), dtype=np.int64))


@dataclass(frozen=True, slots=True)
class _Rows:
    """Where which state begins: addresses (r,) uint64, function (r,) int64 and the columns."""

    pcs: U64
    function: I64
    state: _State


class _Writers:
    """Which instruction last wrote a column, with `restore_state` followed back."""

    def __init__(self, instructions: Instructions) -> None:
        self._count = len(instructions)
        self._index = np.arange(self._count)
        self._begins = instructions.begins
        code, function = instructions.code, instructions.function
        which = np.flatnonzero((code == REMEMBER) | (code == RESTORE_STATE))
        up = code[which] == REMEMBER
        step = np.where(up, 1, -1)
        depth = np.cumsum(step)
        if which.size:
            # Counted from where each function's first one is.
            fresh = np.append(True, np.diff(function[which]) != 0)
            first = np.maximum.accumulate(np.where(fresh, self._index[: which.size], 0))
            depth = depth - (depth - step)[first]
        level = np.where(up, depth, depth + 1)
        order = np.lexsort((which, level, function[which]))
        ordered, is_up = which[order], up[order]
        # In one level of one function they alternate; a restore without its remember is bad.
        same = np.zeros(order.size, dtype=np.bool_)
        same[1:] = (function[ordered][1:] == function[ordered][:-1]) & (
            level[order][1:] == level[order][:-1]
        )
        matched = np.zeros(order.size, dtype=np.bool_)
        matched[1:] = ~is_up[1:] & is_up[:-1] & same[1:]
        lonely = ordered[~is_up & ~matched]
        code[lonely] = BAD
        instructions.base[lonely] = np.int64(CFA_UNSUPPORTED) << KIND
        at = np.flatnonzero(matched)
        self._restores = ordered[at]
        self._remembers = ordered[at - 1]
        self._number = np.full(self._count, -1, dtype=np.int64)
        self._number[self._restores] = np.arange(at.size)

    def last(self, writes: Mask, ends: I64) -> I64:
        """For each of the instructions `ends`, the last one up to it that wrote. (r,) int64."""
        marks = writes | self._begins
        marks[self._restores] = True
        newest = np.maximum.accumulate(np.where(marks, self._index, 0))
        source = newest[self._remembers]
        # Each round doubles how far back it looks.
        while source.size:
            number = self._number[source]
            again = np.flatnonzero(number >= 0)
            if not again.size:
                break
            source[again] = source[number[again]]
        found = newest[ends]
        number = self._number[found]
        return np.where(number >= 0, source[np.maximum(number, 0)] if source.size else 0, found)


def _run(section: Section, programs: Programs, initial: _State) -> _Rows:
    """The states that the instructions of these programs go through."""
    instructions = Instructions(section, programs)
    writers = _Writers(instructions)
    code = instructions.code
    heads = np.flatnonzero(instructions.begins | MOVES[code])
    ends = np.append(heads[1:] - 1, len(instructions) - 1)
    function = instructions.function[heads]
    cie = programs.cie[function]

    def column(writes: Mask, values: I64, first: I64) -> I64:
        """What the last writer before the end of each row said."""
        writer = writers.last(writes, ends)
        return np.where(instructions.begins[writer], first[cie], values[writer])

    base = column(HAS_BASE[code], instructions.base, initial.base)
    offset = column(HAS_OFFSET[code], instructions.offset, initial.offset)
    registers = initial.registers[cie]
    present = np.unique(instructions.register)
    for register in present[(present >= 0) & (present < COLUMNS)].tolist():
        first = initial.registers[:, register]
        values = np.where(instructions.restores, first[instructions.cie], instructions.packed)
        registers[:, register] = column(instructions.register == register, values, first)
    pcs = instructions.locations()[heads]
    return _Rows(pcs, function, _State(base, offset, registers))


def _chunks(programs: Programs) -> Iterator[Programs]:
    """The programs in runs of at most `CHUNK` bytes; a longer program is left out."""
    first, count = 0, programs.starts.size
    while first < count:
        limit = programs.starts[first] + CHUNK
        after = int(np.searchsorted(programs.stops, limit, side="right"))
        if after > first:
            yield programs.cut(first, after)
        first = max(after, first + 1)


def _initial(section: Section, programs: Programs) -> _State:
    """The state that each CIE's own instructions lead to."""
    cies = programs.cies
    state = _State.empty(len(cies))
    order = np.argsort(np.array([cie.start for cie in cies], dtype=np.int64), kind="stable")
    nowhere = np.zeros(len(cies), dtype=np.uint64)
    spans = np.array([(cie.start, cie.end) for cie in cies], dtype=np.int64).reshape(-1, 2)[order]
    shared = Programs(programs.data, cies, nowhere, nowhere, spans[:, 0], spans[:, 1], order)
    for part in _chunks(shared):
        rows = _run(section, part, _State.empty(len(cies)))
        last = np.flatnonzero(np.diff(rows.function, append=-1))
        cie = part.cie[rows.function[last]]
        state.base[cie] = rows.state.base[last]
        state.offset[cie] = rows.state.offset[last]
        state.registers[cie] = rows.state.registers[last]
    return state


class _RuleBook:
    """The different rules of a module, in the order in which they turn up."""

    def __init__(self) -> None:
        self._rules: list[Rules] = [fixed_rules()]
        self._known: dict[bytes, int] = {}
        self._count = len(self._rules[0])

    def rules(self) -> Rules:
        """All of them. (k,) RULE."""
        return np.concatenate(self._rules)

    def number(self, state: _State, signal: Mask) -> U16:
        """The rule of each row; `BAD_RULE` for one that is not understood. (r,) uint16."""
        kind = state.base >> KIND
        plain = kind == CFA_OFFSET
        sane = (state.offset >= -(1 << 31)) & (state.offset < 1 << 31)
        good = (kind != CFA_UNSUPPORTED) & np.where(plain, sane, state.offset == NO_OFFSET)
        cfa = state.base | np.where(plain, state.offset & OFFSET_MASK, 0)
        used = np.flatnonzero(state.registers.any(axis=0))
        columns = [cfa, signal.astype(np.int64), *state.registers.T[used]]

        # A digest of each row finds the different ones; that they are is checked.
        digest = np.zeros(kind.shape, dtype=np.uint64)
        for column in columns:
            digest = (digest ^ column.view(np.uint64)) * np.uint64(0x9E37_79B9_7F4A_7C15)
            digest ^= digest >> np.uint64(29)
        _, first, which = np.unique(digest, return_index=True, return_inverse=True)
        for column in columns:
            good &= column == column[first][which]

        rules = np.zeros(first.size, dtype=RULE)
        rules["cfa_kind"], rules["cfa_extra"] = cfa[first] >> KIND, cfa[first] >> EXTRA & 0xFF
        rules["cfa_base"], rules["cfa_offset"] = cfa[first] >> BASE & 0xFF, _offsets(cfa[first])
        rules["signal"] = signal[first]
        registers = state.registers[first]
        rules["kind"], rules["base"] = registers >> KIND, registers >> BASE & 0xFF
        rules["offset"] = _offsets(registers)
        numbers = np.array(
            [self._add(rules[at : at + 1]) for at in range(len(rules))], dtype=np.uint16
        )
        return np.where(good, numbers[which], np.uint16(BAD_RULE))

    def _add(self, rule: Rules) -> int:
        key = rule.tobytes()
        known = self._known.get(key)
        if known is None:
            if self._count == MAX_RULES:
                return BAD_RULE
            known = self._known[key] = self._count
            self._rules.append(rule)
            self._count += 1
        return known


def _offsets(packed: I64) -> npt.NDArray[np.int32]:
    return (packed & OFFSET_MASK).astype(np.uint32).view(np.int32)


def compile_section(section: Section) -> UnwindTable:
    """The table of a section. Raises CfiError for one that is larger than any real one.

    What is damaged or not understood costs the functions concerned, not the rest.
    """
    programs = read_programs(section)
    initial = _initial(section, programs)
    signals = np.array([cie.signal for cie in programs.cies], dtype=np.bool_)
    book = _RuleBook()
    pcs: list[U64] = []
    numbers: list[U16] = []
    for part in _chunks(programs):
        rows = _run(section, part, initial)
        function, state = rows.function, rows.state
        keep = (rows.pcs >= part.begins[function]) & (rows.pcs < part.ends[function])
        # What holds for no instruction at all is overruled by what follows.
        keep[:-1] &= (rows.pcs[1:] > rows.pcs[:-1]) | (function[1:] != function[:-1])
        at = np.flatnonzero(keep)
        chosen = _State(state.base[at], state.offset[at], state.registers[at])
        numbers.append(book.number(chosen, signals[part.cie[function[at]]]))
        pcs.append(rows.pcs[at])
        if sum(map(len, pcs)) + programs.ends.size > MAX_ROWS:
            raise CfiError("more rows than any real section makes")
    return _assemble(programs, pcs, numbers, book.rules())


def _assemble(programs: Programs, pcs: list[U64], numbers: list[U16], rules: Rules) -> UnwindTable:
    """Rows in the order of their addresses, with the gaps between functions."""
    gaps = np.setdiff1d(programs.ends, programs.begins)
    address = np.concatenate([gaps, *pcs])
    number = np.concatenate([np.full(gaps.size, NO_RULE, dtype=np.uint16), *numbers])
    order = np.argsort(address, kind="stable")
    address, number = address[order], number[order]
    # Where two say something about one address (`set_loc` may go back), the later one counts.
    keep = np.ones(address.size, dtype=np.bool_)
    keep[:-1] = address[1:] > address[:-1]
    address, number = address[keep], number[keep]
    keep = np.ones(address.size, dtype=np.bool_)
    keep[1:] = number[1:] != number[:-1]
    address, number = address[keep], number[keep]
    base = int(address[0]) if address.size else 0
    if address.size and int(address[-1]) - base > 0xFFFF_FFFF:
        raise CfiError("code that spans more than 4 GiB")
    return UnwindTable(base, (address - np.uint64(base)).astype(np.uint32), number, rules)
