"""Two profiles in one picture: widths are the mean, colours and words tell the change."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from fractions import Fraction

import pytest
from flame_samples import APP, HOSTILE, SMALL, SVG, Drawn, drawn, user
from hypothesis import given
from hypothesis import strategies as st

from latrace.flamegraphs import Profile, to_diff_svg
from latrace.flamegraphs.diff import STEPS


def profile(**stacks: int) -> Profile:
    """A profile of one process: its functions by their time (us)."""
    return Profile(title="t", stacks=[((APP, *user(name)), us) for name, us in stacks.items()])


def boxes(a: Profile, b: Profile, *, a_s: float = 10, b_s: float = 10) -> dict[str, Drawn]:
    return {box.name.split(" · ")[0]: box for box in drawn(to_diff_svg(a, b, a_s=a_s, b_s=b_s))}


def test_widths_are_the_mean_and_colours_the_change() -> None:
    a = profile(gone=400, less=300, same=1_000, more=100)
    b = profile(less=100, same=1_020, more=300, new=400)
    found = boxes(a, b)
    assert {name: box.value for name, box in found.items()} == {
        "all": 1_810, "app": 1_810, "gone": 200, "less": 200, "same": 1_010, "more": 200, "new": 200
    }  # fmt: skip
    assert {name: box.kind for name, box in found.items()} == {
        "all": "same", "app": "same", "gone": "less4", "less": "less3", "same": "same",
        "more": "more3", "new": "more4",
    }  # fmt: skip
    assert "A 400 µs → B 0 µs (only in A)" in found["gone"].about
    assert "A 0 µs → B 400 µs (only in B)" in found["new"].about
    assert "A 300 µs → B 100 µs (-67 %)" in found["less"].about
    assert "A 100 µs → B 300 µs (x3.0)" in found["more"].about
    assert "A 1.80 ms → B 1.82 ms (+1 %)" in found["all"].about


def test_a_is_put_on_the_length_of_b() -> None:
    """The same rate in a capture three times as long is no change."""
    found = boxes(profile(work=900), profile(work=300), a_s=30, b_s=10)
    assert found["work"].kind == "same"
    assert found["work"].value == 300
    assert "A 300 µs → B 300 µs (+0 %)" in found["work"].about


stacks = st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 10**7), max_size=6)


@given(stacks, stacks, st.integers(1, 100), st.integers(1, 100))
def test_every_frame_says_what_it_had(
    a: dict[str, int], b: dict[str, int], a_s: int, b_s: int
) -> None:
    """The root is the mean of the totals to a microsecond; a frame's change is that of its own."""
    found = boxes(profile(**a), profile(**b), a_s=a_s, b_s=b_s)
    scaled = {name: Fraction(us * b_s, a_s) for name, us in a.items()}
    mean = (sum(scaled.values()) + sum(b.values())) / 2
    assert abs(found["all"].value - mean) <= 1
    for name in found.keys() - {"all", "app"}:
        before, after = scaled.get(name, Fraction(0)), b.get(name, 0)
        assert abs(found[name].value - (before + after) / 2) <= 1
        change = float((after - before) / (after + before))
        shade = f"{'more' if change > 0 else 'less'}{min(STEPS, int(abs(change) * STEPS) + 1)}"
        assert found[name].kind == ("same" if abs(change) < 0.05 else shade)


def test_a_profile_and_itself_have_no_colour() -> None:
    found = drawn(to_diff_svg(SMALL, SMALL, a_s=3.5, b_s=3.5))
    assert {box.kind for box in found} == {"same"}
    assert found[0].value == SMALL.total_us


def test_facts_and_warnings_of_both() -> None:
    svg = to_diff_svg(SMALL, profile(work=100), a_s=2, b_s=1)
    text = "".join(ET.fromstring(svg).itertext())  # noqa: S314
    assert "!!! A: 7 events were lost" in text
    assert "1.00 s in 2.00 s" in text and "100 µs in 1.00 s" in text
    for word in ("only in A", "less in B", "the same", "more in B", "only in B"):
        assert word in text


def test_names_are_escaped() -> None:
    svg = to_diff_svg(HOSTILE, SMALL, a_s=1, b_s=1)
    root = ET.fromstring(svg)  # noqa: S314
    assert len(list(root.iter(f"{SVG}script"))) == 1


def test_profiles_of_nothing() -> None:
    empty = Profile(title="t", stacks=[])
    (box,) = drawn(to_diff_svg(empty, empty, a_s=1, b_s=1))
    assert box.value == 0


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_is_readable_on_every_shade(theme: str) -> None:
    light, dark = to_diff_svg(SMALL, SMALL, a_s=1, b_s=1).split(
        "@media (prefers-color-scheme: dark)"
    )
    css = light if theme == "light" else dark
    fills = dict(
        re.findall(r"\.latrace-flame \.((?:more|less)\d|same) rect \{ fill: (#\w{6})", css)
    )
    assert len(fills) == 2 * STEPS + 1
    ink = luminance("#10141a" if theme == "light" else "#e8ebef")
    for name, fill in fills.items():
        low, high = sorted((ink, luminance(fill)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (name, fill)
