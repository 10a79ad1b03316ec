"""Folded and speedscope: read back as their readers do; the choice by extension."""

from __future__ import annotations

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flame_samples import HOSTILE, SMALL, user
from hypothesis import given
from hypothesis import strategies as st

from latrace.flamegraphs import FORMATS, Frame, Profile, format_of, render
from latrace.flamegraphs.folded import to_folded
from latrace.flamegraphs.speedscope import to_speedscope

anything = st.text(st.characters(exclude_categories=()), max_size=12)
frames = st.builds(Frame, anything, st.sampled_from(["user", "jit"]), anything)
stacks = st.tuples(st.lists(frames, min_size=1, max_size=5).map(tuple), st.integers(0, 10**12))
profiles = st.builds(
    lambda title, rows: Profile(title=title, stacks=rows), anything, st.lists(stacks, max_size=12)
)
safe_names = st.from_regex(r"[a-z:<>(), ~*&._-]*[a-z]", fullmatch=True).map(str.strip)
safe_frames = st.builds(Frame, safe_names, st.just("user"))
safe_stacks = st.tuples(
    st.lists(safe_frames, min_size=1, max_size=5).map(tuple), st.integers(1, 10**12)
)


def read_folded(text: str) -> list[tuple[list[str], int]]:
    """Read as flamegraph.pl does, its second count (a differential profile) included."""
    rows = []
    for line in text.split("\n")[:-1]:
        match = re.fullmatch(r"(.*)\s+?(\d+(?:\.\d*)?)", line, re.ASCII)
        assert match, line
        assert not re.fullmatch(r"(.*)\s+?(\d+(?:\.\d*)?)", match[1], re.ASCII), line
        rows.append((match[1].split(";"), int(match[2])))
    return rows


def test_small_folded_is_as_blessed(golden: Callable[[str, str], None]) -> None:
    golden("small.folded", to_folded(SMALL))


def test_small_speedscope_is_as_blessed(golden: Callable[[str, str], None]) -> None:
    golden("small.speedscope.json", json.dumps(json.loads(to_speedscope(SMALL)), indent=1) + "\n")


@given(profiles)
def test_any_profile_folds_to_lines_that_add_up(profile: Profile) -> None:
    text = to_folded(profile)
    rows = read_folded(text)
    assert sum(weight for _, weight in rows) == profile.total_us
    assert {len(names) for names, _ in rows} <= {len(stack) for stack, _ in profile.stacks}
    assert len({tuple(names) for names, _ in rows}) == len(rows)
    for names, weight in rows:
        assert weight > 0
        assert all(name and name == name.strip() and name.isprintable() for name in names)
    assert text.isascii() or text.encode("utf-8")


@given(st.lists(safe_stacks, max_size=12))
def test_folded_round_trip(rows: list[tuple[tuple[Frame, ...], int]]) -> None:
    expected: dict[tuple[str, ...], int] = defaultdict(int)
    for stack, weight in rows:
        expected[tuple(" ".join(frame.name.split()) for frame in stack)] += weight
    found = {
        tuple(names): weight
        for names, weight in read_folded(to_folded(Profile(title="t", stacks=rows)))
    }
    assert found == expected


def test_folded_escapes() -> None:
    rows = [
        (user("a;b", "c\nd"), "a:b;c d 1"),
        (user("f", "worker 3"), "f;worker_3 1"),
        (user("f", "1 2 3.5"), "f;1 2_3.5 1"),
        (user("f", ""), "f;[unknown] 1"),
        (user("\u202e", "\x1b"), r"\u202e;\x1b 1"),
        (user("operator new(unsigned long)"), "operator new(unsigned long) 1"),
    ]
    for stack, line in rows:
        assert to_folded(Profile(title="t", stacks=[(stack, 1)])) == line + "\n"


def check_speedscope(text: str) -> dict[str, Any]:
    """Check what the format's schema demands, strictly, and return the document."""
    document: dict[str, Any] = json.loads(text)
    assert document.keys() == {
        "$schema", "exporter", "name", "activeProfileIndex", "shared", "profiles",
    }  # fmt: skip
    assert document["$schema"] == "https://www.speedscope.app/file-format-schema.json"
    assert document["activeProfileIndex"] == 0
    frames = document["shared"]["frames"]
    for frame in frames:
        assert {"name"} <= frame.keys() <= {"name", "file"}
        assert all(isinstance(value, str) and value for value in frame.values())
    (profile,) = document["profiles"]
    assert profile.keys() == {
        "type", "name", "unit", "startValue", "endValue", "samples", "weights",
    }  # fmt: skip
    assert (profile["type"], profile["unit"]) == ("sampled", "microseconds")
    assert len(profile["samples"]) == len(profile["weights"])
    assert all(isinstance(weight, int) and weight > 0 for weight in profile["weights"])
    assert profile["startValue"] == 0 and profile["endValue"] == sum(profile["weights"])
    used = {index for sample in profile["samples"] for index in sample}
    assert used == set(range(len(frames)))
    return document


@given(profiles)
def test_any_profile_is_valid_speedscope(profile: Profile) -> None:
    text = to_speedscope(profile)
    text.encode("utf-8")
    assert check_speedscope(text)["profiles"][0]["endValue"] == profile.total_us


def test_speedscope_reads_back_as_the_same_stacks() -> None:
    document = check_speedscope(to_speedscope(SMALL))
    frames = [(frame["name"], frame.get("file", "")) for frame in document["shared"]["frames"]]
    (profile,) = document["profiles"]
    found = {
        tuple(frames[index] for index in sample): weight
        for sample, weight in zip(profile["samples"], profile["weights"], strict=True)
    }
    assert found == {
        tuple((frame.name, frame.module) for frame in stack): weight
        for stack, weight in SMALL.stacks
    }
    assert document["name"] == profile["name"] == SMALL.title


@pytest.mark.parametrize(
    ("name", "extension"),
    [
        ("out.svg", ".svg"), ("OUT.SVG", ".svg"), (".folded", ".folded"),
        (Path("/a/b.folded"), ".folded"),
        ("x.speedscope.json", ".speedscope.json"), ("a.svg.folded", ".folded"),
        ("x.pb.gz", ".pb.gz"),
    ],
)  # fmt: skip
def test_the_extension_chooses(name: str | Path, extension: str) -> None:
    assert format_of(name) == extension
    assert render(SMALL, name) == FORMATS[extension](SMALL)


@pytest.mark.parametrize(
    "name", ["out.png", "out", "", "svg", "out.json", "out.svg/dir", "o.svgz", "o.gz"]
)
def test_an_unknown_extension_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match=r"\.svg, \.folded, \.speedscope\.json"):
        format_of(name)
    with pytest.raises(ValueError, match="no flame graph format"):
        render(SMALL, name)


@pytest.mark.parametrize("extension", FORMATS)
def test_hostile_profiles_render_in_every_format(extension: str) -> None:
    data = render(HOSTILE, extension)
    if extension == ".pb.gz":  # its texts are looked at where it is decoded
        assert gzip.decompress(data)
        return
    text = data.decode("utf-8")
    assert "\x1b" not in text and "\u202e" not in text and "\0" not in text
    assert text.endswith("\n")


@given(profiles)
def test_every_format_tells_the_same_total(profile: Profile) -> None:
    folded = sum(weight for _, weight in read_folded(to_folded(profile)))
    speedscope = json.loads(to_speedscope(profile))["profiles"][0]["endValue"]
    svg = re.search(r'data-t="0 (\d+) 0"', render(profile, ".svg").decode())
    assert svg is not None
    assert folded == speedscope == int(svg[1]) == profile.total_us
