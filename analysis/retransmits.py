"""Which waits lost TCP segments lengthened: evidence from time and ownership, not proof.

What is recorded is when a segment was sent again, for what reason, and by whom its socket was used
last; when all that was lost had arrived (`recovered`); and which thread then was the first to
receive from the socket (`received`). From that a *loss* is made: the stretch of time in which
something that a socket had sent was missing.

It begins when the timer that ended in the first retransmit was set, that is so long before it:

- `rto`, `synack`, and `tlp` of a single segment: the retransmission timeout;
- `tlp` of several: twice the round trip and two ticks of the kernel's clock;
- `fast` and `unknown`: one round trip, as what told of it had to come back.

Timers fire late, by up to an eighth of their time and a few ticks: a wait that began so shortly
before is taken to have begun with the loss, as a request is sent and its answer waited for. (Not
so of a SYN-ACK: who waits for connections did so before.) Other waits count from the latest moment
that the segment can have been sent at, so what is said is rather too little.

It ends with the socket's next `recovered` event; without one (a loss probe that was answered does
not make one until more is sent) one round trip after the last retransmit, or with the next
`received` event if that is sooner. Of a SYN-ACK nothing is known after it. Losses of a socket that
overlap are one, as are timeouts that follow on one another.

A wait is *lengthened* by as much of its blocked time as lies within a loss. Three grades tell how
much speaks for it (`EVIDENCE`): that its thread was then the first to receive from the socket; that
its thread used the socket last, and the wait ended soon after one of the loss's moments, a
retransmit or the end; that it was under way then, in a process that owns the socket. A wait has one
loss, the one with the best evidence, then with the most overlap.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.acero  # or group_by imports it: later, as a user who may not be able to read it
import pyarrow.compute as pc

from latrace.analysis.chunks import chunks, names, numbers
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
KINDS: Final = ("rto", "fast", "tlp", "synack", "unknown")

_FIRST_TIMEOUT_NS = 1_000_000_000  # of a SYN-ACK (TCP_TIMEOUT_INIT); a SYN's is in its row
_TICK_NS = 4_000_000  # at 250 Hz, what distributions use most
# The timer wheel rounds up by at most an eighth (kernel/time/timer.c); a timer that was set as a
# loss probe's and became a timeout was rounded more than once.
_LATE_SHARE, _LATE_NS = 8, 3 * _TICK_NS
_EPHEMERAL = 32768
_PAIRS = 1 << 20  # looked at in one go
_EVERYTHING = Selection()

Times = npt.NDArray[np.int64]


class Tables(Protocol):
    """The part of `latrace.analysis.capture.Capture` that is read."""

    manifest: dict[str, Any]

    def table(self, name: str, *, columns: Sequence[str]) -> pa.Table: ...  # noqa: D102
    def batches(self, name: str, *, columns: Sequence[str]) -> Iterator[pa.Table]: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Losses:
    """Stretches of time in which sockets had lost something, shape (losses,) each."""

    cookie: npt.NDArray[np.uint64]
    tgid: npt.NDArray[np.int32]
    tid: npt.NDArray[np.int32]
    """Who had used the socket last, at the last retransmit."""
    early_ns: Times
    """The earliest that it can have begun."""
    begin_ns: Times
    """The latest that it can have begun."""
    first_ns: Times
    """The first retransmit."""
    last_ns: Times
    """The last retransmit."""
    end_ns: Times
    trip_ns: Times
    """The round trip; 0: not known."""
    peer: list[str]
    kinds: list[tuple[tuple[str, int], ...]]
    """How many retransmits of each kind, in the order of `KINDS`."""

    def __len__(self) -> int:
        return len(self.cookie)


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
    rows = capture.table("retransmits", columns=_COLUMNS).unify_dictionaries()
    rows = rows.append_column("peer", pa.array(_peers(rows), pa.utf8()))
    losses, of_row, reads = _losses(rows, capture)
    moments = _Moments(
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


# --- losses ------------------------------------------------------------------------------------

_COLUMNS: Final = (
    "ts_ns", "kind", "segs", "err", "saddr", "sport", "daddr", "dport", "state", "tgid", "tid",
    "cookie", "srtt_us", "rto_us", "in_flight",
)  # fmt: skip


def peer_name(address: str, port: int, own_port: int) -> str:
    """Name the other end: `10.0.0.5:5432`; a client, whose port says nothing, `10.0.0.9 -> :80`."""
    if own_port < _EPHEMERAL <= port:
        return f"{address} -> :{own_port}"
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _peers(rows: pa.Table) -> list[str]:
    columns = (rows[name].to_pylist() for name in ("daddr", "dport", "sport"))
    named: dict[tuple[Any, ...], str] = {}
    peers = []
    for key in zip(*columns, strict=True):
        if key not in named:
            address, port, own = key
            named[key] = peer_name(address or "?", port or 0, own or 0)
        peers.append(named[key])
    return peers


class _Moments(NamedTuple):
    """What threads did with sockets that had lost something, shape (moments,) each."""

    ts_ns: Times
    tid: npt.NDArray[np.int32]
    loss: npt.NDArray[np.intp]


def _losses(rows: pa.Table, capture: Tables) -> tuple[Losses, npt.NDArray[np.intp], _Moments]:
    """Make the losses; tell of each row of `rows` which one it is of, and who read then."""
    cookie = numbers(rows, "cookie").astype(np.uint64)
    ts = numbers(rows, "ts_ns").astype(np.int64)
    events = capture.table("socket_events", columns=("ts_ns", "event", "cookie", "tid"))
    recovered = _events(events, "recovered")
    received = _events(events, "received")
    # By socket, then by time. Events are looked up by the rank of their socket among these.
    order = np.lexsort((ts, cookie))
    sockets, socket = np.unique(cookie[order], return_inverse=True)
    ts = ts[order]
    over_at = _next(sockets, socket, ts, recovered)
    read_at = _next(sockets, socket, ts, received)
    kind, kinds = names(rows, "kind")
    kind = np.array([_kind(kinds[code]) for code in kind[order].tolist()], np.intp)
    waited = _waited(rows, order, kind)
    trip = np.maximum(numbers(rows, "srtt_us")[order].astype(np.int64), 0) * 1000
    trip[kind == KINDS.index("synack")] = 0
    known = (over_at >= 0) & (kind != KINDS.index("tlp"))
    end = np.where(read_at >= 0, np.minimum(ts + trip, np.maximum(read_at, ts)), ts + trip)
    # A socket that never was all right again until somebody received from it.
    end = np.where(~known & _recovering(kind) & (read_at >= 0), read_at, end)
    end = np.where(known, over_at, end)
    late = np.select(
        [kind == KINDS.index(name) for name in ("fast", "unknown", "synack")],
        [trip, trip, np.zeros_like(trip)],
        np.maximum(waited // _LATE_SHARE, _LATE_NS),
    )
    begin = ts - waited
    # Within one recovery, or one handshake, only the first row tells when it began.
    one = known[1:] & known[:-1] & (over_at[1:] == over_at[:-1])
    one |= (kind[1:] == KINDS.index("synack")) & (kind[:-1] == KINDS.index("synack"))
    follows = 1 + np.flatnonzero(one & (socket[1:] == socket[:-1]))
    begin[follows], late[follows] = ts[follows - 1], 0

    number = _join(socket, begin, begin - late, end, known)
    count = int(number[-1]) + 1 if len(number) else 0
    first = np.flatnonzero(np.diff(number, prepend=-1))
    last = np.append(first[1:], len(number))[:count] - 1
    lowest = _reduced(np.minimum, begin, first)
    ended = _reduced(np.maximum, end, first)
    early = np.minimum(_reduced(np.minimum, begin - late, first), lowest)
    # What was over is not part of the next.
    same = socket[first][1:] == socket[first][:-1]
    early[1:] = np.where(same, np.maximum(early[1:], np.minimum(ended[:-1], lowest[1:])), early[1:])
    many = np.zeros((count, len(KINDS)), np.int64)
    np.add.at(many, (number, kind), 1)
    tgid, tid = numbers(rows, "tgid")[order], numbers(rows, "tid")[order]
    peers = rows["peer"].take(pa.array(order[first])).to_pylist()
    losses = Losses(
        cookie=sockets[socket[first]],
        tgid=tgid[last],
        tid=tid[last],
        early_ns=early,
        begin_ns=lowest,
        first_ns=ts[first],
        last_ns=ts[last],
        end_ns=ended,
        trip_ns=trip[last],
        peer=peers,
        kinds=[
            tuple((name, amount) for name, amount in zip(KINDS, line, strict=True) if amount)
            for line in many.tolist()
        ],
    )
    of_row = np.empty(len(ts), np.intp)
    of_row[order] = number
    return losses, of_row, _reads(sockets, socket[first], ts[first], received)


def _kind(name: str) -> int:
    return KINDS.index(name if name in KINDS else "unknown")


def _recovering(kind: npt.NDArray[np.intp]) -> npt.NDArray[np.bool_]:
    recovers: npt.NDArray[np.bool_] = np.isin(kind, [KINDS.index("rto"), KINDS.index("fast")])
    return recovers


def _waited(rows: pa.Table, order: npt.NDArray[np.intp], kind: npt.NDArray[np.intp]) -> Times:
    """Tell of each retransmit how long before it (ns) what it repeats was sent, at least."""
    trip = np.maximum(numbers(rows, "srtt_us")[order].astype(np.int64), 1) * 1000
    timeout = numbers(rows, "rto_us")[order].astype(np.int64) * 1000
    probe = np.minimum(2 * trip + 2 * _TICK_NS, timeout)
    alone = numbers(rows, "in_flight")[order] <= 1
    return np.select(
        [kind == KINDS.index(name) for name in ("rto", "tlp", "synack")],
        [timeout, np.where(alone, timeout, probe), np.full(len(kind), _FIRST_TIMEOUT_NS)],
        trip,
    ).astype(np.int64)


class _Events(NamedTuple):
    """Events of one kind, by socket, then by time, shape (events,) each."""

    cookie: npt.NDArray[np.uint64]
    ts_ns: Times
    tid: npt.NDArray[np.int32]


def _events(table: pa.Table, event: str) -> _Events:
    table = table.filter(pc.equal(pc.cast(table["event"], pa.utf8()), event))
    cookie = numbers(table, "cookie").astype(np.uint64)
    ts = numbers(table, "ts_ns").astype(np.int64)
    order = np.lexsort((ts, cookie))
    return _Events(cookie[order], ts[order], numbers(table, "tid")[order])


def _next(
    sockets: npt.NDArray[np.uint64], socket: npt.NDArray[np.intp], ts: Times, events: _Events
) -> Times:
    """Tell of each (socket, time) when the socket's next event was, then or later; -1: never."""
    if not len(events.ts_ns) or not len(ts):
        return np.full(len(ts), -1, np.int64)
    moments = np.sort(events.ts_ns)
    ours = _keys(
        np.searchsorted(sockets, events.cookie), np.searchsorted(moments, events.ts_ns), moments
    )
    wanted = _keys(socket, np.searchsorted(moments, ts), moments)
    # Retransmits may have been lost on the way to us while events were not.
    real = sockets[np.minimum(np.searchsorted(sockets, events.cookie), len(sockets) - 1)]
    ours, times = ours[real == events.cookie], events.ts_ns[real == events.cookie]
    if not len(ours):
        return np.full(len(ts), -1, np.int64)
    at = np.minimum(np.searchsorted(ours, wanted), len(ours) - 1)
    found = (ours[at] >= wanted) & (ours[at] // (len(moments) + 1) == socket)
    return np.where(found, times[at], -1)


def _keys(group: npt.NDArray[Any], rank: npt.NDArray[np.intp], moments: Times) -> Times:
    """Make one number of a group and the rank of a time: they sort alike."""
    return group.astype(np.int64) * (len(moments) + 1) + rank


def _join(
    socket: npt.NDArray[np.intp],
    begin: Times,
    early: Times,
    end: Times,
    known: npt.NDArray[np.bool_],
) -> npt.NDArray[np.intp]:
    """Number the losses: of each row (by socket, then by time) which one it is of."""
    number = np.empty(len(socket), np.intp)
    current, holder, until, sure = -1, -1, 0, True
    lines = zip(*(a.tolist() for a in (socket, begin, early, end, known)), strict=True)
    for row, (owner, starts, earliest, ends, over) in enumerate(lines):
        # A timer that was set when a probe went out, and fired late, leaves no gap.
        if owner != holder or (starts if sure else earliest) > until:
            current, holder, until, sure = current + 1, owner, ends, over
        elif ends >= until:
            until, sure = ends, over
        number[row] = current
    return number


def _reduced(how: np.ufunc, values: Times, first: npt.NDArray[np.intp]) -> Times:
    reduced: Times = how.reduceat(values, first) if len(first) else values[:0]
    return reduced


def _reads(
    sockets: npt.NDArray[np.uint64],
    socket: npt.NDArray[np.intp],
    first_ns: Times,
    received: _Events,
) -> _Moments:
    """Tell which loss each read came after: the socket's last one that had begun by then.

    `socket`, `first_ns`: of each loss.
    """
    if not len(socket) or not len(received.ts_ns):
        return _Moments(received.ts_ns[:0], received.tid[:0], np.zeros(0, np.intp))
    moments = np.sort(first_ns)
    begun = _keys(socket, np.searchsorted(moments, first_ns, side="right"), moments)
    of = np.minimum(np.searchsorted(sockets, received.cookie), len(sockets) - 1)
    wanted = _keys(of, np.searchsorted(moments, received.ts_ns, side="right"), moments)
    at = np.searchsorted(begun, wanted, side="right") - 1
    real = (at >= 0) & (sockets[of] == received.cookie)
    real &= socket[np.maximum(at, 0)] == of
    return _Moments(received.ts_ns[real], received.tid[real], at[real])


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
        ours = _keys(self.thread, np.searchsorted(moments, times), moments)
        which = np.minimum(np.searchsorted(self.tids, tid), len(self.tids) - 1)
        rank = np.searchsorted(moments, at_ns, side=side)  # type: ignore[call-overload]
        # The rank among all threads' moments: every one of this thread below it is before.
        return np.searchsorted(ours, _keys(which, rank, moments), side="left")


def _lengthened(
    capture: Tables,
    selection: Selection,
    losses: Losses,
    moments: _Moments,
    reads: _Moments,
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
        kind = KINDS[_kind(name or "")]
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
