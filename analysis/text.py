"""The report in words, for a terminal: the answer first, then what it is made of.

A pure function from a summary (`latrace.analysis.summary`) to text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from latrace.analysis import attribution_text, retransmits_text
from latrace.analysis.names import callers
from latrace.analysis.page import BOLD, LABEL, NUMBER, Page, comm, frames, who
from latrace.analysis.stack_quality import told
from latrace.analysis.words import cells, duration, fit, pad, percent, plural, share, size, visible

Summary = Mapping[str, Any]

_LISTED = 5
_LISTED_STACKS = 3
_LISTED_WARNINGS = 8
# The kernel reads its clock at other instructions than ours, and lets it stand still through a
# wake-up that preempts: up to so much of a single wait is no disagreement.
_CLOCK_STEP_NS = 5_000
_AGREES = 0.005

_KINDS = {"wakeup": "after a wake-up", "preempted": "preempted", "new": "newly started"}
_CONTEXTS = {"hardirq": "a hardware interrupt", "softirq": "a soft interrupt"}


def render_text(summary: Summary, *, width: int = 80, colour: bool = False) -> str:
    """Write the report; no line is wider than `width` columns (at least 60). Ends in a newline."""
    page = Page(max(width, 60), colour=colour)
    _unfinished(page, summary)
    page.line(_headline(summary, page.width), style=BOLD)
    answer = attribution_text.answer(summary)
    for said in (answer, retransmits_text.answer(summary)):
        page.prose(said, indent="", style=BOLD)
    _selected(page, summary)
    for warning in _warnings(summary):
        page.warn(warning)
    if summary["waits"]["count"]:
        _distribution(page, summary)
        attribution_text.causes(page, summary)
        attribution_text.quotas(page, summary)
        attribution_text.threads(page, summary)
    retransmits_text.retransmits(page, summary["retransmits"])
    attribution_text.sleep_calls(page, summary)
    if summary["waits"]["count"]:
        _processes(page, summary)
    _threads(page, summary)
    _wakers(page, summary)
    _syscalls(page, summary)
    _stacks(page, summary)
    _quality(page, summary)
    return page.text()


# --- the answer --------------------------------------------------------------------------------


def _unfinished(page: Page, summary: Summary) -> None:
    capture = summary["capture"]
    if not capture["complete"]:
        page.warn(
            "This capture was not closed: it is still being written, or latrace was killed. "
            "Its last moments are missing."
        )
    elif capture["truncated"]:
        page.warn(f"This capture is cut off: rows are missing in {', '.join(capture['truncated'])}")
    if summary["quality"]["totals_from_rows"] and not summary["selection"]:
        rows = plural(summary["quality"]["rows"], "recorded wait")
        page.warn(
            f"The exact counters were not written. The numbers below are summed from {rows}, "
            "and are too low if any was left out."
        )


def _headline(summary: Summary, width: int) -> str:
    waits, selection = summary["waits"], summary["selection"]
    ns = summary["capture"]["duration_s"] * 1e9
    seconds = duration(selection["until_ns"] - selection["since_ns"] if selection else ns)
    if summary["capture"]["all_sockets"]:
        segs = plural(summary["retransmits"]["segs"], "segment")
        return f"TCP of all processes: {segs} sent again in {seconds}; waits were not traced"
    if not waits["count"]:
        none = "no wait to run in this part" if selection else f"no wait to run in {seconds}"
        return f"{_target(summary['capture']['targets'], width - cells(none) - 2)}: {none}"
    said = f": {plural(waits['count'], 'wait')} in {seconds}; P99 {duration(waits['p99_ns'])}"
    target = _target(summary["capture"]["targets"], width - cells(said))
    explained = " (wait to run)"
    return target + said + (explained if cells(target + said + explained) <= width else "")


def _selected(page: Page, summary: Summary) -> None:
    """Say which part of the capture this is of, and what its figures are made from."""
    selection, quality = summary["selection"], summary["quality"]
    if not selection:
        return
    limits = []
    if selection["tids"]:
        tids = ", ".join(map(str, selection["tids"][:_LISTED]))
        more = len(selection["tids"]) - _LISTED
        limits.append(f"of thread {tids}" + (f" and {more:,} more" if more > 0 else ""))
    if selection["over_ns"] is not None:
        limits.append(f"longer than {duration(selection['over_ns'])}")
    since, until = selection["since_ns"], selection["until_ns"]
    whole = round(summary["capture"]["duration_s"] * 1e9)
    if since > 0 or until < whole:
        limits.append(
            f"that ended between {duration(since)} and {duration(until)} of the capture's "
            f"{duration(whole)}"
        )
    text = (
        f"Only waits and sleep calls {', '.join(limits)}: {plural(selection['rows'], 'wait')} of "
        f"{quality['rows']:,} recorded. Every figure is a sum of recorded waits, not an exact "
        "counter"
    )
    lacks = quality["rows"] < quality["waits"]
    if lacks:
        text += (
            f", and too low where waits have no details: {share(quality['rows'], quality['waits'])}"
            " of all have"
        )
    page.prose(f"{text}.")


def _target(targets: Sequence[Mapping[str, Any]], width: int) -> str:
    if not targets:
        return "no process"
    first = targets[0]
    text = f"{comm(first.get('comm')) or 'process'} (pid {first.get('tgid', '?')})"
    more = f" and {len(targets) - 1:,} more" if len(targets) > 1 else ""
    return fit(text, width - cells(more)) + more


def _warnings(summary: Summary) -> Iterator[str]:
    quality = summary["quality"]
    if quality["lost_events"]:
        text = (
            f"The details of {plural(quality['lost_events'], 'wait')} were lost: the ring was full."
        )
        if not quality["totals_from_rows"]:
            text += (
                " Counts and percentiles are exact all the same; the lists of wakers, calls and "
                "stacks lack them."
            )
        yield text
    for key, what in (("lost_slices", "culprits"), ("lost_sleeps", "sleep calls")):
        if quality.get(key):
            count = quality[key]
            yield f"{plural(count, 'record')} of {what} {'was' if count == 1 else 'were'} lost."
    if quality["lost_stacks"]:
        yield f"{plural(quality['lost_stacks'], 'stack')} could not be kept."
    degraded = quality["degraded"]
    for entry in degraded[:_LISTED_WARNINGS]:
        yield _degradation(entry, summary["capture"]["start_ns"])
    if len(degraded) > _LISTED_WARNINGS:
        yield f"and {len(degraded) - _LISTED_WARNINGS:,} more changes like these"
    coverage = quality["coverage"]
    if coverage is not None and not _books_agree(quality):
        seen, kernel = (duration(quality[f"{who}_run_delay_ns"]) for who in ("traced", "kernel"))
        text = (
            f"latrace counted {seen} for the waits that the kernel's own books time at {kernel} "
            f"({100 * coverage:.1f} %): totals may be that much too "
        )
        yield text + ("low." if coverage < 1 else "high.")


def _books_agree(quality: Mapping[str, Any]) -> bool:
    """Whether the two sums differ by no more than the clocks they are taken with."""
    kernel, traced = (quality[f"{who}_run_delay_ns"] for who in ("kernel", "traced"))
    if by_their_clock := quality.get("traced_by_kernel_clock_ns"):
        return bool(abs(by_their_clock - kernel) <= _AGREES * kernel)
    allowed = max(_AGREES * kernel, _CLOCK_STEP_NS * int(quality.get("timed_waits", 0)))
    return bool(abs(traced - kernel) <= allowed)


def _degradation(entry: Mapping[str, Any], start_ns: int) -> str:
    at, why = entry.get("at_ns"), visible(str(entry.get("why", "")))
    since = f"From {duration(at - start_ns)} on: " if isinstance(at, int) and at > start_ns else ""
    return f"{since}{visible(str(entry.get('what', '')))}{f' ({why})' if why else ''}"


# --- what it is made of ------------------------------------------------------------------------


def _distribution(page: Page, summary: Summary) -> None:
    waits = summary["waits"]
    page.line()
    columns = {
        "p50": waits["p50_ns"],
        "p90": waits["p90_ns"],
        "p99": waits["p99_ns"],
        "p99.9": waits["p999_ns"],
        "max": waits["max_ns"],
        "total": waits["total_ns"],
    }
    room = (page.width - LABEL) // len(columns)
    page.line(pad("Wait to run", LABEL) + "".join(name.rjust(room) for name in columns), style=BOLD)
    page.line(" " * LABEL + "".join(duration(value).rjust(room) for value in columns.values()))
    if not (summary["selection"] and summary["selection"]["over_ns"] is not None):
        page.prose(_tail(waits), label="slowest")
    kinds = sorted(waits["by_kind"].items(), key=lambda item: -item[1]["count"])
    counted = [
        f"{share(kind['count'], waits['count'])} {_KINDS.get(name, visible(name))}"
        for name, kind in kinds
        if kind["count"]
    ]
    if counted:
        page.prose(", ".join(counted), label="kinds")
    blocked = waits["blocked"]
    if blocked["count"]:
        page.prose(
            f"{plural(blocked['count'], 'time')}, {duration(blocked['total_ns'])} in all",
            label="blocked",
        )


def _tail(waits: Mapping[str, Any]) -> str:
    tail = waits["tail"]
    text = f"{plural(tail['count'], 'wait')} over {duration(tail['over_ns'])}"
    if not tail["rows"]:
        return text
    least = "" if tail["rows"] >= tail["count"] else "at least "
    return (
        f"{text} ({percent(tail['count'], waits['count'])}): {least}"
        f"{duration(tail['total_ns'])}, {share(tail['total_ns'], waits['total_ns'])} of the time"
    )


def _processes(page: Page, summary: Summary) -> None:
    processes = summary["processes"]
    if len(processes) < 2 or _one_thread_each(summary):
        return
    page.table(
        "Processes that waited most",
        ("waits", "waited", "longest", "blocked"),
        (
            (
                who(process["tgid"], process["comm"]),
                [
                    f"{process['waits']:,}",
                    duration(process["wait_ns"]),
                    duration(process["max_ns"]),
                    duration(process["blocked_ns"]),
                ],
            )
            for process in processes[:_LISTED]
        ),
    )


def _one_thread_each(summary: Summary) -> bool:
    """Whether the processes that waited most are what their threads are: one list tells all."""
    threads = [thread for thread in summary["threads"] if thread["waits"]][:_LISTED]
    processes = [process for process in summary["processes"] if process["waits"]][:_LISTED]
    return [(one["tid"], one["waits"], one["wait_ns"]) for one in threads] == [
        (one["tgid"], one["waits"], one["wait_ns"]) for one in processes
    ]


def _threads(page: Page, summary: Summary) -> None:
    threads = [thread for thread in summary["threads"] if thread["waits"]]
    if threads:
        alone = len(summary["processes"]) > 1 and _one_thread_each(summary)
        page.table(
            f"{'Processes' if alone else 'Threads'} that waited most",
            ("waits", "waited", "longest", "blocked"),
            (
                (
                    who(thread["tid"], thread["comm"]),
                    [
                        f"{thread['waits']:,}",
                        duration(thread["wait_ns"]),
                        duration(thread["max_ns"]),
                        duration(thread["blocked_ns"]),
                    ],
                )
                for thread in threads[:_LISTED]
            ),
        )
        page.more(summary["quality"]["threads"], min(_LISTED, len(threads)))
    for thread in summary["waiting_at_end"][:_LISTED_STACKS]:
        page.prose(
            f"{who(thread['tid'], thread['comm']).strip()} was still waiting to run at the end, "
            f"for {duration(thread['open_ns'])} by then"
        )


def _wakers(page: Page, summary: Summary) -> None:
    wakers = summary["wakers"]
    if wakers:
        page.table(
            "Woken by" + _of_rows(summary),
            ("waits", "waited"),
            (
                (
                    _waker(waker),
                    [f"{waker['waits']:,}", duration(waker["wait_ns"])],
                )
                for waker in wakers[:_LISTED]
            ),
        )


def _waker(waker: Mapping[str, Any]) -> str:
    if waker["ctx"] in _CONTEXTS:
        return _CONTEXTS[waker["ctx"]]
    return who(waker["tid"], waker["comm"] or ("the idle task" if waker["tid"] == 0 else ""))


def _syscalls(page: Page, summary: Summary) -> None:
    calls = summary["syscalls"]
    if calls:
        page.table(
            "Blocked in" + _of_rows(summary),
            ("times", "blocked", "waited"),
            (
                (
                    visible(call["call"]) or "no system call (page fault, signal)",
                    [
                        f"{call['count']:,}",
                        duration(call["blocked_ns"]),
                        duration(call["wait_ns"]),
                    ],
                )
                for call in calls[:_LISTED]
            ),
        )


def _of_rows(summary: Summary) -> str:
    """Say how much a list drawn from rows knows of, unless it is everything."""
    quality = summary["quality"]
    if quality["rows"] >= quality["waits"]:
        return ""
    return f" ({share(quality['rows'], quality['waits'])} of waits recorded)"


def _stacks(page: Page, summary: Summary) -> None:
    for title, kind, whole in (
        ("Where it left the CPU, then waited to run (sampled)", "wait", "waits"),
        ("Where it blocked (sampled)", "blocked", "blocked"),
    ):
        stacks = summary["stacks"][kind]
        if not stacks:
            continue
        total = (summary["waits"] if whole == "waits" else summary["waits"]["blocked"])["total_ns"]
        page.line()
        page.line(title, style=BOLD)
        room = page.width - NUMBER - 11
        shown: dict[str, int] = {}  # those whose inner functions are the same are one here
        for stack in stacks:
            inner = frames(callers(stack["user"]) or stack["kernel"], room)
            shown[inner] = shown.get(inner, 0) + stack["weight_ns"]
        heaviest = sorted(shown.items(), key=lambda item: -item[1])
        for inner, sampled_ns in heaviest[:_LISTED_STACKS]:
            ns = min(
                sampled_ns, total or sampled_ns
            )  # by chance it may stand for more than there was
            page.line(f"{duration(ns).rjust(NUMBER)}{share(ns, total).rjust(9)}  {inner}")


# --- whether to believe it ---------------------------------------------------------------------


def _quality(page: Page, summary: Summary) -> None:
    quality, overhead = summary["quality"], summary["overhead"]
    page.line()
    page.line("How far to trust this", style=BOLD)
    page.prose(_books(quality), label="checked")
    waits, steal = summary["waits"], summary["capture"]["steal_ns"]
    left_out = summary["capture"]["without"]
    if left_out:
        page.prose(f"{', '.join(visible(part) for part in left_out)} (--without)", label="left out")
    if waits["total_ns"] and "causes" not in left_out:
        unknown = waits["by_cause_ns"]["unknown"]
        text = f"{duration(unknown)}, {share(unknown, waits['total_ns'])} of all waiting"
        page.prose(f"the cause of {text}", label="unknown")
    if steal is not None:
        page.prose(
            f"{duration(steal)} of all CPUs' time was kept by the hypervisor for others",
            label="steal",
        )
    recorded = _counted(summary)
    if recorded:
        page.prose(recorded, label="counted")
    edges = [
        f"{plural(quality[key], 'wait')} {text}"
        for key, text in (
            ("open_at_start", "under way when tracing began"),
            ("open_at_end", "not over when it ended"),
            ("recovered", "measured by the kernel's books: events of theirs were not seen"),
            ("discarded", "left out: their times made no sense"),
        )
        if quality.get(key)
    ]
    if edges:
        page.prose(", ".join(edges), label="edges")
    stacks = quality["stacks"]
    if words := told(stacks):
        page.prose(words, label="stacks")
    page.prose(_cost(overhead, summary["capture"]["duration_s"]), label="own cost")


def _counted(summary: Summary) -> str:
    quality = summary["quality"]
    if quality["totals_from_rows"] or not quality["waits"]:
        return ""
    if quality["rows"] >= quality["waits"]:
        return "every wait was counted, and every one has its details"
    return (
        f"every wait was counted; {plural(quality['rows'], 'wait')} "
        f"({share(quality['row_wait_ns'], summary['waits']['total_ns'])} of the waiting) "
        f"{'has' if quality['rows'] == 1 else 'have'} details"
    )


def books_by_their_clock(quality: Mapping[str, Any]) -> str:
    """What more to say of the kernel's books where their own clock makes a difference."""
    ours = quality.get("traced_by_kernel_clock_ns", 0) / quality["kernel_run_delay_ns"]
    if not ours or abs(ours - quality["coverage"]) <= _AGREES:
        return ""
    return (
        f", {100 * ours:.2f} % by the books' own clock (it stands still while an interrupt works)"
    )


def _books(quality: Mapping[str, Any]) -> str:
    coverage, blind = quality["coverage"], quality["books_blind"]
    if coverage is None:
        text = "the kernel's own books have no wait to compare with"
    else:
        text = (
            f"{100 * coverage:.2f} % of the {duration(quality['kernel_run_delay_ns'])} in the "
            "kernel's own books"
        )
        text += books_by_their_clock(quality)
    if blind["count"]:
        text += (
            f"; besides, {plural(blind['count'], 'wait')} ({duration(blind['ns'])}) that the "
            "kernel never times, as they end at once: counted here"
        )
    return text


def _cost(overhead: Mapping[str, Any], seconds: float) -> str:
    def cpu(ns: float) -> str:
        return f"{duration(ns)} of CPU" + (f" ({share(ns, seconds * 1e9)})" if seconds else "")

    parts = [f"latrace {cpu(overhead['self_cpu_s'] * 1e9)}"]
    parts.append(
        f"its probes {cpu(overhead['bpf_ns'])}" if overhead["bpf_ns"] else "probes not measured"
    )
    memory = overhead.get("max_rss_bytes")
    if isinstance(memory, int) and memory > 0:
        parts.append(f"{size(memory)} of memory")
    return ", ".join(parts)
