"""The log-linear histogram that the kernel fills: the same slots, in numpy.

Below 128 ns every value has its own slot; above, each power of two is cut into 64. A bucket is
thus at most 1/64 (1.6 %) of its value wide, and 3776 slots cover every u64. Counts are arrays of
`SLOTS` u64; histograms are merged by adding them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction
from typing import Any, Final

import numpy as np
import numpy.typing as npt

SUB_BITS: Final = 6
SLOTS: Final = ((64 - SUB_BITS) << SUB_BITS) + (1 << SUB_BITS)

Counts = npt.NDArray[np.uint64]

_LINEAR = 2 << SUB_BITS  # up to here a slot is a value


def slot_of(values: npt.ArrayLike) -> npt.NDArray[np.intp]:
    """Tell the slot of each value (ns, u64)."""
    array = np.asarray(values, np.uint64)
    # The exponent by way of a float is one too high where rounding carried into the next power.
    exponent = np.minimum(np.frexp(array.astype(np.float64))[1] - 1, 63).clip(SUB_BITS)
    exponent -= (array >> exponent.astype(np.uint64) == 0) & (exponent > SUB_BITS)
    shift = (exponent - SUB_BITS).astype(np.uint64)
    slots: npt.NDArray[np.intp] = ((shift << np.uint64(SUB_BITS)) + (array >> shift)).astype(
        np.intp
    )
    return slots


def bounds(slots: npt.ArrayLike) -> tuple[Counts, Counts]:
    """Tell the smallest value of each slot and the first above it (ns).

    The last slot's upper bound would be 2**64: it is given as 2**64 - 1.
    """
    array = np.asarray(slots, np.uint64)
    shift = np.maximum(array >> np.uint64(SUB_BITS), np.uint64(1)) - np.uint64(1)
    mantissa = array - (shift << np.uint64(SUB_BITS))
    low = mantissa << shift
    return low, np.where(array == SLOTS - 1, np.uint64(2**64 - 1), (mantissa + 1) << shift)


def empty() -> Counts:
    """Make a histogram without a value."""
    return np.zeros(SLOTS, np.uint64)


def merge(histograms: Iterable[npt.NDArray[Any]]) -> Counts:
    """Add histograms, such as those of each CPU or process."""
    total = empty()
    for counts in histograms:
        total += counts.astype(np.uint64)
    return total


def buckets(counts: Counts) -> tuple[Counts, Counts, Counts]:
    """List the buckets that are not empty: lower bound, upper bound (exclusive), count."""
    slots = np.flatnonzero(counts)
    low, high = bounds(slots)
    return low, high, counts[slots]


def from_buckets(low: npt.ArrayLike, count: npt.ArrayLike) -> Counts:
    """Rebuild counts from buckets (of one or more histograms); the inverse of `buckets`."""
    total = empty()
    np.add.at(total, slot_of(low), np.asarray(count, np.uint64))
    return total


def quantile(counts: Counts, fraction: float, *, max_ns: int) -> int:
    """Tell a value that at least `fraction` of all values do not exceed (ns).

    This is the largest value that the bucket of the nearest-rank quantile can hold, or the exact
    `max_ns` if that is less: never below the true quantile, and at most 1.6 % above. 0 if empty.
    """
    return quantiles(counts, [fraction], max_ns=max_ns)[0]


def quantiles(counts: Counts, fractions: Iterable[float], *, max_ns: int) -> list[int]:
    """Tell several quantiles at once; see `quantile`."""
    cumulated = np.cumsum(counts)
    total = int(cumulated[-1])
    if total == 0:
        return [0 for _ in fractions]
    # As a decimal fraction: 0.99 of 100 values is the 99th, not the one after it.
    ranks = [max(1, math.ceil(Fraction(repr(float(part))) * total)) for part in fractions]
    slots = np.searchsorted(cumulated, np.asarray(ranks, np.uint64), side="left")
    _, high = bounds(slots)
    return [min(_last(int(slot), int(top)), max_ns) for slot, top in zip(slots, high, strict=True)]


def count_over(counts: Counts, value_ns: int) -> int:
    """Count the values above `value_ns`: exact if it is a quantile, as no bucket straddles it.

    Otherwise the bucket that holds `value_ns` is left out.
    """
    (slot,) = slot_of([value_ns])
    return int(counts[slot + 1 :].sum())


def tail_over(counts: Counts, fraction: float) -> int:
    """Tell the value (ns) above which the tail begins: the quantile `fraction`.

    Where nothing lies above its bucket, as when there are few values, or all are alike, the tail
    is that bucket. `count_over` is exact for this value.
    """
    value = quantile(counts, fraction, max_ns=2**64 - 1)
    if count_over(counts, value):
        return value
    low, _ = bounds(slot_of([value]))
    return max(int(low[0]) - 1, 0)


def _last(slot: int, high: int) -> int:
    return high if slot == SLOTS - 1 else high - 1
