"""Sections made byte by byte: each encoding and instruction, and what nobody should write."""

from __future__ import annotations

import struct
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_unwind_cfi import compare
from unwind_modules import cfa_of, module, section_of
from unwind_sections import (
    ADDRESS,
    GOT,
    HIGH,
    LOW,
    START,
    block,
    cie,
    of_bytes,
    record,
    section_of_functions,
    sleb,
    uleb,
)

from latrace.tracer.unwinding import rules
from latrace.tracer.unwinding.cfi import compile_section
from latrace.tracer.unwinding.expressions import NOT_UNDERSTOOD, understand
from latrace.tracer.unwinding.records import CfiError, Section
from latrace.tracer.unwinding.rules import (
    BAD_RULE,
    CFA,
    CFA_OFFSET,
    MEMORY,
    NO_RULE,
    RETURN,
    Rules,
)
from latrace.tracer.unwinding.sections import Kind, Place, compile_place
from latrace.tracer.unwinding.table import TableError, UnwindTable, overlaid

PLAIN = (CFA_OFFSET, 7, 8, 0)
OFFSET_16 = b"\x0e\x10"


def rule_at(section: Section, address: int) -> Rules:
    table = compile_section(section)
    return table.rules[int(table.lookup(np.array([address], dtype=np.uint64))[0])]


def numbers_at(section: Section, *addresses: int) -> list[int]:
    table = compile_section(section)
    return table.lookup(np.array(addresses, dtype=np.uint64)).tolist()


def register(rule: Rules, column: int) -> tuple[int, int, int]:
    kind, base, offset = (int(rule[name][column]) for name in ("kind", "base", "offset"))
    return kind, base, offset


# --- how records are written


@pytest.mark.parametrize(
    ("encoding", "kind", "origin"),
    [
        (0x00, "Q", 0),
        (0x03, "I", 0),
        (0x04, "Q", 0),
        (0x0B, "i", 0),
        (0x0C, "q", 0),
        (0x10, "Q", None),
        (0x1B, "i", None),
        (0x1C, "q", None),
        (0x33, "I", GOT),
        (0x3B, "i", GOT),
    ],
)
@pytest.mark.parametrize("letters", [b"zR", b"zPLR", b"zRS"])
def test_each_way_to_store_a_pointer(
    encoding: int, kind: str, origin: int | None, letters: bytes
) -> None:
    data = {b"R": bytes([encoding]), b"P": b"\x9b\1\2\3\4", b"L": b"\x1b", b"S": b"", b"z": b""}
    head = cie(augmentation=letters, data=b"".join(data[bytes([one])] for one in letters))
    begin, size = 0x4000, 0x10
    at = len(head) + 8
    value = begin - (ADDRESS + at if origin is None else origin)
    if kind.isupper():
        value &= (1 << (64 if kind == "Q" else 32)) - 1
        if value + (origin or 0) != begin and origin is not None:
            pytest.skip("no number without sign")
    body = struct.pack("<I" + kind + kind, len(head) + 4, value, size) + block(b"")
    section = of_bytes(head + record(body))
    found = rule_at(section, begin)
    assert cfa_of(found) == PLAIN
    assert bool(found["signal"]) == (letters == b"zRS")
    assert numbers_at(section, begin - 1, begin + size) == [NO_RULE, NO_RULE]


@pytest.mark.parametrize("version", [1, 3, 4])
def test_debug_frame(version: int) -> None:
    head = cie(eh=False, version=version, augmentation=b"")
    body = struct.pack("<IQQ", 0, 0x4000, 0x10) + b"\x44\x0e\x10"
    section = of_bytes(head + record(body), eh=False)
    assert cfa_of(rule_at(section, 0x4003)) == PLAIN
    assert cfa_of(rule_at(section, 0x4004)) == (CFA_OFFSET, 7, 16, 0)


def long_record(body: bytes) -> bytes:
    body += bytes(-len(body) % 8)
    return struct.pack("<IQ", 0xFFFFFFFF, len(body)) + body


def long_debug_frame(reference: int = 0) -> bytes:
    # The same CIE as that of 32 bits, but for the length and the mark that it is one.
    head = long_record(b"\xff" * 8 + cie(eh=False, version=4, augmentation=b"")[8:])
    body = struct.pack("<QQQ", reference, 0x4000, 0x10) + b"\x44\x0e\x10"
    return head + long_record(body)


def test_debug_frame_of_64_bits_beside_one_of_32() -> None:
    data = long_debug_frame()
    at = len(data)
    data += cie(eh=False, version=4, augmentation=b"")
    data += record(struct.pack("<IQQ", at, 0x5000, 0x10) + b"\x44\x0e\x20")
    data += record(struct.pack("<IQQ", 0, 0x6000, 0x10) + b"\x44\x0e\x30")
    section = of_bytes(data, eh=False)
    for begin, offset in ((0x4000, 16), (0x5000, 32), (0x6000, 48)):
        assert cfa_of(rule_at(section, begin + 3)) == PLAIN
        assert cfa_of(rule_at(section, begin + 4)) == (CFA_OFFSET, 7, offset, 0)


@pytest.mark.parametrize("reference", [8, 1 << 20, 0xFFFFFFFF, 1 << 63, (1 << 64) - 2])
def test_a_reference_of_64_bits_that_leads_nowhere_gives_no_rule(reference: int) -> None:
    section = of_bytes(long_debug_frame(reference), eh=False)
    assert numbers_at(section, 0x4004) == [NO_RULE]


def test_lengths_of_64_bits_in_eh_frame_are_passed_over() -> None:
    data = long_record(bytes(64))
    section = section_of_functions([(0x4000, 0x10, OFFSET_16)])
    record_and_rest = section.data + data
    body = struct.pack("<IQQ", len(record_and_rest) + 4, 0x5000, 0x10) + block(b"")
    found = of_bytes(record_and_rest + record(body))
    assert numbers_at(found, 0x4000, 0x5000) == [2, 3]


@pytest.mark.parametrize(
    "head",
    [
        cie(version=2),
        cie(augmentation=b"zX"),
        cie(augmentation=b"eh"),
        cie(column=15),
        cie(code_align=0),
        cie(data=b"\x80"),
        cie(data=b"\x50"),
        cie(data=b"\x01"),
    ],
)
def test_what_is_not_understood_has_no_rule(head: bytes) -> None:
    section = section_of_functions([(0x4000, 0x10, b"")], head)
    assert numbers_at(section, 0x4000) == [NO_RULE]


def test_the_first_of_two_functions_at_one_address_counts() -> None:
    functions = [(0x4000, 0x10, b""), (0x4000, 0x20, OFFSET_16), (0x4000, 0x30, OFFSET_16)]
    section = section_of_functions([*functions, (0x5000, 0x10, OFFSET_16), (0x6000, 0x10, b"")])
    assert cfa_of(rule_at(section, 0x400F)) == PLAIN
    assert numbers_at(section, 0x4010, 0x5010, 0x6010) == [NO_RULE] * 3
    assert cfa_of(rule_at(section, 0x500F)) == (CFA_OFFSET, 7, 16, 0)
    assert cfa_of(rule_at(section, 0x600F)) == PLAIN


def test_a_signal_frame_is_told_from_another_with_the_same_rules() -> None:
    plain, signal = cie(), cie(augmentation=b"zRS")
    body = struct.pack("<QQ", 0x4000, 0x10) + block(b"")
    other = struct.pack("<QQ", 0x4010, 0x10) + block(b"")
    data = plain + signal
    data += record(struct.pack("<I", len(data) + 4) + body)
    data += record(struct.pack("<I", len(data) + 4 - len(plain)) + other)
    section = of_bytes(data)
    assert not rule_at(section, 0x4000)["signal"]
    assert rule_at(section, 0x4010)["signal"]


def test_functions_that_overlap_begin_where_they_say() -> None:
    functions = [(0x4000, 0x100, b""), (0x4010, 0x10, b"\x0e\x10"), (0x4010, 0x20, b"\x0e\x18")]
    section = section_of_functions([*functions, (0x5000, 0, b""), (0x6000, 1 << 63, b"")])
    table = compile_section(section)
    assert cfa_of(rule_at(section, 0x400F)) == PLAIN
    assert cfa_of(rule_at(section, 0x401F)) == (CFA_OFFSET, 7, 16, 0)
    assert numbers_at(section, 0x4020, 0x5000) == [NO_RULE, NO_RULE]
    assert (np.diff(table.pcs.astype(np.int64)) > 0).all()


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(-3, 20)), max_size=12))
def test_whom_each_address_belongs_to(spans: list[tuple[int, int]]) -> None:
    # Each one has an offset of its own.
    section = section_of_functions(
        [
            (0x4000 + begin, size & (1 << 64) - 1, b"\x0e" + uleb(number + 1))
            for number, (begin, size) in enumerate(spans)
        ]
    )
    owners: dict[int, tuple[int, int]] = {}
    for number, (begin, size) in enumerate(spans):
        if size > 0:
            owners.setdefault(begin, (number + 1, begin + size))
    table = compile_section(section)
    for address in range(64):
        begin = max((begin for begin in owners if begin <= address), default=None)
        offset, end = (0, 0) if begin is None else owners[begin]
        rule = table.rules[int(table.lookup(np.array([0x4000 + address], dtype=np.uint64))[0])]
        assert int(rule["cfa_offset"]) == (offset if address < end else 0)


# --- what instructions say


def test_instructions_that_the_oracle_has_not() -> None:
    program = (
        b"\x12\x06" + sleb(-2)  # def_cfa_sf
        + b"\x2f\x03" + uleb(3)  # GNU_negative_offset_extended
        + b"\x2e" + uleb(300)  # GNU_args_size
        + b"\x01" + struct.pack("<Q", 0x4008)  # set_loc
        + b"\x0e\x20"
    )  # fmt: skip
    section = section_of_functions([(0x4000, 0x10, program)])
    first = rule_at(section, 0x4007)
    assert cfa_of(first) == (CFA_OFFSET, 6, 16, 0)
    assert register(first, 3) == (rules.MEMORY, CFA, 24)
    assert cfa_of(rule_at(section, 0x4008)) == (CFA_OFFSET, 6, 32, 0)


@pytest.mark.parametrize(
    "program",
    [
        b"\x41\x3f",  # no such instruction
        b"\x41\x1d" + bytes(8),  # that of another machine
        b"\x41\x0b",  # nothing was remembered
        b"\x41\x0f\x01\x96",  # an expression of another shape
        b"\x41\x0c\x07",  # cut off
        b"\x41\x0f\x7f\x00",
        b"\x41\x0c\x20\x08",  # no such register
        b"\x41\x0e" + uleb(1 << 40),
        b"\x41\x0e" + b"\xff" * 12 + b"\x01",
        b"\x41\x0f\x03\x76\x78\x06\x0e\x10",  # an offset for what has none
    ],
)
def test_what_is_not_understood_ends_there(program: bytes) -> None:
    body = struct.pack("<IQQ", len(cie()) + 4, 0x4000, 0x10) + block(b"") + program
    section = of_bytes(cie() + struct.pack("<I", len(body)) + body)
    assert cfa_of(rule_at(section, 0x4000)) == PLAIN
    assert numbers_at(section, 0x4001) == [BAD_RULE]


def test_expressions_that_are_understood() -> None:
    assert understand(bytes.fromhex("770880003f1a3b2a332422")) == (rules.CFA_PLT, 7, 0, 11)
    assert understand(bytes.fromhex("770880003f1a3a2a332422")) == (rules.CFA_PLT, 7, 0, 10)
    assert understand(bytes.fromhex("767806")) == (rules.CFA_DEREF, 6, -8, 0)
    assert understand(bytes.fromhex("77a00106")) == (rules.CFA_DEREF, 7, 160, 0)
    assert understand(bytes.fromhex("7738062308")) == (rules.CFA_DEREF, 7, 56, 8)
    assert understand(bytes.fromhex("7728")) == (rules.CFA_OFFSET, 7, 40, 0)
    for text in ("", "77", "7780", "8000", "770806ff", "77080622", "96", "770880003f1a502a332422"):
        assert understand(bytes.fromhex(text)) == NOT_UNDERSTOOD


registers = st.integers(0, 20).map(uleb)
small = st.integers(0, 300)
signed = st.integers(-300, 300)
known_expressions = st.sampled_from([b"\x76\x78\x06", b"\x77\x28", b"\x77\xa0\x01\x06", b"\x96"])


def instruction(code: int, *operands: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    return st.tuples(*operands).map(lambda parts: bytes([code]) + b"".join(parts))


advances = st.one_of(
    st.integers(1, 63).map(lambda by: bytes([0x40 | by])),
    st.integers(1, 255).map(lambda by: struct.pack("<BB", 2, by)),
    st.integers(1, 300).map(lambda by: struct.pack("<BH", 3, by)),
    st.integers(1, 300).map(lambda by: struct.pack("<BI", 4, by)),
)
register_rules = st.one_of(
    st.tuples(st.integers(0, 20), small).map(lambda pair: bytes([0x80 | pair[0]]) + uleb(pair[1])),
    st.integers(0, 20).map(lambda register: bytes([0xC0 | register])),
    instruction(0x05, registers, small.map(uleb)),
    instruction(0x06, registers),
    instruction(0x07, registers),
    instruction(0x08, registers),
    instruction(0x09, registers, st.integers(0, 15).map(uleb)),
    instruction(0x10, registers, known_expressions.map(block)),
    instruction(0x11, registers, signed.map(sleb)),
    instruction(0x14, registers, small.map(uleb)),
    instruction(0x15, registers, signed.map(sleb)),
    instruction(0x16, registers, known_expressions.map(block)),
    instruction(0x2E, small.map(uleb)),
    st.just(b"\0"),
)
cfas = st.one_of(
    instruction(0x0C, st.integers(0, 15).map(uleb), small.map(uleb)),
    instruction(0x0D, st.integers(0, 15).map(uleb)),
    instruction(0x0E, small.map(uleb)),
    instruction(0x13, signed.map(sleb)),
)
# After an expression the CFA is defined anew: registers and offsets for one are not sound.
excursion = st.tuples(known_expressions, advances, small).map(
    lambda parts: b"\x0f" + block(parts[0]) + parts[1] + b"\x0c\x06" + uleb(parts[2])
)
programs = st.recursive(
    st.lists(st.one_of(advances, register_rules, cfas, excursion), max_size=8).map(b"".join),
    lambda inner: st.lists(
        st.one_of(inner, st.tuples(inner, advances).map(lambda p: b"\x0a" + p[0] + p[1] + b"\x0b")),
        min_size=1,
        max_size=4,
    ).map(b"".join),
    max_leaves=8,
)


def check_sound_programs(bodies: list[bytes], first: bytes) -> None:
    # A CIE can't go back to what it says itself; of stacks' arguments the oracle knows nothing.
    more = first if first[0] < 0xC0 and first[0] not in (0x06, 0x2E) else b""
    functions = [(0x4000 + number * 0x8000, 0x8000, body) for number, body in enumerate(bodies)]
    compare(section_of_functions(functions, cie(start=START + more)))


@settings(max_examples=120, deadline=None)
@given(st.lists(programs, min_size=1, max_size=4), register_rules)
def test_any_sound_program_says_what_pyelftools_decodes(bodies: list[bytes], first: bytes) -> None:
    check_sound_programs(bodies, first)


# --- several sections of one file

# The third one is not understood: an expression of another shape.
_BODIES = (OFFSET_16, b"\x0e\x20", b"\x0f\x01\x96")
functions_anywhere = st.lists(
    st.tuples(st.integers(LOW, LOW + 40), st.integers(1, 12), st.sampled_from(_BODIES)), max_size=8
)


@settings(deadline=None)
@given(functions_anywhere, functions_anywhere)
def test_of_two_tables_the_first_counts_where_it_says_something(
    above: list[tuple[int, int, bytes]], below: list[tuple[int, int, bytes]]
) -> None:
    first = compile_section(section_of_functions(above))
    second = compile_section(section_of_functions(below, cie(start=START + b"\x86\x02")))
    both = UnwindTable.from_bytes(overlaid(first, second).to_bytes())
    everywhere = np.arange(LOW - 2, LOW + 60, dtype=np.uint64)
    numbers = [table.lookup(everywhere).tolist() for table in (first, second, both)]
    for one, two, found in zip(*numbers, strict=True):
        table, number = (first, one) if one > BAD_RULE or two == NO_RULE else (second, two)
        assert both.rules[found] == table.rules[number]
        # The first two rules of all tables are alike but for what they stand for.
        assert min(found, 2) == min(number, 2)


def test_tables_that_are_far_apart_are_not_put_together() -> None:
    near = compile_section(section_of_functions([(0x4000, 0x10, OFFSET_16)]))
    far = UnwindTable(1 << 40, near.pcs, near.rule, near.rules)
    assert overlaid(near, far) is near


JUMP = b"\xff\x25\1\2\3\4"
STUBS = [
    (JUMP + b"\x66\x90", 8),
    (b"\xf2" + JUMP + b"\x90", 8),
    (b"\xf3\x0f\x1e\xfa" + JUMP + b"\x66\x0f\x1f\x44\0\0", 16),
    (b"\xf3\x0f\x1e\xfa\xf2" + JUMP + b"\x0f\x1f\x44\0\0", 16),
    (JUMP + b"\xcc" * 10, 16),
    # The first stub of a lazy table pushes before it jumps, the others after they did.
    (b"\xff\x35\1\2\3\4" + JUMP + b"\x0f\x1f\x40\0", 0),
    (JUMP + b"\x68\1\0\0\0\xe9\0\0\0\0", 6),
    (b"\x55" + JUMP, 0),
]


@pytest.mark.parametrize(("code", "known"), STUBS)
def test_stubs_that_only_jump_have_the_return_address_on_top(code: bytes, known: int) -> None:
    for times in (1, 3):
        place = Place(0, len(code) * times, Kind.STUBS, False, 0x4000, 0, LOW, HIGH)
        table = compile_place(place, code * times)
        covered = known * times if known == len(code) else known
        found = table.lookup(np.arange(0x4000, 0x4000 + len(code) * times, dtype=np.uint64))
        assert (found[:covered] > BAD_RULE).all() and (found[covered:] == NO_RULE).all()
        if covered:
            rule = table.rules[found[0]]
            assert cfa_of(rule) == PLAIN
            assert register(rule, RETURN) == (MEMORY, CFA, -8)
    outside = Place(0, len(code), Kind.STUBS, False, HIGH, 0, LOW, HIGH)
    assert not len(compile_place(outside, code))


def test_a_megabyte_of_stubs_takes_little_time() -> None:
    began = time.monotonic()
    for code in (JUMP + b"\x66\x90", JUMP + b"\x90" * 10, b"\xf2" + JUMP):
        data = code * ((1 << 20) // len(code)) + b"\xff"
        place = Place(0, len(data), Kind.STUBS, False, 0x4000, 0, LOW, 1 << 30)
        assert compile_place(place, data).pcs[-1] == len(data) - 1
    assert time.monotonic() - began < 2


# --- what nobody should write


def compiled(section: Section) -> UnwindTable | None:
    try:
        table = compile_section(section)
    except CfiError:
        return None
    again = UnwindTable.from_bytes(table.to_bytes())
    assert again.to_bytes() == table.to_bytes()
    return table


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=400), st.booleans())
def test_any_bytes_make_a_table_or_none(data: bytes, eh: bool) -> None:
    compiled(of_bytes(data, eh=eh))
    compiled(of_bytes(cie(eh=eh) + data, eh=eh))
    if eh:
        compiled(section_of_functions([(0x4000, 0x1000, data)]))
        compiled(section_of_functions([(0x4000, 0x1000, b"")], cie(start=data)))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), min_size=1, max_size=20))
def test_a_damaged_section_makes_a_table_or_none(changes: list[tuple[int, int]]) -> None:
    whole = section_of(module("libgcc_s.so.1"), most=5000)
    data = bytearray(whole.data)
    for at, value in changes:
        data[at % len(data)] = value
    compiled(Section(bytes(data), True, whole.address, whole.data_base, whole.low, whole.high))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=4), st.data())
def test_a_damaged_table_is_refused_or_sound(
    changes: list[tuple[int, int]], data: st.DataObject
) -> None:
    text = bytearray(compile_section(section_of(module("libgcc_s.so.1"), most=1000)).to_bytes())
    for at, value in changes:
        text[at % len(text)] = value
    text = text[: data.draw(st.one_of(st.just(len(text)), st.integers(0, len(text))))]
    try:
        table = UnwindTable.from_bytes(bytes(text))
    except TableError:
        return
    asked = np.array([0, table.base, table.base + 50, (1 << 64) - 1], dtype=np.uint64)
    assert (table.lookup(asked) < len(table.rules)).all()


SIZE = 1 << 19


@pytest.mark.parametrize(
    "program",
    [
        bytes(SIZE),
        b"\x0a" * (SIZE // 2) + b"\x0b" * (SIZE // 2),
        b"\x0a\x0b\x41" * (SIZE // 3),
        b"\x41" * SIZE,
        b"".join(b"\x0e" + uleb(at) + b"\x41" for at in range(SIZE // 5)),
        b"\x0f\x02\x77\x08\x41" * (SIZE // 5),
    ],
    ids=["nops", "remember", "pairs", "advances", "rules", "expressions"],
)
def test_a_function_of_absurd_length_takes_little_time(program: bytes) -> None:
    began = time.process_time()
    compiled(section_of_functions([(0x4000, 0xF0000, program)]))
    assert time.process_time() - began < 5


def test_many_records_take_little_time() -> None:
    one = cie()
    both = b"".join(
        one + record(struct.pack("<IQQ", len(one) + 4, 0x4000 + at, 1)) for at in range(20000)
    )
    began = time.process_time()
    for data in (both, one * 20000, bytes(1 << 22), b"\xff" * (1 << 20)):
        compiled(of_bytes(data))
    assert time.process_time() - began < 5
