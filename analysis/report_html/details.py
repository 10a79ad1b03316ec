"""The middle of the page: over time, the distribution, sleep calls, threads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from latrace.analysis.causes import CAUSES
from latrace.analysis.report_html import elements, wording
from latrace.analysis.report_html.wording import name, percent, time
from latrace.analysis.words import plural

if TYPE_CHECKING:
    from latrace.analysis.report_html.page import Pictures

Summary = Mapping[str, Any]

_LISTED: Final = 10


def over_time(summary: Summary, pictures: Pictures) -> str:
    """Show the waits over time, and their causes."""
    out = []
    if pictures.heat:
        scale = "<span class=scale></span>"
        out.append(
            elements.figure(
                "When waits ended, and how long they were",
                pictures.heat + pictures.losses,
                f"One wait {scale} the most, on a logarithmic scale.{_marks(pictures)}",
            )
        )
    elif pictures.losses:
        out.append(
            elements.figure("When TCP segments were lost", pictures.losses, _marks(pictures))
        )
    if pictures.causes:
        whole = summary["waits"]["by_cause_ns"]
        legend = "".join(
            f"<span>{elements.swatch(f'c-{cause}')}{cause}</span>"
            for cause in CAUSES
            if whole.get(cause)
        )
        out.append(
            elements.figure(
                "How many threads waited at a time, by cause",
                pictures.causes,
                f"<span class=legend>{legend}</span>",
            )
        )
    if out and pictures.heat_note:
        out.append(f"<p class=soft>{pictures.heat_note}</p>")
    return "".join(out)


def _marks(pictures: Pictures) -> str:
    if not pictures.losses:
        return ""
    return (
        f" {elements.swatch('net')}A TCP segment was sent again; the bar below shows how long one "
        "was missing."
    )


def distribution(summary: Summary, pictures: Pictures) -> str:
    """Show how many waits were how long."""
    if not pictures.tail:
        return ""
    exact = not summary["quality"]["totals_from_rows"]
    note = (
        "Counted in the kernel, every wait: exact to the width of a bucket, 1.6 %."
        if exact
        else "Counted from the recorded rows."
    )
    return elements.figure("Which share of the waits is longer than a time", pictures.tail, note)


def sleeps(summary: Summary, pictures: Pictures) -> str:
    """Show by how much each kind of sleep call overshot, and through what."""
    sleeps = summary["sleeps"][:_LISTED]
    if not sleeps:
        return ""
    legend = "".join(
        f"<span>{elements.swatch(f'p-{part}')}{part.replace('_', ' ')} "
        f"<span class=soft>{about}</span></span>"
        for part, about in wording.PARTS.items()
    )
    out = [
        "<p>By how much calls came back later than they had asked for, and through what.</p>",
        f"<p class=legend>{legend}</p>",
        *(_sleep(line) for line in sleeps),
    ]
    if pictures.sleeps:
        colours = "".join(
            f"<span>{elements.swatch(f's-{number}')}{name(call)}</span>"
            for number, call in enumerate(pictures.calls)
        )
        out.append(
            elements.figure(
                "Overshoot by the time asked for",
                pictures.sleeps,
                f"<span class=legend>{colours}</span><br>The larger a point, the more calls.",
            )
        )
    return "".join(out)


def _sleep(line: Mapping[str, Any]) -> str:
    overshoot, tail = line["overshoot_ns"], line.get("tail") or {}
    asked = line["requested_p50_ns"]
    counted = line.get("overshot", line["count"])
    facts = [
        plural(line["count"], "call"),
        f"asked for {time(asked)} (median)" if asked >= 0 else "",
        f"{line['early']:,} woken before the deadline" if line.get("early") else "",
    ]
    out = (
        f"<div class=call><h3>{name(line['call'])}</h3>"
        f"<p class=soft>{', '.join(fact for fact in facts if fact)}</p>"
    )
    if counted:
        out += (
            f"<p>overshoot P50 <b>{time(overshoot['p50'])}</b>, "
            f"P99 <b>{time(overshoot['p99'])}</b>, max <b>{time(overshoot['max'])}</b></p>"
        )
    for label, parts in (("all", line["parts_ns"]), ("slowest", tail.get("parts_ns", {}))):
        bar = elements.bar(parts, wording.PARTS, "p", thin=True)
        if bar:
            told = ", ".join(
                f"{part.replace('_', ' ')} {percent(parts[part], sum(parts.values()))}"
                for part in wording.PARTS
                if parts.get(part)
            )
            out += f"<div class=parts><span>{label}</span>{bar}<span class=soft>{told}</span></div>"
    blamed = [culprit for culprit in tail.get("culprits", []) if culprit["ns"]]
    if blamed:
        first = blamed[0]
        out += (
            f"<p>{percent(first['share'], 1)} of the run queue part of the slowest: "
            f"{wording.who(first)}</p>"
        )
    return out + "</div>"


def threads(summary: Summary) -> str:
    """List the threads that waited most."""
    threads = [thread for thread in summary["threads"] if thread["waits"]]
    if not threads:
        return ""
    rows = [
        [
            name(thread["comm"] or "(name not recorded)")
            + f" <span class=soft>{thread['tid']}</span>"
            + elements.bar(thread.get("by_cause_ns", {}), wording.CAUSES, "c", thin=True),
            f"{thread['waits']:,}",
            time(thread["wait_ns"]),
            time(thread["max_ns"]),
            time(thread["blocked_ns"]),
        ]
        for thread in threads
    ]
    total = summary["quality"].get("threads", len(threads))
    more = f"<p class=soft>and {total - len(threads):,} more</p>" if total > len(threads) else ""
    return elements.table(["Waited most", "waits", "waited", "longest", "blocked"], rows) + more


def around(summary: Summary) -> str:
    """List who woke them, and what they were blocked in."""
    contexts = {"hardirq": "a hardware interrupt", "softirq": "a soft interrupt"}
    wakers = [
        [
            contexts.get(waker["ctx"])
            or f"{name(waker['comm'] or 'the idle task')} <span class=soft>{waker['tid']}</span>",
            f"{waker['waits']:,}",
            time(waker["wait_ns"]),
        ]
        for waker in summary["wakers"]
    ]
    calls = [
        [
            name(call["call"]) if call["call"] else "no system call (page fault, signal)",
            f"{call['count']:,}",
            time(call["blocked_ns"]),
            time(call["wait_ns"]),
        ]
        for call in summary["syscalls"]
    ]
    out = ""
    if wakers:
        out += elements.table(["Woken by", "waits", "waited then"], wakers)
    if calls:
        out += elements.table(["Blocked in", "times", "blocked", "waited then"], calls)
    return out
