"""The compiled table says, row by row, what pyelftools decodes of the same section."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from unwind_modules import (
    cfa_of,
    decoded,
    expected_cfa,
    expected_register,
    module,
    section_of,
)

from latrace.tracer.symbols.elf import BytesSource
from latrace.tracer.unwinding.cfi import compile_section
from latrace.tracer.unwinding.records import Section
from latrace.tracer.unwinding.rules import BAD_RULE, CFA_UNSUPPORTED, COLUMNS, NO_RULE
from latrace.tracer.unwinding.sections import table_of

WORKLOADS = Path(__file__).parents[1] / "workloads"


def compare(section: Section) -> int:
    """Checks every row and every gap; how many rows there were."""
    table = compile_section(section)
    known: set[tuple[int, object]] = set()
    addresses: set[int] = set()
    begins, ends = set(), set()
    count = 0
    for begin, end, signal, rows in decoded(section):
        if not section.low <= begin < section.high or begin == end:
            continue
        begins.add(begin)
        ends.add(end)
        pcs = [row["pc"] for row in rows]
        # The last one to speak about an address is right.
        spoken = [
            row
            for row, following in zip(rows, [*pcs[1:], end], strict=True)
            if row["pc"] < following
        ]
        at = np.array([row["pc"] for row in spoken], dtype=np.uint64)
        last = np.append(at[1:], np.uint64(end)) - np.uint64(1)
        numbers, same = table.lookup(at), table.lookup(last)
        assert (numbers == same).all(), hex(begin)
        addresses.update(at.tolist())
        for row, number in zip(spoken, numbers.tolist(), strict=True):
            count += 1
            said = (number, str({key: row[key] for key in row if key != "pc"}), signal)
            if said in known:
                continue
            known.add(said)
            rule = table.rules[number]
            cfa = expected_cfa(row)
            if cfa[0] == CFA_UNSUPPORTED:
                assert number == BAD_RULE
                continue
            assert number > BAD_RULE, (hex(row["pc"]), row)
            assert cfa_of(rule) == cfa, (hex(row["pc"]), row)
            assert bool(rule["signal"]) == signal
            for column in range(COLUMNS):
                ours = tuple(int(rule[name][column]) for name in ("kind", "base", "offset"))
                assert ours == expected_register(row, column), (hex(row["pc"]), column)
    gaps = np.array(sorted(ends - begins), dtype=np.uint64)
    assert (table.lookup(gaps) == NO_RULE).all()
    mine = {table.base + pc for pc in table.pcs.tolist()}
    assert mine <= addresses | ends
    return count


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("libc.so.6", 100_000),
        ("ld-linux-x86-64.so.2", 1 << 20),
        ("libstdc++.so.6", 80_000),
        ("libcrypto.so.3", 100_000),
        ("libgcc_s.so.1", 1 << 20),
        ("nginx", 60_000),
        ("redis-server", 60_000),
        ("postgres", 60_000),
        ("python3.11", 60_000),
        ("node", 100_000),
        ("/usr/lib/chromium/chromium", 60_000),
    ],
)
def test_table_says_what_pyelftools_decodes(name: str, most: int) -> None:
    assert compare(section_of(module(name), most=most)) > 500


def test_the_vdso_says_what_pyelftools_decodes(tmp_path: Path) -> None:
    maps = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in maps if line.endswith("[vdso]")]
    if not spans:
        pytest.skip("no vDSO in this process")
    start, end = (int(part, 16) for part in spans[0])
    with Path("/proc/self/mem").open("rb") as memory:
        memory.seek(start)
        image = memory.read(end - start)
    (tmp_path / "vdso").write_bytes(image)
    section = section_of(tmp_path / "vdso")
    assert compare(section) > 5
    here = table_of(BytesSource(image))
    assert here is not None
    assert here.to_bytes() == compile_section(section).to_bytes()


def test_debug_frame_of_go_says_what_pyelftools_decodes(tmp_path: Path) -> None:
    if shutil.which("go") is None:
        pytest.skip("needs go")
    (tmp_path / "main.go").write_text("package main\n\nfunc main() { println(1) }\n")
    home = {**os.environ, "GOCACHE": str(tmp_path / "cache"), "CGO_ENABLED": "0"}
    build = ["go", "build", "-o", "program", "main.go"]
    subprocess.run(build, check=True, cwd=tmp_path, env=home)
    assert compare(section_of(tmp_path / "program", ".debug_frame")) > 500


def test_debug_frame_with_lengths_of_64_bits_says_the_same(tmp_path: Path) -> None:
    """pyelftools takes the length for the reference to the CIE then: it is asked about 32 bits."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    options = ["-O2", "-g", "-fno-asynchronous-unwind-tables", "-fno-dwarf2-cfi-asm"]
    source = WORKLOADS / "unwind_frames.c"
    sections = {}
    for bits in (32, 64):
        program = tmp_path / f"program{bits}"
        build = ["gcc", *options, f"-gdwarf{bits}", "-pthread", "-w", "-o", program, source]
        subprocess.run(build, check=True)
        sections[bits] = section_of(program, ".debug_frame")
    assert compare(sections[32]) > 50
    assert sections[64].data[:4] == bytes([255] * 4) != sections[32].data[:4]
    tables = [compile_section(section).to_bytes() for section in sections.values()]
    assert tables[0] == tables[1]
