"""Keep the tracer cheap: how many rows and stacks it takes, by rule, and what it did about it.

Counts, totals and percentiles come from in-kernel counters and never degrade. What gives way, in
this order, is the share of waits that get a row (the shortest go first), then the share of stacks.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from latrace.analysis.histogram import bounds

from .cost import context_switches
from .loader import Probes
from .options import Options
from .shared import Shared

ROWS_PER_S = 50_000
"""Above this the default mode raises the row threshold. A row costs about as much as the rest of
the probe; fifty thousand of the longest waits a second explain any percentile."""

SLICES_PER_S = 100_000
"""Beside threads that take turns fast, one wait alone can have dozens: above this, the shorter
waits are recorded without who held them up. With `--min 0`, ten times as many."""

TICK_S, QUIET_TICK_S, PACE_S = 0.1, 1.0, 0.5
_SLICED_NS = 10_000  # as SLICED_NS in probes/causes.h
_WAIT_PERIOD_NS, _BLOCKED_PERIOD_NS, _SLOW_BLOCKED_NS = 2_000_000, 20_000_000, 100_000_000
_NEVER = 2**63 - 1
_MAX_LEVEL = 30
_RECENT_TICKS = 10
_NOTES = 100

_RESTING = {"lat_sched_exit": "stacks", "lat_back": "the very ends of sleep calls"}
_BUSY_SWITCHES_PER_S = 150_000  # of each CPU
_BUSY_WAITS_PER_S = 100_000  # of the targets
_CPUS = os.cpu_count() or 1
_BUSY_SHARE = 4


@dataclass(slots=True)
class Budget:
    """Steers the probes' control block; `step` is called about every TICK_S."""

    shared: Shared
    options: Options
    probes: Probes
    degraded: list[dict[str, Any]] = field(default_factory=list)
    """What was given up and why: `at_ns` (CLOCK_MONOTONIC), `what`, `why`."""
    highest_slow_ns: int = 0
    share: float = 1.0
    """Of the rows, slices and stacks that there may be; whoever watches the cost lowers it."""
    _level: int = 0
    _last_s: float = 0.0
    _last_rows: int = 0
    _tokens: int = 0
    _history: list[npt.NDArray[np.uint64]] = field(default_factory=list)
    _calm_ticks: int = 0
    _said_rows: bool = False
    _said_lost: bool = False
    _said_slices: bool = False
    _slice_tokens: int = 0
    _last_waits: int = 0
    _pace_s: float = 0.0
    _pace_switches: int = 0
    _pace_waits: int = 0
    _switches_per_s: float = 0.0
    _waits_per_s: float = 0.0
    _resting_ticks: int = 0
    _said_resting: bool = False

    def start(self) -> None:
        """Set the thresholds that a trace begins with."""
        control = self.shared.control
        control["min_ns"] = self.options.min_ns or 0
        self._set_level(0)
        self._refill(TICK_S)
        control["slice_ns"] = _SLICED_NS
        self._fill_slices(TICK_S)
        self._history = [self.shared.slot_counts()]
        self._last_s = self._pace_s = time.monotonic()
        self._pace_switches = context_switches()

    def _set_level(self, level: int) -> None:
        """Halve the stacks at each level: first what counts as slow, then the periods as well."""
        self._level = level
        control = self.shared.control
        if not self.options.stacks:
            for name in ("slow_ns", "slow_blocked_ns", "wait_period_ns", "blocked_period_ns"):
                control[name] = _NEVER
            return
        slow_ns = max(1, self.options.slow_ns) << level
        period_ns = max(_WAIT_PERIOD_NS, slow_ns)
        control["slow_ns"] = slow_ns
        control["wait_period_ns"] = period_ns
        control["blocked_period_ns"] = period_ns * (_BLOCKED_PERIOD_NS // _WAIT_PERIOD_NS)
        control["slow_blocked_ns"] = period_ns * (_SLOW_BLOCKED_NS // _WAIT_PERIOD_NS)
        self.highest_slow_ns = max(self.highest_slow_ns, slow_ns)

    def _refill(self, seconds: float) -> None:
        self._tokens = max(
            4, round(self.share * self.options.stack_budget_per_s * min(seconds, 1.0))
        )
        self.shared.control["tokens"] = self._tokens

    def step(self, ring_used: float) -> None:
        """Look at the last tick and adapt. `ring_used`: its share before the drain, 0 to 1."""
        now = time.monotonic()
        elapsed = now - self._last_s
        if elapsed < TICK_S or (elapsed < QUIET_TICK_S and self._is_quiet()):
            return
        self._last_s = now
        self._adapt_slices(elapsed)
        if self._resting_ticks == 0:
            self._adapt_stacks()
        self._rest(elapsed)
        rows = int(self.shared.cpus["rows"].sum() + self.shared.cpus["lost_waits"].sum())
        rate, self._last_rows = (rows - self._last_rows) / elapsed, rows
        if self.options.min_ns is None:
            self._adapt_rows(rate, ring_used)

    def _is_quiet(self) -> bool:
        """Whether the targets have not waited since the last tick, so that all is as it was."""
        return not self._resting_ticks and self.shared.waits() == self._last_waits

    def _rest(self, elapsed: float) -> None:
        """Hand out stacks for the next tick; on a busy host in one of several ticks only.

        The programs in _RESTING run at every switch of the host, whoever's it is: some 50 ns each,
        and as much again for a target's. The time that passes without them is carried by the
        samples of the next tick that has them, so widths stay unbiased; fewer samples make them
        coarser.
        """
        self._last_waits = self.shared.waits()
        self._measure_pace()
        resting = [what for name, what in _RESTING.items() if name in self.probes.programs]
        busy = bool(resting) and (
            self._switches_per_s > self.share * _BUSY_SWITCHES_PER_S * _CPUS
            or self._waits_per_s > self.share * _BUSY_WAITS_PER_S
        )
        self._resting_ticks = (self._resting_ticks + 1) % _BUSY_SHARE if busy else 0
        for name in _RESTING:
            self.probes.switch(name, on=not self._resting_ticks)
        if self._resting_ticks:
            self.shared.control["tokens"] = 0
        else:
            self._refill(elapsed * (_BUSY_SHARE if busy else 1))
        if busy and not self._said_resting:
            self._said_resting = True
            self.note(
                f"{' and '.join(resting)} are seen in a quarter of the time",
                f"{self._switches_per_s:,.0f} switches and {self._waits_per_s:,.0f} waits of the"
                " targets a second",
            )

    def _measure_pace(self) -> None:
        """How busy host and targets are; the kernel takes a while to tell, so not at each tick."""
        now = time.monotonic()
        passed_s = now - self._pace_s
        if passed_s < PACE_S:
            return
        switches, waits = context_switches(), self.shared.waits()
        self._switches_per_s = (switches - self._pace_switches) / passed_s
        self._waits_per_s = (waits - self._pace_waits) / passed_s
        self._pace_s, self._pace_switches, self._pace_waits = now, switches, waits

    def _adapt_slices(self, seconds: float) -> None:
        """Hand out slices for the next tick; the longest waits have them first."""
        control = self.shared.control
        left, threshold = int(control["slice_tokens"][0]), int(control["slice_ns"][0])
        if left <= 0:
            control["slice_ns"] = threshold * 2
            if not self._said_slices:
                self._said_slices = True
                self.note(
                    "who held up the shorter waits is not recorded (their causes are)",
                    "threads take turns too fast there for all of it",
                )
        elif left > self._slice_tokens * 3 // 4:
            control["slice_ns"] = max(_SLICED_NS, threshold // 2)
        self._fill_slices(seconds)

    def _fill_slices(self, seconds: float) -> None:
        per_s = SLICES_PER_S * (10 if self.options.min_ns == 0 else 1)
        self._slice_tokens = round(self.share * per_s * min(seconds, 1.0))
        self.shared.control["slice_tokens"] = self._slice_tokens

    def _adapt_stacks(self) -> None:
        left = int(self.shared.control["tokens"][0])
        if left <= 1 and self._level < _MAX_LEVEL:
            self._set_level(self._level + 1)
        elif self._level and left > self._tokens * 3 // 4:
            self._set_level(self._level - 1)

    def _adapt_rows(self, rate: float, ring_used: float) -> None:
        threshold = int(self.shared.control["min_ns"][0])
        self._history = [*self._history[-_RECENT_TICKS:], self.shared.slot_counts()]
        most_per_s = self.share * ROWS_PER_S
        pressed = rate > most_per_s or ring_used > 0.5
        self._calm_ticks = 0 if rate > most_per_s / 4 else self._calm_ticks + 1
        if not pressed and not (threshold and self._calm_ticks >= _RECENT_TICKS):
            return
        recent = self._history[-1] - self._history[-2 if pressed else 0]
        over_s = TICK_S * (1 if pressed else len(self._history) - 1)
        wanted = threshold_for(recent, most_per_s / 2 * over_s)
        if pressed and wanted <= threshold:
            wanted = max(threshold * 2, 1000)
        self.shared.control["min_ns"] = wanted
        self._calm_ticks = 0
        if pressed and not self._said_rows:
            self._said_rows = True
            self.note(
                f"waits shorter than {_show(wanted)} get no row (adapting; counts stay exact)",
                f"{rate:,.0f} waits/s is above the budget of {most_per_s:,.0f} rows/s",
            )

    def note(self, what: str, why: str) -> None:
        """Keep what was given up, and why; of very many, the last ones."""
        self.degraded.append({"at_ns": time.monotonic_ns(), "what": what, "why": why})
        del self.degraded[:-_NOTES]

    def note_loss(self, lost: int) -> None:
        """Say that the ring could not keep up, once."""
        if lost and not self._said_lost:
            self._said_lost = True
            self.note("details of some waits are lost (counts stay exact)", "the ring was full")


def threshold_for(counts: npt.NDArray[np.uint64], rows: float) -> int:
    """The shortest wait (ns) such that at most `rows` of the waits in `counts` are as long."""
    from_top = np.cumsum(counts[::-1])
    fitting = int(np.searchsorted(from_top, rows, side="right"))
    if fitting >= len(counts):
        return 0
    return int(bounds([len(counts) - fitting])[0][0]) if fitting else _NEVER


def _show(duration_ns: int) -> str:
    return f"{duration_ns / 1e6:.3g} ms" if duration_ns >= 1e6 else f"{duration_ns / 1e3:.3g} us"
