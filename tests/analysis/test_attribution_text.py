"""What the attribution says: the sentence, the table whose shares add up, and hostile names."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_capture import CAUSES, MANIFEST, story, write_capture

from latrace.analysis import words
from latrace.analysis.attribution_text import answer
from latrace.analysis.capture import open_capture
from latrace.analysis.selection import Selection
from latrace.analysis.summary import summarise
from latrace.analysis.text import render_text

MS = 1_000_000
HOSTILE = "\x1b[2J\x07\u202eevil\u0301\u0301\r\n漢字" * 9


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    limited = {
        "cgroup": "/app",
        "quota_us": 10_000,
        "period_us": 100_000,
        "nr_periods": 100,
        "nr_throttled": 20,
        "throttled_ns": 4_100_000,
    }
    manifest = {**MANIFEST, "cgroups_limited": [limited], "steal_ns": 12_000_000}
    return write_capture(tmp_path_factory.mktemp("story") / "c", story(), manifest=manifest)


@pytest.fixture(scope="module")
def summary(path: Path) -> dict[str, Any]:
    return summarise(open_capture(path))


def culprit(cause: str, ns: int, **more: Any) -> dict[str, Any]:
    return {
        "cause": cause,
        "tid": 998,
        "tgid": 990,
        "comm": "batch",
        "vector": "",
        "ns": ns,
        "all_ns": ns,
        "scheduled": [],
        "cgroup": "",
        "stack": [],
        "kernel_frames": 0,
        "work": [],
        "left": "",
        "mostly": None,
        "threads": 1,
        **more,
    }


def told(causes: dict[str, int], *entries: dict[str, Any], **more: Any) -> str:
    """The sentence for slow waits made of these causes (ns)."""
    total = sum(causes.values())
    named = {cause: sum(one["ns"] for one in entries if one["cause"] == cause) for cause in CAUSES}
    tail = {
        "over_ns": 3 * MS,
        "count": 10,
        "rows": 10,
        "total_ns": total,
        "by_cause_ns": dict.fromkeys(CAUSES, 0) | causes,
        "not_itemised_ns": {
            cause: causes.get(cause, 0) - named[cause]
            for cause in ("irq", "softirq", "kthread", "own", "other")
        },
    }
    waits = {
        "count": 1000,
        "tail": tail | more.pop("tail", {}),
        "culprits": entries,
        "culprit_processes": entries,
    }
    capture = {"without": []}
    return answer({"waits": waits, "selection": None, "throttling": [], "capture": capture, **more})


# --- the sentence ------------------------------------------------------------------------------


def test_the_sentence_names_cause_culprit_and_function(summary: dict[str, Any]) -> None:
    text = render_text(summary, width=300).splitlines()
    assert text[0].startswith("redis-server (pid 812): 2,000 waits in 10.0 s; P99 ")
    assert text[1] == (
        "The slowest 1 % of waits (over 20.2 us) took 99.0 ms: for 80 % of it batch-indexer "
        "(pid 998, SCHED_FIFO priority 50 for 33 % of it) had the CPU, mostly in compress_block; "
        "for 10 % threads of its own process had the CPU, most of all bio_lazy_free (tid 815)."
    )


@pytest.mark.parametrize(
    ("causes", "entries", "said"),
    [
        (
            {"other": 100 * MS},
            [culprit("other", 100 * MS, scheduled=[{"policy": "fifo", "prio": 9, "ns": 100 * MS}])],
            "for all of it batch (pid 990, SCHED_FIFO priority 90) had the CPU.",
        ),
        (
            {"other": 100 * MS},
            [
                culprit(
                    "other",
                    100 * MS,
                    scheduled=[{"policy": "deadline", "prio": -1, "ns": 100 * MS}],
                )
            ],
            "for all of it batch (pid 990, SCHED_DEADLINE) had the CPU.",
        ),
        (
            {"other": 100 * MS},
            [
                culprit(
                    "other", 100 * MS, scheduled=[{"policy": "other", "prio": 110, "ns": 100 * MS}]
                )
            ],
            "for all of it batch (pid 990, nice -10) had the CPU.",
        ),
        (
            {"other": 97 * MS, "unknown": 3 * MS},
            [],
            "for 97 % of it other processes had the CPU, which ones was not recorded.",
        ),
        (
            {"other": 100 * MS},
            [culprit("other", 9 * MS), *[culprit("other", 8 * MS)] * 11],
            "for 97 % of it other processes had the CPU, foremost batch (pid 990) with 9 % of"
            " that.",
        ),
        (
            {"other": 100 * MS},
            [culprit("other", 4 * MS)],
            "for all of it other processes had the CPU; which ones is known of 4 % of that,"
            " foremost batch (pid 990) with 4 %.",
        ),
        (
            {"other": 100 * MS},
            [culprit("other", 80 * MS)],
            "for 80 % of it batch (pid 990) had the CPU; for 20 % other processes had the CPU,"
            " which ones was not recorded.",
        ),
        (
            {"throttled": 95 * MS, "idle": 5 * MS},
            [],
            "for 95 % of it its CPU quota was used up.",
        ),
        ({"idle": 100}, [], "for all of it its CPU was idle and had yet to be woken."),
        ({"unknown": 7}, [], "for all of it the cause is unknown."),
        (
            {"softirq": 60 * MS, "irq": 40 * MS},
            [culprit("softirq", 60 * MS, tid=-1, vector="NET_RX")],
            "for 60 % of it its CPU was busy with soft interrupts (NET_RX); for 40 % its CPU was"
            " busy with hardware interrupts.",
        ),
        (
            {"kthread": 100 * MS},
            [culprit("kthread", 100 * MS, comm="kworker/3:1H")],
            "for all of it the kernel's own threads had the CPU, most of all kworker/3:1H (tid"
            " 998).",
        ),
    ],
)
def test_each_cause_in_words(
    causes: dict[str, int], entries: list[dict[str, Any]], said: str
) -> None:
    assert told(causes, *entries).endswith(f": {said}")


def test_a_quota_is_named_with_its_size() -> None:
    group = {"cgroup": "/app", "tail_ns": 9, "wait_ns": 9, "quota_us": 10_000, "period_us": 100_000}
    said = told({"throttled": 9, "unknown": 1}, throttling=[group])
    assert "for 90 % of it the CPU quota of /app was used up (10.0 ms in each 100 ms)" in said
    assert said.endswith("; for 10 % the cause is unknown.")


def test_the_subject_of_the_sentence() -> None:
    assert told({"idle": 5}).startswith("The slowest 1 % of waits (over 3.00 ms) took 5 ns: ")
    assert told({"idle": 5}, tail={"count": 1, "rows": 1}).startswith("The slowest wait took 5 ns")
    assert told({"idle": 5}, tail={"count": 1000}).startswith("All 1,000 waits took at least 5 ns")
    assert told({"idle": 5}, selection={"over_ns": 3 * MS}).startswith("The 10 waits over 3.00 ms ")
    assert told({}, tail={"rows": 0}) == (
        "Nothing was recorded of the slowest 1 % of waits (over 3.00 ms)."
    )


# --- the table ---------------------------------------------------------------------------------


def percents(lines: list[str], indent: str) -> tuple[list[float], list[float]]:
    """The shares in both columns of the lines that are indented so."""
    rows = [
        re.findall(r"([0-9.]+) %", line)
        for line in lines
        if line.startswith(indent) and not line.startswith(indent + " ")
    ]
    first, second = zip(*(row for row in rows if len(row) == 2), strict=True)
    return [float(one) for one in first], [float(one) for one in second]


def table(text: str) -> list[str]:
    lines = text.splitlines()
    begin = next(n for n, line in enumerate(lines) if line.startswith("Where the time went"))
    end = next(n for n, line in enumerate(lines) if n > begin and line.startswith("  in all"))
    return lines[begin : end + 1]


def test_shares_add_up_to_the_last_digit(summary: dict[str, Any]) -> None:
    lines = table(render_text(summary))
    first, second = percents(lines, "  ")
    assert first[-1] == second[-1] == 100.0
    assert sum(first[:-1]) == pytest.approx(100.0, abs=1e-9)
    assert sum(second[:-1]) == pytest.approx(100.0, abs=1e-9)
    softirq = next(n for n, line in enumerate(lines) if line.startswith("  soft interrupts"))
    assert sum(percents(lines[softirq + 1 : softirq + 3], "    ")[0]) == pytest.approx(
        percents(lines[softirq : softirq + 1], "  ")[0][0]
    )


def test_the_table_names_who_how_and_where(summary: dict[str, Any]) -> None:
    text = "\n".join(table(render_text(summary)))
    for piece in (
        "slowest 1 %",
        "another process had the CPU               79.0 ms   79.8 %    79.0 ms   57.0 %",
        "    batch-indexer (pid 998), 2 threads ",
        "      SCHED_FIFO priority 50 for 33 % of it, cgroup /batch",
        "      in compress_block < run < main",
        "    bio_lazy_free (tid 815)",
        "    NET_RX ",
        "    kworker/3:1H (tid 77)",
        "      in flush_work",
        "    /app ",
        "  unknown ",
    ):
        assert piece in text


def test_the_rest_of_the_attribution(summary: dict[str, Any]) -> None:
    text = " ".join(render_text(summary, width=300).split())
    for piece in (
        "For 49.5 ms of it, 50 %, another CPU was idle that the thread may run on.",
        "feeder (tid 70), which woke 20 of them, had itself waited 20.0 ms for a CPU, woken by"
        " thread 71.",
        "/app: may run 10.0 ms in each 100 ms; used up in 20 of 100 periods; stopped for 4.10 ms"
        " by its own count; 4.00 ms of the waits recorded (20 waits)",
        "epoll_wait overshot by 5.90 ms at P99. Of 1 call over 5.90 ms: entry <0.1 %, timer 0.8 %,"
        " run queue 99.0 %, return 0.2 %.",
        "Its run queue part: 83.0 % batch-indexer (pid 998), 8.5 % own threads",
        "unknown the cause of 2.18 ms, 1.6 % of all waiting",
        "steal 12.0 ms of all CPUs' time was kept by the hypervisor for others",
    ):
        assert piece in text


def test_a_call_that_is_hardly_late_is_not_taken_apart(summary: dict[str, Any]) -> None:
    (late, *_) = [call for call in summary["sleeps"] if call["overshot"]]
    p99_ns = late["overshoot_ns"]["p99"]
    for ns, told in ((p99_ns // 5, True), (p99_ns // 20, False)):
        less = {**late, "call": "pselect6", "overshoot_ns": {**late["overshoot_ns"], "p99": ns}}
        text = render_text({**summary, "sleeps": [late, less]})
        assert f"  {late['call']} overshot by " in text
        assert re.search(r"^  pselect6 +\d", text, re.MULTILINE)
        assert ("  pselect6 overshot by " in text) == told


def test_functions_of_which_nothing_is_known_are_not_listed(summary: dict[str, Any]) -> None:
    one = next(one for one in summary["waits"]["culprit_processes"] if one["cause"] == "other")
    for work, shown in (
        (["[unknown]", "[unknown]", "[unknown]", "main"], ""),
        (["[unknown]", "run", "main"], "in [unknown] < run < main"),
    ):
        told = {**one, "work": work, "left": ""}
        waits = {**summary["waits"], "culprit_processes": [told], "culprit_processes_all": [told]}
        lines = [line.strip() for line in render_text({**summary, "waits": waits}).splitlines()]
        assert [line for line in lines if line.startswith("in [unknown]")] == [shown] * bool(shown)


def test_a_count_of_threads_that_has_no_room_is_left_out(summary: dict[str, Any]) -> None:
    one = next(one for one in summary["waits"]["culprit_processes"] if one["cause"] == "other")
    for name, shown in (
        ("batch", "batch (pid 1234567), 15 threads"),
        ("n" * 15, "n" * 15 + " (pid 1234567)"),
    ):
        long = {**one, "comm": name, "tgid": 1_234_567, "threads": 15}
        waits = {**summary["waits"], "culprit_processes": [long], "culprit_processes_all": [long]}
        assert re.search(
            rf"^    {re.escape(shown)} ", render_text({**summary, "waits": waits}), re.M
        )


def test_unknown_is_shown_when_it_is_nothing(tmp_path: Path) -> None:
    tables = story()
    for name in ("waits", "totals", "threads"):
        known = tables[name]["unknown_ns"]
        tables[name]["other_ns"] = tables[name]["other_ns"] + known
        tables[name]["unknown_ns"] = [0] * len(known)
    tables["totals"]["other_ns"] = [sum(map(int, tables["waits"]["other_ns"]))]
    tables["totals"]["unknown_ns"] = [0]
    del tables["threads"]
    text = render_text(summarise(open_capture(write_capture(tmp_path / "c", tables))))
    assert re.search(r"\n  unknown +0 ns +0\.0 % +0 ns +0\.0 %\n", text)


def test_figures_of_a_part_are_not_called_exact(path: Path) -> None:
    selection = Selection(since_ns=2 * 10**9, tids=(812,), over_ns=4 * MS)
    summary = summarise(open_capture(path), selection=selection)
    text = render_text(summary, width=300)
    assert "every wait was counted" not in text
    assert "!!!" not in text
    assert (
        "Only waits and sleep calls of thread 812, longer than 4.00 ms, that ended between 2.00 s"
        " and 10.0 s of the capture's 10.0 s: 8 waits of 2,000 recorded. Every figure is a sum of"
        " recorded waits, not an exact counter." in text
    )
    assert text.splitlines()[1].startswith("The 8 waits over 4.00 ms took ")
    assert "these waits" in text


def test_a_part_of_few_rows_says_that_it_is_too_low(tmp_path: Path) -> None:
    tables = story()
    tables["waits"] = {name: column[:500] for name, column in tables["waits"].items()}
    path = write_capture(tmp_path / "c", tables)
    text = render_text(summarise(open_capture(path), selection=Selection(tids=(812,))), width=300)
    assert "too low where waits have no details: 25.0 % of all have." in text


def test_an_empty_part_is_told(path: Path) -> None:
    text = render_text(summarise(open_capture(path), selection=Selection(tids=(4,))), width=80)
    assert text.startswith("redis-server (pid 812): no wait to run in this part\n")


@pytest.mark.parametrize("width", [60, 80, 132])
def test_hostile_names_reach_no_terminal(tmp_path: Path, width: int) -> None:
    tables = story()
    for column in ("comm", "cgroup", "vector", "policy"):
        tables["slices"][column] = [HOSTILE] * len(tables["slices"]["tid"])
    tables["waits"]["throttled_by"] = [HOSTILE] * len(tables["waits"]["tid"])
    tables["waits"]["waker"] = [HOSTILE] * len(tables["waits"]["tid"])
    tables["sleeps"]["call"] = [HOSTILE] * len(tables["sleeps"]["tid"])
    tables["frames"]["symbol"] = [HOSTILE * 5] * len(tables["frames"]["id"])
    limited = {"cgroup": HOSTILE, "quota_us": 10**12, "period_us": 1, "nr_throttled": 10**18}
    manifest = copy.deepcopy(MANIFEST) | {"cgroups_limited": [limited], "steal_ns": 10**18}
    capture = open_capture(write_capture(tmp_path / "c", tables, manifest=manifest))
    for selection in (Selection(), Selection(over_ns=5 * MS), Selection(tids=tuple(range(900)))):
        text = render_text(summarise(capture, selection=selection), width=width)
        for line in text.splitlines():
            assert words.cells(line) <= width
            assert line == line.rstrip()
            assert line.isprintable()


# --- words -------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=9))
def test_tenths_add_up_and_are_near(parts: list[int]) -> None:
    whole = sum(parts)
    rounded = words.tenths(parts, whole)
    assert sum(rounded) == (1000 if whole else 0)
    for part, tenth in zip(parts, rounded, strict=True):
        assert not whole or abs(tenth - 1000 * part / whole) < 1


@given(st.lists(st.lists(st.integers(0, 10**9), min_size=1, max_size=5), min_size=1, max_size=5))
def test_parts_of_parts_add_up_too(groups: list[list[int]]) -> None:
    whole = sum(map(sum, groups))
    outer = words.tenths([sum(group) for group in groups], whole)
    for group, tenth in zip(groups, outer, strict=True):
        assert sum(words.tenths(group, whole, of=tenth)) == tenth


@pytest.mark.parametrize(
    ("part", "whole", "said"),
    [
        (0, 5, "0 %"),
        (5, 5, "100 %"),
        (970, 1000, "97 %"),
        (4, 1000, "0.4 %"),
        (999, 1000, ">99 %"),
        (1, 10**6, "<0.1 %"),
        (1, 0, "-"),
    ],
)
def test_percent_in_a_sentence(part: int, whole: int, said: str) -> None:
    assert words.percent(part, whole) == said


def test_shares_never_say_nothing_or_all_of_what_is_not() -> None:
    assert words.shares([10**6 - 1, 1], 10**6) == [">99.9 %", "<0.1 %"]
    assert words.shares([0, 7], 7) == ["0.0 %", "100.0 %"]
    assert words.shares([1, 1, 1], 3) == ["33.4 %", "33.3 %", "33.3 %"]
