"""The TCP connections of the targets: who has them open, and what the kernel counted for each.

Who: an iterator over all open files (lat_iter_sockets), when the trace begins and when it ends.
What: TCP_INFO through sock_diag(7), asked with pyroute2 in the connection's own network namespace
at the same two moments; a connection that was closed in between has told it then (RECORD_CLOSED).
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from . import bpf
from .records import OWNER
from .sockets import FAMILIES, STATES, address_columns, rto_us

if TYPE_CHECKING:
    from .loader import Probes

INFO: Final[Mapping[str, str]] = {
    "rtt_us": "tcpi_rtt",
    "rttvar_us": "tcpi_rttvar",
    "rto_us": "tcpi_rto",
    "cwnd": "tcpi_snd_cwnd",
    "ssthresh": "tcpi_snd_ssthresh",
    "total_retrans": "tcpi_total_retrans",
    "segs_out": "tcpi_segs_out",
    "segs_in": "tcpi_segs_in",
    "bytes_sent": "tcpi_bytes_sent",
    "bytes_retrans": "tcpi_bytes_retrans",
    "bytes_acked": "tcpi_bytes_acked",
    "bytes_received": "tcpi_bytes_received",
    "delivery_rate": "tcpi_delivery_rate",
}
"""Column of `connections`, without its `start_` or `end_` ← field of struct tcp_info."""

_ANSWERED: Final = 1 << 1 | 1 << 3  # include/uapi/linux/inet_diag.h: INET_DIAG_INFO, _CONG
_NO_CONNECTIONS: Final = {"listen", "time-wait", "close", "new-syn-recv"}
_CLONE_NEWNET: Final = 0x40000000


@dataclass(slots=True)
class _Connection:
    """A connection that was open when we looked."""

    row: dict[str, Any]
    """The columns that never change."""
    start: dict[str, int]
    """TCP_INFO when the trace began; empty for one that came later."""
    end: dict[str, int] = field(default_factory=dict)
    owners: set[int] = field(default_factory=set)


class Connections:
    """Follows the connections of one trace, if its probes see any."""

    def __init__(self, probes: Probes) -> None:
        self._iterator = probes.programs.get("lat_iter_sockets")
        self._open: dict[int, _Connection] = {}
        self.refused: str | None = None
        """Why the kernel's statistics could not be read, if that is so."""

    def begin(self) -> None:
        """Note the connections that are there, and make their owners known to the probes."""
        for connection in self._look():
            self._open[connection.row["cookie"]] = connection

    def closed(self, rows: npt.NDArray[np.void]) -> dict[str, Any]:
        """Columns of the table `connections`; `rows`: closed ones, shape (n,) of dtype SOCKET."""
        known = [self._open.pop(cookie, None) for cookie in rows["cookie"].tolist()]
        rate = rows["rate_delivered"].astype(np.uint64) * rows["mss"] * np.uint64(1_000_000)
        last = {
            name: rows[name].astype(np.uint64).tolist()
            for name in INFO
            if name not in {"rtt_us", "rto_us", "delivery_rate"}
        }
        last["rtt_us"] = rows["srtt_us"].tolist()
        last["rto_us"] = rto_us(rows).tolist()
        last["delivery_rate"] = (rate // np.maximum(rows["rate_interval_us"], 1)).tolist()
        tgids = rows["tgid"].tolist()
        return {
            **address_columns(rows),
            "cookie": rows["cookie"],
            "netns": rows["netns"].astype(np.uint64),
            "tgid": rows["tgid"],
            "owners": [
                sorted({tgid} | (each.owners if each else set()))
                for tgid, each in zip(tgids, known, strict=True)
            ],
            "state": ["close"] * len(rows),
            "congestion": [each.row["congestion"] if each else "" for each in known],
            "closed_ns": rows["ts_ns"],
            **{
                f"start_{name}": [each.start.get(name) if each else None for each in known]
                for name in INFO
            },
            **{f"end_{name}": last[name] for name in INFO},
        }

    def finish(self) -> dict[str, Any]:
        """Columns of the table `connections`: those that are open; empty where there are none."""
        for now in self._look():
            before = self._open.pop(now.row["cookie"], None)
            now.end, now.start = now.start, before.start if before else {}
            now.owners |= before.owners if before else set()
            self._open[now.row["cookie"]] = now
        # Those that were there at the start and are not now had their end lost, or went to others.
        rows = list(self._open.values())
        if not rows:
            return {}
        return {
            **{name: [each.row[name] for each in rows] for name in rows[0].row},
            "owners": [sorted(each.owners) for each in rows],
            "closed_ns": [None] * len(rows),
            **{f"start_{name}": [each.start.get(name) for each in rows] for name in INFO},
            **{f"end_{name}": [each.end.get(name) for each in rows] for name in INFO},
        }

    def _look(self) -> list[_Connection]:
        """Ask who has which connection open, and for its TCP_INFO (in `start`)."""
        if self._iterator is None:
            return []
        records = np.frombuffer(bpf.read_iterator(self._iterator), OWNER)
        owners: dict[int, set[int]] = {}
        homes: dict[int, set[int]] = {}
        retrans: dict[int, int] = {}
        for cookie, tgid, netns, total, state in records.tolist():
            if STATES[state] in _NO_CONNECTIONS:
                continue
            owners.setdefault(cookie, set()).add(tgid)
            homes.setdefault(netns, set()).add(tgid)
            retrans[cookie] = total
        found = []
        for netns, tgids in homes.items():
            for answer in self._ask(netns, tgids):
                cookie = answer["idiag_cookie"]
                if cookie not in owners:
                    continue
                each = _connection(answer, netns, owners[cookie])
                # As the probes had it: the answer may be newer than the last row before it.
                if cookie not in self._open:
                    each.start["total_retrans"] = retrans[cookie]
                found.append(each)
        return found

    def _ask(self, netns: int, tgids: Iterable[int]) -> Iterable[Any]:
        """Ask in a network namespace; it is entered by way of a process that lives in it."""
        answers: list[Any] = []
        failed: list[Exception] = []

        def ask() -> None:
            try:
                answers.extend(_statistics(fd))
            except Exception as error:  # of the library too; told by the capture's manifest
                failed.append(error)

        for tgid in tgids:
            try:
                fd = os.open(f"/proc/{tgid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                continue
            try:
                if os.fstat(fd).st_ino != netns:
                    continue
                # The namespace is a thread's own: this one ends in it.
                thread = threading.Thread(target=ask, name="latrace-diag")
                thread.start()
                thread.join()
            finally:
                os.close(fd)
            break
        if failed:
            self.refused = str(failed[0]) or type(failed[0]).__name__
        return answers


def _statistics(namespace: int) -> list[Any]:
    """Enter a namespace, for good, and ask for what `ss -ti` shows."""
    from pyroute2 import DiagSocket  # noqa: PLC0415 - heavy, after the probes are attached

    if ctypes.CDLL(None, use_errno=True).setns(namespace, _CLONE_NEWNET):  # os.setns: Python 3.12
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    wanted = sum(1 << n for n, name in enumerate(STATES) if name and name not in _NO_CONNECTIONS)
    answers: list[Any] = []
    with DiagSocket() as diag:
        diag.bind()
        for family in FAMILIES:
            answers += diag.get_sock_stats(family=family, states=wanted, extensions=_ANSWERED)
    return answers


def _connection(answer: Any, netns: int, owners: set[int]) -> _Connection:
    """`answer`: an inet_diag_msg and its attributes."""
    attributes = dict(answer["attrs"])
    info = attributes.get("INET_DIAG_INFO") or {}
    return _Connection(
        {
            "cookie": answer["idiag_cookie"],
            "netns": netns,
            "family": FAMILIES[answer["idiag_family"]],
            "saddr": _plain(answer["idiag_src"]),
            "sport": answer["idiag_sport"],
            "daddr": _plain(answer["idiag_dst"]),
            "dport": answer["idiag_dport"],
            "tgid": min(owners),
            "state": STATES[answer["idiag_state"]],
            "congestion": attributes.get("INET_DIAG_CONG", ""),
        },
        {name: info[known] for name, known in INFO.items() if known in info},
        owners=owners,
    )


def _plain(address: str) -> str:
    parsed = ipaddress.ip_address(address)
    return str(getattr(parsed, "ipv4_mapped", None) or parsed)
