"""How a watch keeps and writes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The times and sizes of a watch."""

    before_s: float = 10.0
    """What a bundle has from before the moment it fired, at least."""
    after_s: float = 5.0
    """And from after it."""
    window_s: float = 5.0
    """What the rules look back on."""
    cooldown_s: float = 60.0
    """From one firing to the next."""
    memory_bytes: int = 256 << 20
    """For the rows that are kept."""
    budget_percent: float = 2.0
    """What the reader and the probes may take of one CPU before details give way."""
    once: bool = False
    """Never be armed again after the first bundle."""
