"""The join of waits and sleep calls, against a look at every pair."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from latrace.analysis.sleeps import sleep_of_waits


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[tuple[int, int, int]], list[tuple[int, int]]]:
    """Sleep calls (tid, enter, exit) that do not overlap in a thread, and waits (tid, run)."""
    calls = []
    for tid in draw(st.lists(st.integers(1, 9), unique=True, max_size=4)):
        now = 100
        for gap, length in draw(
            st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), max_size=5)
        ):
            calls.append((tid, now + gap, now + gap + length))
            now += gap + length
    waits = draw(st.lists(st.tuples(st.integers(0, 10), st.integers(90, 260)), max_size=30))
    return draw(st.permutations(calls)), waits


@given(histories())
def test_each_wait_is_in_the_call_around_its_end(
    history: tuple[list[tuple[int, int, int]], list[tuple[int, int]]],
) -> None:
    calls, waits = history
    sleep_tid, enter, exits = np.array(calls, np.int64).reshape(-1, 3).T
    wait_tid, run = np.array(waits, np.int64).reshape(-1, 2).T
    found = sleep_of_waits(
        wait_tid.astype(np.int32),
        run.astype(np.uint64),
        sleep_tid.astype(np.int32),
        enter.astype(np.uint64),
        exits.astype(np.uint64),
    )
    for (tid, end), row in zip(waits, found.tolist(), strict=True):
        around = [
            number
            for number, (owner, begin, back) in enumerate(calls)
            if owner == tid and begin < end <= back
        ]
        assert [row] == (around or [-1])
