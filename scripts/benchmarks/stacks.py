"""What a stack costs: latrace's, with and without a copy of the user stack, and those of others.

All look at the same programs under the same loads, one after the other. latrace takes the stacks
of waits and of its clock's samples; perf copies the user stack at each switch, or by the same
clock, and unwinds it afterwards; py-spy stops the program and unwinds it there.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

from latrace.tracer import bpf

from . import served
from .children import ENVIRONMENT, tool
from .context import Context
from .errors import BenchError
from .estimate import estimate
from .kernel import attached_programs, clock_program
from .served import Serve, Target
from .tables import paragraph, table
from .tools import CAPTURE, LATRACE, READY

SAMPLES_HZ = 199
_SECONDS, _QUICK_SECONDS = 8.0, 1.0
_ROUNDS = 3
_DUMPS, _QUICK_DUMPS = 5, 1
_POLL_S = 0.02
_PROGRAMS: dict[str, Serve] = {
    "redis-server": served.redis,
    "PostgreSQL": served.postgresql,
    "python3": served.python3,
}
_QUICK = ("redis-server",)

WITH, WITHOUT, _FLOOR = "latrace", "latrace, no copy", "latrace, no stacks"
_OURS = {
    WITH: ["--cpu-samples", str(SAMPLES_HZ)],
    WITHOUT: ["--cpu-samples", str(SAMPLES_HZ), "--no-user-stack-copy"],
}
# --no-stacks would leave out the program that takes them as well.
_NO_STACKS = ["--cpu-samples", "0", "--stack-budget", "1"]
_PERF = {
    "perf, sched_switch": ("sched:sched_switch", []),
    "perf, cpu-clock": ("cpu-clock", ["-F", str(SAMPLES_HZ)]),
}
_DUMPERS = {"py-spy --native": ["--native"], "py-spy --nonblocking": ["--nonblocking"]}

_ASLEEP = "sched_exit_tp"
"""Where the stacks of waits are taken."""
_WHERE = {"asleep": "asleep", "cpu": "on the CPU"}

Figures = dict[str, float]


def run(context: Context) -> dict[str, Any]:
    """All tools beside each program in turn, and that in rounds."""
    names = _QUICK if context.quick else tuple(_PROGRAMS)
    found = context.at_most(_ROUNDS).interleave(
        {name: partial(_look_at, context, name, _PROGRAMS[name]) for name in names}
    )
    if not found:
        raise BenchError("none of the programs could be looked at")
    return {
        "seconds": _seconds(context),
        "samples_hz": SAMPLES_HZ,
        "programs": {name: _estimates(rounds) for name, rounds in found.items()},
    }


def _seconds(context: Context) -> float:
    return _QUICK_SECONDS if context.quick else _SECONDS


def _estimates(rounds: Sequence[Mapping[str, Figures]]) -> dict[str, Any]:
    """By tool and figure, of the rounds that have it."""
    return {
        name: {
            key: estimate([one[name][key] for one in rounds if key in one.get(name, {})]).as_dict()
            for key in figures
        }
        for name, figures in rounds[0].items()
    }


def _look_at(context: Context, name: str, serve: Serve) -> dict[str, Figures]:
    """The figures of each tool, beside one program."""
    with tempfile.TemporaryDirectory(dir=context.folder) as place:
        folder = Path(place)
        looks: dict[str, Callable[[Target], Figures]] = {
            _FLOOR: partial(_floor, context, folder),
            **{one: partial(_trace, context, folder, options) for one, options in _OURS.items()},
        }
        for tool_name, (event, options) in _PERF.items():
            looks[tool_name] = partial(_perf, context, folder, event, options)
        if name == "python3" and not context.quick:
            for tool_name, options in _DUMPERS.items():
                looks[tool_name] = partial(_dump, context, options)
        found: dict[str, Figures] = {}
        with serve(folder) as target:
            for tool_name, look in looks.items():
                try:
                    found[tool_name] = look(target)
                except BenchError as error:
                    if tool_name == _FLOOR or tool_name in _OURS:
                        raise
                    context.skip(f"{tool_name}, {name}", str(error))
    floor = found.pop(_FLOOR)
    for each in _OURS:
        found[each] |= _per_stack(found[each], floor)
    return found


# --- latrace -----------------------------------------------------------------------------------


def _run_latrace(
    context: Context, folder: Path, options: Sequence[str]
) -> tuple[Figures, dict[str, Any]]:
    """One trace: what its programs that take stacks ran, with its memory; and the manifest."""
    argv = [LATRACE, "attach", "-o", CAPTURE, "--force", *options]
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, bpf.enable_statistics())
        with tool(argv, ready_text=READY, folder=folder) as running:
            programs = attached_programs(running.process.pid)
            clock = clock_program(running.process.pid)
            for program in (*programs.values(), *([] if clock is None else [clock])):
                stack.callback(os.close, program)
            if _ASLEEP not in programs:
                raise BenchError("this kernel lacks what user stacks are taken by")
            time.sleep(_seconds(context))
            memory = _memory(running.process.pid)
        asleep = bpf.program_statistics(programs[_ASLEEP])
        on_cpu = None if clock is None else bpf.program_statistics(clock)
    manifest = json.loads((folder / CAPTURE / "manifest.json").read_text())
    return {
        "asleep_ns": asleep.run_ns,
        "asleep_runs": asleep.runs,
        "cpu_ns": 0 if on_cpu is None else on_cpu.run_ns,
        "cpu_runs": 0 if on_cpu is None else on_cpu.runs,
        "memory": memory,
        "used_s": manifest["overhead"]["self_cpu_s"],
    }, manifest


def _memory(pid: int) -> int:
    """Resident bytes of a process and its children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    kib = 0
    for each in (pid, *map(int, children)):
        with contextlib.suppress(OSError):  # it ended
            found = re.search(r"^VmRSS:\s*(\d+)", Path(f"/proc/{each}/status").read_text(), re.M)
            kib += int(found[1]) if found else 0
    return kib << 10


def _trace(context: Context, folder: Path, options: Sequence[str], target: Target) -> Figures:
    """The figures of a trace of the program."""
    from latrace.analysis.capture import open_capture  # noqa: PLC0415 - not while others measure

    figures, manifest = _run_latrace(context, folder, [*target.options(), *options])
    capture = open_capture(folder / CAPTURE)
    taken = {
        name: sum(
            number >= 0 for number in capture.table(table_, columns=["stack"])["stack"].to_pylist()
        )
        for name, table_ in (("asleep", "waits"), ("cpu", "samples"))
    }
    quality = manifest["quality"]
    named = quality["symbols"]
    if not all(taken.values()) or not named["stacks"]:
        raise BenchError("it took no stacks")
    lasted_s = (manifest["end_ns"] - manifest["start_ns"]) / 1e9
    size = sum(file.stat().st_size for file in (folder / CAPTURE).iterdir())
    return {
        **figures,
        "asleep": taken["asleep"],
        "cpu": taken["cpu"],
        "per_s": named["stacks"] / lasted_s,
        "naming_us": named["cpu_s"] * 1e6 / named["stacks"],
        "stacks": named["stacks"],
        "bytes": size / named["stacks"],
        "lost": quality["lost_stacks"] + named["late"],
        "copy_pages": named["unwinding"]["copy_pages"],
    }


def _floor(context: Context, folder: Path, target: Target) -> Figures:
    """What is there without stacks (but one a second): a switch, and our own CPU time."""
    figures, _ = _run_latrace(context, folder, [*target.options(), *_NO_STACKS])
    return {"ns": figures["asleep_ns"] / figures["asleep_runs"], "used_s": figures["used_s"]}


def _per_stack(found: Figures, floor: Figures) -> Figures:
    """What is for the stacks, for each of them, of the BPF programs' run time and our CPU time.

    The clock's program that finds no target does as little as the other one without a stack.
    """
    without = {where: found[f"{where}_runs"] - found[where] for where in _WHERE}
    return {
        "total_us": (found["used_s"] - floor["used_s"]) * 1e6 / found["stacks"],
        **{
            f"{where}_bpf_ns": (found[f"{where}_ns"] - without[where] * floor["ns"]) / found[where]
            for where in _WHERE
        },
    }


# --- perf --------------------------------------------------------------------------------------


def _used(argv: Sequence[str], folder: Path, output: Path) -> tuple[float, int]:
    """Run a command: its CPU time in s, and its peak memory in bytes."""
    with output.open("wb") as words:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=words,
            stderr=subprocess.STDOUT,
            env=ENVIRONMENT,
            cwd=folder,
        )
        # What wait4 tells of the memory includes ours, from before the exec.
        memory = ended = 0
        while not ended:
            memory = max(memory, _peak(process.pid))
            time.sleep(_POLL_S)
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        text = output.read_text(errors="replace")
        raise BenchError(f"exit code {process.returncode}: {text.strip()[-200:]}")
    return usage.ru_utime + usage.ru_stime, memory


def _peak(pid: int) -> int:
    """The peak of the resident bytes of a process so far."""
    found = re.search(r"^VmHWM:\s*(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(found[1]) << 10 if found else 0


def _perf(
    context: Context, folder: Path, event: str, options: Sequence[str], target: Target
) -> Figures:
    """The figures of `perf record --call-graph dwarf` for as long, and of `perf script` after."""
    if shutil.which("perf") is None:
        raise BenchError("perf is not installed (Debian: linux-perf)")
    data = folder / "perf.data"
    pids = ",".join(map(str, target.pids()))
    record = ["perf", "record", "-q", "-o", str(data), "--call-graph", "dwarf", "-e", event]
    record += [*options, "-p", pids, "--", "sleep", str(_seconds(context))]
    # Inlined functions cost a multiple, and are not looked up by the others either.
    script = ["perf", "script", "-i", str(data), "--no-inline", "--show-lost-events"]
    script += ["-F", "comm,tid,time,event,ip,sym,dso"]
    record_s, record_memory = _used(record, folder, folder / "record.txt")
    script_s, script_memory = _used(script, folder, folder / "script.txt")
    samples = lost = 0
    with (folder / "script.txt").open("rb") as lines:
        for line in lines:
            samples += f" {event}:".encode() in line
            found = re.search(rb"PERF_RECORD_LOST(?:_SAMPLES)? lost (\d+)", line)
            lost += int(found[1]) if found else 0
    size = data.stat().st_size
    for leftover in (data, folder / "script.txt"):
        leftover.unlink()
    if not samples:
        raise BenchError("it took no samples")
    return {
        "per_s": samples / _seconds(context),
        "total_us": record_s * 1e6 / samples,
        "naming_us": script_s * 1e6 / samples,
        "bytes": size / samples,
        "memory": max(record_memory, script_memory),
        "lost": lost,
    }


# --- py-spy ------------------------------------------------------------------------------------


def _dump(context: Context, options: Sequence[str], target: Target) -> Figures:
    """The figures of one look at the program; how long it was stopped is watched from outside."""
    program = shutil.which("py-spy")
    if program is None:
        raise BenchError("not on the PATH (pip install py-spy, in an environment of its own)")
    dumps = _QUICK_DUMPS if context.quick else _DUMPS
    took_s = stopped_s = cpu_s = 0.0
    stacks = 0
    for _ in range(dumps):
        began_s = time.monotonic()
        process = subprocess.Popen(
            [program, "dump", *options, "--pid", str(target.pid)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=ENVIRONMENT,
        )
        stopped_s += _stopped_s(target.pid, process.pid)
        words = process.stdout.read().decode(errors="replace") if process.stdout else ""
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.stdout:
            process.stdout.close()
        if process.returncode:
            raise BenchError(words.strip()[-200:])
        took_s += time.monotonic() - began_s
        cpu_s += usage.ru_utime + usage.ru_stime
        stacks += len(re.findall(r"^Thread ", words, re.MULTILINE))
        time.sleep(0.2)
    return {
        "wall_ms": took_s * 1e3 / dumps,
        "stopped_ms": stopped_s * 1e3 / dumps,
        "total_us": cpu_s * 1e6 / max(1, stacks),
        "stacks": stacks / dumps,
    }


def _stopped_s(pid: int, until_ended: int) -> float:
    """How long a process is stopped by a tracer until another one has ended, by looking often."""
    stopped_s = 0.0
    before_s = time.monotonic()
    with (
        Path(f"/proc/{pid}/stat").open("rb", buffering=0) as state,
        Path(f"/proc/{until_ended}/stat").open("rb", buffering=0) as other,
    ):
        while _state(other) not in b"ZX":
            halted = _state(state) in b"tT"
            now_s = time.monotonic()
            stopped_s += now_s - before_s if halted else 0.0
            before_s = now_s
    return stopped_s


def _state(stat: IO[bytes]) -> bytes:
    stat.seek(0)
    return stat.read(512).rpartition(b") ")[2][:1]


# --- words -------------------------------------------------------------------------------------


def _show(found: Mapping[str, Any] | None) -> str:
    """A median, and half of its interval."""
    if found is None:
        return ""
    half = f"{(found['high'] - found['low']) / 2:,.0f}"
    return f"{found['median']:,.0f}" + (f" +-{half}" if half != "0" else "")


def _short(found: Mapping[str, Any] | None, unit: float = 1.0, digits: int = 0) -> str:
    return "" if found is None else f"{found['median'] / unit:,.{digits}f}"


def render(result: dict[str, Any]) -> list[str]:
    """By program: what a stack costs the kernel, and what it costs whom."""
    lines: list[str] = []
    heads = ("stacks/s", "CPU us", "names us", "kB", "MB", "lost")
    for program, tools in result["programs"].items():
        rows = [
            (
                name,
                _short(found.get("per_s")),
                _show(found.get("total_us")),
                _show(found.get("naming_us")),
                _short(found.get("bytes"), 1e3, 1),
                _short(found.get("memory"), 1e6),
                _short(found.get("lost")),
            )
            for name, found in tools.items()
        ]
        lines += [*table((program, *heads), rows), ""]
    programs = [
        (
            f"{program}, {words}",
            *(_show(tools[each][f"{where}_bpf_ns"]) for each in _OURS),
            _short(tools[WITH]["copy_pages"], 0.25) + " KiB",
        )
        for program, tools in result["programs"].items()
        for where, words in _WHERE.items()
    ]
    lines += [*table(("BPF ns per stack", "with the copy", "without", "copied"), programs), ""]
    for program, tools in result["programs"].items():
        for name, found in tools.items():
            if "wall_ms" in found:
                lines += paragraph(
                    f"{name}, {program}: {_show(found['wall_ms'])} ms for"
                    f" {_short(found['stacks'])} threads, in {_show(found['stopped_ms'])} ms of"
                    " which the program stood still."
                )
    return [
        *lines,
        "",
        *paragraph(
            f"{result['seconds']:g} s each, one after the other beside the same load, at most"
            f" {_ROUNDS} rounds; samples on"
            f" the CPU {result['samples_hz']} times a second. Per stack: CPU us is the CPU time of"
            " latrace in all, with its children, less what it takes without stacks; that of perf"
            " record, and of py-spy. names us is what the thread of latrace takes that walks and"
            " names them, with what it reads once (the kernel's names, the files), and what perf"
            " script takes (without inlined functions). kB is on disk."
            " +- is half of the interval. perf: --call-graph dwarf, 8 KiB of each stack; what that"
            " takes in the kernel is in none of its figures. BPF: the"
            " kernel's statistics of the program that takes them, less what it takes where there"
            " is none to take; the copy begins with the page that the stack stands in, which is"
            " not counted."
        ),
    ]
