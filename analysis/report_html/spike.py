"""The first screen of a bundle's page: what the spike was made of, against the time before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from latrace.analysis import spike_text
from latrace.analysis.report_html import answer, elements, wording
from latrace.analysis.report_html.charts import Shade
from latrace.analysis.report_html.series import Window
from latrace.analysis.report_html.wording import name, percent, prose, safe, time
from latrace.analysis.spike_file import Spike, Told, Trigger
from latrace.analysis.words import plural

SHADED: Final = (
    '<i class=swatch style="background:var(--alarm);opacity:.3"></i>Shaded: the spike. '
    "The line: when the watch fired."
)
"""What the shade in the plots over time means."""

_LEADS = 2
_CULPRITS = 5
_GREW = 5
_NOTES = 20
_INDENT = "  "


def shade_of(told: Told, window: Window) -> Shade:
    """Tell what to shade in the plots over time."""
    found = told.analysis["spike"]
    return Shade(
        found["start_ns"] - window.capture_ns,
        found["end_ns"] - window.capture_ns,
        told.spike.fired_ns - window.capture_ns,
    )


def spike_head(found: Told, summary: Mapping[str, Any]) -> str:
    """Write the head of the page."""
    spike, analysis = found
    told_first = "".join(
        f"<p class=lead>{prose(text)}</p>" for text in analysis["sentences"][:_LEADS]
    )
    others = "".join(f"<li>{prose(text)}</li>" for text in analysis["sentences"][_LEADS:])
    sentences = told_first + (f"<ul class=told>{others}</ul>" if others else "")
    causes = analysis.get("by_cause_ns") or {}
    bar = elements.bar(causes, wording.CAUSES, "c")
    return (
        f"<header><p class=kicker>latrace · {name(spike.name)}"
        f"{answer.when(summary['capture'])}</p>{answer.title(summary)}"
        f"{sentences}{_legend(causes) if bar else ''}{bar}{_notes(spike)}"
        f"<div class=spike>{_compared(analysis)}<div>{_culprits(analysis)}{_grew(analysis)}"
        f"{_triggers(spike)}</div></div></header>"
    )


def _legend(causes: Mapping[str, int]) -> str:
    total = sum(causes.values())
    shown = "".join(
        f"<span>{elements.swatch(f'c-{cause}')}{cause} "
        f"<span class=soft>{percent(causes[cause], total)}</span></span>"
        for cause in wording.CAUSES
        if causes.get(cause)
    )
    return f"<p class=legend>{shown}</p>"


def _compared(analysis: Mapping[str, Any]) -> str:
    parts = analysis["parts"]
    rows = [
        [
            f"<span class=inner>{prose(what.strip())}</span>"
            if what.startswith(_INDENT)
            else prose(what),
            _number(now),
            _number(then),
        ]
        for what, now, then in spike_text.compared(parts["spike"], parts["baseline"])
    ]
    spans = [
        f"spike, {time(1e9 * parts['spike']['seconds'])}",
        f"before, {time(1e9 * parts['baseline']['seconds'])}" if parts["baseline"] else "before",
    ]
    return elements.table(["Compared", *spans], rows)


def _number(text: str) -> str:
    return prose(text).replace(" ", wording.NBSP)


def _culprits(analysis: Mapping[str, Any]) -> str:
    lines = analysis.get("culprits") or []
    rows = []
    for line in lines[:_CULPRITS]:
        doing = f"<div class=stack>in {name(line['function'])}</div>" if line["function"] else ""
        rows.append([f"{wording.who(line)}{doing}", time(line["ns"]), percent(line["share"], 1)])
    return elements.table(["Who had the CPU", "for", "share"], rows) if rows else ""


def _grew(analysis: Mapping[str, Any]) -> str:
    if analysis["bursts"]:  # what was over the limit is known: it says what to look at
        return ""
    rows = [
        [
            _what(line),
            time(line["ns_per_s"]),
            time(line["before_ns_per_s"]) if analysis["baseline"] else "-",
        ]
        for line in analysis["grew"][:_GREW]
    ]
    return elements.table(["What grew, in each second", "spike", "before"], rows) if rows else ""


def _what(line: Mapping[str, Any]) -> str:
    what = line["what"]
    if what == "wait":
        return f"{elements.swatch('c-' + line['name'])}waiting: {wording.CAUSES[line['name']]}"
    if what == "on_cpu":
        return f"on the CPU{prose(spike_text.doing(line))}"
    if what == "lost":
        return f"{elements.swatch('net')}blocked while TCP segments were lost"
    call = f"blocked in {name(line['name'])}" if line["name"] else "blocked in no system call"
    if line["idle"]:
        call += " <span class=soft>(idle)</span>"
    function = line.get("function")
    return call + (f"<div class=stack>in {name(function)}</div>" if function else "")


def _triggers(spike: Spike) -> str:
    rows = [[_trigger(trigger), _saw(trigger), _limit(trigger)] for trigger in spike.triggers]
    return elements.table(["What fired", "saw", "limit"], rows)


def _trigger(trigger: Trigger) -> str:
    about = [plural(trigger.count, "value")] if trigger.count else []
    if trigger.baseline is not None:
        about.append(f"usual {_number(spike_text.quantity(trigger.baseline, trigger.unit))}")
    if trigger.reason:
        about.append(name(trigger.reason))
    told = f"<div class=soft>{', '.join(about)}</div>" if about else ""
    return f"{name(trigger.rule or trigger.kind)}{told}"


def _saw(trigger: Trigger) -> str:
    return "-" if trigger.value is None else _value(trigger, trigger.value)


def _limit(trigger: Trigger) -> str:
    return "-" if trigger.threshold is None else _value(trigger, trigger.threshold)


def _value(trigger: Trigger, value: float) -> str:
    return _number(spike_text.quantity(value, trigger.unit))


def _notes(spike: Spike) -> str:
    if not spike.notes:
        return ""
    shown = "".join(f"<p>{safe(note)}</p>" for note in spike.notes[:_NOTES])
    more = len(spike.notes) - _NOTES
    return f"<div class=alarms>{shown}{f'<p>and {more:,} more</p>' if more > 0 else ''}</div>"
