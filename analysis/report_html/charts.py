"""The plots, each in two widths: for a desk and for a phone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from latrace.analysis import histogram
from latrace.analysis.causes import CAUSES
from latrace.analysis.report_html.drawing import FONT, INK, axes, draw
from latrace.analysis.report_html.series import (
    FINEST,
    LATENCIES,
    LOWEST,
    TIMES,
    Counts,
    Floats,
    Sleeps,
    Waits,
    Window,
)
from latrace.analysis.report_html.wording import time

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEAT_LIGHT: Final = ("#dbe9f6", "#a3cae9", "#5ba3d6", "#2271b5", "#0b3d78", "#051d40")
HEAT_DARK: Final = ("#17324d", "#1e5180", "#2b7bba", "#58a9e0", "#a7d5f5", "#f2faff")
"""How many: from one to the most. Rising in contrast to the page."""

COLOURS: Final = 6
"""As many sleep calls are told apart."""

_MOST_ROWS = 60  # of latency, in a heat map
_BESIDE = 96  # px for the name of a quantile beside the curve
_SIZES = 5  # of points
_SHADES = 250  # the narrowest shade is such a part of the width
_ASIDE = 8  # px between the points of two calls that asked for the same

_Paint = Callable[["Figure", "Format"], None]


@dataclass(frozen=True, slots=True)
class Format:
    """The width that a picture is drawn for, in px, and how it makes use of it."""

    name: str
    width: int
    left: int
    right: int
    time_ticks: int
    fold: int
    """So many columns of time are drawn as one."""


@dataclass(frozen=True, slots=True)
class Shade:
    """A stretch of time to shade, and a moment to mark, ns after the capture began."""

    begin_ns: int
    end_ns: int
    mark_ns: int


WIDE: Final = Format("wide", 940, 64, 70, 10, 1)
NARROW: Final = Format("narrow", 360, 52, 14, 5, 2)


def both(paint: _Paint, *, key: str, label: str, height: int) -> str:
    """Draw a picture in both widths; the page's style shows the one that fits."""
    return "".join(
        f'<div class="{form.name}">'
        + draw(
            lambda figure, form=form: paint(figure, form),  # type: ignore[misc]
            key=f"{key}-{form.name}",
            label=label,
            width=form.width,
            height=height,
        )
        + "</div>"
        for form in (WIDE, NARROW)
    )


# --- over time ---------------------------------------------------------------------------------


def heat_map(
    waits: Waits,
    window: Window,
    marks: Sequence[tuple[str, int]],
    shade: Shade | None = None,
) -> str:
    """Draw when waits ended and how long they were; `marks` are quantiles (name, ns)."""
    used = np.flatnonzero(waits.grid.sum(axis=0))
    low, high = int(used[0]), int(used[-1]) + 1
    step = math.ceil((high - low) / _MOST_ROWS)
    # Whole steps, so that no row has fewer latencies in it than the others.
    low -= low % step
    high += -(high - low) % step
    grid = np.pad(waits.grid, ((0, 0), (0, max(0, high - LATENCIES))))[:, low:high]
    grid = grid.reshape(TIMES, -1, step).sum(axis=2)

    def paint(figure: Figure, form: Format) -> None:
        ax = axes(figure, left=form.left, right=form.right, top=10, bottom=42)
        seen = grid.reshape(TIMES // form.fold, form.fold, -1).sum(axis=1)
        extent = (window.begin_ns, window.end_ns, _doubling(low), _doubling(high))
        for name, stops in (("light", HEAT_LIGHT), ("dark", HEAT_DARK)):
            image = ax.imshow(
                _coloured(seen.T, stops),
                extent=extent,
                origin="lower",
                aspect="auto",
                interpolation="none",
            )
            image.set_gid(f"heat-{name}")
        for mark, ns in marks:
            if extent[2] <= np.log2(max(1, ns)) <= extent[3]:
                ax.axhline(np.log2(ns), color=INK["ink"], linewidth=1, dashes=(4, 3))
                inside = form is NARROW
                ax.annotate(
                    f"{mark} {time(ns)}" if inside else f"{mark}\n{time(ns)}",
                    (1, np.log2(ns)),
                    xycoords=("axes fraction", "data"),
                    xytext=(-3, 3) if inside else (6, 0),
                    textcoords="offset points",
                    ha="right" if inside else "left",
                    va="bottom" if inside else "center",
                    fontsize=FONT - 1,
                    bbox={"facecolor": INK["surface"], "edgecolor": "none", "pad": 1.5}
                    if inside
                    else None,
                )
        _latency_axis(ax.yaxis, extent[2], extent[3])
        _time_axis(ax, window, form)
        _shade(ax, window, shade)

    most = int(grid.max())
    return both(
        paint,
        key="heat",
        height=300,
        label=f"Heat map: when waits ended, and how long they were; up to {most:,} in a cell",
    )


def _coloured(counts: Counts, stops: Sequence[str]) -> Any:
    """Give each count its colour on a logarithmic scale, shape (..., 4); none for 0."""
    from matplotlib.colors import to_rgba_array  # noqa: PLC0415

    scale = np.log1p(counts) / np.log1p(max(1, counts.max()))
    palette = to_rgba_array(list(stops))
    place = scale * (len(stops) - 1)
    return np.where(
        (counts > 0)[..., None],
        np.stack(
            [np.interp(place, np.arange(len(stops)), palette[:, band]) for band in range(4)], -1
        ),
        0.0,
    )


def causes_over_time(waits: Waits, window: Window, shade: Shade | None = None) -> str:
    """Draw how many threads waited at a time, by cause, stacked: `unknown` on top."""

    def paint(figure: Figure, form: Format) -> None:
        ax = axes(figure, left=form.left, right=form.right, top=10, bottom=42)
        levels = waits.waiting.reshape(len(CAUSES), -1, form.fold).mean(axis=2)
        edges = np.linspace(window.begin_ns, window.end_ns, levels.shape[1] + 1)
        # The causes with most time lie below: their shape is then seen undistorted.
        order = sorted(range(len(CAUSES)), key=lambda cause: (cause == 7, -levels[cause].sum()))
        floor = np.zeros(levels.shape[1])
        for cause in order:
            if not levels[cause].any():
                continue
            top = floor + levels[cause]
            ax.fill_between(
                edges,
                np.append(floor, floor[-1]),
                np.append(top, top[-1]),
                step="post",
                color=INK[f"c-{CAUSES[cause]}"],
                linewidth=0,
            )
            floor = top
        ax.set_xlim(window.begin_ns, window.end_ns)
        ax.set_ylim(0, max(float(floor.max()) * 1.05, 1e-9))
        ax.yaxis.set_major_locator(_few(4))
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
        ax.grid(axis="y", alpha=0.6)
        ax.set_axisbelow(True)
        _time_axis(ax, window, form)
        _shade(ax, window, shade)

    return both(
        paint,
        key="causes",
        height=220,
        label="Stacked areas: how many threads waited for a CPU at a time, by cause",
    )


def _shade(ax: Axes, window: Window, shade: Shade | None) -> None:
    if shade is None:
        return
    # So wide at least that it can be seen.
    least = (window.end_ns - window.begin_ns) / _SHADES
    begin = max(shade.begin_ns, window.begin_ns)
    end = min(max(shade.end_ns, begin + least), window.end_ns)
    if begin < end:
        # Behind what is drawn: its colours mean something.
        ax.axvspan(begin, end, color=INK["alarm"], alpha=0.2, linewidth=0, zorder=-1)
    if window.begin_ns <= shade.mark_ns <= window.end_ns:
        ax.axvline(shade.mark_ns, color=INK["alarm"], linewidth=1.5)


def _time_axis(ax: Axes, window: Window, form: Format) -> None:
    from matplotlib.ticker import FixedLocator  # noqa: PLC0415

    span = max(1, window.end_ns - window.begin_ns)
    step = _round_step(span / form.time_ticks)
    ticks = np.arange(math.ceil(window.begin_ns / step), window.end_ns // step + 1) * step
    ax.set_xlim(window.begin_ns, window.begin_ns + span)
    ax.xaxis.set_major_locator(FixedLocator(ticks.tolist()))
    ax.xaxis.set_major_formatter(lambda value, _: _moment(value, step))
    ax.set_xlabel("after tracing began", fontsize=FONT)


def _round_step(least: float) -> float:
    """Give the first round step of time (ns) that is not below `least`."""
    minute = 60 * 10**9
    steps = [base * 10**power for power in range(11) for base in (1, 2, 5)]
    steps = [step for step in steps if step < minute]
    steps += [minute * many for many in (1, 2, 5, 10, 15, 30, 60, 120, 240, 480, 1440)]
    return next((float(step) for step in steps if step >= least), float(2**63))


def _moment(at_ns: float, step_ns: float) -> str:
    """Say a tick of time in one unit, with no more digits than the step needs."""
    if step_ns >= 60 * 10**9:
        return f"{at_ns / 60e9:.0f} min"
    for unit, size in (("s", 10**9), ("ms", 10**6), ("µs", 10**3)):
        if step_ns >= size / 10:
            return f"{at_ns / size:.{0 if step_ns >= size else 1}f} {unit}"
    return f"{at_ns:.0f} ns"


# --- the distribution --------------------------------------------------------------------------


def tail_curve(counts: histogram.Counts, marks: Sequence[tuple[str, float, int]]) -> str:
    """Draw which share of waits is longer than a time; `marks` are (name, share above, ns)."""
    low, high, count = histogram.buckets(counts)
    total = int(count.sum())
    above = (total - np.cumsum(count.astype(np.int64))) / total
    at, share_above = _thinned(high.astype(np.float64), above)
    at = np.concatenate([[max(1.0, float(low[0]))], at])
    share_above = np.concatenate([[1.0], share_above])
    last = marks[-1][2] if marks else int(high[-1])
    least = 0.5 / total

    def paint(figure: Figure, form: Format) -> None:
        ax = axes(figure, left=form.left, right=_BESIDE, top=14, bottom=42)
        x = np.minimum(np.log2(at), np.log2(max(last, 1)))
        y = np.log10(np.maximum(share_above, least))
        ax.fill_between(x, y, np.log10(least), step="post", color=INK["wash"], linewidth=0)
        ax.step(x, y, where="post", color=INK["accent"], linewidth=2)
        left, right = float(x[0]), float(max(x[-1], x[0] + 1))
        pad = 0.02 * (right - left)
        ax.set_xlim(left, right + pad)
        ax.set_ylim(np.log10(least), 0.08)
        _latency_axis(ax.xaxis, left, right, narrow=form is NARROW)
        _share_axis(ax, least)
        for name, part, ns in marks:
            place = np.log2(max(ns, 1)), np.log10(max(part, least))
            ax.plot(*place, "o", color=INK["accent"], markersize=7, mec=INK["surface"], mew=1.5)
            # To the right of a falling curve nothing is drawn.
            ax.annotate(
                f"{name} {time(ns)}",
                place,
                xytext=(8, 2),
                textcoords="offset points",
                fontweight="bold",
                fontsize=FONT if form is WIDE else FONT - 1,
            )
        ax.grid(which="major", alpha=0.6)
        ax.set_axisbelow(True)
        ax.set_xlabel("wait longer than", fontsize=FONT)

    return both(
        paint,
        key="tail",
        height=300,
        label="Curve: the share of waits that are longer than a time; "
        + ", ".join(f"{name} {time(ns)}" for name, _, ns in marks),
    )


def _thinned(at: Floats, value: Floats, *, points: int = 400) -> tuple[Floats, Floats]:
    """Keep at most about `points` of a falling curve, the last one among them."""
    step = max(1, len(at) // points)
    keep = np.unique(np.append(np.arange(step - 1, len(at), step), len(at) - 1))
    return at[keep], value[keep]


def _share_axis(ax: Axes, least: float) -> None:
    from matplotlib.ticker import FixedLocator  # noqa: PLC0415

    lowest = math.ceil(math.log10(least))
    step = 1 + max(0, -lowest - 1) // 6
    ax.yaxis.set_major_locator(FixedLocator(list(range(0, lowest - 1, -step))))
    ax.yaxis.set_major_formatter(lambda power, _: f"{100 * 10.0**power:.10g} %")


# --- sleep calls -------------------------------------------------------------------------------


def sleep_calls(sleeps: Sleeps, drawn: Sequence[str]) -> str:
    """Draw what sleep calls asked for and by how much they overshot it.

    `drawn`: the calls to show, at most COLOURS; each has a grid, and its colour by its place.
    """
    total = sum((sleeps.grids[call] for call in drawn), start=np.zeros((LATENCIES,) * 2, np.int64))
    asked, late = np.flatnonzero(total.sum(axis=1)), np.flatnonzero(total.sum(axis=0))
    box = [
        _doubling(int(edge)) for edge in (asked[0] - 5, asked[-1] + 6, late[0] - 2, late[-1] + 3)
    ]

    def paint(figure: Figure, form: Format) -> None:
        ax = axes(figure, left=form.left, right=form.right, top=10, bottom=42)
        ax.set_xlim(box[0], box[1])
        ax.set_ylim(box[2], box[3])
        most = max(1, int(total.max()))
        sizes = np.linspace(4, 11, _SIZES)
        pixel = (box[1] - box[0]) / (form.width - form.left - form.right)
        for number, call in enumerate(drawn):
            aside = (number - (len(drawn) - 1) / 2) * _ASIDE * pixel
            column, row = np.nonzero(sleeps.grids[call])
            many = sleeps.grids[call][column, row]
            classes = (_SIZES - 1) * np.log1p(many) // np.log1p(most)
            for number_of, size in enumerate(sizes):
                mine = classes == number_of
                ax.plot(
                    LOWEST + (column[mine] + 0.5) / FINEST + aside,
                    LOWEST + (row[mine] + 0.5) / FINEST,
                    "o",
                    markersize=size,
                    color=INK[f"s-{number}"],
                    alpha=0.8,
                    mew=0.6,
                    mec=INK["surface"],
                )
        _latency_axis(ax.xaxis, box[0], box[1], narrow=form is NARROW)
        _latency_axis(ax.yaxis, box[2], box[3])
        ax.grid(which="major", alpha=0.6)
        ax.set_axisbelow(True)
        ax.set_xlabel("asked for", fontsize=FONT)

    return both(
        paint,
        key="sleeps",
        height=280,
        label="Points: what sleep calls asked for (across) and their overshoot (up)",
    )


# --- axes of time ------------------------------------------------------------------------------


def _doubling(row: int) -> float:
    return LOWEST + row / FINEST


def _latency_axis(axis: Any, low: float, high: float, *, narrow: bool = False) -> None:
    """Put ticks at 1, 10, 100 of each unit on an axis of log2(ns)."""
    from matplotlib.ticker import FixedLocator  # noqa: PLC0415

    powers = range(math.ceil(low * math.log10(2)), math.floor(high * math.log10(2)) + 1)
    bases: Sequence[int] = (1,)
    if len(powers) < 3:
        bases = (1, 2, 5)
        powers = range(powers.start - 1, powers.stop)
    elif narrow and len(powers) > 5:
        powers = range(powers.start, powers.stop, 2)
    ticks = {float(np.log2(base * 10.0**power)): base * 10.0**power
             for power in powers for base in bases}  # fmt: skip
    shown = {place: ns for place, ns in ticks.items() if low <= place <= high}
    axis.set_major_locator(FixedLocator(list(shown)))
    axis.set_major_formatter(lambda place, _: _round_time(shown.get(float(place), 2.0**place)))


def _round_time(ns: float) -> str:
    for unit, size in (("s", 10**9), ("ms", 10**6), ("µs", 10**3)):
        if ns >= size * 0.999:
            return f"{ns / size:,.3g} {unit}" if ns / size < 1000 else f"{ns / size:,.0f} {unit}"
    return f"{ns:.3g} ns"


def _few(many: int) -> Any:
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    return MaxNLocator(many)


def marks_of(waits: Mapping[str, Any]) -> list[tuple[str, float, int]]:
    """List the quantiles of a summary's `waits`: name, share of waits above, ns."""
    least = 1 / max(1, waits["count"])
    return [
        (name, max(part, least), waits[key])
        for name, part, key in (
            ("P50", 0.5, "p50_ns"),
            ("P90", 0.1, "p90_ns"),
            ("P99", 0.01, "p99_ns"),
            ("P99.9", 0.001, "p999_ns"),
            ("max", 0.0, "max_ns"),
        )
        if part >= least or name == "max"
    ]


# --- before root is given up -------------------------------------------------------------------


def rehearse() -> None:
    """Draw one of each plot, of next to nothing, so that all that they load is in memory."""
    waits, window = Waits(), Window(capture_ns=0, begin_ns=0, end_ns=10**9)
    waits.grid[0, 0], waits.waiting[0, 0] = 1, 1.0
    heat_map(waits, window, [("P50", 1 << LOWEST)], Shade(0, 1, 1))
    causes_over_time(waits, window)
    tail_curve(histogram.from_buckets([1, 1000], [1, 1]), [("max", 0.0, 1000)])
    grid = np.zeros((LATENCIES, LATENCIES), np.int64)
    grid[LATENCIES // 2, LATENCIES // 2] = 1
    sleep_calls(Sleeps({"": grid}), [""])
