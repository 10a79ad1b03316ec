"""Why: the time of the slow waits by cause and by culprit, CPU quotas, and late sleep calls."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from latrace.analysis import histogram
from latrace.analysis.causes import by_cause
from latrace.analysis.culprits import (
    CULPRITS,
    Culprits,
    Slices,
    Who,
    by_process,
    entry,
    itemised,
    longest_first,
)
from latrace.analysis.frames import NamedStack
from latrace.analysis.rows import Rows
from latrace.analysis.sleep_calls import SleepCalls, describe

_LIMITS = ("quota_us", "period_us", "nr_periods", "nr_throttled", "throttled_ns")


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What the rows of a capture told."""

    rows: Rows
    slices: Slices
    calls: SleepCalls
    names: Mapping[int, str]
    """Of target processes, by tgid."""
    stacks: Mapping[int, NamedStack]
    top: int
    """How long a list may be."""


def tail(
    evidence: Evidence,
    counts: histogram.Counts,
    over_ns: int,
    threads: Iterable[Mapping[str, Any]],
) -> dict[str, Any]:
    """Sum up the waits above `over_ns`: `waits.tail` in `latrace report --json`.

    Times are of rows: exact when `rows` is `count`. `counts`: the histogram of all waits;
    `threads`: what names the targets' threads. `not_itemised_ns` is the time of culprits that
    no slice tells the name of.
    """
    slow = evidence.rows.tail
    causes = by_cause(slow.parts)
    named = itemised(evidence.slices.tail)
    comms = {(thread["tid"], thread["tgid"]): thread["comm"] for thread in threads}
    most = sorted(slow.threads.items(), key=lambda item: (-int(item[1][1].sum()), item[0]))
    return {
        "over_ns": over_ns,
        # Rows are all there is above a threshold that is no bound of a bucket.
        "count": max(histogram.count_over(counts, over_ns), slow.count),
        "total_ns": slow.wait_ns,
        "rows": slow.count,
        "by_cause_ns": causes,
        "not_itemised_ns": {cause: max(causes[cause] - named[cause], 0) for cause in CULPRITS},
        "threads": [
            {
                "tid": tid,
                "tgid": tgid,
                "comm": comms.get((tid, tgid), ""),
                "waits": count,
                "wait_ns": int(parts.sum()),
                "by_cause_ns": by_cause(parts),
            }
            for (tid, tgid), (count, parts) in most[: evidence.top]
        ],
        "thread_count": len(most),
        "wakers": _wakers(evidence.rows)[: evidence.top],
        "wakeup_ns": slow.wakeup_ns,
        "migrations": slow.migrations,
        "idle_elsewhere_ns": slow.idle_elsewhere_ns,
    }


def _wakers(rows: Rows) -> list[dict[str, Any]]:
    """List the tasks that ended the blocks before slow waits, and how long they had waited."""
    listed = [
        {
            "tid": tid,
            "tgid": tgid,
            "comm": comm,
            "waits": waker.waits,
            "wait_ns": waker.wait_ns,
            "had_waited": waker.had_waited,
            "waited_ns": waker.waited_ns,
            "woken_by": max(waker.woken_by, key=lambda by: (waker.woken_by[by], -by), default=None),
        }
        for (context, tid, tgid, comm), waker in rows.tail.wakers.items()
        if context == "task"
    ]
    return sorted(listed, key=lambda one: (-one["waited_ns"], -one["wait_ns"], one["tid"]))


def culprits(evidence: Evidence) -> dict[str, Any]:
    """List who had the CPU in slow waits and in all, by thread and by process.

    `ns` is of the waits that the list is of, `all_ns` of all.
    """
    slices, stacks, top = evidence.slices, evidence.stacks, evidence.top
    tail_ns, all_ns = evidence.rows.tail.wait_ns, evidence.rows.all.wait_ns
    return {
        "culprits": [
            entry(who, stay, tail_ns, stacks, everywhere=slices.all.get(who))
            for who, stay in longest_first(slices.tail.items())[:top]
        ],
        "culprit_processes": _processes(evidence, slices.tail, tail_ns)[:top],
        "culprits_all": [
            entry(who, stay, all_ns, stacks)
            for who, stay in longest_first(slices.all.items())[:top]
        ],
        "culprit_processes_all": _processes(evidence, slices.all, all_ns)[:top],
    }


def _processes(evidence: Evidence, some: Culprits, whole_ns: int) -> list[dict[str, Any]]:
    """Describe culprits by process; `threads` is how many of its threads had the CPU."""
    everywhere = {
        _process(who): stay
        for who, (stay, _) in by_process(evidence.slices.all, evidence.names).items()
    }
    processes = by_process(some, evidence.names)
    return [
        entry(who, stay, whole_ns, evidence.stacks, everywhere=everywhere.get(_process(who)))
        | {"threads": processes[who][1]}
        for who, stay in longest_first((who, stay) for who, (stay, _) in processes.items())
    ]


def _process(who: Who) -> tuple[str, int, str]:
    return who.cause, who.tgid, who.vector


def throttling(
    rows: Rows, limited: Iterable[Any], targets: Collection[str]
) -> list[dict[str, Any]]:
    """List the groups that have a CPU quota: what it cost in waits, and their own statistics.

    `limited`: `cgroups_limited` of the manifest; what is not as it should be there is left out, as
    are groups that held up no wait and that none of `targets`, the targets' groups, lies in.
    """
    groups: dict[str, dict[str, Any]] = {}
    for line in limited:
        cgroup = line.get("cgroup") if isinstance(line, dict) else None
        if isinstance(cgroup, str) and (
            cgroup in rows.throttled or any(_within(target, cgroup) for target in targets)
        ):
            groups[cgroup] = {
                key: line[key]
                for key in _LIMITS
                if isinstance(line.get(key), int | float) and not isinstance(line[key], bool)
            }
    for cgroup in rows.throttled:
        groups.setdefault(cgroup, {})
    listed: list[dict[str, Any]] = []
    for cgroup, limits in groups.items():
        throttled = rows.throttled.get(cgroup)
        listed.append(
            {
                "cgroup": cgroup,
                "waits": throttled.waits if throttled else 0,
                "wait_ns": throttled.ns if throttled else 0,
                "tail_ns": throttled.tail_ns if throttled else 0,
                **limits,
            }
        )
    return sorted(listed, key=lambda group: (-group["tail_ns"], -group["wait_ns"], group["cgroup"]))


def _within(cgroup: str, ancestor: str) -> bool:
    return cgroup == ancestor or cgroup.startswith(ancestor.rstrip("/") + "/")


def sleeps(evidence: Evidence) -> list[dict[str, Any]]:
    """List the kinds of sleep call, those that overshot most first.

    `tail.by_cause_ns` and `tail.culprits` are of the waits inside the latest calls.
    """
    listed = []
    for index in range(len(evidence.calls.calls)):
        line = describe(evidence.calls, index)
        parts = evidence.rows.calls[index]
        waited = int(parts.sum())
        some = evidence.slices.calls.get(index, {})
        line["tail"] |= {
            "wait_ns": waited,
            "by_cause_ns": by_cause(parts),
            "culprits": _processes(evidence, some, waited)[: evidence.top],
        }
        listed.append(line)
    return sorted(
        listed, key=lambda line: (-sum(line["parts_ns"].values()), -line["count"], line["call"])
    )
