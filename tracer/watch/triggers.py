"""When a watch fires: rules over what the probes count, looked at some five times a second.

The probes' histograms only ever grow. A rule sees the growth over the last `--window`, as the
difference between now and the newest look that is at least so old. Nothing here grows with time:
of a window, a few dozen looks are kept.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np

from latrace.analysis.histogram import Counts, bounds, count_over, empty, quantile, slot_of

HALF_LIFE_S: Final = 600.0
"""After so long, a moment counts half in what is usual."""
LEAST_SLOW: Final = 3
"""A percentile above its limit is a spike if at least so many values are."""

_LOOKS: Final = 50
"""A window is known to a fiftieth of its length."""
_USUAL_AFTER: Final = 10
"""A baseline is one when it has seen so many times the least number of values."""
_LEARN_EVERY_NS: Final = 1_000_000_000
_NO_MAXIMUM: Final = 2**64 - 1
_CHANCE: Final = 1e-8
"""Looks at which chance alone may make a ratio fire: one in many weeks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Firing:
    """Why a watch fired: an entry of spike.json's `triggers`."""

    rule: str
    """As it was typed: `--p99 10ms`."""
    kind: str
    """wait, sleep, max, retransmits, metric or manual."""
    value: float | None = None
    threshold: float | None = None
    unit: str = ""
    """Of value, threshold and baseline: ns, s, segments, or none."""
    count: int = 0
    """How many values the window had; 0 where that means nothing."""
    baseline: float | None = None
    """What is usual, where the rule compares with that."""
    since_ns: int
    until_ns: int
    """The window that the rule looked at, CLOCK_MONOTONIC."""
    reason: str = ""
    """Of a trigger by hand."""

    def document(self) -> dict[str, Any]:
        """As spike.json has it."""
        return {name: getattr(self, name) for name in self.__slots__}


Histograms = Mapping[str, Counts]
"""All waits (`wait`) and how late all sleep calls came back (`sleep`) since the start."""


class Rule(Protocol):
    """Looks at each tick, and fires or does not."""

    rule: str

    def look(self, now_ns: int, counts: Histograms) -> Firing | None:
        """Tell whether it fires at `now_ns` (CLOCK_MONOTONIC)."""

    def spike(self, now_ns: int, counts: Histograms) -> None:
        """Take note that a bundle is being made: this is not what is usual."""

    def rearm(self, now_ns: int, counts: Histograms) -> None:
        """Begin anew: what is in the window now has had its bundle."""

    def state(self) -> str:
        """Where it stands, in a few words: `P99 1.2 ms of 10 ms`."""


@dataclass(slots=True)
class Window:
    """The growth of a histogram over the last `length_s`."""

    length_s: float
    _looks: deque[tuple[int, Counts]] = field(default_factory=deque)

    def add(self, now_ns: int, counts: Counts) -> None:
        """Take the histogram as it is now; it is kept, not copied."""
        length_ns = int(self.length_s * 1e9)
        if len(self._looks) > 1 and now_ns - self._looks[-2][0] < length_ns // _LOOKS:
            self._looks[-1] = (now_ns, counts)
        else:
            self._looks.append((now_ns, counts))
        # One is kept that is older than the window: the growth is counted from it.
        while len(self._looks) > 2 and self._looks[1][0] <= now_ns - length_ns:
            self._looks.popleft()

    @property
    def since_ns(self) -> int:
        """When the growth is counted from."""
        return self._looks[0][0]

    @property
    def before(self) -> Counts:
        """The histogram as it was then."""
        return self._looks[0][1]

    def growth(self) -> Counts:
        """The values of the window, shape (SLOTS,)."""
        return self._looks[-1][1] - self._looks[0][1] if self._looks else empty()

    def begin(self, now_ns: int, counts: Counts) -> None:
        """Forget what was; the window begins now."""
        self._looks.clear()
        self._looks.append((now_ns, counts))


@dataclass(slots=True)
class Baseline:
    """What is usual: a histogram in which the past fades."""

    half_life_s: float = HALF_LIFE_S
    _counts: Any = None
    _last: tuple[int, Counts] | None = None

    def add(self, now_ns: int, counts: Counts) -> None:
        """Learn the growth since the last call."""
        if self._last is not None:
            then_ns, before = self._last
            faded = 0.5 ** ((now_ns - then_ns) / 1e9 / self.half_life_s)
            grown = (counts - before).astype(np.float64)
            self._counts = grown if self._counts is None else self._counts * faded + grown
        self._last = now_ns, counts

    def skip(self, now_ns: int, counts: Counts) -> None:
        """Leave out the growth since the last call: it was a spike."""
        self._last = now_ns, counts

    def quantile(self, fraction: float, at_least: int) -> int | None:
        """The usual quantile in ns; None as long as too little is known."""
        if self._counts is None or self._counts.sum() < at_least:
            return None
        # Of values that have faded, fractions remain.
        return quantile((self._counts * 1024).astype(np.uint64), fraction, max_ns=_NO_MAXIMUM)

    def explains(self, seen: Counts, limit_ns: int) -> bool:
        """Whether chance may well have put so many of the values `seen` above `limit_ns`.

        Few values of a wide distribution have a high percentile now and then. By Chernoff's bound
        for the tail of a Poisson distribution, taken as its logarithm.
        """
        number, above = int(seen.sum()), count_over(seen, limit_ns)
        # One more than were seen: what has never been may still be usual.
        expected = number * (count_over(self._counts, limit_ns) + 1) / (self._counts.sum() + 1)
        if above <= expected:
            return True
        return bool(above - expected - above * math.log(above / expected) > math.log(_CHANCE))


@dataclass(slots=True, kw_only=True)
class Percentile:
    """A percentile of the window above a value (`above_ns`), or above `ratio` times the usual."""

    rule: str
    kind: str
    """wait or sleep."""
    fraction: float
    window_s: float
    least: int
    """With fewer values in the window there is no percentile."""
    above_ns: int | None = None
    ratio: float | None = None
    floor_ns: int = 0
    """With a ratio: below this nothing is a spike."""
    half_life_s: float = HALF_LIFE_S
    _window: Window = field(init=False)
    _baseline: Baseline = field(init=False)
    _learnt_ns: int = 0
    _value: int | None = None
    _limit: int | None = None

    def __post_init__(self) -> None:
        self._window = Window(self.window_s)
        self._baseline = Baseline(self.half_life_s)

    def look(self, now_ns: int, histograms: Histograms) -> Firing | None:
        """Tell whether it fires."""
        counts = histograms[self.kind]
        self._window.add(now_ns, counts)
        usual = self._usual(now_ns)
        self._limit = self.above_ns if self.ratio is None else None
        if self.ratio is not None and usual is not None:
            self._limit = max(self.floor_ns, int(self.ratio * usual))
        seen = self._window.growth()
        number = int(seen.sum())
        self._value = None
        if number < self.least:
            return None
        self._value = quantile(seen, self.fraction, max_ns=_NO_MAXIMUM)
        if self._limit is None or self._value <= self._limit:
            return None
        if count_over(seen, self._limit) < LEAST_SLOW:
            return None
        if self.ratio is not None and self._baseline.explains(seen, self._limit):
            return None
        return Firing(
            rule=self.rule,
            kind=self.kind,
            value=self._value,
            threshold=self._limit,
            unit="ns",
            count=number,
            baseline=usual,
            since_ns=self._window.since_ns,
            until_ns=now_ns,
        )

    def _usual(self, now_ns: int) -> int | None:
        if self.ratio is None:
            return None
        # What is in the window is judged by what was before it.
        if now_ns - self._learnt_ns >= _LEARN_EVERY_NS:
            self._baseline.add(self._window.since_ns, self._window.before)
            self._learnt_ns = now_ns
        return self._baseline.quantile(self.fraction, _USUAL_AFTER * self.least)

    def spike(self, now_ns: int, histograms: Histograms) -> None:
        """Do not learn from what happens now."""
        counts = histograms[self.kind]
        self._baseline.skip(now_ns, counts)
        self._window.add(now_ns, counts)

    def rearm(self, now_ns: int, histograms: Histograms) -> None:
        """Begin the window anew."""
        self._window.begin(now_ns, histograms[self.kind])

    def state(self) -> str:
        """Tell the percentile and its limit."""
        from latrace.analysis.words import duration  # noqa: PLC0415 - the rules need no words

        what = f"P{self.fraction * 100:g}"
        name = what if self.kind == "wait" else f"{what} of lateness"
        value = "-" if self._value is None else duration(self._value)
        limit = "learning" if self._limit is None else duration(self._limit)
        return f"{name} {value} of {limit}"


@dataclass(slots=True, kw_only=True)
class Longest:
    """One value above `above_ns`.

    The histogram tells of all that lie in a bucket above; of the bucket that holds the limit, the
    rows do (`note`).
    """

    rule: str
    kind: str
    """max (of waits) or sleep."""
    above_ns: int
    _slot: int = field(init=False)
    _before: Counts | None = None
    _before_ns: int = 0
    _noted_ns: int = 0

    def __post_init__(self) -> None:
        (self._slot,) = slot_of([self.above_ns])

    def note(self, longest_ns: int) -> None:
        """Take the longest of some rows."""
        self._noted_ns = max(self._noted_ns, longest_ns)

    def look(self, now_ns: int, histograms: Histograms) -> Firing | None:
        """Tell whether one came since the last look."""
        counts = self._counts(histograms)
        value = self._noted_ns if self._noted_ns > self.above_ns else 0
        since_ns, self._noted_ns = self._before_ns or now_ns, 0
        if self._before is not None and counts is not self._before:
            higher = slice(self._slot + 1, None)
            above = np.flatnonzero(counts[higher] > self._before[higher])
            if len(above):
                low, _ = bounds([self._slot + 1 + above[-1]])
                value = max(value, int(low[0]))
        self._before, self._before_ns = counts, now_ns
        if not value:
            return None
        return Firing(
            rule=self.rule,
            kind=self.kind,
            value=value,
            threshold=self.above_ns,
            unit="ns",
            since_ns=since_ns - min(value, since_ns),
            until_ns=now_ns,
        )

    def _counts(self, histograms: Histograms) -> Counts:
        return histograms["wait" if self.kind == "max" else "sleep"]

    def spike(self, now_ns: int, histograms: Histograms) -> None:
        """Keep up."""
        self.rearm(now_ns, histograms)

    def rearm(self, now_ns: int, histograms: Histograms) -> None:
        """Count from now on."""
        self._before, self._before_ns = self._counts(histograms), now_ns
        self._noted_ns = 0

    def state(self) -> str:
        """Tell the limit."""
        from latrace.analysis.words import duration  # noqa: PLC0415 - as above

        return f"{'longest' if self.kind == 'max' else 'latest'} limit {duration(self.above_ns)}"


@dataclass(slots=True, kw_only=True)
class Retransmits:
    """At least `limit` TCP segments sent again within the window."""

    rule: str
    limit: int
    window_s: float
    _seen: deque[tuple[int, int]] = field(default_factory=deque)
    _total: int = 0

    def note(self, at_ns: int, segs: int) -> None:
        """Take segments that were sent again, told at `at_ns`."""
        # Those of one moment are one entry: a flood must not fill the memory.
        if self._seen and at_ns - self._seen[-1][0] < self.window_s * 1e9 / _LOOKS:
            at_ns, before = self._seen.pop()
            segs += before
            self._total -= before
        self._seen.append((at_ns, segs))
        self._total += segs

    def look(self, now_ns: int, counts: Histograms) -> Firing | None:  # noqa: ARG002 - the same
        """Tell whether there are so many."""
        begin_ns = now_ns - int(self.window_s * 1e9)
        while self._seen and self._seen[0][0] < begin_ns:
            self._total -= self._seen.popleft()[1]
        if self._total < self.limit:
            return None
        return Firing(
            rule=self.rule,
            kind="retransmits",
            value=self._total,
            threshold=self.limit,
            unit="segments",
            since_ns=self._seen[0][0],
            until_ns=now_ns,
        )

    def spike(self, now_ns: int, counts: Histograms) -> None:
        """Go on counting."""
        self.look(now_ns, counts)

    def rearm(self, now_ns: int, counts: Histograms) -> None:  # noqa: ARG002 - as of a Rule
        """Begin the window anew."""
        self._seen.clear()
        self._total = 0

    def state(self) -> str:
        """Tell the count and its limit."""
        return f"{self._total} of {self.limit} segments sent again"
