"""A capture as one HTML page that needs nothing else: words, plots, flame graphs.

    page = render_html(capture, summarise(capture))

Nothing here needs a kernel or root. What the capture says is hostile: it is shown as text, and the
page allows no script but the flame graphs' own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from latrace.analysis.capture import Capture
from latrace.analysis.report_html import charts, losses, series
from latrace.analysis.report_html.page import Flame, Pictures, write_page
from latrace.analysis.report_html.spike import SHADED, shade_of
from latrace.analysis.report_html.wording import percent
from latrace.analysis.retransmits import read_retransmits
from latrace.analysis.selection import Selection
from latrace.analysis.spike_file import Told
from latrace.flamegraphs import KINDS, build_profile, to_svg

__all__ = ["render_html"]

_EVERYTHING: Final = Selection()
_FRAMES: Final = 3000  # of each flame graph: less than 1 MB
_FLAMES: Final = {
    "wait": ("Waiting to run", "where threads left the CPU before they waited"),
    "culprit": ("Culprits", "what had the CPU meanwhile"),
    "offcpu": ("Off the CPU", "blocked and waiting apart"),
    "waker": ("Wakers", "who ended the blocked time"),
    "wall": ("Wall clock", "on the CPU, waiting and blocked in one picture"),
}


def render_html(
    capture: Capture,
    summary: Mapping[str, Any],
    *,
    selection: Selection = _EVERYTHING,
    spike: Told | None = None,
) -> bytes:
    """Write a report as an HTML document, UTF-8.

    `summary` is what `summarise` says of the same selection. The flame graphs are of the whole
    capture. `spike`: what a bundle's `spike.json` says and what `analyse` makes of it; its words
    come first, and it is marked in the plots. The same capture gives the same bytes. Raises
    CaptureError for a damaged file.
    """
    pictures = _pictures(capture, summary, selection, spike)
    return write_page(summary, capture.manifest, pictures, spike=spike).encode("utf-8")


def _pictures(
    capture: Capture, summary: Mapping[str, Any], selection: Selection, spike: Told | None
) -> Pictures:
    told = summary["capture"]
    begin, end = selection.window_ns(int(told["duration_s"] * 1e9))
    start = int(told["start_ns"])
    timed = begin < end and 0 < start < 2**63  # else when anything was is not known
    if not timed:
        start = begin = end = 0
    window = series.Window(capture_ns=start, begin_ns=begin, end_ns=end)
    waits = series.read_waits(capture, window, selection)
    counts = waits.hist
    if selection.everything and not summary["quality"]["totals_from_rows"]:
        exact = series.exact_histogram(capture)
        counts = exact if exact.any() else counts
    sleeps = series.read_sleeps(capture, window, selection)
    marks = charts.marks_of(summary["waits"])
    drawn = [line["call"] for line in summary["sleeps"] if line["call"] in sleeps.grids]
    drawn = drawn[: charts.COLOURS]
    shade = shade_of(spike, window) if spike is not None and timed else None
    lines = [(label, ns) for label, _, ns in marks if label in ("P50", "P99")]
    return Pictures(
        heat=charts.heat_map(waits, window, lines, shade) if waits.rows and timed else "",
        causes=charts.causes_over_time(waits, window, shade)
        if waits.rows and waits.has_causes and timed
        else "",
        tail=charts.tail_curve(counts, marks) if counts.any() else "",
        sleeps=charts.sleep_calls(sleeps, drawn) if drawn else "",
        calls=drawn,
        losses=losses.strip(read_retransmits(capture, selection), window)
        if timed and summary["retransmits"]["count"]
        else "",
        heat_note=_note(summary, selection) + (f" {SHADED}" if shade else ""),
        flames=_flames(capture),
    )


def _note(summary: Mapping[str, Any], selection: Selection) -> str:
    quality, waits = summary["quality"], summary["waits"]
    if not selection.everything or quality["rows"] >= waits["count"]:
        return ""
    return (
        f"Of the {quality['rows']:,} waits that were recorded in detail: "
        f"{percent(quality['rows'], waits['count'])} of all, "
        f"{percent(quality['row_wait_ns'], waits['total_ns'])} of the waiting."
    )


def _flames(capture: Capture) -> list[Flame]:
    drawn = []
    for kind in sorted(KINDS, key=lambda one: list(_FLAMES).index(one) if one in _FLAMES else 99):
        profile = build_profile(capture, kind=kind)
        sampled = [stack for stack, _ in profile.stacks if len(stack) > 1]
        if sampled:
            title, about = _FLAMES.get(kind, (kind, ""))
            drawn.append(Flame(title=title, about=about, svg=to_svg(profile, max_frames=_FRAMES)))
    return drawn
