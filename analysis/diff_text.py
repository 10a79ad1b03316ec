"""The comparison of two captures in words, for a terminal: the answer first.

A pure function from a comparison (`latrace.analysis.diff`) to text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from latrace.analysis.attribution_text import SHORT
from latrace.analysis.page import BOLD, DIM, Page, comm
from latrace.analysis.words import duration, fit, pad, percent, plural, visible

Entry = Mapping[str, Any]

_NAMES = {"p50": "P50", "p90": "P90", "p99": "P99", "p999": "P99.9"}
_RATES = {
    "waits": "waits",
    "waited": "waiting for a CPU",
    "blocked": "blocked",
    "on_cpu": "on the CPU (sampled)",
}
_CAUSES = SHORT | {"throttled": "CPU quota used up"}
_OF_CAUSE = {"own": " (own)", "kthread": " (kernel)", "irq": "interrupt", "softirq": " (softirq)"}
_LISTED = 6
_TOLD = 2  # culprits in the first lines
_NOTABLE = 0.001  # of the waiting: causes and culprits below it are not listed
_NOTICED = 0.02  # of the waiting: less is not worth the first lines
_VERDICT = 14
_VALUE, _RANGE, _ERROR = 10, 19, 10
_NOISE = "within noise"


def render_diff(comparison: Entry, *, width: int = 80, colour: bool = False) -> str:
    """Write the comparison; no line is wider than `width` columns (at least 72)."""
    page = Page(max(width, 72), colour=colour)
    a, b = comparison["a"], comparison["b"]
    for letter, side in (("A", a), ("B", b)):
        page.line(f"{letter}  {_side(side, page.width - 3)}", style=DIM)
    for text in _answer(comparison):
        page.prose(text, indent="", style=BOLD)
    for warning in _warnings(a, b):
        page.warn(warning)
    if a["waits"] or b["waits"]:
        _quantiles(page, "How long waits were", comparison["quantiles"])
        largest = comparison["max_ns"]
        page.line(
            pad("  max", page.width - _VERDICT - 2 * (_VALUE + _RANGE))
            + f"{duration(largest['a']):>{_VALUE}}{'':{_RANGE}}{duration(largest['b']):>{_VALUE}}"
        )
    for call in comparison["sleeps"]:
        _quantiles(page, f"{comm(call['call'])} came back late by", call["quantiles"])
    _rates(page, comparison)
    _method(page, comparison)
    return page.text()


def _side(side: Entry, room: int) -> str:
    targets = [f"{comm(one.get('comm'))} ({one.get('tgid', '?')})" for one in side["targets"][:2]]
    more = len(side["targets"]) - len(targets)
    names = ", ".join(targets) + (f" and {more} more" if more > 0 else "")
    tail = f"  {plural(side['waits'], 'wait')} in {duration(side['duration_s'] * 1e9)}"
    path = fit(visible(side["path"]), room // 3)
    return fit(f"{path}  {names}", room - len(tail)) + tail


# --- the answer --------------------------------------------------------------------------------


def _answer(comparison: Entry) -> Iterator[str]:
    tail = next(one for one in comparison["quantiles"] if one["name"] == "p99")
    if tail["a"] and tail["b"]:
        a, b = duration(tail["a"]["ns"]), duration(tail["b"]["ns"])
        if not tail["differs"]:
            others = [one for one in comparison["quantiles"] if one["differs"]]
            told = ", ".join(
                f"{_NAMES[one['name']]} is "
                + _times(one["a"]["ns"], one["b"]["ns"], "", "").strip()
                + (" longer" if one["b"]["ns"] > one["a"]["ns"] else " shorter")
                for one in others
            )
            but = f", but {told}" if told else ""
            yield f"P99 of the waits: {a} in A, {b} in B. The difference is within noise{but}."
        else:
            word = "longer" if tail["b"]["ns"] > tail["a"]["ns"] else "shorter"
            change = _times(tail["a"]["ns"], tail["b"]["ns"], "", "")
            yield f"P99 of the waits is {change.strip()} {word} in B: {a} before, {b} now."
    else:
        missing = "A" if not tail["a"] else "B"
        yield f"{missing} has no waits: there is nothing to compare them with."
    waited = _named(comparison["rates"], "waited")
    least = _NOTICED * max(waited[side]["per_s"] for side in "ab")
    causes = _changed(comparison["causes"], least)
    culprits = _changed(comparison["culprits"], least)
    if causes:
        most = causes[0]
        name = _CAUSES[most["name"]]
        line = f"{name[:1].upper()}{name[1:]}: {_signed(_step(most))} of waiting a second"
        culprits = [
            one for one in culprits if one["cause"] == most["name"] and _step(one) * _step(most) > 0
        ]
    else:
        line = "No cause of waiting changed much beyond noise"
    if culprits:
        who = (f"{_culprit(one)} {_signed(_step(one))}" for one in culprits[:_TOLD])
        line += f"; of those who had the CPU: {', '.join(who)}"
    yield f"{line}."


def _changed(rows: Sequence[Entry], least: float) -> list[Entry]:
    """What changed by at least so many ns a second, and not by chance; the most first."""
    changed = [row for row in rows if row["differs"] and abs(_step(row)) >= least]
    return sorted(changed, key=lambda row: -abs(_step(row)))


def _named(rows: Sequence[Entry], name: str) -> Entry:
    return next(row for row in rows if row["name"] == name)


def _step(row: Entry) -> float:
    return float(row["b"]["per_s"]) - float(row["a"]["per_s"])


def _signed(ns: float) -> str:
    return ("+" if ns >= 0 else "-") + duration(abs(ns))


def _warnings(a: Entry, b: Entry) -> Iterator[str]:
    for letter, side in (("A", a), ("B", b)):
        if not side["complete"]:
            yield f"{letter} was not closed: its last moments are missing."
        if side["lost_events"]:
            yield f"{letter} lost the details of {plural(side['lost_events'], 'event')}."
        if side["degraded"]:
            yield f"{letter} was degraded while recorded: some waits have no details."
    for what in ("kernel", "host"):
        if a[what] != b[what]:
            yield f"Another {what}: {visible(a[what])} in A, {visible(b[what])} in B."


# --- tables ------------------------------------------------------------------------------------


def _quantiles(page: Page, title: str, rows: Sequence[Entry]) -> None:
    room = page.width - _VERDICT - 2 * (_VALUE + _RANGE)
    page.line()
    heads = "".join(f"{head:>{_VALUE}}{'95 %':>{_RANGE}}" for head in "AB")
    if len(title) > room:
        page.line(title, style=BOLD)
        page.line(pad("", room) + heads, style=BOLD)
    else:
        page.line(pad(title, room) + heads, style=BOLD)
    for row in rows:
        cells = "".join(
            f"{_value(row[side]):>{_VALUE}}{_range(row[side]):>{_RANGE}}" for side in "ab"
        )
        verdict = ""
        if row["a"] and row["b"]:
            verdict = _verdict(row["differs"], row["a"]["ns"], row["b"]["ns"], "longer", "shorter")
        page.line(pad(f"  {_NAMES[row['name']]}", room) + cells + f"{verdict:>{_VERDICT}}")


def _value(one: Entry | None) -> str:
    return duration(one["ns"]) if one else "-"


def _range(one: Entry | None) -> str:
    """Say an interval: `1.62..5.77 ms`, with both units where they differ; open ends as >, <."""
    if one is None:
        return ""
    low, high = one["low_ns"], one["high_ns"]
    if low is None:
        return "" if high is None else f"< {duration(high)}"
    if high is None:
        return f"> {duration(low)}"
    first, last = duration(low), duration(high)
    if first.split(" ")[1:] == last.split(" ")[1:]:
        first = first.split(" ")[0]
    return f"{first.replace(' ', '')}..{last}"


def _rates(page: Page, comparison: Entry) -> None:
    unlike = comparison["rates"]
    whole = max(one["per_s"] for side in "ab" for one in [_named(unlike, "waited")[side]])
    rates = [(_RATES[one["name"]], one) for one in unlike if one["a"]["per_s"] or one["b"]["per_s"]]
    _table(page, "Per second", rates)
    _table(
        page,
        "Waiting a second, by cause",
        [(_CAUSES[one["name"]], one) for one in comparison["causes"] if _counts(one, whole)],
    )
    _table(
        page,
        "Who had the CPU meanwhile",
        [(_culprit(one), one) for one in comparison["culprits"] if _counts(one, whole)],
    )
    known = [comparison[side]["culprits_known"] for side in "ab"]
    if all(share is not None for share in known):
        a, b = (percent(share, 1) for share in known)
        page.prose(f"by name, of {a} of that time in A and {b} in B", style=DIM)
    _table(
        page,
        "Who waited",
        [
            (comm(one["comm"]) or "(name not recorded)", one)
            for one in comparison["threads"]
            if _counts(one, whole)
        ],
    )


def _counts(row: Entry, whole: float) -> bool:
    return float(max(row["a"]["per_s"], row["b"]["per_s"])) > _NOTABLE * whole


def _culprit(one: Entry) -> str:
    if one["cause"] == "irq":
        return _CAUSES["irq"]
    return (comm(one["comm"]) or "(no name)") + _OF_CAUSE.get(one["cause"], "")


def _table(page: Page, title: str, rows: Sequence[tuple[str, Entry]]) -> None:
    if not rows:
        return
    room = page.width - _VERDICT - 2 * (_VALUE + _ERROR)
    page.line()
    heads = "".join(f"{head:>{_VALUE}}{'+-':>{_ERROR}}" for head in "AB")
    page.line(pad(title, room) + heads, style=BOLD)
    for name, row in rows[:_LISTED]:
        say: Callable[[float], str] = _count if name == _RATES["waits"] else duration
        cells = "".join(
            f"{say(row[side]['per_s']):>{_VALUE}}"
            f"{'?' if row[side]['error'] is None else say(row[side]['error']):>{_ERROR}}"
            for side in "ab"
        )
        a, b = row["a"]["per_s"], row["b"]["per_s"]
        verdict = _verdict(row["differs"], a, b, "more", "less")
        page.line(pad(f"  {name}", room) + cells + f"{verdict:>{_VERDICT}}")
    page.more(len(rows), _LISTED)


def _count(number: float) -> str:
    return f"{number:,.1f}" if number < 99.95 else f"{number:,.0f}"


def _verdict(differs: bool | None, a: float, b: float, more: str, less: str) -> str:
    if differs is None:
        return "can't tell"
    if not differs:
        return _NOISE
    if not a or not b:
        return "only in B" if b else "only in A"
    return _times(a, b, more, less)


def _times(a: float, b: float, more: str, less: str) -> str:
    """Say a change: `2.1x more`; below twofold in percent: `+34 %`."""
    factor = max(a, b) / min(a, b)
    if factor < 2:
        return f"{100 * (b - a) / a:+.0f} %" if more else f"{100 * abs(b - a) / a:.0f} %"
    return f"{factor:,.{1 if factor < 9.95 else 0}f}x {more if b > a else less}".rstrip()


def _method(page: Page, comparison: Entry) -> None:
    page.line()
    page.line("How far to trust this", style=BOLD)
    page.prose(comparison["method"], label="method")
    page.prose(
        "of twenty figures that did not change, one is told as different by chance; and two"
        " captures tell of two moments, not of what lies between",
        label="chance",
    )
