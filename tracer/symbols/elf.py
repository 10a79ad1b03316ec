"""Functions of an ELF file, decoded in bulk with numpy; every size in the file is doubted.

Runs in the unprivileged worker for files of a target, and in the tracer only for the vDSO, which
the kernel made. Layouts are those of elf(5); the headers of 32-bit and of big-endian files are
understood as well.
"""

from __future__ import annotations

import lzma
import os
import struct
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from latrace.tracer.symbols import gopclntab
from latrace.tracer.symbols.frames import NAME_LIMIT
from latrace.tracer.symbols.strings import Strings
from latrace.tracer.symbols.table import (
    SEGMENT_COLUMNS,
    U64,
    Image,
    SymbolTable,
    build_table,
    empty_table,
    merge,
)

Records = npt.NDArray[Any]

MAX_SYMBOLS: Final = 4 << 20
MAX_STRINGS: Final = 256 << 20
MAX_NAMES: Final = 192 << 20
MAX_SECTIONS: Final = 1 << 16
MAX_SEGMENTS: Final = 1 << 12
MAX_SMALL: Final = 1 << 20
"""Notes and links: read whole, so kept small."""
MAX_RELOCATIONS: Final = 64 << 20
MAX_PLTS: Final = 16
"""Sections with relocations, and with stubs; linkers write three of either."""
MAX_MINIDEBUG: Final = 64 << 20

_PT_LOAD, _PT_NOTE = 1, 4
_PF_X = 1
_SHT_SYMTAB, _SHT_RELA, _SHT_NOTE, _SHT_NOBITS, _SHT_DYNSYM = 2, 4, 7, 8, 11
_SHN_UNDEF, _SHN_LORESERVE = 0, 0xFF00
_STT_FUNC, _STT_GNU_IFUNC = 2, 10
EM_X86_64 = 62
_R_X86_64_GLOB_DAT, _R_X86_64_JUMP_SLOT = 6, 7
_NT_GNU_BUILD_ID = 3
_GO_NOTE_BYTES: Final = 16
"""What comes before the text in a note of that name."""
_U64_MAX: Final = np.uint64(0xFFFF_FFFF_FFFF_FFFF)


class ElfError(Exception):
    """The file is no ELF file, or says what cannot be."""


class Source(Protocol):
    """Where the bytes of a file come from."""

    size: int

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes at `offset`, or ElfError."""
        ...


class FdSource:
    """A regular file, read piece by piece; only the pieces asked for are ever in memory."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.size = os.fstat(fd).st_size

    def read(self, offset: int, length: int) -> bytes:
        """See Source."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ElfError("a header points past the end of the file")
        pieces = []
        while length:
            piece = os.pread(self._fd, length, offset)
            if not piece:
                raise ElfError("the file shrank")
            pieces.append(piece)
            offset += len(piece)
            length -= len(piece)
        return b"".join(pieces)


class BytesSource:
    """An ELF image in memory."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.size = len(data)

    def read(self, offset: int, length: int) -> bytes:
        """See Source."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ElfError("a header points past the end of the image")
        return self._data[offset : offset + length]


@dataclass(frozen=True, slots=True)
class _Layout:
    """Record layouts for one class and byte order."""

    order: str
    machine: int
    segment: np.dtype[Any]
    section: np.dtype[Any]
    symbol: np.dtype[Any]
    rela: np.dtype[Any]


@dataclass(frozen=True, slots=True)
class Headers:
    """What a file says of itself: record layouts, segments, sections and the sections' names."""

    layout: _Layout
    segments: Records
    sections: Records
    names: tuple[bytes, ...]

    def named(self, name: bytes) -> Records | None:
        """The first section of that name, None without one."""
        return self.sections[self.names.index(name)] if name in self.names else None


def _layout(wide: bool, order: str, machine: int) -> _Layout:
    def dtype(fields: str) -> np.dtype[Any]:
        pairs = [field.split(":") for field in fields.split()]
        return np.dtype([(name, order + kind) for name, kind in pairs])

    if wide:
        return _Layout(
            order,
            machine,
            dtype("type:u4 flags:u4 offset:u8 vaddr:u8 paddr:u8 filesz:u8 memsz:u8 align:u8"),
            dtype(
                "name:u4 type:u4 flags:u8 addr:u8 offset:u8 size:u8 link:u4 info:u4 "
                "align:u8 entsize:u8"
            ),
            dtype("name:u4 info:u1 other:u1 shndx:u2 value:u8 size:u8"),
            dtype("offset:u8 type:u4 symbol:u4 addend:i8")
            if order == "<"
            else dtype("offset:u8 symbol:u4 type:u4 addend:i8"),
        )
    return _Layout(
        order,
        machine,
        dtype("type:u4 offset:u4 vaddr:u4 paddr:u4 filesz:u4 memsz:u4 flags:u4 align:u4"),
        dtype(
            "name:u4 type:u4 flags:u4 addr:u4 offset:u4 size:u4 link:u4 info:u4 align:u4 entsize:u4"
        ),
        dtype("name:u4 value:u4 size:u4 info:u1 other:u1 shndx:u2"),
        dtype("offset:u4 info:u4 addend:i4"),
    )


def _records(source: Source, dtype: np.dtype[Any], offset: int, count: int) -> Records:
    return np.frombuffer(source.read(offset, count * dtype.itemsize), dtype=dtype)


def read_headers(source: Source) -> Headers:
    """The headers of an ELF file, each count bounded. Raises ElfError."""
    ident = source.read(0, 16)
    if ident[:4] != b"\x7fELF" or ident[4] not in (1, 2) or ident[5] not in (1, 2):
        raise ElfError("not an ELF file")
    wide, order = ident[4] == 2, "<" if ident[5] == 1 else ">"
    shape = order + ("HHIQQQIHHHHHH" if wide else "HHIIIIIHHHHHH")
    header = struct.unpack(shape, source.read(16, struct.calcsize(shape)))
    machine, phoff, shoff = header[1], header[4], header[5]
    phentsize, phnum, shentsize, shnum, shstrndx = header[8:13]
    layout = _layout(wide, order, machine)

    sections = np.zeros(0, dtype=layout.section)
    if shoff and shentsize == layout.section.itemsize:
        first = _records(source, layout.section, shoff, 1)[0]
        # The escapes of elf(5) for counts that do not fit their 16 bits.
        shnum = shnum or int(first["size"])
        shstrndx = int(first["link"]) if shstrndx == 0xFFFF else shstrndx
        phnum = int(first["info"]) if phnum == 0xFFFF else phnum
        if shnum > MAX_SECTIONS:
            raise ElfError("absurd number of sections")
        sections = _records(source, layout.section, shoff, shnum)
    if phnum > MAX_SEGMENTS:
        raise ElfError("absurd number of segments")
    segments = np.zeros(0, dtype=layout.segment)
    if phnum and phentsize == layout.segment.itemsize:
        segments = _records(source, layout.segment, phoff, phnum)
    return Headers(layout, segments, sections, _section_names(source, sections, shstrndx))


def _section_names(source: Source, sections: Records, shstrndx: int) -> tuple[bytes, ...]:
    if shstrndx >= len(sections):
        return (b"",) * len(sections)
    strings = _section_bytes(source, sections[shstrndx], MAX_SMALL)
    # 64 bytes are more than any name that is looked for.
    return tuple(
        strings[start : start + 64].split(b"\0", 1)[0] for start in sections["name"].tolist()
    )


def _section_bytes(source: Source, section: Records, limit: int) -> bytes:
    size = int(section["size"])
    if int(section["type"]) == _SHT_NOBITS:
        return b""
    if size > limit:
        raise ElfError("a section is larger than any real one")
    return source.read(int(section["offset"]), size)


def _build_id(source: Source, headers: Headers) -> bytes:
    order = headers.layout.order
    spans = [
        (int(entry["offset"]), int(entry["filesz"]))
        for entry in headers.segments[headers.segments["type"] == _PT_NOTE]
    ] + [
        (int(entry["offset"]), int(entry["size"]))
        for entry in headers.sections[headers.sections["type"] == _SHT_NOTE]
    ]
    for offset, size in spans[:64]:
        if size > MAX_SMALL or offset + size > source.size:
            continue
        data = source.read(offset, size)
        at = 0
        while at + 12 <= len(data):
            name_size, desc_size, kind = struct.unpack_from(order + "III", data, at)
            desc = at + 12 + (name_size + 3 & ~3)
            if kind == _NT_GNU_BUILD_ID and data[at + 12 : at + 16] == b"GNU\0":
                found = data[desc : desc + desc_size]
                # Anything but a digest of ordinary length is no key to look a file up with.
                return found if 4 <= len(found) <= 64 else b""
            at = desc + (desc_size + 3 & ~3)
    return _go_build_id(source, headers)


def _go_build_id(source: Source, headers: Headers) -> bytes:
    """The digest of its content that the Go linker wrote, in letters."""
    section = headers.named(b".note.go.buildid")
    if section is None:
        return b""
    note = _section_bytes(source, section, MAX_SMALL)
    digest = note[_GO_NOTE_BYTES:].rstrip(b"\0").rpartition(b"/")[2]
    return digest if note[12:16] == b"Go\0\0" and 4 <= len(digest) <= 64 else b""


def _debuglink(source: Source, headers: Headers) -> tuple[bytes, int]:
    section = headers.named(b".gnu_debuglink")
    if section is None:
        return b"", 0
    data = _section_bytes(source, section, NAME_LIMIT)
    name = data.split(b"\0", 1)[0]
    at = len(name) + 4 & ~3
    if not name or b"/" in name or name in (b".", b"..") or at + 4 > len(data):
        return b"", 0
    return name, int(struct.unpack_from(headers.layout.order + "I", data, at)[0])


def _read_symbols(source: Source, headers: Headers, kind: int) -> tuple[Records, Strings] | None:
    which = np.flatnonzero(headers.sections["type"] == kind)
    if not which.size:
        return None
    section = headers.sections[which[0]]
    dtype, link = headers.layout.symbol, int(section["link"])
    if int(section["entsize"]) != dtype.itemsize or link >= len(headers.sections):
        raise ElfError("a symbol table of unknown shape")
    count = int(section["size"]) // dtype.itemsize
    if count > MAX_SYMBOLS:
        raise ElfError("more symbols than any real file has")
    symbols = _records(source, dtype, int(section["offset"]), count)
    return symbols, Strings(_section_bytes(source, headers.sections[link], MAX_STRINGS))


def _functions(symbols: Records, strings: Strings) -> Records:
    kind = symbols["info"] & 0xF
    keep = (kind == _STT_FUNC) | (kind == _STT_GNU_IFUNC)
    keep &= (symbols["shndx"] != _SHN_UNDEF) & (symbols["shndx"] < _SHN_LORESERVE)
    keep &= (symbols["name"] > 0) & (symbols["name"] < len(strings))
    functions: Records = symbols[keep]
    return functions


def _rank(functions: Records, strings: Strings) -> npt.NDArray[np.uint32]:
    """Which of several names at one address is shown: the lowest.

    One with a size before one without, exported before local, and then the one with the fewest
    leading underscores, which is what the programmer wrote (`write`, not `__GI___libc_write`).
    """
    text = np.frombuffer(strings.data + b"\0\0", dtype=np.uint8)
    at = functions["name"].astype(np.int64)
    one = text[at] == ord("_")
    two = one & (text[at + 1] == ord("_"))
    three = two & (text[at + 2] == ord("_"))
    local = (functions["info"] >> 4) == 0
    unsized = functions["size"] == 0
    rank: npt.NDArray[np.uint32] = unsized.astype(np.uint32) * 8 + local.astype(np.uint32) * 4
    for underscore in (one, two, three):
        rank += underscore
    return rank


def _table(sections: Records, parts: list[tuple[Records, Strings]]) -> SymbolTable:
    if not parts:
        return empty_table()
    origin = np.repeat(np.arange(len(parts)), [len(functions) for functions, _ in parts])
    functions = np.concatenate([functions for functions, _ in parts])
    rank = np.concatenate([_rank(*part) for part in parts])
    starts = functions["value"].astype(np.uint64)
    order = np.lexsort((rank, starts))
    starts = starts[order]
    first = np.ones(len(starts), dtype=np.bool_)
    first[1:] = starts[1:] != starts[:-1]
    order, starts = order[first], starts[first]
    functions, origin = functions[order], origin[order]

    sizes = np.minimum(functions["size"].astype(np.uint64), _U64_MAX - starts)
    ends = starts + sizes
    unsized = np.flatnonzero(sizes == 0)
    if unsized.size:
        # A function without a size ends with the next one or with its section, not later.
        following = np.append(starts, _U64_MAX)[unsized + 1]
        home = functions["shndx"][unsized].astype(np.int64)
        known = home < len(sections)
        home[~known] = 0
        low = sections["addr"].astype(np.uint64)[home] if len(sections) else following * 0
        size = sections["size"].astype(np.uint64)[home] if len(sections) else following * 0
        limit = low + np.minimum(size, _U64_MAX - low)
        inside = known & (starts[unsized] >= low) & (starts[unsized] < limit)
        ends[unsized] = np.where(inside, np.minimum(following, limit), starts[unsized])
    keep = ends > starts
    starts, ends, functions, origin = starts[keep], ends[keep], functions[keep], origin[keep]

    name_starts = functions["name"].astype(np.int64)
    name_ends = np.zeros_like(name_starts)
    for number, (_, strings) in enumerate(parts):
        mine = origin == number
        name_ends[mine] = strings.ends(name_starts[mine])
    if int((name_ends - name_starts).sum()) > MAX_NAMES:
        raise ElfError("longer names than any real file has")
    texts = [strings.data for _, strings in parts]
    spans = zip(origin.tolist(), name_starts.tolist(), name_ends.tolist(), strict=True)
    names = [texts[which][begin:end] for which, begin, end in spans]
    # Linkers write the version into the name (`memcpy@@GLIBC_2.14`).
    names = [name.split(b"@", 1)[0] or name if b"@" in name else name for name in names]
    return build_table(starts, ends, names)


def _plt(source: Source, headers: Headers, dynamic: tuple[Records, Strings]) -> SymbolTable:
    """Procedure linkage stubs of x86-64, named after the slot their `jmp *slot(%rip)` reads."""
    symbols, strings = dynamic
    slots: list[U64] = []
    targets: list[npt.NDArray[np.int64]] = []
    for section in headers.sections[headers.sections["type"] == _SHT_RELA][:MAX_PLTS]:
        size = int(section["size"])
        if size > MAX_RELOCATIONS:
            continue
        count = size // headers.layout.rela.itemsize
        rela = _records(source, headers.layout.rela, int(section["offset"]), count)
        jump = (rela["type"] == _R_X86_64_GLOB_DAT) | (rela["type"] == _R_X86_64_JUMP_SLOT)
        jump &= (rela["symbol"] > 0) & (rela["symbol"] < len(symbols))
        slots.append(rela["offset"][jump].astype(np.uint64))
        targets.append(rela["symbol"][jump].astype(np.int64))
    if not slots:
        return empty_table()
    slot, target = np.concatenate(slots), np.concatenate(targets)
    order = np.argsort(slot, kind="stable")
    slot, target = slot[order], target[order]

    found: dict[int, tuple[int, bytes]] = {}
    stubs = [
        section
        for section, name in zip(headers.sections, headers.names, strict=True)
        if slot.size and (name == b".plt" or name.startswith(b".plt."))
    ]
    for section in stubs[:MAX_PLTS]:
        width = 8 if int(section["entsize"]) == 8 else 16
        flat = np.frombuffer(_section_bytes(source, section, MAX_RELOCATIONS), dtype=np.uint8)
        code = flat[: flat.size // width * width].reshape(-1, width)
        base = np.uint64(section["addr"]) + np.arange(len(code), dtype=np.uint64) * np.uint64(width)
        # At once, after `bnd`, after `endbr64`, after both.
        for at in (0, 1, 4, 5):
            if at + 6 > width:
                break
            hit = np.flatnonzero((code[:, at] == 0xFF) & (code[:, at + 1] == 0x25))
            reach = np.ascontiguousarray(code[hit, at + 2 : at + 6]).view("<i4").reshape(-1)
            wanted = base[hit] + np.uint64(at + 6) + reach.astype(np.int64).astype(np.uint64)
            where = np.minimum(np.searchsorted(slot, wanted), slot.size - 1)
            for index in np.flatnonzero(slot[where] == wanted):
                begin = int(symbols["name"][target[where[index]]])
                if 0 < begin < len(strings):
                    end = int(strings.ends(np.array([begin]))[0])
                    text = strings.data[begin:end].split(b"@", 1)[0] + b"@plt"
                    found.setdefault(int(base[hit][index]), (width, text))
    starts = np.array(sorted(found), dtype=np.uint64)
    widths = np.array([found[int(start)][0] for start in starts], dtype=np.uint64)
    return build_table(starts, starts + widths, [found[int(start)][1] for start in starts])


def _minidebug(source: Source, headers: Headers) -> SymbolTable:
    """Functions of the xz-compressed symbol table that Fedora's stripped files carry."""
    section = headers.named(b".gnu_debugdata")
    if section is None:
        return empty_table()
    packed = _section_bytes(source, section, MAX_MINIDEBUG)
    try:
        data = lzma.LZMADecompressor(memlimit=MAX_MINIDEBUG).decompress(packed, MAX_MINIDEBUG)
    except lzma.LZMAError as error:
        raise ElfError("damaged .gnu_debugdata") from error
    inner = BytesSource(data)
    nested = read_headers(inner)
    symtab = _read_symbols(inner, nested, _SHT_SYMTAB)
    if symtab is None:
        return empty_table()
    return _table(nested.sections, [(_functions(*symtab), symtab[1])])


def _go_functions(source: Source, headers: Headers) -> SymbolTable:
    """Functions of a Go program, stripped or not."""
    for name in gopclntab.SECTIONS:
        section = headers.named(name)
        if section is not None:
            text = headers.named(b".text")
            start = 0 if text is None else int(text["addr"])
            data = _section_bytes(source, section, gopclntab.MAX_BYTES)
            try:
                return gopclntab.read_functions(data, headers.layout.order, start)
            except gopclntab.PclntabError as error:
                raise ElfError(str(error)) from error
    return empty_table()


def _segments(headers: Headers) -> U64:
    loads = headers.segments[headers.segments["type"] == _PT_LOAD]
    columns = [loads[name].astype(np.uint64) for name in ("offset", "filesz", "vaddr", "flags")]
    rows = np.stack(columns, axis=1) if len(loads) else np.zeros((0, SEGMENT_COLUMNS), np.uint64)
    executable = (rows[:, 3] & np.uint64(_PF_X)) != 0
    # One page of the file may belong to two segments: code is asked for, so code comes first.
    return np.concatenate((rows[executable], rows[~executable]))


def read_image(source: Source) -> Image:
    """Everything the symbolizer wants of one ELF file.

    Raises ElfError. A file whose optional parts (stubs, notes, links) are damaged keeps its rest.
    """
    headers = read_headers(source)
    symtab = _read_symbols(source, headers, _SHT_SYMTAB)
    dynsym = _read_symbols(source, headers, _SHT_DYNSYM)
    parts = [(_functions(*table), table[1]) for table in (symtab, dynsym) if table is not None]
    symbols = _table(headers.sections, parts)
    link: tuple[bytes, int] = b"", 0
    build_id = b""
    try:
        build_id = _build_id(source, headers)
        link = _debuglink(source, headers)
        if symtab is None:
            symbols = merge(symbols, _minidebug(source, headers))
            symbols = merge(symbols, _go_functions(source, headers))
        if dynsym is not None and headers.layout.machine == EM_X86_64:
            symbols = merge(symbols, _plt(source, headers, dynsym))
    except ElfError:
        pass
    return Image(_segments(headers), symbols, symtab is not None, build_id, *link)


@dataclass(frozen=True, slots=True)
class Links:
    """Which build a file is of, whether it has DWARF, and where more of it may be.

    debuglink is a file name; altlink the path of what dwz put aside, with that file's build id.
    """

    build_id: bytes
    dwarf: bool
    debuglink: bytes
    altlink: bytes
    alt_build_id: bytes


def read_links(source: Source) -> Links:
    """Cheap beside `read_image`: headers, notes and links. Raises ElfError."""
    headers = read_headers(source)
    info = [headers.named(name) for name in (b".debug_info", b".zdebug_info")]
    dwarf = any(one is not None and int(one["type"]) != _SHT_NOBITS for one in info)
    altlink, alt_build_id = b"", b""
    section = headers.named(b".gnu_debugaltlink")
    if section is not None:
        data = _section_bytes(source, section, NAME_LIMIT)
        altlink, _, alt_build_id = data.partition(b"\0")
    build_id = _build_id(source, headers)
    return Links(build_id, dwarf, _debuglink(source, headers)[0], altlink, alt_build_id[:64])
