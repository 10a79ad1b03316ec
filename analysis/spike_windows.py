"""When the spike was: the stretch of time that made a rule fire, and the one before it.

A rule looks at a window of its own, such as the last five seconds; mostly the spike is a part of
that. Where the rule has a limit in time (waits, sleep calls), the spike is made of what was slow,
that is over the limit:

- What is slow is put together into bursts. A burst ends where nothing slow was under way for
  `QUIET_NS` although something was measured meanwhile, or for `SILENT_NS` whatever was measured.
- A percentile lets some be slow: of a P99, one in a hundred. Of each burst only that stretch is
  kept that has most slow ones beyond that share, so that a bad moment is found among slow waits
  that are usual.
- It lasts from when its first slow wait began to when its last one ended. Of a sleep call that is
  from its deadline on.
- Of several bursts that ended after the rule began to look and began before it fired, the one with
  most slow time is the spike, if it has a third of the slow time of them all. Otherwise no one
  stands out: the spike lasts from the first to the last that is there. What came later did not make
  the rule fire, but is told of where it was worse.

Lost TCP segments make bursts in the same way, each loss from when something was missing to the
last retransmit, or to the end of the last wait that it lengthened. What a metric or a person fired
for is not known more exactly than by the rule's own window.

A wait belongs to the window that it ended in, wherever it began: so does all that is counted by
waits. The baseline is what lies before the spike in the bundle, up to the first burst that has at
least a fifth of the spike's slow time: no wait that made the spike ended in it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from latrace.analysis.capture import Capture
from latrace.analysis.chunks import chunks, numbers, present
from latrace.analysis.retransmits import read_retransmits
from latrace.analysis.selection import Selection
from latrace.analysis.spike_file import Spike, Trigger

QUIET_NS: Final = 250_000_000
"""Longer than the period of a CPU quota: a group that is stopped in each period is one burst."""
SILENT_NS: Final = 2_000_000_000
LEAST_BASELINE_NS: Final = 200_000_000

_LOSSES_APART_NS = 1_000_000_000  # a timeout that follows on another waits longer
_STANDS_OUT = 1 / 3
_NOTABLE = 1 / 5
_BUCKET = 64  # a live percentile is the upper end of a bucket that is 1/64 wide
_PERCENTILE = re.compile(r"p(\d{2,4})(?!\d)")

Times = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of time, CLOCK_MONOTONIC; its end is not part of it."""

    start_ns: int
    end_ns: int

    @property
    def seconds(self) -> float:
        """How long it is."""
        return (self.end_ns - self.start_ns) / 1e9

    def selection(self, capture: Capture, *, over_ns: int | None = None) -> Selection:
        """Choose what ended in it."""
        began = capture.manifest.get("start_ns")
        began = began if isinstance(began, int) else 0
        return Selection(
            since_ns=max(0, self.start_ns - began),
            until_ns=max(0, self.end_ns - began),
            over_ns=over_ns,
        )

    def overlap_ns(self, begin_ns: Times, end_ns: Times) -> Times:
        """Tell how much of each stretch lies in it, shape (stretches,)."""
        begin, end = np.maximum(begin_ns, self.start_ns), np.minimum(end_ns, self.end_ns)
        inside: Times = np.maximum(end - begin, 0)
        return inside


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """The spike, and what was before it."""

    spike: Window
    baseline: Window | None
    no_baseline: str = ""
    """Why there is none."""
    over_ns: int | None = None
    """Above this a wait or the lateness of a sleep call is slow; None: there is no such limit."""
    slow: int = 0
    """How many slow ones made the spike."""
    bursts: int = 0
    """How many bursts ended since the rule began to look; 0: the rule's own window was taken."""
    all_bursts: bool = False
    """Whether the spike is all of these, as no one of several stands out."""
    later: Window | None = None
    """A burst that came after the rule had fired, and was worse."""
    ongoing: bool = False
    """Whether it was not over when the bundle ended."""


@dataclass(frozen=True, slots=True)
class _Burst:
    begin_ns: int
    end_ns: int
    slow: int
    slow_ns: int


@dataclass(frozen=True, slots=True)
class _Stretches:
    """What was measured, each from its beginning to its end, shape (measured,); by their ends."""

    begin_ns: Times
    end_ns: Times
    slow: npt.NDArray[np.bool_]


def find_windows(capture: Capture, spike: Spike) -> Windows:
    """Find the spike and its baseline. Raises CaptureError for a damaged file."""
    trigger = spike.main
    over: int | None = None
    bursts: list[_Burst] = []
    if trigger.kind == "retransmits":
        bursts = _within(_bursts_of_losses(capture), spike)
    read = _sleeps if trigger.kind == "sleep" else _waits
    for over in _limits(trigger):
        bursts = _within(_bursts(read(capture, over), allowed=_allowed(trigger)), spike)
        if bursts:
            break
    chosen = [burst for burst in bursts if burst.end_ns >= trigger.since_ns] or bursts
    if not chosen:
        window = _own_window(spike, trigger)
        baseline, why = _baseline(capture, spike, window.start_ns)
        return Windows(spike=window, baseline=baseline, no_baseline=why, over_ns=over)
    made = [burst for burst in chosen if burst.begin_ns <= trigger.until_ns] or chosen
    most = max(made, key=lambda burst: burst.slow_ns)
    worst = max(chosen, key=lambda burst: burst.slow_ns)
    series = most.slow_ns < _STANDS_OUT * sum(burst.slow_ns for burst in made)
    if series:
        most = _Burst(
            min(burst.begin_ns for burst in chosen),
            max(burst.end_ns for burst in chosen),
            sum(burst.slow for burst in chosen),
            sum(burst.slow_ns for burst in chosen),
        )
    begin = max(most.begin_ns, spike.start_ns)
    # The end of the last wait is part of it.
    window = Window(begin, max(begin, min(most.end_ns, spike.end_ns)) + 1)
    before = [
        burst.begin_ns
        for burst in bursts
        if burst.end_ns < begin and burst.slow_ns >= _NOTABLE * most.slow_ns
    ]
    baseline, why = _baseline(capture, spike, min([begin, *before]))
    if before and min(before) - spike.start_ns < LEAST_BASELINE_NS:
        why = "another spike was there when the recording begins"
    later = Window(worst.begin_ns, worst.end_ns + 1) if worst.begin_ns > most.end_ns else None
    return Windows(
        spike=window,
        baseline=baseline,
        no_baseline=why,
        over_ns=over,
        slow=most.slow,
        bursts=len(chosen),
        all_bursts=series,
        later=later,
        ongoing=most.end_ns >= spike.end_ns - QUIET_NS,
    )


def _within(bursts: list[_Burst], spike: Spike) -> list[_Burst]:
    return [one for one in bursts if one.end_ns >= spike.start_ns and one.begin_ns < spike.end_ns]


def _limits(trigger: Trigger) -> list[int]:
    """Tell above what something is slow: the rule's limit, and what to try should nothing be.

    That is the bucket below it, as a live percentile is the upper end of its bucket.
    """
    if trigger.kind not in {"wait", "max", "sleep"} or not trigger.threshold:
        return []
    limit = int(trigger.threshold)
    return [limit, max(limit - max(limit // _BUCKET, 1), 0)]


def percentile(trigger: Trigger) -> float | None:
    """Tell which percentile a rule looks at, from how it was typed: `--p999 5ms`: 0.999.

    None: at none, but at each single value.
    """
    if trigger.kind not in {"wait", "sleep"} or trigger.rule.startswith("--max"):
        return None
    found = _PERCENTILE.search(trigger.rule)
    return float(f"0.{found[1]}") if found else 0.99


def _allowed(trigger: Trigger) -> float:
    """Tell which share of all may be slow without the rule firing."""
    fraction = percentile(trigger)
    return 0.0 if fraction is None else 1 - fraction


def _own_window(spike: Spike, trigger: Trigger) -> Window:
    since, until = trigger.since_ns, min(trigger.until_ns, spike.end_ns)
    if since >= until:
        usual = spike.settings.get("window_s")
        seconds = usual if isinstance(usual, int | float) and 0 < usual < 1e6 else 1.0
        until = min(max(until, spike.start_ns + 1), spike.end_ns + 1)
        since = until - int(seconds * 1e9)
    begin = max(since, spike.start_ns)
    return Window(begin, max(until, begin) + 1)


def _baseline(capture: Capture, spike: Spike, until_ns: int) -> tuple[Window | None, str]:
    """Take what lies before the spike, if that is enough to compare with; else say why not."""
    window = Window(spike.start_ns, until_ns)
    if until_ns - spike.start_ns < LEAST_BASELINE_NS:
        return None, "the spike was already there when the recording begins"
    for table in chunks(capture, "waits", ("run_ns",)):
        run = numbers(table, "run_ns").astype(np.int64)
        if bool(((run >= window.start_ns) & (run < window.end_ns)).any()):
            return window, ""
    return None, "nothing was recorded before the spike"


# --- bursts ------------------------------------------------------------------------------------


def _waits(capture: Capture, over: int) -> _Stretches:
    begins, ends, slow = [], [], []
    for table in chunks(capture, "waits", ("run_ns", "wait_ns")):
        run, wait = _signed(numbers(table, "run_ns")), _signed(numbers(table, "wait_ns"))
        begins.append(run - np.minimum(wait, run))
        ends.append(run)
        slow.append(wait > over)
    return _joined(begins, ends, slow)


def _sleeps(capture: Capture, over: int) -> _Stretches:
    begins, ends, slow = [], [], []
    columns = ("enter_ns", "exit_ns", "deadline_ns", "overshoot_ns")
    for table in chunks(capture, "sleeps", columns):
        late = numbers(table, "overshoot_ns")
        told = present(table, "overshoot_ns")  # others were woken before their deadline
        end = _signed(numbers(table, "exit_ns"))
        due = np.maximum(numbers(table, "enter_ns"), numbers(table, "deadline_ns"))
        begins.append(np.minimum(_signed(due), end)[told])
        ends.append(end[told])
        slow.append((late > over)[told])
    return _joined(begins, ends, slow)


def _signed(values: npt.NDArray[Any]) -> Times:
    """Keep differences exact; a time that cannot be is the last one that can."""
    return np.minimum(values.astype(np.uint64), np.uint64(2**63 - 1)).astype(np.int64)


def _joined(begins: list[Times], ends: list[Times], slow: list[Any]) -> _Stretches:
    end = np.concatenate([np.zeros(0, np.int64), *ends])
    order = np.argsort(end, kind="stable")
    return _Stretches(
        np.concatenate([np.zeros(0, np.int64), *begins])[order],
        end[order],
        np.concatenate([np.zeros(0, np.bool_), *slow])[order],
    )


def _bursts(measured: _Stretches, *, allowed: float) -> list[_Burst]:
    """Put what is slow together, in the order of time."""
    at = np.flatnonzero(measured.slow)
    if not len(at):
        return []
    begin, end = measured.begin_ns[at], measured.end_ns[at]
    # What is under way from early on belongs to all that ended meanwhile.
    earliest = np.minimum.accumulate(begin[::-1])[::-1]
    gap = earliest[1:] - end[:-1]
    others = np.diff(at) - 1
    apart = (gap > SILENT_NS) | ((gap > QUIET_NS) & (others > 0))
    edges = np.concatenate([[0], np.flatnonzero(apart) + 1, [len(at)]])
    found = []
    for low, high in pairwise(edges.tolist()):
        first, last = _densest(others[low : high - 1], allowed)
        some = slice(low + first, low + last + 1)
        took = end[some] - begin[some]
        found.append(
            _Burst(int(begin[some].min()), int(end[some].max()), len(took), int(took.sum()))
        )
    return found


def _densest(others: npt.NDArray[Any], allowed: float) -> tuple[int, int]:
    """Choose the stretch with most slow ones beyond the allowed share of all.

    `others`: how many were not slow between each slow one and the next. Returns the first and the
    last slow one of it.
    """
    cost = np.concatenate([[0.0], allowed * others])
    upto = np.cumsum((1 - allowed) - cost)  # the score up to each slow one, itself included
    before = upto - (1 - allowed)  # and just before it
    lowest = np.minimum.accumulate(before)
    last = int(np.argmax(upto - lowest))
    first = int(np.argmin(before[: last + 1]))
    return first, last


def _bursts_of_losses(capture: Capture) -> list[_Burst]:
    found = read_retransmits(capture)
    losses, waits = found.losses, found.waits
    if not len(losses):
        return []
    ends = losses.last_ns.copy()
    good = waits.counts
    np.maximum.at(ends, waits.loss[good], _ends_of(capture, waits.row[good]))
    order = np.argsort(ends, kind="stable")
    begin, end = losses.begin_ns[order], ends[order]
    earliest = np.minimum.accumulate(begin[::-1])[::-1]
    apart = np.flatnonzero(earliest[1:] - end[:-1] > _LOSSES_APART_NS) + 1
    edges = np.concatenate([[0], apart, [len(end)]]).tolist()
    return [
        _Burst(
            int(begin[low:high].min()),
            int(end[low:high].max()),
            high - low,
            int((end[low:high] - begin[low:high]).sum()),
        )
        for low, high in pairwise(edges)
    ]


def _ends_of(capture: Capture, rows: Times) -> Times:
    """Tell when waits, by their rows, were over altogether."""
    read = [numbers(table, "run_ns") for table in chunks(capture, "waits", ("run_ns",))]
    return _signed(np.concatenate([np.zeros(0, np.uint64), *read]))[rows]
