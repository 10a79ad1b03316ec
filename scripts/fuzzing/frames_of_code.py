"""Call frame information: sections nobody should write, and what holds for the rest of them."""

from __future__ import annotations

import functools
from random import Random
from typing import Any, Final

import numpy as np
from hypothesis import strategies as st
from test_unwind_section import check_sound_programs, register_rules
from test_unwind_section import programs as bodies

from latrace.tracer.symbols.elf import BytesSource, ElfError
from latrace.tracer.unwinding.cfi import compile_section
from latrace.tracer.unwinding.leb import padded, sleb, sleb_at, uleb, uleb_at
from latrace.tracer.unwinding.records import CfiError, Section, read_programs
from latrace.tracer.unwinding.rules import sound
from latrace.tracer.unwinding.sections import Kind, locate
from latrace.tracer.unwinding.table import TableError, UnwindTable

from . import programs
from .damage import FILES, damaged
from .target import Missing, Property, Target, hold

_MODULES: Final = ("libgcc_s.so.1", "libc.so.6", "libm.so.6", "postgres", "python3.11")
_MOST: Final = 3000
"""Bytes at the beginning of a section: some dozens of functions."""


@functools.cache
def sections() -> tuple[Section, ...]:
    """The beginnings of real sections."""
    found = []
    for path in (*programs.small(), *programs.real(*_MODULES)):
        source = BytesSource(FILES[path])
        try:
            places = locate(source)
        except ElfError:
            continue
        for place in places:
            if place.kind is not Kind.STUBS and not place.packed:
                data, eh = (
                    source.read(place.offset, min(place.size, _MOST)),
                    place.kind is Kind.EH_FRAME,
                )
                found.append(
                    Section(data, eh, place.address, place.data_base, place.low, place.high)
                )
    if not found:
        raise Missing("no call frame information: neither gcc nor a library")
    return tuple(found)


def with_data(section: Section, data: bytes) -> Section:
    """The same section with other bytes."""
    return Section(data, section.eh, section.address, section.data_base, section.low, section.high)


def check_unwind_table(table: UnwindTable) -> None:
    """Sorted, sound, the same when it is read back, and it can be searched."""
    hold((table.pcs[1:] > table.pcs[:-1]).all(), "addresses out of order")
    hold(sound(table.rules), "a rule that cannot be")
    hold(not len(table) or int(table.rule.max()) < len(table.rules), "a rule that is not there")
    again = UnwindTable.from_bytes(table.to_bytes())
    hold(again.to_bytes() == table.to_bytes(), "another table is read back")
    behind = (table.base + 1) % (1 << 64)
    anywhere = programs.addresses(0, 1, table.base, behind, 1 << 63, (1 << 64) - 1)
    hold((table.lookup(anywhere) < len(table.rules)).all(), "a rule out of bounds")


def _split(case: bytes) -> tuple[Section, bytes]:
    known = sections()
    return known[case[0] % len(known)], case[1:]


def _make(random: Random) -> bytes:
    number = random.randrange(len(sections()))
    if random.random() < 0.05:
        data = random.randbytes(random.randrange(400))
    else:
        data = damaged(random, sections()[number].data)
    return bytes([number]) + data


def _check(case: bytes) -> None:
    section, data = _split(case)
    for eh in (True, False):
        changed = Section(data, eh, section.address, section.data_base, section.low, section.high)
        try:
            table = compile_section(changed)
        except CfiError:
            continue
        check_unwind_table(table)


# --- what is damaged costs the function concerned ------------------------------------------------


def _make_one(random: Random) -> bytes:
    number = random.randrange(len(sections()))
    section = sections()[number]
    found = read_programs(section)
    which = random.randrange(len(found.starts))
    start, stop = int(found.starts[which]), int(found.stops[which])
    new = random.randbytes(random.randint(1, max(stop - start, 1)))[: stop - start]
    at = random.randint(start, stop - len(new))
    data = section.data[:at] + new + section.data[at + len(new) :]
    return bytes([number]) + which.to_bytes(4, "little") + data


def _rules_at(table: UnwindTable, wanted: np.ndarray) -> list[Any]:
    numbers = table.lookup(wanted)
    return [table.rules[number].tobytes() for number in numbers]


def _check_one(case: bytes) -> None:
    section, rest = _split(case)
    which, data = int.from_bytes(rest[:4], "little"), rest[4:]
    found = read_programs(section)
    before, after = compile_section(section), compile_section(with_data(section, data))
    check_unwind_table(after)
    begin, end = int(found.begins[which]), int(found.ends[which])
    base = before.pcs.astype(np.uint64) + np.uint64(before.base)
    wanted = np.unique(np.concatenate((base, base - np.uint64(1), found.begins, found.ends)))
    wanted = wanted[(wanted < begin) | (wanted >= end)]
    hold(_rules_at(before, wanted) == _rules_at(after, wanted), "other functions changed")


# --- tables as they are kept ----------------------------------------------------------------------


@functools.cache
def _tables() -> tuple[bytes, ...]:
    return tuple(compile_section(section).to_bytes() for section in sections())


def _make_table(random: Random) -> bytes:
    return damaged(random, random.choice(_tables()), most=4)


def _check_table(case: bytes) -> None:
    try:
        table = UnwindTable.from_bytes(case)
    except TableError:
        return
    hold(table.to_bytes() == case, "another table is written")
    check_unwind_table(table)


# --- sound programs, against pyelftools; numbers of variable length -------------------------------


def _sound_programs() -> Any:
    return st.tuples(st.lists(bodies, min_size=1, max_size=4), register_rules)


def _check_sound(value: tuple[list[bytes], bytes]) -> None:
    check_sound_programs(*value)


def _numbers() -> Any:
    return st.binary(min_size=1, max_size=24)


def _check_number(value: bytes) -> None:
    at = np.zeros(1, dtype=np.int64)
    for many, one, bits in ((uleb, uleb_at, 64), (sleb, sleb_at, 64)):
        numbers, behind = many(padded(value), at)
        try:
            number, end = one(value, 0, len(value))
        except IndexError:
            continue
        if end <= 9:  # ten bytes may have more than 64 bits
            hold((int(numbers[0]), int(behind[0])) == (number, end), f"{bits} bits: {number}")


TARGETS = (
    Target("cfi", "damaged call frame information", _make, _check, share=3),
    Target("cfi-one", "one damaged function among others", _make_one, _check_one, share=3),
    Property("cfi-sound", "sound programs, against pyelftools", _sound_programs, _check_sound),
    Property("leb", "numbers of variable length, against a plain reader", _numbers, _check_number),
    Target("table", "damaged unwinding tables", _make_table, _check_table),
)
