"""What holds for the causes of every capture, whatever was traced: parts add up, slices fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latrace.analysis.capture import Capture

CAUSES = ("throttled", "irq", "softirq", "idle", "kthread", "own", "other", "unknown")

SLICED = ("irq", "softirq", "kthread", "own", "other")
"""Causes that have rows in `slices`."""

SLICED_FROM_NS = 10_000
"""Shorter waits have no slices."""

MOST_SLICES = 60
"""Stays of threads that are kept of one wait: the newest."""

# The kernel's priorities (struct task_struct's `prio`) by policy.
_PRIORITIES = {
    "other": range(100, 140),
    "batch": range(100, 140),
    "idle": range(100, 140),
    "ext": range(100, 140),
    "fifo": range(99),
    "rr": range(99),
    "deadline": range(-1, 0),
}


def ints(table: pa.Table, name: str) -> np.ndarray[Any, Any]:
    """A column of integers without nulls; shape (rows,), int64."""
    column = table[name]
    assert column.null_count == 0, name
    return np.asarray(column.to_numpy()).astype(np.int64)


def names(table: pa.Table, name: str) -> np.ndarray[Any, Any]:
    """A column of names; shape (rows,), None where null."""
    return np.array(table[name].to_pylist(), dtype=object)


def parts(table: pa.Table) -> dict[str, int]:
    """The sum of each cause over a table's rows, in ns."""
    return {cause: int(ints(table, f"{cause}_ns").sum()) for cause in CAUSES}


def check_causes(capture: Capture) -> None:
    """Assert what holds for every capture."""
    _check_waits(capture)
    _check_totals(capture)
    _check_slices(capture)


def _check_waits(capture: Capture) -> None:
    waits = capture.waits
    wait = ints(waits, "wait_ns")
    each = np.array([ints(waits, f"{cause}_ns") for cause in CAUSES])
    assert (each >= 0).all()
    assert (each.sum(axis=0) == wait).all()
    assert (ints(waits, "wakeup_ns") <= wait).all()
    elsewhere = waits["idle_elsewhere_ns"].fill_null(0).to_numpy().astype(np.int64)
    assert (elsewhere <= wait).all()
    throttled, by = ints(waits, "throttled_ns"), names(waits, "throttled_by")
    assert not [name for name, ns in zip(by, throttled, strict=True) if name is not None and not ns]
    start, run = ints(waits, "run_ns") - wait, ints(waits, "run_ns")
    assert (start > 0).all()
    order = np.lexsort((run, ints(waits, "tid")))
    tid = ints(waits, "tid")[order]
    same = tid[1:] == tid[:-1]
    assert (start[order][1:][same] >= run[order][:-1][same]).all(), "waits of a thread overlap"
    sleep = waits["sleep"].fill_null(-1).to_numpy()
    assert ((sleep >= -1) & (sleep < capture.sleeps.num_rows)).all()


def _check_totals(capture: Capture) -> None:
    quality = capture.manifest["quality"]
    totals, threads = capture.totals, capture.threads
    exact = parts(totals)
    assert sum(exact.values()) == int(ints(totals, "wait_ns").sum())
    for row in totals.to_pylist() + threads.to_pylist():
        assert sum(row[f"{cause}_ns"] for cause in CAUSES) == row["wait_ns"], row
    if not quality["lost_threads"]:
        assert parts(threads) == exact
    if rows_are_all(capture):
        assert parts(capture.waits) == exact


def rows_are_all(capture: Capture) -> bool:
    """Whether every wait that is counted has its row."""
    quality = capture.manifest["quality"]
    return capture.waits.num_rows == quality["waits"]


def _check_slices(capture: Capture) -> None:
    slices, waits = capture.slices, capture.waits
    if not slices.num_rows:
        return
    quality = capture.manifest["quality"]
    cause = names(slices, "cause")
    assert set(cause.tolist()) <= set(SLICED)
    tid, victim_tid = ints(slices, "tid"), ints(slices, "victim_tid")
    start, dur = ints(slices, "start_ns"), ints(slices, "dur_ns")
    assert (start > 0).all()
    assert (dur >= 0).all()

    interrupt = np.isin(cause, ("irq", "softirq"))
    policy = names(slices, "policy")
    assert (tid[interrupt] == -1).all()
    assert (tid[~interrupt] > 0).all()
    assert (tid != victim_tid).all(), "a thread is its own culprit"
    assert (pc.is_null(slices["comm"]).to_numpy() == interrupt).all()
    assert (pc.is_valid(slices["vector"]).to_numpy() == (cause == "softirq")).all()
    for name, prio in {*zip(policy[~interrupt], ints(slices, "prio")[~interrupt], strict=True)}:
        assert prio in _PRIORITIES[name], (name, prio)

    # References resolve.
    stack, weight = ints(slices, "stack"), ints(slices, "weight_ns")
    known = set(ints(capture.stacks, "id").tolist())
    assert set(stack.tolist()) <= known | {-1}
    assert (weight[stack >= 0] > 0).all()
    run = ints(slices, "victim_run_ns")
    index = {key: row for row, key in enumerate(wait_keys(capture))}
    wait_row = np.array(
        [index.get(key, -1) for key in zip(victim_tid.tolist(), run.tolist(), strict=True)]
    )
    lost = quality["lost_events"] or quality["degraded"]
    assert lost or (wait_row >= 0).all(), f"{(wait_row < 0).sum()} slices of no wait"
    found = wait_row >= 0

    # They lie in their wait, and the stays of threads on one CPU follow each other.
    wait_ns, wait_run = ints(waits, "wait_ns")[wait_row], ints(waits, "run_ns")[wait_row]
    assert (start >= wait_run - wait_ns)[found].all()
    assert (start + dur <= wait_run)[found].all()
    assert (wait_ns >= SLICED_FROM_NS)[found].all()
    tgid, victim_tgid = ints(slices, "tgid"), ints(waits, "tgid")[wait_row]
    of_user = found & ~interrupt & (cause != "kthread")
    assert ((tgid == victim_tgid) == (cause == "own"))[of_user].all()
    stays = np.flatnonzero(~interrupt & found)
    cpu = ints(slices, "cpu")
    order = stays[np.lexsort((start[stays], cpu[stays], wait_row[stays]))]
    same = (wait_row[order][1:] == wait_row[order][:-1]) & (cpu[order][1:] == cpu[order][:-1])
    same &= (ints(waits, "migrations") == 0)[wait_row[order][1:]]  # else one is read from afar
    assert (start[order][1:] >= (start + dur)[order][:-1])[same].all(), "slices overlap"

    _check_sums(capture, wait_row)


def _check_sums(capture: Capture, wait_row: np.ndarray[Any, Any]) -> None:
    """All slices of a wait are its parts; `wait_row`: the wait of each slice, -1 not known."""
    slices, waits, quality = capture.slices, capture.waits, capture.manifest["quality"]
    found, dur, cause = wait_row >= 0, ints(slices, "dur_ns"), names(slices, "cause")
    stays = np.flatnonzero(found & (ints(slices, "tid") >= 0))
    # What a CPU did before the thread was queued there (wakeup_ns) is a guess, and so is what it
    # did around a switch that no event was fired for.
    if quality["lost_slices"]:
        return
    stays_of = np.bincount(wait_row[stays], minlength=waits.num_rows)
    whole = (ints(waits, "wait_ns") >= SLICED_FROM_NS) & (stays_of < MOST_SLICES)
    if quality["degraded"]:
        whole &= np.bincount(wait_row[found], minlength=waits.num_rows) > 0
    # Who has the CPU that a thread is taken from is read from another one, mid-stay.
    guessed = ints(waits, "wakeup_ns") + 20_000 + 50_000 * (ints(waits, "migrations") > 0)
    differ = np.zeros(waits.num_rows, bool)
    for one in SLICED:
        mine = found & (cause == one)
        itemised = np.zeros(waits.num_rows, np.int64)
        np.add.at(itemised, wait_row[mine], dur[mine])
        part = ints(waits, f"{one}_ns")
        differ |= whole & (itemised != part)
        # Who it left behind on another CPU may have been forgotten there by now.
        missing = np.where(ints(waits, "migrations") == 0, part - itemised, 0)
        wrong = np.flatnonzero(whole & (np.maximum(itemised - part, missing) > guessed))
        examples = [
            f"{itemised[i]} of {part[i]} ns in {waits.slice(i, 1).to_pylist()}" for i in wrong[:3]
        ]
        # Slices are remembered without locks: of thousands, the odd one is cut short.
        assert len(wrong) <= 1 + 0.002 * whole.sum(), (
            f"{one} slices of {len(wrong)} of {whole.sum()} waits: {examples}"
        )
    stayed = whole & (ints(waits, "migrations") == 0)
    assert (differ & stayed).sum() <= 0.02 * stayed.sum() + 1


def wait_keys(capture: Capture) -> list[tuple[int, int]]:
    """What slices refer to waits by: (tid, run_ns) of each row of `waits`."""
    waits = capture.waits
    return list(zip(ints(waits, "tid").tolist(), ints(waits, "run_ns").tolist(), strict=True))
