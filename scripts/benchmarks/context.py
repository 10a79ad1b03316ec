"""What every benchmark is given, and the order in which it runs its contenders."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from .errors import BenchError

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """How thoroughly to measure, and where temporary files may go."""

    rounds: int
    quick: bool
    folder: Path
    skipped: dict[str, str] = field(default_factory=dict)
    """What was left out or failed, and why."""

    def at_most(self, rounds: int) -> Context:
        """The same with no more rounds than these, for what takes long."""
        return replace(self, rounds=min(self.rounds, rounds))

    def say(self, text: str) -> None:
        """Progress, for whoever waits."""
        sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def skip(self, name: str, why: str) -> None:
        """Say aloud, once, that something is left out."""
        if name not in self.skipped:
            self.skipped[name] = why
            self.say(f"!!! left out: {name}: {why}")

    def interleave(self, contenders: Mapping[str, Callable[[], T]]) -> dict[str, list[T]]:
        """Run all contenders once, then all of them again: A B C A B C ...

        A contender that fails is left out from then on, aloud, with everything it measured: the
        rounds of the others stay whole.
        """
        results: dict[str, list[T]] = {name: [] for name in contenders}
        for number in range(1, self.rounds + 1):
            for name in [*results]:
                self.say(f"  round {number}/{self.rounds}: {name}")
                try:
                    results[name].append(contenders[name]())
                except BenchError as error:
                    self.skip(name, str(error))
                    del results[name]
        return results
