"""The page of a bundle: the spike first, compared with the time before it, marked in the plots."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
from report_samples import write_sample
from sample_capture import START_NS
from spike_samples import MS, Rows, S, document, neighbour, trigger, write_bundle

from latrace.analysis.capture import open_capture
from latrace.analysis.report_html import render_html
from latrace.analysis.spikes import Told, analyse, explain, read_spike
from latrace.analysis.summary import summarise

HOSTILE = "\"'><script>pwned=1</script><img src=x onerror=pwned=1>&lt;\u202e\x1b]0;\n--"
MARK = re.compile(r"stroke: var\(--alarm\)")
SHADE = re.compile(r"fill: var\(--alarm\); opacity: 0\.2")


def page_of(path: Path, *, told: bool = True) -> str:
    capture = open_capture(path)
    found: Told | None = explain(capture)
    assert found is not None
    return render_html(capture, summarise(capture), spike=found if told else None).decode("utf-8")


def bad_second(**more: Any) -> dict[str, Any]:
    """What fired in the sample of reports, whose neighbour is at work from 6 s to 7 s."""
    rule = trigger(since_ns=START_NS + S, until_ns=START_NS + 6 * S + 200 * MS, baseline=MS)
    other = trigger(rule="--retransmits 3", kind="retransmits", value=7, threshold=3,
                    unit="segments")  # fmt: skip
    fired = START_NS + 6 * S + 200 * MS
    return document(rule, other, fired_ns=fired, end_ns=START_NS + 10 * S) | more


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_sample(tmp_path_factory.mktemp("page") / "b", count=4000)
    (path / "spike.json").write_text(json.dumps(bad_second(notes=["1.2 s of rows were dropped"])))
    return path


@pytest.fixture(scope="module")
def page(bundle: Path) -> str:
    return page_of(bundle)


def plain(part: str) -> str:
    return re.sub(r"<[^>]*>", " ", part).replace("\u00a0", " ")


def test_the_first_screen_says_what_it_was_made_of(page: str, bundle: Path) -> None:
    head = page[page.index("<header>") : page.index("</header>")]
    spike = read_spike(bundle)
    assert spike is not None
    for sentence in analyse(open_capture(bundle), spike)["sentences"]:
        said = re.sub(r"(?<=\d) us\b", " µs", sentence)
        assert said in html.unescape(plain(head)).replace("\u00a0", " ")
    for text in ("Compared", "Who had the CPU", "What fired", "1.2 s of rows were dropped"):
        assert text in head
    assert re.search(r"--p99 10ms.*11\.0 ms.*10\.0 ms", plain(head), re.DOTALL)
    assert re.search(r"--retransmits 3.*7 segments.*3 segments", plain(head), re.DOTALL)
    assert "usual 1.00 ms" in plain(head)


def test_the_ordinary_page_follows(page: str) -> None:
    places = [page.index(f"<h2>{title}</h2>") for title in ("The whole recording", "Why")]
    assert page.index("</header>") < places[0] < places[1]
    assert page.count("<h1>") == page.count("<header>") == 1
    assert "one in a hundred was longer" in page


def test_the_spike_is_marked_in_the_plots_over_time(page: str, bundle: Path) -> None:
    assert len(SHADE.findall(page)) == len(MARK.findall(page)) == 4  # two plots in two widths
    assert "Shaded: the spike" in page
    without = page_of(bundle, told=False)
    assert not SHADE.search(without)
    assert not MARK.search(without)
    assert "Shaded" not in without
    assert "The whole recording" not in without


def test_no_script_and_nothing_from_outside(page: str) -> None:
    body = re.sub(r'srcdoc="[^"]*"', "", page)
    assert "<script" not in body
    assert not re.search(r'(?:src|href)="(?!#|data:image/png;)', body)


def test_the_same_bundle_gives_the_same_page(page: str, bundle: Path) -> None:
    assert page_of(bundle) == page


@pytest.mark.parametrize("kind", ["wait", "metric", "manual", "retransmits", "sleep", "max"])
def test_hostile_names_stay_names(tmp_path: Path, kind: str) -> None:
    rows = neighbour()
    for row in rows.waits[::2]:
        row |= {"syscall": HOSTILE, "blocked_ns": MS}
    for row in rows.slices:
        row["comm"] = HOSTILE
    rows.sleep(8 * S, 20 * MS, call=HOSTILE)
    rule = trigger(kind=kind, rule=HOSTILE, unit=HOSTILE if kind == "metric" else "ns",
                   reason=HOSTILE)  # fmt: skip
    host = {"top_cpu": [{"pid": 5, "comm": HOSTILE, "cpu_percent": 50}]}
    told = document(rule, rule, name=HOSTILE, notes=[HOSTILE], host=host)
    page = page_of(write_bundle(tmp_path / "b", rows, told))
    head = page[page.index("<header>") : page.index("</header>")]
    assert "pwned" in head
    assert "<script" not in head
    assert "<img" not in head
    assert "\u202e" not in page
    assert "\x1b" not in page


def test_what_grew_is_listed_where_the_rule_does_not_tell(tmp_path: Path) -> None:
    rule = trigger(kind="metric", value=0.2, threshold=0.1, unit="s",
                   since_ns=START_NS + 7 * S)  # fmt: skip
    page = page_of(write_bundle(tmp_path / "b", neighbour(), document(rule)))
    assert "What grew, in each second" in page
    assert "200\u00a0ms" in page


def test_a_bundle_without_rows_has_a_page(tmp_path: Path) -> None:
    page = page_of(write_bundle(tmp_path / "b", Rows(), document()))
    assert "There is nothing to compare with" in page
