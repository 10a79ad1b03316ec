"""Walks of stacks made by hand: each rule, each end, and memory that was never a stack."""

from __future__ import annotations

import struct
import time
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unwind_modules import module, section_of
from unwind_sections import block, cie, section_of_functions, sleb

from latrace.tracer.unwinding.cfi import compile_section
from latrace.tracer.unwinding.places import End, Otherwise, Places
from latrace.tracer.unwinding.rules import RBP, RETURN, RSP
from latrace.tracer.unwinding.table import UnwindTable
from latrace.tracer.unwinding.walk import MAX_FRAMES, Stacks, Walks, unwind

BASE = 0x5555_0000_0000
STACK = 0x7FFF_0000_0000
OTHER_STACK = 0x7FFE_0000_0000

# A function of 256 bytes each, from 0x4000 on.
OFFSET_16 = b"\x0e\x10"
SAVES_RBP = b"\x0e\x10\x86\x02\x0d\x06"
FUNCTIONS = {
    "leaf": b"",  # CFA = rsp + 8
    "frame16": OFFSET_16,
    "rbp": SAVES_RBP,  # CFA = rbp + 16, rbp at CFA - 16
    "root": b"\x07\x10",
    "odd": b"\x0f\x01\x96",
    "plt": b"\x0f" + block(bytes.fromhex("770880003f1a3b2a332422")),
    "realigned": b"\x0f" + block(b"\x76" + sleb(-8) + b"\x06") + b"\x10\x06" + block(b"\x76\x00"),
    "openssl": b"\x0f" + block(b"\x77\x10\x06\x23\x08"),
    "saves_below": b"\x83\x05",  # rbx at CFA - 40: below rsp
    "uses_rbx": b"\x0c\x03\x10",
    "kept_in_rdi": b"\x09\x10\x05",  # the return address
    "backwards": b"\x0e\x00",
}
PLACES = {name: BASE + 0x4000 + 256 * number for number, name in enumerate(FUNCTIONS)}
# Registers in memory from rsp on: rsp, rbp, rip. The interrupted rsp is the CFA.
SIGNAL = (
    b"\x0f" + block(b"\x77\x00\x06") + b"\x10\x07" + block(b"\x77\x00")
    + b"\x10\x06" + block(b"\x77\x08") + b"\x10\x10" + block(b"\x77\x10")
)  # fmt: skip
# As with the C library, what is said begins before the address that a handler returns to.
RETURNS = BASE + 0x10000 + 0x4001
NOWHERE = BASE + 0x4000 + 256 * len(FUNCTIONS)
FOREIGN, JIT, TRAMPOLINE = 0x6000_0000_0000, 0x6100_0000_0000, 0x6200_0000_0000


def tables() -> tuple[UnwindTable, UnwindTable]:
    functions = [(0x4000 + 256 * at, 256, text) for at, text in enumerate(FUNCTIONS.values())]
    signal = section_of_functions([(0x4000, 256, SIGNAL)], cie(augmentation=b"zRS", start=b""))
    return compile_section(section_of_functions(functions)), compile_section(signal)


@pytest.fixture(scope="module")
def places() -> Places:
    found = Places()
    modules = [found.add_module(table) for table in tables()]
    modules.append(found.add_module(None))
    modules.append(found.add_module(None, otherwise=Otherwise.FRAME_POINTERS))
    modules.append(found.add_module(None, otherwise=Otherwise.TRAMPOLINE))
    starts = [BASE, BASE + 0x10000, FOREIGN, JIT, TRAMPOLINE]
    biases = [BASE, BASE + 0x10000, 0, 0, 0]
    assert found.add_space(u64(*starts), u64(*(start + 0x10000 for start in starts)), u64(*biases),
                           np.array(modules)) == 0  # fmt: skip
    return found


class Copy(NamedTuple):
    base: int
    words: list[int]

    def bytes(self) -> bytes:
        return struct.pack(f"<{len(self.words)}Q", *self.words)


def u64(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint64)


def walk(places: Places, pc: int, *copies: Copy, **registers: int) -> tuple[list[int], End]:
    """The frames of one stack, whose rsp is where its first copy begins, and how it ended."""
    numbers = {"rbp": RBP, "rsp": RSP, "rdi": 5, "rbx": 3}
    values = np.zeros((1, 17), dtype=np.uint64)
    values[0, RSP], values[0, RETURN] = copies[0].base, pc
    for name, value in registers.items():
        values[0, numbers[name]] = value
    texts = [copy.bytes() for copy in copies]
    lengths = np.array([[len(text) for text in texts]])
    # One byte ahead, so that nothing is aligned.
    memory = np.frombuffer(b"\xff" + b"".join(texts), dtype=np.uint8)
    starts = 1 + np.cumsum(lengths, axis=1) - lengths
    bases = u64(*(copy.base for copy in copies)).reshape(1, -1)
    found = unwind(Stacks(values, memory, starts, lengths, bases, np.zeros(1, np.int64)), places)
    assert found.counts.tolist() == [found.addresses.size]
    assert int(found.stopped[0]) == int(found.addresses[-1])
    return found.addresses.tolist(), End(found.ends[0])


def at(name: str) -> int:
    """A return address in that function."""
    return PLACES[name] + 100


def test_frames_lead_to_the_root(places: Places) -> None:
    words = [at("frame16"), 1, at("root")]
    assert walk(places, PLACES["leaf"], Copy(STACK, words)) == (
        [PLACES["leaf"], at("frame16"), at("root")],
        End.WHOLE,
    )


def test_a_return_address_of_zero_is_the_root(places: Places) -> None:
    words = [at("frame16"), 1, 0]
    assert walk(places, PLACES["leaf"], Copy(STACK, words))[1] == End.WHOLE


def test_a_call_that_never_returns_belongs_to_its_function(places: Places) -> None:
    # Behind the call begins another function.
    words = [PLACES["rbp"], 1, at("root")]
    found = walk(places, PLACES["leaf"], Copy(STACK, words))
    assert found == ([PLACES["leaf"], PLACES["rbp"], at("root")], End.WHOLE)


@pytest.mark.parametrize(
    ("name", "words", "end"),
    [
        ("leaf", [], End.SHORT),
        ("leaf", [FOREIGN + 5, 1, 2], End.NO_TABLE),
        ("leaf", [NOWHERE + 5, 1, 2], End.NO_RULE),
        ("leaf", [PLACES["odd"] + 5, 1, 2], End.UNSUPPORTED),
        ("leaf", [0x1234, 1, 2], End.UNMAPPED),
        ("leaf", [1 << 63, 1, 2], End.UNMAPPED),
        ("leaf", [PLACES["backwards"] + 5, 1, 2], End.STUCK),
        ("leaf", [PLACES["leaf"] + 5] * 300, End.DEEP),
        ("leaf", [at("rbp"), 1, 2], End.STUCK),
        ("odd", [1, 2], End.UNSUPPORTED),
    ],
)
def test_each_end(places: Places, name: str, words: list[int], end: End) -> None:
    frames, ended = walk(places, PLACES[name], Copy(STACK, words))
    assert ended == end
    if end == End.DEEP:
        assert len(frames) == MAX_FRAMES


def test_the_frame_pointer_is_followed_through_others(places: Places) -> None:
    words = [at("frame16"), 1, at("rbp"), 7, 0, STACK + 64, at("rbp"), 0, 99, at("root")]
    frames, end = walk(places, PLACES["leaf"], Copy(STACK, words), rbp=STACK + 40)
    assert frames == [PLACES["leaf"], at("frame16"), at("rbp"), at("rbp"), at("root")]
    assert end == End.WHOLE


@pytest.mark.parametrize("into", [0, 10, 11, 15, 27])
def test_a_stub_has_pushed_something_from_its_second_instruction_on(
    places: Places, into: int
) -> None:
    words = [7] * (into % 16 >= 11) + [at("root")]
    found = walk(places, PLACES["plt"] + into, Copy(STACK, words))
    assert found == ([PLACES["plt"] + into, at("root")], End.WHOLE)


def test_a_cfa_that_is_in_memory(places: Places) -> None:
    words = [0, STACK + 40, 0, 0, at("root")]
    found = walk(places, PLACES["realigned"], Copy(STACK, words), rbp=STACK + 16)
    assert found == ([PLACES["realigned"], at("root")], End.WHOLE)
    words = [0, 0, STACK + 32, 0, at("root")]
    found = walk(places, PLACES["openssl"], Copy(STACK, words))
    assert found == ([PLACES["openssl"], at("root")], End.WHOLE)
    assert walk(places, PLACES["openssl"], Copy(STACK, [0, 0]))[1] == End.SHORT


def test_a_return_address_in_a_register(places: Places) -> None:
    found = walk(places, PLACES["kept_in_rdi"], Copy(STACK, [0]), rdi=at("root"))
    assert found == ([PLACES["kept_in_rdi"], at("root")], End.WHOLE)


def test_a_register_that_was_not_copied_is_not_made_up(places: Places) -> None:
    words = [at("uses_rbx"), 0, 0, at("root")]
    found = walk(places, PLACES["leaf"], Copy(STACK, words), rbx=STACK + 16)
    assert found == ([PLACES["leaf"], at("uses_rbx"), at("root")], End.WHOLE)
    found = walk(places, PLACES["saves_below"], Copy(STACK, words), rbx=STACK + 16)
    assert found == ([PLACES["saves_below"], at("uses_rbx")], End.SHORT)


def test_what_is_relative_to_a_lost_register_is_lost_as_well() -> None:
    # rbx is saved below the copy; then r12 = rbx + 16; then CFA = r12.
    programs = [b"\x83\x09", b"\x16\x0c" + block(b"\x73\x10"), b"\x0c\x0c\x00"]
    functions = [(0x4000 + 256 * at, 256, text) for at, text in enumerate(programs)]
    places = Places()
    number = places.add_module(compile_section(section_of_functions(functions)))
    places.add_space(u64(BASE), u64(BASE + 0x10000), u64(BASE), np.array([number]))
    first, second, third = (BASE + begin + 9 for begin, _, _ in functions)
    words = [second, third, 0, 0, 0, 0, 0, 0]
    frames, end = walk(places, first, Copy(STACK, words), rbx=STACK)
    assert (frames, end) == ([first, second, third], End.SHORT)


def test_frames_rise_also_where_the_stack_pointer_is_lost() -> None:
    # CFA = rbp + 16, and nothing is known of the caller's rsp; rbp is the same.
    section = section_of_functions([(0x4000, 256, b"\x0c\x06\x10\x07\x07")])
    places = Places()
    number = places.add_module(compile_section(section))
    places.add_space(u64(BASE), u64(BASE + 0x10000), u64(BASE), np.array([number]))
    pc = BASE + 0x4009
    found = walk(places, pc, Copy(STACK, [0, pc, 0, 0]), rbp=STACK)
    assert found == ([pc, pc], End.STUCK)


# --- signals


def test_what_a_signal_interrupted_is_no_return_address(places: Places) -> None:
    words = [RETURNS, STACK + 64, 9, PLACES["frame16"], 0, 0, 0, 0, 5, at("root")]
    frames, end = walk(places, PLACES["leaf"], Copy(STACK, words))
    assert (frames, end) == ([PLACES["leaf"], RETURNS, PLACES["frame16"], at("root")], End.WHOLE)


def test_a_signal_came_from_another_stack(places: Places) -> None:
    ours = Copy(STACK, [at("frame16"), 0, RETURNS, OTHER_STACK, 9, PLACES["leaf"] + 1])
    other = Copy(OTHER_STACK, [at("frame16"), 1, at("root")])
    expected = [PLACES["leaf"], at("frame16"), RETURNS, PLACES["leaf"] + 1, at("frame16")]
    found = walk(places, PLACES["leaf"], ours, other)
    assert found == ([*expected, at("root")], End.WHOLE)
    frames, end = walk(places, PLACES["leaf"], ours)
    assert (frames, end) == (expected[:4], End.ELSEWHERE)


def test_signals_do_not_go_around_in_circles(places: Places) -> None:
    words = [STACK, 9, RETURNS]
    frames, end = walk(places, RETURNS, Copy(STACK, words))
    assert end == End.STUCK
    assert len(frames) < 10


# --- code without rules


def test_frame_pointers_of_code_without_rules(places: Places) -> None:
    words = [0, STACK, JIT + 80, 0, 0, JIT + 90]
    frames, end = walk(places, JIT + 7, Copy(STACK, words), rbp=STACK + 8)
    assert (frames, end) == ([JIT + 7, JIT + 80], End.STUCK)
    words = [0, STACK + 32, JIT + 80, 0, 0, JIT + 90]
    frames, end = walk(places, JIT + 7, Copy(STACK, words), rbp=STACK + 8)
    assert (frames, end) == ([JIT + 7, JIT + 80, JIT + 90], End.WHOLE)


def test_frame_pointers_where_a_table_has_no_rule() -> None:
    places = Places()
    number = places.add_module(tables()[0], otherwise=Otherwise.FRAME_POINTERS)
    places.add_space(u64(BASE), u64(BASE + 0x10000), u64(BASE), np.array([number]))
    words = [NOWHERE + 9, 0, STACK + 32, at("frame16"), 0, at("root")]
    frames, end = walk(places, PLACES["leaf"], Copy(STACK, words), rbp=STACK + 16)
    assert frames == [PLACES["leaf"], NOWHERE + 9, at("frame16"), at("root")]
    assert end == End.WHOLE


def test_a_trampoline(places: Places) -> None:
    words = [TRAMPOLINE + 9, 0, at("root")]
    found = walk(places, PLACES["leaf"], Copy(STACK, words))
    assert found == ([PLACES["leaf"], TRAMPOLINE + 9, at("root")], End.WHOLE)


# --- many at once


def batch(seed: int, count: int) -> Stacks:
    """Stacks of words that are often addresses of code or of a stack."""
    random = np.random.default_rng(seed)
    interesting = u64(*PLACES.values(), *map(at, PLACES), RETURNS, JIT + 9, FOREIGN, NOWHERE, 0, 1)
    near = u64(*(STACK + 8 * number for number in range(-4, 64)), OTHER_STACK, OTHER_STACK + 16)
    words = random.choice(np.append(interesting, near), size=(count, 2, 40))
    noise = random.random(words.shape) < 0.1
    words[noise] = random.integers(0, 1 << 63, size=int(noise.sum()), dtype=np.uint64) * 2
    registers = random.choice(np.append(near, near), size=(count, 17))
    registers[:, RETURN] = random.choice(interesting, size=count)
    lengths = random.integers(0, 321, size=(count, 2))
    return Stacks(
        registers,
        words.reshape(-1).view(np.uint8),
        np.arange(2 * count).reshape(-1, 2) * 320,
        lengths,
        np.tile(u64(STACK, OTHER_STACK), (count, 1)),
        np.zeros(count, dtype=np.int64),
    )


def one_of(stacks: Stacks, number: int) -> Stacks:
    which = slice(number, number + 1)
    return Stacks(
        stacks.registers[which],
        stacks.memory,
        stacks.starts[which],
        stacks.lengths[which],
        stacks.bases[which],
        stacks.spaces[which],
    )


def check(walks: Walks, count: int) -> None:
    assert walks.counts.shape == walks.ends.shape == walks.stopped.shape == (count,)
    assert ((walks.counts >= 1) & (walks.counts <= MAX_FRAMES)).all()
    assert walks.addresses.size == walks.exact.size == walks.counts.sum()
    assert (walks.ends != End.GOES_ON).all()


def test_a_batch_is_what_its_stacks_are_one_by_one(places: Places) -> None:
    stacks = batch(5, 300)
    together = unwind(stacks, places)
    check(together, 300)
    firsts = np.cumsum(together.counts) - together.counts
    assert len(set(together.ends.tolist())) >= 6
    for number in range(300):
        alone = unwind(one_of(stacks, number), places)
        first, count = int(firsts[number]), int(together.counts[number])
        assert alone.addresses.tolist() == together.addresses[first : first + count].tolist()
        assert alone.ends[0] == together.ends[number]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 32), st.binary(max_size=2000), st.integers(0, 64))
def test_any_memory_is_walked(seed: int, data: bytes, count: int) -> None:
    places = Places()
    real = places.add_module(compile_section(section_of(module("libgcc_s.so.1"), most=3000)))
    # Code wherever the registers may point.
    places.add_space(u64(0), u64(1 << 47), u64(0), np.array([real]))
    random = np.random.default_rng(seed)
    memory = np.frombuffer(data, dtype=np.uint8)
    starts = random.integers(0, memory.size + 1, size=count)
    registers = random.integers(0, 1 << 64, size=(count, 17), dtype=np.uint64)
    registers[:, RETURN] %= np.uint64(0x20000)
    stacks = Stacks(
        registers,
        memory,
        starts,
        random.integers(0, memory.size + 1 - starts),
        registers[:, RSP] - random.integers(0, 64, size=count, dtype=np.uint64),
        np.zeros(count, dtype=np.int64),
    )
    check(unwind(stacks, places), count)


def test_rules_that_say_anything_are_walked() -> None:
    random = np.random.default_rng(1)
    for _ in range(20):
        table = compile_section(section_of(module("libgcc_s.so.1"), most=1500))
        rules = table.rules.copy()
        for name, limit in (("cfa_kind", 5), ("cfa_base", 16), ("kind", 5), ("base", 17)):
            rules[name] = random.integers(0, limit, size=rules[name].shape)
        rules["offset"] = random.integers(-(1 << 31), 1 << 31, size=rules["offset"].shape)
        places = Places()
        number = places.add_module(UnwindTable(BASE, table.pcs, table.rule, rules))
        places.add_space(u64(BASE), u64(BASE + 0x20000), u64(0), np.array([number]))
        check(unwind(batch(3, 64), places), 64)


def test_an_empty_batch(places: Places) -> None:
    none = np.zeros(0, dtype=np.int64)
    nothing = np.zeros(0, dtype=np.uint8)
    stacks = Stacks(np.zeros((0, 17), np.uint64), nothing, none, none, u64(), none)
    check(unwind(stacks, places), 0)


def test_bounds_that_do_not_fit_are_refused(places: Places) -> None:
    good = batch(1, 2)
    for field, value in (
        ("registers", good.registers[:, :16]),
        ("starts", good.starts + 400),
        ("starts", good.starts - 400),
        ("lengths", good.lengths - 1000),
        ("lengths", good.lengths + (1 << 62)),
        ("spaces", good.spaces + 1),
        ("spaces", good.spaces[:1]),
        ("bases", good.bases[:, :1]),
    ):
        arrays = {name: getattr(good, name) for name in Stacks.__slots__}
        with pytest.raises(ValueError, match=r"of|there"):
            unwind(Stacks(**{**arrays, field: value}), places)


def test_processes_do_not_mix() -> None:
    places = Places()
    one, other = (places.add_module(table) for table in tables())
    spaces = [
        places.add_space(u64(BASE), u64(BASE + 0x10000), u64(BASE), np.array([number]))
        for number in (one, other)
    ]
    address = u64(PLACES["leaf"], PLACES["leaf"])
    first, second = places.find(address, places.keys(np.array(spaces))).tolist()
    assert first != second
    assert places.find(address, places.keys(np.array(spaces))).tolist() == [first, second]
    places.drop_space(spaces[0])
    assert places.add_space(u64(BASE), u64(BASE + 9), u64(0), np.array([other])) == spaces[0]
    assert int(places.find(address[:1], places.keys(np.array(spaces[:1])))[0]) != first
    with pytest.raises(ValueError, match="overlap"):
        places.add_space(u64(5, 6), u64(9, 9), u64(0, 0), np.array([one, one]))
    with pytest.raises(ValueError, match="not there"):
        places.add_space(u64(5), u64(9), u64(0), np.array([7]))


def test_what_was_found_stays_found_however_much_there_is() -> None:
    places = Places()
    number = places.add_module(compile_section(section_of(module("libc.so.6"), most=100_000)))
    places.add_space(u64(0), u64(1 << 30), u64(0), np.array([number]))
    addresses = np.arange(0x28000, 0x28000 + 300_000, dtype=np.uint64)
    keys = places.keys(np.zeros(addresses.size, dtype=np.int64))
    expected = places.find(addresses, keys)
    random = np.random.default_rng(4)
    for _ in range(20):
        which = random.integers(0, addresses.size, size=20_000)
        assert (places.find(addresses[which], keys[which]) == expected[which]).all()


def test_a_batch_of_thousand_deep_stacks_takes_little_time(places: Places) -> None:
    depth, count = 30, 1000
    words = np.tile(u64(*[PLACES["leaf"] + 50] * (depth - 2), at("root")), (count, 1))
    registers = np.zeros((count, 17), dtype=np.uint64)
    registers[:, RSP], registers[:, RETURN] = STACK, PLACES["leaf"]
    lengths = np.full(count, words.shape[1] * 8)
    stacks = Stacks(
        registers,
        words.reshape(-1).view(np.uint8),
        np.cumsum(lengths) - lengths,
        lengths,
        np.full(count, STACK, dtype=np.uint64),
        np.zeros(count, dtype=np.int64),
    )
    began = time.process_time()
    walks = unwind(stacks, places)
    # An order of magnitude more than it takes.
    assert time.process_time() - began < 0.1
    assert walks.counts.tolist() == [depth] * count
    assert (walks.ends == End.WHOLE).all()
