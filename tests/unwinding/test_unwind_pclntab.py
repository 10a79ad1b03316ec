"""Unwinding tables of Go programs: the same with and without what stripping takes."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from latrace.tracer.symbols.elf import BytesSource
from latrace.tracer.unwinding.pclntab import compile_pclntab
from latrace.tracer.unwinding.records import CfiError
from latrace.tracer.unwinding.rules import CFA_OFFSET, MEMORY, NO_RULE, RETURN, RSP
from latrace.tracer.unwinding.sections import Kind, Place, compile_places, locate, read_places
from latrace.tracer.unwinding.table import UnwindTable

TEXT = 0x401000
PROGRAM = """
package main

func fibonacci(n int) int {
	if n < 2 {
		return n
	}
	return fibonacci(n-1) + fibonacci(n-2)
}

func main() { println(fibonacci(20)) }
"""


def number(value: int) -> bytes:
    """A varint of Go's tables: seven bits a byte, the lowest first."""
    text = b""
    while value >= 0x80:
        text += bytes([value & 0x7F | 0x80])
        value >>= 7
    return text + bytes([value])


def moves(*pairs: tuple[int, int]) -> bytes:
    """So many bytes of code, with the stack pointer so far from where it was."""
    text, before = b"", -1
    for size, moved in pairs:
        change, before = moved - before, moved
        text += number(2 * change if change >= 0 else -2 * change - 1) + number(size)
    return text + b"\0"


def section(functions: list[tuple[int, bytes]], *, old: bool = False, text: int = TEXT) -> bytes:
    """A table of functions: their sizes, one behind the other, and their moves (none: b"")."""
    fields, word = (7, "Q") if old else (8, "I")
    table, records, pool = b"", b"", b"\0"
    size = 8 + fields * 8
    cells = 2 * len(functions) + 1
    at = TEXT if old else 0
    for length, text_of_moves in functions:
        place = cells * struct.calcsize(word) + len(records)
        table += struct.pack(f"<2{word}", at, place)
        where = len(pool) if text_of_moves else 0
        records += struct.pack(f"<{word}3I I", at, 0, 0, 0, where)
        pool += text_of_moves
        at += length
    table += struct.pack(f"<{word}", at)
    pool_at, table_at = size, size + len(pool)
    count = len(functions)
    magic = 0xFFFF_FFFA if old else 0xFFFF_FFF1
    head = struct.pack("<IBBBB", magic, 0, 0, 1, 8)
    names = [count, 1, 0, 0, 0, pool_at, table_at]
    if not old:
        names.insert(2, text)
    return head + struct.pack(f"<{fields}Q", *names) + pool + table + records


def distances(table: UnwindTable, *addresses: int) -> list[int | None]:
    """How far above the stack pointer a frame ends at these addresses; None: nothing is said."""
    rules = table.rules[table.lookup(np.array(addresses, np.uint64))]
    assert ((rules["kind"][:, RETURN] == MEMORY) == (rules["cfa_kind"] == CFA_OFFSET)).all()
    assert set(rules["offset"][rules["cfa_kind"] == CFA_OFFSET][:, RETURN].tolist()) <= {-8}
    return [
        int(rule["cfa_offset"])
        if rule["cfa_kind"] == CFA_OFFSET and rule["cfa_base"] == RSP
        else None
        for rule in rules
    ]


@pytest.mark.parametrize("old", [True, False], ids=["Go 1.16", "Go 1.18"])
def test_frames_are_as_far_as_the_stack_pointer_was_moved(old: bool) -> None:
    grows = moves((4, 0), (20, 32), (8, 0))
    functions = [(32, grows), (16, b""), (32, grows), (16, moves((16, 1000)))]
    data = section(functions, old=old)
    table = compile_pclntab(data, text=0, low=TEXT, high=TEXT + 96)
    at = TEXT
    assert distances(table, at - 1, at, at + 3, at + 4, at + 23, at + 24, at + 31) == (
        [None, 8, 8, 40, 40, 8, 8]
    )
    assert distances(table, at + 32, at + 47, at + 48, at + 52) == [None, None, 8, 40]
    assert distances(table, at + 80, at + 95, at + 96) == [1008, 1008, None]


def test_where_the_code_begins_may_be_left_to_the_loader() -> None:
    data = section([(32, moves((32, 8)))], text=0)
    table = compile_pclntab(data, text=0x7000, low=0, high=1 << 40)
    assert distances(table, 0x6FFF, 0x7000, 0x701F, 0x7020) == [None, 16, 16, None]


def test_what_is_damaged_costs_its_function_alone() -> None:
    sound = moves((32, 8))
    for damaged in (b"\x80" * 9, number(5), moves((4, 0), (28, -8)), moves((4, 1 << 31))):
        data = section([(32, sound), (32, damaged), (32, sound)])
        # Behind the moves there is the rest of the table: it is read as if it were more of them.
        table = compile_pclntab(data, text=0, low=0, high=1 << 40)
        assert distances(table, TEXT, TEXT + 64) == [16, 16], damaged


def test_what_lies_outside_of_the_code_is_left_out() -> None:
    data = section([(32, moves((32, 8))), (32, moves((32, 24)))])
    table = compile_pclntab(data, text=0, low=TEXT + 32, high=TEXT + 64)
    assert distances(table, TEXT, TEXT + 32, TEXT + 63, TEXT + 64) == [None, 32, 32, None]
    assert not len(compile_pclntab(data, text=0, low=0, high=1))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(200),
        section([]),
        section([(32, b"")])[:70],
        section([(32, b"")]).replace(b"\x08", b"\x04", 1),
        struct.pack("<IBBBB8Q", 0xFFFF_FFF1, 0, 0, 1, 8, 1 << 40, 0, 0, 0, 0, 0, 72, 72),
    ],
)
def test_what_is_no_table_is_refused(data: bytes) -> None:
    with pytest.raises(CfiError):
        compile_pclntab(data, text=0, low=0, high=1 << 48)


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=400), st.integers(0, 300), st.booleans())
@example(b"\xff" * 40, 72, False)
def test_any_bytes_make_a_table_or_none(noise: bytes, at: int, old: bool) -> None:
    whole = section([(32, moves((4, 0), (28, 64)))] * 5, old=old)
    data = whole[:at] + noise + whole[at + len(noise) :]
    try:
        table = compile_pclntab(data, text=TEXT, low=0, high=1 << 64)
    except CfiError:
        return
    assert UnwindTable.from_bytes(table.to_bytes()).pcs.tolist() == table.pcs.tolist()


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same program, as it is built, and stripped."""
    if shutil.which("go") is None:
        pytest.skip("needs the distribution's golang-go")
    folder = tmp_path_factory.mktemp("go")
    (folder / "main.go").write_text(PROGRAM)
    env = os.environ | {"GOPROXY": "off", "GOCACHE": str(folder / "cache"), "CGO_ENABLED": "0"}
    for name, flags in (("whole", ""), ("stripped", "-s -w")):
        command = ["go", "build", "-ldflags", flags, "-o", folder / name, "main.go"]
        subprocess.run(command, cwd=folder, env=env, check=True)
    return folder / "whole", folder / "stripped"


def table_of(path: Path) -> tuple[list[Place], UnwindTable]:
    source = BytesSource(path.read_bytes())
    places = locate(source)
    return places, compile_places(places, read_places(source, places))


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="walks are of x86-64")
def test_a_stripped_program_says_the_same(programs: tuple[Path, Path]) -> None:
    (whole, by_frames), (stripped, by_moves) = map(table_of, programs)
    assert [place.kind for place in whole] == [Kind.DEBUG_FRAME]
    assert [place.kind for place in stripped] == [Kind.PCLNTAB]
    first = max(by_frames.base, by_moves.base)
    last = min(first + (1 << 19), by_moves.base + int(by_moves.pcs[-1]))
    pcs = np.arange(first, last, dtype=np.uint64)
    known, ours = (table.lookup(pcs) for table in (by_frames, by_moves))
    said = (known != NO_RULE) & (ours != NO_RULE)
    assert said.sum() > 0.9 * (known != NO_RULE).sum() > 100_000
    assert len(by_moves.rules) > 20
    same = by_frames.rules["cfa_offset"][known[said]] == by_moves.rules["cfa_offset"][ours[said]]
    assert same.all()
    # Only a few functions of assembly say nothing.
    assert (ours[known != NO_RULE] == NO_RULE).mean() < 0.001
