from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_capture import (
    FRAMES,
    MANIFEST,
    STACKS,
    START_NS,
    exact_tables,
    make_waits,
    write_capture,
)

from latrace.analysis import words
from latrace.analysis.capture import open_capture
from latrace.analysis.summary import summarise
from latrace.analysis.text import render_text


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    waits = make_waits(5000)
    tables = {"waits": waits, "stacks": STACKS, "frames": FRAMES, **exact_tables(waits)}
    return summarise(open_capture(write_capture(tmp_path_factory.mktemp("text") / "c", tables)))


@pytest.fixture(scope="module")
def worst(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Everything went wrong, and every name is hostile."""
    waits = make_waits(500)
    hostile = "\x1b[2J\x07\u202eevil\u0301\u0301\r\n漢字" * 3
    manifest = copy.deepcopy(MANIFEST)
    manifest["targets"] = [{"tgid": 2**31 - 1, "comm": hostile}] * 3
    manifest["quality"].update(
        lost_events=10**12,
        lost_stacks=10**12,
        no_start=10**9,
        discarded=10**9,
        kernel_run_delay_ns=10**15,
        traced_run_delay_ns=10**14,
        books_blind={"count": 10**12, "ns": 10**15},
        degraded=[{"at_ns": START_NS + 10**9, "what": hostile, "why": hostile * 9}] * 20,
    )
    tables = {"waits": waits, **exact_tables(waits)}
    tables["waits"]["waker"] = [hostile] * 500
    tables["waits"]["syscall"] = [hostile] * 500
    tables["threads"]["comm"] = [hostile] * 5
    tables["threads"]["open"] = ["waiting"] * 5
    tables["threads"]["wait_ns"] = [2**63] * 5
    tables["stacks"] = STACKS
    tables["frames"] = {**FRAMES, "symbol": [hostile * 20] * 8}
    path = tmp_path_factory.mktemp("worst") / "c"
    return summarise(open_capture(write_capture(path, tables, manifest=manifest, complete=False)))


def test_the_answer_comes_first(summary: dict[str, Any]) -> None:
    first = render_text(summary).splitlines()[0]
    p99 = words.duration(summary["waits"]["p99_ns"])
    assert first == f"redis-server (pid 812): 5,000 waits in 10.0 s; P99 {p99} (wait to run)"


def test_what_it_is_made_of_is_there(summary: dict[str, Any]) -> None:
    text = render_text(summary)
    assert "!!!" not in text
    for piece in (
        "p99.9",
        "slowest 1 %",
        "after a wake-up",
        "Threads that waited most",
        "bio_close_file",
        "Woken by",
        "redis-benchmark",
        "a hardware interrupt",
        "Blocked in",
        "epoll_wait",
        "epoll_wait < aeApiPoll < aeProcessEvents",
        "every one has its details",
        "own cost",
        words.duration(summary["waits"]["max_ns"]),
        words.duration(summary["waits"]["total_ns"]),
    ):
        assert piece in text


@pytest.mark.parametrize("width", [60, 80, 132])
def test_no_line_is_too_wide_and_nothing_reaches_the_terminal(
    summary: dict[str, Any], worst: dict[str, Any], width: int
) -> None:
    for one in (summary, worst):
        text = render_text(one, width=width)
        assert text.endswith("\n")
        for line in text.splitlines():
            assert words.cells(line) <= width
            assert line == line.rstrip()
            assert line.isprintable()


def test_colour_only_when_asked_and_nothing_else_changes(worst: dict[str, Any]) -> None:
    plain, coloured = render_text(worst), render_text(worst, colour=True)
    assert "\x1b" not in plain
    for code in ("\x1b[1m", "\x1b[2m", "\x1b[1;31m", "\x1b[0m"):
        coloured = coloured.replace(code, "")
    assert coloured == plain


def test_bad_news_is_loud(worst: dict[str, Any]) -> None:
    text = render_text(worst, width=200)
    assert text.startswith("!!! This capture was not closed")
    loud = [line for line in text.splitlines() if line.startswith("!!! ")]
    assert any("1,000,000,000,000 waits were lost" in line for line in loud)
    assert any("stacks could not be kept" in line for line in loud)
    assert any("From 1.00 s on" in line for line in loud)
    assert any("and 12 more changes" in line for line in loud)
    assert any("(10.0 %): totals may be that much too low" in line for line in loud)


def test_more_than_the_books_have_is_loud_too(summary: dict[str, Any]) -> None:
    odd = copy.deepcopy(summary)
    odd["quality"].update(
        coverage=1.058, kernel_run_delay_ns=235_000_000, traced_run_delay_ns=249_000_000
    )
    text = render_text(odd, width=200)
    assert "!!! latrace counted 249 ms" in text
    assert "235 ms (105.8 %): totals may be that much too high" in text


def test_sums_of_rows_are_not_called_exact(tmp_path: Path) -> None:
    manifest = copy.deepcopy(MANIFEST)
    manifest["quality"]["lost_events"] = 5
    path = write_capture(
        tmp_path / "c", {"waits": make_waits(100)}, manifest=manifest, complete=False
    )
    text = render_text(summarise(open_capture(path)))
    assert "The exact counters were not written" in text
    assert "exact all the same" not in text
    assert "every wait was counted" not in text


def test_rows_that_are_fewer_than_waits_are_told(tmp_path: Path) -> None:
    waits = make_waits(1000)
    few = {
        name: column[:250] if isinstance(column, np.ndarray) else column.slice(0, 250)
        for name, column in waits.items()
    }
    path = write_capture(tmp_path / "c", {"waits": few, **exact_tables(waits)})
    text = render_text(summarise(open_capture(path)))
    assert "Woken by (25.0 % of waits recorded)" in text
    assert "250 waits" in text


def test_the_books_frighten_nobody_who_need_not_be(summary: dict[str, Any]) -> None:
    calm = copy.deepcopy(summary)
    calm["quality"].update(
        coverage=0.9991,
        kernel_run_delay_ns=10**9,
        traced_run_delay_ns=999_100_000,
        books_blind={"count": 1234, "ns": 5_000_000},
    )
    text = render_text(calm, width=300)
    assert "!!!" not in text
    assert "99.91 % of the 1.00 s in the kernel's own books" in text
    assert "1,234 waits (5.00 ms) that the kernel never times" in text
    assert "counted here" in text


def test_a_clock_that_stood_still_is_no_bad_news(summary: dict[str, Any]) -> None:
    """The same waits by the kernel's clock are the kernel's: nothing was missed."""
    odd = copy.deepcopy(summary)
    odd["quality"].update(
        coverage=0.94,
        kernel_run_delay_ns=10**9,
        traced_run_delay_ns=940_000_000,
        traced_by_kernel_clock_ns=1_000_200_000,
    )
    text = render_text(odd, width=300)
    assert "!!!" not in text
    assert "94.00 % of the 1.00 s in the kernel's own books, 100.02 % by the books' own" in text
    odd["quality"]["traced_by_kernel_clock_ns"] = 940_000_000
    assert "94.0 %): totals may be that much too low" in render_text(odd, width=300)


def test_no_waits_at_all(tmp_path: Path) -> None:
    text = render_text(summarise(open_capture(write_capture(tmp_path / "c", {}))))
    assert text.startswith("redis-server (pid 812): no wait to run in 10.0 s\n")
    assert "P99" not in text


def test_processes_of_one_thread_each_are_listed_once(summary: dict[str, Any]) -> None:
    """A service of many processes (PostgreSQL) is not told twice who waited."""
    threads = [
        {**summary["threads"][0], "tid": tid, "tgid": tid, "waits": tid, "wait_ns": tid * 1000}
        for tid in (107, 106, 105, 104, 103, 102)
    ]
    processes = [{**thread, "max_ns": 5, "blocked_ns": 0} for thread in threads]
    alone = {**summary, "threads": threads, "processes": processes}
    text = render_text(alone)
    assert "Processes that waited most" in text and "Threads that waited most" not in text
    assert "    107 " in text
    # One of them has a second thread.
    threads = [{**threads[0], "waits": 60}, {**threads[0], "tid": 110, "waits": 47}, *threads[1:]]
    text = render_text({**alone, "threads": threads})
    assert "Processes that waited most" in text and "Threads that waited most" in text
    only = {**summary, "threads": threads[-1:], "processes": processes[-1:]}
    assert "Processes that waited most" not in render_text(only)


def test_no_stack_is_more_than_the_whole(summary: dict[str, Any]) -> None:
    """By chance the samples of a stack may stand for more time than there was."""
    total = summary["waits"]["blocked"]["total_ns"]
    stacks = [{**summary["stacks"]["blocked"][0], "weight_ns": total * 104 // 100}]
    text = render_text({**summary, "stacks": {"wait": [], "blocked": stacks}})
    (line,) = text.partition("Where it blocked (sampled)\n")[2].splitlines()[:1]
    assert line.split()[:4] == [*words.duration(total).split(), "100.0", "%"]


def test_stacks_of_go_s_runtime_tell_whose_sleep_it_was(summary: dict[str, Any]) -> None:
    slept = ["runtime.futex.abi0", "runtime.futexsleep", "runtime.notesleep", "runtime.stopm"]
    stacks = [
        {**stack, "user": [*slept, "runtime.findRunnable"]}
        for stack in summary["stacks"]["blocked"][:1]
    ]
    text = render_text({**summary, "stacks": {"wait": [], "blocked": stacks}})
    assert "  runtime.futex.abi0 < runtime.stopm < runtime.findRunnable\n" in text


def test_several_targets_keep_their_number(summary: dict[str, Any]) -> None:
    several = copy.deepcopy(summary)
    several["capture"]["targets"] = [{"tgid": 812, "comm": "x" * 15}] * 12
    first = render_text(several, width=60).splitlines()[0]
    assert "and 11 more: 5,000 waits" in first
    assert "P99" in first


# --- words ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ns", "said"),
    [
        (0, "0 ns"),
        (870, "870 ns"),
        (999, "999 ns"),
        (1000, "1.00 us"),
        (9_994, "9.99 us"),
        (9_996, "10.0 us"),
        (12_345, "12.3 us"),
        (99_960, "100 us"),
        (999_499, "999 us"),
        (999_999, "1.00 ms"),
        (4_200_000, "4.20 ms"),
        (999_999_999, "1.00 s"),
        (119_900_000_000, "120 s"),
        (245_000_000_000, "4 min 05 s"),
        (3_600_000_000_000, "1 h 00 min"),
        (90_061_000_000_000, "25 h 01 min"),
    ],
)
def test_durations(ns: int, said: str) -> None:
    assert words.duration(ns) == said


@given(st.integers(0, 2**63), st.integers(0, 2**63))
def test_durations_are_short_and_in_order(one: int, other: int) -> None:
    def value(text: str) -> float:
        unit = {"ns": 1, "us": 1e3, "ms": 1e6, "s": 1e9, "min": 6e10, "h": 3.6e12}
        parts = text.split()
        return sum(float(n) * unit[u] for n, u in zip(parts[::2], parts[1::2], strict=True))

    low, high = sorted((one, other))
    assert value(words.duration(low)) <= value(words.duration(high))
    assert value(words.duration(low)) == pytest.approx(low, rel=0.017, abs=0.5)


@pytest.mark.parametrize(
    ("part", "whole", "said"),
    [
        (0, 10, "0.0 %"),
        (1, 3, "33.3 %"),
        (10, 10, "100.0 %"),
        (99_999, 100_000, ">99.9 %"),
        (1, 100_000, "<0.1 %"),
        (1, 0, "-"),
    ],
)
def test_shares(part: int, whole: int, said: str) -> None:
    assert words.share(part, whole) == said


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, "0 B"), (812, "812 B"), (1000, "1.00 kB"), (12_345_678, "12.3 MB"), (10**12, "1000 GB")],
)
def test_sizes(count: int, said: str) -> None:
    assert words.size(count) == said


@given(st.text(st.characters()), st.integers(2, 40))
def test_names_are_made_safe_and_cut(name: str, columns: int) -> None:
    shown = words.visible(name)
    assert shown.isprintable()
    assert words.cells(words.fit(shown, columns)) <= columns
    assert words.cells(words.pad(shown, columns)) == columns
    assert words.fit(shown, words.cells(shown)) == shown
    shown.encode("utf-8")


def test_names_that_are_harmless_stay() -> None:
    assert words.visible("redis-server 漢字 é") == "redis-server 漢字 é"
    assert words.visible("\x1b[31m\u202ex\ud800") == "\\x1b[31m\\u202ex\\ud800"
