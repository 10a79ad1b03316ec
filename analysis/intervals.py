"""How far a figure of a capture may be off by chance.

Quantiles: the interval between two order statistics, whose ranks come from the binomial
distribution of how many values lie below the quantile. It needs no assumption about the shape of
the distribution. It does need values that are independent, which waits are not: one busy moment
makes many long ones. So the count that goes into it is divided by the design effect, the factor
by which the share of long waits scatters over parts of the capture more than chance would have it.

Rates: the capture is cut into `BLOCKS` parts of equal length; how much they differ tells how far
their mean may be off.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from latrace.analysis import histogram

CONFIDENCE: Final = 0.95
BLOCKS: Final = 20
_STUDENT: Final = 2.093  # 97.5 % of Student's t with BLOCKS - 1 degrees of freedom

Values = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """A quantile (ns), and between which values it lies; None: the values do not tell."""

    value: int
    low: int | None
    high: int | None

    def apart(self, other: Interval) -> bool:
        """Tell whether no value lies in both: stricter than a test at 5 %."""
        return _below(self.high, other.low) or _below(other.high, self.low)


def _below(high: int | None, low: int | None) -> bool:
    return high is not None and low is not None and high < low


def ranks(count: int, fraction: float) -> tuple[int, int]:
    """Tell the ranks (from 1) of the values between which a quantile of so many values lies.

    Rank 0 or `count` + 1: there is no such value, the interval is open on that side.
    """
    tail = (1 - CONFIDENCE) / 2
    # Beyond twelve standard deviations there is nothing; for rare events, beyond forty of them.
    mean = count * fraction
    spread = 12 * math.sqrt(mean * (1 - fraction)) + 40
    first, last = max(0, math.floor(mean - spread)), min(count, math.ceil(mean + spread))
    below = np.arange(first, last + 1, dtype=np.float64)
    steps = np.log((count - below[:-1]) / (below[:-1] + 1)) + math.log(fraction / (1 - fraction))
    logs = np.concatenate([[0.0], np.cumsum(steps)])
    chances = np.exp(logs - logs.max())
    cumulated = np.cumsum(chances / chances.sum())
    low = first + int(np.searchsorted(cumulated, tail, side="right"))
    # The rounding of the sum must not push the last rank away.
    above = np.append(np.cumsum((chances / chances.sum())[::-1])[::-1], 0.0)
    high = first + int(np.argmax(above <= tail))
    return low, high


def quantile(
    counts: histogram.Counts, fraction: float, *, max_ns: int, effect: float = 1.0
) -> Interval | None:
    """Tell a quantile of a histogram and its interval; None: it is empty.

    `effect`: the design effect, at least 1. The bounds are those of the buckets that hold them.
    """
    count = int(counts.sum())
    if not count:
        return None
    independent = max(1, int(count / effect))
    low, high = (rank / independent for rank in ranks(independent, fraction))
    cumulated = np.cumsum(counts)

    def bucket(rank: int) -> tuple[int, int]:
        slot = np.searchsorted(cumulated, np.uint64(min(max(rank, 1), count)), side="left")
        start, end = histogram.bounds([int(slot)])
        return int(start[0]), min(int(end[0]) - 1, max_ns)

    return Interval(
        histogram.quantile(counts, fraction, max_ns=max_ns),
        bucket(math.floor(low * count))[0] if low > 0 else None,
        bucket(math.ceil(high * count))[1] if high <= 1 else None,
    )


def design_effect(over: Values, of: Values) -> float:
    """Tell how much more a share scatters over blocks than that of independent values; >= 1.

    `over`, `of`: shape (BLOCKS,), the values above a mark and all of them. The variance of their
    ratio over blocks (linearised), by the binomial one.
    """
    total, above = float(of.sum()), float(over.sum())
    if not 0 < above < total:
        return 1.0
    share = above / total
    scatter = BLOCKS / (BLOCKS - 1) * float(((over - share * of) ** 2).sum()) / total**2
    return max(1.0, scatter / (share * (1 - share) / total))


@dataclass(frozen=True, slots=True)
class Rate:
    """Something per second, and half the width of its interval; None: not known."""

    per_s: float
    error: float | None

    def apart(self, other: Rate) -> bool | None:
        """Tell whether they differ by more than chance makes them; None: not known."""
        if self.error is None or other.error is None:
            return None
        return abs(self.per_s - other.per_s) > math.hypot(self.error, other.error)

    def as_json(self) -> dict[str, Any]:
        """Give its fields."""
        return {"per_s": self.per_s, "error": self.error}


def rate(total: float, blocks: Values | None, seconds: float) -> Rate:
    """Tell the rate of an exact total, and its error from what the rows of each block have of it.

    `blocks`: shape (BLOCKS,); their sum may be less than the total, as not everything has a row.
    None, or all 0 while the total is not: the error is not known.
    """
    if seconds <= 0:
        return Rate(0.0, None)
    seen = 0.0 if blocks is None else float(blocks.sum())
    if blocks is None or (total and not seen):
        return Rate(total / seconds, None)
    error = _STUDENT * float(np.std(blocks, ddof=1)) * math.sqrt(BLOCKS)
    scale = total / seen if seen else 1.0
    return Rate(total / seconds, error * scale / seconds)
