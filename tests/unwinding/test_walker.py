"""From copies of stacks to addresses: files are parsed when a stack leads there, once."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from unwind_modules import module, section_of

from latrace.tracer.stacks import Copy, RawStack
from latrace.tracer.symbols.client import Worker
from latrace.tracer.symbols.files import MappedFile
from latrace.tracer.symbols.table import Image, empty_table
from latrace.tracer.target_stack import copy_stack
from latrace.tracer.unwinding import places as places_module
from latrace.tracer.unwinding import walker as walker_module
from latrace.tracer.unwinding.cfi import compile_section
from latrace.tracer.unwinding.places import End, Places
from latrace.tracer.unwinding.walker import WHOLE, Walker

PTRACE_GETREGS, PTRACE_DETACH, PTRACE_SEIZE, PTRACE_INTERRUPT = 12, 17, 0x4206, 0x4207
WORDS_OF_USER = 27  # struct user_regs_struct; its first 21 are struct pt_regs

pytestmark = pytest.mark.skipif(os.uname().machine != "x86_64", reason="walks are of x86-64")


def stopped(pid: int) -> RawStack:
    """The stack of a process of ours, as a probe would send it."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    assert libc.ptrace(PTRACE_SEIZE, pid, None, None) == 0
    assert libc.ptrace(PTRACE_INTERRUPT, pid, None, None) == 0
    os.waitpid(pid, 0)
    regs = np.zeros(WORDS_OF_USER, np.uint64)
    assert libc.ptrace(PTRACE_GETREGS, pid, None, regs.ctypes.data) == 0
    copy = copy_stack(pid, regs[:21])
    assert libc.ptrace(PTRACE_DETACH, pid, None, None) == 0
    assert copy is not None
    nothing = np.zeros(0, np.uint64)
    return RawStack(1, pid, nothing, nothing, has_user=True, copy=copy)


def test_a_walk_is_whole_and_is_so_again_when_all_was_let_go() -> None:
    command = [sys.executable, "-Sc", "print(flush=True); import time; time.sleep(1000)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout
            process.stdout.readline()
            stack = stopped(process.pid)
            walker = Walker()
            parsed = []
            for _ in range(3):
                (walked,) = walker.walk([stack])
                assert walked is not None and walked.end == WHOLE, walked
                assert len(walked.addresses) > 5 and walked.exact[0]
                parsed.append(walker.symbolizer.stats["files"]["parsed"])
                walker.let_go()
                walker.symbolizer.let_go()
            assert parsed == [parsed[0]] * 3 and 1 <= parsed[0] <= 3
            assert walker.stats["ends"] == {WHOLE: 3}
            modules = walker.stats["modules"]
            assert len(modules) > 0 and set(modules.values()) == {"call frame information"}
        finally:
            process.kill()
            walker.symbolizer.close()


def test_of_a_process_that_is_not_there_nothing_is_known() -> None:
    pid = os.fork()
    if not pid:
        signal.pause()
    stack = stopped(pid)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert not Path(f"/proc/{pid}").exists()
    walker = Walker()
    assert walker.walk([stack]) == [None]
    assert walker.walk([]) == []
    walker.symbolizer.close()


class Telling(Worker):
    """A worker that says the same of every file."""

    def __init__(self, image: Image) -> None:
        super().__init__(command=("/nonexistent",))
        self._image = image

    def elf(self, _fd: int) -> Image | int:
        return self._image

    def section(self, _fd: int) -> tuple[bytes, bytes] | int:
        return b"", b""


@pytest.mark.parametrize("vaddr", [0, 1 << 63, (1 << 64) - 1])
def test_a_file_that_says_it_is_loaded_anywhere(vaddr: int) -> None:
    here = Path("/proc/self/maps").read_text().partition(" r-xp ")
    pc = int(here[0].splitlines()[-1].partition("-")[0], 16)
    offset = int(here[2].split()[0], 16)
    segments = np.array([[0, 1 << 62, (vaddr - offset) % (1 << 64), 5]], np.uint64)
    image = Image(segments, empty_table(), True, b"", b"", 0)
    walker = Walker(worker=Telling(image))
    regs = np.zeros(21, np.uint64)
    regs[16], regs[17], regs[19] = pc, 0x33, 0x1000
    nothing = np.zeros(0, np.uint64)
    copy = Copy(regs, 0x1000, np.zeros(64, np.uint8))
    stack = RawStack(1, os.getpid(), nothing, nothing, has_user=True, copy=copy)
    try:
        (walked,) = walker.walk([stack])
        assert walked is not None and walked.addresses.tolist() == [pc]
        frames = walker.symbolizer.user(
            os.getpid(),
            np.array([pc, pc + 1], np.uint64),
            return_addresses=np.array([False, True]),
        )
        # Written as 64 bits; the second is behind the first one's address.
        assert [frame.offset for frame in frames] == [vaddr, (vaddr + 1) % (1 << 64)]
    finally:
        walker.symbolizer.close()


def test_tables_have_a_limit_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    table = compile_section(section_of(module("libgcc_s.so.1"), most=3000))
    monkeypatch.setattr(walker_module, "TABLES_LIMIT", 2 * table.nbytes)
    walker = Walker()
    files = [MappedFile(f"file{number}") for number in range(3)]
    for file in files:
        walker._add(file, table)
    found = walker.stats["modules"]
    assert [found[file.module] for file in files] == [
        "call frame information",
        "call frame information",
        "memory for unwind tables used up",
    ]
    # What is forgotten makes room.
    del files[:2], file
    walker.let_go()
    more = [MappedFile("more0"), MappedFile("more1"), MappedFile("more2")]
    for file in more:
        walker._add(file, table)
    found = walker.stats["modules"]
    assert found["more1"] == "call frame information" != found["more2"]


def test_rules_have_a_limit_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    table = compile_section(section_of(module("libgcc_s.so.1"), most=6000))
    address = np.array([table.base + int(table.pcs[at]) for at in range(len(table))], np.uint64)
    monkeypatch.setattr(places_module, "MAX_RULES_IN_ALL", 16)
    places = Places()
    number = places.add_module(table)
    space = places.add_space(
        address[:1] - np.uint64(1), address[-1:], np.zeros(1, np.uint64), np.array([number])
    )
    keys = places.keys(np.full(address.size, space))
    ends = places.steps.end[places.find(address, keys)]
    assert len(places.steps.end) == 16
    assert {End.GOES_ON, End.UNSUPPORTED} <= {End(end) for end in ends.tolist()}
