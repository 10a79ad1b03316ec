"""Histogram slots and the sampling of stacks, as the kernel computes them."""

from __future__ import annotations

import ctypes

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from latrace.analysis import histogram

U64 = st.integers(0, 2**64 - 1) | st.integers(0, 63).map(lambda bit: 1 << bit)


@given(U64)
@example(127)
@example(128)
@example(2**64 - 1)
def test_slot_is_the_analysis_slot(probes: ctypes.CDLL, value: int) -> None:
    assert probes.slot(value) == histogram.slot_of([value])[0]


@given(st.integers(0, histogram.SLOTS - 1))
def test_slot_bounds(probes: ctypes.CDLL, slot: int) -> None:
    low, high = (int(bound[0]) for bound in histogram.bounds([slot]))
    assert probes.slot(low) == slot
    assert probes.slot(high if slot == histogram.SLOTS - 1 else high - 1) == slot
    assert high - low <= max(1, 0.03 * low)


@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.booleans())),
    st.integers(1, 10**5),
    st.integers(1, 10**6),
)
def test_no_time_is_lost_or_made(
    probes: ctypes.CDLL, intervals: list[tuple[int, bool]], period: int, slow: int
) -> None:
    """Weights handed out and what is left in the accumulator are the time that went in."""
    left, total = ctypes.c_uint64(0), 0
    for ns, may in intervals:
        weight = probes.weight(ctypes.byref(left), ns, period, slow, may)
        total += weight
        assert may or not weight
        if ns >= slow and may:
            assert weight >= ns and (weight - ns) % period == 0
    assert total + left.value == sum(ns for ns, _ in intervals)
    if all(may for _, may in intervals):
        assert left.value < period


def test_a_stacks_weight_is_its_time(probes: ctypes.CDLL) -> None:
    """Three stacks of known shares, a million waits: each gets its share within the error.

    Systematic sampling: each stack's count of periods is binomial at worst.
    """
    random = np.random.default_rng(1)
    stacks = random.choice(3, size=300_000, p=[0.5, 0.3, 0.2])
    lengths = random.exponential(np.array([2_000, 9_000, 30_000])[stacks]).astype(int)
    period, acc = 200_000, ctypes.c_uint64(0)
    weights = np.zeros(3)
    for stack, ns in zip(stacks.tolist(), lengths.tolist(), strict=True):
        weights[stack] += probes.weight(ctypes.byref(acc), ns, period, 2**63, 1)
    true = np.bincount(stacks, lengths)
    samples = true.sum() / period
    share = true / true.sum()
    error = 4 * np.sqrt(share * (1 - share) / samples)
    assert (np.abs(weights / weights.sum() - share) < error).all()
