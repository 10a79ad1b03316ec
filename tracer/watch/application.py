"""The application's own latency as a rule: a quantile of its metrics above a limit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from latrace.analysis.words import duration

from .metrics import AppLatency, Metrics
from .plan import ApplicationRule
from .triggers import Firing, Histograms

_SECONDS: Final = {
    "_nanoseconds": 1e-9, "_ns": 1e-9, "_microseconds": 1e-6, "_us": 1e-6,
    "_milliseconds": 1e-3, "_ms": 1e-3,
}  # fmt: skip
"""What one of a metric's unit is in seconds, by how its name ends; else it counts seconds."""


class ApplicationLatency:
    """Fires when the quantile of the metric over the window is above the limit.

    `say` gets a line when the endpoint stops giving what is asked for, and when it does again.
    Raises what `Metrics` does.
    """

    def __init__(
        self,
        wanted: ApplicationRule,
        pid: int,
        *,
        window_s: float,
        say: Callable[[str], None],
    ) -> None:
        spec = wanted.spec
        self.rule = f"--metric {spec} P{spec.quantile * 100:g}"
        self._spec = spec
        self._window_s = window_s
        self._above_s = wanted.above_ns / 1e9
        self._least = wanted.least
        self._say = say
        self._unit_s = next(
            (unit for end, unit in _SECONDS.items() if spec.name.endswith(end)), 1.0
        )
        self._metrics = Metrics(wanted.url, spec, pid, window_s=window_s)
        self._trouble: str | None = None
        self._value_s: float | None = None

    def look(self, now_ns: int, counts: Histograms) -> Firing | None:  # noqa: ARG002 - of a Rule
        """Take what the endpoint answered, ask anew when it is time, and judge."""
        news = self._metrics.step()
        if self._metrics.trouble != self._trouble:
            self._trouble = self._metrics.trouble
            again = f"{self._metrics.url} answers again"
            self._say(f"!!! {self._trouble}" if self._trouble else again)
        if not news:
            return None
        found = self._metrics.latency.quantile()
        self._value_s = None if found is None else found[0] * self._unit_s
        if found is None or self._value_s is None or self._value_s <= self._above_s:
            return None
        if found[1] < self._least:
            return None
        window_ns = int(max(self._metrics.latency.covers_s, 1.0) * 1e9)
        return Firing(
            rule=self.rule,
            kind="metric",
            value=self._value_s,
            threshold=self._above_s,
            unit="s",
            count=found[1],
            since_ns=now_ns - window_ns,
            until_ns=now_ns,
        )

    def spike(self, now_ns: int, counts: Histograms) -> None:
        """Go on asking."""
        self.look(now_ns, counts)

    def rearm(self, now_ns: int, counts: Histograms) -> None:  # noqa: ARG002 - of a Rule
        """Begin the window anew."""
        self._metrics.latency = AppLatency(self._spec, self._window_s)

    def state(self) -> str:
        """Tell the quantile and its limit."""
        value = "-" if self._value_s is None else duration(int(self._value_s * 1e9))
        return f"{self._spec.name} {value} of {duration(int(self._above_s * 1e9))}"

    def close(self) -> None:
        """End the child that asks."""
        self._metrics.close()
