from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latrace.analysis import histogram

U64 = st.integers(0, 64).flatmap(lambda bits: st.integers(0, max(0, (1 << bits) - 1)))
EDGES = sorted({max(0, min(2**64 - 1, 2**k + d)) for k in range(65) for d in (-1, 0, 1)})


def slot_by_definition(value: int) -> int:
    if value < 128:
        return value
    shift = value.bit_length() - 1 - 6
    return (shift << 6) + (value >> shift)


def counts_of(values: list[int]) -> histogram.Counts:
    counts = histogram.empty()
    np.add.at(counts, histogram.slot_of(values), np.uint64(1))
    return counts


@given(st.lists(U64, min_size=1, max_size=200))
def test_slots_are_those_of_the_definition(values: list[int]) -> None:
    assert histogram.slot_of(values).tolist() == [slot_by_definition(value) for value in values]


def test_slots_at_the_edges() -> None:
    assert histogram.slot_of(EDGES).tolist() == [slot_by_definition(value) for value in EDGES]
    assert histogram.slot_of([2**64 - 1]).tolist() == [histogram.SLOTS - 1]
    assert histogram.SLOTS == 3776


def test_buckets_cover_every_value_once() -> None:
    low, high = histogram.bounds(np.arange(histogram.SLOTS))
    assert low[0] == 0
    assert (low[1:] == high[:-1]).all()
    assert int(high[-1]) == 2**64 - 1
    assert histogram.slot_of(low).tolist() == list(range(histogram.SLOTS))
    assert histogram.slot_of(high[:-1] - np.uint64(1)).tolist() == list(range(histogram.SLOTS - 1))


def test_buckets_are_at_most_one_64th_wide() -> None:
    low, high = histogram.bounds(np.arange(128, histogram.SLOTS - 1))
    assert ((high - low) * np.uint64(64) <= low).all()
    low, high = histogram.bounds(np.arange(128))
    assert (high - low == 1).all()


@given(st.lists(U64, min_size=1, max_size=300), st.sampled_from([0.0, 0.5, 0.9, 0.99, 0.999, 1.0]))
def test_quantile_never_understates_and_is_near(values: list[int], fraction: float) -> None:
    rank = max(1, math.ceil(Fraction(str(fraction)) * len(values)))
    true = sorted(values)[rank - 1]
    found = histogram.quantile(counts_of(values), fraction, max_ns=max(values))
    assert true <= found <= min(max(values), true + true // 64)


@pytest.mark.parametrize(
    ("fraction", "expected"), [(0.5, 50), (0.9, 90), (0.99, 99), (0.999, 100), (1.0, 100)]
)
def test_quantile_is_the_nearest_rank(fraction: float, expected: int) -> None:
    assert histogram.quantile(counts_of(list(range(1, 101))), fraction, max_ns=100) == expected


def test_quantiles_of_nothing_are_zero() -> None:
    assert histogram.quantiles(histogram.empty(), [0.5, 0.99], max_ns=0) == [0, 0]


@given(st.lists(U64, min_size=1, max_size=200), st.sampled_from([0.5, 0.9, 0.99]))
def test_count_over_a_quantile_is_exact(values: list[int], fraction: float) -> None:
    counts = counts_of(values)
    over = histogram.quantile(counts, fraction, max_ns=max(values))
    assert histogram.count_over(counts, over) == sum(value > over for value in values)


@given(st.lists(st.lists(U64, max_size=50), min_size=1, max_size=4))
def test_merging_is_counting_together(parts: list[list[int]]) -> None:
    merged = histogram.merge(counts_of(part) for part in parts)
    assert (merged == counts_of([value for part in parts for value in part])).all()


@given(st.lists(U64, max_size=200))
def test_buckets_and_back(values: list[int]) -> None:
    counts = counts_of(values)
    low, high, count = histogram.buckets(counts)
    assert (low < high).all()
    assert (count > 0).all()
    assert (histogram.from_buckets(low, count) == counts).all()
    twice = histogram.from_buckets(np.concatenate([low, low]), np.concatenate([count, count]))
    assert (twice == counts * np.uint64(2)).all()
