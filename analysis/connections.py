"""Which TCP connections sent segments again, how many of how many, and what the kernel counted.

Segments, kinds and bytes come from the recorded retransmits; what was sent in all, and the state of
a connection, from the kernel's TCP_INFO when the trace began and ended. The two are held against
each other, and against the counter that the kernel keeps for each network namespace.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latrace.analysis.capture import Capture
from latrace.analysis.losses import KINDS
from latrace.analysis.schema import SCHEMA_VERSION

_STATE: Final = ("rtt_us", "rttvar_us", "rto_us", "cwnd", "ssthresh", "delivery_rate")

_EVERYWHERE: Final = ("0.0.0.0", "::")  # noqa: S104 - what others listen on

Row = dict[str, Any]


def summarise_connections(capture: Capture, *, top: int = 10) -> dict[str, Any]:
    """Sum up a capture's retransmits by connection and peer: what `latrace tcp --json` prints.

    `connections`: the `top` with most segments sent again, those first, and `rest` is the sum of
    the others. Growth is from the trace's start, or the connection's, to its end; None where that
    was not seen. Everything in it can be written as JSON.

    Raises CaptureError for a damaged file.
    """
    sent_again, sockets = capture.table("retransmits"), capture.table("connections")
    listens = pc.fill_null(pc.equal(pc.cast(sockets["state"], pa.utf8()), "listen"), False)
    table = sockets.filter(pc.invert(listens))
    known = _grown(table)
    listed = _with_retransmits(
        sent_again, table, known, _Listeners(sockets.filter(listens)), _names(capture)
    )
    listed.sort(key=lambda each: (-each["segs"], each["cookie"]))
    manifest = capture.manifest
    options = manifest.get("options") or {}
    return {
        "schema": SCHEMA_VERSION,
        "capture": {
            "all_sockets": options.get("all_sockets") is True,
            "complete": capture.complete,
            "duration_s": max(0, manifest.get("end_ns", 0) - manifest.get("start_ns", 0)) / 1e9,
            "host": manifest.get("host", ""),
            "kernel": manifest.get("kernel", ""),
            "targets": manifest.get("targets") or [],
        },
        "quality": {
            "lost_sockets": _quality(manifest, "lost_sockets", 0),
            "tcp_info_refused": _quality(manifest, "tcp_info_refused", None),
        },
        "retransmits": _sum(listed) | {"events": sent_again.num_rows},
        "watched": {
            "connections": len(set(table["cookie"].to_pylist())),
            "segs_out": _total(known["segs_out"]),
        },
        "peers": _peers(listed)[:top],
        "connections": listed[:top],
        "rest": _sum(listed[top:]) | {"connections": len(listed[top:])},
        "checks": {
            "total_retrans": _total(known["total_retrans"]),
            "netns": _namespaces(manifest, listed),
        },
    }


def _quality(manifest: Mapping[str, Any], name: str, default: Any) -> Any:
    quality = manifest.get("quality")
    return quality.get(name, default) if isinstance(quality, dict) else default


# --- connections -------------------------------------------------------------------------------


def _grown(table: pa.Table) -> dict[str, list[int | None]]:
    """Tell how much counters of TCP_INFO grew, for each row; None: it is not known."""
    growth = {}
    for name in ("segs_out", "total_retrans"):
        start = pc.cast(table[f"start_{name}"].fill_null(0), pa.int64())
        # It wraps at 32 bits.
        grown = pc.bit_wise_and(
            pc.subtract(pc.cast(table[f"end_{name}"], pa.int64()), start), 0xFFFF_FFFF
        )
        growth[name] = grown.to_pylist()
    return growth


def _total(values: Iterable[int | None]) -> int:
    return sum(value for value in values if value is not None)


def _with_retransmits(
    sent_again: pa.Table,
    table: pa.Table,
    known: Mapping[str, list[int | None]],
    listeners: _Listeners,
    names: Mapping[int, str],
) -> list[Row]:
    """List the connections that sent something again."""
    found: dict[int, Row] = {}
    cookies = sent_again["cookie"].to_numpy()
    # The last row of each: who owned the socket then.
    _, from_end = np.unique(cookies[::-1], return_index=True)
    for row in sent_again.take(pa.array(len(cookies) - 1 - from_end)).to_pylist():
        found[row["cookie"]] = _connection(row)
    for row in _by_kind(sent_again):
        each = found[row["cookie"]]
        kind = row["kind"] if row["kind"] in KINDS else "unknown"
        each["by_kind"][kind] += row["segs_sum"]
        for name, value in (("segs", row["segs_sum"]), ("bytes", row["len_sum"])):
            each[name] += value
        each["events"] += row["segs_count"]
        each["failed"] += row["failed_sum"]
    chosen = pc.is_in(table["cookie"], pa.array(list(found), pa.uint64()))
    rows = table.filter(chosen).to_pylist()
    places = np.flatnonzero(chosen.to_numpy(zero_copy_only=False)).tolist()
    for place, row in zip(places, rows, strict=True):
        _fill(found[row["cookie"]], row, {name: known[name][place] for name in known})
    for each in found.values():
        owners = each["owners"] or listeners.owners(each) or [each.pop("tgid")]
        each.pop("tgid", None)
        each["owners"] = [{"tgid": tgid, "comm": names.get(tgid, "")} for tgid in owners]
        each["rate"] = each["segs"] / each["segs_out"] if each["segs_out"] else None
    return list(found.values())


class _Listeners:
    """Who listens where: a request for a connection is theirs, of all of them."""

    def __init__(self, table: pa.Table) -> None:
        self._owners: dict[tuple[int, int], list[Row]] = {}
        columns = table.select(["netns", "sport", "saddr", "owners"])
        for row in columns.to_pylist():
            self._owners.setdefault((row["netns"], row["sport"]), []).append(row)

    def owners(self, each: Row) -> list[int]:
        """The processes that a request may be of; none for a connection."""
        if each["segs"] != each["by_kind"]["synack"]:
            return []
        here = {each["saddr"], *_EVERYWHERE}
        listening = self._owners.get((each["netns"], each["sport"]), [])
        return sorted({tgid for row in listening if row["saddr"] in here for tgid in row["owners"]})


def _connection(row: Mapping[str, Any]) -> Row:
    """Begin a connection from its last retransmit."""
    same = ("cookie", "netns", "family", "saddr", "sport", "daddr", "dport", "tgid", "state")
    return {
        **{name: row[name] for name in same},
        "owners": [],
        "congestion": "",
        "opened": None,
        "closed": None,
        "events": 0,
        "segs": 0,
        "bytes": 0,
        "failed": 0,
        "by_kind": dict.fromkeys(KINDS, 0),
        "segs_out": None,
        "rate": None,
        "total_retrans": None,
        **dict.fromkeys(_STATE),
        # Of a request, or of a connection that nothing else is known of: as it was then.
        **{"rtt_us": row["srtt_us"], "rto_us": row["rto_us"]},
        **{"cwnd": row["cwnd"], "ssthresh": row["ssthresh"]},
    }


def _by_kind(sent_again: pa.Table) -> list[Row]:
    segs = pc.cast(sent_again["segs"], pa.int64())
    rows = pa.table(
        {
            "cookie": sent_again["cookie"],
            "kind": pc.cast(sent_again["kind"], pa.utf8()),
            "segs": segs,
            "len": pc.cast(sent_again["len"], pa.int64()),
            "failed": pc.if_else(pc.less(sent_again["err"].fill_null(0), 0), segs, 0),
        }
    )
    sums = [("segs", "sum"), ("segs", "count"), ("len", "sum"), ("failed", "sum")]
    grouped: list[Row] = rows.group_by(["cookie", "kind"]).aggregate(sums).to_pylist()
    return grouped


def _fill(each: Row, row: Mapping[str, Any], grown: Mapping[str, int | None]) -> None:
    """Add what TCP_INFO says of a connection; a socket that was connected anew has two rows."""
    each["opened"] = row["start_segs_out"] is None
    each["closed"] = row["closed_ns"] is not None
    each["owners"] = sorted({*each["owners"], *(row["owners"] or [])})
    for name in ("congestion", "state"):
        each[name] = row[name] or each[name]
    for name in _STATE:
        value = row[f"end_{name}"]
        each[name] = each[name] if value is None else value
    for name, value in grown.items():
        if value is not None:
            each[name] = (each[name] or 0) + value


def _names(capture: Capture) -> dict[int, str]:
    """Tell what processes are called."""
    names: dict[int, str] = {}
    threads = capture.table("threads", columns=("tid", "tgid", "comm"))
    for row in threads.to_pylist():
        if row["tid"] == row["tgid"]:
            names[row["tgid"]] = row["comm"] or ""
    for key in ("targets", "owners"):
        for entry in capture.manifest.get(key) or []:
            if entry.get("comm"):
                names.setdefault(entry.get("tgid", 0), str(entry["comm"]))
    return names


# --- sums --------------------------------------------------------------------------------------


def _sum(listed: Iterable[Row]) -> Row:
    """Sum up connections."""
    listed = list(listed)
    segs = sum(each["segs"] for each in listed)
    # What was sent is not known of all: a share is of those alone of which it is.
    told = [each for each in listed if each["segs_out"]]
    segs_out = _total(each["segs_out"] for each in told)
    return {
        "events": sum(each["events"] for each in listed),
        "segs": segs,
        "bytes": sum(each["bytes"] for each in listed),
        "failed": sum(each["failed"] for each in listed),
        "by_kind": {kind: sum(each["by_kind"][kind] for each in listed) for kind in KINDS},
        "segs_out": segs_out,
        "rate": sum(each["segs"] for each in told) / segs_out if segs_out else None,
    }


def _peers(listed: Iterable[Row]) -> list[Row]:
    """Sum up by the other end's address, the peer with most segments first."""
    by_peer: dict[str, list[Row]] = {}
    for each in listed:
        by_peer.setdefault(each["daddr"], []).append(each)
    peers = [
        {"daddr": peer, "connections": len(theirs), **_sum(theirs)}
        for peer, theirs in by_peer.items()
    ]
    return sorted(peers, key=lambda peer: -peer["segs"])


def _namespaces(manifest: Mapping[str, Any], listed: Iterable[Row]) -> list[Row]:
    """Hold the recorded segments against the kernel's counter of each network namespace.

    `retrans_segs` is the growth of Tcp: RetransSegs, of all its sockets whoever has them; None: it
    could not be read at the end.
    """
    ours: dict[int, int] = {}
    for each in listed:
        ours[each["netns"]] = ours.get(each["netns"], 0) + each["segs"]
    found = []
    for entry in manifest.get("netns") or []:
        end = entry["retrans_segs_end"]
        grown = None if end is None else end - entry["retrans_segs_start"]
        found.append(
            {"inum": entry["inum"], "retrans_segs": grown, "segs": ours.get(entry["inum"], 0)}
        )
    return sorted(found, key=lambda entry: (-entry["segs"], entry["inum"]))
