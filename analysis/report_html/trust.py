"""The end of the page: whether to believe it, and what the capture is of."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from html import escape
from typing import Any, Final

from latrace.analysis.report_html import elements
from latrace.analysis.report_html.wording import NBSP, name, percent, safe, time
from latrace.analysis.stack_quality import told
from latrace.analysis.text import books_by_their_clock, render_text
from latrace.analysis.words import plural, size

Summary = Mapping[str, Any]

_LISTED: Final = 10


def quality(summary: Summary, manifest: Mapping[str, Any]) -> str:
    """Say what was checked, lost and spent."""
    quality, overhead = summary["quality"], summary["overhead"]
    seconds = summary["capture"]["duration_s"]
    facts = [("checked", _books(quality)), ("recorded", _recorded(summary))]
    lost = [
        plural(quality[key], noun)
        for key, noun in (
            ("lost_events", "event"),
            ("lost_stacks", "stack"),
            ("lost_slices", "slice"),
            ("lost_sleeps", "sleep call"),
        )
        if quality.get(key)
    ]
    facts.append(("lost", ", ".join(lost) or "nothing"))
    edges = [
        f"{plural(quality[key], 'wait')} {text}"
        for key, text in (
            ("open_at_start", "under way when tracing began"),
            ("open_at_end", "not over when it ended"),
        )
        if quality.get(key)
    ]
    facts.append(("edges", ", ".join(edges)))
    if words := told(quality["stacks"]):
        facts.append(("stacks", safe(words)))
    steal = manifest.get("steal_ns")
    if isinstance(steal, int) and not isinstance(steal, bool):
        facts.append(("stolen", f"{time(steal)} of all CPUs' time, by the hypervisor"))
    cost = [f"latrace {_cpu(overhead['self_cpu_s'] * 1e9, seconds)}"]
    if overhead["bpf_ns"]:
        cost.append(f"its probes {_cpu(overhead['bpf_ns'], seconds)}")
    memory = overhead.get("max_rss_bytes")
    if isinstance(memory, int) and memory > 0:
        cost.append(f"{size(memory)} of memory")
    facts.append(("own cost", ", ".join(cost)))
    programs = [
        [name(program.get("name", "")), f"{program.get('runs', 0):,}", time(program.get("ns", 0))]
        for program in overhead["programs"]
        if _is_number(program.get("runs", 0)) and _is_number(program.get("ns", 0))
    ]
    details = ""
    if programs:
        table = elements.table(["Probe", "runs", "took"], programs[: 4 * _LISTED])
        details = f"<details><summary>Cost by probe</summary>{table}</details>"
    return elements.facts(facts) + details


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cpu(ns: float, seconds: float) -> str:
    return f"{time(ns)} of CPU" + (f" ({percent(ns, seconds * 1e9)})" if seconds else "")


def _books(quality: Mapping[str, Any]) -> str:
    blind = quality["books_blind"]
    if quality["coverage"] is None:
        text = "the kernel's own books have no wait to compare with"
    else:
        text = (
            f"{100 * quality['coverage']:.2f}{NBSP}% of the {time(quality['kernel_run_delay_ns'])} "
            "in the kernel's own books"
        )
        text += books_by_their_clock(quality).replace(" %", f"{NBSP}%")
    if blind["count"]:
        text += (
            f"; besides, {plural(blind['count'], 'wait')} ({time(blind['ns'])}) that the kernel "
            "never times"
        )
    return text


def _recorded(summary: Summary) -> str:
    quality, waits = summary["quality"], summary["waits"]
    if quality["totals_from_rows"]:
        return f"{plural(quality['rows'], 'wait')}; the figures are of these"
    if quality["rows"] >= waits["count"]:
        return "every wait, with its details"
    return (
        f"every wait was counted; {quality['rows']:,} "
        f"({percent(quality['row_wait_ns'], waits['total_ns'])} of the waiting) have details"
    )


def capture(summary: Summary, manifest: Mapping[str, Any]) -> str:
    """Say what the capture is of."""
    capture = summary["capture"]
    command = manifest.get("command")
    facts = [
        ("kernel", safe(capture.get("kernel", ""))),
        ("CPUs", safe(capture.get("cpus") or "")),
        ("lasted", time(capture["duration_s"] * 1e9)),
        ("closed", "in order" if capture["complete"] else "no: its last moments are missing"),
        (
            "command",
            name(shlex.join(map(str, command))) if isinstance(command, list) else "",
        ),
        ("latrace", safe(manifest.get("latrace", ""))),
        ("file", name(capture.get("path", ""))),
    ]
    rows = [
        [
            f"{name(target.get('comm') or '')} <span class=stack>"
            f"{safe(target.get('cmdline') or '')}</span>",
            safe(target.get("tgid", "")),
        ]
        for target in capture["targets"][:_LISTED]
    ]
    return elements.facts(facts) + (elements.table(["Traced", "pid"], rows) if rows else "")


def words(summary: Summary) -> str:
    """Write the report as it is printed in a terminal."""
    text = render_text(summary, width=80)
    return (
        "<details><summary>As <code>latrace report</code> prints it</summary>"
        f"<div class=scroll><pre>{escape(text)}</pre></div></details>"
    )
