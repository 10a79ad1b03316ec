"""Which waits a lost TCP segment lengthened: evidence from time and ownership, not proof.

A segment is lost when it is sent and found out later. What is known is when it was sent again, for
what reason, and when all that was lost had arrived. A *loss* of a socket lasts from `lost_ns` to
the end of its recovery:

- `rto`: the timer ran for `rto_us` before it fired, so the loss began at least that long before;
- `fast`, `tlp`: the acknowledgement of what was lost was due one round trip after it was sent;
- it ends with the event `recovered` of that socket, and where there is none (a loss probe that was
  answered) one round trip after the last retransmit.

Losses of a socket that overlap are one. A blocking call of the process that owns the socket is
lengthened by as much of its blocked time as lies within a loss. The thread that read from the
socket first afterwards is the one that had waited for it; of others only the overlap is known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from latrace.analysis.capture import Capture
from latrace.analysis.chunks import chunks, names, numbers

CALLS: Final = frozenset(
    {
        *("read", "readv", "recvfrom", "recvmsg", "recvmmsg", "accept", "accept4", "connect"),
        *("write", "writev", "sendto", "sendmsg", "sendmmsg", "sendfile", "splice"),
        *("select", "pselect6", "poll", "ppoll", "epoll_wait", "epoll_pwait", "epoll_pwait2"),
    }
)
"""System calls in which a thread waits for sockets."""

READ_WITHIN_NS: Final = 10_000_000
"""A read so soon after a wait is what the wait was for."""


@dataclass(frozen=True, slots=True)
class Loss:
    """A stretch of time in which a socket had lost something."""

    cookie: int
    tgid: int
    peer: str
    begin_ns: int
    end_ns: int
    kinds: tuple[str, ...]
    """Of its retransmits, in order."""


@dataclass(frozen=True, slots=True)
class Lengthened:
    """A blocking call that a loss lies in."""

    loss: Loss
    tid: int
    syscall: str
    begin_ns: int
    blocked_ns: int
    overlap_ns: int
    read_next: bool
    """Whether the thread then was the first to read from that socket."""


def losses(capture: Capture) -> list[Loss]:
    """Tell the losses of all sockets, by when they began."""
    ended: dict[int, list[int]] = {}
    for row in capture.table("socket_events", columns=("cookie", "event", "ts_ns")).to_pylist():
        if row["event"] == "recovered":
            ended.setdefault(row["cookie"], []).append(row["ts_ns"])
    by_socket: dict[int, list[dict[str, Any]]] = {}
    for row in capture.table("retransmits").to_pylist():
        by_socket.setdefault(row["cookie"], []).append(row)
    found: list[Loss] = []
    for cookie, rows in by_socket.items():
        rows.sort(key=lambda row: row["ts_ns"])
        found += _joined(rows, np.sort(np.array(ended.get(cookie, []), np.int64)))
    return sorted(found, key=lambda loss: loss.begin_ns)


def _joined(rows: Sequence[Mapping[str, Any]], recovered: npt.NDArray[np.int64]) -> Iterator[Loss]:
    """Yield the losses of one socket; `rows`: its retransmits in order."""
    held: Loss | None = None
    for row in rows:
        trip_ns = max(row["srtt_us"], 1) * 1000
        begin = row["ts_ns"] - (row["rto_us"] * 1000 if row["kind"] == "rto" else trip_ns)
        at = int(np.searchsorted(recovered, row["ts_ns"]))
        recovers = row["kind"] in ("rto", "fast") and at < len(recovered)
        end = int(recovered[at]) if recovers else row["ts_ns"] + trip_ns
        if held is not None and begin <= held.end_ns:
            kinds, begin, end = held.kinds, min(held.begin_ns, begin), max(held.end_ns, end)
        else:
            if held is not None:
                yield held
            kinds = ()
        held = Loss(
            cookie=row["cookie"],
            tgid=row["tgid"],
            peer=f"{row['daddr']}:{row['dport']}"
            if ":" not in row["daddr"]
            else f"[{row['daddr']}]:{row['dport']}",
            begin_ns=begin,
            end_ns=end,
            kinds=(*kinds, row["kind"]),
        )
    if held is not None:
        yield held


def lengthened(capture: Capture, found: Sequence[Loss]) -> list[Lengthened]:
    """Tell which recorded waits of the sockets' owners had a loss in them, the most first."""
    if not found:
        return []
    reads: dict[tuple[int, int], list[int]] = {}
    for row in capture.table("socket_events").to_pylist():
        if row["event"] == "received":
            reads.setdefault((row["cookie"], row["tid"]), []).append(row["ts_ns"])
    by_owner: dict[int, list[Loss]] = {}
    for loss in found:
        by_owner.setdefault(loss.tgid, []).append(loss)
    hurt: list[Lengthened] = []
    columns = ("tid", "tgid", "run_ns", "wait_ns", "blocked_ns", "syscall")
    for table in chunks(capture, "waits", columns):
        codes, meanings = names(table, "syscall")
        called = np.isin(codes, [code for code, name in meanings.items() if name in CALLS])
        woken = numbers(table, "run_ns").astype(np.int64) - numbers(table, "wait_ns").astype(
            np.int64
        )
        blocked = numbers(table, "blocked_ns").astype(np.int64)
        tid, tgid = numbers(table, "tid"), numbers(table, "tgid")
        for owner, theirs in by_owner.items():
            mine = np.flatnonzero(called & (tgid == owner) & (blocked > 0))
            for loss in theirs:
                overlap = np.minimum(woken[mine], loss.end_ns) - np.maximum(
                    woken[mine] - blocked[mine], loss.begin_ns
                )
                for row in mine[overlap > 0].tolist():
                    end = int(woken[row])
                    hurt.append(
                        Lengthened(
                            loss=loss,
                            tid=int(tid[row]),
                            syscall=meanings[int(codes[row])],
                            begin_ns=end - int(blocked[row]),
                            blocked_ns=int(blocked[row]),
                            overlap_ns=min(end, loss.end_ns)
                            - max(end - int(blocked[row]), loss.begin_ns),
                            read_next=any(
                                end <= at <= end + READ_WITHIN_NS
                                for at in reads.get((loss.cookie, int(tid[row])), ())
                            ),
                        )
                    )
    return sorted(hurt, key=lambda one: (not one.read_next, -one.overlap_ns))
