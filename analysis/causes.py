"""The causes of a wait: its time taken apart, so that the parts sum to the whole exactly."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from latrace.analysis.chunks import numbers

CAUSES: Final = ("throttled", "irq", "softirq", "idle", "kthread", "own", "other", "unknown")
"""In the order of precedence: at each instant of a wait the first that holds, and only it."""

COLUMNS: Final = tuple(f"{cause}_ns" for cause in CAUSES)
"""The columns of `waits`, `threads` and `totals` that hold the parts."""

Parts = npt.NDArray[np.uint64]
"""Nanoseconds of each cause: the last axis is `CAUSES`."""


def no_parts() -> Parts:
    """Make parts that are all 0, shape (8,)."""
    return np.zeros(len(CAUSES), np.uint64)


def parts_of(table: pa.Table, *, whole: str = "wait_ns") -> Parts:
    """Read the parts of each row, shape (rows, 8): they sum to the column `whole`.

    What the columns leave of it is unknown, so a capture without them is unknown altogether.
    """
    parts = np.stack([numbers(table, column) for column in COLUMNS], axis=-1).astype(np.uint64)
    total = numbers(table, whole).astype(np.uint64)
    known = parts.sum(axis=-1, dtype=np.uint64)
    parts[:, -1] += np.where(total > known, total - known, np.uint64(0))
    return parts


def by_cause(parts: Parts) -> dict[str, int]:
    """Name the parts of one sum, shape (8,): all causes, in ns."""
    return dict(zip(CAUSES, (int(part) for part in parts), strict=True))


def grouped(parts: Parts, group: npt.NDArray[Any], groups: int) -> Parts:
    """Sum rows by group: `parts` (rows, 8), `group` (rows,) from 0 to groups-1; (groups, 8)."""
    sums = np.zeros((groups, len(CAUSES)), np.uint64)
    np.add.at(sums, group, parts)
    return sums
