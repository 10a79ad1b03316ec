"""Addresses to names: kernel symbols, ELF files, the vDSO and the perf maps of JIT compilers.

`Symbolizer` is the whole interface. What a target wrote (ELF files, mangled names) is parsed in
an unprivileged child process, `worker`, which is never imported from here.
"""

from __future__ import annotations

from latrace.tracer.symbols.frames import Frame, Space
from latrace.tracer.symbols.symbolizer import Symbolizer

__all__ = ["Frame", "Space", "Symbolizer"]
