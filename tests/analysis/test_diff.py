"""Two captures compared: figures are those of the counters, verdicts those of what was drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sample_capture import MANIFEST, START_NS, exact_tables, make_waits, write_capture

from latrace.analysis import histogram
from latrace.analysis.capture import Capture, open_capture
from latrace.analysis.diff import compare
from latrace.analysis.diff_text import render_diff
from latrace.tracer.writer import names_from_codes

COUNT = 20_000
SECONDS = 10.0
HOSTILE = b"\x1b[31mred\nline;"


def waits(seed: int, *, factor: float = 1.0) -> dict[str, Any]:
    """Waits of which a third is `idle` and the rest, times `factor`, `other`."""
    made = make_waits(COUNT, seed=seed)
    idle = made["wait_ns"] // np.uint64(3)
    other = ((made["wait_ns"] - idle) * factor).astype(np.uint64)
    return made | {"wait_ns": idle + other, "idle_ns": idle, "other_ns": other}


def slices(made: dict[str, Any], *, comm: bytes, share: float) -> dict[str, Any]:
    """What one culprit had of the time that others had the CPU."""
    return {
        "dur_ns": (made["other_ns"] * share).astype(np.uint64),
        "tid": np.full(COUNT, 4242, np.int32),
        "tgid": np.full(COUNT, 4242, np.int32),
        "comm": np.full(COUNT, comm, "S16"),
        "cause": names_from_codes(np.zeros(COUNT, np.int64), ("other",).__getitem__),
        "victim_tid": made["tid"],
        "victim_run_ns": made["run_ns"],
    }


def capture(
    path: Path,
    made: dict[str, Any],
    *,
    culprit: dict[str, Any] | None = None,
    complete: bool = True,
    manifest: dict[str, Any] = MANIFEST,
    exact: bool = True,
    **tables: Any,
) -> Capture:
    every: dict[str, Any] = {"waits": made, **tables}
    if exact:
        counters = exact_tables(made)
        for table in ("totals",):
            counters[table] |= {name: [int(made[name].sum())] for name in ("idle_ns", "other_ns")}
        every |= counters
    if culprit is not None:
        every["slices"] = culprit
    return open_capture(write_capture(path, every, complete=complete, manifest=manifest))


def row(comparison: dict[str, Any], table: str, **wanted: str) -> dict[str, Any]:
    (found,) = [
        one for one in comparison[table] if all(one[key] == text for key, text in wanted.items())
    ]
    return dict(found)


def test_the_same_service_twice_differs_in_nothing(tmp_path: Path) -> None:
    a = capture(tmp_path / "a", waits(1))
    b = capture(tmp_path / "b", waits(2))
    found = compare(a, b)
    rows = [*found["quantiles"], *found["rates"], *found["causes"], *found["threads"]]
    # One in twenty by chance: of these some thirty at most a few.
    assert sum(one["differs"] is True for one in rows) <= 2
    assert row(found, "quantiles", name="p99")["differs"] is False
    text = render_diff(found)
    assert "The difference is within noise." in text
    assert "No cause of waiting changed much beyond noise" in text


def test_a_capture_and_itself(tmp_path: Path) -> None:
    one = capture(tmp_path / "a", waits(1), culprit=slices(waits(1), comm=b"indexer", share=0.5))
    found = compare(one, one)
    for table in ("quantiles", "rates", "causes", "culprits", "threads"):
        assert all(entry["a"] == entry["b"] and not entry["differs"] for entry in found[table])


def test_a_neighbour_that_came(tmp_path: Path) -> None:
    """Found, named and measured: three times the time of others, half of it one process's."""
    before, after = waits(1), waits(2, factor=3.0)
    a = capture(tmp_path / "a", before, culprit=slices(before, comm=b"cron", share=0.1))
    b = capture(tmp_path / "b", after, culprit=slices(after, comm=b"indexer", share=0.5))
    found = compare(a, b)
    for name in ("p50", "p90", "p99"):
        one = row(found, "quantiles", name=name)
        assert one["differs"]
        exact = np.sort(after["wait_ns"])[int(COUNT * {"p50": 0.5, "p90": 0.9}.get(name, 0.99)) - 1]
        assert exact <= one["b"]["ns"] <= exact * 1.016 + 1
        assert one["b"]["low_ns"] <= exact <= one["b"]["high_ns"]
    other = row(found, "causes", name="other")
    assert other["b"]["per_s"] == pytest.approx(int(after["other_ns"].sum()) / SECONDS)
    assert other["differs"]
    assert row(found, "causes", name="idle")["differs"] is False
    indexer = row(found, "culprits", comm="indexer")
    assert indexer["a"] == {"per_s": 0.0, "error": 0.0}
    assert indexer["b"]["per_s"] == pytest.approx(other["b"]["per_s"] / 2, rel=1e-4)
    assert indexer["differs"] and row(found, "culprits", comm="cron")["differs"]
    assert found["b"]["culprits_known"] == pytest.approx(0.5, rel=1e-4)
    text = render_diff(found)
    assert "longer in B" in text.splitlines()[2]
    told = " ".join(text.split())
    assert "Other processes: +" in told and "indexer +" in told
    assert "only in B" in text and "only in A" in text


def test_a_change_of_the_common_case_alone_is_told_as_well(tmp_path: Path) -> None:
    """P99 stays where it was, the short half doubles."""
    before, after = waits(1), waits(2)
    low = after["wait_ns"] < np.uint64(20_000)
    for name in ("wait_ns", "idle_ns", "other_ns"):
        after[name] = np.where(low, after[name] * np.uint64(2), after[name])
    found = compare(capture(tmp_path / "a", before), capture(tmp_path / "b", after))
    told = " ".join(render_diff(found).split())
    assert "The difference is within noise, but P50 is 87 % longer" in told


def test_a_capture_without_waits(tmp_path: Path) -> None:
    full, empty = waits(1), {name: column[:0] for name, column in waits(1).items()}
    a = capture(tmp_path / "a", full)
    b = capture(tmp_path / "b", empty, exact=False)
    found = compare(a, b)
    assert all(one["b"] is None and one["differs"] is None for one in found["quantiles"])
    assert "B has no waits" in render_diff(found)
    assert "A has no waits" in render_diff(compare(b, a))
    assert render_diff(compare(b, b))


def test_a_capture_that_was_cut_off_is_summed_from_its_rows(tmp_path: Path) -> None:
    made = waits(1)
    whole = capture(tmp_path / "a", made)
    manifest = {key: value for key, value in MANIFEST.items() if key != "end_ns"}
    cut = capture(tmp_path / "b", made, exact=False, complete=False, manifest=manifest)
    found = compare(whole, cut)
    last_s = (int(made["run_ns"].max()) - START_NS) / 1e9
    assert found["b"]["duration_s"] == pytest.approx(last_s)
    for name in ("p50", "p99"):
        one = row(found, "quantiles", name=name)
        assert one["a"]["ns"] == one["b"]["ns"]
    waited = row(found, "rates", name="waited")
    assert waited["b"]["per_s"] == pytest.approx(int(made["wait_ns"].sum()) / last_s)
    assert "B was not closed" in render_diff(found)


def test_counters_without_rows_are_shown_but_not_judged(tmp_path: Path) -> None:
    made = waits(1)
    a = capture(tmp_path / "a", made)
    none = {name: column[:0] for name, column in made.items()}
    b = open_capture(write_capture(tmp_path / "b", exact_tables(made) | {"waits": none}))
    waited = row(compare(a, b), "rates", name="waited")
    assert waited["a"]["per_s"] == waited["b"]["per_s"] > 0
    assert waited["b"]["error"] is None and waited["differs"] is None
    assert "can't tell" in render_diff(compare(a, b))


def overshoots(seed: int, factor: float) -> dict[str, Any]:
    late = np.random.default_rng(seed).lognormal(11, 0.3, COUNT) * factor
    return {
        "enter_ns": make_waits(COUNT)["run_ns"] - np.uint64(1_000),
        "exit_ns": make_waits(COUNT)["run_ns"],
        "tid": np.full(COUNT, 812, np.int32),
        "tgid": np.full(COUNT, 812, np.int32),
        "call": names_from_codes(np.zeros(COUNT, np.int64), ("epoll_wait",).__getitem__),
        "overshoot_ns": late.astype(np.int64),
    }


def with_overshoots(path: Path, seed: int, factor: float) -> Capture:
    """A capture of waits and late sleep calls, with the histogram of both."""
    made, late = waits(1), overshoots(seed, factor)
    tables = exact_tables(made)
    counts = histogram.empty()
    np.add.at(counts, histogram.slot_of(late["overshoot_ns"]), np.uint64(1))
    low, high, count = histogram.buckets(counts)
    hist = tables["hist"]
    tables["hist"] = {
        "metric": hist["metric"] + ["overshoot:epoll_wait"] * len(low),
        "tgid": np.append(hist["tgid"], np.full(len(low), -1, np.int32)),
        "lo_ns": np.append(hist["lo_ns"], low),
        "hi_ns": np.append(hist["hi_ns"], high),
        "count": np.append(hist["count"], count),
        "snapshot": np.append(hist["snapshot"], np.full(len(low), 1, np.uint32)),
    }
    return open_capture(write_capture(path, tables | {"waits": made, "sleeps": late}))


def test_sleep_calls(tmp_path: Path) -> None:
    a, b = (with_overshoots(tmp_path / str(n), n, 1.0 + n) for n in (0, 1))
    found = compare(a, b)
    (call,) = found["sleeps"]
    assert call["call"] == "epoll_wait"
    assert [one["differs"] for one in call["quantiles"]] == [True] * 4
    p50 = call["quantiles"][0]
    assert p50["b"]["ns"] / p50["a"]["ns"] == pytest.approx(2, rel=0.05)
    text = render_diff(found)
    assert "epoll_wait came back late by" in text
    assert "P99 of the waits" in text and "within noise" in text


def test_lines_fit_and_names_are_harmless(tmp_path: Path) -> None:
    made = waits(1, factor=100.0)
    targets = [{"tgid": n, "comm": HOSTILE.decode() + "漢" * 9} for n in range(9)]
    manifest = {**MANIFEST, "targets": targets, "kernel": "6.\x1b[2J", "host": "\u202ehost"}
    a = capture(tmp_path / "a", waits(3), culprit=slices(waits(3), comm=b"x" * 16, share=0.2))
    b = capture(
        tmp_path / ("b" * 90),
        made,
        culprit=slices(made, comm=HOSTILE, share=0.9),
        manifest=manifest,
    )
    for width in (80, 72, 100):
        text = render_diff(compare(a, b), width=width)
        assert max(len(line) for line in text.splitlines()) <= width
        assert "\x1b" not in text and "\u202e" not in text
    assert "\x1b[1m" in render_diff(compare(a, b), colour=True)


def test_json_has_what_the_text_says(tmp_path: Path) -> None:
    a, b = (capture(tmp_path / name, waits(n)) for n, name in enumerate("ab"))
    found = json.loads(json.dumps(compare(a, b)))
    assert found["schema"] == 1
    assert "binomial order statistics" in found["method"]
    assert {one["name"] for one in found["causes"]} == {
        "throttled", "irq", "softirq", "idle", "kthread", "own", "other", "unknown"
    }  # fmt: skip
    assert found["a"]["waits"] == COUNT and found["a"]["duration_s"] == SECONDS
