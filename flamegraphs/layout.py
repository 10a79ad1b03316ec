"""Where the frames of a flame graph lie: time across, depth up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

from latrace.flamegraphs.profile import Frame, Profile, merged

ROOT = Frame("all", "marker")


class Box(NamedTuple):
    """A drawn frame: `[start, start + value)` microseconds across, `depth` rows from the root.

    `own` is the part of `value` in stacks that end here.
    """

    start: int
    depth: int
    value: int
    own: int
    frame: Frame


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The drawn frames, parents before children, left to right; the first is the root.

    `hidden` frames were too narrow to draw; `hidden_us` is the time of the stacks that end in
    one. `rows` counts the root's.
    """

    boxes: Sequence[Box]
    total_us: int
    rows: int
    hidden: int
    hidden_us: int


def lay_out(
    profile: Profile,
    *,
    min_share: float = 0.0,
    max_boxes: int,
    screen: int = 0,
    min_share_beyond: float = 0.0,
) -> Layout:
    """Merge the stacks into a tree and keep what is at least `min_share` of the total wide.

    Beyond the first `screen` rows it is `min_share_beyond`, where that is more: a deep stack in
    which hardly any time was spent would make the picture many screens high. At most `max_boxes`
    frames remain (at least the root), the widest ones. A parent is never narrower than its child,
    so what remains is still one tree. Equal frames under one parent merge; siblings stand in order
    of name, `[not sampled]` last. Memory follows what is kept, not the size of the profile.
    """
    total = profile.total_us
    least = max(1, total * min_share)
    least_beyond = max(least, total * min_share_beyond)
    boxes: list[Box] = []
    closed = 0
    now = 0
    path: list[Frame] = []
    starts: list[int] = []
    owns: list[int] = []

    def close_down_to(depth: int) -> None:
        nonlocal closed
        while len(path) > depth:
            frame, start, own = path.pop(), starts.pop(), owns.pop()
            closed += 1
            wanted = least if len(path) < screen else least_beyond
            if now - start >= wanted or not path:
                boxes.append(Box(start, len(path), now - start, own, frame))

    for stack, weight in merged(profile.stacks):
        if not weight:
            continue
        full = (ROOT, *stack)
        shared = 0
        for ours, theirs in zip_longest(path, full):
            if ours != theirs:
                break
            shared += 1
        close_down_to(shared)
        for frame in full[shared:]:
            path.append(frame)
            starts.append(now)
            owns.append(0)
        owns[-1] += weight
        now += weight
    close_down_to(0)

    if not boxes:
        boxes, closed = [Box(0, 0, 0, 0, ROOT)], 1
    boxes.sort(key=lambda box: (-box.value, box.depth, box.start))
    del boxes[max(1, max_boxes) :]
    boxes.sort(key=lambda box: (box.start, box.depth))
    return Layout(
        boxes=boxes,
        total_us=total,
        rows=1 + max(box.depth for box in boxes),
        hidden=closed - len(boxes),
        hidden_us=total - sum(box.own for box in boxes),
    )
