"""Waits for a CPU quota, on the live kernel: as long as `cpu.stat` says, and whose limit it was."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
from cgroups import Group
from invariants import ints, names, parts
from scenes import Scene, Stage, assert_waited_all_it_did_not_run, unseen, waited

pytestmark = pytest.mark.kernel

QUOTA_US = 10_000


def limited(scene: Scene, group: Group) -> dict[str, Any]:
    """What the manifest says of a group, checked against the group's own file."""
    entries = scene.traced.capture.manifest["cgroups_limited"]
    (entry,) = [entry for entry in entries if entry["cgroup"] == group.name]
    # The group was made for the scene: its counters began with it, or, while the program waited
    # for the tracer to attach, a little before.
    now = group.throttling()
    assert abs(entry["nr_throttled"] - now.nr_throttled) <= 1
    assert entry["nr_throttled"] <= entry["nr_periods"] <= now.nr_periods
    assert entry["throttled_ns"] == pytest.approx(now.throttled_ns, rel=0.02)
    return dict(entry)


def blamed(table: pa.Table) -> set[str]:
    """Whose limits the waits that were throttled name."""
    throttled = ints(table, "throttled_ns") > 0
    return set(names(table, "throttled_by")[throttled].tolist())


def test_alone_with_a_quota(stage: Stage) -> None:
    """10 ms of each 100 ms: what it waits, it is throttled."""
    group = stage.groups.make("limited")
    group.limit(QUOTA_US)
    scene = stage.play("spin", 2000, group=group)
    total, throttled = waited(scene.waits), parts(scene.waits)["throttled"]
    assert_waited_all_it_did_not_run(scene)
    assert throttled >= 0.95 * total
    books = group.throttling().throttled_ns
    assert throttled == pytest.approx(books, abs=0.02 * books + unseen(scene))
    assert blamed(scene.waits) == {group.name}
    entry = limited(scene, group)
    assert (entry["quota_us"], entry["period_us"]) == (QUOTA_US, 100_000)
    assert entry["nr_throttled"] >= 15


def test_with_a_neighbour_as_well(stage: Stage) -> None:
    """30 ms of 100 ms beside a hog of the same weight: 30 ms wait for it, 40 ms for the quota."""
    group, next_door = stage.groups.make("limited"), stage.groups.make("next-door")
    group.limit(30_000)
    with stage.neighbour("hog", "next-door", group=next_door) as hog:
        scene = stage.play("spin", 3000, group=group)
    total, ours = waited(scene.waits), parts(scene.waits)
    assert_waited_all_it_did_not_run(scene)
    throttled = group.throttling().throttled_ns
    # To 2 % of the waiting time: neither is taken for the other.
    assert ours["throttled"] == pytest.approx(throttled, abs=0.02 * total + unseen(scene))
    assert ours["other"] == pytest.approx(total - throttled, abs=0.03 * total + unseen(scene))
    assert ours["other"] / ours["throttled"] == pytest.approx(3 / 4, abs=0.2)
    # The hog ran while the victim was throttled, too, and is not blamed for that.
    slices = scene.slices_of(hog.pid)
    assert ints(slices, "dur_ns").sum() == pytest.approx(ours["other"], rel=0.05)
    assert scene.ran_while_waiting(hog.pid) > 1.8 * ours["other"]
    assert blamed(scene.waits) == {group.name}
    assert set(names(slices, "cgroup").tolist()) == {next_door.name}
    limited(scene, group)


def test_woken_into_a_group_that_is_throttled(stage: Stage) -> None:
    """A thread that sleeps nearly all the time waits for what another one has used up."""
    group = stage.groups.make("limited")
    group.limit(QUOTA_US)
    scene = stage.play("burnt", 2500, 5000, group=group)
    facts = scene.traced.facts
    sleeper = scene.waits_of(int(facts["tid"]))
    ours, total = parts(sleeper), waited(sleeper)
    # One long wait each period, ~85 ms. It may run for a moment before (since 6.18 a thread is
    # held up where it returns to user mode): never so far as to tell the time.
    assert (ints(sleeper, "wait_ns") > 50_000_000).sum() >= 15
    assert total == pytest.approx(facts["late_ns"], abs=0.03 * facts["late_ns"] + unseen(scene))
    assert ours["throttled"] >= 0.95 * total, ours
    assert blamed(sleeper) == {group.name}
    # It is never throttled for longer than the group.
    assert ours["throttled"] <= 1.02 * group.throttling().throttled_ns
    burner = scene.waits_of(int(facts["burner"]))
    books = group.throttling().throttled_ns
    assert parts(burner)["throttled"] == pytest.approx(books, abs=0.02 * books + unseen(scene))
    limited(scene, group)


def test_a_limit_further_up(stage: Stage) -> None:
    """The group that has the limit is named, not the one that the thread is in."""
    parent = stage.groups.make("parent")
    child = stage.groups.make("child", below=parent)
    parent.limit(QUOTA_US)
    scene = stage.play("spin", 1000, group=child)
    assert parts(scene.waits)["throttled"] >= 0.95 * waited(scene.waits)
    assert blamed(scene.waits) == {parent.name}
    books = parent.throttling().throttled_ns
    # What no event was fired for has no row (docs/limits.md).
    assert parts(scene.waits)["throttled"] == pytest.approx(books, abs=0.02 * books + unseen(scene))
    limited(scene, parent)
    entries = scene.traced.capture.manifest["cgroups_limited"]
    assert child.name not in {entry["cgroup"] for entry in entries}


def test_threads_that_share_a_quota(stage: Stage) -> None:
    """Three threads use a quota up together: each is throttled as long as the group is."""
    group = stage.groups.make("limited")
    group.limit(30_000)
    scene = stage.play("own", 2000, 3, group=group)
    tids = [int(scene.traced.facts[f"thread{i}"]) for i in range(3)]
    throttled = group.throttling().throttled_ns
    assert throttled > 0.6 * 2e9
    for i, tid in enumerate(tids):
        ours, total = parts(scene.waits_of(tid)), waited(scene.waits_of(tid))
        assert ours["throttled"] == pytest.approx(throttled, abs=0.03 * throttled + unseen(scene))
        # The rest is waiting for the other two, a third of the quota each.
        assert ours["throttled"] + ours["own"] >= 0.97 * total
        others = sum(scene.traced.facts[f"cpu{j}_ns"] for j in range(3) if j != i)
        assert ours["own"] == pytest.approx(others, abs=0.1 * others + unseen(scene))
    limited(scene, group)
