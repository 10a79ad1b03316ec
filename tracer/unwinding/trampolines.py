"""Trampolines of CPython 3.12 and newer, as `python3 -X perf` makes one for each function.

They lie one after the other in memory of no file, and keep no frame pointer. What they are made of
tells them from what other compilers leave there (Objects/asm_trampoline.S of CPython).
"""

from __future__ import annotations

from typing import Final

import numpy as np

from latrace.tracer.target_memory import PIECES_LIMIT, read_pieces

from .places import U64, Bool

_CODE: Final = bytes.fromhex("4883ec08 ffd1 4883c408 c3")
"""sub $8,%rsp; call *%rcx; add $8,%rsp; ret"""
_ENDBR64: Final = bytes.fromhex("f30f1efa")
_BYTES: Final = len(_ENDBR64) + len(_CODE)


def are_trampolines(tgid: int, starts: U64) -> Bool:
    """Which ranges of a process's memory, by where each starts, hold trampolines. (n,) to (n,).

    False where the memory cannot be read, and for ranges beyond the first `PIECES_LIMIT`.
    """
    data = read_pieces(tgid, [(start, _BYTES) for start in starts[:PIECES_LIMIT].tolist()])
    found = np.zeros(starts.shape, np.bool_)
    for at in range(len(data) // _BYTES):
        code = data[at * _BYTES : (at + 1) * _BYTES]
        found[at] = code.removeprefix(_ENDBR64).startswith(_CODE)
    return found
