"""The top of the page: what was traced, how long it waited, and why."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

from latrace.analysis import attribution_text, retransmits_text
from latrace.analysis.causes import CAUSES
from latrace.analysis.frames import telling
from latrace.analysis.report_html import elements, wording
from latrace.analysis.report_html.wording import NBSP, name, percent, prose, safe, time
from latrace.analysis.text import render_text
from latrace.analysis.words import percent as whole_percent
from latrace.analysis.words import plural, shares

Summary = Mapping[str, Any]

_WIDE_TEXT: Final = 4000  # columns: a warning is one line then
_LISTED: Final = 10


def head(summary: Summary) -> str:
    """Write what was traced, and the overview."""
    return (
        f"<header><p class=kicker>latrace · waits for a CPU{when(summary['capture'])}</p>"
        f"{title(summary)}{overview(summary)}</header>"
    )


def title(summary: Summary) -> str:
    """Name what was traced."""
    return f"<h1>{_targets(summary)}</h1>"


def overview(summary: Summary) -> str:
    """Write the headline, the warnings and the quantiles."""
    waits, capture = summary["waits"], summary["capture"]
    seconds = time(capture["duration_s"] * 1e9)
    if not waits["count"]:
        lead = f"No wait for a CPU in {seconds}."
    else:
        lead = (
            f"{plural(waits['count'], 'wait')} for a CPU in {seconds}; one in a hundred was "
            f"longer than <strong>{time(waits['p99_ns'])}</strong>."
        )
    tiles = "".join(
        f"<div><dt>{label}</dt><dd>{time(waits[key])}</dd></div>"
        for label, key in (
            ("P50", "p50_ns"),
            ("P90", "p90_ns"),
            ("P99", "p99_ns"),
            ("P99.9", "p999_ns"),
            ("max", "max_ns"),
            ("in all", "total_ns"),
        )
    )
    because = (
        f"<p class=lead>{prose(attribution_text.answer(summary))}</p>" if _known(summary) else ""
    )
    lost = retransmits_text.answer(summary)
    because += f"<p class=lead>{prose(lost)}</p>" if lost else ""
    alarms = "".join(f"<p>{prose(text)}</p>" for text in _warnings(summary))
    return (
        f"<p class=lead>{lead}</p>{because}{_part(summary)}"
        + (f"<div class=alarms>{alarms}</div>" if alarms else "")
        + (f"<dl class=tiles>{tiles}</dl>" if waits["count"] else "")
    )


def when(capture: Mapping[str, Any]) -> str:
    """Say on which host a capture was made, and when; begins with a separator."""
    at = capture.get("started_realtime_ns") or 0
    host = f" · {name(capture['host'])}" if capture.get("host") else ""
    try:
        moment = datetime.fromtimestamp(at // 10**9, tz=UTC)
    except (ValueError, OverflowError, OSError, TypeError):
        return host
    return host + (f" · {moment:%Y-%m-%d %H:%M} UTC" if at else "")


def _part(summary: Summary) -> str:
    part = summary.get("selection")
    if not part:
        return ""
    told = [f"from {time(part['since_ns'])} to {time(part['until_ns'])} after tracing began"]
    if part["tids"]:
        told.append("of " + plural(len(part["tids"]), "thread"))
    if part["over_ns"] is not None:
        told.append(f"longer than {time(part['over_ns'])}")
    return f"<p>A part of the capture: waits {', '.join(told)}.</p>"


def _targets(summary: Summary) -> str:
    targets = summary["capture"]["targets"]
    if not targets:
        return "no process"
    first = targets[0]
    label = name(first.get("comm") or "process")
    more = f" and {len(targets) - 1:,} more" if len(targets) > 1 else ""
    return f"{label} <span class=soft>(pid{NBSP}{safe(first.get('tgid', '?'))})</span>{more}"


def plain_targets(summary: Summary) -> str:
    """Name what was traced, for the title."""
    targets = summary["capture"]["targets"]
    first = targets[0] if targets else {"comm": "no process", "tgid": "-"}
    return f"{safe(first.get('comm') or 'process')} ({safe(first.get('tgid', '?'))})"


def _warnings(summary: Summary) -> list[str]:
    """Take over what the report in words warns of."""
    lines = render_text(summary, width=_WIDE_TEXT).splitlines()
    return [line.removeprefix("!!! ") for line in lines if line.startswith("!!! ")]


def _known(summary: Summary) -> bool:
    """Tell whether the capture says anything of causes."""
    causes = summary["waits"]["by_cause_ns"]
    return any(ns for cause, ns in causes.items() if cause != "unknown")


def why(summary: Summary) -> str:
    """Write where the time of the slow waits went: by cause, by quota, by culprit."""
    waits = summary["waits"]
    tail, whole = waits["tail"], waits["by_cause_ns"]
    if not waits["count"]:
        return ""
    if not _known(summary):
        return "<p>This capture does not tell what held the threads back.</p>"
    out = []
    causes = tail["by_cause_ns"]
    slowest = f"slowest {whole_percent(tail['count'], waits['count'])}".replace(" ", NBSP)
    if tail["count"] and sum(causes.values()):
        out.append(elements.bar(causes, wording.CAUSES, "c"))
    else:
        out.append(f"<p class=lead>No wait was longer than {time(tail['over_ns'])}.</p>")
        causes = {}
    out.append(_causes(causes, whole, slowest))
    out.append(_quotas(summary))
    out.append(_culprits(summary))
    return "".join(out)


def _culprit_lines(summary: Summary) -> list[Mapping[str, Any]]:
    waits = summary["waits"]
    lines = waits.get("culprit_processes") or waits.get("culprits") or []
    return list(lines)


def _causes(tail: Mapping[str, int], whole: Mapping[str, int], slowest: str) -> str:
    of_tail, of_all = sum(tail.values()), sum(whole.values())
    # What was not observed is always said, and last.
    order = sorted(
        (cause for cause in CAUSES if whole.get(cause) or tail.get(cause) or cause == "unknown"),
        key=lambda cause: (cause == "unknown", -tail.get(cause, 0), -whole.get(cause, 0)),
    )
    shared = [
        shares([parts.get(cause, 0) for cause in order], total)
        for parts, total in ((tail, of_tail), (whole, of_all))
    ]
    rows = [
        [
            f"{elements.swatch(f'c-{cause}')}<b>{cause}</b> "
            f"<span class=soft>{wording.CAUSES[cause]}</span>",
            *([time(tail.get(cause, 0)), prose(shared[0][number])] if tail else []),
            time(whole.get(cause, 0)),
            prose(shared[1][number]),
        ]
        for number, cause in enumerate(order)
    ]
    heads = [slowest, "", "all waits", ""] if tail else ["all waits", ""]
    return elements.table(["What held them back", *heads], rows)


def _culprits(summary: Summary) -> str:
    lines = _culprit_lines(summary)[:_LISTED]
    if not lines:
        return ""
    most = max(line["ns"] for line in lines) or 1
    rows = []
    for line in lines:
        cause = line.get("cause") if line.get("cause") in CAUSES else "other"
        facts = [
            fact
            for fact in (
                wording.scheduling(line),
                plural(line["threads"], "thread") if line.get("threads", 1) > 1 else "",
                name(line["cgroup"]) if line.get("cgroup") not in (None, "", "/") else "",
            )
            if fact
        ]
        about = f"<div class=soft>{' · '.join(facts)}</div>" if facts else ""
        stack = line.get("stack") or []
        # The program's own functions, if it has any: the kernel's say only that it left the CPU.
        inner = line.get("kernel_frames", 0)
        stack = stack[inner:] or telling(stack[:inner])
        if stack:
            about += f"<div class=stack>{wording.frames(stack)}</div>"
        length = f"width:{100 * line['ns'] / most:.1f}%;background:var(--c-{cause})"
        rows.append(
            [
                f'{wording.who(line)}{about}<div class=meter><i style="{length}"></i></div>',
                time(line["ns"]),
                f"{percent(line['share'], 1)}",
            ]
        )
    note = "" if summary["waits"].get("culprit_processes") else " (threads)"
    return elements.table([f"Who had the CPU in the slowest waits{note}", "for", "share"], rows)


def _quotas(summary: Summary) -> str:
    groups = [group for group in summary.get("throttling", []) if group.get("wait_ns")]
    if not groups:
        return ""
    rows = [
        [
            f"{name(group['cgroup'])} <span class=soft>{_quota(group)}</span>",
            time(group["tail_ns"]),
            time(group["wait_ns"]),
            time(group["throttled_ns"]) if "throttled_ns" in group else "-",
        ]
        for group in groups[:_LISTED]
    ]
    return elements.table(["CPU quota used up", "slowest", "all waits", "its cpu.stat"], rows)


def _quota(group: Mapping[str, Any]) -> str:
    if "quota_us" not in group or not group.get("period_us"):
        return ""
    quota, period = time(1000 * group["quota_us"]), time(1000 * group["period_us"])
    return f"{quota} of CPU in every {period}"
