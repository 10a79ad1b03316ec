"""TCP sockets of the targets: records to rows, and the units they are in."""

from __future__ import annotations

import functools
import gzip
import ipaddress
import platform
import re
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from latrace.analysis.words import endpoint

if TYPE_CHECKING:
    import pyarrow as pa

# By number: enum retransmit_kind and enum socket_event in probes/latrace.h, then
# include/net/tcp_states.h.
_KINDS = ("unknown", "rto", "fast", "tlp", "synack")
_EVENTS = ("recovered", "received")
STATES: Final = (
    None,
    "established",
    "syn-sent",
    "syn-recv",
    "fin-wait-1",
    "fin-wait-2",
    "time-wait",
    "close",
    "close-wait",
    "last-ack",
    "listen",
    "closing",
    "new-syn-recv",
)
FAMILIES: Final = {int(socket.AF_INET): "inet", int(socket.AF_INET6): "inet6"}
_V4_MAPPED = np.frombuffer(bytes(10) + b"\xff\xff", "u1")


def retransmit_columns(rows: npt.NDArray[np.void]) -> dict[str, Any]:
    """Columns of the table `retransmits`; `rows`: shape (n,) of dtype SOCKET."""
    from .writer import names_from_codes  # noqa: PLC0415 - heavy, after the probes are attached

    return {
        "ts_ns": rows["ts_ns"],
        "kind": names_from_codes(rows["kind"], _KINDS.__getitem__),
        **{name: rows[name] for name in ("segs", "total_retrans", "err")},
        **address_columns(rows),
        "state": names_from_codes(rows["state"], state_name),
        **{name: rows[name] for name in ("seq", "len", "tgid", "tid")},
        "comm": np.ascontiguousarray(rows["comm"]),
        "netns": rows["netns"].astype(np.uint64),
        **{name: rows[name] for name in ("cookie", "srtt_us", "cwnd", "ssthresh", "in_flight")},
        "rto_us": rto_us(rows),
    }


def socket_event_columns(rows: npt.NDArray[np.void]) -> dict[str, Any]:
    """Columns of the table `socket_events`; `rows`: shape (n,) of dtype SOCKET."""
    from .writer import names_from_codes  # noqa: PLC0415 - as above

    return {
        "ts_ns": rows["ts_ns"],
        "event": names_from_codes(rows["event"], _EVENTS.__getitem__),
        "netns": rows["netns"].astype(np.uint64),
        **{name: rows[name] for name in ("cookie", "tgid", "tid")},
    }


def address_columns(rows: npt.NDArray[np.void]) -> dict[str, Any]:
    """The two ends of each socket; `rows`: shape (n,) of dtype SOCKET."""
    from .writer import names_from_codes  # noqa: PLC0415 - as above

    return {
        "family": names_from_codes(rows["family"], FAMILIES.get),
        "saddr": _addresses(rows, "saddr"),
        "sport": rows["sport"],
        "daddr": _addresses(rows, "daddr"),
        "dport": rows["dport"].astype(np.uint16),
    }


def rto_us(rows: npt.NDArray[np.void]) -> npt.NDArray[np.uint64]:
    """The retransmission timeouts of sockets, in us; the kernel keeps them in ticks."""
    return rows["rto_jiffies"].astype(np.uint64) * np.uint64(1_000_000 // ticks_per_s())


def kind_name(code: int) -> str:
    """Why something was sent again: enum retransmit_kind."""
    return _KINDS[code]


def state_name(code: int) -> str | None:
    """A state of a TCP socket; None: one that is not known here."""
    return STATES[code] if code < len(STATES) else None


def socket_ends(row: np.void) -> tuple[str, str]:
    """Both ends of the socket in one record of dtype SOCKET: `10.0.0.1:80`, `[fd77::1]:80`."""
    ends = []
    for name, port in (("saddr", "sport"), ("daddr", "dport")):
        raw = row[name].tobytes()
        if row["family"] == socket.AF_INET:
            raw = _V4_MAPPED.tobytes() + raw[:4]
        ends.append(endpoint(address_text(raw), int(row[port])))
    return ends[0], ends[1]


def _addresses(rows: npt.NDArray[np.void], name: str) -> pa.DictionaryArray:
    """A column of addresses as text; an IPv4 address of an IPv6 socket as the former."""
    from .writer import names_from_raw  # noqa: PLC0415 - as above

    raw = np.ascontiguousarray(rows[name]).view("u1").reshape(len(rows), 16).copy()
    v4 = rows["family"] == socket.AF_INET
    raw[v4, 12:] = raw[v4, :4]
    raw[v4, :12] = _V4_MAPPED
    return names_from_raw(raw, address_text)


def address_text(raw: bytes) -> str:
    """An address of 16 bytes as people write it; IPv4 comes mapped."""
    address = ipaddress.IPv6Address(raw)
    return str(address.ipv4_mapped or address)


@functools.cache
def ticks_per_s() -> int:
    """The kernel's CONFIG_HZ, in which it keeps timeouts: from its configuration, else measured."""
    for path, reader in (
        (Path("/proc/config.gz"), gzip.open),
        (Path(f"/boot/config-{platform.release()}"), open),
    ):
        try:
            with reader(path, "rt") as file:
                if found := re.search(r"^CONFIG_HZ=(\d+)$", file.read(), re.MULTILINE):
                    return int(found[1])
        except OSError:
            continue
    began, first = time.monotonic(), _jiffies()
    time.sleep(0.1)
    rate = (_jiffies() - first) / (time.monotonic() - began)
    return min((100, 250, 300, 1000), key=lambda hz: abs(hz - rate))


def _jiffies() -> int:
    text = Path("/proc/timer_list").read_text()
    return int(re.findall(r"^jiffies: (\d+)$", text, re.MULTILINE)[0])
