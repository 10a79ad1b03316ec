from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
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

from latrace.analysis import histogram
from latrace.analysis.capture import open_capture
from latrace.analysis.summary import summarise

Tables = dict[str, dict[str, Any]]


def every(count: int, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """All waits, and the rows that a row threshold or loss left of them."""
    waits = make_waits(count)
    kept = np.arange(0, count, step)
    return waits, {
        name: column[kept] if isinstance(column, np.ndarray) else column.take(kept)
        for name, column in waits.items()
    }


def summary_of(path: Path, tables: Tables, **options: Any) -> dict[str, Any]:
    return summarise(open_capture(write_capture(path, tables, **options)))


def nearest_rank(values: np.ndarray[Any, Any], percent: int) -> int:
    return int(np.sort(values)[max(1, -(-len(values) * percent // 100)) - 1])


def test_the_contract_of_report_json(tmp_path: Path) -> None:
    waits = make_waits(2000)
    tables = {"waits": waits, "stacks": STACKS, "frames": FRAMES, **exact_tables(waits)}
    summary = summary_of(tmp_path / "c", tables)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["schema"] == 1
    assert {"targets", "duration_s", "kernel", "complete"} <= summary["capture"].keys()
    assert {
        "waits",
        "lost_events",
        "lost_stacks",
        "open_at_start",
        "open_at_end",
        "degraded",
        "rows",
        "stacks",
        "kernel_run_delay_ns",
        "traced_run_delay_ns",
        "coverage",
        "books_blind",
    } <= summary["quality"].keys()
    assert {
        "count",
        "total_ns",
        "p50_ns",
        "p90_ns",
        "p99_ns",
        "p999_ns",
        "max_ns",
        "by_cause_ns",
        "tail",
        "culprits",
    } <= summary["waits"].keys()
    assert {"over_ns", "count", "total_ns", "by_cause_ns"} <= summary["waits"]["tail"].keys()
    assert summary["sleeps"] == []
    assert summary["retransmits"].items() >= {"count": 0, "by_peer": []}.items()
    assert {"bpf_ns", "programs", "self_cpu_s"} <= summary["overhead"].keys()
    assert summary["capture"]["duration_s"] == 10.0
    assert summary["capture"]["targets"] == MANIFEST["targets"]


@pytest.mark.parametrize("step", [1, 13, 100_000])
def test_counts_and_quantiles_are_exact_whatever_rows_there_are(tmp_path: Path, step: int) -> None:
    waits, kept = every(3000, step)
    summary = summary_of(tmp_path / "c", {"waits": kept, **exact_tables(waits)})
    got, wait = summary["waits"], waits["wait_ns"]
    assert got["count"] == 3000
    assert got["total_ns"] == int(wait.sum())
    assert got["max_ns"] == int(wait.max())
    assert got["blocked"] == {
        "count": int((waits["blocked_ns"] > 0).sum()),
        "total_ns": int(waits["blocked_ns"].sum()),
    }
    for name, percent in (("p50_ns", 50), ("p90_ns", 90), ("p99_ns", 99)):
        true = nearest_rank(wait, percent)
        assert true <= got[name] <= true + true // 64
    assert got["tail"]["over_ns"] == got["p99_ns"]
    assert got["tail"]["count"] == int((wait > got["p99_ns"]).sum())
    assert got["tail"]["rows"] == int((kept["wait_ns"] > got["p99_ns"]).sum())
    assert got["tail"]["total_ns"] == int(kept["wait_ns"][kept["wait_ns"] > got["p99_ns"]].sum())
    kinds = waits["kind"].to_pylist()
    assert {name: kind["count"] for name, kind in got["by_kind"].items()} == {
        name: kinds.count(name) for name in ("wakeup", "new", "preempted")
    }
    assert summary["quality"]["rows"] == len(kept["wait_ns"])
    assert summary["quality"]["waits"] == 3000
    assert summary["quality"]["totals_from_rows"] is False


def test_two_processes_are_added_up(tmp_path: Path) -> None:
    first, second = make_waits(500), make_waits(700, seed=2, tgid=5000)
    tables = {"waits": first, **exact_tables(first)}
    for name, columns in exact_tables(second).items():
        for column, values in columns.items():
            tables[name][column] = [*tables[name][column], *values]
    summary = summary_of(tmp_path / "c", tables)
    together = np.concatenate([first["wait_ns"], second["wait_ns"]])
    assert summary["waits"]["count"] == 1200
    assert summary["waits"]["total_ns"] == int(together.sum())
    true = nearest_rank(together, 99)
    assert true <= summary["waits"]["p99_ns"] <= true + true // 64
    assert {process["tgid"]: process["waits"] for process in summary["processes"]} == {
        812: 500,
        5000: 700,
    }
    assert summary["processes"][0]["comm"] == "redis-server"


def test_a_killed_capture_is_summed_from_its_rows_and_says_so(tmp_path: Path) -> None:
    waits = make_waits(1000)
    summary = summary_of(
        tmp_path / "c", {"waits": waits}, manifest={"start_ns": START_NS}, complete=False
    )
    assert summary["capture"]["complete"] is False
    assert summary["quality"]["totals_from_rows"] is True
    assert summary["waits"]["count"] == 1000
    assert summary["waits"]["total_ns"] == int(waits["wait_ns"].sum())
    assert summary["waits"]["max_ns"] == int(waits["wait_ns"].max())
    assert summary["waits"]["p999_ns"] > summary["waits"]["p50_ns"] > 0
    assert sum(thread["waits"] for thread in summary["threads"]) == 1000
    assert summary["capture"]["duration_s"] == (int(waits["run_ns"].max()) - START_NS) / 1e9
    kinds = waits["kind"].to_pylist()
    assert summary["waits"]["by_kind"]["wakeup"]["count"] == kinds.count("wakeup")


def test_an_empty_capture(tmp_path: Path) -> None:
    summary = summary_of(tmp_path / "c", {}, manifest={})
    assert summary["waits"]["count"] == 0
    assert summary["waits"]["p99_ns"] == 0
    assert summary["quality"]["coverage"] is None
    assert summary["quality"]["totals_from_rows"] is False
    assert summary["capture"]["targets"] == []
    json.dumps(summary, allow_nan=False)


def test_a_manifest_of_nonsense_is_survived(tmp_path: Path) -> None:
    nonsense = dict.fromkeys(MANIFEST, "nonsense")
    summary = summary_of(tmp_path / "c", {"waits": make_waits(10)}, manifest=nonsense)
    assert summary["waits"]["count"] == 10
    assert summary["overhead"]["programs"] == []


def test_quality_is_handed_on(tmp_path: Path) -> None:
    manifest = copy.deepcopy(MANIFEST)
    manifest["quality"].update(
        lost_events=3,
        kernel_run_delay_ns=1000,
        traced_run_delay_ns=999,
        no_start=4,
        books_blind={"count": 2, "ns": 50},
        degraded=[{"at_ns": 1, "what": "w", "why": "y"}],
    )
    quality = summary_of(tmp_path / "c", {}, manifest=manifest)["quality"]
    assert quality["lost_events"] == 3
    assert quality["coverage"] == 0.999
    assert quality["no_start"] == 4
    assert quality["books_blind"] == {"count": 2, "ns": 50}
    assert quality["degraded"] == [{"at_ns": 1, "what": "w", "why": "y"}]


def test_wakers_calls_and_threads(tmp_path: Path) -> None:
    waits = {
        "wait_ns": np.array([10, 20, 30, 40, 50], np.uint64),
        "tid": [1, 1, 2, 2, 2],
        "tgid": [1] * 5,
        "kind": ["wakeup", "wakeup", "wakeup", "preempted", "wakeup"],
        "waker_tid": [7, 7, 99, -1, 98],
        "waker_tgid": [7, 7, 99, -1, 98],
        "waker": ["w", "w", "unlucky", None, "victim"],
        "waker_ctx": ["task", "task", "hardirq", None, "hardirq"],
        "blocked_ns": np.array([100, 200, 300, 0, 400], np.uint64),
        "syscall": ["read", "futex", "read", None, ""],
    }
    summary = summary_of(tmp_path / "c", {"waits": waits})
    assert [(w["ctx"], w["comm"], w["waits"], w["wait_ns"]) for w in summary["wakers"]] == [
        ("hardirq", "", 2, 80),
        ("task", "w", 2, 30),
    ]
    assert [(c["call"], c["count"], c["blocked_ns"]) for c in summary["syscalls"]] == [
        ("", 1, 400),
        ("read", 2, 400),
        ("futex", 1, 200),
    ]
    assert [(t["tid"], t["waits"], t["wait_ns"], t["max_ns"]) for t in summary["threads"]] == [
        (2, 3, 120, 50),
        (1, 2, 30, 20),
    ]


def test_threads_still_waiting_at_the_end_are_told(tmp_path: Path) -> None:
    waits = make_waits(100)
    tables = {"waits": waits, **exact_tables(waits)}
    tables["threads"]["open"] = ["blocked", "waiting", "", "waiting", "blocked"]
    tables["threads"]["open_ns"] = np.array([9, 5, 0, 7, 9], np.uint64)
    summary = summary_of(tmp_path / "c", tables)
    assert [(t["tid"], t["open_ns"]) for t in summary["waiting_at_end"]] == [(815, 7), (813, 5)]


def test_stacks_by_weight_and_by_wholeness(tmp_path: Path) -> None:
    waits = {
        "wait_ns": np.full(6, 10, np.uint64),
        "stack": [0, 0, 1, 2, -1, 77],
        "weight_ns": np.array([5, 6, 20, 1, 3, 4], np.uint64),
        "blocked_weight_ns": np.array([0, 50, 0, 0, 0, 0], np.uint64),
    }
    summary = summary_of(tmp_path / "c", {"waits": waits, "stacks": STACKS, "frames": FRAMES})
    assert summary["quality"]["stacks"] == {
        "whole": 3,
        "truncated": 1,
        "missing": 2,
        "by_module": {"/usr/bin/redis-server": {"?": 1}},
    }
    first, second, *_ = summary["stacks"]["wait"]
    assert (first["weight_ns"], first["whole"]) == (20, False)
    assert first["user"][1:] == ["redis-server+0x1234", "writeToClient", "main"]
    assert (second["weight_ns"], second["whole"]) == (11, True)
    assert second["user"] == ["epoll_wait", "aeApiPoll", "aeProcessEvents", "main"]
    assert second["kernel"] == ["do_epoll_wait"]
    assert [stack["weight_ns"] for stack in summary["stacks"]["blocked"]] == [50]
    lost = [stack for stack in summary["stacks"]["wait"] if stack["weight_ns"] == 4]
    assert lost == [{"weight_ns": 4, "whole": False, "user": [], "kernel": []}]


def test_frames_that_nothing_is_known_of(tmp_path: Path) -> None:
    frames = {
        "id": [0, 1, 2, 3],
        "symbol": [None, None, "", None],
        "module": ["/a/b.so", "[unknown]", None, "b.so"],
        "offset": np.array([16, 17, 18, 0], np.uint64),
        "space": ["user"] * 4,
    }
    stacks = {"id": [5], "frames": [[0, 1, 2, 3, 99]], "whole": [True]}
    waits = {"stack": [5], "weight_ns": [1], "wait_ns": [1]}
    summary = summary_of(tmp_path / "c", {"waits": waits, "stacks": stacks, "frames": frames})
    (stack,) = summary["stacks"]["wait"]
    assert stack["user"] == ["b.so+0x10", "[unknown]", "[unknown]", "b.so+0x0", "[unknown]"]


def test_lists_are_cut_to_the_greatest(tmp_path: Path) -> None:
    waits = {"wait_ns": np.arange(1, 31, dtype=np.uint64), "tid": list(range(1, 31))}
    capture = open_capture(write_capture(tmp_path / "c", {"waits": waits}))
    assert [thread["tid"] for thread in summarise(capture, top=3)["threads"]] == [30, 29, 28]
    assert summarise(capture, top=3)["quality"]["threads"] == 30


U64 = st.integers(0, 55).flatmap(lambda bits: st.integers(0, 1 << bits))


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(batches=st.lists(st.lists(U64, min_size=1, max_size=20), min_size=1, max_size=4))
def test_sums_do_not_depend_on_how_rows_were_cut_into_batches(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[int]]
) -> None:
    from latrace.tracer.outputs import create_output_dir  # noqa: PLC0415
    from latrace.tracer.writer import CaptureWriter  # noqa: PLC0415

    path = tmp_path_factory.mktemp("batches") / "c"
    writer = CaptureWriter(create_output_dir(path, force=False), {})
    for batch in batches:
        tids = [value % 3 for value in batch]
        writer.append("waits", {"wait_ns": np.array(batch, np.uint64), "tid": tids})
        writer.flush()
    writer.close(complete=True)
    values = [value for batch in batches for value in batch]
    summary = summarise(open_capture(path))
    assert summary["waits"]["count"] == len(values)
    assert summary["waits"]["total_ns"] == sum(values)
    assert summary["waits"]["max_ns"] == max(values)
    counts = histogram.empty()
    np.add.at(counts, histogram.slot_of(values), np.uint64(1))
    assert summary["waits"]["p99_ns"] == histogram.quantile(counts, 0.99, max_ns=max(values))
    by_tid = {thread["tid"]: thread["wait_ns"] for thread in summary["threads"]}
    assert by_tid == {
        tid: sum(value for value in values if value % 3 == tid) for tid in {v % 3 for v in values}
    }
