"""Lost TCP segments: a strip of marks below the plots over time, and the tables."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any, Final

import numpy as np

from latrace.analysis.chunks import numbers
from latrace.analysis.report_html import elements
from latrace.analysis.report_html.charts import NARROW, WIDE, Format
from latrace.analysis.report_html.series import TIMES, Window
from latrace.analysis.report_html.wording import name, safe, time
from latrace.analysis.retransmits import Retransmits
from latrace.analysis.retransmits_text import kinds
from latrace.analysis.words import plural

_HEIGHT: Final = 22  # px
_PEERS: Final = 3  # named in a mark's title
_EVIDENCE: Final = {
    "read next": "the thread then read from that socket",
    "its socket": "the thread had used that socket last",
    "same process": "only the process is that of the socket; not counted",
}


def strip(found: Retransmits, window: Window) -> str:
    """Draw when segments were sent again, and when some were missing, in both widths; "": never.

    It has the axis of the plots over time: so many px from the left, a column for each of theirs.
    """
    marks = _marks(found, window)
    if not marks:
        return ""
    missing = _missing(found, window)
    label = f"Marks: when TCP segments were sent again, {plural(found.rows.num_rows, 'time')}"
    return "".join(
        f'<div class="{form.name}">{_drawn(marks, missing, form, label)}</div>'
        for form in (WIDE, NARROW)
    )


def _marks(found: Retransmits, window: Window) -> dict[int, str]:
    """Say of each column of time what was sent again then."""
    rows = found.rows
    at = numbers(rows, "ts_ns").astype(np.int64) - np.int64(window.capture_ns)
    inside = (at >= window.begin_ns) & (at <= window.end_ns)
    columns = np.minimum(window.place(numbers(rows, "ts_ns")).astype(np.intp), TIMES - 1)
    told = zip(
        *(rows[key].to_pylist() for key in ("kind", "segs", "peer")),
        columns.tolist(),
        at.tolist(),
        inside.tolist(),
        strict=True,
    )
    sums: dict[int, tuple[int, int, dict[str, int], dict[str, None]]] = {}
    for kind, segs, peer, column, moment, shown in told:
        if shown:
            first, many, by_kind, peers = sums.get(column, (moment, 0, {}, {}))
            by_kind[kind or "unknown"] = by_kind.get(kind or "unknown", 0) + 1
            peers[peer] = None
            sums[column] = first, many + (segs or 0), by_kind, peers
    return {
        column: _title(first, many, by_kind, list(peers))
        for column, (first, many, by_kind, peers) in sums.items()
    }


def _title(first_ns: int, segs: int, by_kind: Mapping[str, int], peers: list[str]) -> str:
    to = ", ".join(safe(peer) for peer in peers[:_PEERS])
    more = f" and {len(peers) - _PEERS:,} more" if len(peers) > _PEERS else ""
    return (
        f"{time(first_ns)}: {plural(segs, 'segment')} sent again "
        f"({safe(kinds(by_kind))}) to {to}{more}"
    )


def _missing(found: Retransmits, window: Window) -> list[tuple[int, int]]:
    """Tell in which stretches of columns some segment was missing."""
    losses = found.losses
    begin = window.place(losses.begin_ns).astype(np.intp)
    end = np.ceil(window.place(losses.end_ns)).astype(np.intp)
    depth = np.zeros(TIMES + 2, np.int64)
    np.add.at(depth, begin, 1)
    np.add.at(depth, np.maximum(end, begin), -1)
    edges = np.flatnonzero(np.diff(np.cumsum(depth) > 0, prepend=False))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _drawn(
    marks: Mapping[int, str], missing: list[tuple[int, int]], form: Format, label: str
) -> str:
    scale = (form.width - form.left - form.right) / TIMES
    bars = "".join(
        f'<rect class=missing x="{form.left + begin * scale:.1f}" y="15" '
        f'width="{(end - begin) * scale:.1f}" height="4"/>'
        for begin, end in missing
    )
    # The area to point at is wider than the mark.
    drawn = "".join(
        f'<g><title>{title}</title><rect class=aim x="{form.left + column * scale - 2:.1f}" y="0" '
        f'width="{scale + 4:.1f}" height="{_HEIGHT}"/><rect class=again '
        f'x="{form.left + column * scale:.1f}" y="2" width="{max(2.0, scale - 1):.1f}" '
        'height="11"/></g>'
        for column, title in sorted(marks.items())
    )
    return (
        f'<svg class=losses viewBox="0 0 {form.width} {_HEIGHT}" '
        f'style="aspect-ratio:{form.width}/{_HEIGHT}" role="img" '
        f'aria-label="{escape(label, quote=True)}"><text x="{form.left - 8}" y="13" '
        f'text-anchor="end" style="fill:var(--soft)">TCP</text>{bars}{drawn}</svg>'
    )


def tables(summary: Mapping[str, Any]) -> str:
    """List who segments were sent to again, and the waits that these losses lengthened."""
    told = summary["retransmits"]
    if not told["count"]:
        return ""
    peers = [
        [
            f"{name(peer['peer'])} <span class=soft>{safe(kinds(peer['by_kind']))}</span>",
            f"{peer['count']:,}",
            f"{peer['segs']:,}",
            f"{peer['connections']:,}",
        ]
        for peer in told["by_peer"]
    ]
    rest = told["peers"] - len(peers)
    out = elements.table(["Sent again to", "times", "segments", "sockets"], peers)
    out += f"<p class=soft>and {rest:,} more</p>" if rest > 0 else ""
    if not told["lengthened"]:
        return out
    waits = [
        [
            f"{name(line['comm'] or '(name not recorded)')} "
            f"<span class=soft>{line['tid']}</span> in {name(line['syscall'])}, "
            f"{safe(kinds(line['kinds']))} of {name(line['peer'])}"
            f"<div class=soft>{_EVIDENCE[line['evidence']]}</div>",
            time(line["blocked_ns"]),
            time(line["overlap_ns"]),
        ]
        for line in told["lengthened"]
    ]
    note = (
        "How much of a blocking call lies within the time in which a segment was missing: "
        "evidence, not proof."
    )
    if told["lengthened_count"]:
        note += (
            f" In all {time(told['lengthened_ns'])} of {time(told['blocked_ns'])} in "
            f"{plural(told['lengthened_count'], 'call')}."
        )
    heads = ["Blocking calls that lost segments lengthened", "blocked", "overlap"]
    return out + elements.table(heads, waits) + f"<p class=soft>{note}</p>"
