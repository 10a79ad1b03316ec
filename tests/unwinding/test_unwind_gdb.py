"""Stacks unwound from copies are those that gdb finds, frame by frame, in threads stopped anywhere.

gdb runs the program, steps through it and writes down registers, stack and its own frames
(gdb_samples.py), for each build of each program.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from elftools.elf.elffile import ELFFile

from latrace.tracer.symbols.elf import BytesSource, FdSource
from latrace.tracer.unwinding.places import End, Places
from latrace.tracer.unwinding.sections import table_of
from latrace.tracer.unwinding.table import UnwindTable
from latrace.tracer.unwinding.walk import Stacks, Walks, unwind

WORKLOADS = Path(__file__).parents[1] / "workloads"
SCRIPT = Path(__file__).with_name("gdb_samples.py")
FRAMES = WORKLOADS / "unwind_frames.c"
THROW = WORKLOADS / "unwind_throw.cc"
RUST = WORKLOADS / "unwind_frames.rs"
CPU = Path("/proc/cpuinfo").read_text()
BUILDS = {
    "plain": (FRAMES, "-O2 -fomit-frame-pointer -Wl,-z,lazy"),
    "pointers": (FRAMES, "-O2 -fno-omit-frame-pointer -Wl,-z,now"),
    "unoptimised": (FRAMES, "-O0 -no-pie -Wl,-z,lazy"),
    "wide": (FRAMES, "-O3 -mavx2 -fcf-protection=full -Wl,-z,lazy"),
    "static": (FRAMES, "-O2 -static"),
    "static_pie": (FRAMES, "-O2 -static-pie -Wl,-z,now"),
    "elsewhere": (FRAMES, "-O2 -Wl,-z,lazy -Wl,-Ttext-segment=0x5000000"),
    # Its own functions in .debug_frame, those of the libraries it is linked with in .eh_frame.
    "debug_frame": (
        FRAMES,
        "-O2 -static -g -gdwarf64 -fno-asynchronous-unwind-tables -fno-dwarf2-cfi-asm",
    ),
    "throw": (THROW, "-O2 -Wl,-z,lazy"),
    "throw_plain": (THROW, "-O0 -Wl,-z,now"),
}
if shutil.which("rustc") is not None:
    BUILDS["rust"] = RUST, "-O"
    BUILDS["rust_plain"] = RUST, "-C force-unwind-tables=yes"
COMPILERS = {
    ".c": ["gcc", "-pthread", "-w"],
    ".cc": ["g++", "-pthread", "-w"],
    ".rs": ["rustc", "--edition=2021"],
}

needs_tools = pytest.mark.skipif(
    not all(map(shutil.which, ("gcc", "g++", "gdb"))) or os.uname().machine != "x86_64",
    reason="needs gcc, g++ and gdb on x86-64",
)


@dataclass(frozen=True)
class Sampled:
    """What gdb saw of one program, and what came out of its copies."""

    samples: list[Any]
    walks: Walks

    def mine(self) -> Iterator[list[int]]:
        at = 0
        for count in self.walks.counts.tolist():
            yield self.walks.addresses[at : at + count].tolist()
            at += count


def bias_of(path: Path, start: int, offset: int) -> int:
    """What the addresses of that mapping have more than the file's."""
    with path.open("rb") as stream:
        for segment in ELFFile(stream).iter_segments("PT_LOAD"):
            into: int = offset - segment["p_offset"]
            if segment["p_flags"] & 1 and -4096 < into < segment["p_filesz"]:
                return start - int(segment["p_vaddr"]) - into
    raise AssertionError(f"{path} has no code at {offset}")


def table_at(path: Path) -> UnwindTable | None:
    with path.open("rb") as stream:
        return table_of(FdSource(stream.fileno()))


def space_of(folder: Path, places: Places) -> int:
    """The memory map that gdb saw last."""
    rows: list[tuple[int, int, int, int]] = []
    modules: dict[str, int] = {}
    for line in (folder / "maps").read_text().splitlines():
        span, flags, offset, _device, inode, *rest = line.split(maxsplit=5)
        if "x" not in flags:
            continue
        start, end = (int(part, 16) for part in span.split("-"))
        bias, name = 0, rest[0] if rest else ""
        if inode != "0":
            bias = bias_of(Path(name), start, int(offset, 16))
            if name not in modules:
                modules[name] = places.add_module(table_at(Path(name)))
        elif name == "[vdso]":
            source = BytesSource((folder / "vdso").read_bytes())
            bias, modules[name] = start, places.add_module(table_of(source))
        else:
            modules.setdefault(name, places.add_module(None))
        rows.append((start, end, bias, modules[name]))
    rows.sort()
    columns = np.array(rows, dtype=np.uint64).T
    return places.add_space(columns[0], columns[1], columns[2], columns[3].astype(np.int64))


def stacks_of(folder: Path, samples: list[Any], space: int) -> Stacks:
    copies = np.zeros((len(samples), 2, 3), dtype=np.uint64)
    for number, (_registers, parts, _pcs, _why) in enumerate(samples):
        copies[number, : len(parts)] = parts
    return Stacks(
        np.array([sample[0] for sample in samples], dtype=np.uint64),
        np.frombuffer((folder / "memory").read_bytes(), dtype=np.uint8),
        copies[:, :, 1].astype(np.int64),
        copies[:, :, 2].astype(np.int64),
        copies[:, :, 0],
        np.full(len(samples), space, dtype=np.int64),
    )


def sampled(folder: Path, source: Path, options: str) -> Sampled:
    folder.mkdir(exist_ok=True)
    program = folder / "program"
    chosen = [each for each in options.split() if each != "-mavx2" or "avx2" in CPU]
    build = [*COMPILERS[source.suffix], *chosen, "-o", str(program), str(source)]
    subprocess.run(build, check=True)
    # Without a debug server, and with nothing of what the user's gdb does.
    gdb = ["gdb", "-nx", "-batch", "-iex", "set debuginfod enabled off", "-x", str(SCRIPT)]
    subprocess.run(
        [*gdb, str(program)],
        check=True,
        capture_output=True,
        timeout=60,
        env={**os.environ, "SAMPLES": str(folder)},
    )
    samples = [json.loads(line) for line in (folder / "samples").read_text().splitlines()]
    places = Places()
    stacks = stacks_of(folder, samples, space_of(folder, places))
    return Sampled(samples, unwind(stacks, places))


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sampled]:
    folder = tmp_path_factory.mktemp("unwind")
    return {name: sampled(folder / name, *build) for name, build in BUILDS.items()}


@needs_tools
def test_stacks_are_those_that_gdb_finds(everything: dict[str, Sampled]) -> None:
    different: list[str] = []
    total = 0
    for name, program in everything.items():
        for number, (sample, mine) in enumerate(zip(program.samples, program.mine(), strict=True)):
            total += 1
            # gdb has no frame for a caller at zero, nor do we.
            theirs = [pc for pc in sample[2] if pc]
            if mine != theirs:
                frames = f"{[*map(hex, mine)]} is not {[*map(hex, theirs)]}"
                different.append(f"{name} {End(program.walks.ends[number]).name}: {frames}")
    assert total > 3000
    assert len(different) < total / 100, "\n".join(different[:10])


@needs_tools
def test_nearly_all_walks_reach_the_root(everything: dict[str, Sampled]) -> None:
    ends = Counter(end for program in everything.values() for end in program.walks.ends.tolist())
    assert ends[End.WHOLE] > 0.97 * sum(ends.values()), ends


@needs_tools
def test_nothing_is_unknown_in_a_static_program(everything: dict[str, Sampled]) -> None:
    """Its stubs, which no call frame information is about, are walked as well."""
    for name in ("static", "static_pie", "debug_frame"):
        ends = everything[name].walks.ends
        assert not (ends == End.NO_RULE).any(), name
