"""The SVG as a document: self-contained, safe with hostile names, readable without its script."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from itertools import pairwise
from typing import get_args

import pytest
from flame_samples import APP, DASH, HOSTILE, HOSTILE_NAMES, SMALL, SVG, drawn, user
from hypothesis import given
from hypothesis import strategies as st

from latrace.analysis.causes import CAUSES
from latrace.flamegraphs import Frame, FrameKind, Profile, to_svg
from latrace.flamegraphs.meanings import meaning_of
from latrace.flamegraphs.svg import CELL, INSET, PAD, SCREEN_ROWS, WIDTH
from latrace.flamegraphs.text import cells, visible

ALLOWED = {"svg", "title", "desc", "style", "rect", "g", "text", "tspan", "script"}


def test_small_profile_is_as_blessed(golden: Callable[[str, str], None]) -> None:
    """The script and the style are left out: they have their own tests."""
    svg = re.sub(r"<(style|script)>.*?</\1>", r"<\1/>", to_svg(SMALL), flags=re.DOTALL)
    golden("small.svg", svg)


def test_nothing_is_fetched_from_anywhere() -> None:
    svg = to_svg(SMALL)
    namespaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xhtml"}
    assert set(re.findall(r"\w+://[^\"'\s)]+", svg)) == namespaces
    assert not re.search(r"href|url\(|@import|\bsrc\b|fetch\(|XMLHttp|innerHTML|eval\(", svg)


@pytest.mark.parametrize("inverted", [False, True])
def test_hostile_texts_stay_text(inverted: bool) -> None:
    svg = to_svg(HOSTILE, inverted=inverted)
    svg.encode("utf-8")
    root = ET.fromstring(svg)  # noqa: S314
    assert {element.tag.removeprefix(SVG) for element in root.iter()} == ALLOWED
    assert len([element for element in root.iter() if element.tag == f"{SVG}script"]) == 1
    for element in root.iter():
        assert not [name for name in element.attrib if name.lower().startswith("on")]
        for text in (element.text or "", *element.attrib.values()):
            assert all(char.isprintable() or char == "\n" for char in text)
    assert max(map(len, svg.splitlines())) < 4000


@given(st.text(max_size=300), st.text(max_size=30))
def test_any_name_survives_as_its_visible_form(name: str, module: str) -> None:
    profile = Profile(
        title=name, stacks=[((Frame(name, "user", module),), 5)], facts=[(name, name)]
    )
    _, box = drawn(to_svg(profile))
    assert box.name == (visible(name).strip() or "[unknown]")
    assert box.about == "5 µs, 100 %" + (f" · {visible(module)}" if module else "")


def test_labels_fit_their_frames_without_the_script() -> None:
    for profile in (SMALL, HOSTILE):
        for box in drawn(to_svg(profile)):
            assert 2 * INSET + cells(box.label) * CELL <= box.width or not box.label
            if box.label not in ("", box.name):
                assert "…" in (box.label[0], box.label[-1])
                assert box.label.strip("…").rstrip() in box.name


def test_a_cut_name_is_rather_the_function_s_own_than_its_qualifiers() -> None:
    def label(name: str, kind: FrameKind, columns: int) -> str:
        frames = (APP, Frame(name, kind, ""))
        narrow = int((columns * CELL + 2 * INSET + 1) / (WIDTH - 2 * PAD) * 1_000_000)
        profile = Profile(title="t", stacks=[(frames, narrow), ((APP,), 1_000_000 - narrow)])
        return drawn(to_svg(profile))[-1].label

    name = "net/http.(*conn).serve"
    assert label(name, "user", 22) == name
    assert label(name, "user", 21) == "…(*conn).serve"
    assert label(name, "jit", 10) == "…(*conn).…"
    assert label(name, "process", 10) == "net/http.…"
    assert label("node::Start(int, char**)", "user", 18) == "node::Start(int,…"
    assert label("libjemalloc.so.2+0x39ad8", "user", 18) == "libjemall…+0x39ad8"
    assert label("漢字+0x39ad8", "user", 9) == "…+0x39ad8"
    assert label(name, "user", 2) == ""


def test_a_picture_higher_than_a_screen_has_its_root_at_the_top() -> None:
    """It opens at the top, and the answer begins at the root."""
    for rows, inverted in ((SCREEN_ROWS, False), (SCREEN_ROWS + 1, True)):
        deep = Profile(title="t", stacks=[(user(*(f"f{i}" for i in range(rows - 1))), 5)])
        boxes = drawn(to_svg(deep))
        assert (boxes[0].y < boxes[-1].y) == inverted
        assert boxes == drawn(to_svg(deep, inverted=inverted))
        # What the colours mean is seen with the root.
        legend = re.search(r'<g class="legend">\s*<g[^>]*><rect [^>]*y="(\d+)"', to_svg(deep))
        assert legend and abs(int(legend[1]) - boxes[0].y) < 40
        assert boxes != drawn(to_svg(deep, inverted=not inverted))


def test_what_is_no_function_is_explained() -> None:
    frames = [Frame("[blocked]", "state"), Frame("[truncated]", "marker"), DASH]
    stacks = [((frame,), 1) for frame in [*frames, Frame("[blocked]", "user")]]
    about = {
        box.kind + box.name: box.about for box in drawn(to_svg(Profile(title="", stacks=stacks)))
    }
    share = "1 µs, 25.00 %"
    assert (
        about["state[blocked]"] == f"{share} · off the CPU, with nothing to do until it was woken"
    )
    assert about["marker-"] == f"{share} · beyond are functions of the kernel"
    assert about["user[blocked]"] == share  # a name that the program chose


@pytest.mark.parametrize("cause", CAUSES)
def test_each_cause_is_explained(cause: str) -> None:
    assert meaning_of(Frame(f"[waiting: {cause}]", "state")).startswith("ready to run, but ")


def test_a_wide_frame_shows_its_whole_name_and_a_narrow_one_none() -> None:
    labels = {box.name: box.label for box in drawn(to_svg(SMALL))}
    assert labels["main"] == "main"
    assert labels["[not sampled]"] == "[not…"
    tiny = Profile(title="t", stacks=[((APP, *user("main")), 1), ((APP,), 200)])
    assert drawn(to_svg(tiny))[-1].label == ""


def test_tooltip_says_name_time_share_and_module() -> None:
    (box,) = [box for box in drawn(to_svg(SMALL)) if box.name == "read"]
    assert box.about == "500 ms, 50.00 % · /usr/bin/app"


def test_facts_and_warnings_are_in_the_page() -> None:
    root = ET.fromstring(to_svg(SMALL))  # noqa: S314
    texts = {
        element.get("class"): "".join(element.itertext()) for element in root.iter(f"{SVG}text")
    }
    assert texts["h1"] == SMALL.title
    assert texts["h2"] == SMALL.subtitle
    assert texts["facts"] == "kind wait · host box · waits 1,000 for 1.00 s"
    assert texts["warn"] == "!!! 7 events were lost"
    assert root.get("aria-label") == SMALL.title


def test_long_facts_wrap_and_nothing_leaves_the_page() -> None:
    facts = [(f"key{i}", "value " * (i % 7)) for i in range(60)] + [("one", "x" * 5000)]
    root = ET.fromstring(to_svg(Profile(title="t" * 999, stacks=[], facts=facts)))  # noqa: S314
    lines = [e for e in root.iter(f"{SVG}text") if e.get("class") in ("h1", "facts")]
    assert len(lines) > 5
    for line in lines:
        pixels = 10.2 if line.get("class") == "h1" else 7.2
        assert cells("".join(line.itertext())) * pixels <= WIDTH
    shown = " ".join("".join(line.itertext()) for line in lines)
    assert all(key in shown for key, _ in facts)


def test_the_legend_names_the_kinds_that_are_drawn_and_no_others() -> None:
    kinds = get_args(FrameKind)
    everything = Profile(title="t", stacks=[((Frame("f", kind),), 1) for kind in kinds])
    for profile, expected in (
        (everything, set(kinds)),
        (SMALL, set(kinds) - {"thread", "state", "network", "inlined"}),
    ):
        root = ET.fromstring(to_svg(profile))  # noqa: S314
        (legend,) = [g for g in root.iter(f"{SVG}g") if g.get("class") == "legend"]
        assert {g.get("class") for g in legend.findall(f"{SVG}g")} == expected


def test_the_legend_stays_in_the_page_whatever_it_has_to_say() -> None:
    hairs = [((Frame(f"{i}", "user"),), 1) for i in range(2000)]
    for kinds in (get_args(FrameKind), ("user",)):
        wide = [((Frame("f", kind),), 10**9) for kind in kinds]
        root = ET.fromstring(to_svg(Profile(title="t", stacks=wide + hairs)))  # noqa: S314
        (legend,) = [g for g in root.iter(f"{SVG}g") if g.get("class") == "legend"]
        (note,) = legend.findall(f"{SVG}text")
        assert note.text and "2,000 frames are too narrow to draw" in note.text
        assert float(note.attrib["x"]) + 7.2 * len(note.text) <= WIDTH
        assert float(note.attrib["y"]) < float(root.attrib["height"])
        assert {text.get("y") for text in legend.iter(f"{SVG}text")} != {note.get("y")} or (
            kinds == ("user",)
        )


def luminance(colour: str) -> float:
    def linear(part: int) -> float:
        return part / 12.92 / 255 if part <= 10 else ((part / 255 + 0.055) / 1.055) ** 2.4

    red, green, blue = (linear(int(colour[i : i + 2], 16)) for i in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def palettes() -> list[tuple[str, dict[str, str]]]:
    light, dark = to_svg(SMALL).split("@media (prefers-color-scheme: dark)")
    pattern = r"\.latrace-flame \.(\w+) rect \{ fill: (#\w{6}) \}"
    return [("light", dict(re.findall(pattern, light))), ("dark", dict(re.findall(pattern, dark)))]


@pytest.mark.parametrize(("theme", "fills"), palettes(), ids=["light", "dark"])
def test_kinds_are_apart_in_grey_and_their_text_is_readable(
    theme: str, fills: dict[str, str]
) -> None:
    assert fills.keys() >= set(get_args(FrameKind))
    grey = {kind: 116 * luminance(fills[kind]) ** (1 / 3) - 16 for kind in fills}
    apart = sorted(grey[kind] for kind in ("state", "user", "kernel", "jit", "marker"))
    assert all(b - a >= 9 for a, b in pairwise(apart)), grey
    bright = ("state", "user", "inlined", "jit", "network")
    for kind in get_args(FrameKind):
        dark_text = kind != "state" if theme == "light" else kind in bright
        light_ink = "#ffffff" if theme == "light" else "#e8ebef"
        ink = luminance("#10141a" if dark_text else light_ink)
        low, high = sorted((ink, luminance(fills[kind])))
        assert (high + 0.05) / (low + 0.05) >= 4.5, kind


def test_the_name_limit_keeps_both_ends() -> None:
    name = "begin" + "x" * 10_000 + "end"
    box = drawn(to_svg(Profile(title="t", stacks=[((Frame(name, "user"),), 1)])))[1]
    assert box.name.startswith("begin") and box.name.endswith("end") and len(box.name) == 400
    assert HOSTILE_NAMES
