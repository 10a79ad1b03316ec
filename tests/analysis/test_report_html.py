"""The page of a report: right numbers, nothing from outside, and hostile names that stay names."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_samples import BAD_S, make_tables, sample_manifest, write_sample
from sample_capture import START_NS, exact_tables, make_waits, write_capture

from latrace.analysis.capture import open_capture
from latrace.analysis.causes import CAUSES, COLUMNS
from latrace.analysis.report_html import render_html, series
from latrace.analysis.report_html.charts import marks_of
from latrace.analysis.selection import Selection
from latrace.analysis.summary import summarise
from latrace.flamegraphs import KINDS
from latrace.tracer.cli import main

sys.path.append(str(Path(__file__).parents[1] / "flamegraphs"))
import flame_webdriver

EVERYTHING = Selection()
HOSTILE = (
    "\"'><script>pwned=1</script><img src=x onerror=pwned=1>$\\frac{a}{0}&lt;\u202e\x1b]0;\n--"
)
SPAN_NS = 10**10
CALLS = ("epoll_wait", "clock_nanosleep", "futex")


def page_of(path: Path, selection: Selection = EVERYTHING) -> str:
    capture = open_capture(path)
    summary = summarise(capture, selection=selection)
    return render_html(capture, summary, selection=selection).decode("utf-8")


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample(tmp_path_factory.mktemp("sample") / "c.data", count=4000)


@pytest.fixture(scope="module")
def page(sample: Path) -> str:
    return page_of(sample)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A page whose every name is hostile; where its names are was a page with harmless ones."""
    return page_of(named(tmp_path_factory.mktemp("hostile"), HOSTILE))


def named(folder: Path, name: str) -> Path:
    """A capture in which everything that can have a name is called `name`."""
    tables = make_tables(2000, name=name)
    tables["threads"]["comm"] = [name] * len(tables["threads"]["tid"])
    tables["threads"]["cgroup"] = [name] * len(tables["threads"]["tid"])
    tables["frames"]["symbol"] = [name] * len(tables["frames"]["id"])
    tables["frames"]["module"] = [name] * len(tables["frames"]["id"])
    tables["slices"]["cgroup"] = [name] * len(tables["slices"]["tid"])
    tables["slices"]["vector"] = [name] * len(tables["slices"]["tid"])
    tables["sleeps"]["call"] = [name] * len(tables["sleeps"]["tid"])
    tables["hist"]["metric"] = [
        f"overshoot:{name}" if metric.startswith("overshoot:") else metric
        for metric in tables["hist"]["metric"]
    ]
    tables["waits"]["throttled_by"] = [name] * 2000
    tables["waits"]["syscall"] = [name] * 2000
    tables["waits"]["waker"] = [name] * 2000
    manifest = sample_manifest(
        host=name,
        kernel=name,
        latrace=name,
        command=[name],
        targets=[{"tgid": name, "comm": name, "cmdline": name}],
    )
    manifest["cgroups_limited"][0]["cgroup"] = name
    manifest["overhead"] = {
        **manifest["overhead"],
        "programs": [{"name": name, "runs": 1, "ns": 1}],
    }
    manifest["quality"]["degraded"] = [{"what": name, "why": name, "at_ns": START_NS}]
    return write_capture(folder / "c.data", tables, manifest=manifest)


class Outline(HTMLParser):
    """The tags of a document with their attributes, and its text."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(document)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))
        self.text += " " if tag == "td" else ""

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def frames(self) -> list[Outline]:
        return [Outline(frame["srcdoc"]) for frame in self.all("iframe")]


# --- the numbers -------------------------------------------------------------------------------


def window_of(summary: dict[str, Any]) -> series.Window:
    return series.Window(capture_ns=summary["capture"]["start_ns"], begin_ns=0, end_ns=SPAN_NS)


def test_waits_are_spread_over_the_time_they_lasted(sample: Path) -> None:
    """Against an oracle that cuts each wait into the columns of time, one by one."""
    capture = open_capture(sample)
    window = window_of(summarise(capture))
    waits = series.read_waits(capture, window, EVERYTHING)
    table = capture.waits
    run, wait = (table[name].to_numpy().astype(np.int64) for name in ("run_ns", "wait_ns"))
    parts = np.stack([table[name].to_numpy() for name in COLUMNS], axis=-1).astype(float)
    edges = np.linspace(0, SPAN_NS, series.TIMES + 1)
    expected = np.zeros((len(CAUSES), series.TIMES))
    for end, length, part in zip(run - START_NS, wait, parts, strict=True):
        inside = np.minimum(edges[1:], end) - np.maximum(edges[:-1], end - length)
        expected += part[:, None] * np.maximum(inside, 0) / max(length, 1)
    assert waits.waiting * window.bin_ns == pytest.approx(expected, abs=50)
    assert waits.has_causes
    assert waits.rows == waits.grid.sum() == table.num_rows


def test_the_heat_map_puts_waits_where_they_ended(sample: Path) -> None:
    capture = open_capture(sample)
    waits = series.read_waits(capture, window_of(summarise(capture)), EVERYTHING)
    table = capture.waits
    wait = table["wait_ns"].to_numpy()
    slow = wait >= 1_048_576  # a bound of a row
    ended_s = (table["run_ns"].to_numpy() - START_NS) / 1e9
    row = int(series.latency_row(np.array([1_048_576]))[0])
    assert waits.grid[:, row:].sum() == slow.sum()
    first, last = (int(moment * series.TIMES / 10) for moment in BAD_S)
    bad = slow & (ended_s >= first / series.TIMES * 10) & (ended_s < last / series.TIMES * 10)
    assert waits.grid[first:last, row:].sum() == bad.sum() > 0


def test_the_distribution_is_the_kernels_own_count(sample: Path) -> None:
    capture = open_capture(sample)
    summary = summarise(capture)
    counts = series.exact_histogram(capture)
    assert counts.sum() == summary["waits"]["count"] == 4000  # without the sleep calls' overshoot
    assert [name for name, _, _ in marks_of(summary["waits"])] == [
        "P50",
        "P90",
        "P99",
        "P99.9",
        "max",
    ]


def test_sleep_calls_that_overshot_are_all_in_their_grid(sample: Path) -> None:
    capture = open_capture(sample)
    sleeps = series.read_sleeps(capture, window_of(summarise(capture)), EVERYTHING)
    table = capture.sleeps
    late = [
        call
        for call, overshoot in zip(
            table["call"].to_pylist(), table["overshoot_ns"].to_pylist(), strict=True
        )
        if overshoot is not None
    ]
    assert {call: int(grid.sum()) for call, grid in sleeps.grids.items()} == {
        call: late.count(call) for call in CALLS
    }


def test_the_words_carry_the_summarys_figures(page: str, sample: Path) -> None:
    summary = summarise(open_capture(sample))
    text = " ".join(Outline(page).text.replace("\N{NO-BREAK SPACE}", " ").split())
    tail = summary["waits"]["tail"]
    assert "redis-server (pid 812)" in text
    assert "4,000 waits for a CPU in 10.0 s" in text
    assert "batch-indexer (pid 998)" in text
    assert "SCHED_FIFO 50" in text
    assert "50.0 ms of CPU in every 100 ms" in text
    assert "12 stacks could not be kept." in text
    assert re.search(r"unknown not observed [\d.]+ [mnµ]?s", text)
    other = 100 * tail["by_cause_ns"]["other"] / tail["total_ns"]
    found = re.search(r"other a thread of another process had the CPU [\d.]+ m?s ([\d.]+) %", text)
    assert found is not None
    assert float(found[1]) == pytest.approx(other, abs=0.11)


def test_a_part_of_a_capture_says_so(sample: Path) -> None:
    chosen = Selection(since_ns=5 * 10**9, until_ns=8 * 10**9, over_ns=1_000_000)
    text = Outline(page_of(sample, chosen)).text.replace("\N{NO-BREAK SPACE}", " ")
    assert (
        "A part of the capture: waits from 5.00 s to 8.00 s after tracing began, longer than "
        "1.00 ms." in text
    )
    assert "Counted from the recorded rows." in text


# --- what it is made of ------------------------------------------------------------------------


def test_the_page_asks_for_nothing(page: str) -> None:
    for document in (outline := Outline(page), *outline.frames()):
        for tag, attributes in document.tags:
            assert tag not in ("link", "object", "embed", "base", "form")
            for key in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
                assert re.match(r"#|data:image/png;base64,|$", attributes.get(key, "")), tag
            assert not [key for key in attributes if key.startswith("on")]
    assert not re.search(r"@import|url\((?!#)", page)


def test_no_script_may_run_but_the_flame_graphs(page: str) -> None:
    outline = Outline(page)
    (policy,) = (
        meta["content"]
        for meta in outline.all("meta")
        if meta.get("http-equiv") == "Content-Security-Policy"
    )
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    assert outline.all("script") == []
    assert len(outline.all("iframe")) == len(KINDS)
    for frame in outline.all("iframe"):
        assert frame["sandbox"] == "allow-scripts"
        (script,) = re.findall(r"<script><!\[CDATA\[(.*?)\]\]></script>", frame["srcdoc"], re.S)
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert rules["script-src"] == f"'sha256-{digest}'"


def test_one_drawing_serves_light_and_dark(page: str) -> None:
    pictures = re.findall(r'<div class="(?:wide|narrow)">(<svg.*?</svg>)', page, re.S)
    assert len(pictures) == 10
    for picture in pictures:
        assert set(re.findall(r"#[0-9a-f]{6}\b", re.sub(r"base64,[^\"]*", "", picture))) <= set()
        assert "var(--soft)" in picture
    declared = set(re.findall(r"(--[\w-]+):", page))
    assert set(re.findall(r"var\((--[\w-]+)\)", page)) <= declared


def test_ids_are_unique_and_references_resolve(page: str) -> None:
    outline = Outline(page)
    ids = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    references = set(re.findall(r'(?:href="#|url\(#)([^")]+)', re.sub('srcdoc="[^"]*"', "", page)))
    assert references <= set(ids)


def test_the_same_capture_gives_the_same_page(sample: Path, page: str) -> None:
    assert page_of(sample) == page


def test_its_size_does_not_grow_with_the_capture(tmp_path: Path, page: str) -> None:
    larger = page_of(write_sample(tmp_path / "c.data", count=100_000))
    assert len(larger) < 1.5 * len(page) < 1_500_000


# --- hostile names -----------------------------------------------------------------------------


def test_hostile_names_change_no_markup(hostile: str, tmp_path: Path) -> None:
    harmless = page_of(named(tmp_path, "harmless"))

    def shape(document: str) -> list[tuple[str, list[str]]]:
        # Inside the plots and flame graphs a longer name may leave less room for others.
        outer = re.sub(r"<svg.*?</svg>", "", document, flags=re.S)
        return [(tag, sorted(attributes)) for tag, attributes in Outline(outer).tags]

    assert shape(hostile) == shape(harmless)
    for document in (outline := Outline(hostile), *outline.frames()):
        assert not document.all("img")
        assert all(frame.get("src", "") == "" for frame in document.all("iframe"))
        assert "<script>pwned" in document.text
        assert not set(document.text) & {"\u202e", "\x1b"}


def test_hostile_names_keep_the_policy(hostile: str, page: str) -> None:
    policies = [
        meta["content"]
        for document in (hostile, page)
        for meta in Outline(document).all("meta")
        if meta.get("http-equiv")
    ]
    assert len(policies) == 2
    assert policies[0] == policies[1]


# --- captures that lack something --------------------------------------------------------------


def test_no_wait_at_all(tmp_path: Path) -> None:
    text = Outline(page_of(write_capture(tmp_path / "c", {}))).text
    assert "No wait for a CPU in 10.0\N{NO-BREAK SPACE}s." in text


def test_one_wait_alone(tmp_path: Path) -> None:
    waits = make_waits(1)
    path = write_capture(tmp_path / "c", {"waits": waits, **exact_tables(waits)})
    assert "1 wait for a CPU" in Outline(page_of(path)).text


def test_a_capture_without_causes_says_so(tmp_path: Path) -> None:
    waits = make_waits(500)
    path = write_capture(tmp_path / "c", {"waits": waits, **exact_tables(waits)})
    written = page_of(path)
    assert "This capture does not tell what held the threads back." in Outline(written).text
    assert "causes-wide" not in written


def test_a_killed_capture_is_drawn_from_its_rows(tmp_path: Path) -> None:
    path = write_capture(tmp_path / "c", {"waits": make_waits(500)}, complete=False)
    text = Outline(page_of(path)).text
    assert "This capture was not closed" in text
    assert "Counted from the recorded rows." in text


def test_a_manifest_that_knows_no_time(tmp_path: Path) -> None:
    tables = make_tables(300)
    for start in (None, 0, -5, 2**80):
        manifest = sample_manifest(start_ns=start, started_realtime_ns=None)
        path = write_capture(tmp_path / f"c{start}", tables, manifest=manifest)
        written = page_of(path)
        assert "300 waits for a CPU" in Outline(written).text
        assert "heat-wide" not in written


# --- matplotlib, and what it may not do --------------------------------------------------------


def test_matplotlib_is_imported_only_to_draw() -> None:
    code = (
        "import sys, latrace.analysis.report_html, latrace.tracer.commands.report;"
        "print([name for name in sys.modules if name.split('.')[0] in ('matplotlib', 'PIL')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_settings_that_lie_about_change_nothing(sample: Path, page: str, tmp_path: Path) -> None:
    """Nor does drawing change the process: not its directory, environment, or log."""
    (tmp_path / "matplotlibrc").write_text("font.size: 40\ntext.usetex: True\nnonsense\n")
    code = (
        "import logging, os, sys; from pathlib import Path;"
        "from latrace.analysis.capture import open_capture;"
        "from latrace.analysis.summary import summarise;"
        "from latrace.analysis.report_html import render_html;"
        "before = dict(os.environ), os.getcwd(), logging.getLogger('matplotlib').level;"
        "c = open_capture(Path(sys.argv[1])); page = render_html(c, summarise(c));"
        "sys.stdout.buffer.write(page);"
        "assert before == (dict(os.environ), os.getcwd(), logging.getLogger('matplotlib').level)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(sample)], cwd=tmp_path, capture_output=True, check=True
    )
    assert done.stderr == b""
    assert done.stdout.decode() == page
    assert [path.name for path in tmp_path.iterdir()] == ["matplotlibrc"]


# --- the command -------------------------------------------------------------------------------


def test_the_command_writes_a_file_of_the_callers(
    sample: Path, page: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.html"
    assert main(["report", "-i", str(sample), "-o", str(out)]) == 0
    assert out.read_text(encoding="utf-8") == page
    assert out.stat().st_mode & 0o777 == 0o600
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.startswith(f"Wrote {out} (")

    assert main(["report", "-i", str(sample), "-o", str(out)]) == 2
    assert "--force" in capsys.readouterr().err
    out.write_text("old")
    assert main(["report", "-q", "-f", "-i", str(sample), "-o", str(out)]) == 0
    assert out.read_text(encoding="utf-8") == page
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["-o", "report.pdf"], "end it in .html"), (["-o", "r.html", "--json"], "exclude each other")],
)
def test_what_can_not_be_meant_is_refused(
    arguments: list[str], said: str, sample: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "-i", str(sample), *arguments]) == 2
    assert said in capsys.readouterr().err


# --- in a browser ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[flame_webdriver.Browser]:
    reason = flame_webdriver.missing()
    if reason is not None:
        if os.environ.get("LATRACE_REQUIRE_BROWSER") == "1":
            pytest.fail(f"LATRACE_REQUIRE_BROWSER=1, but this test {reason}", pytrace=False)
        pytest.skip(reason)
    with flame_webdriver.Browser(tmp_path_factory.mktemp("browser")) as made:
        yield made


@pytest.fixture
def show(browser: flame_webdriver.Browser, tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Open a page with all its parts unfolded; it may not leave a word on the console."""

    def opened(document: str) -> None:
        path = tmp_path / "report.html"
        path.write_text(document, encoding="utf-8")
        browser.open(path)
        browser.run("for (const one of document.querySelectorAll('details')) one.open = true")

    browser.console()
    yield opened
    assert browser.console() == []
    browser.devtools("Emulation.clearDeviceMetricsOverride")


@pytest.mark.browser
def test_the_browser_fetches_nothing(
    browser: flame_webdriver.Browser, show: Callable[[str], None], page: str
) -> None:
    show(page)
    resources = "return performance.getEntriesByType('resource').map((one) => one.name)"
    assert [one for one in browser.run(resources) if not one.startswith("data:")] == []


@pytest.mark.browser
def test_a_flame_graph_is_alive_in_its_frame(
    browser: flame_webdriver.Browser, show: Callable[[str], None], page: str
) -> None:
    show(page)
    browser._call("POST", "/frame", {"id": browser.find("iframe")})
    try:
        assert browser.run("return document.querySelector('svg').classList.contains('live')")
        fits = "return [document.documentElement.scrollHeight - innerHeight, innerWidth > 700]"
        assert browser.run(fits) == [0, True]
        # What runs in there is shut off from the page around it, and from the network.
        assert browser.run("return origin") == "null"
    finally:
        browser._call("POST", "/frame", {"id": None})


@pytest.mark.browser
@pytest.mark.parametrize("width", [320, 390, 740, 840, 1280])
def test_nothing_is_wider_than_the_window(
    browser: flame_webdriver.Browser,
    show: Callable[[str], None],
    page: str,
    hostile: str,
    width: int,
) -> None:
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 700}
    for document in (page, hostile):
        browser.devtools("Emulation.setDeviceMetricsOverride", **metrics)
        show(document)
        assert browser.run("return document.documentElement.scrollWidth") <= width
        shown = browser.run(
            "return ['wide', 'narrow'].map((name) =>"
            " getComputedStyle(document.querySelector('.' + name)).display !== 'none')"
        )
        assert shown == [width > 820, width <= 820]
        smallest = browser.run(
            "return Math.min(...Array.from(document.querySelectorAll('figure svg text'), (text) =>"
            " text.getBoundingClientRect().height).filter((height) => height > 0))"
        )
        assert smallest >= 9.5


@pytest.mark.browser
def test_light_and_dark_follow_the_reader(
    browser: flame_webdriver.Browser, show: Callable[[str], None], page: str
) -> None:
    show(page)
    look = (
        "return [getComputedStyle(document.body).backgroundColor,"
        " getComputedStyle(document.querySelector('figure .wide svg text')).fill,"
        " ...['light', 'dark'].map((name) =>"
        "  getComputedStyle(document.querySelector('.heat-' + name)).display)]"
    )
    browser.prefer("dark")
    dark = browser.run(look)
    browser.prefer("light")
    assert browser.run(look) == ["rgb(255, 255, 255)", "rgb(86, 96, 109)", "inline", "none"]
    assert dark == ["rgb(20, 24, 29)", "rgb(162, 172, 184)", "none", "inline"]


@pytest.mark.browser
def test_hostile_names_run_nothing(
    browser: flame_webdriver.Browser, show: Callable[[str], None], hostile: str
) -> None:
    show(hostile)
    assert browser.run("return window.pwned") is None
    shown = browser.run("return document.querySelector('h1').textContent")
    assert shown.startswith("\"'><script>pwned=1")
    for number in range(len(KINDS)):
        browser._call("POST", "/frame", {"id": number})
        assert browser.run("return window.pwned") is None
        browser._call("POST", "/frame", {"id": None})


@pytest.mark.browser
def test_a_script_that_is_not_ours_is_refused(
    browser: flame_webdriver.Browser, tmp_path: Path, page: str
) -> None:
    """The policy holds by itself, should a name ever slip through."""
    path = tmp_path / "slipped.html"
    slipped = page.replace("<header>", "<header><script>window.pwned = 1</script>")
    assert slipped != page
    path.write_text(slipped, encoding="utf-8")
    browser.open(path)
    assert browser.run("return window.pwned") is None
    assert any("Content Security Policy" in line for line in browser.console())


def test_the_summary_stays_what_machines_read(sample: Path) -> None:
    """Writing a page takes the figures as they are: it must not change them."""
    capture = open_capture(sample)
    summary = summarise(capture)
    before = json.dumps(summary)
    render_html(capture, summary)
    assert json.dumps(summary) == before
