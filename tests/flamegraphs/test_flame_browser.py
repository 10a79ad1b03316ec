"""The SVG in a real browser: zoom, search, keyboard, both themes, and hostile names at rest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flame_samples import APP, HOSTILE, HOSTILE_NAMES, SMALL, drawn, user
from flame_webdriver import Browser

from latrace.flamegraphs import Frame, Profile, to_svg
from latrace.flamegraphs.text import visible

pytestmark = pytest.mark.browser

# Each frame as the page has it now: pixels are of the screen, so what is drawn is what counts.
STATE = """
return Array.from(document.querySelectorAll('.frames > g'), (node) => {
  const box = node.querySelector('rect').getBoundingClientRect();
  const text = node.querySelector('text');
  const ink = text && text.textContent ? text.getBoundingClientRect() : null;
  return {
    name: node.getAttribute('aria-label').split(', ')[0], x: box.left, y: box.top,
    right: box.right, width: box.width, bottom: box.bottom, label: text ? text.textContent : '',
    ink: ink ? ink.right : box.left, shown: node.style.display !== 'none',
    up: node.classList.contains('up'), hit: node.classList.contains('hit'),
    value: Number(node.dataset.t.split(' ')[1]), depth: Number(node.dataset.t.split(' ')[2]),
    level: Number(node.getAttribute('aria-level')), role: node.getAttribute('role'),
    focused: node === document.activeElement, tab: node.tabIndex,
    dim: Number(getComputedStyle(node.querySelector('rect')).opacity) < 0.6,
  };
});
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as made:
        yield made


@pytest.fixture(autouse=True)
def quiet(browser: Browser) -> Iterator[None]:
    """No test may leave a word on the console."""
    browser.console()
    yield
    assert browser.console() == []


def show(browser: Browser, tmp_path: Path, profile: Profile = SMALL, **options: Any) -> None:
    page = tmp_path / "flame.svg"
    page.write_text(to_svg(profile, **options), encoding="utf-8")
    browser.open(page)


def state(browser: Browser) -> list[dict[str, Any]]:
    frames: list[dict[str, Any]] = browser.run(STATE)
    return frames


def shown(browser: Browser) -> list[dict[str, Any]]:
    return [frame for frame in state(browser) if frame["shown"]]


def one(frames: list[dict[str, Any]], name: str, depth: int | None = None) -> dict[str, Any]:
    (found,) = [f for f in frames if f["name"] == name and depth in (None, f["depth"])]
    return found


def focused(browser: Browser) -> tuple[str, int]:
    (found,) = [frame for frame in state(browser) if frame["focused"]]
    return found["name"], found["depth"]


def matched(browser: Browser) -> str:
    text: str = browser.run("return document.querySelector('output').textContent")
    return text


def click(browser: Browser, name: str) -> None:
    browser.click(browser.find(f'.frames > g[aria-label^="{name},"]'))


def search(browser: Browser, pattern: str) -> None:
    browser.press("/")
    browser.write(pattern)


def test_it_opens_at_the_window_s_width_with_the_still_picture_s_proportions(
    browser: Browser, tmp_path: Path
) -> None:
    show(browser, tmp_path)
    frames = state(browser)
    width = browser.run("return document.documentElement.clientWidth")
    assert width > 1200
    still = drawn(to_svg(SMALL))
    assert [f["name"] for f in frames] == [box.name for box in still]
    assert frames[0]["x"] == 10 and frames[0]["right"] == pytest.approx(width - 10, abs=1)
    for frame, box in zip(frames, still, strict=True):
        assert frame["width"] == pytest.approx(box.value / 10**6 * (width - 20), abs=0.1)
        assert frame["role"] == "treeitem" and frame["level"] == box.depth + 1
    assert browser.run("return document.querySelector('.frames').getAttribute('role')") == "tree"


def test_labels_stay_inside_their_frames_at_every_zoom(browser: Browser, tmp_path: Path) -> None:
    show(browser, tmp_path)
    for name in ("all · 1.00 s", "node", "lock", "[not sampled]"):
        click(browser, name)
        labelled = [frame for frame in shown(browser) if frame["label"]]
        assert labelled
        for frame in labelled:
            assert frame["ink"] <= frame["right"] + 0.5, frame
        browser.press("Escape")


def test_a_cut_name_is_the_function_s_own_and_whole_where_it_fits(
    browser: Browser, tmp_path: Path
) -> None:
    name = "net/http.(*Server).Serve.func3"
    stacks = [((APP, *user(name)), 150), ((APP, *user("main")), 850)]
    show(browser, tmp_path, Profile(title="t", stacks=stacks))
    assert one(state(browser), name)["label"] == "…(*Server).Serve.func3"
    click(browser, name)
    assert one(state(browser), name)["label"] == name
    browser.press("Escape")
    assert one(state(browser), name)["label"] == "…(*Server).Serve.func3"


def test_a_cut_place_in_a_file_keeps_of_the_file_what_it_can(
    browser: Browser, tmp_path: Path
) -> None:
    name = "libjemalloc.so.2.0.1-with-a-long-name+0x39ad8"
    show(
        browser,
        tmp_path,
        Profile(title="t", stacks=[((APP, *user(name)), 150), ((APP, *user("f")), 850)]),
    )
    label = one(state(browser), name)["label"]
    assert label.startswith("libjemall") and label.endswith("…+0x39ad8")
    assert len(label) < len(name)


def test_click_zooms_and_the_button_resets(browser: Browser, tmp_path: Path) -> None:
    show(browser, tmp_path)
    before = state(browser)
    click(browser, "read")
    frames = shown(browser)
    assert [(f["name"], f["up"]) for f in frames] == [
        ("all · 1.00 s", True), ("app", True), ("main", True), ("read", False), ("-", False),
        ("do_syscall_64", False), ("schedule", False),
    ]  # fmt: skip
    assert {round(f["width"]) for f in frames} == {round(before[0]["width"])}
    reset = browser.find(".tools .reset")
    assert browser.run("return arguments[0].disabled", reset) is False
    browser.click(reset)
    assert [f | {"focused": 0, "tab": 0} for f in state(browser)] == [
        f | {"focused": 0, "tab": 0} for f in before
    ]
    assert browser.run("return arguments[0].disabled", reset) is True


def test_zoom_keeps_proportions_and_an_ancestor_zooms_out(browser: Browser, tmp_path: Path) -> None:
    show(browser, tmp_path)
    click(browser, "main")
    frames = shown(browser)
    main = one(frames, "main", 2)
    for frame in frames:
        if not frame["up"]:
            assert frame["width"] == pytest.approx(
                frame["value"] / 825_000 * main["width"], abs=0.1
            )
    assert not [f for f in frames if f["name"] == "[stack lost]"]
    click(browser, "all · 1.00 s")
    assert len(shown(browser)) == len(state(browser))


def test_search_counts_matched_time_once_along_a_path(browser: Browser, tmp_path: Path) -> None:
    show(browser, tmp_path)
    search(browser, "main")
    assert matched(browser) == "matched 82.50 % · 825 ms · 2 frames"  # main above main: once
    frames = state(browser)
    assert [f["depth"] for f in frames if f["hit"]] == [2, 4]
    assert all(f["dim"] != f["hit"] for f in frames)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("^schedule$", "matched 80.00 % · 800 ms · 2 frames"),
        ("futex|syscall", "matched 80.00 % · 800 ms · 2 frames"),
        ("FUTEX", "matched 0.00 % · 0 µs · 0 frames"),
        ("futex", "matched 30.00 % · 300 ms · 1 frame"),
        (r"\[not", "matched 4.00 % · 40.0 ms · 1 frame"),
        (".", "matched 100.00 % · 1.00 s · 15 frames"),
        ("(", "not a regular expression"),
    ],
)
def test_search_patterns(browser: Browser, tmp_path: Path, pattern: str, said: str) -> None:
    show(browser, tmp_path)
    search(browser, pattern)
    assert matched(browser) == said
    invalid = browser.run("return document.querySelector('input').getAttribute('aria-invalid')")
    assert invalid == ("true" if pattern == "(" else None)


def test_search_opens_by_ctrl_f_and_ends_by_escape(browser: Browser, tmp_path: Path) -> None:
    show(browser, tmp_path)
    browser.press("Control", "f")
    browser.write("read")
    assert matched(browser).startswith("matched 50.00 %")
    browser.press("Escape")
    assert matched(browser) == ""
    assert not [f for f in state(browser) if f["hit"] or f["dim"]]
    assert focused(browser)[0] == "all · 1.00 s"


def test_search_says_at_least_when_frames_are_not_drawn(browser: Browser, tmp_path: Path) -> None:
    profile = Profile(
        title="t", stacks=[((APP, *user("x", "tiny")), 1), ((APP, *user("y")), 10**6)]
    )
    show(browser, tmp_path, profile)
    search(browser, "y$")
    assert matched(browser) == "matched ≥ 100.00 % · 1.00 s · 1 frame"


def test_zoom_and_search_live_together(browser: Browser, tmp_path: Path) -> None:
    show(browser, tmp_path)
    search(browser, "schedule")
    click(browser, "lock")
    assert [f["name"] for f in shown(browser) if f["hit"]] == ["schedule"]
    assert matched(browser) == "matched 80.00 % · 800 ms · 2 frames"
    browser.press("Escape")
    assert len(shown(browser)) == len(state(browser))
    assert matched(browser) != ""  # the first Escape ends the zoom, the second the search
    browser.press("Escape")
    assert matched(browser) == ""


@pytest.mark.parametrize("inverted", [False, True])
def test_keyboard_alone_is_enough(browser: Browser, tmp_path: Path, inverted: bool) -> None:
    show(browser, tmp_path, inverted=inverted)
    into, out = ("ArrowDown", "ArrowUp") if inverted else ("ArrowUp", "ArrowDown")
    browser.press("Tab")
    assert browser.run("return document.activeElement.localName") == "input"
    browser.press("Tab")  # Flip; the reset button is disabled
    browser.press("Tab")
    assert focused(browser) == ("all · 1.00 s", 0)
    for key, expected in (
        (into, ("app", 1)), ("ArrowRight", ("node", 1)), ("ArrowRight", ("[not sampled]", 1)),
        ("ArrowRight", ("[not sampled]", 1)), ("ArrowLeft", ("node", 1)), ("ArrowLeft", ("app", 1)),
        (into, ("main", 2)), (into, ("read", 3)), ("ArrowLeft", ("lock", 3)), (out, ("main", 2)),
        ("Home", ("all · 1.00 s", 0)), (out, ("all · 1.00 s", 0)), (into, ("app", 1)),
        (into, ("main", 2)), (into, ("read", 3)), ("ArrowLeft", ("lock", 3)),
    ):  # fmt: skip
        browser.press(key)
        assert focused(browser) == expected
        (tabbable,) = [f for f in state(browser) if f["tab"] == 0]
        assert (tabbable["name"], tabbable["depth"]) == expected
    browser.press("Enter")
    assert one(shown(browser), "lock")["width"] == pytest.approx(state(browser)[0]["width"])
    assert focused(browser) == ("lock", 3)
    browser.press("ArrowRight")  # its neighbour is out of the picture
    assert focused(browser) == ("lock", 3)
    assert [f["name"] for f in state(browser) if f["tab"] == 0] == ["lock"]
    browser.press("Escape")
    assert len(shown(browser)) == len(state(browser))
    assert focused(browser) == ("lock", 3)


def test_flip_turns_the_picture_over_and_the_arrows_with_it(
    browser: Browser, tmp_path: Path
) -> None:
    upright, inverted = drawn(to_svg(SMALL)), drawn(to_svg(SMALL, inverted=True))
    show(browser, tmp_path)
    flip = browser.find(".tools .flip")
    for still, key in ((inverted, "ArrowDown"), (upright, "ArrowUp")):
        browser.click(flip)
        assert [f["y"] for f in state(browser)] == [box.y for box in still]
        browser.press("Tab")
        browser.press("Home")
        browser.press(key)
        assert focused(browser) == ("app", 1)
    browser.click(flip)
    click(browser, "read")
    browser.press("Escape")
    assert [f["y"] for f in state(browser)] == [box.y for box in inverted]


def test_the_focus_ring_is_around_the_focused_frame(browser: Browser, tmp_path: Path) -> None:
    ring = (
        "const [ring] = document.querySelectorAll('.ring'); const box = ring.getBBox();"
        "return [ring.getAttribute('visibility'), box.x, box.width]"
    )
    show(browser, tmp_path)
    assert browser.run(ring)[0] == "hidden"
    for _ in range(3):
        browser.press("Tab")
    for key in ("ArrowUp", "ArrowUp", "Enter"):
        browser.press(key)
        visibility, x, width = browser.run(ring)
        (frame,) = [frame for frame in state(browser) if frame["focused"]]
        assert visibility == "visible"
        assert (x, width) == pytest.approx((frame["x"] - 1, frame["width"] + 2), abs=0.1)
    click(browser, "app")
    assert browser.run(ring)[0] == "hidden"


def test_tooltip_says_name_time_and_share(browser: Browser, tmp_path: Path) -> None:
    show(browser, tmp_path)
    tip = (
        "const tip = document.querySelector('.tip'); const box = tip.getBoundingClientRect();"
        "return [tip.getAttribute('visibility'), Array.from(tip.querySelectorAll('tspan'),"
        " (line) => line.textContent), box.left, box.right, innerWidth]"
    )
    browser.hover(browser.find('.frames > g[aria-label^="read,"]'))
    visibility, lines, *_ = browser.run(tip)
    assert (visibility, lines) == ("visible", ["read", "500 ms, 50.00 % · /usr/bin/app"])
    browser.hover(browser.find('.frames > g[aria-label^="[not sampled],"]'))
    _, lines, left, right, width = browser.run(tip)
    assert lines == [
        "[not sampled]",
        "40.0 ms, 4.00 % · exact time of which no stack was taken",
    ]
    assert 0 <= left < right <= width
    browser.hover(browser.find(".h1"))
    assert browser.run(tip)[0] == "hidden"
    # The browser's own tooltip would come on top of it.
    assert browser.run("return document.querySelectorAll('.frames title').length") == 0


def test_hostile_names_execute_nothing(browser: Browser, tmp_path: Path) -> None:
    show(browser, tmp_path, HOSTILE)
    assert len(state(browser)) == 1 + 2 * len(HOSTILE_NAMES)
    search(browser, ".")
    browser.press("Enter")
    for node in range(1, 2 * len(HOSTILE_NAMES), 2):  # zoom into, and so show, each of them whole
        browser.run(
            "const node = document.querySelectorAll('.frames > g')[arguments[0]];"
            "for (const what of ['mousemove', 'click'])"
            "  node.dispatchEvent(new MouseEvent(what, {bubbles: true, clientX: 9, clientY: 9}));",
            node,
        )
        tip = browser.run("return document.querySelector('.tip').textContent")
        assert tip == "" or tip.isprintable()
    assert browser.run("return window.pwned") is None
    tags = browser.run(
        "return [...new Set(Array.from(document.querySelectorAll('*'), (e) => e.localName))]"
    )
    assert set(tags) == {
        "svg", "title", "desc", "style", "rect", "g", "text", "tspan", "script",
        "foreignObject", "div", "output", "input", "button",
    }  # fmt: skip
    assert browser.run("return document.querySelectorAll('script').length") == 1


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_hostile_name_reads_as_its_visible_form(
    browser: Browser, tmp_path: Path, name: str
) -> None:
    show(browser, tmp_path, Profile(title=name, stacks=[((Frame(name, "user"),), 5)]))
    label = browser.run(
        "return document.querySelectorAll('.frames > g')[1].getAttribute('aria-label')"
    )
    assert label == f"{visible(name, limit=400).strip() or '[unknown]'}, 5 µs, 100 %"
    assert browser.run("return window.pwned") is None


def test_light_and_dark_follow_the_reader(browser: Browser, tmp_path: Path) -> None:
    show(browser, tmp_path)
    fill = "return getComputedStyle(document.querySelector('.bg')).fill"
    ink = "return getComputedStyle(document.querySelector('.h1')).fill"
    browser.prefer("dark")
    dark = browser.run(fill), browser.run(ink)
    browser.prefer("light")
    light = browser.run(fill), browser.run(ink)
    assert (dark, light) == (
        ("rgb(20, 24, 29)", "rgb(232, 235, 239)"),
        ("rgb(255, 255, 255)", "rgb(16, 20, 26)"),
    )


def test_nothing_is_asked_of_the_network(browser: Browser, tmp_path: Path) -> None:
    show(browser, tmp_path)
    assert browser.run("return performance.getEntriesByType('resource').length") == 0


def test_two_in_one_page_do_not_meet(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(f"<!DOCTYPE html><meta charset=utf-8>{to_svg(SMALL)}{to_svg(SMALL)}")
    browser.open(page)
    count = (
        "return Array.from(document.querySelectorAll('svg'), (svg) => Array.from("
        "svg.querySelectorAll('.frames > g')).filter((g) => g.style.display !== 'none').length)"
    )
    assert browser.run(count) == [16, 16]
    click(browser, "read")
    assert browser.run(count) == [7, 16]


def test_a_narrow_window_shrinks_the_picture(browser: Browser, tmp_path: Path) -> None:
    size = {"width": 700, "height": 600, "deviceScaleFactor": 1, "mobile": False}
    browser.devtools("Emulation.setDeviceMetricsOverride", **size)
    try:
        show(browser, tmp_path)
        root = state(browser)[0]
        assert 0 < root["x"] < root["right"] <= 700
        assert browser.run("return document.documentElement.scrollWidth") <= 700
        click(browser, "read")
        assert one(shown(browser), "read")["width"] == pytest.approx(root["width"], abs=0.1)
    finally:
        browser.devtools("Emulation.clearDeviceMetricsOverride")


def test_without_a_script_the_picture_stands(tmp_path: Path) -> None:
    """Same frames, native tooltips, labels inside their frames, and no tools that do nothing."""
    with Browser(tmp_path, script=False) as browser:
        show(browser, tmp_path)
        assert (
            browser.run("return document.querySelector('svg').classList.contains('live')") is False
        )
        found = browser.run(
            "return Array.from(document.querySelectorAll('.frames > g'), (node) => {"
            " const box = node.querySelector('rect').getBoundingClientRect();"
            " const text = node.querySelector('text');"
            " return [node.querySelector('title').textContent, box.width, box.right,"
            "  text ? text.getBoundingClientRect().right : 0];})"
        )
        still = drawn(to_svg(SMALL))
        width = browser.run("return document.documentElement.clientWidth")
        for (title, pixels, right, ink), box in zip(found, still, strict=True):
            assert title == f"{box.name}\n{box.about}"
            assert pixels == pytest.approx(box.width * width / 1200, abs=0.1)
            assert ink <= right + 0.5
        assert browser.run("return document.querySelectorAll('input, button').length") == 0
        assert browser.console() == []
