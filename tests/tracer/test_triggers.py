"""The rules of a watch: what fires, what does not, and what is learnt."""

from __future__ import annotations

import numpy as np
import pytest

from latrace.analysis.histogram import Counts, empty, slot_of
from latrace.tracer.errors import UsageError
from latrace.tracer.watch.rules import make_rules
from latrace.tracer.watch.triggers import (
    Baseline,
    Firing,
    Histograms,
    Longest,
    Percentile,
    Retransmits,
    Rule,
    Window,
)

MS = 1_000_000
S = 1_000_000_000


class Clock:
    """Plays waits and sleep calls to a rule, tick by tick."""

    def __init__(self, *rules: Rule, tick_ns: int = S // 10) -> None:
        self.rules = rules
        self.tick_ns = tick_ns
        self.now_ns = 1000 * S
        self.counts: dict[str, Counts] = {"wait": empty(), "sleep": empty()}
        for rule in rules:
            assert rule.look(self.now_ns, self.histograms()) is None

    def histograms(self) -> Histograms:
        return {name: counts.copy() for name, counts in self.counts.items()}

    def add(self, *values_ns: int, kind: str = "wait") -> None:
        np.add.at(self.counts[kind], slot_of(list(values_ns)), np.uint64(1))

    def tick(self) -> list[Firing]:
        self.now_ns += self.tick_ns
        counts = self.histograms()
        return [found for rule in self.rules if (found := rule.look(self.now_ns, counts))]

    def run(self, seconds: float, *values_ns: int, kind: str = "wait") -> list[Firing]:
        """The same values in each tick; all that fired."""
        fired = []
        for _ in range(round(seconds * S / self.tick_ns)):
            self.add(*values_ns, kind=kind)
            fired += self.tick()
        return fired


def p99(**fields: object) -> Percentile:
    usual = {"rule": "--p99 10ms", "kind": "wait", "fraction": 0.99, "window_s": 5.0, "least": 100}
    return Percentile(**{**usual, "above_ns": 10 * MS, **fields})  # type: ignore[arg-type]


def test_a_percentile_fires_when_enough_values_are_above() -> None:
    clock = Clock(p99())
    assert clock.run(6, *[MS] * 20) == []
    clock.add(*[20 * MS] * 11)  # of 991 in the window: more than one in a hundred
    (firing,) = clock.tick()
    assert firing.rule == "--p99 10ms"
    assert firing.unit == "ns"
    assert firing.value is not None
    assert 20 * MS <= firing.value <= 20.4 * MS
    assert firing.threshold == 10 * MS
    assert firing.count == 991
    assert firing.since_ns == clock.now_ns - 5 * S
    assert firing.until_ns == clock.now_ns


def test_one_in_a_hundred_is_not_above_it() -> None:
    clock = Clock(p99())
    clock.run(6, *[MS] * 20)
    clock.add(*[20 * MS] * 9)
    assert clock.tick() == []


def test_three_samples_are_no_percentile() -> None:
    clock = Clock(p99())
    assert clock.run(20, 50 * MS) == []  # ten a second: fifty in the window
    clock = Clock(p99(least=10))
    assert clock.run(0.2, 50 * MS, *[MS] * 10) == []  # two of twenty-two are above
    assert len(clock.run(0.1, 50 * MS)) == 1


def test_the_window_slides() -> None:
    clock = Clock(p99())
    clock.add(*[20 * MS] * 200)
    assert clock.tick()
    assert clock.run(4.5, *[MS] * 1000)  # 45 000 fast ones by and by: not one in a hundred at last
    assert clock.run(1, *[MS] * 20) == []
    clock.rules[0].rearm(clock.now_ns, clock.histograms())
    assert clock.run(1, *[MS] * 200) == []


def test_after_rearming_what_was_there_is_not_seen_again() -> None:
    clock = Clock(p99())
    clock.add(*[20 * MS] * 200)
    assert clock.tick()
    clock.rules[0].rearm(clock.now_ns, clock.histograms())
    assert clock.run(5, *[MS] * 20) == []


def test_a_ratio_learns_what_is_usual_first() -> None:
    clock = Clock(p99(rule="--p99-ratio 3", above_ns=None, ratio=3.0, floor_ns=MS))
    assert clock.rules[0].state() == "P99 - of learning"
    assert clock.run(3, *[50 * MS] * 20) == []  # whatever it is: nothing is known
    assert clock.run(20, *[2 * MS] * 20) == []
    (firing, *_) = clock.run(2, *[2 * MS] * 10, *[400 * MS] * 10)
    assert firing.baseline is not None
    assert firing.threshold == 3 * firing.baseline


def test_a_ratio_has_a_floor() -> None:
    rule = p99(rule="--p99-ratio 3", above_ns=None, ratio=3.0, floor_ns=10 * MS)
    clock = Clock(rule)
    clock.run(20, *[20_000] * 20)
    assert clock.run(0.1, *[5 * MS] * 20) == []
    (firing,) = clock.run(0.1, *[11 * MS] * 20)
    assert firing.threshold == 10 * MS


@pytest.mark.parametrize("per_s", [30, 100, 1000])
def test_an_hour_of_what_is_usual_and_then_a_spike(per_s: int) -> None:
    """However wide the distribution: of few values one in a hundred is high by chance."""
    clock = Clock(p99(above_ns=None, ratio=3.0), tick_ns=S // 2)
    random = np.random.default_rng(1)
    for _ in range(2 * 3600):
        waits = random.lognormal(np.log(50_000), 2.0, random.poisson(per_s / 2))
        clock.add(*waits.astype(np.int64))
        assert clock.tick() == []
    clock.add(*[100 * MS] * max(10, per_s // 8))
    (firing,) = clock.tick()
    assert firing.baseline is not None and firing.value is not None
    assert firing.value > 3 * firing.baseline


def test_what_a_bundle_is_made_of_is_not_learnt_and_what_stays_is() -> None:
    rule = p99(rule="--p99-ratio 3", above_ns=None, ratio=3.0, floor_ns=MS)
    clock = Clock(rule)
    clock.run(30, *[MS] * 20)
    for _ in range(50):
        clock.add(*[30 * MS] * 20)
        clock.now_ns += clock.tick_ns
        rule.spike(clock.now_ns, clock.histograms())
    rule.rearm(clock.now_ns, clock.histograms())
    (firing, *_) = clock.run(1, *[30 * MS] * 20)
    assert firing.baseline is not None
    assert firing.baseline < 1.02 * MS
    clock.run(30, *[30 * MS] * 20)  # it goes on like that: then that is usual
    assert clock.run(1, *[30 * MS] * 20) == []


def test_the_past_fades() -> None:
    baseline = Baseline(half_life_s=10)
    counts = empty()
    baseline.add(0, counts.copy())
    np.add.at(counts, slot_of([100 * MS] * 1000), np.uint64(1))
    baseline.add(S, counts.copy())
    assert (baseline.quantile(0.5, 100) or 0) >= 100 * MS
    for second in range(2, 60):
        np.add.at(counts, slot_of([MS] * 100), np.uint64(1))
        baseline.add(second * S, counts.copy())
    assert (baseline.quantile(0.5, 100) or 0) < 1.02 * MS
    assert baseline.quantile(0.5, 10**6) is None


def test_a_window_keeps_few_looks() -> None:
    window = Window(5.0)
    for tick in range(10_000):
        window.add(tick * S // 100, empty())
    assert len(window._looks) < 60


def test_lateness_of_sleep_calls() -> None:
    clock = Clock(p99(rule="--p99 sleep=10ms", kind="sleep"))
    assert clock.run(2, *[50 * MS] * 20) == []
    (firing, *_) = clock.run(1, *[50 * MS] * 20, kind="sleep")
    assert firing.kind == "sleep"


def test_a_single_long_wait() -> None:
    rule = Longest(rule="--max 50ms", kind="max", above_ns=50 * MS)
    clock = Clock(rule)
    assert clock.run(1, *[49 * MS] * 10) == []
    clock.add(70 * MS)
    (firing,) = clock.tick()
    assert firing.value is not None
    assert 68 * MS < firing.value <= 70 * MS
    assert firing.since_ns <= clock.now_ns - 68 * MS
    assert clock.tick() == []
    # In the bucket that holds the limit, the rows decide.
    (slot,) = slot_of([50 * MS])
    clock.add(50 * MS + 1)
    assert slot_of([50 * MS + 1]) == slot
    assert clock.tick() == []
    rule.note(50 * MS)
    assert clock.tick() == []
    rule.note(50 * MS + 1)
    (firing,) = clock.tick()
    assert firing.value == 50 * MS + 1


def test_segments_sent_again_within_the_window() -> None:
    rule = Retransmits(rule="--retransmits 10", limit=10, window_s=5)
    clock = Clock(rule)
    for _ in range(9):
        rule.note(clock.now_ns, 1)
        assert clock.run(1) == []  # never ten within five seconds
    rule.note(clock.now_ns, 6)
    (firing, *_) = clock.run(0.1)
    assert (firing.value, firing.threshold, firing.unit) == (10, 10, "segments")
    rule.rearm(clock.now_ns, clock.histograms())
    assert clock.run(1) == []
    for number in range(100_000):
        rule.note(clock.now_ns + number, 1)
    assert len(rule._seen) < 60


def test_rules_from_words() -> None:
    rules = make_rules(
        percentiles={"p50": ["1ms"], "p99": ["10ms", "sleep=5ms"], "p999": []},
        ratios=["3"],
        longest=["sleep=50ms", "40ms"],
        retransmits=7,
        window_s=5,
        least=100,
        floor_ns=MS,
    )
    assert [rule.rule for rule in rules] == [
        "--p50 1ms",
        "--p99 10ms",
        "--p99 sleep=5ms",
        "--p99-ratio 3",
        "--max sleep=50ms",
        "--max 40ms",
        "--retransmits 7",
    ]
    kinds = [getattr(rule, "kind", "") for rule in rules]
    assert kinds == ["wait", "wait", "sleep", "wait", "sleep", "max", ""]


@pytest.mark.parametrize(
    ("percentiles", "ratios", "longest"),
    [
        ({"p99": ["10"]}, [], []),
        ({"p99": ["io=10ms"]}, [], []),
        ({"p99": ["sleep="]}, [], []),
        ({}, ["1"], []),
        ({}, ["nan"], []),
        ({}, ["three"], []),
        ({}, [], ["-5ms"]),
    ],
)
def test_words_that_are_no_rule(
    percentiles: dict[str, list[str]], ratios: list[str], longest: list[str]
) -> None:
    with pytest.raises(UsageError) as caught:
        make_rules(
            percentiles=percentiles,
            ratios=ratios,
            longest=longest,
            retransmits=None,
            window_s=5,
            least=100,
            floor_ns=0,
        )
    assert caught.value.hint
