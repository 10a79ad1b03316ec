"""Keep a watch within `--budget`: its own cost is measured, and details give way by rule.

The cost is the reader's CPU time and the run time of the probes (tracer/cost.py), in percent of one
CPU. Above the budget the share of rows, culprits, stacks and samples that there may be is lowered
by as much as the cost is too high; well below it the share is doubled, until it is whole again.
Counts and percentiles, and so the rules that fire, stay exact.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from latrace.tracer.budget import Budget
from latrace.tracer.cost import Cost
from latrace.tracer.sampling import Sampler

LEAST_SHARE: Final = 1 / 64
_STARTING: Final = 3  # windows; the files that targets map are read in this time
_WELL_BELOW: Final = 0.8
_LOWER_BY_AT_MOST: Final = 1 / 4
_LOWER_BY_AT_LEAST: Final = 2 / 3


class Thrift:
    """Judges each time that the cost was measured, which is about every five seconds."""

    def __init__(
        self,
        limit_percent: float,
        *,
        cost: Cost,
        budget: Budget,
        sampler: Sampler,
        say: Callable[[str], None],
    ) -> None:
        self._limit = limit_percent
        self._cost = cost
        self._budget = budget
        self._sampler = sampler
        self._say = say
        self._windows = 0
        self._told_floor = False
        self.skip()

    def skip(self) -> None:
        """Leave out what was spent since the last look: on a bundle."""
        self._cpu_s, self._at_s = time.process_time(), time.monotonic()

    def step(self) -> None:
        """Look whether the cost was measured anew, and what it is."""
        if self._cost.windows == self._windows:
            return
        self._windows = self._cost.windows
        if self._windows <= _STARTING:  # what it took to begin is no measure of what it takes
            self.skip()
            return
        reader = 100 * (time.process_time() - self._cpu_s) / (time.monotonic() - self._at_s)
        self.skip()
        self._judge(reader, self._cost.window_percent)

    def _judge(self, reader: float, probes: float) -> None:
        """`reader` and `probes`: what they took since the last look, in percent of one CPU."""
        share, spent = self._budget.share, reader + probes
        if spent > self._limit:
            factor = min(max(self._limit / spent, _LOWER_BY_AT_MOST), _LOWER_BY_AT_LEAST)
            self._set(max(share * factor, LEAST_SHARE))
            cost = f"{spent:.1f} % of a CPU ({reader:.1f} reader, {probes:.1f} probes)"
            if share == 1.0:
                why = f"it cost {cost}, over the budget of {self._limit:g} %"
                self._budget.note("fewer waits have details (counts stay exact)", why)
                self._say(f"!!! fewer details: {why}")
            elif share == LEAST_SHARE and not self._told_floor:
                self._told_floor = True
                what = "over the budget with the least of details"
                self._budget.note(what, f"{cost} at this rate of waits")
                self._say(f"!!! {what}: {cost}")
            return
        if share < 1.0 and spent < _WELL_BELOW * self._limit:
            self._set(min(1.0, share * 2))
            if self._budget.share == 1.0:
                self._told_floor = False
                self._budget.note("all details again", f"it cost {spent:.1f} % of a CPU")
                self._say(f"all details again: it costs {spent:.1f} % of a CPU")

    def _set(self, share: float) -> None:
        self._budget.share = self._sampler.share = share
