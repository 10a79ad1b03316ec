"""Where an ELF file of x86-64 has its call frame information.

`.eh_frame` is part of what is loaded; `.debug_frame` stands in where there is none (Go without C,
some static programs). Finding them means reading headers that a stranger wrote, so that the
unprivileged worker does it for files, and the tracer itself only for the vDSO.
"""

from __future__ import annotations

import zlib
from dataclasses import asdict, dataclass
from typing import Any, Final

from latrace.tracer.symbols.elf import EM_X86_64, ElfError, Source, read_headers

from .cfi import compile_section
from .records import MAX_SECTION, CfiError, Section
from .table import UnwindTable

_PT_LOAD, _PF_X, _SHT_NOBITS = 1, 1, 8
_SHF_COMPRESSED: Final = 1 << 11
_ELFCOMPRESS_ZLIB: Final = 1
_CHDR_BYTES: Final = 24
"""An Elf64_Chdr: type and reserved (4 each), size and alignment (8 each)."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the section is in its file (offset, size), and what `Section` says besides its bytes.

    packed: it is compressed, with the header of elf(5).
    """

    offset: int
    size: int
    eh: bool
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
        place = cls(**{**values, "eh": bool(values["eh"]), "packed": bool(values["packed"])})
        if not 0 < place.size <= MAX_SECTION or place.offset >= 1 << 62:
            raise ValueError("a section larger than any real one")
        return place


def locate(source: Source) -> Place | None:
    """Where the file's call frame information is; None where it has none. Raises ElfError."""
    headers = read_headers(source)
    if headers.layout.machine != EM_X86_64 or headers.layout.section.itemsize != 64:
        raise ElfError("not for x86-64")
    loads = headers.segments[
        (headers.segments["type"] == _PT_LOAD) & (headers.segments["flags"] & _PF_X != 0)
    ]
    if not len(loads):
        return None
    low = int(loads["vaddr"].min())
    high = max(int(load["vaddr"]) + int(load["memsz"]) for load in loads)
    got = headers.named(b".got")
    for name in (b".eh_frame", b".debug_frame"):
        section = headers.named(name)
        if section is None or int(section["type"]) == _SHT_NOBITS or not int(section["size"]):
            continue
        size = int(section["size"])
        if size > MAX_SECTION or int(section["offset"]) + size > source.size:
            raise ElfError("a section is larger than any real one")
        # Four bytes are an end mark that says nothing.
        if size > 4:
            return Place(
                int(section["offset"]),
                size,
                name == b".eh_frame",
                bool(int(section["flags"]) & _SHF_COMPRESSED),
                int(section["addr"]),
                0 if got is None else int(got["addr"]),
                low,
                min(high, (1 << 64) - 1),
            )
    return None


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
    section = Section(data, place.eh, place.address, place.data_base, place.low, place.high)
    return compile_section(section)


def table_of(source: Source) -> UnwindTable | None:
    """The table of an ELF file, made right here. Raises ElfError or CfiError."""
    place = locate(source)
    return None if place is None else compile_place(place, source.read(place.offset, place.size))
