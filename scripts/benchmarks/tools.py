"""The tracers that are compared: latrace in its modes, and its peers from the distribution."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

LATRACE = str(Path(sys.executable).parent / "latrace")
READY = "Hit Ctrl-C to end"
"""What latrace says when it traces."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A tracer. `argv(pid, comm, folder)` is its command, for a target and a folder to write to."""

    name: str
    argv: Callable[[int, str, Path], list[str]]
    ready_text: str | None = None
    missing: str | None = None
    """Why it cannot be run here."""
    elsewhere: bool = False
    """Whether its target is another process than the load."""


CAPTURE = "capture"


ELSEWHERE = ", another process"


def latrace(*options: str, name: str = "", elsewhere: bool = False) -> Tool:
    """latrace with more options; by its name or, without one, by these."""

    def argv(pid: int, _comm: str, folder: Path) -> list[str]:
        target = ["--pid", str(pid), "-o", str(folder / CAPTURE), "--force"]
        return [LATRACE, "attach", *target, *options]

    name = name or " ".join(["latrace", *options])
    return Tool(name + (ELSEWHERE if elsewhere else ""), argv, READY, elsewhere=elsewhere)


DEFAULT = latrace()
ALL_ROWS = latrace("--min", "0")
NO_STACKS = latrace("--no-stacks")
NEIGHBOUR = latrace(elsewhere=True)
LESS = (
    *(latrace("--without", part) for part in ("culprits", "interrupts", "causes", "sleeps")),
    latrace("--cpu-samples", "0"),
    latrace(
        *("--without", "causes,sleeps,tcp", "--no-stacks", "--cpu-samples", "0"),
        name="latrace, waits alone",
    ),
)
"""What each part costs: latrace without it."""
NO_TCP = latrace("--without", "tcp")
ALL_TCP = Tool(
    "latrace tcp --all",
    lambda _pid, _comm, folder: [LATRACE, "tcp", "--all", "-o", str(folder / CAPTURE), "--force"],
    READY,
)
"""The retransmits of every process, and nothing else."""
FOR_TCP = (DEFAULT, NO_TCP, NEIGHBOUR, ALL_TCP)
OURS = (DEFAULT, ALL_ROWS, NO_STACKS, *LESS, NEIGHBOUR)


def _package(program: str, package: str) -> str | None:
    return None if _find(program) else f"not installed (Debian: {package})"


def _find(program: str) -> str | None:
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def _libbpf(program: str, *, elsewhere: bool = False) -> list[Tool]:
    """One of bcc's libbpf-tools, for all processes and for the target, or for another process."""
    path, missing = _find(program), _package(program, "libbpf-tools")

    def one(pid: int, _comm: str, _folder: Path) -> list[str]:
        return [str(path), "-p", str(pid)]

    return [
        Tool(program, lambda *_: [str(path)], missing=missing),
        Tool(
            f"{program} -p{ELSEWHERE if elsewhere else ''}",
            one,
            missing=missing,
            elsewhere=elsewhere,
        ),
    ]


def typed_peers() -> list[Tool]:
    """Those whose programs tell where they are attached, for everybody and for somebody else."""
    names = ("runqslower", "runqlat", "offcputime")
    return [tool for name in names for tool in _libbpf(name, elsewhere=True)]


def _bcc(program: str) -> Tool:
    """One of bcc's Python tools: they compile against the kernel's headers."""
    path, missing = _find(program), _package(program, "bpfcc-tools")
    headers = (
        Path("/lib/modules") / platform.release() / "build",
        Path("/sys/kernel/kheaders.tar.xz"),
    )
    if missing is None and not any(place.exists() for place in headers):
        missing = "needs kernel headers, of which there are none for this kernel"
    return Tool(f"{program} -p", lambda pid, *_: [str(path), "-p", str(pid)], missing=missing)


# bpftrace's own runqlat.bt; these tracepoints carry no process id, so a filter is one by name.
_BPFTRACE = """
tracepoint:sched:sched_wakeup, tracepoint:sched:sched_wakeup_new %(woken)s {
    @q[args->pid] = nsecs;
}
tracepoint:sched:sched_switch %(switched)s {
    if (args->prev_state == 0) { @q[args->prev_pid] = nsecs; }
    $start = @q[args->next_pid];
    if ($start) { @usecs = hist((nsecs - $start) / 1000); }
    delete(@q[args->next_pid]);
}
END { clear(@q); }
"""


def _bpftrace(comm: str | None) -> list[str]:
    names = {"woken": "", "switched": ""}
    if comm is not None:
        names["woken"] = f'/args->comm == "{comm}"/'
        names["switched"] = f'/args->prev_comm == "{comm}" || args->next_comm == "{comm}"/'
    return [str(_find("bpftrace")), "-e", _BPFTRACE % names]


def peers() -> list[Tool]:
    """Other tracers of run-queue latency, those that are missing with the reason."""
    no_bpftrace, no_perf = _package("bpftrace", "bpftrace"), _package("perf", "linux-perf")
    return [
        *_libbpf("runqslower"),
        *_libbpf("runqlat"),
        *_libbpf("offcputime"),
        _bcc("runqlat-bpfcc"),
        Tool("bpftrace runqlat", lambda *_: _bpftrace(None), missing=no_bpftrace),
        Tool(
            "bpftrace runqlat, by name",
            lambda _pid, comm, _folder: _bpftrace(comm),
            missing=no_bpftrace,
        ),
        Tool(
            "perf sched record",
            lambda _pid, _comm, folder: [
                "perf",
                "sched",
                "record",
                "-o",
                str(folder / "perf.data"),
            ],
            missing=no_perf,
        ),
    ]
