"""Geometry: a flame graph is a tree whose widths are times."""

from __future__ import annotations

import re
from collections import defaultdict
from itertools import pairwise

import pytest
from flame_samples import APP, SMALL, Drawn, drawn, user
from hypothesis import given
from hypothesis import strategies as st

from latrace.flamegraphs import Frame, Profile, to_svg
from latrace.flamegraphs.layout import ROOT, lay_out
from latrace.flamegraphs.profile import NOT_SAMPLED
from latrace.flamegraphs.svg import MAX_FRAMES, PAD, ROW, SCREEN_ROWS, WIDTH

ROOM = WIDTH - 2 * PAD

frames = st.builds(Frame, st.sampled_from("abc"), st.sampled_from(["user", "kernel"]))
stacks = st.tuples(st.lists(frames, min_size=1, max_size=6).map(tuple), st.integers(0, 10**12))
profiles = st.lists(stacks, max_size=30).map(lambda rows: Profile(title="t", stacks=rows))


def parents(boxes: list[Drawn]) -> dict[Drawn, Drawn]:
    found: dict[Drawn, Drawn] = {}
    path: dict[int, Drawn] = {}
    for box in boxes:
        path[box.depth] = box
        if box.depth:
            found[box] = path[box.depth - 1]
    return found


@given(profiles, st.booleans())
def test_children_lie_inside_their_parent_and_never_overlap(
    profile: Profile, inverted: bool
) -> None:
    boxes = drawn(to_svg(profile, inverted=inverted))
    children = defaultdict(list)
    for child, parent in parents(boxes).items():
        children[parent].append(child)
        assert child.depth == parent.depth + 1
        assert child.y - parent.y == (ROW if inverted else -ROW)
        assert parent.start <= child.start and child.end <= parent.end
        assert parent.x - 1e-6 <= child.x and child.right <= parent.right + 1e-6
    for siblings in children.values():
        for left, right in pairwise(siblings):
            assert left.end <= right.start
            assert left.right <= right.x + 1e-6


@given(profiles)
def test_width_is_time_to_a_hundredth_of_a_pixel(profile: Profile) -> None:
    boxes = drawn(to_svg(profile))
    root = boxes[0]
    assert (root.start, root.value, root.depth) == (0, profile.total_us, 0)
    assert (root.x, root.width) == (PAD, ROOM)
    for box in boxes:
        if profile.total_us:
            assert box.width == pytest.approx(box.value / profile.total_us * ROOM, abs=0.011)


@given(profiles)
def test_without_a_limit_every_prefix_is_one_box_of_its_stacks_time(profile: Profile) -> None:
    layout = lay_out(profile, max_boxes=10**6)
    expected: dict[tuple[Frame, ...], int] = defaultdict(int)
    for stack, weight in profile.stacks:
        for depth in range(len(stack) + 1):
            expected[stack[:depth]] += weight
    path: list[Frame] = []
    found: dict[tuple[Frame, ...], int] = {}
    for box in layout.boxes:
        path[box.depth :] = [box.frame]
        assert path[0] == ROOT
        assert tuple(path[1:]) not in found  # equal frames under one parent are one box
        found[tuple(path[1:])] = box.value
    assert found == {key: value for key, value in expected.items() if value} | {
        (): profile.total_us
    }
    assert (layout.hidden, layout.hidden_us) == (0, 0)


@given(profiles, st.floats(0, 0.5), st.integers(1, 12))
def test_hidden_frames_are_counted_and_what_remains_is_a_tree(
    profile: Profile, min_share: float, max_boxes: int
) -> None:
    everything = lay_out(profile, max_boxes=10**6)
    layout = lay_out(profile, min_share=min_share, max_boxes=max_boxes)
    assert set(layout.boxes) <= set(everything.boxes)
    assert len(layout.boxes) <= max_boxes
    assert layout.hidden == len(everything.boxes) - len(layout.boxes)
    gone = set(everything.boxes) - set(layout.boxes)
    assert layout.hidden_us == sum(box.own for box in gone)
    assert layout.boxes[0].depth == 0
    for box in layout.boxes[1:]:
        assert any(
            up.depth == box.depth - 1 and up.start <= box.start < up.start + up.value
            for up in layout.boxes
        )


def test_siblings_stand_by_name_and_not_sampled_last() -> None:
    boxes = drawn(to_svg(SMALL))
    assert [box.name for box in boxes if box.depth == 1] == ["app", "node", "[not sampled]"]
    assert [box.name for box in boxes if box.depth == 2] == [
        "[stack lost]", "main", "~handle app.js:1",
    ]  # fmt: skip
    assert [box.value for box in boxes if box.name == "[not sampled]"] == [40_000]


def test_recursion_and_equal_stacks() -> None:
    profile = Profile(
        title="t",
        stacks=[
            ((APP, *user("f", "f", "f")), 10),
            ((APP, *user("f")), 5),
            ((APP, *user("f", "f", "f")), 7),
        ],
    )
    assert [(box.depth, box.value) for box in drawn(to_svg(profile))] == [
        (0, 22), (1, 22), (2, 22), (3, 17), (4, 17),
    ]  # fmt: skip


def test_same_name_of_another_kind_or_module_is_another_frame() -> None:
    names = [Frame("read", "user", "a.so"), Frame("read", "user", "b.so"), Frame("read", "kernel")]
    profile = Profile(title="t", stacks=[((frame,), 1) for frame in names])
    assert [box.kind for box in drawn(to_svg(profile))[1:]] == ["kernel", "user", "user"]


def test_an_empty_profile_is_a_root_of_nothing() -> None:
    for profile in (Profile(title="t", stacks=[]), Profile(title="t", stacks=[((APP,), 0)])):
        (root,) = drawn(to_svg(profile))
        assert (root.value, root.name, root.about) == (0, "all · 0 µs", "0 µs, 0 %")
        assert root.width == ROOM


def test_a_frame_below_a_tenth_of_a_pixel_is_not_drawn_but_said() -> None:
    total = 10_000_000
    narrow = int(total * 0.09 / ROOM)
    profile = Profile(
        title="t", stacks=[((APP, *user("x", "y")), narrow), ((APP, *user("z")), total - narrow)]
    )
    svg = to_svg(profile)
    assert [box.name for box in drawn(svg)] == ["all · 10.0 s", "app", "z"]
    assert re.search(r"2 frames are too narrow to draw: stacks worth \d+ µs end in them", svg)


def test_a_hair_does_not_make_the_picture_many_screens_high() -> None:
    """Beyond a screen's rows a frame is drawn only where it is wider than a hair."""
    total = 10_000_000
    deep = user(*(f"f{i}" for i in range(200)))
    for pixels, rows in ((1.9, SCREEN_ROWS), (2.1, 202)):
        hair = int(total * pixels / ROOM)
        profile = Profile(title="t", stacks=[((APP, *deep), hair), ((APP,), total - hair)])
        svg = to_svg(profile)
        assert 1 + max(box.depth for box in drawn(svg)) == rows
        assert ("162 frames are too narrow to draw" in svg) == (rows == SCREEN_ROWS)


@given(profiles, st.floats(0, 0.5), st.floats(0, 1), st.integers(0, 5))
def test_what_is_drawn_beyond_the_screen_is_wide_enough(
    profile: Profile, min_share: float, min_share_beyond: float, screen: int
) -> None:
    everything = lay_out(profile, max_boxes=10**6)
    layout = lay_out(
        profile,
        min_share=min_share,
        max_boxes=10**6,
        screen=screen,
        min_share_beyond=min_share_beyond,
    )
    total = profile.total_us
    beyond = max(min_share, min_share_beyond)
    assert set(layout.boxes) == {
        box
        for box in everything.boxes
        if not box.depth or box.value >= total * (min_share if box.depth < screen else beyond)
    }
    assert layout.hidden_us == total - sum(box.own for box in layout.boxes)


def test_the_file_stays_small_for_a_hundred_thousand_stacks() -> None:
    profile = Profile(
        title="t",
        stacks=[
            (
                (
                    APP,
                    *user(
                        *(f"function_{i // step}" for step in (5000, 1000, 200, 50, 12, 9)), f"{i}"
                    ),
                ),
                1,
            )
            for i in range(100_000)
        ],
    )
    svg = to_svg(profile)
    assert len(svg) < 5_000_000
    boxes = drawn(svg)
    assert 1000 < len(boxes) <= MAX_FRAMES
    assert max(box.depth for box in boxes) >= 6


def test_memory_follows_what_is_drawn_not_the_ties_beyond_it() -> None:
    equal = Profile(title="t", stacks=[((APP, *user(f"{i}")), 1) for i in range(100)])
    layout = lay_out(equal, max_boxes=10)
    assert [(box.depth, box.value) for box in layout.boxes] == [(0, 100), (1, 100)] + [(2, 1)] * 8
    assert layout.hidden == 92


def test_not_sampled_is_only_special_at_the_root() -> None:
    profile = Profile(title="t", stacks=[((NOT_SAMPLED,), 2), ((APP, NOT_SAMPLED), 1)])
    assert [box.name for box in drawn(to_svg(profile))][1:] == [
        "app", "[not sampled]", "[not sampled]",
    ]  # fmt: skip
