"""Why a thread waited, on the live kernel: programs whose waits have one known cause.

Each scene is seen by a second witness as well (timeline.py), and by the programs themselves.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import ExitStack

import numpy as np
import pyarrow as pa
import pytest
from invariants import ints, names, parts
from scenes import CPU, Scene, Stage, assert_waited_all_it_did_not_run, waited
from timeline import IRQ, SOFTIRQ

pytestmark = pytest.mark.kernel


def itemised(scene: Scene, *tids: int) -> int:
    """What slices say of these culprits, in ns."""
    return int(ints(scene.slices_of(*tids), "dur_ns").sum())


def symbols_of(scene: Scene, slices: pa.Table) -> tuple[int, dict[str, int]]:
    """The sampled weight of culprits' stacks, and how much of it has each symbol, in ns."""
    capture = scene.traced.capture
    frames = {row["id"]: row["symbol"] for row in capture.frames.to_pylist()}
    stacks = {
        row["id"]: {frames[frame] for frame in row["frames"]} for row in capture.stacks.to_pylist()
    }
    total, by_symbol = 0, dict[str, int]()
    for stack, weight in zip(ints(slices, "stack"), ints(slices, "weight_ns"), strict=True):
        if stack >= 0:
            total += int(weight)
            for symbol in stacks[stack]:
                by_symbol[symbol] = by_symbol.get(symbol, 0) + int(weight)
    return total, by_symbol


@pytest.mark.parametrize("victim", ["spin", "batch"])
def test_a_hog_is_named(stage: Stage, victim: str) -> None:
    """One process beside the victim: nearly all waiting is `other`, and it has done it."""
    args = {"spin": (), "batch": (2000,)}[victim]
    with stage.neighbour("hog", "batch-indexer") as hog:
        scene = stage.play(victim, 1500, *args)
    scene.agrees()
    total = waited(scene.waits)
    wait = ints(scene.waits, "wait_ns")
    # Not a short wait of something else many times over: these are waits for the CPU.
    assert wait[wait >= 1_000_000].sum() > 0.9 * total
    assert total > 0.5e9
    assert parts(scene.waits)["other"] >= 0.97 * total
    named = scene.slices_of(hog.pid)
    assert itemised(scene, hog.pid) >= 0.97 * total
    # It, and not what it did between the waits: as the second witness saw it.
    seen = scene.ran_while_waiting(hog.pid)
    assert itemised(scene, hog.pid) == pytest.approx(seen, rel=0.01)
    assert set(ints(named, "tgid").tolist()) == {hog.pid}
    for column, value in (
        ("comm", "batch-indexer"), ("cause", "other"), ("policy", "other"),
        ("cgroup", stage.groups.top.name),
    ):  # fmt: skip
        assert set(names(named, column).tolist()) == {value}
    assert set(ints(named, "prio").tolist()) == {120}
    # Where it was: in its own code, though it never sleeps.
    weight, by_symbol = symbols_of(scene, named)
    assert weight == pytest.approx(seen, rel=0.1)
    assert by_symbol.get("burn", 0) >= 0.9 * weight
    assert by_symbol.get("crunch", 0) >= 0.8 * weight
    facts = scene.traced.facts
    if victim == "spin":
        assert_waited_all_it_did_not_run(scene)
    else:
        assert total <= facts["late_ns"] + 1e9 * 0.001 * facts["sleeps"]
        # Beside the waits, a sleep is late by its slack (50 us) and the timer's interrupt.
        assert facts["late_ns"] - total < 200_000 * facts["sleeps"]


def test_two_hogs_have_their_shares(stage: Stage) -> None:
    """Nice 0 and nice 5 have the weights 1024 and 335."""
    with (
        stage.neighbour("hog", "hog-strong") as strong,
        stage.neighbour("hog", "hog-weak", nice=5) as weak,
    ):
        scene = stage.play("spin", 2500)
    scene.agrees()
    both = itemised(scene, strong.pid, weak.pid)
    assert both >= 0.97 * waited(scene.waits)
    share = itemised(scene, strong.pid) / both
    assert share == pytest.approx(1024 / (1024 + 335), abs=0.05)
    seen = [scene.ran_while_waiting(pid) for pid in (strong.pid, weak.pid)]
    assert share == pytest.approx(seen[0] / sum(seen), abs=0.005)
    assert set(ints(scene.slices_of(weak.pid), "prio").tolist()) == {125}


def test_a_waiting_thread_is_followed(stage: Stage) -> None:
    """A hog on each of two CPUs, and a victim that is moved between them while it waits."""
    if (os.cpu_count() or 1) < 2:
        pytest.skip("needs a second CPU to move to")

    hogs: list[int] = []
    stage.groups.top.weigh(4096)  # on every CPU of the host: the mover has to run as well

    def move(pid: int) -> None:
        # Not before the tracer is ready: with a hog on every CPU of the host it hardly would be.
        with ExitStack() as around:
            for cpu in range(2):
                group = stage.groups.make(f"cpu{cpu}")
                hog = stage.neighbour("hog", f"hog-{cpu}", cpu=cpu, group=group)
                hogs.append(around.enter_context(hog).pid)
            for turn in range(200):
                os.sched_setaffinity(pid, {turn % 2})
                time.sleep(0.003)
            os.kill(pid, signal.SIGTERM)

    scene = stage.play("spin", 0, group=stage.groups.make("victim"), meanwhile=move)
    waits = scene.waits
    total = waited(waits)
    assert_waited_all_it_did_not_run(scene, within=0.02)
    moved = ints(waits, "migrations") > 0
    assert moved.sum() > 50
    assert ints(waits, "wait_ns")[moved].sum() > 0.2 * total
    assert parts(waits)["other"] >= 0.95 * total
    assert ints(scene.slices, "dur_ns").sum() >= 0.6 * total  # of a wait's moves, the last ones
    for cpu, hog in enumerate(hogs):
        theirs = scene.slices_of(hog)
        elsewhere = ints(theirs, "dur_ns")[ints(theirs, "cpu") != cpu].sum()
        assert elsewhere < 0.01 * total  # until it was bound to its CPU
        assert itemised(scene, hog) > 0.1 * total  # whatever else this host does


def test_own_threads(stage: Stage) -> None:
    """Three threads of one process on one CPU: each waits for the other two."""
    scene = stage.play("own", 1500, 3)
    scene.agrees()
    total = waited(scene.waits)
    assert total > 2 * 1.4e9
    assert parts(scene.waits)["own"] >= 0.97 * total
    for i in range(3):
        tid = int(scene.traced.facts[f"thread{i}"])
        slices = scene.slices_of(tid)
        assert set(names(slices, "cause").tolist()) == {"own"}
        assert set(ints(slices, "tgid").tolist()) == {scene.traced.pid}
        # While it ran, both others waited.
        ran = scene.traced.facts[f"cpu{i}_ns"]
        assert itemised(scene, tid) == pytest.approx(2 * ran, rel=0.03)


def test_real_time_culprits(stage: Stage) -> None:
    """Bursts of known length under three policies: each named with its policy and priority.

    The kernel's limit for real-time threads stays as it is: they take half of the CPU at most.
    """
    bursts = {"fifo": ("rt-fifo", "fifo", 10, 6000, 54000), "rr": ("rt-rr", "rr", 20, 3000, 57000)}
    bursts["deadline"] = ("rt-deadline", "deadline", 0, 2000, 18000)
    with ExitStack() as around:
        hogs = {
            policy: around.enter_context(stage.neighbour("burst", *args))
            for policy, args in bursts.items()
        }
        for turn in range(5):
            # A deadline cannot be bound to a CPU: it runs here in most turns, but not in all.
            again = Stage(stage.program, stage.groups, stage.output.with_name(f"turn{turn}"))
            scene = again.play("spin", 2000)
            if scene.ran_while_waiting(hogs["deadline"].pid):
                break
    scene.agrees()
    assert parts(scene.waits)["other"] >= 0.97 * waited(scene.waits)
    for policy, hog in hogs.items():
        slices = scene.slices_of(hog.pid)
        ran = itemised(scene, hog.pid)
        assert ran == pytest.approx(scene.ran_while_waiting(hog.pid), rel=0.01)
        assert set(names(slices, "comm").tolist()) == {f"rt-{policy}"}
        assert set(names(slices, "policy").tolist()) == {policy}
        # The kernel's scale: 99 less the priority that was asked for.
        prio = {"fifo": 89, "rr": 79, "deadline": -1}[policy]
        assert set(ints(slices, "prio").tolist()) == {prio}
    # Those that are bound to this CPU run nowhere else: 6 ms and 3 ms at a time.
    for policy, ms in (("fifo", 6), ("rr", 3)):
        most = hogs[policy].facts["bursts"] * ms * 1e6
        assert 0.75 * 2 / 0.06 * ms * 1e6 < itemised(scene, hogs[policy].pid) <= most + ms * 1e6


@pytest.mark.parametrize("hog", [True, False], ids=["beside a hog", "alone"])
def test_interrupts(stage: Stage, hog: bool) -> None:
    """Datagrams that are received on the victim's CPU: the time they take is not the culprit's."""
    if (os.cpu_count() or 1) < 2:
        pytest.skip("needs a second CPU to send from")
    with ExitStack() as around:
        if hog:
            around.enter_context(stage.neighbour("hog", "hog"))
        around.enter_context(
            stage.neighbour("flood", CPU, 64, 400, cpu=1, group=stage.groups.make("flood"))
        )
        scene = stage.play("batch", 1200, 1000)
    ours, theirs = parts(scene.waits), scene.witnessed()
    for cause, state in (("irq", IRQ), ("softirq", SOFTIRQ)):
        # Our clock starts when the second witness has stamped the beginning, the first thing that
        # is done in an interrupt: what is not in the caches then takes it 100 to 200 ns more than
        # at the end.
        later = 200 * scene.begun(state)
        assert abs(ours[cause] - theirs[cause].sum()) < 0.05 * theirs[cause].sum() + later, cause
    # There is something to agree on.
    assert theirs["softirq"].sum() > 0.03 * waited(scene.waits)
    scene.agrees()
    softirqs = scene.slices.filter(pa.array(names(scene.slices, "cause") == "softirq"))
    vectors = names(softirqs, "vector")
    received = int(ints(softirqs, "dur_ns")[vectors == "NET_RX"].sum())
    assert received > 0.8 * ints(softirqs, "dur_ns").sum()


def test_an_idle_cpu_has_no_culprit(stage: Stage) -> None:
    """Woken from another CPU, on one that sleeps: what it waits for is the CPU's waking up."""
    if (os.cpu_count() or 1) < 2:
        pytest.skip("needs a second CPU to wake from")
    # Others may run there: leave out the waits that the second witness saw them in.
    for turn in range(5):
        again = Stage(stage.program, stage.groups, stage.output.with_name(f"turn{turn}"))
        scene = again.play("ping", 1500, 1000)
        tid = int(scene.traced.facts["tid"])
        waits = scene.waits_of(tid)
        theirs = scene.witnessed(waits)
        quiet = (theirs["other"] + theirs["kthread"] + theirs["unknown"]) == 0
        if quiet.sum() > 500:
            break
    assert quiet.sum() > 500, "this CPU was never idle"
    alone = waits.filter(pa.array(quiet))
    ours = parts(alone)
    total = waited(alone)
    assert ours["idle"] >= 0.8 * total, ours
    assert ours["other"] == ours["own"] == ours["kthread"] == ours["throttled"] == 0
    # The interrupt that brings a wake-up from elsewhere counts as idle until the thread is queued.
    brought = int(ints(alone, "wakeup_ns").sum())
    seen = int(theirs["idle"][quiet].sum())
    assert 0.97 * seen <= ours["idle"] <= 1.03 * seen + brought
    keys = set(ints(alone, "run_ns").tolist())
    invented = [
        row
        for row in scene.slices.to_pylist()
        if row["victim_tid"] == tid
        and row["victim_run_ns"] in keys
        and row["cause"] not in ("irq", "softirq")
    ]
    assert not invented


def test_short_waits_are_taken_apart_too(stage: Stage) -> None:
    """Every wait, row by row, is what the second witness saw: not only their sum."""
    with stage.neighbour("burst", "rt-often", "fifo", 5, 100, 700):
        scene = stage.play("batch", 1000, 300)
    scene.agrees(within=0.02)
    theirs = scene.witnessed()
    wait = ints(scene.waits, "wait_ns")
    whole = theirs.pop("unknown") == 0
    assert whole.sum() > 0.9 * len(wait)
    for cause, seen in theirs.items():
        off = np.abs(ints(scene.waits, f"{cause}_ns") - seen)[whole]
        # Both take the time of an event themselves, some 100 ns apart.
        assert np.quantile(off, 0.99) < 5_000, cause
    assert len(wait) > 1000
