"""What a spike was made of, and how that differs from the time just before it.

    spike = read_spike(bundle)
    analysis = analyse(open_capture(bundle), spike)

A bundle is a capture with a `spike.json` beside its tables. Figures are of its recorded rows: the
exact counters are of the whole bundle, not of a part of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from latrace.analysis import attribution_text, spike_text
from latrace.analysis.attribution import Evidence, sleeps
from latrace.analysis.capture import Capture
from latrace.analysis.causes import CAUSES, no_parts
from latrace.analysis.culprits import scan_slices, stack_numbers
from latrace.analysis.frames import name_stacks
from latrace.analysis.rows import Slow, scan
from latrace.analysis.selection import Selection
from latrace.analysis.sleep_calls import PARTS, SleepCalls, read_sleep_calls
from latrace.analysis.spike_file import SPIKE_FILE, Spike, Told, Trigger, read_object, read_spike
from latrace.analysis.spike_host import cpu_users, lock_words
from latrace.analysis.spike_parts import (
    LATE_NS,
    describe,
    foremost,
    grown,
    is_idle,
    read_timelines,
    where,
)
from latrace.analysis.spike_profiles import with_profiles
from latrace.analysis.spike_windows import Window, Windows, find_windows, percentile
from latrace.analysis.summary import summarise

__all__ = [
    "SPIKE_FILE",
    "Spike",
    "Told",
    "Trigger",
    "Window",
    "Windows",
    "analyse",
    "explain",
    "find_windows",
    "read_object",
    "read_spike",
]

_TOP = 10
_CULPRITS: Final = ("kthread", "own", "other")  # causes that a thread can be named for
_KEPT: Final = ("cause", "comm", "tid", "tgid", "vector", "ns", "share", "cgroup")
_LISTED = 5
_QUANTILES: Final = {0.5: "p50_ns", 0.9: "p90_ns", 0.99: "p99_ns", 0.999: "p999_ns"}
_ROWS_LACK: Final = 0.01


def explain(capture: Capture) -> Told | None:
    """Read what fired in a bundle, and tell what the spike was made of; None: it is no bundle.

    Raises CaptureError for a damaged file.
    """
    spike = read_spike(capture.path)
    if spike is None:
        return None
    windows = find_windows(capture, spike)
    spike = with_profiles(spike, capture.path, windows)
    return Told(spike, analyse(capture, spike, windows))


def analyse(capture: Capture, spike: Spike, windows: Windows | None = None) -> dict[str, Any]:
    """Tell what a spike was made of: the key `analysis` of `spike.json`, times in ns.

    `cause` is the main one: a cause of waits (`latrace.analysis.causes`) or, where something else
    was the reason, `blocked` (`name`: the system call), `on_cpu`, `lost` (TCP segments), `timer`,
    `entry` or `return` (parts of the lateness of sleep calls), or "" where nothing tells.
    `sentences` says it in words, the answer first. Everything in it can be written as JSON.
    `windows`: what `find_windows` found.

    Raises CaptureError for a damaged file.
    """
    trigger = spike.main
    windows = windows or find_windows(capture, spike)
    stretches = [one for one in (windows.spike, windows.baseline) if one is not None]
    timelines = read_timelines(capture, stretches)
    late_ns = windows.over_ns if trigger.kind == "sleep" and windows.over_ns else LATE_NS
    summaries, parts = [], []
    for window, timeline in zip(stretches, timelines, strict=True):
        summary = summarise(capture, selection=window.selection(capture))
        calls = read_sleep_calls(capture, window.selection(capture, over_ns=late_ns))
        summaries.append(summary)
        parts.append(describe(summary, calls, window, timeline, late_ns=late_ns))
    before = parts[1] if len(parts) > 1 else None
    grew = [
        {**line, "idle": is_idle(capture, line, timelines[0])}
        for line in grown(parts[0], before, timelines)
    ]
    grew.sort(key=lambda line: line["idle"])  # these tell of a reason elsewhere at most
    reason: dict[str, Any]
    if trigger.kind == "retransmits" and windows.bursts:
        reason = _lost(summaries[0])
    elif trigger.kind == "sleep" and windows.bursts:
        reason = _late(capture, windows)
    elif windows.bursts:
        selection = windows.spike.selection(capture, over_ns=windows.over_ns)
        reason = _slow(summarise(capture, selection=selection, top=_TOP))
    else:
        line = foremost(grew)
        reason = _nothing() if line is None else _grown(summaries[0], line)
    first = next((line for line in grew if _is(line, reason)), None)
    quality = summaries[0]["quality"]
    analysis: dict[str, Any] = {
        "spike": _window(windows.spike),
        "baseline": None if windows.baseline is None else _window(windows.baseline),
        "no_baseline": windows.no_baseline,
        "begin_realtime_ns": spike.realtime_ns(windows.spike.start_ns),
        "over_ns": windows.over_ns,
        "slow": windows.slow,
        "bursts": windows.bursts,
        "all_bursts": windows.all_bursts,
        "later": None if windows.later is None else _window(windows.later),
        "ongoing": windows.ongoing,
        **_worst(trigger, windows, parts[0], thinned=_thinned(quality)),
        **reason,
        "where": where(capture, first, timelines[0]) if first else None,
        "grew": [
            line
            if line["what"] not in {"blocked", "on_cpu"}
            else {**line, **where(capture, line, timelines[0])}
            for line in grew[:_TOP]
        ],
        "locked": lock_words(spike),
        "cpu_users": cpu_users(spike, _targets(summaries[0])),
        "thinned": _thinned(quality),
        "parts": {"spike": parts[0], "baseline": before},
    }
    analysis["sentences"] = spike_text.sentences(analysis, spike)
    return analysis


def _window(window: Window) -> dict[str, int]:
    return {"start_ns": window.start_ns, "end_ns": window.end_ns}


def _targets(summary: Mapping[str, Any]) -> set[int]:
    told = [*summary["capture"]["targets"], *summary["threads"]]
    return {entry["tgid"] for entry in told if isinstance(entry.get("tgid"), int)}


def _thinned(quality: Mapping[str, Any]) -> bool:
    """Whether waits of the bundle have no row: below a threshold, or a share that can be felt.

    A few never have one, as when a thread was waiting already when the recording began.
    """
    lack = quality["waits"] - quality["rows"]
    by_design = quality.get("row_threshold_ns", 0) > 0 and lack > 0
    return bool(by_design or lack > _ROWS_LACK * quality["waits"])


def _worst(
    trigger: Trigger, windows: Windows, part: Mapping[str, Any], *, thinned: bool
) -> dict[str, Any]:
    """Tell how bad it was: `value` in the trigger's unit, and the longest that there was."""
    value = trigger.value
    if trigger.kind == "sleep":
        longest, what = max((line["max_ns"] for line in part["sleeps"]), default=0), "sleep"
    elif trigger.kind == "retransmits":
        longest, what = part["retransmits"]["lengthened_ns"], "retransmits"
        value = max(value or 0, part["retransmits"]["segs"])
    else:
        longest, what = part["max_ns"], "wait"
    if trigger.kind in {"max", "sleep"} and windows.bursts and percentile(trigger) is None:
        value = max(value or 0, longest)  # the rule fires at the first one over the limit
    if trigger.kind == "wait" and windows.bursts and not thinned:
        key = _QUANTILES.get(percentile(trigger) or 0.0)
        value = max(value or 0, part[key] if key else 0)
    return {"value": value, "worst_ns": longest, "worst_what": what}


# --- the reason --------------------------------------------------------------------------------


def _nothing() -> dict[str, Any]:
    return {"cause": "", "name": "", "share": 0.0, "culprit": None, "quota": None, "answer": ""}


def _is(line: Mapping[str, Any], reason: Mapping[str, Any]) -> bool:
    """Whether a line of what grew is the reason."""
    if line["what"] == "wait":
        return bool(line["name"] == reason["cause"])
    return bool(line["what"] == reason["cause"] and line["name"] == reason["name"])


def _slow(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Of waits over a limit: `summary` is of these alone."""
    causes = summary["waits"]["by_cause_ns"]
    cause = max(CAUSES, key=lambda name: causes[name])
    total = sum(causes.values())
    return {
        **_nothing(),
        "cause": cause if total else "",
        "share": _share(causes[cause], total),
        **_culprits(summary, cause),
        "quota": _quota(summary) if cause == "throttled" else None,
        "vector": _vector(summary, cause),
        "answer": attribution_text.answer(summary),
        "by_cause_ns": causes,
    }


def _grown(summary: Mapping[str, Any], line: Mapping[str, Any]) -> dict[str, Any]:
    """Of what grew most: `summary` is of the whole spike."""
    if line["what"] != "wait":
        return {**_nothing(), "cause": line["what"], "name": line["name"]}
    causes = summary["waits"]["by_cause_ns"]
    cause, total = line["name"], sum(causes.values())
    return {
        **_nothing(),
        "cause": cause,
        "share": _share(causes[cause], total),
        **_culprits(summary, cause, everywhere=True),
        "quota": _quota(summary) if cause == "throttled" else None,
        "vector": _vector(summary, cause),
        "answer": attribution_text.answer(summary),
        "by_cause_ns": causes,
    }


def _lost(summary: Mapping[str, Any]) -> dict[str, Any]:
    peers = summary["retransmits"]["by_peer"]
    segs = summary["retransmits"]["segs"]
    first = peers[0] if peers else None
    return {
        **_nothing(),
        "cause": "lost",
        "name": first["peer"] if first else "",
        "share": _share(first["segs"], segs) if first else 0.0,
        "lengthened": summary["retransmits"]["lengthened"],
    }


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _culprits(
    summary: Mapping[str, Any], cause: str, *, everywhere: bool = False
) -> dict[str, Any]:
    """Name who had the CPU most: `culprits`, and `culprit`, the first that is of that cause.

    That is None where nobody can be named.
    """
    ending = "_all" if everywhere else ""
    key = ("culprits" if cause == "own" else "culprit_processes") + ending
    lines = [_entry(line) for line in summary["waits"][key]]
    found = [line for line in lines if line["cause"] == cause]
    return {
        "culprits": lines[:_LISTED],
        "culprit": found[0] if found and cause in _CULPRITS else None,
    }


def _entry(line: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **{key: line[key] for key in _KEPT},
        "threads": line.get("threads", 1),
        "function": line["mostly"]["function"] if line["mostly"] else "",
    }


def _quota(summary: Mapping[str, Any]) -> dict[str, Any] | None:
    groups = [group for group in summary["throttling"] if group["wait_ns"]]
    return dict(groups[0]) if groups else None


def _vector(summary: Mapping[str, Any], cause: str) -> str:
    lines = summary["waits"]["culprit_processes"] if cause == "softirq" else []
    return next((line["vector"] for line in lines if line["cause"] == "softirq"), "")


def _late(capture: Capture, windows: Windows) -> dict[str, Any]:
    """Of sleep calls over a limit: what their lateness and the waits in it were spent on."""
    over = windows.over_ns or 0
    calls = read_sleep_calls(capture, windows.spike.selection(capture, over_ns=over))
    lines = sleeps(_evidence(capture, calls, windows.spike.selection(capture), over))
    parts = {part: sum(line["tail"]["parts_ns"][part] for line in lines) for part in PARTS}
    causes = {cause: sum(line["tail"]["by_cause_ns"][cause] for line in lines) for cause in CAUSES}
    part = max(PARTS, key=lambda name: parts[name])
    cause = max(CAUSES, key=lambda name: causes[name])
    total, waited = sum(parts.values()), sum(causes.values())
    waiting = part == "run_queue"
    if not waited:  # the waits in these calls have no rows
        cause = "unknown"
    culprits = [_entry(one) for line in lines for one in line["tail"]["culprits"]]
    culprits.sort(key=lambda one: -one["ns"])
    for one in culprits:
        one["share"] = _share(one["ns"], waited)
    named = [one for one in culprits if one["cause"] == cause and cause in _CULPRITS]
    return {
        **_nothing(),
        "cause": cause if waiting else part,
        "name": lines[0]["call"] if lines else "",
        "share": _share(causes[cause] or 1, waited or 1) if waiting else _share(parts[part], total),
        "culprit": named[0] if named and waiting else None,
        "culprits": culprits[:_LISTED],
        "parts_ns": parts,
        "by_cause_ns": causes,
        "late": {
            "count": sum(line["tail"]["rows"] for line in lines),
            "total_ns": sum(line["tail"]["total_ns"] for line in lines),
            "calls": [line["call"] for line in lines[:_TOP]],
        },
    }


def _evidence(capture: Capture, calls: SleepCalls, selection: Selection, over_ns: int) -> Evidence:
    rows = scan(capture, selection, Slow(over_ns, len(calls.calls), calls.late))
    if rows.marks is None:
        rows.parts = no_parts()
    slices = scan_slices(capture, rows.marks, every=False)
    numbers = {number for some in slices.calls.values() for number in stack_numbers(some.values())}
    stacks = name_stacks(capture, numbers)
    return Evidence(rows=rows, slices=slices, calls=calls, names={}, stacks=stacks, top=_TOP)
