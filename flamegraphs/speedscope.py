"""Speedscope's own file format: one "sampled" profile, unit microseconds.

The format: https://github.com/jlfwong/speedscope, `src/lib/file-format-spec.ts`.
"""

from __future__ import annotations

import json
from typing import Final

from latrace.flamegraphs.profile import Frame, Profile, merged
from latrace.flamegraphs.text import visible

SCHEMA: Final = "https://www.speedscope.app/file-format-schema.json"


def to_speedscope(profile: Profile) -> str:
    """Return the profile as speedscope JSON; the weights add up to `profile.total_us`.

    Frames keep their module as `file`. The facts have no place in the format, so they are left
    out, and the title names the profile.
    """
    index: dict[Frame, int] = {}
    samples: list[list[int]] = []
    weights: list[int] = []
    for stack, weight in merged(profile.stacks):
        if weight:
            samples.append([index.setdefault(frame, len(index)) for frame in stack])
            weights.append(weight)
    title = visible(profile.title)
    document = {
        "$schema": SCHEMA,
        "exporter": "latrace",
        "name": title,
        "activeProfileIndex": 0,
        "shared": {"frames": [_frame(frame) for frame in index]},
        "profiles": [
            {
                "type": "sampled",
                "name": title,
                "unit": "microseconds",
                "startValue": 0,
                "endValue": sum(weights),
                "samples": samples,
                "weights": weights,
            }
        ],
    }
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")) + "\n"


def _frame(frame: Frame) -> dict[str, str]:
    named = {"name": visible(frame.name) or "[unknown]"}
    if frame.module:
        named["file"] = visible(frame.module)
    return named
