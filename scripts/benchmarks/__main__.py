"""The command: measure, print, and keep the figures."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import machine, page
from .context import Context
from .errors import BenchError
from .suite import BENCHMARKS

_ROUNDS, _QUICK_ROUNDS = 10, 1
_SCHEMA = 1


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Measure what latrace costs, beside its peers. Needs root and an idle machine."
        " Tables go to stdout, progress to stderr. Installs nothing: peers that are missing are"
        " left out, aloud. All of it takes about an hour.",
    )
    parser.add_argument(
        "--only",
        metavar="NAME[,NAME]",
        help="only these: " + ", ".join(BENCHMARKS),
    )
    parser.add_argument(
        "--quick", action="store_true", help="in about a minute; proves nothing but itself"
    )
    parser.add_argument(
        "--rounds", type=int, metavar="N", help=f"of every contender (default: {_ROUNDS})"
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        default=Path("build/bench.json"),
        help="where all figures go (default: build/bench.json)",
    )
    parser.add_argument("--page", type=Path, metavar="FILE", help="write them as a page as well")
    parser.add_argument(
        "--show", type=Path, metavar="FILE", help="measure nothing; print the figures of FILE"
    )
    chosen = parser.parse_args(arguments)
    chosen.names = [name for name in (chosen.only or ",".join(BENCHMARKS)).split(",") if name]
    if unknown := [name for name in chosen.names if name not in BENCHMARKS]:
        parser.error(f"no benchmark is called {unknown[0]}; there are: {', '.join(BENCHMARKS)}")
    if chosen.rounds is not None and chosen.rounds < 1:
        parser.error("--rounds must be at least 1")
    return chosen


def measure(names: Sequence[str], *, rounds: int, quick: bool) -> dict[str, Any]:
    """Run the benchmarks; returns everything found out."""
    before = machine.load_average()
    skipped: dict[str, str] = {}
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="latrace-bench-") as folder:
        context = Context(rounds=rounds, quick=quick, folder=Path(folder), skipped=skipped)
        for name in names:
            context.say(f"{name}: {BENCHMARKS[name].title}")
            began = time.monotonic()
            try:
                results[name] = BENCHMARKS[name].run(context)
            except BenchError as error:
                context.skip(name, str(error))
            context.say(f"  took {time.monotonic() - began:.0f} s")
    return {
        "schema": _SCHEMA,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine.describe(),
        "load_average": [before, machine.load_average()],
        "rounds": rounds,
        "quick": quick,
        "skipped": skipped,
        "results": results,
        "goals": [goal.as_dict() for goal in page.collect_goals(results)],
    }


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code: 1 when a benchmark could not be made."""
    chosen = parse(arguments)
    if chosen.show:
        document = json.loads(chosen.show.read_text())
    else:
        if os.geteuid() != 0:
            sys.stderr.write("error: measuring needs root\n  hint: sudo scripts/bench\n")
            return 1
        if (os.cpu_count() or 1) < 2:
            sys.stderr.write("error: measuring needs two CPUs\n")
            return 1
        rounds = chosen.rounds or (_QUICK_ROUNDS if chosen.quick else _ROUNDS)
        document = measure(chosen.names, rounds=rounds, quick=chosen.quick)
        _write(chosen.json, json.dumps(document, indent=1) + "\n")
    if chosen.page:
        _write(chosen.page, page.markdown(document))
    sys.stdout.write(page.text(document))
    return int(any(name in document["skipped"] for name in BENCHMARKS))


def _write(path: Path, text: str) -> None:
    """A file that belongs to whoever typed sudo, as the tree that it is in."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    owner = int(os.environ.get("SUDO_UID", "-1")), int(os.environ.get("SUDO_GID", "-1"))
    for created in made:
        os.chown(created, *owner)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
