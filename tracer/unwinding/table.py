"""The unwinding table of one module: sorted addresses, each with the rule that holds from there.

As bytes it is a header, then the arrays, all little-endian; whoever reads them doubts each count.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from .rules import BAD_RULE, NO_RULE, RULE, Rules, fixed_rules, sound

U64 = npt.NDArray[np.uint64]
U32 = npt.NDArray[np.uint32]
U16 = npt.NDArray[np.uint16]

FORMAT: Final = 2
"""Changes with the layout of the bytes and with what is made of the same section."""
MAX_ROWS: Final = 8 << 20
MAX_RULES: Final = 1 << 16
MAX_BYTES: Final = 64 << 20

_HEADER: Final = struct.Struct("<4sIQII")
"""magic, format, base, rows, rules."""
_MAGIC: Final = b"luwt"


class TableError(Exception):
    """The bytes are no table."""


@dataclass(frozen=True, slots=True)
class UnwindTable:
    """Which rule holds at which address of a module.

    base: an ELF virtual address. pcs: (n,) uint32, rising, relative to it; a rule holds up to the
    next one, the last one for good. rule: (n,) uint16, indices into rules: (k,) RULE.
    """

    base: int
    pcs: U32
    rule: U16
    rules: Rules

    def __len__(self) -> int:
        return int(self.pcs.size)

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return int(self.pcs.nbytes + self.rule.nbytes + self.rules.nbytes)

    def addresses(self) -> U64:
        """Where rules begin to hold: ELF virtual addresses. (n,) uint64."""
        return self.pcs.astype(np.uint64) + np.uint64(self.base)

    def lookup(self, vaddrs: U64) -> U16:
        """Index of the rule for each ELF virtual address. (m,) to (m,) uint16."""
        if not len(self):
            return np.full(vaddrs.shape, NO_RULE, dtype=np.uint16)
        relative = vaddrs - np.uint64(self.base)
        known = relative <= np.uint64(0xFFFF_FFFF)
        at = np.searchsorted(self.pcs, relative.astype(np.uint32), side="right").astype(np.int64)
        known &= at > 0
        found = self.rule[np.maximum(at - 1, 0)]
        found[~known] = NO_RULE
        return found

    def to_bytes(self) -> bytes:
        """What `from_bytes` reads."""
        return b"".join(
            (
                _HEADER.pack(_MAGIC, FORMAT, self.base, len(self.pcs), len(self.rules)),
                self.pcs.astype("<u4").tobytes(),
                self.rule.astype("<u2").tobytes(),
                self.rules.tobytes(),
            )
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> UnwindTable:
        """Raises TableError unless the bytes are whole and every field is one that can be."""
        if not _HEADER.size <= len(data) <= MAX_BYTES:
            raise TableError("too short or too long for a table")
        magic, version, base, rows, rules = _HEADER.unpack_from(data)
        if magic != _MAGIC or version != FORMAT:
            raise TableError("not a table of this format")
        if rows > MAX_ROWS or not 2 <= rules <= MAX_RULES:
            raise TableError("more rows or rules than any table has")
        pcs_end = _HEADER.size + rows * 4
        rule_end = pcs_end + rows * 2
        if len(data) != rule_end + rules * RULE.itemsize:
            raise TableError("the counts do not fit the length")
        table = cls(
            base,
            np.frombuffer(data, "<u4", rows, _HEADER.size).astype(np.uint32, copy=False),
            np.frombuffer(data, "<u2", rows, pcs_end).astype(np.uint16, copy=False),
            np.frombuffer(data, RULE, rules, rule_end),
        )
        if bool((table.pcs[1:] <= table.pcs[:-1]).any()):
            raise TableError("addresses out of order")
        if rows and int(table.rule.max()) >= rules:
            raise TableError("a rule that is not there")
        if not sound(table.rules):
            raise TableError("a rule that cannot be")
        return table


def overlaid(first: UnwindTable, second: UnwindTable) -> UnwindTable:
    """What the first one says, and where it says nothing that is understood, the second one.

    The first one alone, where both together would be more than a table can hold.
    """
    if not len(second):
        return first
    if not len(first):
        return second
    own = len(fixed_rules())
    addresses = np.union1d(first.addresses(), second.addresses())
    base = int(addresses[0])
    count = len(first.rules) + len(second.rules) - own
    if int(addresses[-1]) - base > 0xFFFF_FFFF or addresses.size > MAX_ROWS or count > MAX_RULES:
        return first
    above, below = first.lookup(addresses), second.lookup(addresses)
    moved = np.where(below >= own, below + np.uint16(len(first.rules) - own), below)
    rule = np.where((above <= BAD_RULE) & (below != NO_RULE), moved, above)
    fresh = np.append(True, rule[1:] != rule[:-1])
    return UnwindTable(
        base,
        (addresses - np.uint64(base))[fresh].astype(np.uint32),
        rule[fresh].astype(np.uint16),
        np.concatenate([first.rules, second.rules[own:]]),
    )
