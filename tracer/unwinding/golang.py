"""Functions of Go's runtime that go over to another stack, which no rule says of them.

Each thread of a Go program has a stack of its own (g0) beside those of the goroutines that it runs;
the scheduler, the collector and handlers of signals run on others than the code they were called
by. Which function begins a stack is what Go's own tracebacks go by: runtime/traceback.go
(`topofstack`), and asm_amd64.s and sys_linux_amd64.s for the rest.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from latrace.tracer.symbols.table import SymbolTable

from .places import Otherwise, Stretch

MARK: Final = b"runtime.morestack"
"""A function that every Go program has, as no other one."""

_FUNCTIONS: Final = {
    # A thread's or a goroutine's first, and what has put the goroutine aside: it may run elsewhere.
    b"runtime.goexit": Otherwise.ROOT,
    b"runtime.mstart": Otherwise.ROOT,
    b"runtime.rt0_go": Otherwise.ROOT,
    b"runtime.mcall": Otherwise.ROOT,
    b"runtime.morestack": Otherwise.ROOT,
    # Its caller is on the goroutine's stack, and goes on when it returns.
    b"runtime.systemstack": Otherwise.ELSEWHERE,
    b"runtime.asmcgocall": Otherwise.ELSEWHERE,
    # They call the vDSO on g0, and keep the frame pointer.
    b"runtime.nanotime1": Otherwise.FRAME_POINTERS,
    b"runtime.walltime": Otherwise.FRAME_POINTERS,
    b"time.now": Otherwise.FRAME_POINTERS,
    # What a handler returns to: it gives back the registers of whoever was interrupted.
    b"runtime.sigreturn": Otherwise.SIGNAL,
    b"runtime.sigreturn__sigaction": Otherwise.SIGNAL,
}
_SUFFIXES: Final = (b"", b".abi0")

ROOTS: Final = frozenset(
    name + suffix
    for name, how in _FUNCTIONS.items()
    if how is Otherwise.ROOT
    for suffix in _SUFFIXES
)
"""The names of those that have no caller."""


def stretches(symbols: SymbolTable) -> list[Stretch]:
    """Where these functions are, and how each is unwound; empty for what is no Go program."""
    if MARK not in symbols.names:
        return []
    found = []
    for name, how in _FUNCTIONS.items():
        for suffix in _SUFFIXES:
            index = _find(symbols, name + suffix)
            if index >= 0:
                # A return address of a handler is the first one of its function, and looked up as
                # the one before.
                start = int(symbols.starts[index]) - (how is Otherwise.SIGNAL)
                found.append(Stretch(max(0, start), int(symbols.ends[index]), how))
    return found


def _find(symbols: SymbolTable, name: bytes) -> int:
    """The index of the function of exactly that name, -1 when there is none."""
    at = symbols.names.find(name)
    while at >= 0:
        index = int(np.searchsorted(symbols.name_ends, at, side="right"))
        if symbols.name(index) == name:
            return index
        at = symbols.names.find(name, at + 1)
    return -1
