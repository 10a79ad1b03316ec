"""Executable mappings of a process, from the text of /proc/PID/maps."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Final

import numpy as np

from latrace.tracer.symbols.table import I64, U64

MAPS_LIMIT: Final = 64 << 20
"""Bytes of /proc/PID/maps that are read; more mappings than that are another program's joke."""
KEPT_LIMIT: Final = 65536
"""Ranges of earlier snapshots that are kept."""

# No number is longer than the kernel's own: 64 bits, and 12 and 20 of a device.
_EXECUTABLE = re.compile(
    rb"^([0-9a-f]{1,16})-([0-9a-f]{1,16}) [r-][w-]x[ps] ([0-9a-f]{1,16})"
    rb" ([0-9a-f]{1,3}):([0-9a-f]{1,5}) ([0-9]{1,20})(?![0-9]) *(.*)$",
    re.MULTILINE,
)
_DELETED = b" (deleted)"
_ESCAPE = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mapping:
    """One executable mapping. `path` is empty for anonymous memory, `[…]` for the kernel's own."""

    start: int
    end: int
    offset: int
    device: int
    inode: int
    path: bytes
    deleted: bool

    @property
    def file_backed(self) -> bool:
        """It has an inode, so there is a file that can be opened."""
        return self.inode != 0


def parse_maps(text: bytes) -> list[Mapping]:
    """The executable mappings among the lines; what does not parse is left out."""
    found = []
    for match in _EXECUTABLE.finditer(text):
        start, end, offset, major, minor = (int(match[index], 16) for index in range(1, 6))
        path = match[7]
        deleted = path.endswith(_DELETED)
        if deleted:
            path = path[: -len(_DELETED)]
        if b"\\" in path:
            path = _ESCAPE.sub(lambda code: bytes((int(code[1], 8) & 0xFF,)), path)
        device = os.makedev(major, minor)
        found.append(Mapping(start, end, offset, device, int(match[6]), path, deleted))
    return found


@dataclass(frozen=True, slots=True)
class Ranges:
    """Disjoint address ranges sorted by start, each with a file offset and a file number.

    All arrays are (n,): starts, ends (exclusive), offsets uint64; files int64.
    """

    starts: U64
    ends: U64
    offsets: U64
    files: I64

    def find(self, addrs: U64) -> I64:
        """Index of the range that holds each address, -1 where none does."""
        if not self.starts.size:
            return np.full(addrs.shape, -1, dtype=np.int64)
        found = (np.searchsorted(self.starts, addrs, side="right") - 1).astype(np.int64)
        found[(found >= 0) & (addrs >= self.ends[np.maximum(found, 0)])] = -1
        return found


def make_ranges(mappings: list[Mapping], files: list[int]) -> Ranges:
    """Ranges of mappings in the order the kernel lists them."""

    def column(values: list[int]) -> U64:
        return np.array(values, dtype=np.uint64)

    return Ranges(
        column([mapping.start for mapping in mappings]),
        column([mapping.end for mapping in mappings]),
        column([mapping.offset for mapping in mappings]),
        np.array(files, dtype=np.int64),
    )


def renew(old: Ranges, new: Ranges) -> Ranges:
    """The new ranges, and the old ones that none of them overlaps (a library unloaded since)."""
    if not old.starts.size:
        return new
    if new.starts.size:
        # The first new range that ends after the old one starts must start after it ends.
        after = np.searchsorted(new.ends, old.starts, side="right")
        clamped = np.minimum(after, new.starts.size - 1)
        keep = (after == new.starts.size) | (new.starts[clamped] >= old.ends)
    else:
        keep = np.ones(old.starts.shape, dtype=np.bool_)
    kept = np.flatnonzero(keep)[:KEPT_LIMIT]
    starts = np.concatenate((new.starts, old.starts[kept]))
    order = np.argsort(starts, kind="stable")
    return Ranges(
        starts[order],
        np.concatenate((new.ends, old.ends[kept]))[order],
        np.concatenate((new.offsets, old.offsets[kept]))[order],
        np.concatenate((new.files, old.files[kept]))[order],
    )
