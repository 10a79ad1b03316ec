"""A part of a capture: a stretch of time, some threads, only what took long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which waits and sleep calls to look at. Without arguments: all."""

    since_ns: int | None = None
    """From so long after the start of the capture; by when a wait or a call was over."""
    until_ns: int | None = None
    """Up to, not including, so long after the start."""
    tids: tuple[int, ...] = ()
    """Of these threads."""
    over_ns: int | None = None
    """Waits longer than this; sleep calls that came back later than this after their deadline."""

    @property
    def everything(self) -> bool:
        """Whether nothing is left out."""
        return self == Selection()

    def mask(
        self,
        *,
        start_ns: int,
        end_ns: npt.NDArray[Any],
        tid: npt.NDArray[Any],
        took_ns: npt.NDArray[Any],
    ) -> npt.NDArray[np.bool_]:
        """Tell which rows are in it, shape (rows,).

        `start_ns`: the capture's start; `end_ns`: when each was over; `took_ns`: how long it
        waited, or how late it came back.
        """
        chosen = np.ones(len(tid), np.bool_)
        if self.since_ns is not None:
            chosen &= end_ns >= start_ns + self.since_ns
        if self.until_ns is not None:
            chosen &= end_ns < start_ns + self.until_ns
        if self.tids:
            chosen &= np.isin(tid, self.tids)
        if self.over_ns is not None:
            chosen &= took_ns > self.over_ns
        return chosen

    def window_ns(self, duration_ns: int) -> tuple[int, int]:
        """Tell where the stretch of time begins and ends in a capture of that duration."""
        begin = min(self.since_ns or 0, duration_ns)
        end = duration_ns if self.until_ns is None else min(self.until_ns, duration_ns)
        return begin, max(begin, end)
