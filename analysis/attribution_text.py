"""Why, in words: one sentence, the table of causes and culprits, quotas, and late sleep calls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from latrace.analysis.causes import CAUSES
from latrace.analysis.names import UNKNOWN, fit_name
from latrace.analysis.page import BOLD, NUMBER, SHOWN, Page, comm, frames, who
from latrace.analysis.words import (
    cells,
    duration,
    fit,
    pad,
    percent,
    plural,
    say_tenths,
    share,
    shares,
    tenths,
    visible,
)

Summary = Mapping[str, Any]
Entry = Mapping[str, Any]

_CAUSES = {
    "throttled": "its CPU quota was used up",
    "irq": "hardware interrupts",
    "softirq": "soft interrupts",
    "idle": "the CPU was idle, being woken",
    "kthread": "a kernel thread had the CPU",
    "own": "its own process had the CPU",
    "other": "another process had the CPU",
    "unknown": "unknown",
}
SHORT: Final = {
    "throttled": "CPU quota",
    "irq": "hardware interrupts",
    "softirq": "soft interrupts",
    "idle": "waking an idle CPU",
    "kthread": "kernel threads",
    "own": "own threads",
    "other": "other processes",
    "unknown": "unknown",
}
_PARTS = {"entry": "entry", "timer": "timer", "run_queue": "run queue", "return": "return"}
_RT_PRIORITIES = 99  # the kernel counts the other way round
_NICE_0 = 120
_LISTED = 4  # culprits of one cause
_LISTED_CALLS = 5
_NOTABLE = 0.005  # of the slow waits' time: less is summed up
_SECOND = 0.1  # a second reason worth a place in the sentence
_SINGLE = 0.3  # a process with less of the time is one of many
_EXPLAINED = 0.1  # of the worst P99 among the sleep calls: less is not taken apart
_BESIDE = 0.1  # what is told beside the causes is at least so much of the time


# --- the sentence ------------------------------------------------------------------------------


def answer(summary: Summary) -> str:
    """Say in a sentence what the slow waits were spent on; "" when there was no wait."""
    waits, tail = summary["waits"], summary["waits"]["tail"]
    if not waits["count"] or not tail["count"]:
        return ""
    subject = _subject(summary)
    if not tail["total_ns"]:
        return f"Nothing was recorded of {subject[0].lower()}{subject[1:]}."
    least = "at least " if tail["rows"] < tail["count"] else ""
    took = f"{subject} took {least}{duration(tail['total_ns'])}"
    if "causes" in summary["capture"]["without"]:
        return f"{took}. Why was not recorded (--without causes)."
    return f"{took}: {_reasons(summary)}."


def _subject(summary: Summary) -> str:
    waits, tail = summary["waits"], summary["waits"]["tail"]
    count, over = tail["count"], f"over {duration(tail['over_ns'])}"
    if _chosen_over(summary):
        return f"The {plural(count, 'wait')} {over}"
    if count == 1:
        return "The slowest wait" if waits["count"] > 1 else "The only wait"
    if count == waits["count"]:
        return f"All {plural(count, 'wait')}"
    return f"The slowest {percent(count, waits['count'])} of waits ({over})"


def _chosen_over(summary: Summary) -> bool:
    return bool(summary["selection"]) and summary["selection"]["over_ns"] is not None


def _reasons(summary: Summary) -> str:
    whole = summary["waits"]["tail"]["total_ns"]
    claims = sorted(_claims(summary), key=lambda claim: -claim[0])
    told = [claims[0], *(claim for claim in claims[1:2] if claim[0] >= _SECOND * whole)]
    (first, text), *rest = told
    said = f"for {_part(first, whole)} of it {text}"
    return said + "".join(f"; for {percent(ns, whole)} {also}" for ns, also in rest)


def _part(ns: int, whole: int) -> str:
    return "all" if ns == whole else percent(ns, whole)


def _claims(summary: Summary) -> Iterator[tuple[int, str]]:
    """Yield what can be said to have held the slow waits up, with its time."""
    waits = summary["waits"]
    tail, causes = waits["tail"], waits["tail"]["by_cause_ns"]
    processes = [one for one in waits["culprit_processes"] if one["cause"] == "other"]
    unnamed = tail["not_itemised_ns"]["other"]
    named = causes["other"] - unnamed
    if not processes:
        yield causes["other"], "other processes had the CPU, which ones was not recorded"
    elif named < unnamed:  # the one with most of what is known may not be the one with most
        first = f"{_name(processes[0], 'pid')} with {percent(processes[0]['ns'], causes['other'])}"
        known = (
            f"which ones is known of {percent(named, causes['other'])} of that, foremost {first}"
        )
        yield causes["other"], f"other processes had the CPU; {known}"
    else:
        yield from _others(processes, named)
        yield unnamed, "other processes had the CPU, which ones was not recorded"
    own = [one for one in waits["culprits"] if one["cause"] == "own"]
    text = "threads of its own process had the CPU"
    if own and own[0]["ns"] >= _SINGLE * causes["own"]:
        text += f", most of all {_name(own[0], 'tid')}{_mostly(own[0])}"
    yield causes["own"], text
    kernel = [one for one in waits["culprit_processes"] if one["cause"] == "kthread"]
    foremost = f" {_name(kernel[0], 'tid')}" if kernel else ""
    yield (
        causes["kthread"],
        f"the kernel's own threads had the CPU, most of all{foremost}".removesuffix(
            ", most of all"
        ),
    )
    yield causes["irq"], "its CPU was busy with hardware interrupts"
    vectors = [one["vector"] for one in waits["culprit_processes"] if one["cause"] == "softirq"]
    kind = f" ({visible(vectors[0])})" if vectors and vectors[0] else ""
    yield causes["softirq"], f"its CPU was busy with soft interrupts{kind}"
    yield causes["throttled"], _quota_claim(summary["throttling"])
    yield causes["idle"], "its CPU was idle and had yet to be woken"
    yield causes["unknown"], "the cause is unknown"


def _others(processes: Sequence[Entry], whole_ns: int) -> Iterator[tuple[int, str]]:
    first = processes[0]
    if first["ns"] < _SINGLE * whole_ns:
        foremost = f"foremost {_name(first, 'pid')} with {percent(first['ns'], whole_ns)} of that"
        yield whole_ns, f"other processes had the CPU, {foremost}"
        return
    for one in processes[:2]:
        how = _policy(one)
        named = _name(one, "pid", f", {how}" if how else "")
        yield one["ns"], f"{named} had the CPU{_mostly(one)}"


def _quota_claim(groups: Sequence[Entry]) -> str:
    if not groups or not groups[0]["tail_ns"] or not groups[0]["cgroup"]:
        return "its CPU quota was used up"
    limit = _limit(groups[0])
    return f"the CPU quota of {_cgroup(groups[0]['cgroup'])} was used up" + (
        f" ({limit})" if limit else ""
    )


def _limit(group: Entry) -> str:
    if not group.get("quota_us") or not group.get("period_us"):
        return ""
    quota, period = (duration(group[f"{name}_us"] * 1e3) for name in ("quota", "period"))
    return f"{quota} in each {period}"


def _mostly(entry: Entry) -> str:
    mostly = entry["mostly"]
    return f", mostly in {fit_name(visible(mostly['function']), 40)}" if mostly else ""


def _name(entry: Entry, number: str, more: str = "") -> str:
    """Name a culprit by its process (`pid`) or its thread (`tid`)."""
    if entry["cause"] == "irq":
        return "hardware interrupts"
    if entry["cause"] == "softirq":
        return visible(entry["vector"]) or "of a kind not recorded"
    value = entry["tgid" if number == "pid" else "tid"]
    named = comm(entry["comm"])
    return f"{named} ({number} {value}{more})" if named else f"{number} {value}{more}"


def _policy(entry: Entry) -> str:
    """Say how it was scheduled, for most of its time, if not as most are."""
    for how in entry["scheduled"]:
        policy, prio = how["policy"], how["prio"]
        text = ""
        if policy in {"fifo", "rr"}:
            text = f"SCHED_{policy.upper()} priority {_RT_PRIORITIES - prio}"
        elif policy in {"deadline", "ext"}:
            text = f"SCHED_{policy.upper()}"
        elif 0 <= prio < _NICE_0 and entry["cause"] != "kthread":  # many of these are by default
            text = f"nice {prio - _NICE_0}"
        if text and how["ns"] >= _BESIDE * entry["ns"]:
            nearly = how["ns"] >= (1 - _BESIDE) * entry["ns"]
            return text if nearly else f"{text} for {percent(how['ns'], entry['ns'])} of it"
    return ""


def _cgroup(path: str) -> str:
    return fit(visible(path), 48)


# --- the table ---------------------------------------------------------------------------------

_COLUMNS = (10, 9, 11, 9)


def causes(page: Page, summary: Summary) -> None:
    """Write where the time of the slow waits went, and that of all."""
    waits, tail = summary["waits"], summary["waits"]["tail"]
    if not tail["total_ns"] or "causes" in summary["capture"]["without"]:
        return
    slow, every = tail["by_cause_ns"], waits["by_cause_ns"]
    both = tail["count"] < waits["count"]
    slow_tenths = dict(zip(CAUSES, tenths(list(slow.values()), tail["total_ns"]), strict=True))
    all_shares = dict(zip(CAUSES, shares(list(every.values()), waits["total_ns"]), strict=True))
    page.line()
    every_head = "these waits" if summary["selection"] else "all waits"
    _head(page, "Where the time went", [_slow_head(summary) if both else "", every_head])
    shown = [cause for cause in CAUSES[:-1] if slow[cause] or (both and every[cause])]
    for cause in [*sorted(shown, key=lambda cause: (-slow[cause], -every[cause])), "unknown"]:
        cells = [duration(every[cause]), all_shares[cause]]
        if both:
            said = say_tenths(slow_tenths[cause], slow[cause], tail["total_ns"])
            cells = [duration(slow[cause]), said, *cells]
        _row(page, f"  {_CAUSES[cause]}", cells)
        _culprits(page, summary, cause, of=slow_tenths[cause])
    whole = [duration(waits["total_ns"]), "100.0 %"]
    slow_whole = [duration(tail["total_ns"]), "100.0 %"] if both else []
    _row(page, "  in all", [*slow_whole, *whole], style=BOLD)
    if tail["rows"] < tail["count"]:
        page.prose(
            f"The left column is of the {tail['rows']:,} slow waits, of {tail['count']:,}, whose "
            "details were recorded."
        )
    for text in _beside(summary):
        page.prose(text)


def _slow_head(summary: Summary) -> str:
    tail, waits = summary["waits"]["tail"], summary["waits"]
    return f"slowest {percent(tail['count'], waits['count'])}"


def _head(page: Page, title: str, heads: Sequence[str]) -> None:
    first, second = _COLUMNS[0] + _COLUMNS[1], _COLUMNS[2] + _COLUMNS[3]
    text = pad(title, page.width - sum(_COLUMNS)) + heads[0].rjust(first) + heads[1].rjust(second)
    page.line(text, style=BOLD)


def _row(page: Page, name: str, cells: Sequence[str], *, style: str = "") -> None:
    """Write a name and two or four cells, the last ones at the right."""
    cells = ["", ""] * (len(cells) == 2) + list(cells)
    numbers = "".join(cell.rjust(room) for cell, room in zip(cells, _COLUMNS, strict=True))
    page.line(pad(name, page.width - sum(_COLUMNS) - 1) + " " + numbers, style=style)


@dataclass(frozen=True, slots=True)
class _Part:
    """A line below that of a cause."""

    name: str
    ns: int
    all_ns: int | None = None
    details: tuple[str, ...] = ()


def _culprits(page: Page, summary: Summary, cause: str, *, of: int) -> None:
    """Write who it was, below the line of a cause that has `of` tenths of a percent."""
    waits, tail = summary["waits"], summary["waits"]["tail"]
    parts = list(_who_it_was(summary, cause, page.width))
    rounded = tenths([part.ns for part in parts], tail["total_ns"], of=of)
    both = tail["count"] < waits["count"]
    for part, tenth in zip(parts, rounded, strict=True):
        cells = [duration(part.ns), say_tenths(tenth, part.ns, tail["total_ns"])]
        if both and part.all_ns is not None:
            cells += [duration(part.all_ns), share(part.all_ns, waits["total_ns"])]
        elif both:
            cells += ["", ""]
        _row(page, f"    {part.name}", cells)
        for detail in part.details:
            page.line(" " * 6 + detail)


def _who_it_was(summary: Summary, cause: str, width: int) -> Iterator[_Part]:
    """Yield the parts of one cause's time: who, who else, and what was not recorded."""
    room = width - sum(_COLUMNS) - 5
    tail = summary["waits"]["tail"]
    rest = tail["by_cause_ns"][cause]
    if cause == "throttled":
        for group in summary["throttling"]:
            if group["wait_ns"] and group["cgroup"]:
                yield _Part(_cgroup(group["cgroup"]), group["tail_ns"], group["wait_ns"])
        return
    listed = _listed(summary, cause)
    for one, ns in listed:
        many = one.get("threads", 1)
        more = f", {many:,} threads" if many > 1 and cause == "other" else ""
        name = _name(one, "pid" if cause == "other" else "tid")
        name += more if cells(name + more) <= room else ""
        yield _Part(name, ns, one["all_ns"], tuple(_details(summary, one, width - 6)))
        rest -= ns
    unnamed = tail["not_itemised_ns"].get(cause, 0)
    if listed and rest > unnamed:
        yield _Part("others", rest - unnamed)
    if unnamed and (listed or unnamed >= _NOTABLE * tail["total_ns"]):
        yield _Part("not recorded who", unnamed)


def _listed(summary: Summary, cause: str) -> list[tuple[Entry, int]]:
    """Choose the culprits worth a line, with their time in slow waits, the longest first.

    They are those of the slow waits, and those who were great in all waits.
    """
    if cause == "irq":
        return []  # there is but one kind
    waits = summary["waits"]
    # Of one's own process the threads are of interest; of others, the processes.
    kind = "culprits" if cause == "own" else "culprit_processes"
    slow, every = (
        [one for one in waits[name] if one["cause"] == cause] for name in (kind, f"{kind}_all")
    )
    listed = [
        (one, one["ns"])
        for one in slow[:_LISTED]
        if one["ns"] >= _NOTABLE * waits["tail"]["total_ns"]
    ]
    told = {_identity(one) for one, _ in listed}
    in_slow = {_identity(one): one["ns"] for one in slow}
    listed += [
        (one, in_slow.get(_identity(one), 0))
        for one in every[:_LISTED]
        if _identity(one) not in told and one["ns"] >= _BESIDE * waits["total_ns"]
    ]
    return sorted(listed, key=lambda item: -item[1])


def _identity(one: Entry) -> tuple[Any, ...]:
    return one["tgid"], one["tid"] if one["cause"] == "own" else 0, one["vector"]


def _details(summary: Summary, one: Entry, room: int) -> Iterator[str]:
    """Yield how a culprit was scheduled, where that is out of the ordinary, and what it did."""
    ordinary = {thread.get("cgroup", "") for thread in summary["threads"]} | {"", "/"}
    kernel = one["cause"] == "kthread"
    how = [_policy(one)]
    if one["cause"] == "other" and one["cgroup"] not in ordinary:
        how.append(f"cgroup {_cgroup(one['cgroup'])}")
    if any(how):
        yield ", ".join(filter(None, how))
    if set(one["work"][:SHOWN]) - {UNKNOWN}:
        did = "until it blocked in" if one["left"] == "blocked" and not kernel else "in"
        yield f"{did} {frames(one['work'], room - len(did) - 1)}"


def _beside(summary: Summary) -> Iterator[str]:
    """Yield what goes with the slow waits but is no part of them."""
    tail = summary["waits"]["tail"]
    whole = tail["total_ns"]
    elsewhere = tail["idle_elsewhere_ns"]
    if elsewhere >= _BESIDE * whole:
        yield (
            f"For {duration(elsewhere)} of it, {percent(elsewhere, whole)}, another CPU was idle "
            "that the thread may run on."
        )
    for waker in tail["wakers"][:1]:
        if waker["waited_ns"] >= _BESIDE * whole:
            by = f", woken by thread {waker['woken_by']}" if waker["woken_by"] else ""
            name = comm(waker["comm"]) or "the waker"
            yield (
                f"Before: {name} (tid {waker['tid']}), which woke {waker['waits']:,} of them, had "
                f"itself waited {duration(waker['waited_ns'])} for a CPU{by}."
            )


# --- quotas, threads, sleep calls --------------------------------------------------------------


def quotas(page: Page, summary: Summary) -> None:
    """Write what the CPU quotas of the targets' groups allow, and how often they were used up."""
    groups = [
        group
        for group in summary["throttling"]
        if group["wait_ns"] or group.get("nr_throttled") or group["tail_ns"]
    ]
    if not groups:
        return
    page.line()
    page.line("CPU quotas", style=BOLD)
    for group in groups[:_LISTED]:
        parts = []
        if _limit(group):
            parts.append(f"may run {_limit(group)}")
        if "nr_throttled" in group:
            parts.append(
                f"used up in {group['nr_throttled']:,} of "
                f"{plural(group.get('nr_periods', 0), 'period')}"
            )
        if group.get("throttled_ns"):
            parts.append(f"stopped for {duration(group['throttled_ns'])} by its own count")
        parts.append(
            f"{duration(group['wait_ns'])} of the waits recorded ({plural(group['waits'], 'wait')})"
        )
        page.prose(f"{_cgroup(group['cgroup']) or '(group not recorded)'}: {'; '.join(parts)}")


def threads(page: Page, summary: Summary) -> None:
    """Write whose the slow waits were, if there is more than one thread."""
    tail = summary["waits"]["tail"]
    if len(tail["threads"]) < 2:
        return
    room = page.width - 2 * NUMBER - 26
    page.line()
    page.line(
        pad("Threads with the slow waits", room)
        + "waits".rjust(NUMBER)
        + "waited".rjust(NUMBER)
        + "  mostly",
        style=BOLD,
    )
    for thread in tail["threads"][:_LISTED]:
        parts = thread["by_cause_ns"]
        cause = max(CAUSES, key=lambda cause: parts[cause])
        page.line(
            pad("  " + who(thread["tid"], thread["comm"]), room)
            + f"{thread['waits']:,}".rjust(NUMBER)
            + duration(thread["wait_ns"]).rjust(NUMBER)
            + f"  {percent(parts[cause], thread['wait_ns'])} {SHORT[cause]}"
        )
    page.more(tail["thread_count"], min(_LISTED, len(tail["threads"])))


def sleep_calls(page: Page, summary: Summary) -> None:
    """Write how late sleep calls came back, and through what."""
    calls = [call for call in summary["sleeps"] if call["overshot"]]
    if not calls:
        return
    page.table(
        "Sleep calls came back late by",
        ("calls", "p50", "p99", "max"),
        (
            (
                visible(call["call"]),
                [
                    f"{call['count']:,}",
                    *(duration(call["overshoot_ns"][name]) for name in ("p50", "p99", "max")),
                ],
            )
            for call in calls[:_LISTED_CALLS]
        ),
    )
    page.more(len(calls), min(_LISTED_CALLS, len(calls)))
    worst_ns = max(call["overshoot_ns"]["p99"] for call in calls)
    for call in calls[:_LISTED_CALLS]:
        if call["overshoot_ns"]["p99"] >= _EXPLAINED * worst_ns:
            for text in _overshoot(call):
                page.prose(text)


def _overshoot(call: Entry) -> Iterator[str]:
    tail = call["tail"]
    parts, total = tail["parts_ns"], tail["total_ns"]
    if not total:
        return
    said = shares([max(ns, 0) for ns in parts.values()], total)
    made = ", ".join(f"{_PARTS[part]} {text}" for part, text in zip(parts, said, strict=True))
    over = plural(tail["rows"], "call")
    yield (
        f"{visible(call['call'])} overshot by {duration(call['overshoot_ns']['p99'])} at P99. "
        f"Of {over} over {duration(tail['over_ns'])}: {made}."
    )
    waited = tail["wait_ns"]
    if waited and parts["run_queue"] >= _BESIDE * total:
        yield f"Its run queue part: {_run_queue(tail, waited)}."


def _run_queue(tail: Entry, waited: int) -> str:
    """Say what the waits inside late calls were spent on, the greatest first."""
    causes = dict(tail["by_cause_ns"])
    told = [(one["ns"], _name(one, "pid")) for one in tail["culprits"] if one["cause"] == "other"][
        :2
    ]
    causes["other"] -= sum(ns for ns, _ in told)
    told += [(ns, SHORT[cause]) for cause, ns in causes.items()]
    unknown = told.pop()
    told = sorted((one for one in told if one[0] > 0), key=lambda one: -one[0])
    if len(told) > _LISTED:
        told[_LISTED - 1 :] = [(sum(ns for ns, _ in told[_LISTED - 1 :]), "other causes")]
    told.append(unknown)
    said = shares([ns for ns, _ in told], waited)
    return ", ".join(f"{text} {name}" for (_, name), text in zip(told, said, strict=True))
