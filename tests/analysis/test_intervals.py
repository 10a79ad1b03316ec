"""Intervals hold what they promise: counted over many captures drawn from a known distribution."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latrace.analysis import histogram
from latrace.analysis.intervals import BLOCKS, Rate, design_effect, quantile, ranks, rate

DRAWS = 400
MEDIAN_NS = 100_000


def counts_of(values: npt.NDArray[np.uint64]) -> histogram.Counts:
    return np.bincount(histogram.slot_of(values), minlength=histogram.SLOTS).astype(np.uint64)


@pytest.mark.parametrize(
    ("count", "expected"), [(10, (2, 9)), (20, (6, 15)), (100, (40, 61)), (5, (0, 6))]
)
def test_ranks_of_the_median_are_those_of_the_tables(count: int, expected: tuple[int, int]) -> None:
    assert ranks(count, 0.5) == expected


@given(st.integers(1, 300), st.sampled_from([0.5, 0.9, 0.99, 0.999]))
def test_ranks_against_the_binomial_distribution(count: int, fraction: float) -> None:
    """No narrower interval would do, on either side."""
    chances = [
        math.comb(count, k) * fraction**k * (1 - fraction) ** (count - k) for k in range(count + 1)
    ]
    low, high = ranks(count, fraction)
    assert sum(chances[:low]) <= 0.025 + 1e-12 < sum(chances[: low + 1]) + 1e-9
    assert sum(chances[high:]) <= 0.025 + 1e-12 < sum(chances[high - 1 :]) + 1e-9


def test_ranks_of_a_long_capture_need_no_time() -> None:
    low, high = ranks(10**9, 0.999)
    spread = 1.96 * math.sqrt(10**9 * 0.999 * 0.001)
    assert low == pytest.approx(999_000_000 - spread, abs=20)
    assert high == pytest.approx(999_000_001 + spread, abs=20)


@pytest.mark.parametrize(("fraction", "true_z"), [(0.5, 0.0), (0.9, 1.28155), (0.99, 2.32635)])
def test_quantiles_lie_where_the_interval_says(fraction: float, true_z: float) -> None:
    true_ns = MEDIAN_NS * math.exp(true_z)
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(DRAWS):
        values = (MEDIAN_NS * rng.lognormal(0, 1, 2_000)).astype(np.uint64)
        found = quantile(counts_of(values), fraction, max_ns=int(values.max()))
        assert found is not None and found.low is not None and found.high is not None
        assert found.low <= found.value <= found.high
        hits += found.low <= true_ns <= found.high
    # 95 % or more, as the ranks are whole numbers and the bounds those of buckets.
    assert hits >= 0.94 * DRAWS


def test_too_few_values_leave_the_interval_open() -> None:
    counts = counts_of(np.arange(1_000, 1_100, dtype=np.uint64))
    found = quantile(counts, 0.99, max_ns=1_099)
    assert found is not None
    assert found.low is not None and found.high is None
    assert quantile(histogram.empty(), 0.99, max_ns=0) is None


def clustered(rng: np.random.Generator) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.intp]]:
    """Waits of which those in a few busy parts of the time are ten times longer."""
    part = rng.integers(0, BLOCKS, 4_000)
    busy = rng.random(BLOCKS) < 0.2
    values = MEDIAN_NS * rng.lognormal(0, 0.5, 4_000) * np.where(busy[part], 10, 1)
    return values.astype(np.uint64), part


def test_clusters_in_time_widen_the_interval() -> None:
    """Of two captures of the same service few differ; without the design effect most would."""
    rng = np.random.default_rng(2)

    def found(*, corrected: bool) -> int:
        apart = 0
        for _ in range(DRAWS // 2):
            both = []
            for _ in range(2):
                values, part = clustered(rng)
                counts = counts_of(values)
                mark = histogram.quantile(counts, 0.9, max_ns=2**63)
                over = np.bincount(part[values > mark], minlength=BLOCKS).astype(float)
                of = np.bincount(part, minlength=BLOCKS).astype(float)
                effect = design_effect(over, of) if corrected else 1.0
                both.append(quantile(counts, 0.9, max_ns=2**63, effect=effect))
            apart += both[0].apart(both[1])  # type: ignore[union-attr, arg-type]
        return apart

    assert found(corrected=False) > 0.3 * DRAWS // 2
    assert found(corrected=True) < 0.05 * DRAWS // 2


def test_design_effect_of_independent_values_is_about_one() -> None:
    rng = np.random.default_rng(3)
    effects = []
    for _ in range(DRAWS):
        of = np.bincount(rng.integers(0, BLOCKS, 5_000), minlength=BLOCKS).astype(float)
        effects.append(design_effect(rng.binomial(of.astype(int), 0.1).astype(float), of))
    assert 1.0 <= np.median(effects) < 1.2
    assert design_effect(np.zeros(BLOCKS), np.ones(BLOCKS)) == 1.0
    # All of it in one part: the whole is one observation among the parts.
    at_once = np.array([100.0] + [0.0] * (BLOCKS - 1))
    assert design_effect(at_once, np.full(BLOCKS, 100.0)) > 80


def test_rates_that_do_not_differ_are_told_apart_one_time_in_twenty() -> None:
    rng = np.random.default_rng(4)

    def drawn(mean: float) -> Rate:
        blocks = rng.exponential(mean, BLOCKS)
        return rate(blocks.sum(), blocks, 10.0)

    same = sum(bool(drawn(1e6).apart(drawn(1e6))) for _ in range(DRAWS))
    other = sum(bool(drawn(1e6).apart(drawn(4e6))) for _ in range(DRAWS))
    assert same < 0.08 * DRAWS
    assert other > 0.95 * DRAWS


def test_one_burst_is_within_noise() -> None:
    """What happened once in a capture may as well not have happened."""
    burst = np.zeros(BLOCKS)
    burst[7] = 1e9
    assert rate(1e9, burst, 10.0).apart(rate(0, np.zeros(BLOCKS), 10.0)) is False


def test_rates_whose_rows_are_missing_are_not_compared() -> None:
    known = rate(5e6, np.full(BLOCKS, 1e5), 10.0)
    assert known == Rate(5e5, 0.0)
    for unknown in (rate(5e6, None, 10.0), rate(5e6, np.zeros(BLOCKS), 10.0), rate(1, None, 0)):
        assert unknown.error is None
        assert known.apart(unknown) is None
