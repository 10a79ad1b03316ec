"""Turn a capture into the numbers of `latrace report --json`.

Counts, totals, quantiles and totals by cause come from the in-kernel counters and are exact,
whatever rows were lost or left out. What only rows tell (who had the CPU, wakers, calls, stacks)
says of how many rows. A capture that was killed before its counters were written, or of which
only a part is wanted, is summed up from its rows, and says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latrace.analysis import histogram
from latrace.analysis.attribution import Evidence, culprits, sleeps, tail, throttling
from latrace.analysis.capture import Capture
from latrace.analysis.causes import Parts, by_cause, no_parts, parts_of
from latrace.analysis.culprits import Slices, scan_slices, stack_numbers
from latrace.analysis.frames import NamedStack, name_stacks
from latrace.analysis.retransmits import read_retransmits, summarise_retransmits
from latrace.analysis.rows import Rows, Slow, Sum, Survey, scan, survey
from latrace.analysis.schema import SCHEMA_VERSION
from latrace.analysis.selection import Selection
from latrace.analysis.sleep_calls import read_sleep_calls
from latrace.analysis.stack_quality import stack_quality

_KINDS = ("wakeup", "new", "preempted")
_QUALITY_COUNTS = ("lost_events", "lost_stacks", "open_at_start", "open_at_end")
_EVERYTHING = Selection()
_TAIL = 0.99
_STACKS = 1000  # looked at before those with the same functions are put together


def summarise(
    capture: Capture, *, top: int = 10, selection: Selection = _EVERYTHING
) -> dict[str, Any]:
    """Sum up a capture, or a part of it: the machine interface, schema 1, durations in ns.

    Besides the contract's keys: `selection`, `waits.by_kind`, `waits.blocked`,
    `waits.culprit_processes`, `waits.culprits_all`, `throttling`, `processes`, `threads`,
    `waiting_at_end`, `wakers`, `syscalls` and `stacks`, and more in `retransmits`; at most `top`
    entries each, the greatest first. Everything in it can be written as JSON.

    Raises CaptureError for a damaged file.
    """
    processes = _processes(capture)
    recorded = sum(process.sum.count for process in processes.values())
    if not selection.everything:
        processes = {}
    counted = _histogram(capture) if processes else None
    surveyed = survey(capture, selection) if counted is None else Survey()
    exact = selection.everything and (bool(processes) or not surveyed.all)
    counts = surveyed.hist if counted is None else counted
    over_ns = selection.over_ns
    if over_ns is None:
        over_ns = histogram.tail_over(counts, _TAIL)
    calls = read_sleep_calls(capture, selection)
    rows = scan(capture, selection, Slow(over_ns, len(calls.calls), calls.late))
    slices = scan_slices(capture, rows.marks, every=selection.everything)
    if not exact:
        processes = _processes_of_rows(rows)
    total, parts = Sum(), no_parts()
    for process in processes.values():
        total.add(process.sum)
        parts += process.parts
    if not exact:
        parts = rows.parts
    threads = _threads(capture, rows, selection)
    names = _process_names(capture, threads)
    stacks = _named_stacks(capture, rows, slices)
    evidence = Evidence(rows=rows, slices=slices, calls=calls, names=names, stacks=stacks, top=top)
    return {
        "schema": SCHEMA_VERSION,
        "capture": _capture(capture, rows, names),
        "selection": _selection(capture, rows, selection),
        "quality": {
            **_quality(capture, rows, threads),
            "waits": recorded or rows.recorded.count,
            "totals_from_rows": not exact,
        },
        "waits": {
            **_waits(counts, total, processes, rows),
            "by_cause_ns": by_cause(parts),
            "tail": tail(evidence, counts, over_ns, threads),
            **culprits(evidence),
        },
        "throttling": throttling(
            rows,
            _list(capture.manifest, "cgroups_limited"),
            {cgroup for cgroup in pc.unique(capture.threads["cgroup"]).to_pylist() if cgroup},
        ),
        "processes": [
            {
                "tgid": tgid,
                "comm": names.get(tgid, ""),
                "waits": entry.sum.count,
                "wait_ns": entry.sum.wait_ns,
                "max_ns": entry.sum.max_ns,
                "blocked_ns": entry.sum.blocked_ns,
            }
            for tgid, entry in sorted(processes.items(), key=_most_waiting_first)
        ][:top],
        "threads": threads[:top],
        "waiting_at_end": _waiting_at_end(threads)[:top],
        "wakers": _wakers(rows)[:top],
        "syscalls": _syscalls(rows)[:top],
        "stacks": _stacks(rows, stacks, top=top),
        "sleeps": sleeps(evidence),
        "retransmits": summarise_retransmits(read_retransmits(capture, selection), top=top),
        "overhead": _overhead(capture.manifest),
    }


# --- the counters ------------------------------------------------------------------------------


class _Process:
    """One process's totals, and how many waits of each kind."""

    def __init__(self, total: Sum, kinds: Mapping[str, int], parts: Parts) -> None:
        self.sum = total
        self.kinds = dict(kinds)
        self.parts = parts


def _processes(capture: Capture) -> dict[int, _Process]:
    processes: dict[int, _Process] = {}
    totals = _filled(capture.totals)
    for line, parts in zip(totals.to_pylist(), parts_of(totals), strict=True):
        entry = processes.setdefault(line["tgid"], _Process(Sum(), {}, no_parts()))
        entry.sum.add(
            Sum(line["waits"], line["wait_ns"], line["max_ns"], line["blocked"], line["blocked_ns"])
        )
        entry.parts += parts
        for kind in _KINDS:
            entry.kinds[kind] = entry.kinds.get(kind, 0) + line[f"waits_{kind}"]
    counted = sum(entry.sum.count for entry in processes.values())
    # Counters that say nothing was seen while rows say otherwise are from before the rows.
    return processes if counted else {}


def _processes_of_rows(rows: Rows) -> dict[int, _Process]:
    processes: dict[int, _Process] = {}
    for (_, tgid), total in rows.threads.items():
        processes.setdefault(tgid, _Process(Sum(), {}, no_parts())).sum.add(total)
    return processes


def _histogram(capture: Capture) -> histogram.Counts | None:
    """Read the exact distribution of all waits; None: the capture has none."""
    hist = _filled(capture.hist)
    hist = hist.filter(pc.equal(pc.cast(hist["metric"], pa.utf8()), "wait"))
    if not hist.num_rows:
        return None
    return histogram.from_buckets(_array(hist, "lo_ns"), _array(hist, "count"))


def _waits(
    counts: histogram.Counts, total: Sum, processes: Mapping[int, _Process], rows: Rows
) -> dict[str, Any]:
    p50, p90, p99, p999 = histogram.quantiles(counts, (0.5, 0.9, 0.99, 0.999), max_ns=total.max_ns)
    kinds = {kind: sum(entry.kinds.get(kind, 0) for entry in processes.values()) for kind in _KINDS}
    if not any(kinds.values()):
        kinds = {kind: rows.kinds.get(kind, Sum()).count for kind in _KINDS}
    return {
        "count": total.count,
        "total_ns": total.wait_ns,
        "p50_ns": p50,
        "p90_ns": p90,
        "p99_ns": p99,
        "p999_ns": p999,
        "max_ns": total.max_ns,
        "by_kind": {
            kind: {"count": kinds[kind], "row_wait_ns": rows.kinds.get(kind, Sum()).wait_ns}
            for kind in _KINDS
        },
        "blocked": {"count": total.blocked, "total_ns": total.blocked_ns},
    }


def _most_waiting_first(item: tuple[int, _Process]) -> tuple[int, int]:
    return -item[1].sum.wait_ns, item[0]


# --- who and where -----------------------------------------------------------------------------


def _threads(capture: Capture, rows: Rows, selection: Selection) -> list[dict[str, Any]]:
    """List the threads that waited most first; their totals are exact if the capture has them.

    Of a part of a capture, they are sums of rows.
    """
    table = _filled(capture.threads)
    comms = {(line["tid"], line["tgid"]): line["comm"] or "" for line in table.to_pylist()}
    listed: dict[tuple[int, int, int], dict[str, Any]] = {}
    if selection.everything:
        listed = _counted_threads(table)
    known = {key[:2] for key in listed}
    for (tid, tgid), total in rows.threads.items():
        if (tid, tgid) not in known:  # alive when the capture was cut off
            listed[tid, tgid, 0] = {
                "tid": tid,
                "tgid": tgid,
                "comm": comms.get((tid, tgid), ""),
                "waits": total.count,
                "wait_ns": total.wait_ns,
                "max_ns": total.max_ns,
                "blocked_ns": total.blocked_ns,
                "open": "",
                "open_ns": 0,
            }
    return sorted(listed.values(), key=lambda thread: (-thread["wait_ns"], thread["tid"]))


def _counted_threads(table: pa.Table) -> dict[tuple[int, int, int], dict[str, Any]]:
    return {
        (line["tid"], line["tgid"], line["start_ns"]): {
            "tid": line["tid"],
            "tgid": line["tgid"],
            "comm": line["comm"] or "",
            "waits": line["waits"],
            "wait_ns": line["wait_ns"],
            "max_ns": line["max_wait_ns"],
            "blocked_ns": line["blocked_ns"],
            "by_cause_ns": by_cause(parts),
            "cgroup": line["cgroup"] or "",
            "open": line["open"] or "",
            "open_ns": line["open_ns"],
        }
        for line, parts in zip(table.to_pylist(), parts_of(table), strict=True)
    }


def _waiting_at_end(threads: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """List the threads that were runnable and had not run yet, the longest waiting first."""
    waiting = [thread for thread in threads if thread["open"] == "waiting"]
    return sorted(waiting, key=lambda thread: (-thread["open_ns"], thread["tid"]))


def _wakers(rows: Rows) -> list[dict[str, Any]]:
    """List who made the targets runnable, those with most waiting after it first.

    Interrupts are one entry for each context: the thread they interrupted had no part in it.
    """
    merged: dict[tuple[str, int, int, str], Sum] = {}
    for (context, tid, tgid, comm), total in rows.wakers.items():
        if context == "task":
            key = (context, tid, tgid, comm)
        elif context:
            key = (context, 0, 0, "")
        else:
            continue  # nobody woke it: preempted
        merged.setdefault(key, Sum()).add(total)
    listed = [
        {
            "tid": tid,
            "tgid": tgid,
            "comm": comm,
            "ctx": context,
            "waits": total.count,
            "wait_ns": total.wait_ns,
        }
        for (context, tid, tgid, comm), total in merged.items()
    ]
    return sorted(listed, key=lambda one: (-int(one["wait_ns"]), one["tid"], one["ctx"]))


def _syscalls(rows: Rows) -> list[dict[str, Any]]:
    """List the calls that the targets were blocked in, the longest first; "": in none."""
    listed = [
        {
            "call": call,
            "count": total.blocked,
            "blocked_ns": total.blocked_ns,
            "wait_ns": total.wait_ns,
        }
        for call, total in rows.syscalls.items()
        if total.blocked
    ]
    return sorted(listed, key=lambda entry: (-int(entry["blocked_ns"]), entry["call"]))


def _stacks(
    rows: Rows, stacks: Mapping[int, NamedStack], *, top: int
) -> dict[str, list[dict[str, Any]]]:
    """List the stacks that stand for most waiting, and for most blocked time.

    Stacks that differ only in where within their functions they were are one.
    """

    def lines(heaviest: list[tuple[int, int]]) -> list[dict[str, Any]]:
        merged: dict[NamedStack, int] = {}
        for number, weight in heaviest:
            merged[stacks[number]] = merged.get(stacks[number], 0) + weight
        return [
            {
                "weight_ns": weight,
                "whole": stack.whole,
                "user": list(stack.user),
                "kernel": list(stack.kernel),
            }
            for stack, weight in sorted(merged.items(), key=lambda item: -item[1])[:top]
        ]

    return {"wait": lines(_waited(rows)), "blocked": lines(_blocked(rows))}


def _waited(rows: Rows) -> list[tuple[int, int]]:
    return _heaviest({number: entry.wait_ns for number, entry in rows.stacks.items()})


def _blocked(rows: Rows) -> list[tuple[int, int]]:
    return _heaviest({number: entry.blocked_ns for number, entry in rows.stacks.items()})


def _heaviest(weights: Mapping[int, int]) -> list[tuple[int, int]]:
    """Sort stacks by weight, those that stand for nothing left out."""
    weighed = [(number, weight) for number, weight in weights.items() if number >= 0 and weight]
    return sorted(weighed, key=lambda item: (-item[1], item[0]))[:_STACKS]


def _named_stacks(capture: Capture, rows: Rows, slices: Slices) -> dict[int, NamedStack]:
    """Look up, at once, every stack that is told of."""
    numbers = {number for number, _ in [*_waited(rows), *_blocked(rows)]}
    for some in (slices.all, slices.tail, *slices.calls.values()):
        numbers.update(stack_numbers(some.values()))
    return name_stacks(capture, numbers)


# --- what the manifest says --------------------------------------------------------------------


def _capture(capture: Capture, rows: Rows, names: Mapping[int, str]) -> dict[str, Any]:
    manifest = capture.manifest
    start = _number(manifest, "start_ns")
    # A capture that was cut off does not know its end; its last row is near it.
    end = _number(manifest, "end_ns") or max(rows.last_run_ns, start)
    targets = [entry for entry in _list(manifest, "targets") if isinstance(entry, dict)]
    if not targets:
        targets = [{"tgid": tgid, "comm": comm} for tgid, comm in sorted(names.items())]
    return {
        "path": str(capture.path),
        "targets": targets,
        "duration_s": (end - start) / 1e9 if start else 0.0,
        "start_ns": start,
        "started_realtime_ns": _number(manifest, "started_realtime_ns"),
        "host": str(manifest.get("host", "")),
        "kernel": str(manifest.get("kernel", "")),
        "cpus": _number(manifest, "cpus"),
        "complete": capture.complete,
        "truncated": capture.truncated,
        "steal_ns": _steal(manifest),
        "without": [str(part) for part in _list(_object(manifest, "options"), "without")],
        "all_sockets": bool(_object(manifest, "options").get("all_sockets")),
    }


def _steal(manifest: Mapping[str, Any]) -> int | None:
    """Tell the CPU time that the hypervisor kept for others; None: not recorded."""
    for owner in (manifest, _object(manifest, "quality")):
        value = owner.get("steal_ns")
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def _selection(capture: Capture, rows: Rows, selection: Selection) -> dict[str, Any] | None:
    """Say which part of the capture this is of; None: of all of it."""
    if selection.everything:
        return None
    start = _number(capture.manifest, "start_ns")
    end = _number(capture.manifest, "end_ns") or max(rows.last_run_ns, start)
    begin, until = selection.window_ns(int(end - start))
    return {
        "since_ns": begin,
        "until_ns": until,
        "tids": list(selection.tids),
        "over_ns": selection.over_ns,
        "rows": rows.all.count,
    }


def _quality(capture: Capture, rows: Rows, threads: list[dict[str, Any]]) -> dict[str, Any]:
    quality = _object(capture.manifest, "quality")
    kernel, traced = (_number(quality, f"{who}_run_delay_ns") for who in ("kernel", "traced"))
    blind = _object(quality, "books_blind")
    sleeps = _object(capture.manifest, "sleeps")
    further = {
        key: value
        for key, value in quality.items()
        if isinstance(value, int) and not isinstance(value, bool)
    }
    return {
        **further,
        **{key: _number(quality, key) for key in _QUALITY_COUNTS},
        "degraded": [entry for entry in _list(quality, "degraded") if isinstance(entry, dict)],
        "rows": rows.recorded.count,
        "row_wait_ns": rows.recorded.wait_ns,
        "threads": len(threads),
        "stacks": stack_quality(capture, rows.stacks),
        "kernel_run_delay_ns": kernel,
        "traced_run_delay_ns": traced,
        "coverage": traced / kernel if kernel else None,
        "books_blind": {"count": _number(blind, "count"), "ns": _number(blind, "ns")},
        "sleeps": {key: _number(sleeps, key) for key in ("zero_timeout", "never_blocked", "lost")},
    }


def _overhead(manifest: Mapping[str, Any]) -> dict[str, Any]:
    overhead = _object(manifest, "overhead")
    return {
        **overhead,
        "bpf_ns": _number(overhead, "bpf_ns"),
        "programs": [entry for entry in _list(overhead, "programs") if isinstance(entry, dict)],
        "self_cpu_s": float(_number(overhead, "self_cpu_s")),
    }


def _process_names(capture: Capture, threads: list[dict[str, Any]]) -> dict[int, str]:
    """Name each process: by its first thread, or as it was when we attached."""
    names = {
        int(entry["tgid"]): str(entry.get("comm", ""))
        for entry in _list(capture.manifest, "targets")
        if isinstance(entry, dict) and isinstance(entry.get("tgid"), int)
    }
    names.update(
        (thread["tgid"], thread["comm"])
        for thread in threads
        if thread["tid"] == thread["tgid"] and thread["comm"]
    )
    return names


# --- small parts -------------------------------------------------------------------------------


def _filled(table: pa.Table) -> pa.Table:
    """Put 0 where a number is missing."""
    for index, field in enumerate(table.schema):
        if pa.types.is_integer(field.type):
            table = table.set_column(index, field.name, pc.fill_null(table[field.name], 0))
    return table


def _array(table: pa.Table, name: str) -> np.ndarray[Any, Any]:
    return np.asarray(table[name].combine_chunks())


def _object(owner: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = owner.get(key)
    return value if isinstance(value, dict) else {}


def _list(owner: Mapping[str, Any], key: str) -> list[Any]:
    value = owner.get(key)
    return value if isinstance(value, list) else []


def _number(owner: Mapping[str, Any], key: str) -> Any:
    value = owner.get(key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else 0
