"""Lost TCP segments, and the waits that they lengthened, in words for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from latrace.analysis.page import BOLD, NUMBER, Page, comm
from latrace.analysis.words import duration, fit, plural, visible

Told = Mapping[str, Any]
"""`retransmits` of `latrace report --json`."""

_LISTED = 5
_BECAUSE: Final = {
    "read next": "it then read from that socket",
    "its socket": "it had used that socket last",
    "same process": "the process owns that socket, no more is known",
}


def answer(summary: Mapping[str, Any]) -> str:
    """Say in a sentence what lost segments cost; "" where the waits for a CPU matter more."""
    told = summary["retransmits"]
    if not told["lengthened_count"] or told["lengthened_ns"] < summary["waits"]["tail"]["total_ns"]:
        return ""
    first = told["lengthened"][0]
    longest = (
        f"{duration(first['overlap_ns'])} in {visible(first['syscall'])} of {_thread(first)}, "
        f"{_losses(first)}"
    )
    many = told["lengthened_count"]
    text = (
        f"{duration(told['lengthened_ns'])} of {many:,} blocking calls overlap lost TCP segments, "
        f"the longest {longest}."
        if many > 1
        else f"a blocking call overlaps lost TCP segments: {longest}."
    )
    return f"Beside that, {text}" if summary["waits"]["tail"]["count"] else text.capitalize()


def retransmits(page: Page, told: Told) -> None:
    """Write what was sent again to whom, and the waits that it lengthened."""
    if not told["count"]:
        return
    room = page.width - 3 * NUMBER - 2
    page.table(
        "TCP segments sent again",
        ("times", "segments", "sockets"),
        (
            (
                fit(f"{visible(peer['peer'])}  {kinds(peer['by_kind'])}", room),
                [f"{peer['count']:,}", f"{peer['segs']:,}", f"{peer['connections']:,}"],
            )
            for peer in told["by_peer"][:_LISTED]
        ),
    )
    page.more(told["peers"], min(_LISTED, len(told["by_peer"])))
    lengthened(page, told)


def lengthened(page: Page, told: Told) -> None:
    """Write the waits that lost segments lengthened, the longest first."""
    shown = [line for line in told["lengthened"] if line["evidence"] != "same process"][:_LISTED]
    weak = [line for line in told["lengthened"] if line["evidence"] == "same process"]
    if not shown and not weak:
        return
    page.line()
    page.line("Blocking calls that lost segments lengthened", style=BOLD)
    for line in shown or weak[:1]:
        page.prose(sentence(line))
    page.more(told["lengthened_count"], len(shown))
    if told["lengthened_count"] > 1:
        page.prose(
            f"in all {duration(told['lengthened_ns'])} of {duration(told['blocked_ns'])} in "
            f"{told['lengthened_count']:,} calls"
        )
    if shown and told["weak_count"]:
        page.prose(
            f"besides, {plural(told['weak_count'], 'call')} of which only the process is that of "
            "the socket; not counted"
        )


def lengthened_text(told: Told, *, width: int = 80, colour: bool = False) -> str:
    """Write only the lengthened waits; "" when there are none, else it ends in a newline."""
    page = Page(max(width, 60), colour=colour)
    lengthened(page, told)
    text = page.text()
    return text if text.strip() else ""


def sentence(line: Mapping[str, Any]) -> str:
    """Say how a wait was lengthened, and what speaks for it."""
    blocked, overlap = duration(line["blocked_ns"]), duration(line["overlap_ns"])
    part = "all" if overlap == blocked else overlap
    return (
        f"{_thread(line)} waited {blocked} in {visible(line['syscall'])}; {part} of it overlaps "
        f"{_losses(line)}; {_BECAUSE[line['evidence']]}"
    )


def kinds(by_kind: Mapping[str, int]) -> str:
    """Say how many retransmits of each kind: `2 rto, 1 tlp`."""
    return ", ".join(f"{count:,} {kind}" for kind, count in by_kind.items())


def _thread(line: Mapping[str, Any]) -> str:
    name = comm(line["comm"])
    return f"{name} (tid {line['tid']})" if name else f"thread {line['tid']}"


def _losses(line: Mapping[str, Any]) -> str:
    said = line["kinds"]
    only = next(iter(said)) if list(said.values()) == [1] else kinds(said)
    return f"{only} of {visible(line['peer'])}"
