"""ELF files: symbols, notes, links, segments, and where the call frame information is."""

from __future__ import annotations

import contextlib
import functools
import json
import struct
from random import Random
from typing import Final

from latrace.tracer.symbols import gopclntab, wire
from latrace.tracer.symbols.elf import BytesSource, ElfError, read_headers, read_image
from latrace.tracer.symbols.frames import NAME_LIMIT
from latrace.tracer.symbols.table import Image, SymbolTable
from latrace.tracer.unwinding.pclntab import compile_pclntab
from latrace.tracer.unwinding.records import CfiError
from latrace.tracer.unwinding.sections import Place, compile_places, locate, read_places
from latrace.tracer.unwinding.table import UnwindTable

from . import programs
from .damage import FILES, apply, damage_file
from .frames_of_code import check_unwind_table
from .programs import addresses
from .target import Missing, Target, hold

_LARGE: Final = ("node", "postgres", "libc.so.6", "libstdc++.so.6", "redis-server", "python3.11")
_SOMETIMES: Final = 0.04
_MOST_COMPILED: Final = 1 << 16
"""Bytes of a section that is compiled here as well; others have their own target."""
_ANYWHERE: Final = (0, 1, 0x1000, 0x1100, 1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 1)


def check_table(table: SymbolTable) -> None:
    """Sorted, bounded, and it can be searched."""
    hold((table.starts[1:] > table.starts[:-1]).all(), "symbols out of order")
    hold((table.ends > table.starts).all(), "an empty symbol")
    names = table.all_names()
    hold(len(names) == len(table), "not a name for each symbol")
    hold(max(map(len, names), default=0) <= NAME_LIMIT + 4, "a name past the limit")
    for wanted in (addresses(*_ANYWHERE), table.starts[:50], table.ends[-50:] - addresses(1)):
        found = table.lookup(wanted)
        hold(((found >= -1) & (found < len(table))).all(), "an index out of bounds")
    if len(table):
        hold((table.lookup(table.starts) >= 0).all(), "a symbol that does not hold its start")


def as_received(image: Image) -> Image:
    """The image as the tracer gets it from the worker."""
    stream = b"".join(wire.image_reply(image))
    at = 0

    def read(length: int) -> bytes:
        nonlocal at
        at += length
        return stream[at - length : at]

    found = wire.read_image(read)
    if not isinstance(found, Image):
        raise AssertionError("what the parser says is refused")
    hold(at == len(stream), "not all of the reply is read")
    return found


def check_image(image: Image) -> None:
    """Holds together, and arrives as it was parsed."""
    check_table(image.symbols)
    found = as_received(image)
    hold(found.symbols.all_names() == image.symbols.all_names(), "other names arrive")
    hold((found.segments == image.segments).all(), "other segments arrive")
    hold(found.build_id == image.build_id, "another build id arrives")
    vaddrs, known = image.vaddrs(addresses(*_ANYWHERE))
    hold(vaddrs.shape == known.shape == (len(_ANYWHERE),), "an answer of another shape")


def _check(case: bytes) -> None:
    source = BytesSource(apply(case))
    with contextlib.suppress(ElfError):
        check_image(read_image(source))
    with contextlib.suppress(ElfError, CfiError):
        places = locate(source)
        arrived = [Place.from_dict(place.as_dict()) for place in places]
        hold(arrived == places, "other places arrive")
        data = read_places(source, places)
        if len(data) <= _MOST_COMPILED:
            table = compile_places(places, data)
            hold(UnwindTable.from_bytes(table.to_bytes()).to_bytes() == table.to_bytes(), "table")


def _make(random: Random) -> bytes:
    small, large = programs.small(), programs.real(*_LARGE)
    if not small and not large:
        raise Missing("no ELF files: neither gcc nor any of " + ", ".join(_LARGE))
    among = large if large and (not small or random.random() < _SOMETIMES) else small
    path = random.choice(among)
    return damage_file(random, path, programs.spans(path))


# --- the table of functions in programs written in Go ---------------------------------------------


@functools.cache
def _go_table(path: str) -> tuple[int, int, int]:
    """Where it is in the file, how long it is, and where the code begins."""
    headers = read_headers(BytesSource(FILES[path]))
    for name in gopclntab.SECTIONS:
        section, text = headers.named(name), headers.named(b".text")
        if section is not None and text is not None:
            return int(section["offset"]), int(section["size"]), int(text["addr"])
    raise Missing("no table of functions in " + path)


def _make_go(random: Random) -> bytes:
    path = random.choice(programs.go())
    at, size, _ = _go_table(path)
    count, functions = struct.unpack_from("<Q48xQ", FILES[path], at + 8)
    header, listed = (at, 72), (at + functions, min(8 * (count + 1), size))
    return damage_file(random, path, (header, header, listed, (at, size)), most=5)


def _check_go(case: bytes) -> None:
    at, size, text = _go_table(json.loads(case)["file"])
    section = apply(case)[at : at + size]
    for order in "<>":
        with contextlib.suppress(gopclntab.PclntabError):
            check_table(gopclntab.read_functions(section, order, text))
    with contextlib.suppress(CfiError):
        check_unwind_table(compile_pclntab(section, text=text, low=text, high=text + (1 << 30)))


TARGETS = (
    Target("elf", "damaged ELF files", _make, _check, limit_s=20.0, share=3),
    Target("gopclntab", "damaged tables of Go programs", _make_go, _check_go, limit_s=20.0),
)
