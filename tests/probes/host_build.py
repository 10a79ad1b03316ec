"""Build the probes' pure headers for the host, so that Python can call what the kernel runs."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import latrace.probes

PROBES = Path(latrace.probes.__path__[0])

INCLUDES = (f"-I{PROBES}", f"-I{PROBES / 'include'}")

SOURCE = """
#include "latrace.h"
#include "wait.h"
#include "sample.h"

u32 slot(u64 v) { return hist_slot(v); }
u64 weight(u64 *acc, u64 ns, u64 period, u64 slow, int may)
{
	return sample_weight(acc, ns, period, slow, may);
}
unsigned long state_size(void) { return sizeof(struct wait_state); }
int waking(struct wait_state *s, u64 now) { return wait_waking(s, now); }
int queued(struct wait_state *s, u64 now) { return wait_queued(s, now); }
void leave(struct wait_state *s, u64 now, int runnable) { wait_leave(s, now, runnable); }
u64 enter(struct wait_state *s, u64 now, int *started) { return wait_enter(s, now, started); }
u64 blocked(struct wait_state *s) { return s->blocked_ns; }
u64 wakeup(struct wait_state *s) { return s->queued_ns; }
int kind(struct wait_state *s) { return s->kind; }
"""


def compile_c(source: str, output: Path, *flags: str) -> Path:
    """Compile C with the probes' own headers in front of the system's."""
    subprocess.run(
        ["cc", "-x", "c", "-", "-o", output, "-O2", "-Wall", *flags, *INCLUDES],
        input=source.encode(),
        check=True,
    )
    return output


def library(directory: Path) -> ctypes.CDLL:
    """The probes' pure functions as a shared library."""
    path = compile_c(SOURCE, directory / "probes.so", "-shared", "-fPIC")
    loaded = ctypes.CDLL(str(path))
    u64, pointer = ctypes.c_uint64, ctypes.c_void_p
    loaded.slot.argtypes, loaded.slot.restype = [u64], ctypes.c_uint32
    loaded.weight.argtypes = [ctypes.POINTER(u64), u64, u64, u64, ctypes.c_int]
    loaded.weight.restype = u64
    loaded.state_size.restype = ctypes.c_ulong
    for name in ("waking", "queued"):
        getattr(loaded, name).argtypes = [pointer, u64]
    loaded.leave.argtypes = [pointer, u64, ctypes.c_int]
    loaded.enter.argtypes = [pointer, u64, ctypes.POINTER(ctypes.c_int)]
    loaded.enter.restype = u64
    for name in ("blocked", "wakeup"):
        getattr(loaded, name).argtypes, getattr(loaded, name).restype = [pointer], u64
    loaded.kind.argtypes = [pointer]
    return loaded
