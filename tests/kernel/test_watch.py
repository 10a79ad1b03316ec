"""`latrace watch` on the live kernel: scripted spikes, and what their bundles say of them."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from cgroups import cpu_groups
from watching import build_steady, hog, steady, watching

from latrace.analysis.summary import summarise

# What else a shared machine does can be a spike of its own, or hide one.
pytestmark = pytest.mark.kernel

QUICK = ("--before", "4s", "--after", "1s", "--cooldown", "2s", "--window", "3s")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_steady(tmp_path_factory.mktemp("workloads"))


def test_a_noisy_neighbour(program: Path, tmp_path: Path) -> None:
    """The whole of it is there, the seconds before it too, and it has the right name first."""
    with steady(program) as service:
        with watching(
            tmp_path / "s", "--pid", service.pid, "--p99", "5ms", "--min", 0, *QUICK, "--once"
        ) as watch:
            time.sleep(4)
            began_ns = time.monotonic_ns()
            hog(0.8)
            ended_ns = time.monotonic_ns()
            assert watch.ended() == 0
        (path,) = watch.bundles
        bundle = watch.bundle()
    capture, spike = bundle.capture, bundle.spike
    assert capture.complete and not capture.truncated
    assert spike["start_ns"] < began_ns - 3_900_000_000
    assert spike["end_ns"] > ended_ns
    (trigger,) = spike["triggers"]
    assert trigger["rule"] == "--p99 5ms" and trigger["kind"] == "wait"
    assert trigger["value"] > trigger["threshold"] == 5_000_000
    assert trigger["count"] >= 100
    found = spike["analysis"]["spike"]
    assert began_ns < found["start_ns"] < found["end_ns"] < ended_ns + 50_000_000
    assert spike["analysis"]["cause"] == "other"
    assert spike["analysis"]["culprit"]["comm"] == "batch-indexer"
    assert (path / "report.html").stat().st_size > 100_000
    # It tells of its window alone, and exactly: rows, histogram and the threads' own counts.
    quality = capture.manifest["quality"]
    hidden = quality["no_start"] + quality["recovered"]
    counted = sum(row["count"] for row in capture.hist.to_pylist() if row["metric"] == "wait")
    assert counted == quality["waits"]
    # The counters of threads are read a moment before or after those of the process, at both ends.
    assert abs(counted - sum(row["waits"] for row in capture.threads.to_pylist())) <= 10
    # Nor are the counters read at one moment.
    assert abs(counted - capture.waits.num_rows) <= hidden + 4
    assert abs(quality["kernel_pcount"] - counted) <= hidden + 10
    runs = capture.waits["run_ns"].to_pylist()
    assert spike["start_ns"] < min(runs) and max(runs) <= spike["end_ns"]
    waits = summarise(capture)["waits"]
    longest = max(capture.waits["wait_ns"].to_pylist())
    assert longest <= waits["max_ns"] <= longest * 1.016 + 1
    for table in ("slices", "sleeps", "stacks", "frames"):
        assert capture.table(table).num_rows > 0
    known = set(capture.stacks["id"].to_pylist())
    assert set(capture.waits["stack"].to_pylist()) <= known | {-1}


def test_a_used_up_quota(program: Path, tmp_path: Path) -> None:
    with cpu_groups() as groups, steady(program, work_us=300) as service:
        group = groups.make("watched")
        group.add(service.pid)
        with watching(
            tmp_path / "s", "--pid", service.pid, "--max", "30ms", *QUICK, "--once"
        ) as watch:
            time.sleep(3)
            group.limit(5_000)
            time.sleep(0.5)
            group.limit(-1)
            assert watch.ended() == 0
        spike = watch.bundle().spike
    assert spike["triggers"][0]["kind"] == "max"
    assert spike["analysis"]["cause"] == "throttled"
    assert any(group.path.name in line for line in spike["analysis"]["sentences"])


def test_by_hand_a_lock_convoy(program: Path, tmp_path: Path) -> None:
    """No thread waits for a CPU: what grew is the time blocked in futex."""
    with steady(program) as service:
        with watching(
            tmp_path / "s", "--pid", service.pid, "--max", "10s", *QUICK, "--once"
        ) as watch:
            time.sleep(4)
            service.convoy(700)
            time.sleep(0.9)
            watch.process.send_signal(signal.SIGUSR2)
            assert watch.ended() == 0
        spike = watch.bundle().spike
    assert spike["triggers"][0]["kind"] == "manual"
    assert spike["triggers"][0]["reason"] == "SIGUSR2"
    (first, *_) = spike["analysis"]["grew"]
    assert (first["what"], first["name"]) == ("blocked", "futex"), spike["analysis"]["grew"]


def test_steady_load_fires_nothing_and_a_ratio_needs_no_number(
    program: Path, tmp_path: Path
) -> None:
    """It learns what is usual, keeps quiet, and fires when that changes; then it is armed again."""
    with (
        steady(program) as service,
        watching(tmp_path / "s", "--pid", service.pid, *QUICK) as watch,
    ):
        time.sleep(12)
        assert watch.bundles == []
        for number in (1, 2):
            hog(0.8)
            watch.wait_for("wrote ", count=number)
            watch.wait_for("The P99 of waits", count=number)
            time.sleep(6)
        assert watch.stop() == 0
    assert len(watch.bundles) == 2
    for number in (0, 1):
        (trigger,) = watch.bundle(number).spike["triggers"]
        assert trigger["rule"] == "--p99-ratio 3"
        assert trigger["value"] > trigger["threshold"] >= 3 * trigger["baseline"] - 1
