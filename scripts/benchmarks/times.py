"""How long one waits for latrace: to its first event, and for its summary; and its memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from latrace.tracer import cache

from . import loads
from .children import ENVIRONMENT, held
from .context import Context
from .errors import BenchError
from .estimate import estimates
from .goals import Goal, at_most
from .tables import interval_heading, mebibytes, table
from .tools import CAPTURE, LATRACE

WAITS, QUICK_WAITS = 1_000_000, 100_000
_FOR_EVER = 1_000_000_000
_POLL_S, _TIMEOUT_S = 0.05, 120.0
_BUSY_S = 0.2


def run(context: Context) -> dict[str, Any]:
    """Measure the start and the end of a trace, with a busy pinned pipe as the target."""
    waits = QUICK_WAITS if context.quick else WAITS
    results = context.interleave(
        {
            "compile": partial(_first_start, context),
            "start": partial(_start, context),
            "end": partial(_end, context, waits),
        }
    )
    return {
        "load": " ".join(loads.pipe(_FOR_EVER).argv),
        "waits": waits,
        "phases": {
            name: estimates({key: [run[key] for run in runs] for key in runs[0]})
            for name, runs in results.items()
        },
    }


def _first_start(context: Context) -> dict[str, float]:
    """The same where nothing compiled is kept: the first start on a host, or on a new kernel."""
    for kept in cache.DIRECTORY.glob("probes-*"):
        kept.unlink()
    return _start(context)


def _start(context: Context) -> dict[str, float]:
    """From the command to the first row of the capture, and to the end of a trace of one second."""
    with (
        tempfile.TemporaryDirectory(dir=context.folder) as name,
        held(loads.pipe(_FOR_EVER)) as target,
    ):
        target.begin()
        time.sleep(_BUSY_S)
        spawned_ns = time.monotonic_ns()
        process = _attach(target.pid, Path(name), "-d", "1s")
        usage = _wait(process)
        ended_ns = time.monotonic_ns()
        manifest, first_run_ns = _first_row(Path(name) / CAPTURE)
    return {
        "attached_s": (manifest["start_ns"] - spawned_ns) / 1e9,
        "first_event_s": (first_run_ns - spawned_ns) / 1e9,
        "ended_s": (ended_ns - manifest["end_ns"]) / 1e9,
        "rss_bytes": usage.ru_maxrss * 1024,
    }


def _first_row(capture: Path) -> tuple[dict[str, Any], int]:
    from latrace.analysis.capture import open_capture  # noqa: PLC0415 - not while others measure

    found = open_capture(capture)
    run_ns = found.waits.column("run_ns")
    if not len(run_ns):
        raise BenchError("the capture has no rows")
    return found.manifest, min(run_ns.to_pylist())


def _end(context: Context, waits: int) -> dict[str, float]:
    """From Ctrl-C, after so many waits with a row each, to the summary and the end."""
    with (
        tempfile.TemporaryDirectory(dir=context.folder) as name,
        held(loads.pipe(_FOR_EVER)) as target,
    ):
        process = _attach(target.pid, Path(name), "--min", "0")
        manifest = Path(name) / CAPTURE / "manifest.json"
        target.begin()
        deadline = time.monotonic() + _TIMEOUT_S
        while _rows(manifest) < waits:
            if time.monotonic() > deadline or process.poll() is not None:
                process.kill()
                process.wait()
                raise BenchError(f"{waits:,} waits did not come within {_TIMEOUT_S:.0f} s")
            time.sleep(_POLL_S)
        interrupted_s = time.monotonic()
        process.send_signal(signal.SIGINT)
        usage = _wait(process)
        took_s = time.monotonic() - interrupted_s
        quality = json.loads(manifest.read_text())["quality"]
    return {
        "summary_s": took_s,
        "rss_bytes": usage.ru_maxrss * 1024,
        "rows": quality["rows"],
        "lost": quality["lost_events"],
    }


def _rows(manifest: Path) -> int:
    try:
        found: int = json.loads(manifest.read_text())["quality"]["rows"]
    except (OSError, KeyError, ValueError):  # not written yet
        return 0
    return found


def _attach(pid: int, folder: Path, *options: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [LATRACE, "attach", "--pid", str(pid), "-o", CAPTURE, *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=ENVIRONMENT,
        cwd=folder,
    )


def _wait(process: subprocess.Popen[bytes]) -> Any:
    """Its resource usage. Raises BenchError when it failed."""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise BenchError(f"latrace ended with exit code {process.returncode}")
    return usage


_WORDS = {
    ("compile", "first_event_s"): "the very first start, to the first event",
    ("compile", "rss_bytes"): "  its peak memory",
    ("start", "attached_s"): "command to attached",
    ("start", "first_event_s"): "command to the first event",
    ("start", "ended_s"): "end of -d 1s to the prompt, default mode",
    ("start", "rss_bytes"): "peak memory, default mode",
    ("end", "summary_s"): "Ctrl-C to the prompt, --min 0",
    ("end", "rows"): "  rows until then",
    ("end", "lost"): "  events lost",
    ("end", "rss_bytes"): "peak memory, --min 0",
}


def _show(key: str, value: float) -> str:
    if key.endswith("_s"):
        return f"{value:.2f} s"
    return mebibytes(value) if key == "rss_bytes" else f"{value:,.0f}"


def render(result: dict[str, Any]) -> list[str]:
    """Times and memory."""
    rows = []
    for (phase, key), words in _WORDS.items():
        found = result["phases"].get(phase, {}).get(key)
        if found:
            interval = f"{_show(key, found['low'])} - {_show(key, found['high'])}"
            rows.append((words, _show(key, found["median"]), interval))
    first = next(iter(next(iter(result["phases"].values())).values()))
    return table(("a busy pinned pipe as the target", "median", interval_heading(first)), rows)


def goals(result: dict[str, Any]) -> list[Goal]:
    """Promises for the time one waits."""
    phases, made = result["phases"], []
    if "start" in phases:
        first = phases["start"]["first_event_s"]["median"]
        made.append(at_most("command to first event", 0.5, first, "s", digits=2))
    if "end" in phases:
        took = phases["end"]["summary_s"]["median"]
        what = f"summary after {result['waits']:,} waits"
        made.append(at_most(what, 1, took, "s", digits=2))
    return made
