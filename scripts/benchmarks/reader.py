"""What reading an event costs, and when events are lost.

A program run by BPF_PROG_TEST_RUN on one CPU writes records of waits into a ring, at a given rate;
a reader on another CPU takes them out. Each measurement is a process of its own (`drain`).
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from functools import partial
from typing import Any

from latrace.tracer.options import ALL_ROWS_RING_BYTES, DEFAULT_RING_BYTES

from .children import OUR_ENVIRONMENT, python
from .context import Context
from .errors import BenchError
from .estimate import estimate, ratios
from .goals import Goal
from .tables import interval_heading, mebibytes, paragraph, rate, table

READERS = {
    "decode": "latrace, to records",
    "capture": "latrace, to disk",
    "callback": "bcc callback, idle",
    "decoded": "bcc callback, ctypes",
}
RATES = (100_000, 500_000, 1_000_000, 0)
RINGS = (1 << 20, 4 << 20, DEFAULT_RING_BYTES, ALL_ROWS_RING_BYTES)
SECONDS, QUICK_SECONDS = 1.0, 0.3
GOAL_RATE, LOSS_RATE = 500_000, 1_000_000
_TIMEOUT_S = 60


def run_readers(context: Context) -> dict[str, Any]:
    """All readers at all rates, with the ring that `--min 0` has."""
    rates = (GOAL_RATE,) if context.quick else RATES
    results = context.interleave(
        {
            f"{reader} {per_s}": partial(_drain, context, reader, ALL_ROWS_RING_BYTES, per_s)
            for per_s in rates
            for reader in READERS
        }
    )
    return {
        "ring_bytes": ALL_ROWS_RING_BYTES,
        "runs": [
            _summary(reader, ALL_ROWS_RING_BYTES, per_s, results[f"{reader} {per_s}"])
            for per_s in rates
            for reader in READERS
            if f"{reader} {per_s}" in results
        ],
    }


def run_loss(context: Context) -> dict[str, Any]:
    """latrace's whole drain at all rates and ring sizes."""
    rings = (RINGS[0], ALL_ROWS_RING_BYTES) if context.quick else RINGS
    rates = (LOSS_RATE,) if context.quick else RATES
    results = context.interleave(
        {
            f"{rate(per_s or None)} into {mebibytes(ring)}": partial(
                _drain, context, "capture", ring, per_s
            )
            for ring in rings
            for per_s in rates
        }
    )
    return {
        "runs": [
            _summary("capture", ring, per_s, found)
            for ring in rings
            for per_s in rates
            if (found := results.get(f"{rate(per_s or None)} into {mebibytes(ring)}"))
        ]
    }


def _drain(context: Context, reader: str, ring: int, per_s: int) -> dict[str, Any]:
    seconds = QUICK_SECONDS if context.quick else SECONDS
    with tempfile.TemporaryDirectory(dir=context.folder) as folder:
        done = subprocess.run(
            python("drain", reader, str(ring), str(per_s), str(seconds), folder),
            env=OUR_ENVIRONMENT,
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    if done.returncode:
        raise BenchError(done.stderr.decode(errors="replace").strip()[-300:])
    found: dict[str, Any] = json.loads(done.stdout)
    if found["read"] != found["written"] or found["written"] + found["lost"] != found["made"]:
        raise BenchError(f"the events do not add up: {found}")
    return found


def _summary(reader: str, ring: int, per_s: int, runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "reader": reader,
        "ring_bytes": ring,
        "asked_per_s": per_s or None,
        "per_s": estimate([run["made"] / run["seconds"] for run in runs]).as_dict(),
        "cpu_ns": estimate([run["cpu_s"] * 1e9 / run["read"] for run in runs]).as_dict(),
        "lost_share": estimate([run["lost"] / run["made"] for run in runs]).as_dict(),
        "lost_runs": sum(run["lost"] > 0 for run in runs),
        "runs": len(runs),
        "values": [run["cpu_s"] * 1e9 / run["read"] for run in runs],
    }


def _lost(found: dict[str, Any]) -> str:
    if not found["lost_runs"]:
        return "0"
    return f"{found['lost_share']['median']:.1%} ({found['lost_runs']}/{found['runs']})"


def render_readers(result: dict[str, Any]) -> list[str]:
    """CPU time per event, by reader and rate."""
    interval = interval_heading(result["runs"][0]["cpu_ns"])
    rows = [
        (
            READERS[found["reader"]],
            rate(found["asked_per_s"]),
            f"{found['cpu_ns']['median']:,.0f}",
            f"{found['cpu_ns']['low']:,.0f}-{found['cpu_ns']['high']:,.0f}",
            _lost(found),
        )
        for found in result["runs"]
    ]
    return [
        f"Ring of {mebibytes(result['ring_bytes'])}; the reader on one CPU, the writer on another.",
        "",
        *table(("reader", "events", "CPU ns/event", interval, "lost (runs)"), rows),
        "",
        *paragraph(
            "To records: the ring's cells as numpy records. To disk: the same, then all columns,"
            " compressed, in a capture. bcc's callback does nothing, or looks at the record through"
            " ctypes as bcc's own tools do."
        ),
    ]


def render_loss(result: dict[str, Any]) -> list[str]:
    """The share of events lost, by ring size and rate."""
    rates = list(dict.fromkeys(found["asked_per_s"] for found in result["runs"]))
    rings = list(dict.fromkeys(found["ring_bytes"] for found in result["runs"]))
    cells = {(found["ring_bytes"], found["asked_per_s"]): _lost(found) for found in result["runs"]}
    top = max(
        (found["per_s"]["median"] for found in result["runs"] if not found["asked_per_s"]),
        default=0,
    )
    note = f"Full speed was up to {top / 1e6:.1f} M/s. " if top else ""
    return [
        *table(
            ("lost of what was asked for", *(rate(per_s) for per_s in rates)),
            [
                (f"ring of {mebibytes(ring)}", *(cells.get((ring, per_s), "") for per_s in rates))
                for ring in rings
            ],
        ),
        "",
        *paragraph(
            note
            + "latrace's whole drain, to a capture on disk. The median of the runs, and in how many"
            " of them anything was lost."
        ),
    ]


def reader_goals(result: dict[str, Any]) -> list[Goal]:
    """Promises for the reader's CPU time."""
    found = {run["reader"]: run for run in result["runs"] if run["asked_per_s"] == GOAL_RATE}
    made = []
    for ours, theirs in (("decode", "callback"), ("decode", "decoded"), ("capture", "decoded")):
        if ours in found and theirs in found:
            times = ratios(found[theirs]["values"], found[ours]["values"])
            promised = ours == "decode"
            made.append(
                Goal(
                    f"{ours}: less CPU than bcc's {theirs}",
                    ">= 5 x" if promised else "(no promise)",
                    f"{times.median:.1f} x",
                    times.median >= 5 or not promised,
                )
            )
    return made


def loss_goals(result: dict[str, Any]) -> list[Goal]:
    """The promise for losses."""
    return [
        Goal(
            f"{rate(LOSS_RATE)}, ring of --min 0, 2 CPUs",
            "none lost",
            f"{run['lost_share']['high']:.2%} at most",
            run["lost_runs"] == 0,
        )
        for run in result["runs"]
        if run["asked_per_s"] == LOSS_RATE and run["ring_bytes"] == ALL_ROWS_RING_BYTES
    ]
