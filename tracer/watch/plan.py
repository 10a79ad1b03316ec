"""What a watch is to do, from the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .settings import Settings

if TYPE_CHECKING:
    from .fetch import Url
    from .metrics import MetricSpec
    from .triggers import Rule


@dataclass(frozen=True, slots=True, kw_only=True)
class ApplicationRule:
    """The application's own latency above a limit."""

    url: Url
    spec: MetricSpec
    above_ns: int
    least: int
    """With fewer values in the window there is no quantile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One watch: when it fires, and what it does then."""

    settings: Settings
    rules: Sequence[Rule]
    application: ApplicationRule | None
    pprof: Url | None
    """Where a Go service has its profiles."""
    output: Path
    keep: int
    disk_bytes: int
    on_spike: Sequence[str]
    once: bool
    as_json: bool
