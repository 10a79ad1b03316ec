"""What latrace promises about its cost, and whether it was kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .tables import table


@dataclass(frozen=True, slots=True)
class Goal:
    """A promise, what was measured, and whether that keeps it."""

    what: str
    promised: str
    measured: str
    kept: bool

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def at_most(what: str, limit: float, measured: float, unit: str, *, digits: int = 0) -> Goal:
    """A promise that a figure is not above `limit`."""
    return Goal(what, f"<= {limit:g} {unit}", f"{measured:.{digits}f} {unit}", measured <= limit)


def render(goals: Sequence[Goal]) -> list[str]:
    """Lines of text."""
    rows = [
        (goal.what, goal.promised, goal.measured, "kept" if goal.kept else "MISSED")
        for goal in goals
    ]
    return table(("goal", "promised", "measured", ""), rows)
