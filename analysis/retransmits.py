"""Which waits lost TCP segments lengthened: evidence from time and ownership, not proof.

A wait is *lengthened* by as much of its blocked time as lies within a loss (losses.py). Three
grades tell how much speaks for it (`EVIDENCE`): that its thread was then the first to receive from
the socket; that its thread used the socket last, and the wait ended soon after one of the loss's
moments, a retransmit or the end; that it was under way then, in a process that owns the socket. A
wait has one loss, the one with the best evidence, then with the most overlap.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.acero  # or group_by imports it: later, as a user who may not be able to read it
import pyarrow.compute as pc

from latrace.analysis.chunks import chunks, names, numbers
from latrace.analysis.losses import (
    COLUMNS,
    KINDS,
    Losses,
    Moments,
    Tables,
    Times,
    kind_of,
    peers_of,
    rank_keys,
    read_losses,
)
from latrace.analysis.selection import Selection

READS: Final = frozenset(
    {
        *("read", "readv", "recvfrom", "recvmsg", "recvmmsg", "accept", "accept4", "splice"),
        *("select", "pselect6", "poll", "ppoll", "epoll_wait", "epoll_pwait", "epoll_pwait2"),
    }
)
"""System calls in which a thread may wait for something to read."""

CALLS: Final = READS | {
    *("connect", "write", "writev", "sendto", "sendmsg", "sendmmsg", "sendfile"),
}
"""System calls in which a thread waits for sockets."""

EVIDENCE: Final = ("read next", "its socket", "same process")
"""What speaks for a wait being lengthened, the best first. The last is told only of losses that
nothing better is known of, of one wait each, and counts nowhere."""
READ_NEXT, ITS_SOCKET, SAME_PROCESS = range(3)

SOON_NS: Final = 5_000_000
"""A read so soon after a wait is what the wait was for. With a round trip before it: a wait that
ends so soon after a retransmit may have been ended by it."""

_CALLS: Final = tuple(sorted(CALLS))
_READS: Final = np.array([name in READS for name in _CALLS])

_PAIRS = 1 << 20  # looked at in one go
_EVERYTHING = Selection()


@dataclass(frozen=True, slots=True)
class Lengthened:
    """The waits that losses lengthened, shape (waits,) each, in the order of the table `waits`."""

    row: Times
    """Which row of `waits`."""
    loss: npt.NDArray[np.intp]
    evidence: npt.NDArray[np.int8]
    """Index into `EVIDENCE`."""
    tid: npt.NDArray[np.int32]
    tgid: npt.NDArray[np.int32]
    call: npt.NDArray[np.int8]
    begin_ns: Times
    """When it blocked."""
    blocked_ns: Times
    overlap_ns: Times

    def __len__(self) -> int:
        return len(self.row)

    def syscall(self, at: int) -> str:
        """Name the call that one of them was blocked in."""
        return _CALLS[int(self.call[at])]

    @property
    def counts(self) -> npt.NDArray[np.bool_]:
        """Which of them count in totals and pictures."""
        return self.evidence < SAME_PROCESS


@dataclass(frozen=True, slots=True)
class Retransmits:
    """What a capture tells of lost segments."""

    rows: pa.Table
    """The chosen rows of `retransmits`, with `peer`."""
    losses: Losses
    """All of the capture."""
    waits: Lengthened
    loss_count: int
    """How many losses the chosen rows are of."""
    comms: Mapping[tuple[int, int], str]
    """Of threads, by (tid, tgid)."""


def read_retransmits(capture: Tables, selection: Selection = _EVERYTHING) -> Retransmits:
    """Read a capture's losses and the waits that they lengthened.

    Of a selection: retransmits and waits of its threads in its stretch of time; how long a wait
    for the CPU was does not matter. Raises CaptureError for a damaged file.
    """
    rows = capture.table("retransmits", columns=COLUMNS).unify_dictionaries()
    rows = rows.append_column("peer", pa.array(peers_of(rows), pa.utf8()))
    losses, of_row, reads = read_losses(rows, capture)
    moments = Moments(
        np.concatenate([numbers(rows, "ts_ns").astype(np.int64), losses.end_ns]),
        np.concatenate([numbers(rows, "tid"), losses.tid]),
        np.concatenate([of_row, np.arange(len(losses))]),
    )
    waits = _lengthened(capture, selection, losses, moments, reads)
    if not selection.everything:
        ts = numbers(rows, "ts_ns").astype(np.int64)
        chosen = _chosen(capture, selection, ts, numbers(rows, "tid"))
        rows, of_row = rows.filter(pa.array(chosen)), of_row[chosen]
    return Retransmits(rows, losses, waits, len(np.unique(of_row)), _comms(capture, waits))


def _comms(capture: Tables, waits: Lengthened) -> dict[tuple[int, int], str]:
    table = capture.table("threads", columns=("tid", "tgid", "comm"))
    table = table.filter(pc.is_in(table["tid"], value_set=pa.array(np.unique(waits.tid))))
    columns = (table[name].to_pylist() for name in ("tid", "tgid", "comm"))
    return {(tid, tgid): name or "" for tid, tgid, name in zip(*columns, strict=True)}


def _chosen(
    capture: Tables, selection: Selection, at_ns: Times, tid: npt.NDArray[Any]
) -> npt.NDArray[np.bool_]:
    start = capture.manifest.get("start_ns")
    when = Selection(since_ns=selection.since_ns, until_ns=selection.until_ns, tids=selection.tids)
    return when.mask(
        start_ns=start if isinstance(start, int) else 0, end_ns=at_ns, tid=tid, took_ns=at_ns
    )


# --- waits -------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Waits:
    """A piece of `waits`: those blocked in a call for sockets, by thread, then by time."""

    row: Times
    tid: npt.NDArray[np.int32]
    tgid: npt.NDArray[np.int32]
    call: npt.NDArray[np.int8]
    begin_ns: Times
    woken_ns: Times
    run_ns: Times
    tids: npt.NDArray[np.int32] = field(init=False)
    thread: npt.NDArray[np.intp] = field(init=False)

    def __post_init__(self) -> None:
        self.tids, self.thread = np.unique(self.tid, return_inverse=True)

    def under_way(self, tid: npt.NDArray[np.int32], at_ns: Times) -> npt.NDArray[np.intp]:
        """Tell in which wait each thread was at a moment; -1: in none."""
        at = self._first(tid, at_ns, self.woken_ns)
        safe = np.maximum(at, 0)
        return np.where((at >= 0) & (self.begin_ns[safe] <= at_ns), at, -1)

    def just_over(self, tid: npt.NDArray[np.int32], at_ns: Times) -> npt.NDArray[np.intp]:
        """Tell which wait each thread had come out of at a moment, just before; -1: of none."""
        after = self._first(tid, at_ns - SOON_NS, self.run_ns)
        # The last one up to the moment: there may be several within that time.
        last = self._place(tid, at_ns, self.run_ns, side="right") - 1
        safe = np.maximum(last, 0)
        good = (after >= 0) & (last >= after) & (self.tid[safe] == tid)
        return np.where(good, last, -1)

    def _first(
        self, tid: npt.NDArray[np.int32], at_ns: Times, times: Times
    ) -> npt.NDArray[np.intp]:
        """Find the first wait of a thread whose time is not before a moment; -1: none."""
        at = self._place(tid, at_ns, times, side="left")
        safe = np.minimum(at, len(self.tid) - 1)
        return np.where((at < len(self.tid)) & (self.tid[safe] == tid), at, -1)

    def _place(
        self, tid: npt.NDArray[np.int32], at_ns: Times, times: Times, *, side: str
    ) -> npt.NDArray[np.intp]:
        """Find where a thread's moment stands among its waits; `tid` without any: anywhere."""
        moments = np.sort(times)
        ours = rank_keys(self.thread, np.searchsorted(moments, times), moments)
        which = np.minimum(np.searchsorted(self.tids, tid), len(self.tids) - 1)
        rank = np.searchsorted(moments, at_ns, side=side)  # type: ignore[call-overload]
        # The rank among all threads' moments: every one of this thread below it is before.
        return np.searchsorted(ours, rank_keys(which, rank, moments), side="left")


def _lengthened(
    capture: Tables,
    selection: Selection,
    losses: Losses,
    moments: Moments,
    reads: Moments,
) -> Lengthened:
    """Find the waits: first by their threads, then what is left by their process."""
    pairs = _Pairs(losses)
    if not len(losses):
        return pairs.chosen()
    for waits in _pieces(capture, selection, losses):
        some = _between(waits, moments.ts_ns)
        at, loss = waits.under_way(moments.tid[some], moments.ts_ns[some]), moments.loss[some]
        soon = moments.ts_ns[some] + losses.trip_ns[loss] + SOON_NS
        at[waits.woken_ns[np.maximum(at, 0)] > soon] = -1
        pairs.add(waits, at, loss, ITS_SOCKET)
        some = _between(waits, reads.ts_ns)
        at = waits.just_over(reads.tid[some], reads.ts_ns[some])
        at[~_READS[waits.call[np.maximum(at, 0)]]] = -1
        pairs.add(waits, at, reads.loss[some], READ_NEXT)
    left = np.setdiff1d(np.arange(len(losses)), pairs.losses())
    if len(left):
        for waits in _pieces(capture, selection, losses):
            _of_process(pairs, waits, left[_between(waits, losses.last_ns[left])])
    return pairs.chosen()


def _between(waits: _Waits, at_ns: Times) -> npt.NDArray[np.intp]:
    """Tell which moments can matter to a piece of the table."""
    low, high = int(waits.begin_ns.min()), int(waits.run_ns.max()) + SOON_NS
    return np.flatnonzero((at_ns >= low) & (at_ns <= high))


def _of_process(pairs: _Pairs, waits: _Waits, left: npt.NDArray[np.intp]) -> None:
    """Add the waits of all threads of the owners of some losses."""
    losses = pairs.of
    first = np.unique(waits.thread, return_index=True)[1]
    owners = waits.tgid[first]
    for tgid in np.unique(losses.tgid[left]).tolist():
        threads = waits.tids[owners == tgid]
        mine = left[losses.tgid[left] == tgid]
        step = max(1, _PAIRS // max(1, len(threads)))
        for start in range(0, len(mine), step):
            some = mine[start : start + step]
            of, tid = np.repeat(some, len(threads)), np.tile(threads, len(some))
            pairs.add(waits, waits.under_way(tid, losses.last_ns[of]), of, SAME_PROCESS)


def _pieces(capture: Tables, selection: Selection, losses: Losses) -> Iterator[_Waits]:
    """Yield the waits of the sockets' owners, a piece of the table at a time."""
    before = 0
    owners = np.unique(losses.tgid)
    columns = ("tid", "tgid", "run_ns", "wait_ns", "blocked_ns", "syscall")
    for table in chunks(capture, "waits", columns):  # type: ignore[arg-type]
        codes, meanings = names(table, "syscall")
        known = np.full(len(meanings), -1, np.int8)  # the last one is of code -1
        for code, name in meanings.items():
            known[code] = _CALLS.index(name) if name in CALLS else -1
        call = known[codes]
        run = numbers(table, "run_ns").astype(np.int64)
        woken = run - numbers(table, "wait_ns").astype(np.int64)
        blocked = numbers(table, "blocked_ns").astype(np.int64)
        tid, tgid = numbers(table, "tid"), numbers(table, "tgid")
        wanted = (call >= 0) & (blocked > 0) & np.isin(tgid, owners)
        if not selection.everything:
            wanted &= _chosen(capture, selection, run, tid)
        mine = np.flatnonzero(wanted)
        if len(mine):
            mine = mine[np.lexsort((run[mine], tid[mine]))]
            yield _Waits(
                row=before + mine,
                tid=tid[mine],
                tgid=tgid[mine],
                call=call[mine],
                begin_ns=(woken - blocked)[mine],
                woken_ns=woken[mine],
                run_ns=run[mine],
            )
        before += table.num_rows


class _Pairs:
    """Waits and the losses that may have lengthened them."""

    def __init__(self, losses: Losses) -> None:
        self.of = losses
        self._parts: list[tuple[Any, ...]] = []

    def add(
        self,
        waits: _Waits,
        at: npt.NDArray[np.intp],
        loss: npt.NDArray[np.intp],
        evidence: int,
    ) -> None:
        """Take in the pairs that overlap; `at`: index in `waits`, -1: none."""
        loss, at = loss[at >= 0], at[at >= 0]
        begin, woken = waits.begin_ns[at], waits.woken_ns[at]
        starts = self.of.begin_ns[loss]
        # It began with the loss, as far as can be told.
        starts = np.where(begin >= self.of.early_ns[loss], begin, starts)
        overlap = np.minimum(woken, self.of.end_ns[loss]) - np.maximum(begin, starts)
        keep = np.flatnonzero(overlap > 0)
        if evidence == SAME_PROCESS:
            keep = keep[_most_of_each(loss[keep], overlap[keep], waits.row[at[keep]])]
        begin, woken = begin[keep], woken[keep]
        at, loss, overlap = at[keep], loss[keep], overlap[keep]
        if len(at):
            self._parts.append(
                (
                    waits.row[at],
                    loss,
                    np.full(len(at), evidence, np.int8),
                    waits.tid[at],
                    waits.tgid[at],
                    waits.call[at],
                    begin,
                    woken - begin,
                    overlap,
                )
            )

    def losses(self) -> npt.NDArray[np.intp]:
        """Tell which losses have a wait."""
        found = [part[1] for part in self._parts]
        return np.unique(np.concatenate(found)) if found else np.zeros(0, np.intp)

    def chosen(self) -> Lengthened:
        """Give each wait the loss that most speaks for."""
        types = (
            *(np.int64, np.intp, np.int8, np.int32, np.int32, np.int8),
            *(np.int64, np.int64, np.int64),
        )
        columns = [
            np.concatenate([np.zeros(0, kind), *(part[number] for part in self._parts)])
            for number, kind in enumerate(types)
        ]
        row, loss, evidence, *_, overlap = columns
        good, weak = (
            np.flatnonzero(evidence < SAME_PROCESS),
            np.flatnonzero(evidence >= SAME_PROCESS),
        )
        weak = weak[_most_of_each(loss[weak], overlap[weak], row[weak])]
        columns = [one[np.concatenate([good, weak])] for one in columns]
        row, loss, evidence, *_, overlap = columns
        order = np.lexsort((loss, -overlap, evidence, row))
        order = order[np.diff(row[order], prepend=-1) != 0]
        return Lengthened(*(one[order] for one in columns))


def _most_of_each(loss: npt.NDArray[np.intp], overlap: Times, row: Times) -> npt.NDArray[np.intp]:
    """Tell where each loss has most in common with a wait; of several, the first row."""
    order = np.lexsort((row, -overlap, loss))
    most: npt.NDArray[np.intp] = order[np.diff(loss[order], prepend=-1) != 0]
    return most


# --- for the report ----------------------------------------------------------------------------


def summarise_retransmits(found: Retransmits, *, top: int = 10) -> dict[str, Any]:
    """Sum up: `retransmits` in `latrace report --json`, at most `top` entries of each list.

    `lengthened_count`, `lengthened_ns` and `blocked_ns` are of all waits with good evidence, which
    come first in `lengthened`, the most lengthened before others; `weak_count` is of the others, of
    each loss the one that overlaps it most.
    """
    rows, losses, waits = found.rows, found.losses, found.waits
    peers: dict[str, dict[str, Any]] = {}
    by_kind: dict[str, dict[str, int]] = {}
    for peer, name, count, segs in _grouped(rows, ("peer", "kind")):
        kind = KINDS[kind_of(name or "")]
        entry = peers.setdefault(
            peer, {"peer": peer, "count": 0, "segs": 0, "connections": 0, "by_kind": {}}
        )
        of_kind = by_kind.setdefault(kind, {"count": 0, "segs": 0})
        for sums in (entry, of_kind):
            sums["count"] += count
            sums["segs"] += segs
        entry["by_kind"][kind] = entry["by_kind"].get(kind, 0) + count
    sockets = _grouped(rows, ("peer", "cookie"))
    for peer, *_ in sockets:
        peers[peer]["connections"] += 1
    good = waits.counts
    # The weak ones last, whatever their length.
    order = np.lexsort((waits.row, -waits.overlap_ns, ~good))
    listed = []
    for at in order[:top].tolist():
        loss, tid, tgid = int(waits.loss[at]), int(waits.tid[at]), int(waits.tgid[at])
        listed.append(
            {
                "tid": tid,
                "tgid": tgid,
                "comm": found.comms.get((tid, tgid), ""),
                "syscall": waits.syscall(at),
                "begin_ns": int(waits.begin_ns[at]),
                "blocked_ns": int(waits.blocked_ns[at]),
                "overlap_ns": int(waits.overlap_ns[at]),
                "peer": losses.peer[loss],
                "kinds": dict(losses.kinds[loss]),
                "evidence": EVIDENCE[int(waits.evidence[at])],
            }
        )
    return {
        "count": rows.num_rows,
        "segs": sum(kind["segs"] for kind in by_kind.values()),
        "by_kind": {name: by_kind[name] for name in KINDS if name in by_kind},
        "by_peer": sorted(peers.values(), key=lambda one: (-one["segs"], one["peer"]))[:top],
        "peers": len(peers),
        "connections": len({cookie for _, cookie, *_ in sockets}),
        "losses": found.loss_count,
        "lengthened_count": int(good.sum()),
        "lengthened_ns": int(waits.overlap_ns[good].sum()),
        "blocked_ns": int(waits.blocked_ns[good].sum()),
        "weak_count": int((~good).sum()),
        "lengthened": listed,
    }


def _grouped(rows: pa.Table, by: tuple[str, str]) -> list[tuple[Any, ...]]:
    """Give (*by, rows, segments) for each distinct `by`."""
    sums = rows.group_by(list(by)).aggregate([("ts_ns", "count"), ("segs", "sum")])
    columns = (sums[name].to_pylist() for name in (*by, "ts_ns_count", "segs_sum"))
    return [(*key, count, segs or 0) for *key, count, segs in zip(*columns, strict=True)]
