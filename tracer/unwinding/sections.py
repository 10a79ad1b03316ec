"""Where an ELF file of x86-64 says how its frames are unwound.

`.eh_frame` is part of what is loaded; `.debug_frame` has the functions that it lacks (those of Go
beside C, what was built without tables for exceptions); of a Go program that was stripped of that,
`.gopclntab` has them. Of the procedure linkage stubs of a static program nothing says anything, but
what they do. Finding them means reading headers that a stranger wrote, so that the unprivileged
worker does it for files, and the tracer itself only for the vDSO.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum
from functools import reduce
from typing import Any, Final

import numpy as np

from latrace.tracer.symbols import gopclntab
from latrace.tracer.symbols.elf import EM_X86_64, ElfError, Source, read_headers

from .cfi import compile_section
from .pclntab import compile_pclntab
from .records import MAX_SECTION, CfiError, Section
from .rules import NO_RULE, RETURN, RSP, fixed_rules, simple_rule
from .table import UnwindTable, overlaid

_PT_LOAD, _PF_X, _SHT_NOBITS = 1, 1, 8
_SHF_COMPRESSED: Final = 1 << 11
_ELFCOMPRESS_ZLIB: Final = 1
_CHDR_BYTES: Final = 24
"""An Elf64_Chdr: type and reserved (4 each), size and alignment (8 each)."""

# Stubs that only jump, from the first byte of their section on: `endbr64` and `bnd` or not,
# `jmp *slot(%rip)`, and what fills them up (nops of several lengths, traps).
_STUBS: Final = re.compile(
    rb"(?>(?:\xf3\x0f\x1e\xfa)?\xf2?\xff\x25.{4}"
    rb"(?>\x66?\x90|\x66?\x0f\x1f(?:\x00|\x40\x00|\x44\x00\x00)|\xcc)*+)++",
    re.DOTALL,
)


class Kind(IntEnum):
    """What a section tells; where two speak of one address, the lower one counts."""

    EH_FRAME = 0
    DEBUG_FRAME = 1
    STUBS = 2
    PCLNTAB = 3


_NAMES: Final = (
    (b".eh_frame", Kind.EH_FRAME),
    (b".debug_frame", Kind.DEBUG_FRAME),
    (b".plt", Kind.STUBS),
    (b".iplt", Kind.STUBS),
    *((name, Kind.PCLNTAB) for name in gopclntab.SECTIONS),
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a section is in its file (offset, size), and what `Section` says besides its bytes.

    packed: it is compressed, with the header of elf(5). data_base: of a `.gopclntab`, the address
    of the code.
    """

    offset: int
    size: int
    kind: Kind
    packed: bool
    address: int
    data_base: int
    low: int
    high: int

    def as_dict(self) -> dict[str, int]:
        """For a request or a reply."""
        return {name: int(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Place:
        """Raises ValueError, KeyError or TypeError for what cannot be."""
        values = {name: fields[name] for name in cls.__dataclass_fields__}
        if len(fields) != len(values):
            raise ValueError("other fields than those of a place")
        for value in values.values():
            if type(value) is not int or not 0 <= value < 1 << 64:
                raise ValueError("no unsigned number of 64 bits")
        kind, packed = Kind(values["kind"]), bool(values["packed"])
        place = cls(**{**values, "kind": kind, "packed": packed})
        if not 0 < place.size <= MAX_SECTION or place.offset >= 1 << 62:
            raise ValueError("a section larger than any real one")
        return place


def locate(source: Source) -> list[Place]:
    """The sections of a file, at most `MAX_SECTION` bytes in all. Raises ElfError."""
    headers = read_headers(source)
    if headers.layout.machine != EM_X86_64 or headers.layout.section.itemsize != 64:
        raise ElfError("not for x86-64")
    loads = headers.segments[
        (headers.segments["type"] == _PT_LOAD) & (headers.segments["flags"] & _PF_X != 0)
    ]
    if not len(loads):
        return []
    low = int(loads["vaddr"].min())
    high = max(int(load["vaddr"]) + int(load["memsz"]) for load in loads)
    high = min(high, (1 << 64) - 1)
    got = headers.named(b".got")
    data_base = 0 if got is None else int(got["addr"])
    found: list[Place] = []
    room, left_out = MAX_SECTION, False
    for name, kind in _NAMES:
        section = headers.named(name)
        if section is None or int(section["type"]) == _SHT_NOBITS:
            continue
        if kind is Kind.PCLNTAB and any(place.kind is Kind.DEBUG_FRAME for place in found):
            continue  # the same again
        offset, size = int(section["offset"]), int(section["size"])
        # Four bytes are an end mark that says nothing.
        if size <= 4:
            continue
        if size > room or offset + size > source.size:
            left_out = True
            continue
        room -= size
        packed = bool(int(section["flags"]) & _SHF_COMPRESSED)
        address = int(section["addr"])
        found.append(Place(offset, size, kind, packed, address, data_base, low, high))
    if left_out and not found:
        raise ElfError("a section is larger than any real one")
    return found


def read_places(source: Source, places: Sequence[Place]) -> bytes:
    """The bytes of these sections in the file, one behind the other. Raises ElfError."""
    return b"".join(source.read(place.offset, place.size) for place in places)


def _unpack(data: bytes) -> bytes:
    kind = int.from_bytes(data[:4], "little")
    size = int.from_bytes(data[8:16], "little")
    if kind != _ELFCOMPRESS_ZLIB or size > MAX_SECTION:
        raise CfiError("compressed in a way that is not known, or larger than any real section")
    try:
        return zlib.decompressobj().decompress(data[_CHDR_BYTES:], size or 1)
    except zlib.error as error:
        raise CfiError("damaged compression") from error


def compile_place(place: Place, data: bytes) -> UnwindTable:
    """The table of a section whose bytes in the file are these. Raises CfiError."""
    if place.packed:
        data = _unpack(data)
    if place.kind is Kind.STUBS:
        return _stubs(place, data)
    if place.kind is Kind.PCLNTAB:
        return compile_pclntab(data, text=place.data_base, low=place.low, high=place.high)
    eh = place.kind is Kind.EH_FRAME
    return compile_section(Section(data, eh, place.address, place.data_base, place.low, place.high))


def _stubs(place: Place, data: bytes) -> UnwindTable:
    """In stubs that only jump, the return address is on top of the stack."""
    found = _STUBS.match(data)
    size = min(found.end() if found else 0, place.high - place.address)
    rules = np.concatenate([fixed_rules(), simple_rule(RSP, 8, saved={RETURN: -8})])
    known = size > 0 and place.low <= place.address
    pcs = np.array([0, size] if known else [], np.uint32)
    numbers = np.array([len(rules) - 1, NO_RULE] if known else [], np.uint16)
    return UnwindTable(place.address, pcs, numbers, rules)


def compile_places(places: Sequence[Place], data: bytes) -> UnwindTable:
    """The table of sections whose bytes in the file are these, one behind the other.

    Raises CfiError if none of them is one.
    """
    tables: list[UnwindTable] = []
    error = CfiError("no section")
    for place in places:
        piece, data = data[: place.size], data[place.size :]
        try:
            tables.append(compile_place(place, piece))
        except CfiError as failed:
            error = failed
    if not tables:
        raise error
    return reduce(overlaid, tables)


def table_of(source: Source) -> UnwindTable | None:
    """The table of an ELF file, made right here. Raises ElfError or CfiError."""
    places = locate(source)
    return compile_places(places, read_places(source, places)) if places else None
