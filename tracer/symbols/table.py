"""Sorted symbol tables and the image of one ELF file, as the worker makes and the parent uses."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
U32 = npt.NDArray[np.uint32]
I64 = npt.NDArray[np.int64]

NEST_LIMIT: Final = 64
"""How many enclosing candidates are tried for an address past the end of the nearest symbol."""


def cut(text: bytes, ends: list[int]) -> list[bytes]:
    """The pieces of `text` that end there, the first one starting at its beginning."""
    return [text[begin:end] for begin, end in pairwise([0, *ends])]


@dataclass(frozen=True, slots=True)
class SymbolTable:
    """Functions sorted by start, one per start address, with the ends their file declares.

    starts, ends: (n,) uint64 addresses, end exclusive. name_ends: (n,) uint32, running ends of
    the names within `names`. Functions may nest; the innermost one that holds an address wins.
    """

    starts: U64
    ends: U64
    name_ends: U32
    names: bytes
    reach: U64 = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "reach", np.maximum.accumulate(self.ends))

    def __len__(self) -> int:
        return int(self.starts.size)

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        arrays = (self.starts, self.ends, self.name_ends, self.reach)
        return sum(int(array.nbytes) for array in arrays) + len(self.names)

    def lookup(self, addrs: U64) -> I64:
        """Index of the symbol that holds each address, -1 where none does. (m,) to (m,) int64."""
        if not len(self):
            return np.full(addrs.shape, -1, dtype=np.int64)
        found = (np.searchsorted(self.starts, addrs, side="right") - 1).astype(np.int64)
        nearest = np.maximum(found, 0)
        inside = (found >= 0) & (addrs < self.ends[nearest])
        nested = (found >= 0) & ~inside & (addrs < self.reach[nearest])
        found[~inside] = -1
        for position in np.flatnonzero(nested):
            found[position] = self._enclosing(int(nearest[position]), int(addrs[position]))
        return found

    def _enclosing(self, index: int, addr: int) -> int:
        for candidate in range(index - 1, max(index - 1 - NEST_LIMIT, -1), -1):
            if addr < int(self.ends[candidate]):
                return candidate
        return -1

    def name(self, index: int) -> bytes:
        """The name as the file has it (mangled)."""
        begin = int(self.name_ends[index - 1]) if index else 0
        return self.names[begin : int(self.name_ends[index])]

    def all_names(self) -> list[bytes]:
        """Every name, in the order of the table."""
        return cut(self.names, self.name_ends.tolist())


def empty_table() -> SymbolTable:
    """A table without symbols."""
    none = np.zeros(0, dtype=np.uint64)
    return SymbolTable(none, none, np.zeros(0, dtype=np.uint32), b"")


def build_table(starts: U64, ends: U64, names: list[bytes]) -> SymbolTable:
    """Make a table of columns that are sorted by start already."""
    lengths = np.fromiter(map(len, names), dtype=np.uint64, count=len(names))
    return SymbolTable(starts, ends, np.cumsum(lengths).astype(np.uint32), b"".join(names))


def merge(first: SymbolTable, second: SymbolTable) -> SymbolTable:
    """Both tables; at the same start the first one wins."""
    if not len(second):
        return first
    if not len(first):
        return second
    keep = np.flatnonzero(~np.isin(second.starts, first.starts))
    starts = np.concatenate((first.starts, second.starts[keep]))
    ends = np.concatenate((first.ends, second.ends[keep]))
    added = second.all_names()
    names = first.all_names() + [added[index] for index in keep.tolist()]
    order = np.argsort(starts, kind="stable")
    return build_table(starts[order], ends[order], [names[index] for index in order.tolist()])


SEGMENT_COLUMNS: Final = 4
"""offset, filesz, vaddr, flags."""


@dataclass(frozen=True, slots=True)
class Image:
    """What one ELF file says: where it is loaded and which functions it has.

    segments: (k, 4) uint64 rows of (file offset, size in the file, virtual address, flags), the
    executable ones first. symtab: it has a .symtab, so a separate debug file adds nothing.
    """

    segments: U64
    symbols: SymbolTable
    symtab: bool
    build_id: bytes
    debuglink: bytes
    debuglink_crc: int

    def vaddrs(self, offsets: U64) -> tuple[U64, npt.NDArray[np.bool_]]:
        """File offsets to ELF virtual addresses; the mask tells which ones belong to a segment."""
        result = offsets.copy()
        known = np.zeros(offsets.shape, dtype=np.bool_)
        for offset, filesz, vaddr, _flags in self.segments:
            # Unsigned wrap-around makes one comparison of two.
            hit = ~known & (offsets - offset < filesz)
            result[hit] = offsets[hit] - offset + vaddr
            known |= hit
        return result, known
