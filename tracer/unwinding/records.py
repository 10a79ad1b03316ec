"""The records of `.eh_frame` and `.debug_frame`: what they share (CIEs) and whom they are about.

Layouts: DWARF 5, 6.4.1, and the Linux Standard Base, Core, 10.6. What is not understood (another
address size, an unknown augmentation) is left out, and its code has no rule. So is what has 64-bit
lengths in `.eh_frame`: nobody writes it, and readers do not agree on how it refers to its CIE.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

import numpy as np

from .leb import I64, U64, Bytes, fixed, padded, sleb_at, uleb, uleb_at
from .rules import RETURN

MAX_SECTION: Final = 64 << 20
MAX_RECORDS: Final = 4 << 20
MAX_CIES: Final = 1 << 16

_WORDS: Final = struct.Struct("<II")
_LONG_WORDS: Final = struct.Struct("<QQ")
_EXTENDED: Final = 0xFFFF_FFF0
"""Lengths from here on are escapes."""
_LONG: Final = 0xFFFF_FFFF
"""This one says that a length of 64 bits follows (DWARF 5, 7.4)."""
_SHARED: Final = 0xFFFF_FFFF
"""What a CIE of `.debug_frame` has where others refer to theirs."""
_LONG_SHARED: Final = 0xFFFF_FFFF_FFFF_FFFF

# DW_EH_PE_…: the low four bits say how a pointer is stored, the next three what it is relative to
_FORMATS: Final = {
    **{0x0: "<u8", 0x2: "<u2", 0x3: "<u4", 0x4: "<u8"},
    **{0xA: "<i2", 0xB: "<i4", 0xC: "<i8"},
}
_ABSOLUTE, _PCREL, _DATAREL = 0x00, 0x10, 0x30
_ALIGNED, _OMITTED = 0x50, 0xFF


class CfiError(Exception):
    """The section is none, or larger than any real one."""


@dataclass(frozen=True, slots=True)
class Section:
    """The bytes of a section with call frame information, and what its pointers are relative to.

    address: where the section is loaded. data_base: of the module's `.got`. low, high: the
    addresses that hold code; what is said about others is left out. eh: it is an `.eh_frame`.
    """

    data: bytes
    eh: bool
    address: int
    data_base: int
    low: int
    high: int


@dataclass(frozen=True, slots=True)
class Cie:
    """What the records that refer to one CIE share, and where its first instructions are."""

    start: int
    end: int
    code_align: int
    data_align: int
    encoding: int
    signal: bool
    sized: bool
    """Its records tell how long their augmentation is."""


@dataclass(frozen=True, slots=True)
class Programs:
    """The instructions of each function, in the order of the section.

    begins, ends: (n,) uint64 addresses of code, no two overlapping. starts, stops: (n,) int64
    positions of the instructions. cie: (n,) int64 indices into `cies`. data: padded.
    """

    data: Bytes
    cies: list[Cie]
    begins: U64
    ends: U64
    starts: I64
    stops: I64
    cie: I64

    def cut(self, first: int, after: int) -> Programs:
        """Those with an index from `first` to before `after`."""
        span = slice(first, after)
        return Programs(
            self.data,
            self.cies,
            self.begins[span],
            self.ends[span],
            self.starts[span],
            self.stops[span],
            self.cie[span],
        )


def width_of(encoding: int) -> int:
    """Bytes that a pointer of this encoding takes."""
    return np.dtype(_FORMATS[encoding & 0xF]).itemsize


def pointers(section: Section, data: Bytes, at: I64, encoding: int) -> U64:
    """Addresses stored at these positions. (m,) to (m,) uint64, wrapping around."""
    values = fixed(data, at, _FORMATS[encoding & 0xF]).astype(np.int64).view(np.uint64)
    if encoding & 0x70 == _PCREL:
        return values + at.view(np.uint64) + np.uint64(section.address)
    if encoding & 0x70 == _DATAREL:
        return values + np.uint64(section.data_base)
    return values


def _understood(encoding: int) -> bool:
    return encoding & 0xF in _FORMATS and encoding & 0xF0 in (_ABSOLUTE, _PCREL, _DATAREL)


def _augmentation(data: bytes, text: bytes, at: int, end: int) -> tuple[int, bool, int] | None:
    """Pointer encoding, whether it is about signal frames, and the position behind it."""
    if not text:
        return _ABSOLUTE, False, at
    if text[:1] != b"z":
        return None
    length, at = uleb_at(data, at, end)
    end = min(at + length, end)
    encoding, signal, behind = _ABSOLUTE, False, at + length
    for letter in text[1:]:
        if letter == ord("R"):
            encoding, at = data[at], at + 1
        elif letter == ord("S"):
            signal = True
        elif letter == ord("L"):
            at += 1
        elif letter == ord("P"):
            # How the personality is stored only matters for where the rest begins.
            how = data[at]
            if how == _ALIGNED or (how != _OMITTED and how & 0xF not in _FORMATS):
                return None
            at += 1 + (0 if how == _OMITTED else width_of(how))
        else:
            return None
        if at > end:
            return None
    return encoding, signal, behind


def _parse_cie(data: bytes, at: int, end: int) -> Cie | None:
    """The CIE whose version is at `at`; None for one that is not understood."""
    try:
        version = data[at]
        name_end = data.index(0, at + 1, end)
        text = data[at + 1 : name_end]
        at = name_end + 1
        if version == 4:
            if data[at : at + 2] != b"\x08\x00":  # sizes of addresses and of segment selectors
                return None
            at += 2
        elif version not in (1, 3):
            return None
        code_align, at = uleb_at(data, at, end)
        data_align, at = sleb_at(data, at, end)
        column, at = (data[at], at + 1) if version == 1 else uleb_at(data, at, end)
        found = _augmentation(data, text, at, end)
    except (ValueError, IndexError):
        return None
    if found is None or column != RETURN or not _understood(found[0]):
        return None
    if not 1 <= code_align <= 16 or not -128 <= data_align <= 128 or found[2] > end:
        return None
    return Cie(found[2], end, code_align, data_align, found[0], found[1], bool(text))


def _scan(section: Section) -> tuple[dict[int, tuple[int, int]], I64]:
    """What the CIEs have to say (begin, end) by where they are, and of the others (m, 3): begin and
    end of what they have to say, and where their CIE is."""
    data, size, eh = section.data, len(section.data), section.eh
    marker = 0 if eh else _SHARED
    shared: dict[int, tuple[int, int]] = {}
    others: list[tuple[int, int, int]] = []
    at, unpack = 0, _WORDS.unpack_from
    while at + 8 <= size:
        length, reference = unpack(data, at)
        body, word = at + 4, 4
        if length >= _EXTENDED:
            if length != _LONG or at + 20 > size:
                break
            length, reference = _LONG_WORDS.unpack_from(data, body)
            body, word = at + 12, 8
            reference = marker if reference == _LONG_SHARED else min(reference, size)
        end = body + length
        if end > size:
            break
        if length >= word and not (eh and word == 8):
            if reference == marker:
                shared[at] = body + word, end
            else:
                others.append((body + word, end, body - reference if eh else reference))
            if len(others) + len(shared) > MAX_RECORDS:
                raise CfiError("more records than any real section has")
        at = end
    return shared, np.array(others, dtype=np.int64).reshape(-1, 3)


def _apart(begins: U64, ends: U64) -> tuple[I64, U64]:
    """Which of these ranges to keep, sorted, and where each one ends before the next begins."""
    order = np.argsort(begins, kind="stable")
    first = np.ones(order.size, dtype=np.bool_)
    first[1:] = begins[order][1:] != begins[order][:-1]
    order = order[first]
    limit = np.append(begins[order][1:], ~np.uint64(0))
    return order, np.minimum(ends[order], limit)


def read_programs(section: Section) -> Programs:
    """Every function that the section tells about.

    Of two that begin at the same address the first one counts; one ends at the latest where the
    next begins. Raises CfiError.
    """
    if len(section.data) > MAX_SECTION:
        raise CfiError("a section larger than any real one")
    data = padded(section.data)
    shared, records = _scan(section)
    wanted, which = np.unique(records[:, 2], return_inverse=True)
    if wanted.size > MAX_CIES:
        raise CfiError("more CIEs than any real section has")
    parsed = [
        _parse_cie(section.data, *shared[at]) if at in shared else None for at in wanted.tolist()
    ]
    cies = [cie for cie in parsed if cie is not None]
    number = np.cumsum([cie is not None for cie in parsed], dtype=np.int64) - 1
    known = np.array([cie is not None for cie in parsed], dtype=np.bool_)
    keep = np.flatnonzero(known[which]) if known.size else np.zeros(0, dtype=np.int64)
    at, stops, cie = records[keep, 0], records[keep, 1], number[which[keep]]

    begins = np.zeros(at.shape, dtype=np.uint64)
    sizes = np.zeros(at.shape, dtype=np.int64)
    starts = np.zeros(at.shape, dtype=np.int64)
    encodings = np.array([cie.encoding for cie in cies], dtype=np.int64)
    for encoding in np.unique(encodings).tolist():
        mine = np.flatnonzero(encodings[cie] == encoding)
        width = width_of(encoding)
        begins[mine] = pointers(section, data, _inside(at[mine], stops[mine]), encoding)
        bare = encoding & 0xF
        where = _inside(at[mine] + width, stops[mine])
        sizes[mine] = pointers(section, data, where, bare).view(np.int64)
        starts[mine] = at[mine] + 2 * width
    sized = np.flatnonzero(np.array([cie.sized for cie in cies], dtype=np.bool_)[cie])
    length, behind = uleb(data, _inside(starts[sized], stops[sized]))
    starts[sized] = behind + np.minimum(length, np.uint64(MAX_SECTION)).view(np.int64)

    low, high = np.uint64(section.low), np.uint64(section.high)
    good = (starts <= stops) & (sizes > 0) & (begins >= low) & (begins < high)
    room = high - np.minimum(begins, high)
    ends = begins + np.minimum(np.maximum(sizes, 0).view(np.uint64), room)
    chosen = np.flatnonzero(good)
    order, apart = _apart(begins[chosen], ends[chosen])
    kept = chosen[order]
    ends[kept] = apart
    chosen = np.sort(kept)
    return Programs(
        data, cies, begins[chosen], ends[chosen], starts[chosen], stops[chosen], cie[chosen]
    )


def _inside(at: I64, stops: I64) -> I64:
    """The positions, none of them past its record."""
    return np.minimum(at, stops)
