"""Plain text of at most 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH = 80


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, all others to the right."""
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    # What does not fit is cut from the first column, where the names are.
    spare = WIDTH - sum(widths) - 2 * (len(widths) - 1)
    widths[0] += min(0, spare)

    def line(cells: Sequence[str]) -> str:
        first = f"{cells[0][: widths[0]]:<{widths[0]}}"
        rest = (f"{cell:>{width}}" for cell, width in zip(cells[1:], widths[1:], strict=True))
        return "  ".join([first, *rest]).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return [line(heads), rule, *map(line, rows)]


def paragraph(text: str) -> list[str]:
    """`text` filled to the width."""
    return textwrap.wrap(text, WIDTH)


def interval_heading(found: Mapping[str, Any]) -> str:
    """What the interval of an estimate is to be called."""
    return "95 % interval" if found["coverage"] >= 0.95 else "least - greatest"


def percent(ratio: float) -> str:
    """A ratio as a change: 1.12 is +12.0 %."""
    return f"{(ratio - 1) * 100:+.1f} %"


def percents(low: float, high: float) -> str:
    """An interval of ratios as changes."""
    return f"{(low - 1) * 100:+.1f} .. {(high - 1) * 100:+.1f}"


def rate(per_s: float | None) -> str:
    """Events a second."""
    if per_s is None:
        return "full speed"
    return f"{per_s / 1e6:g} M/s" if per_s >= 1e5 else f"{per_s / 1e3:g} k/s"


def mebibytes(size: float) -> str:
    """A size."""
    return f"{size / (1 << 20):.3g} MiB"
