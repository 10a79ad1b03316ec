"""Retransmits by connection: sums that add up, growth of counters, and the words for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latrace.analysis import schema
from latrace.analysis.capture import Capture, open_capture
from latrace.analysis.connections import summarise_connections
from latrace.analysis.connections_text import render_connections
from latrace.analysis.losses import KINDS
from latrace.tracer.outputs import create_output_dir
from latrace.tracer.writer import CaptureWriter

START_NS = 10**12
NETNS = 4026531840


def retransmit(cookie: int, **fields: Any) -> dict[str, Any]:
    """A row of `retransmits`."""
    return {
        "ts_ns": START_NS + 10**9,
        "kind": "rto",
        "segs": 1,
        "total_retrans": 1,
        "err": 0,
        "family": "inet",
        "saddr": "10.0.0.1",
        "sport": 40000 + cookie,
        "daddr": "10.0.0.2",
        "dport": 443,
        "state": "established",
        "seq": 1,
        "len": 1000,
        "tgid": 812,
        "tid": 812,
        "netns": NETNS,
        "cookie": cookie,
        "srtt_us": 900,
        "rto_us": 204_000,
        "cwnd": 10,
        "ssthresh": 7,
        "in_flight": 1,
        **fields,
    }


def connection(cookie: int, **fields: Any) -> dict[str, Any]:
    """A row of `connections`: one that began in the trace, sent 100 segments and is open."""
    names = schema.TABLES["connections"].names
    row: dict[str, Any] = dict.fromkeys(names)
    again = retransmit(cookie)
    row |= {name: again[name] for name in names if name in again}
    row |= {f"end_{name.partition('_')[2]}": 0 for name in names if name.startswith("end_")}
    return row | {
        "owners": [812],
        "congestion": "cubic",
        "end_rtt_us": 1000,
        "end_rttvar_us": 250,
        "end_cwnd": 11,
        "end_segs_out": 100,
        "end_total_retrans": 1,
        "end_delivery_rate": 2_000_000,
        **fields,
    }


def capture_of(
    folder: Path,
    retransmits: list[dict[str, Any]],
    connections: list[dict[str, Any]],
    **manifest: Any,
) -> Capture:
    head = {
        "start_ns": START_NS,
        "end_ns": START_NS + 5 * 10**9,
        "targets": [{"tgid": 812, "comm": "nginx", "cmdline": "nginx"}],
        "quality": {"lost_sockets": 0, "tcp_info_refused": None},
    }
    path = folder / "c"
    writer = CaptureWriter(create_output_dir(path, force=True), head | manifest)
    for table, rows in (("retransmits", retransmits), ("connections", connections)):
        if rows:
            writer.append(table, {name: [row[name] for row in rows] for name in rows[0]})
    writer.close(complete=True)
    return open_capture(path)


def summary_of(folder: Path, *tables: list[dict[str, Any]], **manifest: Any) -> dict[str, Any]:
    return summarise_connections(capture_of(folder, *tables, **manifest))


def test_a_connection_has_its_segments_kinds_and_state(tmp_path: Path) -> None:
    summary = summary_of(
        tmp_path,
        [
            retransmit(1, kind="rto", len=1448),
            retransmit(1, kind="fast", segs=45, len=65160),
            retransmit(1, kind="fast", segs=4, len=5792, err=-1),
        ],
        [connection(1, end_total_retrans=50)],
    )
    (found,) = summary["connections"]
    assert found["segs"] == found["total_retrans"] == 50
    assert found["by_kind"] == {"rto": 1, "fast": 49, "tlp": 0, "synack": 0, "unknown": 0}
    assert (found["events"], found["failed"], found["bytes"]) == (3, 4, 72400)
    assert (found["segs_out"], found["rate"]) == (100, 0.5)
    assert found["owners"] == [{"tgid": 812, "comm": "nginx"}]
    assert (found["opened"], found["closed"], found["state"]) == (True, False, "established")
    assert (found["rtt_us"], found["rttvar_us"], found["cwnd"]) == (1000, 250, 11)
    assert summary["retransmits"]["segs"] == summary["checks"]["total_retrans"] == 50
    json.dumps(summary, allow_nan=False)


def test_counters_count_from_the_start_and_wrap(tmp_path: Path) -> None:
    earlier = {"start_segs_out": 2**32 - 10, "start_total_retrans": 7}
    summary = summary_of(
        tmp_path,
        [retransmit(1, segs=3)],
        [connection(1, **earlier, end_segs_out=20, end_total_retrans=10)],
    )
    (found,) = summary["connections"]
    assert (found["segs_out"], found["total_retrans"], found["opened"]) == (30, 3, False)
    assert summary["watched"] == {"connections": 1, "segs_out": 30}


def test_what_was_not_seen_is_not_made_up(tmp_path: Path) -> None:
    """A request that never became a connection, and a connection whose end was lost."""
    lost = dict.fromkeys(name for name in connection(2) if name.startswith("end_"))
    summary = summary_of(
        tmp_path,
        [retransmit(1, kind="synack", state="new-syn-recv", tgid=900), retransmit(2, segs=2)],
        [connection(2, **lost), connection(3)],
        owners=[{"tgid": 900, "comm": "postgres"}],
    )
    second, first = summary["connections"]
    assert first["owners"] == [{"tgid": 900, "comm": "postgres"}]
    for each in (first, second):
        assert each["segs_out"] is None
        assert each["rate"] is None
    assert (first["opened"], second["opened"]) == (None, True)
    assert second["rtt_us"] == 900  # as its last retransmit had it
    assert summary["retransmits"]["rate"] is None
    assert summary["watched"] == {"connections": 2, "segs_out": 100}


def test_a_request_is_of_all_who_listen(tmp_path: Path) -> None:
    """Not of those who listen elsewhere, and what listens is no connection."""
    asked = {"sport": 80, "kind": "synack", "state": "new-syn-recv"}
    rows = [retransmit(1, **asked), retransmit(2, **asked), retransmit(3, **asked | {"sport": 81})]
    listening = {"state": "listen", "sport": 80, "owners": [700, 701], "daddr": "0.0.0.0"}  # noqa: S104 - not bound to
    capture = capture_of(
        tmp_path,
        rows,
        [
            connection(10, saddr="0.0.0.0", **listening),  # noqa: S104 - as above
            connection(11, saddr="10.9.9.9", **listening | {"owners": [702]}),
            connection(12, saddr="::", **listening | {"netns": 5, "owners": [703]}),
            connection(2, sport=80, owners=[701]),
        ],
    )
    summary = summarise_connections(capture)
    owners = {
        each["cookie"]: [owner["tgid"] for owner in each["owners"]]
        for each in summary["connections"]
    }
    assert owners == {1: [700, 701], 2: [701], 3: [812]}
    assert summary["watched"]["connections"] == 1


def test_connections_and_the_rest_add_up(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    rows = [
        retransmit(
            int(rng.integers(1, 40)),
            kind=str(rng.choice(KINDS)),
            segs=int(rng.integers(1, 50)),
            daddr=f"10.0.1.{rng.integers(1, 4)}",
        )
        for _ in range(500)
    ]
    summary = summary_of(tmp_path, rows, [connection(cookie) for cookie in range(1, 60)])
    total, listed, rest = summary["retransmits"], summary["connections"], summary["rest"]
    assert total["segs"] == sum(row["segs"] for row in rows)
    assert total["events"] == len(rows)
    assert len(listed) == 10
    assert [each["segs"] for each in listed] == sorted((e["segs"] for e in listed), reverse=True)
    assert rest["connections"] == len({row["cookie"] for row in rows}) - 10
    for name in ("segs", "bytes", "segs_out", "events"):
        assert sum(each[name] for each in listed) + rest[name] == total[name]
        assert sum(peer[name] for peer in summary["peers"]) == total[name]
    for kind in KINDS:
        whole = sum(row["segs"] for row in rows if row["kind"] == kind)
        assert sum(each["by_kind"][kind] for each in listed) + rest["by_kind"][kind] == whole
    assert sum(peer["connections"] for peer in summary["peers"]) == 10 + rest["connections"]


def test_a_socket_that_is_connected_anew_is_one_line(tmp_path: Path) -> None:
    rows = [connection(1, closed_ns=START_NS, state="close"), connection(1, end_segs_out=11)]
    (found,) = summary_of(tmp_path, [retransmit(1, segs=2)], rows)["connections"]
    assert (found["segs_out"], found["total_retrans"], found["closed"]) == (111, 2, False)


def test_the_kernels_counter_of_each_namespace(tmp_path: Path) -> None:
    summary = summary_of(
        tmp_path,
        [retransmit(1, segs=3), retransmit(2, segs=2, netns=9)],
        [connection(1), connection(2)],
        netns=[
            {"inum": NETNS, "retrans_segs_start": 100, "retrans_segs_end": 108},
            {"inum": 8, "retrans_segs_start": 5, "retrans_segs_end": 5},
            {"inum": 9, "retrans_segs_start": 5, "retrans_segs_end": None},
        ],
    )
    assert summary["checks"]["netns"] == [
        {"inum": NETNS, "retrans_segs": 8, "segs": 3},
        {"inum": 9, "retrans_segs": None, "segs": 2},
        {"inum": 8, "retrans_segs": 0, "segs": 0},
    ]
    text = render_connections(summary)
    assert "network namespace 4026531840, all sockets              3          8         +5" in text
    assert "network namespace 9, all sockets                       2          -          -" in text
    assert "1 other network namespace, all sockets                 0          0          0" in text
    assert "nobody lived there any more" in text


def test_nothing_sent_again_is_said(tmp_path: Path) -> None:
    summary = summary_of(tmp_path, [], [connection(1, end_total_retrans=0)])
    assert summary["connections"] == summary["peers"] == []
    text = render_connections(summary)
    assert text.startswith(
        "Nothing was sent again in 5.00 s: 100 segments of 1 TCP connection watched.\n"
    )
    assert "Peer and connection" not in text


def test_an_empty_capture_and_one_from_before(tmp_path: Path) -> None:
    capture = capture_of(tmp_path, [], [])
    del capture.manifest["quality"], capture.manifest["targets"]
    text = render_connections(summarise_connections(capture))
    assert "0 segments of 0 TCP connections" in text


def test_what_went_wrong_is_told_loudly(tmp_path: Path) -> None:
    capture = capture_of(
        tmp_path,
        [retransmit(1)],
        [],
        quality={"lost_sockets": 4, "tcp_info_refused": "Operation not permitted"},
    )
    capture.manifest["complete"] = False
    loud = render_connections(summarise_connections(capture)).splitlines()
    assert sum(line.startswith("!!! ") for line in loud) >= 3
    assert any("4 records of sockets lost" in line for line in loud)


@pytest.mark.parametrize("width", [60, 80])
def test_no_line_is_wider_than_the_page(tmp_path: Path, width: int) -> None:
    long = "2001:db8:aaaa:bbbb:cccc:dddd:eeee:ffff"
    hostile = "\x1b[2J\u202e一二三四五六七"
    summary = summary_of(
        tmp_path,
        [retransmit(1, segs=60_000, saddr=long, daddr=long), retransmit(2)],
        [
            connection(1, owners=list(range(812, 820)), congestion="\x1b[31mred"),
            connection(2, end_segs_out=2**32 - 1),
        ],
        targets=[{"tgid": tgid, "comm": hostile} for tgid in range(812, 820)],
        netns=[{"inum": 2**32 - 1, "retrans_segs_start": 0, "retrans_segs_end": 2**40}],
    )
    text = render_connections(summary, width=width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert f"[{long}]:40001 > :443\n" in text
    assert "\x1b[" in render_connections(summary, colour=True)


def test_the_table_reads_as_it_should(tmp_path: Path) -> None:
    summary = summary_of(
        tmp_path,
        [retransmit(1, kind="fast", segs=18, len=26000, err=-1), retransmit(2, daddr="10.0.0.9")],
        [connection(1, end_total_retrans=18, end_segs_out=1800), connection(2)],
    )
    table = render_connections(summary).partition("\n\n")[2].partition("\n\n")[0]
    assert table == "\n".join(
        [
            "Peer and connection                  sent again         of      share      bytes",
            "10.0.0.2                                     18      1,800      1.0 %    26.0 kB",
            "  10.0.0.1:40001 > :443                      18      1,800      1.0 %    26.0 kB",
            "      nginx (pid 812): fast 18 (18 of them never left this host)",
            "      established, rtt 1.00 ms ± 250 us, cwnd 11, 2.00 MB/s, cubic",
            "10.0.0.9                                      1        100      1.0 %    1.00 kB",
            "  10.0.0.1:40002 > :443                       1        100      1.0 %    1.00 kB",
            "      nginx (pid 812): rto 1",
            "      established, rtt 1.00 ms ± 250 us, cwnd 11, 2.00 MB/s, cubic",
            "in all                                       19      1,900      1.0 %    27.0 kB",
        ]
    )
