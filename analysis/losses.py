"""Losses: the stretches of time in which something that a TCP socket had sent was missing.

What is recorded is when a segment was sent again, for what reason, and by whom its socket was used
last; when all that was lost had arrived (`recovered`); and which thread then was the first to
receive from the socket (`received`). From that a loss is made.

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
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from latrace.analysis.chunks import names, numbers
from latrace.analysis.words import endpoint

KINDS: Final = ("rto", "fast", "tlp", "synack", "unknown")

_FIRST_TIMEOUT_NS = 1_000_000_000  # of a SYN-ACK (TCP_TIMEOUT_INIT); a SYN's is in its row
_TICK_NS = 4_000_000  # at 250 Hz, what distributions use most
# The timer wheel rounds up by at most an eighth (kernel/time/timer.c); a timer that was set as a
# loss probe's and became a timeout was rounded more than once.
_LATE_SHARE, _LATE_NS = 8, 3 * _TICK_NS
_EPHEMERAL = 32768

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


COLUMNS: Final = (
    "ts_ns", "kind", "segs", "err", "saddr", "sport", "daddr", "dport", "state", "tgid", "tid",
    "cookie", "srtt_us", "rto_us", "in_flight",
)  # fmt: skip


def peer_name(address: str, port: int, own_port: int) -> str:
    """Name the other end: `10.0.0.5:5432`; a client, whose port says nothing, `10.0.0.9 -> :80`."""
    if own_port < _EPHEMERAL <= port:
        return f"{address} -> :{own_port}"
    return endpoint(address, port)


def peers_of(rows: pa.Table) -> list[str]:
    """Name the other end of each row."""
    columns = (rows[name].to_pylist() for name in ("daddr", "dport", "sport"))
    named: dict[tuple[Any, ...], str] = {}
    peers = []
    for key in zip(*columns, strict=True):
        if key not in named:
            address, port, own = key
            named[key] = peer_name(address or "?", port or 0, own or 0)
        peers.append(named[key])
    return peers


class Moments(NamedTuple):
    """What threads did with sockets that had lost something, shape (moments,) each."""

    ts_ns: Times
    tid: npt.NDArray[np.int32]
    loss: npt.NDArray[np.intp]


def read_losses(rows: pa.Table, capture: Tables) -> tuple[Losses, npt.NDArray[np.intp], Moments]:
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
    kind = np.array([kind_of(kinds[code]) for code in kind[order].tolist()], np.intp)
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


def kind_of(name: str) -> int:
    """Tell the place of a kind in `KINDS`; one that is not known there is `unknown`."""
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
    ours = rank_keys(
        np.searchsorted(sockets, events.cookie), np.searchsorted(moments, events.ts_ns), moments
    )
    wanted = rank_keys(socket, np.searchsorted(moments, ts), moments)
    # Retransmits may have been lost on the way to us while events were not.
    real = sockets[np.minimum(np.searchsorted(sockets, events.cookie), len(sockets) - 1)]
    ours, times = ours[real == events.cookie], events.ts_ns[real == events.cookie]
    if not len(ours):
        return np.full(len(ts), -1, np.int64)
    at = np.minimum(np.searchsorted(ours, wanted), len(ours) - 1)
    found = (ours[at] >= wanted) & (ours[at] // (len(moments) + 1) == socket)
    return np.where(found, times[at], -1)


def rank_keys(group: npt.NDArray[Any], rank: npt.NDArray[np.intp], moments: Times) -> Times:
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
) -> Moments:
    """Tell which loss each read came after: the socket's last one that had begun by then.

    `socket`, `first_ns`: of each loss.
    """
    if not len(socket) or not len(received.ts_ns):
        return Moments(received.ts_ns[:0], received.tid[:0], np.zeros(0, np.intp))
    moments = np.sort(first_ns)
    begun = rank_keys(socket, np.searchsorted(moments, first_ns, side="right"), moments)
    of = np.minimum(np.searchsorted(sockets, received.cookie), len(sockets) - 1)
    wanted = rank_keys(of, np.searchsorted(moments, received.ts_ns, side="right"), moments)
    at = np.searchsorted(begun, wanted, side="right") - 1
    real = (at >= 0) & (sockets[of] == received.cookie)
    real &= socket[np.maximum(at, 0)] == of
    return Moments(received.ts_ns[real], received.tid[real], at[real])
