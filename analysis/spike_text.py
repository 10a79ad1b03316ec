"""A spike in words: the answer first, for somebody who was woken by it.

Pure functions from the analysis (`latrace.analysis.spikes`) to text. Every time and rate has its
unit; all names go through `visible`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from latrace.analysis import retransmits_text
from latrace.analysis.attribution_text import SHORT
from latrace.analysis.page import BOLD, Page, comm
from latrace.analysis.spike_file import Spike, Trigger
from latrace.analysis.spike_host import host_words, profile_words, service_words
from latrace.analysis.spike_windows import percentile
from latrace.analysis.words import duration, fit, percent, plural, visible

Analysis = Mapping[str, Any]
Line = Mapping[str, Any]

COLLECTED: Final = 1 / 3
"""Of the work on the CPU: when so much is that of Go's garbage collector, it is named."""

_LONGEST_RULE: Final = 60
_LONGEST_NAME: Final = 48
_LONGEST_REASON: Final = 160
_TOLD = 2  # of what grew, beside the reason
_NOTABLE_NS_PER_S = 10_000_000
_NEARLY = 0.9
_NOTES = 5

_CALLS: Final = {
    "futex": "a lock or a condition of the program (futex)",
    "fsync": "writing to the disk (fsync)",
    "fdatasync": "writing to the disk (fdatasync)",
    "": "no system call: page faults, signals",
}
_PARTS: Final = {
    "entry": "setting the timer took most of it",
    "timer": "the timer itself came late",
    "return": "returning to the program took most of it",
}
_WAITED: Final = {
    "throttled": "CPU quota used up",
    "irq": "hardware interrupts",
    "softirq": "soft interrupts",
    "idle": "an idle CPU to wake up",
    "kthread": "kernel threads had it",
    "own": "own threads had it",
    "other": "other processes had it",
    "unknown": "unknown",
}
_WAITING: Final = {
    "throttled": "being stopped by a CPU quota",
    "irq": "a CPU busy with hardware interrupts",
    "softirq": "a CPU busy with soft interrupts",
    "idle": "an idle CPU to wake up",
    "kthread": "a CPU that a kernel thread had",
    "own": "a CPU that its own threads had",
    "other": "a CPU that another process had",
    "unknown": "a CPU, the cause is unknown",
}


# --- one line ----------------------------------------------------------------------------------


def headline(analysis: Analysis) -> str:
    """Say the most important in one line: what fired, and why."""
    sentences = [text for text in analysis["sentences"] if isinstance(text, str)]
    first = sentences[0] if sentences else "The spike could not be analysed."
    why = "; ".join(text for text in (cause_words(analysis), analysis.get("locked", "")) if text)
    return f"{first} {why[:1].upper()}{why[1:]}." if why else first


def cause_words(analysis: Analysis) -> str:
    """Say the main cause and the culprit in a few words: `92 % other processes: indexer (pid 9)`.

    "" where nothing tells.
    """
    cause, share, name = analysis["cause"], analysis["share"], _name(analysis["name"])
    if cause in SHORT:
        who, culprit = "", analysis["culprit"]
        if culprit:
            # Most of what they had, or only more than the others.
            most = ":" if culprit["share"] >= _NEARLY * share else ", most of all"
            who = f"{most} {_culprit(culprit)}"
        elif analysis["quota"]:
            who = f": {_name(analysis['quota'].get('cgroup', ''))}"
        return f"{percent(share, 1)} {SHORT[cause]}{who}{_collecting(analysis)}"
    if cause == "blocked":
        return f"threads blocked in {name or 'no system call'}{_at(analysis['where'])}"
    if cause == "lost":
        return f"lost TCP segments{f' to {name}' if name else ''}"
    if cause == "on_cpu":
        return f"its own work on the CPU{doing(analysis['where'])}"
    return f"{name}: {_PARTS[cause]}" if cause else ""


def fired(trigger: Trigger, value: float | None) -> str:
    """Say what a rule saw, and its limit: `23.4 ms (limit 10.0 ms)`; "" where it has none."""
    if value is None:
        return ""
    limits = []
    if trigger.threshold is not None:
        limits.append(f"limit {quantity(trigger.threshold, trigger.unit)}")
    if trigger.baseline is not None:
        limits.append(f"usual {quantity(trigger.baseline, trigger.unit)}")
    said = quantity(value, trigger.unit)
    return f"{said} ({', '.join(limits)})" if limits else said


def quantity(value: float, unit: str) -> str:
    """Say a value of a trigger with its unit."""
    if unit == "ns":
        return duration(value)
    if unit == "s":
        return duration(value * 1e9)
    number = f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
    return f"{number} {fit(visible(unit), 16)}".rstrip()


def clock(realtime_ns: int) -> str:
    """Say a time of day: `11:32:05 UTC`; "at an unknown time" for one that cannot be."""
    try:
        return f"{datetime.fromtimestamp(realtime_ns // 10**9, tz=UTC):%H:%M:%S} UTC"
    except (ValueError, OverflowError, OSError):
        return "an unknown time"


# --- the sentences -----------------------------------------------------------------------------


def sentences(analysis: Analysis, spike: Spike) -> list[str]:
    """Say what the spike was made of: the answer first, then what it is compared with."""
    answer = [_because(analysis), *_grew(analysis)]
    lost = [_losses(analysis)]
    first, then = (lost, answer) if analysis["cause"] == "lost" else (answer, lost)
    told = [
        _opening(analysis, spike.main),
        *first,
        *service_words(spike),
        _before(analysis),
        *then,
        _sleeps(analysis),
        *host_words(spike, analysis["cpu_users"]),
        *profile_words(spike),
        *_how_sure(analysis, spike),
    ]
    return [text for text in told if text]


def _opening(analysis: Analysis, trigger: Trigger) -> str:
    saw = fired(trigger, analysis["value"])
    begin, end = analysis["spike"]["start_ns"], analysis["spike"]["end_ns"]
    when = f"at {clock(analysis['begin_realtime_ns'])} for {duration(end - begin)}"
    if analysis["ongoing"]:
        when += ", and was not over when the recording ended"
    longest = duration(analysis["worst_ns"])
    if trigger.kind == "manual":
        why = fit(visible(trigger.reason), _LONGEST_REASON).rstrip(".")
        return f"Asked for{f': {why}.' if why else '.'} This is of {_span(analysis)}."
    if trigger.kind == "metric":
        metric = _rule(trigger).removeprefix("--metric ")
        return f"The service's own {metric} rose to {saw or 'its limit'} in {_span(analysis)}."
    if trigger.kind == "retransmits":
        limit = "" if trigger.threshold is None else f" (limit {trigger.threshold:,.0f})"
        return f"{analysis['value']:,.0f} TCP segments were sent again{limit} {when}."
    fraction = percentile(trigger)
    if fraction is None:
        sleep = trigger.kind == "sleep"
        many = plural(analysis["slow"], "call" if sleep else "wait")
        first = f"A sleep call came back {saw} late" if sleep else f"A wait for a CPU took {saw}"
        return f"{first}: {many} over the limit, {when}."
    what = "waits for a CPU" if trigger.kind == "wait" else "how late sleep calls came back"
    quantile = f"P{100 * fraction:g}"
    most = f"; the longest was {longest}" if analysis["worst_ns"] > (analysis["value"] or 0) else ""
    return f"The {quantile} of {what} rose to {saw} {when}{most}."


def _span(analysis: Analysis) -> str:
    begin, end = analysis["spike"]["start_ns"], analysis["spike"]["end_ns"]
    return f"the {duration(end - begin)} from {clock(analysis['begin_realtime_ns'])} on"


def _because(analysis: Analysis) -> str:
    """Say the main cause in a sentence."""
    cause = analysis["cause"]
    if not cause:
        return (
            "Nothing that latrace records grew: neither waits for a CPU, nor time blocked, nor "
            "work on the CPU."
        )
    if analysis["answer"]:
        return str(analysis["answer"])
    if cause == "lost" and analysis.get("lengthened"):
        said = retransmits_text.sentence(analysis["lengthened"][0])
        return f"The blocking call that they lengthened most: {said}."
    if analysis.get("late"):
        return _late(analysis)
    line = next((one for one in analysis["grew"] if _of(one) == (cause, analysis["name"])), None)
    return "" if line is None else _most(analysis, line)


def _of(line: Line) -> tuple[str, str]:
    return line["what"], line["name"]


def _late(analysis: Analysis) -> str:
    late, cause = analysis["late"], analysis["cause"]
    over = duration(analysis["over_ns"])
    calls = ", ".join(_name(call) for call in late["calls"][:3])
    text = f"{plural(late['count'], 'call')} of {calls} came back more than {over} late: "
    if cause in _PARTS:
        return f"{text}{_PARTS[cause]} ({percent(analysis['share'], 1)})."
    waited = analysis["parts_ns"]["run_queue"]
    text += f"{percent(waited, sum(analysis['parts_ns'].values()))} of that was waiting for a CPU"
    text += f", {percent(analysis['share'], 1)} of it for {_WAITING[cause]}"
    if analysis["culprit"]:
        return f"{text}: {_culprit(analysis['culprit'])}{_in(analysis['culprit'])}."
    return f"{text}."


def _most(analysis: Analysis, line: Line) -> str:
    """Say what took more of each second than before, when that is the reason."""
    locked = f"; {analysis['locked']}" if analysis["locked"] else ""
    return f"What grew most: {_growth(line, analysis)}{_details(analysis['where'])}{locked}."


def _growth(line: Line, analysis: Analysis) -> str:
    was = line["before_ns_per_s"]
    compared = f"{duration(line['ns_per_s'])} in each second, over all threads"
    if analysis["baseline"] is not None:
        compared += f"; {duration(was)} before" if was else "; none before"
    what, name = line["what"], line["name"]
    if what == "wait":
        return f"threads waited for {_WAITING[name]} ({compared})"
    if what == "blocked":
        where = _CALLS.get(name) or f"{_name(name)}"
        return f"threads were blocked in {where} ({compared})"
    if what == "lost":
        return f"blocking calls went on while TCP segments were lost ({compared})"
    return f"threads were busy on the CPU ({compared})"


def _details(where: Line | None) -> str:
    if not where:
        return ""
    text = doing(where)
    waker = where["waker"]
    if waker and waker["share"] >= 0.2:
        text += (
            f"; {percent(waker['share'], 1)} of that ended when "
            f"{comm(waker['comm']) or 'thread'} (tid {waker['tid']}) woke them{_at(waker)}"
        )
    return text


def _grew(analysis: Analysis) -> Iterator[str]:
    """Yield what else grew, where the rule does not tell what to look for."""
    if analysis["bursts"] or not analysis["cause"]:
        return
    reason = (analysis["cause"], analysis["name"])
    others = [
        line
        for line in analysis["grew"]
        if _of(line) != reason
        and (line["what"], line["name"]) != ("wait", analysis["cause"])
        and not line["idle"]
        and line["ns_per_s"] - line["before_ns_per_s"] >= _NOTABLE_NS_PER_S
    ]
    if others:
        said = "; ".join(
            _growth(line, analysis) + doing(line if "function" in line else None)
            for line in others[:_TOLD]
        )
        yield f"Beside that, {said}."


def _sleeps(analysis: Analysis) -> str:
    if analysis.get("late"):
        return ""
    late = [line for line in analysis["parts"]["spike"]["sleeps"] if line["late"]]
    if not late:
        return ""
    worst = max(late, key=lambda line: line["max_ns"])
    many = sum(line["late"] for line in late)
    came = plural(many, "sleep call") + f" came back more than {duration(worst['late_ns'])} late"
    return f"{came}, the worst {duration(worst['max_ns'])} ({_name(worst['call'])})."


def _losses(analysis: Analysis) -> str:
    lost = analysis["parts"]["spike"]["retransmits"]
    if not lost["count"]:
        return ""
    peers = lost["by_peer"]
    to = f" to {_name(peers[0]['peer'])}" if peers else ""
    more = f" and {plural(lost['peers'] - 1, 'other peer')}" if lost["peers"] > 1 else ""
    first = analysis["cause"] == "lost" and bool(to)  # how many was said just before
    text = f"{plural(lost['segs'], 'TCP segment')} had to be sent again{to}{more}"
    text = f"They went{to}{more}" if first else text
    if lost["lengthened_count"]:
        text += (
            f"; {plural(lost['lengthened_count'], 'blocking call')} waited for what was lost, "
            f"{duration(lost['lengthened_ns'])} in all"
        )
    return f"{text}."


def _before(analysis: Analysis) -> str:
    """Compare with the time before."""
    spike, before = analysis["parts"]["spike"], analysis["parts"]["baseline"]
    if before is None:
        return f"There is nothing to compare with: {analysis['no_baseline']}."
    if not before["waits"]:
        return f"In the {duration(before['seconds'] * 1e9)} before it nothing waited for a CPU."
    was, now = (
        f"{duration(part['p99_ns'])}, the longest {duration(part['max_ns'])}, and threads waited "
        f"{duration(part['per_s']['wait_ns'])} in each second"
        for part in (before, spike)
    )
    return (
        f"In the {duration(before['seconds'] * 1e9)} before it the P99 of waits was {was}. "
        f"In the spike: {now}."
    )


def _how_sure(analysis: Analysis, spike: Spike) -> Iterator[str]:
    if analysis["bursts"] > 1:
        many, every = analysis["bursts"], "all of them"
        which = every if analysis["all_bursts"] else "the one that made it fire"
        text = f"There were {many:,} bursts over the limit; this is of {which}"
        later = analysis["later"]
        if later:
            at = clock(spike.realtime_ns(later["start_ns"]))
            text += f"; a worse one came later, at {at}"
        yield f"{text}."
    if len(spike.triggers) > 1:
        rules = "; ".join(
            f"{_rule(one)}: {fired(one, one.value)}".rstrip(": ") for one in spike.triggers[1:4]
        )
        more = len(spike.triggers) - 4
        yield f"Fired as well: {rules}{f' and {more:,} more' if more > 0 else ''}."
    if analysis["over_ns"] is not None and not analysis["bursts"]:
        yield (
            "No recorded wait or sleep call is over the limit: this is of the time that the rule "
            "looked at."
        )
    if analysis["thinned"]:
        yield (
            "Some waits have no details: counts, rates and percentiles of parts of the recording "
            "are of those that have."
        )
    if not spike.complete:
        yield "The recording was cut off: the end of the spike may be missing."


# --- in the report -----------------------------------------------------------------------------


def render_spike(analysis: Analysis, spike: Spike, *, width: int = 80, colour: bool = False) -> str:
    """Write the spike as the head of a report, at most `width` columns (at least 60) wide."""
    page = Page(max(width, 60), colour=colour)
    title = f"Spike {fit(visible(spike.name), _LONGEST_NAME)}"
    page.line(f"{title}: {_rule(spike.main)}", style=BOLD)
    for number, text in enumerate(analysis["sentences"]):
        page.prose(text, indent="  ", style=BOLD if number < 2 else "")
    before = analysis["parts"]["baseline"]
    if before is not None:
        _table(page, analysis["parts"]["spike"], before)
    notes = [fit(visible(note), 400) for note in spike.notes]
    for note in notes[:_NOTES]:
        page.prose(note, label="note")
    if len(notes) > _NOTES:
        page.prose(f"and {len(notes) - _NOTES:,} more", label="note")
    return page.text()


def _table(page: Page, spike: Line, before: Line) -> None:
    rows = ((name, [now, then]) for name, now, then in compared(spike, before))
    page.table("The spike and the time before it", ("spike", "before"), rows)


def compared(spike: Line, before: Line | None) -> list[tuple[str, str, str]]:
    """List figures of the spike and of the time before it, with units: what, spike, before."""
    parts = (spike, before) if before is not None else (spike,)
    rows: list[tuple[str, str, str]] = []

    def add(name: str, say: Callable[[float], str], values: Sequence[float]) -> None:
        then = "-" if before is None else say(values[1])
        rows.append((name, say(values[0]), then))

    for name, key in (("P50 of waits", "p50_ns"), ("P99", "p99_ns"), ("longest", "max_ns")):
        add(name, duration, [part[key] for part in parts])
    add("waits per second", _rate, [part["per_s"]["waits"] for part in parts])
    add("waiting, per second", duration, [part["per_s"]["wait_ns"] for part in parts])
    most = max(part["per_s"]["wait_ns"] for part in parts)
    for cause in SHORT:
        values = [part["per_s"]["by_cause_ns"][cause] for part in parts]
        if max(values) >= _SHOWN_SHARE * most > 0:
            add(f"  {_WAITED[cause]}", duration, values)
    calls = {call for part in parts for call in part["per_s"]["blocked_ns"]}
    blocked = {call: [part["per_s"]["blocked_ns"].get(call, 0.0) for part in parts]
               for call in calls}  # fmt: skip
    for call in sorted(calls, key=lambda call: (-max(blocked[call]), call))[:_CALLS_SHOWN]:
        if max(blocked[call]) >= _SHOWN_NS_PER_S:
            name = _name(call) or "no system call"
            add(f"blocked in {name}, per second", duration, blocked[call])
    for name, key, say in _OTHERS:
        values = [part["per_s"][key] for part in parts]
        if any(values) and None not in values:
            add(name, say, values)
    return rows


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 9.5 or not value else f"{value:,.1f}"


_OTHERS: Final = (
    ("on the CPU, per second", "on_cpu_ns", duration),
    ("late sleep calls per second", "sleeps_late", _rate),
    ("segments sent again per second", "segments", _rate),
)
_SHOWN_NS_PER_S = 1_000_000  # 0.1 % of one thread's time
_SHOWN_SHARE = 0.02  # of the waiting
_CALLS_SHOWN = 4


# --- names -------------------------------------------------------------------------------------


def _rule(trigger: Trigger) -> str:
    return fit(visible(trigger.rule), _LONGEST_RULE) or trigger.kind


def _name(text: object) -> str:
    return fit(visible(str(text)), _LONGEST_NAME)


def _culprit(line: Line) -> str:
    number = f"tid {line['tid']}" if line["cause"] in {"own", "kthread"} else f"pid {line['tgid']}"
    named = comm(line["comm"])
    return f"{named} ({number})" if named else number


def _in(line: Line) -> str:
    return f", in {_name(line['function'])}" if line["function"] else ""


def _collecting(analysis: Analysis) -> str:
    """Say whose work it was that the own threads did, where that is known."""
    if analysis["cause"] != "own":
        return ""
    share = max((line.get("collector", 0.0) for line in analysis["grew"]), default=0.0)
    if share < COLLECTED:
        return ""
    return f"; {percent(share, 1)} of its work on the CPU was Go's garbage collector"


def doing(where: Line | None) -> str:
    """Say where work on the CPU was done: `, in compress_block`."""
    if where and where["collector"] >= COLLECTED:
        return f", {percent(where['collector'], 1)} of it in Go's garbage collector"
    return _at(where)


def _at(where: Line | None) -> str:
    return f", in {_name(where['function'])}" if where and where["function"] else ""
