"""When a spike was, and what it was made of: scenes with a known answer."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sample_capture import START_NS, write_capture
from spike_samples import (
    MS,
    SPAN_NS,
    TGID,
    US,
    Rows,
    S,
    document,
    hog,
    neighbour,
    trigger,
    write_bundle,
)

from latrace.analysis.capture import open_capture
from latrace.analysis.errors import CaptureError
from latrace.analysis.spike_text import headline
from latrace.analysis.spikes import Windows, analyse, find_windows, read_spike

Told = dict[str, Any]


def windows_of(path: Path, rows: Rows, *triggers: Told, **more: Any) -> Windows:
    write_bundle(path, rows, document(*triggers, **more))
    spike = read_spike(path)
    assert spike is not None
    return find_windows(open_capture(path), spike)


def analysis_of(path: Path, rows: Rows, *triggers: Told, **more: Any) -> Told:
    manifest = more.pop("manifest", {})
    write_bundle(path, rows, document(*triggers, **more), **manifest)
    spike = read_spike(path)
    assert spike is not None
    analysis = analyse(open_capture(path), spike)
    assert json.loads(json.dumps(analysis, allow_nan=False)) == analysis
    return analysis


def since_start(windows: Windows) -> tuple[int, int]:
    return windows.spike.start_ns - START_NS, windows.spike.end_ns - START_NS - 1


# --- when --------------------------------------------------------------------------------------


def test_the_spike_is_what_was_slow_not_what_the_rule_looked_at(tmp_path: Path) -> None:
    windows = windows_of(tmp_path / "b", neighbour())
    assert since_start(windows) == (8 * S, 8 * S + 300 * MS)
    assert windows.baseline is not None
    assert (windows.baseline.start_ns, windows.baseline.end_ns) == (START_NS, START_NS + 8 * S)
    assert (windows.slow, windows.bursts, windows.ongoing) == (25, 1, False)


def test_slow_waits_that_are_usual_do_not_stretch_it(tmp_path: Path) -> None:
    rows = neighbour()
    for at in range(100 * MS, SPAN_NS, 170 * MS):  # closer than bursts are told apart
        rows.wait(at, 11 * MS, "other")
    begin, end = since_start(windows_of(tmp_path / "b", rows))
    assert 7 * S + 800 * MS < begin <= 8 * S
    assert 8 * S + 300 * MS <= end < 8 * S + 500 * MS


def test_a_burst_in_each_period_of_a_quota_is_one(tmp_path: Path) -> None:
    rows = Rows()
    rows.steady(0, 8 * S)
    for at in range(8 * S, 8 * S + 500 * MS, 100 * MS):
        rows.wait(at + 80 * MS, 80 * MS, "throttled", throttled_by="/app")
        rows.steady(at + 80 * MS, at + 100 * MS)
    rows.steady(8 * S + 500 * MS, SPAN_NS)
    windows = windows_of(tmp_path / "b", rows)
    assert since_start(windows) == (8 * S, 8 * S + 480 * MS)
    assert windows.bursts == 1


def test_of_several_bursts_the_worst(tmp_path: Path) -> None:
    rows = Rows()
    rows.steady(0, SPAN_NS)
    for begin, length in ((4, 48 * MS), (8, 480 * MS), (11, 96 * MS)):
        hog(rows, begin * S, begin * S + length)
    windows = windows_of(tmp_path / "b", rows)
    assert since_start(windows) == (8 * S, 8 * S + 480 * MS)
    assert (windows.bursts, windows.all_bursts) == (3, False)
    assert windows.baseline is not None
    assert windows.baseline.end_ns == windows.spike.start_ns  # a tenth of it: no other spike


def test_a_worse_burst_after_it_fired_is_told_but_is_not_the_spike(tmp_path: Path) -> None:
    rows = Rows()
    rows.steady(0, SPAN_NS)
    hog(rows, 8 * S, 8 * S + 96 * MS)
    hog(rows, 11 * S, 11 * S + 480 * MS)
    analysis = analysis_of(tmp_path / "b", rows)
    assert analysis["spike"] == {
        "start_ns": START_NS + 8 * S,
        "end_ns": START_NS + 8 * S + 96 * MS + 1,
    }
    assert analysis["later"]["start_ns"] == START_NS + 11 * S
    assert not analysis["ongoing"]
    assert "a worse one came later, at 11:32:07 UTC" in " ".join(analysis["sentences"])


def test_of_many_like_bursts_all(tmp_path: Path) -> None:
    rows = Rows()
    rows.steady(0, SPAN_NS)
    for second in range(4, 12):
        hog(rows, second * S, second * S + 48 * MS)
    windows = windows_of(tmp_path / "b", rows)
    assert since_start(windows) == (4 * S, 11 * S + 48 * MS)
    assert (windows.bursts, windows.all_bursts) == (8, True)


def test_an_earlier_spike_is_no_baseline(tmp_path: Path) -> None:
    rows = Rows()
    rows.steady(0, SPAN_NS)
    hog(rows, 2 * S, 2 * S + 300 * MS)
    hog(rows, 8 * S, 8 * S + 300 * MS)
    windows = windows_of(tmp_path / "b", rows)
    assert since_start(windows) == (8 * S, 8 * S + 300 * MS)
    assert windows.baseline is not None
    assert windows.baseline.end_ns == START_NS + 2 * S


def test_a_plateau_up_to_the_end_goes_on(tmp_path: Path) -> None:
    rows = Rows()
    rows.steady(0, 8 * S)
    hog(rows, 8 * S, SPAN_NS - 5 * MS)
    windows = windows_of(tmp_path / "b", rows)
    assert since_start(windows)[0] == 8 * S
    assert windows.ongoing


def test_a_spike_from_the_beginning_has_no_baseline(tmp_path: Path) -> None:
    rows = Rows()
    hog(rows, 0, 9 * S)
    rows.steady(9 * S, SPAN_NS)
    windows = windows_of(tmp_path / "b", rows)
    assert windows.baseline is None
    assert "already there" in windows.no_baseline


def test_rare_waits_are_one_burst_while_nothing_fast_lies_between(tmp_path: Path) -> None:
    rows = Rows()
    rows.steady(0, 8 * S)
    for at in range(9 * S, 12 * S, S):
        rows.wait(at, 400 * MS, "other")
    windows = windows_of(tmp_path / "b", rows)
    assert since_start(windows) == (8 * S + 600 * MS, 11 * S)


def test_of_sleep_calls_it_begins_with_the_deadline(tmp_path: Path) -> None:
    rows = Rows()
    rows.steady(0, SPAN_NS)
    for at in range(0, SPAN_NS, 10 * MS):
        late = 8 * S <= at < 8 * S + 200 * MS
        rows.sleep(at, 25 * MS if late else 60 * US)
    rule = trigger(rule="--p99 sleep=20ms", kind="sleep", value=25 * MS, threshold=20 * MS)
    windows = windows_of(tmp_path / "b", rows, rule)
    assert since_start(windows) == (8 * S, 8 * S + 190 * MS + 25 * MS)


def test_a_percentile_may_be_the_upper_end_of_a_bucket(tmp_path: Path) -> None:
    rows = Rows()
    rows.steady(0, 8 * S)
    hog(rows, 8 * S, 8 * S + 300 * MS, wait=10 * MS - 1000)
    assert windows_of(tmp_path / "b", rows).bursts == 1


@pytest.mark.parametrize("kind", ["metric", "manual"])
def test_what_has_no_limit_in_time_is_where_the_rule_looked(tmp_path: Path, kind: str) -> None:
    rule = trigger(kind=kind, unit="s", value=0.2, threshold=0.1)
    windows = windows_of(tmp_path / "b", neighbour(), rule)
    assert since_start(windows) == (3 * S, 8 * S + 200 * MS)
    assert windows.bursts == 0


def test_a_moment_is_taken_as_the_window_before_it(tmp_path: Path) -> None:
    at = START_NS + 9 * S
    rule = trigger(kind="manual", value=None, threshold=None, since_ns=at, until_ns=at)
    assert since_start(windows_of(tmp_path / "b", neighbour(), rule)) == (4 * S, 9 * S)


def test_nothing_over_the_limit(tmp_path: Path) -> None:
    rows = Rows()
    rows.steady(0, SPAN_NS)
    analysis = analysis_of(tmp_path / "b", rows)
    assert analysis["bursts"] == 0
    assert any("No recorded wait" in text for text in analysis["sentences"])


def test_retransmits_until_the_waits_they_lengthened_were_over(tmp_path: Path) -> None:
    rows = lossy()
    rule = trigger(rule="--retransmits 3", kind="retransmits", value=3, threshold=3,
                   unit="segments")  # fmt: skip
    windows = windows_of(tmp_path / "b", rows, rule)
    begin, end = since_start(windows)
    assert 7 * S + 700 * MS <= begin <= 8 * S  # when what was lost was sent
    assert end == 9 * S + 20 * MS + 30 * US


def lossy() -> Rows:
    """Three timeouts of one connection from 8 s on, and a call that waited for the answer."""
    rows = Rows()
    rows.steady(0, SPAN_NS)
    rows.wait(9 * S + 20 * MS + 30 * US, 30 * US, "idle", blocked_ns=S + 220 * MS,
              syscall="recvfrom", tid=TGID + 1)  # fmt: skip
    times = [8 * S, 8 * S + 400 * MS, 9 * S]
    rows.tables["retransmits"] = {
        "ts_ns": np.array([START_NS + at for at in times], np.uint64),
        "kind": ["rto"] * 3,
        "segs": np.ones(3, np.uint16),
        "daddr": ["10.0.0.5"] * 3,
        "dport": np.full(3, 5432, np.uint16),
        "sport": np.full(3, 40000, np.uint16),
        "tgid": np.full(3, TGID, np.int32),
        "tid": np.full(3, TGID + 1, np.int32),
        "cookie": np.full(3, 7, np.uint64),
        "srtt_us": np.full(3, 100, np.uint32),
        "rto_us": np.full(3, 200_000, np.uint32),
    }
    rows.tables["socket_events"] = {
        "ts_ns": np.array([START_NS + 9 * S + 20 * MS], np.uint64),
        "event": ["recovered"],
        "cookie": np.array([7], np.uint64),
    }
    return rows


# --- why ---------------------------------------------------------------------------------------


def test_a_neighbour(tmp_path: Path) -> None:
    analysis = analysis_of(tmp_path / "b", neighbour())
    culprit = analysis["culprit"]
    assert analysis["cause"] == "other"
    assert (culprit["comm"], culprit["tgid"], culprit["function"]) == (
        "batch-indexer",
        998,
        "compress_block",
    )
    assert culprit["ns"] == 300 * MS
    assert culprit["share"] == analysis["share"] == 1.0
    assert analysis["value"] == analysis["worst_ns"] == 12 * MS
    spike, before = analysis["parts"]["spike"], analysis["parts"]["baseline"]
    assert spike["by_cause_ns"]["other"] == 300 * MS
    assert sum(spike["by_cause_ns"].values()) == spike["wait_ns"]
    assert before["waits"] == 8000
    assert before["per_s"]["waits"] == pytest.approx(1000)
    assert before["per_s"]["by_cause_ns"]["idle"] == pytest.approx(20 * MS)
    # Half of each millisecond, but for the short wait at its end.
    assert before["per_s"]["blocked_ns"]["epoll_wait"] == pytest.approx(500 * MS, rel=0.01)


def test_its_own_threads(tmp_path: Path) -> None:
    rows = Rows()
    rows.steady(0, 8 * S)
    for at in range(8 * S, 8 * S + 300 * MS, 12 * MS):
        rows.wait(at + 12 * MS, 12 * MS, "own")
        rows.culprit(cause="own", tid=815, tgid=TGID, comm="gc-worker", stack=-1)
    rows.steady(8 * S + 300 * MS, SPAN_NS)
    analysis = analysis_of(tmp_path / "b", rows)
    assert analysis["cause"] == "own"
    assert (analysis["culprit"]["comm"], analysis["culprit"]["tid"]) == ("gc-worker", 815)
    assert "gc-worker (tid 815)" in " ".join(analysis["sentences"])


def test_a_quota(tmp_path: Path) -> None:
    rows = Rows()
    rows.steady(0, 8 * S)
    for at in range(8 * S, 8 * S + 500 * MS, 100 * MS):
        rows.wait(at + 80 * MS, 80 * MS, "throttled", throttled_by="/app")
    limit = {"cgroup": "/app", "quota_us": 20_000, "period_us": 100_000, "nr_throttled": 5}
    analysis = analysis_of(tmp_path / "b", rows, manifest={"cgroups_limited": [limit]})
    assert analysis["cause"] == "throttled"
    assert analysis["culprit"] is None
    assert (analysis["quota"]["cgroup"], analysis["quota"]["quota_us"]) == ("/app", 20_000)
    assert "20.0 ms in each 100 ms" in " ".join(analysis["sentences"])


def test_late_sleep_calls_by_what_had_the_cpu(tmp_path: Path) -> None:
    rows = Rows()
    rows.steady(0, SPAN_NS)
    for at in range(0, SPAN_NS, 40 * MS):
        late = 8 * S <= at < 8 * S + 320 * MS
        rows.sleep(at, 25 * MS if late else 60 * US)
        if late:
            rows.wait(at + 25 * MS, 25 * MS - 50 * US, "other", sleep=len(rows.sleeps) - 1)
            rows.culprit()
    rule = trigger(rule="--p99 sleep=20ms", kind="sleep", value=25 * MS, threshold=20 * MS)
    analysis = analysis_of(tmp_path / "b", rows, rule)
    assert analysis["cause"] == "other"
    assert analysis["culprit"]["comm"] == "batch-indexer"
    assert analysis["late"]["count"] == 8
    assert analysis["late"]["total_ns"] == 8 * 25 * MS == sum(analysis["parts_ns"].values())
    assert analysis["worst_ns"] == 25 * MS


def test_an_earlier_spike_from_the_beginning(tmp_path: Path) -> None:
    rows = Rows()
    hog(rows, 0, 300 * MS)
    rows.steady(300 * MS, SPAN_NS)
    hog(rows, 8 * S, 8 * S + 300 * MS)
    windows = windows_of(tmp_path / "b", rows)
    assert windows.baseline is None
    assert windows.no_baseline == "another spike was there when the recording begins"


def test_late_sleep_calls_by_the_timer(tmp_path: Path) -> None:
    rows = Rows()
    rows.steady(0, SPAN_NS)
    for at in range(0, SPAN_NS, 40 * MS):
        rows.sleep(at, 60 * US)
    for at in range(8 * S, 8 * S + 320 * MS, 40 * MS):
        rows.sleep(at + 10 * MS, 25 * MS)
        rows.sleeps[-1] |= {"timer_ns": 24 * MS, "run_queue_ns": MS}
    rule = trigger(rule="--p99 sleep=20ms", kind="sleep", value=25 * MS, threshold=20 * MS)
    analysis = analysis_of(tmp_path / "b", rows, rule)
    assert (analysis["cause"], analysis["name"]) == ("timer", "clock_nanosleep")
    assert "the timer itself came late" in " ".join(analysis["sentences"])


def convoy(rows: Rows) -> None:
    """Eight threads that wait for one lock from 4 s to 8 s, and a loop that idles meanwhile."""
    rows.steady(0, SPAN_NS, every=MS)
    for thread in range(8):
        for at in range(4 * S, 8 * S, 100 * MS):
            rows.wait(
                at + 90 * MS + thread * MS,
                20 * US,
                "own",
                tid=TGID + 1 + thread,
                blocked_ns=88 * MS,
                syscall="futex",
                stack=20,
                blocked_weight_ns=88 * MS,
                waker_tid=830,
                waker_tgid=TGID,
                waker="lock-holder",
                waker_ctx="task",
                waker_stack=21,
            )
    for thread in range(20):  # more time than in the lock, but nobody's fault
        rows.wait(8 * S, 20 * US, tid=900 + thread, blocked_ns=4 * S, syscall="epoll_wait")


METRIC = {"rule": "--metric http_request_duration_seconds", "kind": "metric", "unit": "s",
          "value": 0.18, "threshold": 0.1}  # fmt: skip


def test_a_lock_convoy_that_a_metric_told_of(tmp_path: Path) -> None:
    rows = Rows()
    convoy(rows)
    rule = trigger(**METRIC, since_ns=START_NS + 4 * S, until_ns=START_NS + 8 * S)
    analysis = analysis_of(tmp_path / "b", rows, rule)
    assert (analysis["cause"], analysis["name"]) == ("blocked", "futex")
    assert analysis["where"]["function"] == "compress_block"
    waker = analysis["where"]["waker"]
    assert (waker["comm"], waker["function"], waker["share"]) == ("lock-holder", "run", 1.0)
    assert analysis["parts"]["spike"]["per_s"]["blocked_ns"]["futex"] == pytest.approx(
        8 * 880 * MS, rel=0.01
    )
    assert "futex" not in analysis["parts"]["baseline"]["per_s"]["blocked_ns"]
    text = " ".join(analysis["sentences"])
    assert "180 ms (limit 100 ms)" in text
    assert "when lock-holder (tid 830) woke them, in run." in text


def test_a_neighbour_that_a_metric_told_of_goes_before_the_locks_it_kept(tmp_path: Path) -> None:
    rows = Rows()
    rows.steady(0, 4 * S)
    hog(rows, 4 * S, 8 * S)
    for thread in range(3):  # they wait for the thread that waits for the CPU
        for at in range(4 * S, 8 * S, 100 * MS):
            rows.wait(at + 99 * MS, 20 * US, tid=TGID + 1 + thread, blocked_ns=90 * MS,
                      syscall="futex")  # fmt: skip
    rule = trigger(**METRIC, since_ns=START_NS + 4 * S, until_ns=START_NS + 8 * S)
    analysis = analysis_of(tmp_path / "b", rows, rule)
    assert analysis["cause"] == "other"
    assert analysis["culprit"]["comm"] == "batch-indexer"
    assert "futex" in " ".join(analysis["sentences"])


def test_work_on_the_cpu_that_a_metric_told_of(tmp_path: Path) -> None:
    rows = Rows()
    rows.steady(0, SPAN_NS)
    rows.samples = [
        {"ts_ns": START_NS + at, "tid": TGID, "tgid": TGID, "cpu": 0, "stack": 20,
         "weight_ns": 10 * MS if 4 * S <= at < 8 * S else MS}
        for at in range(0, SPAN_NS, 10 * MS)
    ]  # fmt: skip
    rule = trigger(**METRIC, since_ns=START_NS + 4 * S, until_ns=START_NS + 8 * S)
    analysis = analysis_of(tmp_path / "b", rows, rule)
    assert analysis["cause"] == "on_cpu"
    assert analysis["where"]["function"] == "compress_block"
    assert analysis["parts"]["spike"]["per_s"]["on_cpu_ns"] == pytest.approx(S, rel=0.01)


def test_a_spike_between_two_samples_tells_nothing_of_the_cpu(tmp_path: Path) -> None:
    rows = neighbour()
    rows.samples = [
        {"ts_ns": START_NS + at, "tid": TGID, "tgid": TGID, "cpu": 0, "stack": -1,
         "weight_ns": 50 * MS}
        for at in range(0, SPAN_NS, 500 * MS)
    ]  # fmt: skip
    parts = analysis_of(tmp_path / "b", rows)["parts"]
    assert parts["spike"]["per_s"]["on_cpu_ns"] is None
    assert parts["baseline"]["per_s"]["on_cpu_ns"] == pytest.approx(100 * MS)


def test_nothing_that_is_recorded_grew(tmp_path: Path) -> None:
    rows = Rows()
    rows.steady(0, SPAN_NS)
    rule = trigger(**METRIC, since_ns=START_NS + 4 * S, until_ns=START_NS + 8 * S)
    analysis = analysis_of(tmp_path / "b", rows, rule)
    assert analysis["cause"] == ""
    assert "Nothing that latrace records grew" in " ".join(analysis["sentences"])


def test_lost_segments(tmp_path: Path) -> None:
    rule = trigger(rule="--retransmits 3", kind="retransmits", value=3, threshold=3,
                   unit="segments")  # fmt: skip
    analysis = analysis_of(tmp_path / "b", lossy(), rule)
    assert (analysis["cause"], analysis["name"]) == ("lost", "10.0.0.5:5432")
    assert analysis["parts"]["spike"]["retransmits"]["segs"] == 3
    text = " ".join(analysis["sentences"])
    assert "10.0.0.5:5432" in text
    assert "1 blocking call waited" in text


def test_who_else_used_the_host(tmp_path: Path) -> None:
    users = [
        {"pid": TGID, "comm": "payments-api", "cpu_percent": 99.0},
        {"pid": 998, "comm": "batch\x1b[31m", "cpu_percent": 97.2, "started": True},
        {"pid": 7, "comm": "idler", "cpu_percent": 0.1},
        {"pid": "x", "cpu_percent": "y"},
        None,
    ]
    host = {"top_cpu": users, "cpu": {"steal_percent": 12.0}, "pressure": None, "throttled": 3}
    analysis = analysis_of(tmp_path / "b", neighbour(), host=host)
    assert [user["pid"] for user in analysis["cpu_users"]] == [998]
    text = " ".join(analysis["sentences"])
    assert "batch\\x1b[31m (pid 998, newly started) with 97 % of a CPU" in text
    assert "12 %" in text


def test_a_single_late_call(tmp_path: Path) -> None:
    rows = Rows()
    rows.steady(0, SPAN_NS)
    rows.sleep(8 * S, 25 * MS)
    rule = trigger(rule="--max sleep=20ms", kind="sleep", value=21 * MS, threshold=20 * MS)
    analysis = analysis_of(tmp_path / "b", rows, rule)
    assert analysis["value"] == analysis["worst_ns"] == 25 * MS
    assert analysis["sentences"][0].startswith(
        "A sleep call came back 25.0 ms (limit 20.0 ms) late: 1 call over the limit, at "
    )


def go(**more: Any) -> Told:
    told = {
        "pauses": 12,
        "pause_ns": 4_200_000,
        "max_pause_ns": 1_300_000,
        "at_least": False,
        "seconds": 0.3,
        "baseline": {"seconds": 7.5, "pauses": 15, "pause_ns": 2_000_000, "max_pause_ns": 400_000},
        "goroutines": 1204,
        "largest": [
            {
                "count": 980,
                "stack": [
                    "sync.runtime_SemacquireMutex",
                    "sync.(*Mutex).lockSlow",
                    "sync.(*Mutex).Lock",
                    "main.ha\x1bndler",
                ],
            }
        ],
    }
    return {"url": "http://127.0.0.1:6060", "gc": told | more}


def test_what_the_service_says_of_itself(tmp_path: Path) -> None:
    text = " ".join(analysis_of(tmp_path / "b", neighbour(), profiles=go())["sentences"])
    assert (
        "stopped the world 12 times in the spike (40.0 times a second, 2.0 before), for 4.20 ms in "
        "all, the longest 1.30 ms." in text
    )
    assert (
        "1,204 goroutines when the watch fired, 980 of them in sync.(*Mutex).Lock < "
        "main.ha\\x1bndler." in text
    )
    more = go(at_least=True, baseline=None, largest=[{"count": 9, "stack": ["runtime.gopark"]}])
    text = " ".join(analysis_of(tmp_path / "c", neighbour(), profiles=more)["sentences"])
    assert "stopped the world at least 12 times in the spike, for" in text
    assert "9 of them in runtime.gopark." in text
    headlines = [
        headline(analysis_of(tmp_path / f"{count}", neighbour(), profiles=go(**more)))
        for count, more in enumerate(({}, {"goroutines": 2000}))
    ]
    locked = "; 980 of 1,204 goroutines waited for a lock in main.ha\\x1bndler."
    assert [text.endswith(locked) for text in headlines] == [True, False]
    none = go(pauses=0)
    text = " ".join(analysis_of(tmp_path / "d", neighbour(), profiles=none)["sentences"])
    assert "did not stop the world in the spike (0.0 times a second, 2.0 before)." in text
    none = go(pauses=0, at_least=True)
    text = " ".join(analysis_of(tmp_path / "e", neighbour(), profiles=none)["sentences"])
    assert "stop the world" not in text


@pytest.mark.parametrize(
    "more",
    [
        {"pauses": None, "goroutines": None},
        {"pauses": "12", "longest": 3, "largest": [3]},
        {"pause_ns": 1e300, "largest": [{"count": "x", "stack": [1]}]},
        {"max_pause_ns": None, "longest": [{"end_realtime_ns": "x"}], "goroutines": -0.0},
        {"seconds": 0, "baseline": {"seconds": "x", "pauses": 1}},
        {"goroutines": 90, "largest": [{"count": 80, "stack": ["sync.(*Mutex).Lock", [], None]}]},
        {"pauses": -1, "goroutines": -5, "baseline": {"seconds": 1e-300, "pauses": 9e18}},
    ],
)
def test_what_the_service_says_may_be_anything(tmp_path: Path, more: Told) -> None:
    assert analysis_of(tmp_path / "b", neighbour(), profiles=go(**more))["sentences"]


def test_rows_that_are_missing_are_told(tmp_path: Path) -> None:
    rows = neighbour()
    kept = len(rows.waits)
    totals = rows.capture()["totals"]
    rows.tables["totals"] = totals | {"waits": [kept + 1]}
    quality = {"row_threshold_ns": MS}
    analysis = analysis_of(tmp_path / "b", rows, manifest={"quality": quality})
    assert analysis["thinned"]
    assert analysis["value"] == 11 * MS  # of rows that are left, a percentile says nothing
    assert "Some waits have no details" in " ".join(analysis["sentences"])
    for lack, thinned in ((kept // 100 - 1, False), (kept // 50, True)):
        rows.tables["totals"] = totals | {"waits": [kept + lack]}
        quality = {"no_start": lack, "row_threshold_ns": 0}
        analysis = analysis_of(tmp_path / str(lack), rows, manifest={"quality": quality})
        assert analysis["thinned"] is thinned
        assert ("no details" in " ".join(analysis["sentences"])) is thinned


def test_a_bundle_without_rows(tmp_path: Path) -> None:
    analysis = analysis_of(tmp_path / "b", Rows())
    assert analysis["baseline"] is None
    assert analysis["sentences"]


# --- the file ----------------------------------------------------------------------------------


def test_a_capture_without_the_file_is_no_bundle(tmp_path: Path) -> None:
    assert read_spike(write_capture(tmp_path / "c", {})) is None
    assert read_spike(tmp_path / "nowhere") is None


def test_what_it_says(tmp_path: Path) -> None:
    path = write_bundle(tmp_path / "b", Rows(), document(notes=["a", "b"]))
    spike = read_spike(path)
    assert spike is not None
    assert spike.main.rule == "--p99 10ms"
    assert spike.notes == ("a", "b")
    assert spike.realtime_ns(spike.fired_ns - S) == spike.fired_realtime_ns - S


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "damaged"),
        (b"[]", "not a JSON object"),
        (b"[" * 100_000, "damaged"),
        (b"\xff\xfe", "damaged"),
        (b'{"schema": 1, "fired_ns": NaN}', "NaN is not a number"),
        (b'{"schema": 1, "fired_ns": 1e400}', "1e400 is not a number"),
        (b'{"schema": "1"}', "no schema version"),
        (b'{"schema": true}', "no schema version"),
        (b'{"schema": 2}', "reads up to 1"),
        (b" " * (5 << 20), "larger than 4 MiB"),
    ],
)
def test_a_file_that_is_no_such_file(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "spike.json").write_bytes(content)
    with pytest.raises(CaptureError, match=told):
        read_spike(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"triggers": []},
        {"triggers": [3]},
        {"triggers": [{}] * 65},
        {"triggers": [trigger(kind="magic")]},
        {"triggers": [trigger(value="much")]},
        {"triggers": [trigger(value=10**400)]},
        {"triggers": [trigger(threshold=True)]},
        {"triggers": [trigger(since_ns=-1)]},
        {"triggers": [trigger(until_ns=2**64)]},
        {"triggers": [trigger(rule=["--p99"])]},
        {"triggers": {"rule": 1}},
        {"fired_ns": None},
        {"start_ns": 1.5},
        {"end_ns": 3},
        {"notes": "a"},
        {"notes": [1]},
        {"host": []},
        {"profiles": "x"},
        {"settings": 3},
        {"name": 3},
    ],
)
def test_values_that_cannot_be(tmp_path: Path, change: Told) -> None:
    (tmp_path / "spike.json").write_text(json.dumps(document() | change))
    with pytest.raises(CaptureError, match="is damaged"):
        read_spike(tmp_path)


def _link(path: Path) -> None:
    path.symlink_to("/etc/passwd")


@pytest.mark.parametrize("make", [_link, os.mkfifo, Path.mkdir])
def test_only_a_regular_file_is_read(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "spike.json")
    with pytest.raises(CaptureError, match=r"spike\.json"):
        read_spike(tmp_path)


def test_times_of_somewhere_else_do_no_harm(tmp_path: Path) -> None:
    far = 2**62
    rule = trigger(since_ns=far, until_ns=far + 1, threshold=2**62, value=2**62)
    times = {"fired_ns": far, "start_ns": far, "end_ns": far + 1, "fired_realtime_ns": 2**63 - 1}
    analysis = analysis_of(tmp_path / "b", neighbour(), rule, **times)
    assert analysis["sentences"]
    for kind in ("manual", "retransmits", "sleep", "metric", "max"):
        assert analysis_of(tmp_path / kind, neighbour(), rule | {"kind": kind}, **times)
