"""Causes, culprits, quotas and sleep calls of captures whose answer is known to the nanosecond."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_capture import (
    CAUSES,
    FAST,
    FAST_PARTS,
    MANIFEST,
    SLOW,
    SLOW_OTHER,
    SLOW_PARTS,
    START_NS,
    exact_tables,
    make_waits,
    story,
    write_capture,
)

from latrace.analysis import histogram
from latrace.analysis.capture import open_capture
from latrace.analysis.culprits import Stay, Who, by_process, scan_slices
from latrace.analysis.rows import Marks
from latrace.analysis.selection import Selection
from latrace.analysis.sleep_calls import NOT_TOLD, LateCalls
from latrace.analysis.summary import summarise

LIMITED = {
    "cgroup": "/app",
    "quota_us": 10_000,
    "period_us": 100_000,
    "nr_periods": 100,
    "nr_throttled": 20,
    "throttled_ns": 4_100_000,
}
TAIL = {**{cause: SLOW * ns for cause, ns in SLOW_PARTS.items()}, "other": sum(SLOW_OTHER)}
ALL = {cause: TAIL[cause] + FAST * FAST_PARTS.get(cause, 0) for cause in CAUSES}


def summary_of(path: Path, tables: dict[str, Any], **options: Any) -> dict[str, Any]:
    selection = options.pop("selection", Selection())
    return summarise(open_capture(write_capture(path, tables, **options)), selection=selection)


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    manifest = {**MANIFEST, "cgroups_limited": [LIMITED], "steal_ns": 12_000_000}
    manifest["sleeps"] = {"zero_timeout": 3, "never_blocked": 4, "lost": 5}
    return summary_of(tmp_path_factory.mktemp("story") / "c", story(), manifest=manifest)


# --- causes ------------------------------------------------------------------------------------


def test_every_nanosecond_has_one_cause(summary: dict[str, Any]) -> None:
    waits = summary["waits"]
    assert waits["by_cause_ns"] == ALL
    assert sum(waits["by_cause_ns"].values()) == waits["total_ns"]
    tail = waits["tail"]
    assert tail["by_cause_ns"] == TAIL
    assert sum(tail["by_cause_ns"].values()) == tail["total_ns"]
    assert (tail["count"], tail["rows"]) == (SLOW, SLOW)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_totals_by_cause_are_the_counters_not_the_rows(tmp_path: Path) -> None:
    tables = story()
    for name in ("waits", "slices"):
        tables[name] = {column: values[:50] for column, values in tables[name].items()}
    summary = summary_of(tmp_path / "c", tables)
    assert summary["waits"]["by_cause_ns"] == ALL
    assert summary["waits"]["tail"]["count"] == SLOW
    assert summary["waits"]["tail"]["rows"] == 0
    assert set(summary["waits"]["tail"]["by_cause_ns"].values()) == {0}


def test_what_a_capture_does_not_explain_is_unknown(tmp_path: Path) -> None:
    waits = make_waits(1000)
    summary = summary_of(tmp_path / "c", {"waits": waits, **exact_tables(waits)})["waits"]
    assert summary["by_cause_ns"] == {**dict.fromkeys(CAUSES, 0), "unknown": summary["total_ns"]}
    tail = summary["tail"]
    assert tail["by_cause_ns"] == {**dict.fromkeys(CAUSES, 0), "unknown": tail["total_ns"]}
    assert tail["total_ns"] > 0


def test_a_killed_capture_has_its_causes_from_rows(tmp_path: Path) -> None:
    tables = story()
    for name in ("hist", "totals", "threads"):
        del tables[name]
    summary = summary_of(tmp_path / "c", tables, complete=False)
    assert summary["quality"]["totals_from_rows"] is True
    assert summary["waits"]["by_cause_ns"] == ALL
    assert summary["waits"]["tail"]["by_cause_ns"] == TAIL


def test_threads_of_the_slow_waits(summary: dict[str, Any]) -> None:
    first, second = summary["waits"]["tail"]["threads"]
    assert (first["tid"], first["waits"], second["tid"], second["waits"]) == (813, 10, 812, 10)
    assert first["by_cause_ns"]["other"] == sum(SLOW_OTHER[1::2])
    assert second["by_cause_ns"]["other"] == sum(SLOW_OTHER[0::2])
    for thread in (first, second):
        assert sum(thread["by_cause_ns"].values()) == thread["wait_ns"]
        assert thread["by_cause_ns"]["own"] == 10 * 500_000


def test_all_alike_or_few_waits_have_a_tail_all_the_same(tmp_path: Path) -> None:
    for number, wait in enumerate(([4_000_000] * 300, [10, 20, 30])):
        waits = {
            "wait_ns": np.array(wait, np.uint64),
            "other_ns": np.array(wait, np.uint64),
            "tid": [7] * len(wait),
        }
        tail = summary_of(tmp_path / str(number), {"waits": waits})["waits"]["tail"]
        slow = [one for one in wait if one == max(wait)]
        assert (tail["count"], tail["rows"]) == (len(slow), len(slow))
        assert tail["total_ns"] == tail["by_cause_ns"]["other"] == sum(slow)


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=400), st.sampled_from([0.5, 0.99]))
def test_the_tail_is_never_empty_and_begins_at_a_bound(values: list[int], part: float) -> None:
    counts = histogram.empty()
    np.add.at(counts, histogram.slot_of(values), np.uint64(1))
    over = histogram.tail_over(counts, part)
    above = sum(value > over for value in values)
    assert histogram.count_over(counts, over) == above
    assert above or max(values) == 0
    at_quantile = histogram.quantile(counts, part, max_ns=max(values))
    assert over <= at_quantile
    if any(value > at_quantile for value in values):
        assert over == at_quantile


# --- culprits ----------------------------------------------------------------------------------


def test_culprits_sum_to_their_causes(summary: dict[str, Any]) -> None:
    waits = summary["waits"]
    sums = dict.fromkeys(CAUSES, 0)
    for one in waits["culprits"]:
        sums[one["cause"]] += one["ns"]
    for cause in ("irq", "softirq", "kthread", "own", "other"):
        assert sums[cause] == TAIL[cause]
    assert set(waits["tail"]["not_itemised_ns"].values()) == {0}
    assert all(one["share"] == one["ns"] / waits["tail"]["total_ns"] for one in waits["culprits"])


def test_culprits_by_thread(summary: dict[str, Any]) -> None:
    first, second, own, *_ = summary["waits"]["culprits"]
    third = [other // 3 for other in SLOW_OTHER]
    assert (first["tid"], first["tgid"], first["comm"]) == (998, 998, "batch-indexer")
    assert first["ns"] == sum(SLOW_OTHER) - sum(third)
    assert (first["policy"], first["prio"], first["cgroup"]) == ("batch", 120, "/batch")
    assert first["stack"] == ["__schedule", "schedule", "compress_block", "run", "main"]
    assert first["kernel_frames"] == 2
    assert first["mostly"] == {"function": "compress_block", "share": 1.0}
    assert (second["tid"], second["comm"], second["ns"]) == (999, "indexer-2", sum(third))
    assert (second["policy"], second["prio"]) == ("fifo", 49)
    assert (own["tid"], own["cause"], own["own"]) == (815, "own", True)
    assert own["mostly"] is None and own["stack"] == []


def test_the_name_of_a_process_that_became_another_program() -> None:
    """A shell has the CPU for a moment before it is the program that it was asked for."""
    culprits = {
        Who("other", 998, 998, "bash", ""): Stay(1_000),
        Who("other", 998, 998, "batch-indexer", ""): Stay(5_000_000),
        Who("other", 999, 998, "worker", ""): Stay(9_000_000),
    }
    ((who, (stay, threads)),) = by_process(culprits, {}).items()
    assert (who.comm, stay.ns, threads) == ("batch-indexer", 14_001_000, 2)


def test_culprits_by_process(summary: dict[str, Any]) -> None:
    processes = summary["waits"]["culprit_processes"]
    first = processes[0]
    assert (first["tgid"], first["comm"], first["threads"]) == (998, "batch-indexer", 2)
    assert first["ns"] == first["all_ns"] == sum(SLOW_OTHER)
    assert [(how["policy"], how["prio"]) for how in first["scheduled"]] == [
        ("batch", 120),
        ("fifo", 49),
    ]
    assert first["mostly"] == {"function": "compress_block", "share": 0.9}
    own = next(one for one in processes if one["cause"] == "own")
    assert own["comm"] == "redis-server"  # the process, though its first thread did not run
    (kthread,) = (one for one in processes if one["cause"] == "kthread")
    assert kthread["mostly"]["function"] == "flush_work"  # not where every thread is switched
    interrupts = {(one["cause"], one["vector"]): one["ns"] for one in processes if one["tid"] < 0}
    assert interrupts == {
        ("softirq", "NET_RX"): SLOW * 150_000,
        ("softirq", "TIMER"): SLOW * 50_000,
        ("irq", ""): SLOW * 30_000,
    }


def test_a_slice_of_another_thread_at_the_same_instant_is_not_taken(
    summary: dict[str, Any],
) -> None:
    waits = summary["waits"]
    assert 666 not in {one["tid"] for one in waits["culprits"]}
    assert 666 in {one["tid"] for one in waits["culprits_all"]}


def test_what_no_slice_names_is_told(tmp_path: Path) -> None:
    tables = story()
    keep = [index for index, tid in enumerate(tables["slices"]["tid"]) if tid != 999]
    tables["slices"] = {
        name: np.asarray(values, object)[keep].tolist()
        if not isinstance(values, np.ndarray)
        else values[keep]
        for name, values in tables["slices"].items()
    }
    tail = summary_of(tmp_path / "c", tables)["waits"]["tail"]
    assert tail["not_itemised_ns"]["other"] == sum(other // 3 for other in SLOW_OTHER)
    assert tail["by_cause_ns"] == TAIL


KEYS = st.tuples(st.integers(0, 2**64 - 1), st.integers(-(2**31), 2**31 - 1))
NEAR = st.tuples(st.sampled_from([0, 5, 6, 2**63, 2**64 - 1]), st.integers(-2, 2))


@given(waits=st.lists(st.one_of(KEYS, NEAR), unique=True), others=st.lists(NEAR))
def test_slices_find_their_wait_and_no_other(
    tmp_path_factory: pytest.TempPathFactory,
    waits: list[tuple[int, int]],
    others: list[tuple[int, int]],
) -> None:
    keys = [*waits, *others]
    columns = {
        "dur_ns": np.ones(len(keys), np.uint64),
        "tid": list(range(len(keys))),
        "cause": ["other"] * len(keys),
        "victim_run_ns": np.array([run for run, _ in keys], np.uint64),
        "victim_tid": np.array([tid for _, tid in keys], np.int32),
    }
    path = tmp_path_factory.mktemp("join") / "c"
    capture = open_capture(write_capture(path, {"slices": columns} if keys else {}))
    marks = Marks(
        np.array([run for run, _ in waits], np.uint64),
        np.array([tid for _, tid in waits], np.int32),
        np.array([index % 2 == 0 for index in range(len(waits))], np.bool_),
        np.full(len(waits), -1, np.intp),
    )
    found = scan_slices(capture, marks, every=False)
    known = set(waits)
    slow = set(waits[::2])
    assert {who.tid for who in found.all} == {n for n, key in enumerate(keys) if key in known}
    assert {who.tid for who in found.tail} == {n for n, key in enumerate(keys) if key in slow}


# --- beside the causes -------------------------------------------------------------------------


def test_wakers_that_had_waited_themselves(summary: dict[str, Any]) -> None:
    tail = summary["waits"]["tail"]
    assert tail["wakers"] == [
        {
            "tid": 70,
            "tgid": 70,
            "comm": "feeder",
            "waits": SLOW,
            "wait_ns": tail["total_ns"],
            "had_waited": SLOW,
            "waited_ns": SLOW * 1_000_000,
            "woken_by": 71,
        }
    ]
    assert tail["migrations"] == SLOW
    assert tail["wakeup_ns"] == SLOW * 500
    assert tail["idle_elsewhere_ns"] == tail["total_ns"] // 2


def test_quotas_have_their_group_and_its_own_count(summary: dict[str, Any]) -> None:
    assert summary["throttling"] == [
        {**LIMITED, "waits": SLOW, "wait_ns": TAIL["throttled"], "tail_ns": TAIL["throttled"]}
    ]


def test_limits_that_make_no_sense_are_left_out(tmp_path: Path) -> None:
    group = "/system.slice/redis.service"
    nonsense = [None, 7, {"cgroup": 3}, {"cgroup": group, "quota_us": "x", "period_us": True}]
    manifest = {**MANIFEST, "cgroups_limited": nonsense}
    groups = summary_of(tmp_path / "c", story(), manifest=manifest)["throttling"]
    assert [one["cgroup"] for one in groups] == ["/app", group]
    assert groups[1] == {"cgroup": group, "waits": 0, "wait_ns": 0, "tail_ns": 0}


def test_quotas_of_others_are_left_out(tmp_path: Path) -> None:
    names = ["/", "/system.slice", "/system.slice/redis", "/batch", "/app"]
    manifest = {**MANIFEST, "cgroups_limited": [{"cgroup": name} for name in names]}
    groups = summary_of(tmp_path / "c", story(), manifest=manifest)["throttling"]
    assert [one["cgroup"] for one in groups] == ["/app", "/", "/system.slice"]


def test_steal_and_the_sleeps_that_made_no_row(summary: dict[str, Any]) -> None:
    assert summary["capture"]["steal_ns"] == 12_000_000
    assert summary["quality"]["sleeps"] == {"zero_timeout": 3, "never_blocked": 4, "lost": 5}


# --- sleep calls -------------------------------------------------------------------------------


def test_sleep_calls_are_taken_apart(summary: dict[str, Any]) -> None:
    (call,) = summary["sleeps"]
    slow = [sum(SLOW_PARTS.values()) + other for other in SLOW_OTHER]
    assert (call["call"], call["count"], call["overshot"], call["early"]) == (
        "epoll_wait",
        125,
        120,
        5,
    )
    assert call["exact"] is True
    assert call["requested_p50_ns"] == 10_000_000
    assert call["deadline_from"] == {"timeout": 120, "timerfd": 5}
    assert 60_000 <= call["overshoot_ns"]["p50"] <= 61_000
    assert call["overshoot_ns"]["max"] == max(slow) + 60_000
    assert call["parts_ns"] == {
        "entry": 120 * 1_000,
        "timer": 120 * 50_000,
        "run_queue": sum(slow),
        "return": 120 * 9_000,
    }
    tail = call["tail"]
    late = [one for one in slow if one + 60_000 > tail["over_ns"]]
    assert (tail["count"], tail["rows"]) == (len(late), len(late))
    assert tail["total_ns"] == sum(late) + 60_000 * len(late) == sum(tail["parts_ns"].values())
    assert tail["wait_ns"] == sum(late) == sum(tail["by_cause_ns"].values())
    assert tail["culprits"][0]["comm"] == "batch-indexer"
    assert (
        tail["culprits"][0]["ns"] == sum(SLOW_OTHER[-len(late) :]) == tail["by_cause_ns"]["other"]
    )


def test_overshoot_percentiles_are_the_kernels_when_rows_are_lost(tmp_path: Path) -> None:
    tables = story()
    full = summary_of(tmp_path / "a", copy.deepcopy(tables))["sleeps"][0]
    for name in tables["sleeps"]:
        tables["sleeps"][name] = tables["sleeps"][name][:10]
    few = summary_of(tmp_path / "b", tables)["sleeps"][0]
    assert few["exact"] is True and few["rows"] == 10
    assert few["count"] == few["overshot"] == 120
    for name in ("p50", "p90", "p99"):
        assert few["overshoot_ns"][name] == full["overshoot_ns"][name]
    true = full["overshoot_ns"]["max"]
    assert true <= few["overshoot_ns"]["max"] <= true + true // 64
    assert few["tail"]["count"] == full["tail"]["count"]
    assert few["tail"]["rows"] == 0


def test_sleep_calls_without_counters_or_rows(tmp_path: Path) -> None:
    tables = story()
    for name in ("hist", "totals", "threads"):
        del tables[name]
    (call,) = summary_of(tmp_path / "a", tables)["sleeps"]
    assert call["exact"] is False and call["overshot"] == 120
    forever = {"call": ["poll"], "requested_ns": np.array([-1]), "overshoot_ns": [None]}
    (call,) = summary_of(tmp_path / "b", {"sleeps": forever})["sleeps"]
    assert (call["count"], call["overshot"], call["requested_p50_ns"]) == (1, 0, -1)
    assert call["overshoot_ns"] == {"p50": 0, "p90": 0, "p99": 0, "max": 0}


def test_a_sleep_call_has_the_stack_of_its_first_wait_with_one(tmp_path: Path) -> None:
    tables = story()
    tables["waits"]["sleep"] = [None] * (FAST + SLOW)
    tables["waits"]["stack"] = np.arange(FAST + SLOW) % 3 - 1
    write_capture(tmp_path / "a", tables)
    capture = open_capture(tmp_path / "a")
    first: dict[int, int] = {}
    for wait in capture.waits.to_pylist():
        if wait["sleep"] >= 0 and wait["stack"] >= 0:
            first.setdefault(wait["sleep"], wait["stack"])
    assert first
    assert capture.sleeps["stack"].to_pylist() == [
        first.get(row, -1) for row in range(capture.sleeps.num_rows)
    ]


def test_waits_find_their_sleep_call_by_thread_and_time(tmp_path: Path) -> None:
    tables = story()
    told = summary_of(tmp_path / "told", copy.deepcopy(tables), selection=Selection())
    assert told["sleeps"][0]["tail"]["wait_ns"] > 0
    tables["waits"]["sleep"] = [None] * (FAST + SLOW)
    found = summary_of(tmp_path / "found", copy.deepcopy(tables))
    assert found["sleeps"] == told["sleeps"]
    tables["waits"]["sleep"] = np.full(FAST + SLOW, -1, np.int64)
    none = summary_of(tmp_path / "none", tables)
    assert none["sleeps"][0]["tail"]["wait_ns"] == 0


@given(
    calls=st.lists(st.tuples(st.integers(1, 3), st.integers(0, 40), st.integers(1, 9)), max_size=8),
    waits=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 60)), max_size=30),
)
def test_late_calls_are_found_as_a_search_would(
    calls: list[tuple[int, int, int]], waits: list[tuple[int, int]]
) -> None:
    # One after the other for each thread, as calls are.
    ends = dict.fromkeys((1, 2, 3), 0)
    spans = []
    for tid, gap, length in calls:
        begin = ends[tid] + gap
        ends[tid] = begin + length
        spans.append((tid, begin, ends[tid]))
    table = {
        "tid": np.array([tid for tid, _, _ in spans], np.int32),
        "from_ns": np.array([begin for _, begin, _ in spans], np.uint64),
        "exit_ns": np.array([end for _, _, end in spans], np.uint64),
    }
    late = LateCalls(np.arange(len(spans), dtype=np.intp), table)
    found = late.find(
        np.full(len(waits), NOT_TOLD, np.int64),
        np.array([tid for tid, _ in waits], np.int32),
        np.array([run for _, run in waits], np.uint64),
    )
    expected = [
        next((n for n, (t, begin, end) in enumerate(spans) if t == tid and begin < run <= end), -1)
        for tid, run in waits
    ]
    assert found.tolist() == expected


def test_totals_of_calls_are_the_kernels(tmp_path: Path) -> None:
    parts = {"entry_ns": 1, "timer_ns": 2, "run_queue_ns": 3, "return_ns": 4}
    counted = {"count": 900, "early": 80, "overshoot_ns": 10, **parts}
    manifest = {**MANIFEST, "sleeps": {"calls": {"epoll_wait": counted, "futex": "nonsense"}}}
    (call,) = summary_of(tmp_path / "a", story(), manifest=manifest)["sleeps"]
    assert (call["count"], call["early"], call["rows"]) == (900, 80, 125)
    assert call["parts_ns"] == {"entry": 1, "timer": 2, "run_queue": 3, "return": 4}
    selection = Selection(over_ns=0)
    (call,) = summary_of(tmp_path / "b", story(), manifest=manifest, selection=selection)["sleeps"]
    assert (call["count"], call["early"]) == (120, 0)


def test_a_sleep_that_is_not_there_is_no_error(tmp_path: Path) -> None:
    tables = story()
    tables["waits"]["sleep"] = np.full(FAST + SLOW, 10**12, np.int64)
    (call,) = summary_of(tmp_path / "c", tables)["sleeps"]
    assert call["tail"]["wait_ns"] == 0


# --- parts of a capture ------------------------------------------------------------------------


def test_a_stretch_of_time(tmp_path: Path) -> None:
    tables = story()
    run, wait = tables["waits"]["run_ns"], tables["waits"]["wait_ns"]
    chosen = (run >= START_NS + 2_000_000_000) & (run < START_NS + 3_000_000_000)
    selection = Selection(since_ns=2_000_000_000, until_ns=3_000_000_000)
    summary = summary_of(tmp_path / "c", tables, selection=selection)
    assert summary["selection"] == {
        "since_ns": 2_000_000_000,
        "until_ns": 3_000_000_000,
        "tids": [],
        "over_ns": None,
        "rows": 200,
    }
    waits = summary["waits"]
    assert chosen.sum() == waits["count"] == 200
    assert waits["total_ns"] == int(wait[chosen].sum()) == sum(waits["by_cause_ns"].values())
    assert waits["tail"]["count"] == 2
    got = waits["culprit_processes"][0]
    assert got["ns"] == got["all_ns"]
    # They end at 2.0 s, which is in it, 2.5 s, and 3.0 s, which is not.
    assert got["ns"] == SLOW_OTHER[3] + SLOW_OTHER[4]
    assert summary["quality"]["totals_from_rows"] is True
    assert summary["quality"]["waits"] == summary["quality"]["rows"] == FAST + SLOW


def test_one_thread_and_only_what_took_long(tmp_path: Path) -> None:
    selection = Selection(tids=(813,), over_ns=5_000_000)
    summary = summary_of(tmp_path / "c", story(), selection=selection)
    fixed = sum(SLOW_PARTS.values())
    chosen = [other for other in SLOW_OTHER[1::2] if fixed + other > 5_000_000]
    waits = summary["waits"]
    assert waits["count"] == waits["tail"]["count"] == waits["tail"]["rows"] == len(chosen) > 0
    assert waits["tail"]["over_ns"] == 5_000_000
    assert waits["by_cause_ns"] == waits["tail"]["by_cause_ns"]
    assert waits["by_cause_ns"]["other"] == sum(chosen)
    assert waits["culprit_processes"][0]["ns"] == sum(chosen)
    assert [thread["tid"] for thread in summary["threads"]] == [813]
    assert summary["threads"][0]["comm"] == "bio_close_file"
    (call,) = summary["sleeps"]
    late = [other for other in SLOW_OTHER[1::2] if fixed + 60_000 + other > 5_000_000]
    assert call["count"] == call["overshot"] == len(late)


def test_sleep_calls_of_a_part_are_those_that_ended_in_it(tmp_path: Path) -> None:
    selection = Selection(over_ns=5_000_000)
    (call,) = summary_of(tmp_path / "c", story(), selection=selection)["sleeps"]
    fixed = sum(SLOW_PARTS.values()) + 60_000
    late = [fixed + other for other in SLOW_OTHER if fixed + other > 5_000_000]
    assert call["count"] == call["overshot"] == call["tail"]["count"] == len(late)
    assert call["exact"] is False
    assert call["overshoot_ns"]["max"] == max(late)


def test_an_empty_part(tmp_path: Path) -> None:
    selection = Selection(since_ns=10**15)
    summary = summary_of(tmp_path / "c", story(), selection=selection)
    assert summary["waits"]["count"] == 0
    assert summary["waits"]["culprits"] == []
    assert summary["quality"]["rows"] == FAST + SLOW
    json.dumps(summary, allow_nan=False)
