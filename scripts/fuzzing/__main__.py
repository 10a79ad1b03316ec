"""The command: run the targets in turn, say how it goes, keep what was found."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random

from .suite import TARGETS
from .supervisor import check_here, keep, run
from .target import Missing, Property, Target

_TURN_S = 5.0
"""For a target with a share of 1, before it is another one's turn."""
_BASE = Path("build/fuzz")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/fuzz",
        description="Feed hostile input to everything that reads what a target wrote. Ends with 1"
        " at a finding, whose case is kept in build/fuzz. Progress goes to stderr, how many cases"
        " ran to stdout. Needs no root.",
    )
    parser.add_argument("--minutes", type=float, default=1.0, metavar="N", help="default: 1")
    parser.add_argument("--only", metavar="NAME[,NAME]", help="only these: " + ", ".join(TARGETS))
    parser.add_argument("--seed", default="", help="the same cases again")
    parser.add_argument(
        "--case", type=Path, metavar="FILE", help="check this one again, of the one target --only"
    )
    parser.add_argument("--keep-going", action="store_true", help="go on after a finding")
    parser.add_argument("--list", action="store_true", help="say what the targets are")
    chosen = parser.parse_args(arguments)
    chosen.names = [name for name in (chosen.only or ",".join(TARGETS)).split(",") if name]
    if unknown := [name for name in chosen.names if name not in TARGETS]:
        parser.error(f"no target is called {unknown[0]}; there are: {', '.join(TARGETS)}")
    if chosen.minutes <= 0:
        parser.error("--minutes must be more than nothing")
    if chosen.case is not None:
        if len(chosen.names) != 1 or isinstance(TARGETS[chosen.names[0]], Property):
            parser.error(
                "--case needs --only with the one target that it is of, and not a property"
            )
        if not chosen.case.is_file():
            parser.error(f"no such file: {chosen.case}")
    return chosen


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _warm_up(target: Target | Property) -> None:
    """Read files and build programs here, for all children."""
    with contextlib.suppress(Missing):
        if isinstance(target, Property):
            target.strategy()
        else:
            target.make(Random(0))  # noqa: S311 - not a secret


def fuzz(targets: Sequence[Target | Property], *, seconds: float, seed: str, on: bool) -> int:
    """Run the targets in turn for so many seconds; 1 when something was found, else 0.

    `on`: do not end at the first finding.
    """
    code = round_number = 0
    cases: Counter[str] = Counter()
    times: Counter[str] = Counter()
    missing: dict[str, str] = {}
    for target in targets:
        _warm_up(target)
    began = time.monotonic()
    turn_s = min(_TURN_S, seconds / sum(target.share for target in targets))
    while time.monotonic() - began < seconds and (on or not code):
        round_number += 1
        for target in targets:
            left = seconds - (time.monotonic() - began)
            # All of them have their turn, however short the time.
            if target.name in missing or (left <= 0 and round_number > 1):
                continue
            since = time.monotonic()
            part = f"{seed or time.time_ns()}-{target.name}-{round_number}"
            outcome = run(target, seed=part, seconds=turn_s * target.share, base=_BASE)
            cases[target.name] += outcome.cases
            times[target.name] += round((time.monotonic() - since) * 1000)
            if outcome.missing:
                missing[target.name] = outcome.missing
                _say(f"{target.name}: left out: {outcome.missing}")
                continue
            if outcome.finding:
                code = 1
                path = keep(target, outcome, _BASE)
                _say(f"{target.name}: FOUND, kept as {path}; seed {part}\n{outcome.finding}")
                if not on:
                    break
        _say(f"{time.monotonic() - began:.0f} s, {cases.total()} cases")
        if len(missing) == len(targets):
            break
    for name, count in cases.items():
        print(f"{name:12} {count:9} cases in {times[name] / 1000:7.1f} s")
    return code


def main(arguments: Sequence[str]) -> int:
    """Run the command."""
    chosen = parse(arguments)
    targets = [TARGETS[name] for name in chosen.names]
    if chosen.list:
        for target in targets:
            print(f"{target.name:12} {target.what}")
        return 0
    if chosen.case is not None and isinstance(targets[0], Target):
        _warm_up(targets[0])
        check_here(targets[0], chosen.case.read_bytes())
        _say("nothing found")
        return 0
    return fuzz(targets, seconds=chosen.minutes * 60, seed=chosen.seed, on=chosen.keep_going)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
