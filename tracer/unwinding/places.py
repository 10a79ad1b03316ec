"""Which rule holds at an address of a process: its memory map, the modules' tables, a memory.

Stacks of one process go through the same few thousand return addresses over and over, so that
what was found for one is kept; that makes a look-up independent of the number of modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from .rules import (
    BAD_RULE,
    CFA_DEREF,
    CFA_NONE,
    CFA_OFFSET,
    CFA_UNSUPPORTED,
    COLUMNS,
    MEMORY,
    NO_RULE,
    RBP,
    RETURN,
    RSP,
    SAME,
    UNDEFINED,
    VALUE,
    Rules,
    simple_rule,
)
from .table import UnwindTable

Bool = npt.NDArray[np.bool_]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]


class Otherwise(IntEnum):
    """How code without a rule is unwound, for a range of addresses."""

    NOTHING = 0
    """Not at all."""
    FRAME_POINTERS = 1
    """By rbp: Go, JIT compilers that keep it."""
    ROOT = 2
    """It has no caller."""
    ELSEWHERE = 3
    """Its caller is on a stack that it does not tell of."""
    SIGNAL = 4
    """Where a handler of a signal returns to."""
    TRAMPOLINE = 5
    """CPython's, one for each function, where it tells perf of them (see trampolines.py)."""


class End(IntEnum):
    """How the walk of a stack ended."""

    GOES_ON = 0
    """It did not; no finished walk has that."""
    WHOLE = 1
    """At its root: the outermost function has no caller, or a return address of zero."""
    SHORT = 2
    """What comes next is not in the copy of the stack."""
    NO_TABLE = 3
    """In a module of which nothing is known."""
    NO_RULE = 4
    """In a module that says nothing about this address."""
    UNSUPPORTED = 5
    """In a function whose rule is not understood."""
    UNMAPPED = 6
    """At an address that holds no code."""
    STUCK = 7
    """At a frame that does not lie above the one before."""
    DEEP = 8
    """After `MAX_FRAMES`."""
    ELSEWHERE = 9
    """What comes next is on another stack, of which there is no copy."""


class Stretch(NamedTuple):
    """Addresses of a module, from `start` up to `end`, and how they are unwound whatever else is
    said of them."""

    start: int
    end: int
    how: Otherwise


ADDRESS_BITS: Final = 48
"""Where a 64-bit process has memory unless it asks for more; what lies above counts as unmapped."""
MAX_SPACES: Final = 1 << 16
MAX_RULES_IN_ALL: Final = 1 << 18
"""Different rules of all modules, beyond which they count as not understood; 223 modules of a host
have 4,258. Each takes some hundred bytes."""
_ADDRESSES: Final = np.uint64((1 << ADDRESS_BITS) - 1)
_SPACE_SHIFT: Final = np.uint64(ADDRESS_BITS)

_UNMAPPED, _NO_TABLE, _NO_RULE, _UNSUPPORTED, _ROOT, _ELSEWHERE = range(6)
FRAME_POINTERS, _SIGNAL, _TRAMPOLINE = range(6, 9)
_ENDS: Final = {
    _UNMAPPED: End.UNMAPPED,
    _NO_TABLE: End.NO_TABLE,
    _NO_RULE: End.NO_RULE,
    _ROOT: End.WHOLE,
    _ELSEWHERE: End.ELSEWHERE,
}
_INSTEAD: Final = {
    Otherwise.FRAME_POINTERS: FRAME_POINTERS,
    Otherwise.ROOT: _ROOT,
    Otherwise.ELSEWHERE: _ELSEWHERE,
    Otherwise.SIGNAL: _SIGNAL,
    Otherwise.TRAMPOLINE: _TRAMPOLINE,
}

# Where the kernel keeps the registers (DWARF's columns) of whoever a signal interrupted, from the
# stack pointer on when its handler has returned: struct ucontext and struct sigcontext_64
# (arch/x86/include/uapi/asm/sigcontext.h).
_SAVED: Final = {
    **{8 + number: 40 + 8 * number for number in range(8)},
    **{5: 104, 4: 112, 6: 120, 3: 128, 1: 136, 0: 144, 2: 152, RETURN: 168},
}
_SAVED_RSP: Final = 160

_MEMO_BITS: Final = 16
_MEMO_SHIFT: Final = np.uint64(64 - _MEMO_BITS)
_HASHES: Final = (np.uint64(0x9E37_79B9_7F4A_7C15), np.uint64(0xC2B2_AE3D_27D4_EB4F))


@dataclass(frozen=True, slots=True)
class Steps:
    """The rules of all modules, laid out for one step of many stacks.

    end: (k,) uint8, an `End` where a rule ends the walk. kind, base, extra: (k,) and offset: (k,)
    of the CFA. signal: (k,) bool. Each rule has `counts` registers to set, from `firsts` on, in
    the entries: column, source (the base), shift (its offset) and how (MEMORY, VALUE, UNDEFINED).
    """

    end: U8
    kind: U8
    base: I64
    offset: U64
    extra: U64
    signal: Bool
    firsts: I64
    counts: I64
    column: I64
    source: I64
    shift: U64
    how: U8


def _ends(rules: Rules) -> U8:
    """Which rules end a walk, and how."""
    end = np.full(len(rules), End.GOES_ON, dtype=np.uint8)
    returns = rules["kind"][:, RETURN]
    end[(returns != MEMORY) & (returns != VALUE)] = End.UNSUPPORTED
    end[returns == UNDEFINED] = End.WHOLE
    # A root may leave its CFA open.
    nothing = (rules["cfa_kind"] == CFA_NONE) | (rules["cfa_kind"] == CFA_UNSUPPORTED)
    end[nothing & (returns != UNDEFINED)] = End.UNSUPPORTED
    return end


def _asked_for(rules: Rules, set_here: Bool) -> Bool:
    """Which registers some rule looks at; the others need not be followed. (COLUMNS,)."""
    asked = np.zeros(COLUMNS, dtype=np.bool_)
    asked[[RSP, RETURN, *np.unique(rules["cfa_base"])]] = True
    for _ in range(COLUMNS):
        asked[np.unique(rules["base"][set_here & asked])] = True
    return asked


def _steps(rules: Rules) -> Steps:
    end = _ends(rules)
    end[list(_ENDS)] = list(_ENDS.values())
    set_here = (rules["kind"] != SAME) & (end == End.GOES_ON)[:, None]
    set_here &= _asked_for(rules, set_here)
    row, column = np.nonzero(set_here)
    counts = set_here.sum(axis=1)
    kind = rules["cfa_kind"].copy()
    kind[end != End.GOES_ON] = CFA_OFFSET
    return Steps(
        end,
        kind,
        rules["cfa_base"].astype(np.int64),
        rules["cfa_offset"].astype(np.int64).view(np.uint64),
        rules["cfa_extra"].astype(np.uint64),
        rules["signal"].astype(np.bool_),
        np.cumsum(counts) - counts,
        counts,
        column.astype(np.int64),
        rules["base"][row, column].astype(np.int64),
        rules["offset"][row, column].astype(np.int64).view(np.uint64),
        rules["kind"][row, column],
    )


def _slots(keys: U64, half: int) -> I64:
    return (keys * _HASHES[half] >> _MEMO_SHIFT).view(np.int64)


@dataclass(frozen=True, slots=True)
class _Module:
    table: UnwindTable | None
    numbers: U32
    """Of each rule of the table, the number among all."""
    starts: U64
    ends: U64
    special: U32
    """The number of the rule of each stretch, (k,); starts and ends as well, sorted."""

    def find(self, vaddrs: U64) -> U32:
        """The number of the rule for each ELF virtual address. (m,) to (m,)."""
        if self.table is None:
            found = np.full(vaddrs.shape, self.numbers[0], dtype=np.uint32)
        else:
            found = self.numbers[self.table.lookup(vaddrs)]
        if self.starts.size:
            at = np.searchsorted(self.starts, vaddrs, side="right") - 1
            inside = (at >= 0) & (vaddrs < self.ends[at])
            found[inside] = self.special[at[inside]]
        return found


@dataclass(frozen=True, slots=True)
class _Space:
    starts: U64
    ends: U64
    biases: U64
    modules: I64


class Places:
    """Modules and the address spaces of processes; rules have one number across all modules."""

    def __init__(self) -> None:
        nothing = np.zeros_like(simple_rule(RSP, 0, saved={}))
        frame_pointers = simple_rule(RBP, 16, saved={RBP: -16, RETURN: -8})
        signal = simple_rule(RSP, _SAVED_RSP, saved=_SAVED)
        signal["cfa_kind"], signal["signal"] = CFA_DEREF, 1
        signal["base"][signal["kind"] == MEMORY] = RSP
        trampoline = simple_rule(RSP, 16, saved={RETURN: -8})
        self._rules: list[Rules] = [nothing] * 6 + [frame_pointers, signal, trampoline]
        self._numbers: dict[bytes, int] = {}
        self._stale: Steps | None = None
        self._modules: list[_Module] = []
        self._spaces: list[_Space | None] = []
        self._forget()

    def _forget(self) -> None:
        # Each key has a place in the first half and, when another one comes, one in the second.
        # Key 0 is the address 0 of the first space, where indeed nothing is mapped.
        self._keys = np.zeros((2, 1 << _MEMO_BITS), dtype=np.uint64)
        self._found = np.full((2, 1 << _MEMO_BITS), _UNMAPPED, dtype=np.uint32)

    @property
    def steps(self) -> Steps:
        """All rules so far."""
        if self._stale is None:
            self._stale = _steps(np.concatenate(self._rules))
        return self._stale

    def add_module(
        self,
        table: UnwindTable | None,
        *,
        otherwise: Otherwise = Otherwise.NOTHING,
        stretches: Sequence[Stretch] = (),
    ) -> int:
        """Its number. `otherwise`: how code is unwound that the table has no rule for; `stretches`:
        code that is unwound in another way, whatever the table says. Of those that overlap the last
        one to begin is taken.
        """
        instead = _INSTEAD.get(otherwise)
        if table is None:
            numbers = [_NO_TABLE if instead is None else instead]
        else:
            numbers = [self._number(table.rules[at : at + 1]) for at in range(len(table.rules))]
            numbers[NO_RULE] = _NO_RULE if instead is None else instead
            numbers[BAD_RULE] = _UNSUPPORTED
        special = sorted(stretches)
        self._modules.append(
            _Module(
                table,
                np.array(numbers, dtype=np.uint32),
                np.array([stretch.start for stretch in special], dtype=np.uint64),
                np.array([stretch.end for stretch in special], dtype=np.uint64),
                np.array([_INSTEAD[stretch.how] for stretch in special], dtype=np.uint32),
            )
        )
        return len(self._modules) - 1

    def _number(self, rule: Rules) -> int:
        if len(self._rules) >= MAX_RULES_IN_ALL:
            return self._numbers.get(rule.tobytes(), _UNSUPPORTED)
        known = self._numbers.setdefault(rule.tobytes(), len(self._rules))
        if known == len(self._rules):
            self._rules.append(rule.copy())
            self._stale = None
        return known

    def add_space(self, starts: U64, ends: U64, biases: U64, modules: I64) -> int:
        """The number of a process's memory map. All arrays are (r,), sorted and disjoint.

        ends are exclusive; a range's addresses less its bias are the module's virtual addresses.
        Raises ValueError for ranges that overlap or name no module, and when there are too many
        spaces: drop some.
        """
        arrays = (starts, ends, biases, modules)
        if any(array.shape != (starts.size,) for array in arrays):
            raise ValueError("arrays of different lengths")
        if (starts >= ends).any() or (starts[1:] < ends[:-1]).any():
            raise ValueError("ranges that are empty, overlap or are not sorted")
        if modules.size and not 0 <= modules.min() <= modules.max() < len(self._modules):
            raise ValueError("a module that is not there")
        space = _Space(
            starts.astype(np.uint64),
            np.minimum(ends, _ADDRESSES).astype(np.uint64),
            biases.astype(np.uint64),
            modules.astype(np.int64),
        )
        if None in self._spaces:
            number = self._spaces.index(None)
            self._spaces[number] = space
            return number
        if len(self._spaces) == MAX_SPACES:
            raise ValueError("too many address spaces")
        self._spaces.append(space)
        return len(self._spaces) - 1

    def drop_space(self, number: int) -> None:
        """Forget a memory map; its number may be given to another one."""
        self._spaces[number] = None
        self._forget()

    def keys(self, spaces: I64) -> U64:
        """What `find` wants of the spaces with these numbers. Raises ValueError for unknown ones.

        (n,) to (n,).
        """
        present = np.array([space is not None for space in self._spaces], dtype=np.bool_)
        if spaces.size and not 0 <= spaces.min() <= spaces.max() < len(self._spaces):
            raise ValueError("an address space that is not there")
        if spaces.size and not present[spaces].all():
            raise ValueError("an address space that was dropped")
        return spaces.astype(np.uint64) << _SPACE_SHIFT

    def find(self, addresses: U64, keys: U64) -> U32:
        """The number of the rule that holds at each address. (m,), (m,) to (m,)."""
        wanted = np.minimum(addresses, _ADDRESSES) | keys
        slots = _slots(wanted, 0)
        found: U32 = self._found[0][slots]
        missing = np.flatnonzero(self._keys[0][slots] != wanted)
        if missing.size:
            rest = wanted[missing]
            slots = _slots(rest, 1)
            found[missing] = self._found[1][slots]
            missing = missing[self._keys[1][slots] != rest]
        if missing.size:
            unique, which = np.unique(wanted[missing], return_inverse=True)
            searched = self._search(unique)
            found[missing] = searched[which]
            self._remember(unique, searched)
        return found

    def _remember(self, keys: U64, found: U32) -> None:
        slots = _slots(keys, 0)
        (first_keys, second_keys), (first_found, second_found) = self._keys, self._found
        displaced = first_keys[slots]
        aside = _slots(displaced, 1)
        second_keys[aside], second_found[aside] = displaced, first_found[slots]
        first_keys[slots], first_found[slots] = keys, found

    def _search(self, wanted: U64) -> U32:
        """As `find`, for keys that are sorted."""
        result = np.full(wanted.shape, _UNMAPPED, dtype=np.uint32)
        numbers = (wanted >> _SPACE_SHIFT).view(np.int64)
        # Each space is one run.
        bounds = np.flatnonzero(np.diff(numbers, prepend=-1, append=-1))
        for first, after in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            space = self._spaces[int(numbers[first])]
            if space is not None:
                result[first:after] = self._search_space(space, wanted[first:after] & _ADDRESSES)
        return result

    def _search_space(self, space: _Space, addresses: U64) -> U32:
        result = np.full(addresses.shape, _UNMAPPED, dtype=np.uint32)
        at = np.searchsorted(space.starts, addresses, side="right") - 1
        inside = np.flatnonzero(at >= 0)
        inside = inside[addresses[inside] < space.ends[at[inside]]]
        at = at[inside]
        modules = space.modules[at]
        vaddrs = addresses[inside] - space.biases[at]
        for number in np.unique(modules).tolist():
            module, mine = self._modules[number], modules == number
            result[inside[mine]] = module.find(vaddrs[mine])
        return result
