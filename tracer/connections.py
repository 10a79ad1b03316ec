"""The TCP connections of the targets: who has them open, and what the kernel counted for each.

Who: an iterator over all open files (lat_iter_sockets), when the trace begins and when it ends.
What: TCP_INFO. When the trace begins, through sock_diag(7), asked with pyroute2 in the connection's
own network namespace; when it ends, as the probes read it from each socket at once, whether or not
somebody has it open. A connection that was closed in between has told it then (RECORD_CLOSED).
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from . import bpf
from .records import OWNER, SOCKET
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
_GONE: Final = {"time-wait", "close", "new-syn-recv"}
_NO_CONNECTIONS: Final = {"listen", *_GONE}
_CLONE_NEWNET: Final = 0x40000000


@dataclass(frozen=True, slots=True)
class _Seen:
    """A connection as it was when we looked."""

    owners: frozenset[int]
    total_retrans: int = 0
    """As the probes have it: the segments of all rows before."""
    congestion: str = ""
    info: Mapping[str, int] = field(default_factory=dict)


_UNSEEN: Final = _Seen(frozenset())


class Connections:
    """Follows the connections of one trace, if its probes see any."""

    def __init__(self, probes: Probes) -> None:
        self._open_files = probes.programs.get("lat_iter_sockets")
        self._sockets = probes.programs.get("lat_iter_storage")
        self._map = probes.maps.get("lat_sockets")
        self._before: dict[int, _Seen] = {}
        self.refused: str | None = None
        """Why the kernel's statistics could not be read, if that is so."""

    def begin(self) -> None:
        """Note the connections that are there, and make their owners known to the probes."""
        self._before = self._look()

    def now(self) -> Mapping[int, _Seen]:
        """The connections that the probes know as they are now, for `begin_at`."""
        rows = self._all_sockets()
        counted = (rows["total_retrans"] - rows["segs"]).tolist()
        tgids, cookies = rows["tgid"].tolist(), rows["cookie"].tolist()
        return {
            cookie: replace(
                self._before.get(cookie, _Seen(frozenset({tgid}))), total_retrans=total, info=info
            )
            for cookie, tgid, total, info in zip(cookies, tgids, counted, _infos(rows), strict=True)
        }

    def begin_at(self, seen: Mapping[int, _Seen]) -> None:
        """Tell of the connections from that moment on."""
        self._before = dict(seen)

    def closed(self, rows: npt.NDArray[np.void]) -> dict[str, Any]:
        """Columns of the table `connections`; `rows`: closed ones, shape (n,) of dtype SOCKET."""
        columns = self._columns(rows, {})
        columns |= {"state": ["close"] * len(rows), "closed_ns": rows["ts_ns"]}
        for cookie in rows["cookie"].tolist():
            self._before.pop(cookie, None)
        return columns

    def finish(self) -> tuple[dict[str, Any], npt.NDArray[np.void]]:
        """Tell of those that are not closed, and of who listens, once the probes are detached.

        Returns columns of the table `connections`, empty where there are none, and retransmits
        that no event was fired for, shape (n,) of dtype SOCKET.
        """
        rows = self._all_sockets()
        rows = rows[~np.isin(rows["state"], [STATES.index(name) for name in _GONE])]
        if not len(rows):
            return {}, rows
        columns = self._columns(rows, self._look()) | {"closed_ns": [None] * len(rows)}
        return columns, rows[rows["segs"] > 0]

    def _all_sockets(self) -> npt.NDArray[np.void]:
        """The sockets that the probes know, as they are now: shape (n,) of dtype SOCKET."""
        raw = b"" if self._sockets is None else bpf.read_iterator(self._sockets, self._map)
        return np.frombuffer(raw, SOCKET)

    def _columns(self, rows: npt.NDArray[np.void], now: Mapping[int, _Seen]) -> dict[str, Any]:
        """All columns but `closed_ns`; `now`: what else is known of these sockets."""
        cookies = rows["cookie"].tolist()
        before = [self._before.get(cookie, _UNSEEN) for cookie in cookies]
        after = [now.get(cookie, _UNSEEN) for cookie in cookies]
        last = _infos(rows)
        return {
            "cookie": rows["cookie"],
            "netns": rows["netns"].astype(np.uint64),
            **address_columns(rows),
            "tgid": rows["tgid"],
            "owners": [
                sorted({tgid, *was.owners, *is_.owners})
                for tgid, was, is_ in zip(rows["tgid"].tolist(), before, after, strict=True)
            ],
            "state": [STATES[state] for state in rows["state"].tolist()],
            "congestion": [
                is_.congestion or was.congestion for was, is_ in zip(before, after, strict=True)
            ],
            **{f"start_{name}": [was.info.get(name) for was in before] for name in INFO},
            # The rows of the trace add up from here; TCP_INFO was asked for a moment later.
            "start_total_retrans": [was.total_retrans if was.info else None for was in before],
            **{f"end_{name}": [info[name] for info in last] for name in INFO},
        }

    def _look(self) -> dict[int, _Seen]:
        """Ask who has which connection open, and for its TCP_INFO; by cookie."""
        if self._open_files is None:
            return {}
        owners: dict[int, set[int]] = {}
        homes: dict[int, set[int]] = {}
        retrans: dict[int, int] = {}
        records = np.frombuffer(bpf.read_iterator(self._open_files), OWNER)
        for cookie, tgid, netns, total, state in records.tolist():
            if STATES[state] not in _GONE:
                owners.setdefault(cookie, set()).add(tgid)
            if STATES[state] not in _NO_CONNECTIONS:
                homes.setdefault(netns, set()).add(tgid)
                retrans[cookie] = total
        seen = {
            cookie: _Seen(frozenset(tgids), retrans.get(cookie, 0))
            for cookie, tgids in owners.items()
        }
        for netns, tgids in homes.items():
            for answer in self._ask(netns, tgids):
                cookie = answer["idiag_cookie"]
                if cookie in seen:
                    attributes = dict(answer["attrs"])
                    info = attributes.get("INET_DIAG_INFO") or {}
                    seen[cookie] = replace(
                        seen[cookie],
                        congestion=attributes.get("INET_DIAG_CONG", ""),
                        info={name: info[known] for name, known in INFO.items() if known in info},
                    )
        if not all(each.info for each in seen.values()):  # in a namespace that no owner lives in
            rows = self._all_sockets()
            for cookie, info in zip(rows["cookie"].tolist(), _infos(rows), strict=True):
                if cookie in seen and not seen[cookie].info:
                    seen[cookie] = replace(seen[cookie], info=info)
        return seen

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


def _infos(rows: npt.NDArray[np.void]) -> list[dict[str, int]]:
    """TCP_INFO as tcp_get_info() (net/ipv4/tcp.c) works it out; `rows`: of dtype SOCKET."""
    rate = rows["rate_delivered"].astype(np.uint64) * rows["mss"] * np.uint64(1_000_000)
    odd = {
        "rtt_us": rows["srtt_us"],
        "rto_us": rto_us(rows),
        "delivery_rate": rate // np.maximum(rows["rate_interval_us"], 1),
    }
    columns = ((odd[name] if name in odd else rows[name]).tolist() for name in INFO)
    return [dict(zip(INFO, values, strict=True)) for values in zip(*columns, strict=True)]
