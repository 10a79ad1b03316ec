"""Instructions of call frame information, all of many functions decoded at once.

Where an instruction ends is worked out for every byte, as if one began there; following that from
the first one of each function then takes one step per instruction of the longest function. The
instructions are those of DWARF 5, 6.4.2 and 7.24, and the GNU ones of GCC's unwind-dw2.c.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from . import rules
from .expressions import NOT_UNDERSTOOD, Expression, understand
from .leb import I64, LONGEST, PADDING, U64, Bytes, fixed, sleb, uleb
from .records import Programs, Section, pointers, width_of
from .rules import CFA, CFA_OFFSET, CFA_UNSUPPORTED

Mask = npt.NDArray[np.bool_]

_MAX_KNOWN: Final = 1 << 12
"""Different expressions that are remembered; a module has a handful."""
_LONGEST_KNOWN: Final = 32
"""Bytes of the longest expression that is looked at: the longest understood one is shorter."""

_NOP, _SET_LOC, _LOC1, _LOC2, _LOC4 = range(5)
_OFFSET_EXTENDED, _RESTORE_EXTENDED, _UNDEFINED, _SAME, _REGISTER = range(5, 10)
REMEMBER, RESTORE_STATE = 0x0A, 0x0B
_DEF_CFA, _DEF_CFA_REGISTER, _DEF_CFA_OFFSET, _DEF_CFA_EXPRESSION = range(0x0C, 0x10)
_EXPRESSION, _OFFSET_EXTENDED_SF, _DEF_CFA_SF, _DEF_CFA_OFFSET_SF = range(0x10, 0x14)
_VAL_OFFSET, _VAL_OFFSET_SF, _VAL_EXPRESSION = range(0x14, 0x17)
_ARGS_SIZE, _NEGATIVE_OFFSET = 0x2E, 0x2F
_ADVANCE, _OFFSET, _RESTORE = 0x40, 0x80, 0xC0
INIT, BAD = 0x100, 0x101
"""Not in any file: the beginning of a function; what is not understood, which ends it."""
_CODES: Final = 0x102

# How long an instruction is: so many bytes, then so many numbers, then perhaps a block.
_FIXED, _ONE, _TWO, _BLOCK, _ONE_BLOCK, _POINTER, _UNKNOWN = range(7)


def _shapes() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    shape = np.full(256, _UNKNOWN, dtype=np.uint8)
    size = np.zeros(256, dtype=np.uint8)
    for code, length in ((_NOP, 1), (_LOC1, 2), (_LOC2, 3), (_LOC4, 5), (REMEMBER, 1)):
        shape[code], size[code] = _FIXED, length
    shape[RESTORE_STATE], size[RESTORE_STATE] = _FIXED, 1
    for code in (_RESTORE_EXTENDED, _UNDEFINED, _SAME, _DEF_CFA_REGISTER, _DEF_CFA_OFFSET):
        shape[code] = _ONE
    for code in (_DEF_CFA_OFFSET_SF, _ARGS_SIZE):
        shape[code] = _ONE
    for code in (_OFFSET_EXTENDED, _REGISTER, _DEF_CFA, _OFFSET_EXTENDED_SF, _DEF_CFA_SF):
        shape[code] = _TWO
    for code in (_VAL_OFFSET, _VAL_OFFSET_SF, _NEGATIVE_OFFSET):
        shape[code] = _TWO
    shape[_DEF_CFA_EXPRESSION] = _BLOCK
    shape[[_EXPRESSION, _VAL_EXPRESSION]] = _ONE_BLOCK
    shape[_SET_LOC] = _POINTER
    shape[_ADVANCE:_OFFSET], size[_ADVANCE:_OFFSET] = _FIXED, 1
    shape[_OFFSET:_RESTORE] = _ONE
    shape[_RESTORE:], size[_RESTORE:] = _FIXED, 1
    return shape, size


_SHAPE, _SIZE = _shapes()


def _flags(*codes: int) -> Mask:
    flags = np.zeros(_CODES, dtype=np.bool_)
    flags[list(codes)] = True
    return flags


MOVES: Final = _flags(_ADVANCE, _SET_LOC, _LOC1, _LOC2, _LOC4)
HAS_BASE: Final = _flags(_DEF_CFA, _DEF_CFA_SF, _DEF_CFA_REGISTER, _DEF_CFA_EXPRESSION, BAD)
HAS_OFFSET: Final = _flags(
    _DEF_CFA, _DEF_CFA_SF, _DEF_CFA_OFFSET, _DEF_CFA_OFFSET_SF, _DEF_CFA_EXPRESSION, BAD
)
_REGISTER_LAST: Final = _flags(_OFFSET, _RESTORE)
_REGISTER_FIRST: Final = _flags(
    _OFFSET_EXTENDED,
    _RESTORE_EXTENDED,
    _UNDEFINED,
    _SAME,
    _REGISTER,
    _EXPRESSION,
    _OFFSET_EXTENDED_SF,
    _VAL_OFFSET,
    _VAL_OFFSET_SF,
    _VAL_EXPRESSION,
    _NEGATIVE_OFFSET,
)

_RESTORES: Final = _flags(_RESTORE, _RESTORE_EXTENDED)

# A rule of the CFA or of a register in one number: kind, extra, base, offset, from the top.
KIND, EXTRA, BASE = np.int64(48), np.int64(40), np.int64(32)
OFFSET_MASK: Final = np.int64(0xFFFF_FFFF)
NO_OFFSET: Final = np.int64(1) << np.int64(40)
"""As an offset of the CFA: there is none, an expression was given."""


def _pack(kind: int, base: I64 | int, offset: I64) -> I64:
    """Rules in one number each; an offset that no function has makes them `UNSUPPORTED`."""
    packed = np.int64(kind) << KIND | np.int64(base) << BASE | offset & OFFSET_MASK
    sane = (offset >= -(1 << 31)) & (offset < 1 << 31)
    return np.where(sane, packed, np.int64(rules.UNSUPPORTED) << KIND)


def _behind(data: Bytes, starts: I64, widths: I64) -> I64:
    """For each byte, where the instruction ends that begins there, far past the data for none.

    starts: of the programs; widths: of a pointer in each.
    """
    size = data.size
    nowhere = np.int64(1 << 40)
    ends = np.where(data < 0x80, np.arange(1, size + 1), nowhere)
    after = np.minimum.accumulate(ends[::-1])[::-1]
    after[after - np.arange(size) > LONGEST] = nowhere
    # One more, so that what leads nowhere can be followed.
    after = np.append(after, nowhere)

    def number(at: I64) -> I64:
        return after[np.minimum(at, size)]

    def block(at: I64) -> I64:
        begin = number(at)
        length, _ = uleb(data, np.minimum(at, size - LONGEST))
        return begin + np.minimum(length, np.uint64(1 << 32)).view(np.int64)

    shape = _SHAPE[data]
    behind = np.arange(size, dtype=np.int64) + _SIZE[data]
    at = np.flatnonzero(shape == _ONE)
    behind[at] = number(at + 1)
    at = np.flatnonzero(shape == _TWO)
    behind[at] = number(number(at + 1))
    at = np.flatnonzero(shape == _BLOCK)
    behind[at] = block(at + 1)
    at = np.flatnonzero(shape == _ONE_BLOCK)
    behind[at] = block(number(at + 1))
    behind[shape == _UNKNOWN] = nowhere
    at = np.flatnonzero(shape == _POINTER)
    owner = np.maximum(np.searchsorted(starts, at, side="right") - 1, 0)
    behind[at] = at + 1 + widths[owner]
    return behind


def _walk(starts: I64, stops: I64, behind: I64) -> I64:
    """Where instructions begin, sorted: of every program from its start to its stop."""
    seen = np.zeros(behind.size, dtype=np.bool_)
    at, stop = starts, stops
    while at.size > 32:
        going = at < stop
        at, stop = at[going], stop[going]
        seen[at] = True
        at = behind[at]
    # What has the most instructions has many times more than the rest.
    following = memoryview(behind.data)
    for begin, end in zip(at.tolist(), stop.tolist(), strict=True):
        chain, position = [], begin
        while position < end:
            chain.append(position)
            position = following[position]
        seen[chain] = True
    return np.flatnonzero(seen)


class Instructions:
    """The instructions of some programs (at least one) in one row, and what each one says.

    Each program begins with one that is not in the file, `INIT`: `begins`. All arrays are (n,).
    at: positions. code: without operands. function, cie: indices of the program and of its CIE.
    restores: a register gets back the rule that its CIE gave it. register: which one gets a new
    rule, -1 for none; packed: that rule. base, offset: what the CFA becomes, where the code sets
    that.
    """

    def __init__(self, section: Section, programs: Programs) -> None:
        # Positions count from the byte before the first program.
        shift = int(programs.starts[0]) - 1
        data = programs.data[shift : int(programs.stops[-1]) + PADDING]
        starts, stops = programs.starts - shift, programs.stops - shift
        widths = np.array([width_of(cie.encoding) for cie in programs.cies], dtype=np.int64)
        behind = _behind(data, starts, widths[programs.cie])
        at = _walk(starts, stops, behind)
        # The byte before a program belongs to the head of its record.
        begins = np.zeros(data.size, dtype=np.bool_)
        begins[starts - 1] = True
        every = begins.copy()
        every[at] = True
        self.at = np.flatnonzero(every)
        self.begins = begins[self.at]
        self.function = np.cumsum(self.begins) - 1
        self.data = data
        self._section, self._shift, self._programs = section, shift, programs
        code = data[self.at].astype(np.int64)
        self._low = code & 0x3F
        code = np.where(code >= _ADVANCE, code & 0xC0, code)
        cut = (behind[self.at] > stops[self.function]) & ~self.begins
        code[cut] = BAD
        code[self.begins] = INIT
        self.code = code
        self._decode()

    def __len__(self) -> int:
        return int(self.at.size)

    def _which(self, *codes: int) -> I64:
        flags = _flags(*codes)
        return np.flatnonzero(flags[self.code])

    def _decode(self) -> None:
        cies = self._programs.cies
        data_align = np.array([cie.data_align for cie in cies], dtype=np.int64)
        self.cie = self._programs.cie[self.function]
        count, data = len(self), self.data
        self.register = np.full(count, -1, dtype=np.int64)
        self.packed = np.zeros(count, dtype=np.int64)
        self.base = np.zeros(count, dtype=np.int64)
        self.offset = np.full(count, NO_OFFSET, dtype=np.int64)

        def align(which: I64) -> I64:
            factors: I64 = data_align[self.cie[which]]
            return factors

        def small(values: U64) -> I64:
            return np.minimum(values, np.uint64(1 << 40)).view(np.int64)

        def small_signed(values: I64) -> I64:
            return np.clip(values, -(1 << 40), 1 << 40)

        # --- registers
        self.restores = _RESTORES[self.code]
        last = np.flatnonzero(_REGISTER_LAST[self.code])
        self.register[last] = self._low[last]
        first = np.flatnonzero(_REGISTER_FIRST[self.code])
        numbers, second = uleb(data, self.at[first] + 1)
        self.register[first] = small(numbers)
        rest = np.zeros(count, dtype=np.int64)
        rest[first] = second
        which = self._which(_OFFSET)
        rest[which] = self.at[which] + 1
        for codes, kind, sign in (
            ((_OFFSET, _OFFSET_EXTENDED), rules.MEMORY, 1),
            ((_NEGATIVE_OFFSET,), rules.MEMORY, -1),
            ((_VAL_OFFSET,), rules.VALUE, 1),
        ):
            which = self._which(*codes)
            offset = small(uleb(data, rest[which])[0]) * align(which) * sign
            self.packed[which] = _pack(kind, CFA, offset)
        for code, kind in ((_OFFSET_EXTENDED_SF, rules.MEMORY), (_VAL_OFFSET_SF, rules.VALUE)):
            which = self._which(code)
            offset = small_signed(sleb(data, rest[which])[0]) * align(which)
            self.packed[which] = _pack(kind, CFA, offset)
        self.packed[self._which(_UNDEFINED)] = np.int64(rules.UNDEFINED) << KIND
        which = self._which(_REGISTER)
        source = small(uleb(data, rest[which])[0])
        # One that is no register of ours makes an offset that is none.
        self.packed[which] = _pack(
            rules.VALUE, np.minimum(source, 15), np.where(source < CFA, 0, NO_OFFSET)
        )
        self._expressions(self._which(_EXPRESSION, _VAL_EXPRESSION), rest)

        # --- the CFA
        which = self._which(_DEF_CFA, _DEF_CFA_SF, _DEF_CFA_REGISTER)
        number, second = uleb(data, self.at[which] + 1)
        rest[which] = second
        base = small(number)
        self.base[which] = np.where(
            base < CFA,
            np.int64(CFA_OFFSET) << KIND | np.minimum(base, 15) << BASE,
            np.int64(CFA_UNSUPPORTED) << KIND,
        )
        which = self._which(_DEF_CFA_OFFSET, _DEF_CFA_OFFSET_SF)
        rest[which] = self.at[which] + 1
        which = self._which(_DEF_CFA, _DEF_CFA_OFFSET)
        self.offset[which] = small(uleb(data, rest[which])[0])
        which = self._which(_DEF_CFA_SF, _DEF_CFA_OFFSET_SF)
        self.offset[which] = small_signed(sleb(data, rest[which])[0]) * align(which)
        which = self._which(_DEF_CFA_EXPRESSION)
        rest[which] = self.at[which] + 1
        self._expressions(which, rest)
        self.base[self._which(BAD)] = np.int64(CFA_UNSUPPORTED) << KIND

    def _expressions(self, which: I64, blocks: I64) -> None:
        lengths, begins = uleb(self.data, blocks[which])
        text = self.data.tobytes() if which.size else b""
        known: dict[bytes, Expression] = {}
        ends = (begins + lengths.view(np.int64)).tolist()
        codes = self.code[which].tolist()
        places = zip(which.tolist(), begins.tolist(), ends, codes, strict=True)
        for index, begin, end, code in places:
            expression = text[begin:end]
            found = known.get(expression)
            if found is None:
                short = len(expression) <= _LONGEST_KNOWN
                found = understand(expression) if short else NOT_UNDERSTOOD
                if short and len(known) < _MAX_KNOWN:
                    known[expression] = found
            packed = found.base << int(BASE) | found.offset & 0xFFFF_FFFF
            if code == _DEF_CFA_EXPRESSION:
                self.base[index] = found.kind << int(KIND) | found.extra << int(EXTRA) | packed
                if found.kind == CFA_OFFSET:
                    self.offset[index] = found.offset
            elif found.kind == CFA_OFFSET:
                kind = rules.MEMORY if code == _EXPRESSION else rules.VALUE
                self.packed[index] = kind << int(KIND) | packed
            else:
                self.packed[index] = rules.UNSUPPORTED << int(KIND)

    def locations(self) -> U64:
        """The address that each instruction is about. (n,) uint64."""
        code, data, programs = self.code, self.data, self._programs
        delta = np.where(code == _ADVANCE, self._low, 0).astype(np.uint64)
        for operation, kind in ((_LOC1, "<u1"), (_LOC2, "<u2"), (_LOC4, "<u4")):
            which = self._which(operation)
            delta[which] = fixed(data, self.at[which] + 1, kind)
        code_align = np.array([cie.code_align for cie in programs.cies], dtype=np.uint64)
        if (code_align != 1).any():
            delta *= code_align[self.cie]
        moved = np.cumsum(delta)
        anchored, base = self.begins, np.zeros(len(self), dtype=np.uint64)
        base[self.begins] = programs.begins
        which = self._which(_SET_LOC)
        if which.size:
            anchored = anchored.copy()
            anchored[which] = True
            encodings = np.array([cie.encoding for cie in programs.cies], dtype=np.int64)
            for encoding in np.unique(encodings).tolist():
                mine = which[encodings[self.cie[which]] == encoding]
                where = self.at[mine] + 1 + self._shift
                base[mine] = pointers(self._section, programs.data, where, encoding)
        anchor = np.maximum.accumulate(np.where(anchored, np.arange(len(self)), 0))
        return base[anchor] + (moved - moved[anchor])
