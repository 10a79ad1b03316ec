"""Medians and their intervals, without an assumption about the distribution.

The interval of a median is made of two order statistics: whatever the distribution, the number of
values below the true median is binomial (n, 1/2), so the k-th smallest and the k-th largest of n
values enclose it with a probability that is known exactly.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

METHOD = "median; interval between order statistics (binomial), nominal coverage >= 95 %"


@dataclass(frozen=True, slots=True)
class Estimate:
    """A median, its interval, how many values and how surely the interval holds it (0 to 1)."""

    median: float
    low: float
    high: float
    n: int
    coverage: float

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def estimate(values: Sequence[float], *, coverage: float = 0.95) -> Estimate:
    """The median of `values` and the narrowest interval with at least `coverage`.

    With fewer than six values no interval reaches 95 %: then it is from the least to the greatest,
    with the coverage that this has.
    """
    ordered = sorted(values)
    n = len(ordered)
    k, reached = 1, _coverage(n, 1)
    while k < (n + 1) // 2 and _coverage(n, k + 1) >= coverage:
        k += 1
        reached = _coverage(n, k)
    return Estimate(statistics.median(ordered), ordered[k - 1], ordered[n - k], n, reached)


def _coverage(n: int, k: int) -> float:
    """The chance that the k-th smallest and k-th largest of n values enclose the median."""
    return 1 - 2 * sum(math.comb(n, i) for i in range(k)) / float(2**n)


def ratios(values: Sequence[float], base: Sequence[float]) -> Estimate:
    """`values` against `base`, round by round: what was disturbed in both cancels out."""
    return estimate([value / other for value, other in zip(values, base, strict=True)])


def estimates(columns: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Any]]:
    """An estimate of each column, as plain data."""
    return {name: estimate(values).as_dict() for name, values in columns.items()}
