"""How many of the sampled stacks are whole, and where the others end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from latrace.analysis.capture import Capture
from latrace.analysis.rows import StackSum
from latrace.analysis.words import visible


def stack_quality(capture: Capture, sampled: Mapping[int, StackSum]) -> dict[str, Any]:
    """Count the samples: with a whole stack, with a part of one, with none.

    `by_module`: of those with a part, by the module of the outermost frame and by what ended the
    walk there.
    """
    stacks = capture.table("stacks", columns=["id", "frames", "whole", "end"])
    columns = (stacks[name].to_pylist() for name in ("id", "frames", "whole", "end"))
    known = {number: rest for number, *rest in zip(*columns, strict=True)}
    frames = capture.table("frames", columns=["id", "module"])
    modules = dict(zip(frames["id"].to_pylist(), frames["module"].to_pylist(), strict=True))
    counts = {"whole": 0, "truncated": 0, "missing": 0}
    by_module: dict[str, dict[str, int]] = {}
    for number, entry in sampled.items():
        if number not in known:
            counts["missing"] += entry.samples
            continue
        ids, whole, end = known[number]
        counts["whole" if whole else "truncated"] += entry.samples
        if not whole:
            ends = by_module.setdefault(modules.get(ids[-1] if ids else -1) or "?", {})
            ends[end or "?"] = ends.get(end or "?", 0) + entry.samples
    return {**counts, "by_module": by_module}


def told(stacks: Mapping[str, Any]) -> str:
    """The same in words, with where most of the truncated ones ended; empty: there are none."""
    if not any(stacks[name] for name in ("whole", "truncated", "missing")):
        return ""
    ends = [
        (count, end, module)
        for module, counts in stacks["by_module"].items()
        for end, count in counts.items()
    ]
    count, end, module = max(ends, default=(0, "", ""))
    where = f" ({count:,} in {visible(module)}: {visible(end)})" if count else ""
    return (
        f"{stacks['whole']:,} whole, {stacks['truncated']:,} truncated{where},"
        f" {stacks['missing']:,} missing"
    )
