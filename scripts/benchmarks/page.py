"""All results as text: for the terminal, and as the page docs/measurements.md."""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import wrap
from typing import Any

from . import goals, slowdown
from .estimate import METHOD
from .suite import BENCHMARKS
from .tables import WIDTH, paragraph

_FEW = "Quick run: it shows that the measuring works. Its figures prove nothing."
_NAMES = 12
_TAKEN = 0.02
"""Above this share, other processes took the pinned load's CPU away from it."""
_BUSY = 1.0
"""Above this load average, other processes are in the figures."""


def collect_goals(results: dict[str, Any]) -> list[goals.Goal]:
    """All promises that the results can be held to."""
    return [goal for name, result in results.items() for goal in BENCHMARKS[name].goals(result)]


def about(document: dict[str, Any]) -> list[str]:
    """The machine and the method."""
    before, after = document["load_average"]
    facts = document["machine"] | {
        "load": f"{before:.2f} before, {after:.2f} after",
        "date": document["date"],
        "method": f"{document['rounds']} rounds, interleaved (A B C A B C ...); {METHOD};"
        " ratios are of the same round",
    }
    return [
        f"{name if first else '':<{_NAMES}} {line}"
        for name, value in facts.items()
        for first, line in _first(wrap(value, WIDTH - _NAMES - 1))
    ]


def _first(lines: list[str]) -> Iterator[tuple[bool, str]]:
    """Each line, and whether it is the first one."""
    return ((number == 0, line) for number, line in enumerate(lines))


def warnings(document: dict[str, Any]) -> list[str]:
    """What a reader of the figures must know first."""
    found = []
    if document["quick"]:
        found.append(_FEW)
    if document["load_average"][0] > _BUSY:
        found.append(
            f"The machine was busy (load {document['load_average'][0]:.1f}) before it began:"
            " other processes are in the figures."
        )
    if "pipe" in document["results"]:
        share = slowdown.taken_by_others(document["results"]["pipe"])
        if share > _TAKEN:
            found.append(
                f"Other processes had {share:.0%} of the pinned pipe's CPU while it was measured:"
                " believe its CPU time more than its slowdown, and neither much."
            )
    return found


def sections(document: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Title and lines of each part."""
    for name, result in document["results"].items():
        benchmark = BENCHMARKS[name]
        yield benchmark.title, benchmark.render(result)
    found = collect_goals(document["results"])
    if found:
        yield "Promises", goals.render(found)
    if document["skipped"]:
        yield (
            "Left out",
            [
                line
                for name, why in document["skipped"].items()
                for line in paragraph(f"{name}: {why}")
            ],
        )


def text(document: dict[str, Any]) -> str:
    """For the terminal, at most 80 columns."""
    lines = [line for warning in warnings(document) for line in paragraph(f"!!! {warning}")]
    for title, body in sections(document):
        lines += ["", title, "=" * len(title), *body]
    return "\n".join([*lines, "", *about(document)]) + "\n"


def markdown(document: dict[str, Any]) -> str:
    """For docs/measurements.md."""
    lines = [
        "# Measurements",
        "",
        "Written by `scripts/bench --page docs/measurements.md`; do not edit. `scripts/bench`",
        "measures the same on your machine: believe that more than this page.",
        "",
    ]
    for warning in warnings(document):
        lines += [f"**{warning}**", ""]
    lines += ["```text", *about(document), "```"]
    for title, body in sections(document):
        lines += ["", f"## {title}", "", "```text", *body, "```"]
    return "\n".join(lines) + "\n"
