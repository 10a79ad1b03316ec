"""Scenes with a known cause: tests/workloads/causes.c traced beside neighbours of known identity.

All of a scene runs on one CPU in a cgroup so heavy that the rest of the host hardly counts, while
a second witness (timeline.py) records what that CPU did.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from cgroups import Group, Groups
from invariants import CAUSES, check_causes, ints, parts
from timeline import IRQ, SOFTIRQ, UNSEEN, Recording, Timeline, recording
from tracing import Traced, trace

from latrace.tracer.options import Options

CPU = 0
UNKNOWN_AT_MOST = 0.02  # of the waiting time of every scene
PF_KTHREAD = 0x00200000


@dataclass(slots=True)
class Neighbour:
    """A process that runs beside the victim; `facts` are there once it has ended."""

    pid: int
    process: subprocess.Popen[str]
    facts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Scene:
    """A traced victim and the second witness."""

    traced: Traced
    recording: Recording
    kthreads: frozenset[int]

    @cached_property
    def timeline(self) -> Timeline:
        return self.recording.timeline()

    @property
    def waits(self) -> pa.Table:
        return self.traced.capture.waits

    @property
    def slices(self) -> pa.Table:
        return self.traced.capture.slices

    def waits_of(self, *tids: int) -> pa.Table:
        return self.waits.filter(pc.is_in(self.waits["tid"], pa.array(tids, pa.int32())))

    def slices_of(self, *tids: int) -> pa.Table:
        """The stays of these culprits."""
        return self.slices.filter(pc.is_in(self.slices["tid"], pa.array(tids, pa.int32())))

    def witnessed(self, waits: pa.Table | None = None) -> dict[str, np.ndarray[Any, Any]]:
        """The parts of each wait as the second witness has them, all on one CPU; no throttling."""
        table = self.waits if waits is None else waits
        run = ints(table, "run_ns")
        start = run - ints(table, "wait_ns")
        assert (ints(table, "cpu") == CPU).all()
        assert (start >= self.timeline.start_ns).all()
        own = {int(tid) for tid in ints(self.traced.capture.threads, "tid")}
        tests: dict[str, Callable[[int], bool]] = {
            "irq": lambda state: state == IRQ,
            "softirq": lambda state: state == SOFTIRQ,
            "idle": lambda state: state == 0,
            "kthread": lambda state: state in self.kthreads,
            "own": lambda state: state in own,
            "other": lambda state: state > 0 and state not in own | self.kthreads,
            "unknown": lambda state: state == UNSEEN,
        }
        return {cause: self.timeline.spent(start, run, test) for cause, test in tests.items()}

    def ran_while_waiting(self, tid: int, waits: pa.Table | None = None) -> int:
        """How long a thread was on the CPU within the waits, in ns, says the second witness."""
        table = self.waits if waits is None else waits
        run = ints(table, "run_ns")
        start = run - ints(table, "wait_ns")
        return int(self.timeline.spent(start, run, lambda state: state == tid).sum())

    def begun(self, state: int) -> int:
        """How many times the CPU went into a state within the waits, says the second witness."""
        timeline, run = self.timeline, ints(self.waits, "run_ns")
        begun = np.array(timeline.edges)[np.array(timeline.states) == state]
        first = np.searchsorted(begun, run - ints(self.waits, "wait_ns"))
        return int((np.searchsorted(begun, run) - first).sum())

    def agrees(self, *, within: float = 0.01) -> None:
        """Assert that each cause of all waits is what the second witness saw.

        `within` is a share of all waiting time. Where the kernel fired no event for a switch
        (docs/limits.md), neither of the two can know.
        """
        ours, theirs = parts(self.waits), self.witnessed()
        total = sum(ours.values())
        unseen = int(theirs.pop("unknown").sum())
        assert unseen <= 0.1 * total
        for cause in CAUSES:
            seen = int(theirs[cause].sum()) if cause in theirs else 0
            assert abs(ours[cause] - seen) <= within * total + unseen, (cause, ours, seen)


def unseen(scene: Scene) -> int:
    """Waiting time that no event was fired for (docs/limits.md): it has no row and no cause."""
    return parts(scene.traced.capture.totals)["unknown"] - parts(scene.waits)["unknown"]


def waited_between(table: pa.Table, start_ns: float, end_ns: float) -> int:
    """The waiting time of rows that lies between two moments, in ns."""
    run = ints(table, "run_ns")
    start = np.maximum(run - ints(table, "wait_ns"), start_ns)
    return int(np.maximum(np.minimum(run, end_ns) - start, 0).sum())


def assert_waited_all_it_did_not_run(scene: Scene, *, within: float = 0.01) -> None:
    """Assert that the waits of a victim that only computes are its time off the CPU.

    What the hypervisor stole while it was on the CPU is in neither of the two: the kernel does not
    count it as run (kernel/sched/core.c: update_rq_clock_task()), and nobody waited for it here.
    """
    facts, stolen = scene.traced.facts, scene.traced.capture.manifest["steal_ns"]
    start, end = facts["start_ns"], facts["end_ns"]
    rows, hidden = waited_between(scene.waits, start, end), unseen(scene)
    off_cpu = end - start - facts["cpu_ns"]
    tolerance = within * off_cpu
    assert off_cpu - tolerance - stolen - hidden <= rows <= off_cpu + tolerance, (
        f"{rows} ns of rows and {hidden} ns unseen, {off_cpu} ns off the CPU, {stolen} ns stolen"
    )


def waited(table: pa.Table) -> int:
    """All waiting time of rows, in ns."""
    return int(ints(table, "wait_ns").sum())


def kernel_threads() -> frozenset[int]:
    """The kernel threads of this host."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            flags = int(stat.read_text().rpartition(")")[2].split()[6])
            if flags & PF_KTHREAD:
                found.add(int(stat.parent.name))
    return frozenset(found)


@dataclass(frozen=True, slots=True)
class Stage:
    """Where scenes are played: the program, and the groups to run it in."""

    program: Path
    groups: Groups
    output: Path

    @contextlib.contextmanager
    def neighbour(
        self, mode: str, *args: object, nice: int = 0, cpu: int = CPU, group: Group | None = None
    ) -> Iterator[Neighbour]:
        """Run `causes MODE` to the end of the block at most, and have its facts after it."""
        command = [self.program, mode, str(cpu), str(nice), "0", *map(str, args)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert process.stdin and process.stdout
        one = Neighbour(process.pid, process)
        try:
            # Real-time threads may not run in groups of our own (RT_GROUP_SCHED).
            if mode != "burst":
                (group or self.groups.top).add(process.pid)
            process.stdin.write("x")
            process.stdin.close()
            yield one
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0, f"{mode} failed"
            one.facts = {
                name: float(value) for name, value in (line.split() for line in process.stdout)
            }
        finally:
            process.kill()
            process.wait()
            process.stdout.close()

    def play(
        self,
        mode: str,
        ms: int,
        *args: object,
        nice: int = 0,
        group: Group | None = None,
        children: bool = False,
        meanwhile: Callable[[int], None] = lambda _pid: None,
    ) -> Scene:
        """Trace `causes MODE` for `ms` ms (0: to its end), and check what always holds."""

        def into_group(pid: int) -> Options:
            (group or self.groups.top).add(pid)
            return Options(pids=(pid,), min_ns=0, children=children)

        kthreads = kernel_threads()
        with recording(CPU) as second:
            traced = trace(
                [self.program, mode, str(CPU), str(nice), str(ms), *map(str, args)],
                self.output,
                make_options=into_group,
                meanwhile=meanwhile,
            )
            second.stop()
        scene = Scene(traced, second, kthreads | kernel_threads())
        check_causes(traced.capture)
        # Waits that no event was fired for (docs/limits.md) have no row, and no cause; those whose
        # beginning alone was not seen are told by the kernel's books, and have no cause either.
        wait = ints(scene.waits, "wait_ns")
        whole = (wait > 0) & (ints(scene.waits, "unknown_ns") == wait)
        begun_unseen = whole.sum() <= traced.quality["recovered"]
        known = parts(scene.waits.filter(pa.array(~whole)) if begun_unseen else scene.waits)
        assert known["unknown"] <= UNKNOWN_AT_MOST * sum(known.values()), known
        exact = parts(traced.capture.totals)
        if not traced.quality["missed_switches"]:
            assert exact["unknown"] <= UNKNOWN_AT_MOST * sum(exact.values()), exact
        return scene
