"""The application's own latency, from the Prometheus or OpenMetrics endpoint that it has.

A classic histogram counts since the process began: what is of the last seconds is the difference
of two scrapes, bucket by bucket, of all series together. A percentile is then as good as the
buckets are: between two bounds it is interpolated on a straight line, as Prometheus's
histogram_quantile() does, and above the highest finite bound nothing is known but that bound. A
summary has its quantile worked out by the application, over a window of its own choice.
"""

from __future__ import annotations

import bisect
import itertools
import math
import re
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self

from latrace.analysis import words
from latrace.tracer.errors import UsageError

from .fetch import Fetch, Fetcher, Url

MAX_PAGE: Final = 16 << 20
TIMEOUT_S: Final = 5.0
EVERY_S: Final = 1.0
SLOWEST_S: Final = 10.0
"""From one try to the next, at an endpoint that does not answer."""
DEAREST_S: Final = 600.0
"""The same where each try takes much CPU time."""
MAX_SHARE: Final = 0.005
"""Of a CPU: a page that takes longer to read is read less often, within half of the window."""
MAX_READINGS: Final = 512
MAX_BUCKETS: Final = 1000

_NAME: Final = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*", re.ASCII)
_LABEL: Final = re.compile(
    r"\s*([a-zA-Z_][a-zA-Z0-9_]*)\s*=\s*\"((?:[^\"\\\n]|\\[\\\"n])*)\"\s*(?:,|(?=\}))", re.ASCII
)
_ESCAPES: Final = {"\\\\": "\\", '\\"': '"', "\\n": "\n"}
_PARTS: Final = ("_bucket", "_count", "_sum")


# --- what is asked for -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One quantile of one metric: of all its series that have these labels."""

    name: str
    labels: Mapping[str, str] = field(default_factory=dict)
    quantile: float = 0.99

    def __str__(self) -> str:
        if not self.labels:
            return self.name
        quoted = (f'{key}="{_quote(value)}"' for key, value in self.labels.items())
        return f"{self.name}{{{','.join(quoted)}}}"


def parse_metric(text: str, quantile: float = 0.99, option: str = "--metric") -> MetricSpec:
    """Read `name` or `name{label="value",...}`, as it stands in a page of metrics.

    Raises UsageError when it is neither, or `quantile` is not between 0 and 1.
    """

    def wrong(why: str) -> UsageError:
        shown = words.fit(words.visible(text), 100)
        return UsageError(
            f"{option} {shown}: {why}",
            hint=f"such as {option} 'http_request_duration_seconds{{handler=\"/x\"}}'",
        )

    if not 0 < quantile < 1:
        raise UsageError(
            f"--quantile {quantile:g} is not between 0 and 1", hint="0.99 is the 99th percentile"
        )
    head = _NAME.match(text)
    if head is None:
        raise wrong("is no name of a metric")
    name, labels, rest = head[0], {}, text[head.end() :]
    if rest:
        if rest[0] != "{" or rest[-1] != "}":
            raise wrong("is no name of a metric, with labels or without")
        at = 1
        while rest[at:].strip() != "}":
            label = _LABEL.match(rest, at)
            if label is None:
                raise wrong('labels are compared as a whole: label="value", separated by commas')
            if label[1] in ("le", "quantile"):
                raise wrong(f"all of its buckets or quantiles are needed, not a chosen {label[1]}")
            if label[1] in labels:
                raise wrong(f"the label {label[1]} stands there twice")
            labels[label[1]] = re.sub(r"\\.", lambda match: _ESCAPES[match[0]], label[2])
            at = label.end()
    for part in _PARTS:
        if name.endswith(part):
            raise wrong(f"give the name of the whole: {name.removesuffix(part)}")
    if len(text) > 1000:
        raise wrong("longer than 1,000 characters")
    return MetricSpec(name, labels, quantile)


def _quote(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


# --- quantiles of a window ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reading:
    """A metric as it was at one moment."""

    bounds: tuple[float, ...] = ()
    """Of a histogram: upper bounds, ascending, the last one infinite. Empty: a summary."""
    counts: tuple[float, ...] = ()
    """Values so far that are at most as large as each bound."""
    value: float | None = None
    """Of a summary: the quantile, the largest of all series; None where there are no values."""
    count: float = 0.0
    """Values so far."""


def parse_reading(told: Mapping[str, Any]) -> Reading:
    """Check what the child says that it read. Raises ValueError."""
    if told.get("kind") == "summary":
        value = told.get("value")
        return Reading(value=None if value is None else _number(value), count=_count(told["count"]))
    if told.get("kind") != "histogram":
        raise ValueError("neither a histogram nor a summary")
    bounds, counts = told.get("bounds"), told.get("counts")
    if not isinstance(bounds, list) or not isinstance(counts, list):
        raise ValueError("no buckets")
    if not 2 <= len(bounds) == len(counts) <= MAX_BUCKETS:
        raise ValueError("not as many counts as buckets")
    finite = [_number(bound) for bound in bounds[:-1]]
    if bounds[-1] != math.inf or any(a >= b for a, b in itertools.pairwise(finite)):
        raise ValueError("buckets out of order")
    checked = tuple(_count(count) for count in counts)
    return Reading(bounds=(*finite, math.inf), counts=checked, count=checked[-1])


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("no number")
    return float(value)


def _count(value: object) -> float:
    count = _number(value)
    if count < 0:
        raise ValueError("counts less than nothing")
    return count


def histogram_quantile(
    quantile: float, bounds: Sequence[float], counts: Sequence[float]
) -> float | None:
    """Estimate a quantile (above 0, below 1) as Prometheus does; None of no values at all.

    `bounds` ascend and end with infinity; `counts` are of values up to each. Between two bounds
    values are taken as spread evenly, the lowest bucket of positive ones as beginning at 0; in the
    highest one the answer is the highest finite bound: at least so much.

    promql/quantile.go, bucketQuantile() (with its ensureMonotonicAndIgnoreSmallDeltas()).
    """
    rising = list(itertools.accumulate(counts, max))
    if rising[-1] <= 0:
        return None
    rank = quantile * rising[-1]
    at = bisect.bisect_left(rising, rank, hi=len(rising) - 1)
    if at == len(rising) - 1:
        return bounds[-2]
    if at == 0 and bounds[0] <= 0:
        return bounds[0]
    low, below = (bounds[at - 1], rising[at - 1]) if at else (0.0, 0.0)
    return low + (bounds[at] - low) * (rank - below) / (rising[at] - below)


class AppLatency:
    """The quantile of one metric over a sliding window; memory does not grow.

    What counted less than before was started anew, and so is the window: the counts of before and
    after are not comparable. (A restart that has overtaken all old counts between two scrapes
    would not be seen; a second is too short for that.) The same where buckets change, and where
    nothing came for longer than the window.
    """

    def __init__(self, spec: MetricSpec, window_s: float) -> None:
        self._spec = spec
        self._window_s = window_s
        self._readings: deque[tuple[float, Reading]] = deque()

    def add(self, reading: Reading, at_s: float) -> None:
        """Take in what was read at a time, in seconds of whatever clock does not go back."""
        kept = self._readings
        if kept and (self._began_anew(kept[-1][1], reading) or at_s - kept[-1][0] > self._window_s):
            kept.clear()
        # So many are enough, however often they come.
        if len(kept) > 1 and at_s - kept[-2][0] < self._window_s / MAX_READINGS:
            kept.pop()
        kept.append((at_s, reading))
        # The one to compare with is the last from before the window.
        while len(kept) > 2 and kept[1][0] <= at_s - self._window_s:
            kept.popleft()

    @staticmethod
    def _began_anew(before: Reading, after: Reading) -> bool:
        return (
            before.bounds != after.bounds
            or after.count < before.count
            or any(new < old for old, new in zip(before.counts, after.counts, strict=True))
        )

    def quantile(self) -> tuple[float, int] | None:
        """The quantile in the metric's own unit, and of how many values; None: of none.

        Of a summary it is the application's last word, and the values are those of our window.
        """
        if not self._readings:
            return None
        newest, oldest = self._readings[-1][1], self._readings[0][1]
        count = round(newest.count - oldest.count)
        if not newest.bounds:
            return None if newest.value is None else (newest.value, count)
        counts = [new - old for old, new in zip(oldest.counts, newest.counts, strict=True)]
        value = histogram_quantile(self._spec.quantile, newest.bounds, counts)
        return None if value is None else (value, count)

    @property
    def covers_s(self) -> float:
        """From the reading that is compared with to the newest, in seconds; 0: there is but one."""
        return self._readings[-1][0] - self._readings[0][0] if self._readings else 0.0


# --- the endpoint ------------------------------------------------------------------------------


class Metrics:
    """Scrapes an endpoint of process `pid` now and then; `step` never waits.

    `trouble` is one line while the endpoint does not give what is asked for, else None; whoever
    tells the user looks for its changes. Raises what `Fetcher` does.
    """

    def __init__(
        self, url: Url, spec: MetricSpec, pid: int, *, window_s: float, every_s: float = EVERY_S
    ) -> None:
        self.url = url
        self.spec = spec
        self.latency = AppLatency(spec, window_s)
        self.trouble: str | None = None
        self.scrapes = 0
        """That gave a reading."""
        self._fetcher = Fetcher(pid)
        self._fetcher.start()
        self._every_s = self._pause_s = min(every_s, window_s / 2)
        self._longest_s = max(window_s / 2, self._every_s)
        self._due_s = 0.0
        self._asked_s = 0.0
        self._shown = words.fit(str(url), 100)
        self._fetch: Fetch | None = None
        self._bounds: tuple[float, ...] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """What becomes readable when `step` has something to do; -1: nothing is under way."""
        return self._fetcher.fileno()

    @property
    def due_s(self) -> float:
        """When `step` is to be called next at the latest, on CLOCK_MONOTONIC."""
        return self._due_s if self._fetch is None else self._asked_s + TIMEOUT_S

    def step(self, now_s: float | None = None) -> bool:
        """Take what has come, ask when it is time; True: `latency` has a new reading.

        `now_s` is of CLOCK_MONOTONIC. Without a new reading the quantile is of the last one.
        """
        now_s = time.monotonic() if now_s is None else now_s
        self._fetcher.poll()
        fetch, news = self._fetch, False
        if fetch is not None and fetch.done:
            self._fetch = None
            news = self._take(fetch)
            self._due_s = (self._asked_s if news else now_s) + self._pause_s
        if self._fetch is None and now_s >= self._due_s:
            self._asked_s = now_s
            self._fetch = self._fetcher.submit(
                self.url,
                timeout_s=TIMEOUT_S,
                max_bytes=MAX_PAGE,
                metric={
                    "name": self.spec.name,
                    "labels": dict(self.spec.labels),
                    "quantile": self.spec.quantile,
                },
            )
        return news

    def close(self) -> None:
        """End the child."""
        self._fetcher.close()

    def _take(self, fetch: Fetch) -> bool:
        try:
            reading = None if fetch.error else parse_reading(fetch.reading or {})
        except (ValueError, KeyError, TypeError) as error:
            fetch.error = f"was not read as it should be: {error}"
            reading = None
        if reading is None:
            self.trouble = f"{self._shown} {fetch.error}"
            if fetch.cpu_s:
                costly_s = fetch.cpu_s / MAX_SHARE
            else:  # the child died of it, or had to be ended: who knows what it used
                costly_s = max(2 * self._pause_s, 2 * SLOWEST_S)
            self._pause_s = max(min(2 * self._pause_s, SLOWEST_S), min(costly_s, DEAREST_S))
            return False
        changed = self._bounds is not None and reading.bounds != self._bounds
        self._bounds = reading.bounds
        self.trouble = None
        if changed:
            name = self.spec.name
            self.trouble = f"{self._shown} has other buckets of {name} now: counting begins anew"
        # A summary's quantile is of now, whenever that is; counts are of when they were asked for.
        self.latency.add(reading, self._asked_s)
        self._pause_s = min(max(self._every_s, fetch.cpu_s / MAX_SHARE), self._longest_s)
        self.scrapes += 1
        return True
