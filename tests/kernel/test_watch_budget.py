"""A watch over its budget gives up details, says so, and takes them up again."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest
from watching import Watching, build_steady, steady, watching

# What else a shared machine does can be a spike of its own, or hide one.
pytestmark = pytest.mark.kernel


def _manifest(watch: Watching, count: int) -> dict[str, Any]:
    """Of a bundle that is asked for now, the `count`-th of this watch."""
    watch.process.send_signal(signal.SIGUSR2)
    watch.wait_for("wrote ", count=count)
    return dict(watch.bundle(count - 1).capture.manifest)


def test_over_the_budget_and_back(tmp_path: Path) -> None:
    program = build_steady(tmp_path)
    with (
        steady(program, threads=1, period_us=50_000) as calm,
        steady(program, threads=16, period_us=1500, work_us=5) as busy,
        watching(
            tmp_path / "s",
            "--pid", f"{calm.pid},{busy.pid}", "--max", "10s", "--budget", "2%",
            "--before", "4s", "--after", "1s", "--cooldown", "0",
        ) as watch,
    ):  # fmt: skip
        told = watch.wait_for("!!! fewer details: it cost ")
        assert told.endswith("over the budget of 2 %")
        time.sleep(6)
        before = _manifest(watch, 1)
        # Some ten thousand waits a second are counted, and few of them have a row.
        quality = before["quality"]
        assert quality["waits"] > 20_000
        assert quality["row_threshold_ns"] > 0
        (note,) = [each for each in quality["degraded"] if each["what"].startswith("fewer waits")]
        assert "over the budget of 2 %" in note["why"]
        busy.process.kill()
        watch.wait_for("all details again: it costs ", timeout_s=120)
        time.sleep(5)  # none of the busy seconds is kept any more
        after = _manifest(watch, 2)
        assert after["quality"]["rows"] >= 0.95 * after["quality"]["waits"] > 0
        assert after["quality"]["row_threshold_ns"] == 0
