"""How many stacks are whole, of programs that many people run, asleep and on the CPU."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from . import served
from .children import ENVIRONMENT, tool
from .context import Context
from .errors import BenchError
from .estimate import estimate
from .goals import Goal
from .served import Serve
from .tables import paragraph, table
from .tools import CAPTURE, LATRACE, READY

PROGRAMS: dict[str, Serve] = {
    "redis-server": served.redis,
    "PostgreSQL": served.postgresql,
    "nginx": served.nginx,
    "python3": served.python3,
    "node --perf-basic-prof": served.node,
    "Go service": served.go,
    "Go service, stripped": served.stripped_go,
}
_QUICK = ("redis-server", "python3")
_SECONDS, _QUICK_SECONDS = 10, 2
_ROUNDS, _SAMPLES_HZ = 3, 199
_GOALS = {"asleep": 0.98, "cpu": 0.97}
_WORDS = {"asleep": "asleep", "cpu": "on the CPU"}
_TIMEOUT_S = 120


def run(context: Context) -> dict[str, Any]:
    """Trace each of them under its load."""
    seconds = _QUICK_SECONDS if context.quick else _SECONDS
    names = _QUICK if context.quick else tuple(PROGRAMS)
    found = context.at_most(_ROUNDS).interleave(
        {name: partial(_traced, context, PROGRAMS[name], seconds) for name in names}
    )
    if not found:
        raise BenchError("none of the programs could be traced")
    return {
        "seconds": seconds,
        "samples_hz": _SAMPLES_HZ,
        "programs": {
            name: {
                where: {
                    "stacks": sum(_count(one[where]) for one in runs),
                    "whole": estimate([_share(one[where]) for one in runs]).as_dict(),
                    "ends": _ends([one[where] for one in runs]),
                }
                for where in _GOALS
            }
            for name, runs in found.items()
        },
    }


def _traced(context: Context, serve: Serve, seconds: float) -> dict[str, Any]:
    """`quality.stacks` of one trace, and the same of its samples on the CPU."""
    with tempfile.TemporaryDirectory(dir=context.folder) as name:
        folder = Path(name)
        with serve(folder) as target:
            argv = [LATRACE, "attach", *target.options(), "-d", f"{seconds}s", "-o", CAPTURE]
            argv += ["--cpu-samples", str(_SAMPLES_HZ)]
            with tool(argv, ready_text=READY, folder=folder) as running:
                running.wait()
        done = subprocess.run(
            [LATRACE, "report", "-i", str(folder / CAPTURE), "--json"],
            capture_output=True,
            env=ENVIRONMENT,
            timeout=_TIMEOUT_S,
            check=False,
        )
        if done.returncode:
            raise BenchError(done.stderr.decode(errors="replace").strip()[-300:])
        asleep = json.loads(done.stdout)["quality"]["stacks"]
        found = {"asleep": asleep, "cpu": _on_cpu(folder / CAPTURE)}
    for where, counts in found.items():
        if not _count(counts):
            raise BenchError(f"no stack was taken {_WORDS[where]}")
    return found


def _on_cpu(path: Path) -> dict[str, Any]:
    """The samples with a whole stack, with a part of one, with none; and where those end."""
    from latrace.analysis.capture import open_capture  # noqa: PLC0415 - not while others measure

    capture = open_capture(path)
    modules = {row["id"]: row["module"] for row in capture.frames.to_pylist()}
    stacks = {row["id"]: row for row in capture.stacks.to_pylist()}
    found: dict[str, Any] = {"whole": 0, "truncated": 0, "missing": 0, "by_module": {}}
    for number in capture.samples["stack"].to_pylist():
        stack = stacks.get(number)
        if stack is None:
            found["missing"] += 1
        elif stack["whole"]:
            found["whole"] += 1
        else:
            found["truncated"] += 1
            ends = found["by_module"].setdefault(modules.get(stack["frames"][-1], "?"), {})
            ends[stack["end"]] = ends.get(stack["end"], 0) + 1
    return found


def _count(counts: Mapping[str, Any]) -> int:
    return int(counts["whole"] + counts["truncated"] + counts["missing"])


def _share(counts: Mapping[str, Any]) -> float:
    return float(counts["whole"] / _count(counts))


def _ends(runs: list[dict[str, Any]]) -> list[tuple[int, str, str]]:
    """Where the others end: how many, module and why, most first."""
    found: dict[tuple[str, str], int] = {}
    for counts in runs:
        for module, ends in counts["by_module"].items():
            for why, count in ends.items():
                found[module, why] = found.get((module, why), 0) + count
    missing = sum(counts["missing"] for counts in runs)
    rows = [(count, module, why) for (module, why), count in found.items()]
    return sorted([*rows, *([(missing, "", "lost")] if missing else [])], reverse=True)


def _cell(found: Mapping[str, Any]) -> str:
    whole = found["whole"]
    low = f" ({whole['low']:.2%})" if whole["low"] != whole["median"] else ""
    return f"{whole['median']:.2%}{low}"


def render(result: dict[str, Any]) -> list[str]:
    """The shares, and where the rest ends."""
    rows = [
        (
            name,
            f"{found['asleep']['stacks']:,}",
            _cell(found["asleep"]),
            f"{found['cpu']['stacks']:,}",
            _cell(found["cpu"]),
        )
        for name, found in result["programs"].items()
    ]
    lines = [
        f"{name}, {_WORDS[where]}: {count:,} {f'in {module}: ' if module else ''}{why}"
        for name, found in result["programs"].items()
        for where in _GOALS
        for count, module, why in found[where]["ends"][:3]
    ]
    return [
        *table(("program", "asleep", "whole", "on CPU", "whole"), rows),
        "",
        *paragraph(
            f"Each under its usual load, {result['seconds']} s a round, at most {_ROUNDS} rounds,"
            " with --cpu-samples"
            f" {result['samples_hz']}. Asleep: the stacks of waits for a CPU, as in"
            " quality.stacks of latrace report --json. Medians of the rounds, and the least where"
            " it differs. Where the others end, at most three each:"
        ),
        *(part for line in lines or ["nowhere"] for part in paragraph(f"- {line}")),
    ]


def goals(result: dict[str, Any]) -> list[Goal]:
    """The promise for each program, by the median of the rounds."""
    return [
        Goal(
            f"{name}: whole {_WORDS[where]}",
            f">= {limit:.0%}",
            f"{found[where]['whole']['median']:.1%}",
            found[where]["whole"]["median"] >= limit,
        )
        for name, found in result["programs"].items()
        for where, limit in _GOALS.items()
    ]
