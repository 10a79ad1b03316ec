"""Stacks of Go programs: which functions begin one, which ones go over to another."""

from __future__ import annotations

import struct

import numpy as np

from latrace.tracer.symbols import Frame
from latrace.tracer.symbols.table import SymbolTable, build_table
from latrace.tracer.unwinding import golang
from latrace.tracer.unwinding.places import End, Otherwise, Places, Stretch
from latrace.tracer.unwinding.pointers import BY_FRAME_POINTERS, depth_of, join
from latrace.tracer.unwinding.rules import RBP, RETURN, RSP
from latrace.tracer.unwinding.walk import Stacks, unwind
from latrace.tracer.unwinding.walker import ON_ANOTHER_STACK, WHOLE, Walked

# Each is 0x100 long, from 0x1000 on.
NAMES = [
    b"main.main",
    b"runtime.mcall",
    b"runtime.mcall.func1",
    b"runtime.morestack.abi0",
    b"runtime.sigreturn",
    b"runtime.systemstack.abi0",
    b"runtime.systemstack_switch",
    b"time.now.abi0",
]
START = {name.decode(): 0x1000 + 0x100 * at for at, name in enumerate(NAMES)}
STACK, ELSEWHERE = 0xC000_0010_0000, 0xC000_0800_0000


def symbols(names: list[bytes] = NAMES) -> SymbolTable:
    starts = 0x1000 + 0x100 * np.arange(len(names), dtype=np.uint64)
    return build_table(starts, starts + np.uint64(0x100), names)


def test_functions_are_found_by_their_whole_name() -> None:
    assert sorted(golang.stretches(symbols())) == [
        Stretch(START["runtime.mcall"], 0x1200, Otherwise.ROOT),
        Stretch(START["runtime.morestack.abi0"], 0x1400, Otherwise.ROOT),
        Stretch(START["runtime.sigreturn"] - 1, 0x1500, Otherwise.SIGNAL),
        Stretch(START["runtime.systemstack.abi0"], 0x1600, Otherwise.ELSEWHERE),
        Stretch(START["time.now.abi0"], 0x1800, Otherwise.FRAME_POINTERS),
    ]


def test_what_is_no_go_program_has_none() -> None:
    assert golang.stretches(symbols([b"main", b"time.now", b"runtime.mcall"])) == []
    assert golang.stretches(symbols([])) == []


def walk(pc: int, words: list[int], *, rbp: int = 0) -> tuple[list[int], list[bool], End]:
    """A thread of a stripped Go program, whose stack has these words from rsp on."""
    places = Places()
    module = places.add_module(
        None, otherwise=Otherwise.FRAME_POINTERS, stretches=golang.stretches(symbols())
    )
    one = np.array([0x1000], np.uint64)
    space = places.add_space(one, one + np.uint64(0x1000), one * np.uint64(0), np.array([module]))
    registers = np.zeros((1, 17), np.uint64)
    registers[0, [RSP, RBP, RETURN]] = STACK, rbp, pc
    memory = np.frombuffer(struct.pack(f"<{len(words)}Q", *words), np.uint8)
    lengths = np.array([memory.size])
    found = unwind(
        Stacks(
            registers,
            memory,
            np.zeros(1, np.int64),
            lengths,
            np.array([STACK], np.uint64),
            np.array([space]),
        ),
        places,
    )
    return found.addresses.tolist(), found.exact.tolist(), End(found.ends[0])


def test_the_scheduler_has_no_caller() -> None:
    """What lies above on g0's stack is left over from before."""
    mcall, main = START["runtime.mcall"] + 0x40, START["main.main"] + 0x20
    frames, _, end = walk(main, [0, STACK + 16, STACK + 32, mcall, 7, main], rbp=STACK + 16)
    assert (frames, end) == ([main, mcall], End.WHOLE)


def test_a_call_on_the_systems_stack_says_so() -> None:
    systemstack, main = START["runtime.systemstack.abi0"] + 0x40, START["main.main"] + 0x20
    frames, _, end = walk(main, [ELSEWHERE, systemstack, 0, 0], rbp=STACK)
    assert (frames, end) == ([main, systemstack], End.ELSEWHERE)


def test_a_handler_of_a_signal_leads_to_who_was_interrupted() -> None:
    main, sigreturn = START["main.main"] + 0x20, START["runtime.sigreturn"]
    # The handler's return address, then a struct ucontext: rbp, rsp and rip of the main program.
    words = [0, sigreturn] + [0] * 22
    stack = STACK + 8 * len(words)
    words[2 + 120 // 8], words[2 + 160 // 8], words[2 + 168 // 8] = stack, stack, main
    words += [0, START["runtime.morestack.abi0"] + 9]
    frames, exact, end = walk(START["runtime.systemstack_switch"], words, rbp=STACK)
    assert frames == [
        START["runtime.systemstack_switch"],
        sigreturn,
        main,
        START["runtime.morestack.abi0"] + 9,
    ]
    assert (exact, end) == ([True, False, True, False], End.WHOLE)


def walked(*addresses: int, end: str) -> Walked:
    return Walked(np.array(addresses, np.uint64), np.arange(len(addresses)) == 0, end)


def test_frame_pointers_go_on_where_a_walk_left_its_copy() -> None:
    pointers = np.array([1, 3, 4, 8, 9], np.uint64)  # they miss 2, which keeps none
    found = join(walked(1, 2, 3, 4, end=ON_ANOTHER_STACK), pointers)
    assert found.addresses.tolist() == [1, 2, 3, 4, 8, 9]
    assert found.exact.tolist() == [True] + [False] * 5
    assert found.end == BY_FRAME_POINTERS
    # Where they have nothing in common, or the walk ended in another way, these alone are told.
    for other in (walked(5, 6, end=ON_ANOTHER_STACK), walked(1, 2, 3, end=WHOLE), None):
        assert join(other, pointers).addresses.tolist() == pointers.tolist()
    assert join(walked(1, end=ON_ANOTHER_STACK), np.array([], np.uint64)).addresses.size == 0


def test_what_frame_pointers_find_behind_a_root_is_left_over() -> None:
    names = ["runtime.futex", "runtime.mstart1", "runtime.mstart.abi0", "runtime.schedule", None]
    frames = [Frame(name, "service", 0, "user") for name in names]
    assert depth_of(frames) == 3
    assert depth_of(frames[:2]) == 2
    assert depth_of([]) == 0
