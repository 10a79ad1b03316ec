"""Ten thousand threads and processes that live for a moment: nothing leaks, nobody is mixed up."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import signal
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pytest
from invariants import MOST_SLICES, ints
from scenes import Stage

pytestmark = pytest.mark.kernel

MANY = 10_000
FILES_AT_MOST = 3000  # those that ended a moment ago are still watched


def held() -> tuple[int, int]:
    """What this process holds: objects of Python's, and bytes of memory."""
    gc.collect()
    pa.default_memory_pool().release_unused()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return len(gc.get_objects()), pages * os.sysconf("SC_PAGE_SIZE")


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


class Watch:
    """Takes the most files that we have open while the target lives."""

    def __init__(self) -> None:
        self.most = 0

    def __call__(self, pid: int) -> None:
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            self.most = max(self.most, open_files())
            time.sleep(0.05)


# A name is its thread's from its first instructions on; before, it has its parent's.
NAMED = re.compile(r"[tp](\d+)")


def test_as_targets_threads(stage: Stage) -> None:
    """Ten thousand threads, traced: each has its own row and name, and is forgotten again."""
    after = []
    for turn in range(3):
        before, watch = open_files(), Watch()
        again = Stage(stage.program, stage.groups, stage.output.with_name(f"turn{turn}"))
        scene = again.play("threads", 0, MANY, 50, meanwhile=watch)
        assert watch.most < before + FILES_AT_MOST
        assert open_files() <= before
        threads = scene.traced.capture.threads
        rows = list(zip(ints(threads, "tid"), threads["comm"].to_pylist(), strict=True))
        assert len(rows) == MANY + 1
        assert {(tid, name) for tid, name in rows if tid != scene.traced.pid} == {
            (tid, f"t{tid}") for tid, _ in rows if tid != scene.traced.pid
        }
        assert set(ints(threads, "tgid").tolist()) == {scene.traced.pid}
        del scene, threads, rows
        after.append(held())
    # Another ten thousand leave nothing: no object for each, and no 3 KiB for each. A leak grows
    # every time; what an allocator keeps, or a compiler, does not.
    growth = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(after)]
    assert min(objects for objects, _ in growth) < MANY // 10, growth
    assert min(memory for _, memory in growth) < MANY * 3 << 10, growth


def test_as_targets_processes(stage: Stage) -> None:
    """Ten thousand children, traced: each has its own row, name and process."""
    before, watch = open_files(), Watch()
    scene = stage.play("processes", 0, MANY, 50, children=True, meanwhile=watch)
    assert watch.most < before + FILES_AT_MOST
    assert open_files() <= before
    threads = scene.traced.capture.threads
    rows = [row for row in threads.to_pylist() if row["tid"] != scene.traced.pid]
    assert len(rows) == MANY
    assert not [row for row in rows if row["comm"] != f"p{row['tid']}"]
    assert not [row for row in rows if row["tgid"] != row["tid"]]
    assert {row["ppid"] for row in rows} == {scene.traced.pid}


def test_as_culprits(stage: Stage) -> None:
    """Ten thousand processes, one after the other, on the victim's CPU: each is named right."""

    def crowd(pid: int) -> None:
        with stage.neighbour("processes", MANY, 150) as crowd:
            crowd.process.wait(60)
        assert crowd.facts["made"] == MANY
        os.kill(pid, signal.SIGTERM)

    scene = stage.play("spin", 0, meanwhile=crowd)
    scene.agrees(within=0.02)
    slices = scene.slices
    crowded = {
        item
        for item in zip(
            ints(slices, "tid").tolist(),
            ints(slices, "tgid").tolist(),
            slices["comm"].to_pylist(),
            strict=True,
        )
        if item[2] and NAMED.fullmatch(item[2])
    }
    assert not [item for item in crowded if item != (item[0], item[0], f"p{item[0]}")]
    # All of them: there is no other time for them to run in than the victim's waits. Of a wait that
    # saw more of them than are kept, the newest are.
    assert len(crowded) > 0.98 * MANY
    # And each stay of theirs is as the second witness has it.
    stays = Counter(ints(slices, "victim_run_ns").tolist())
    cut = {run for run, count in stays.items() if count >= MOST_SLICES}
    compared = differ = 0
    for tid in sorted(tid for tid, _, _ in crowded)[:: MANY // 100]:
        mine = scene.slices_of(tid)
        if not cut & set(ints(mine, "victim_run_ns").tolist()):
            ran = int(ints(mine, "dur_ns").sum())
            differ += abs(ran - scene.ran_while_waiting(tid)) >= 5_000
            compared += 1
    assert compared > 20
    assert differ <= 3  # around switches that no event was fired for
