"""Losses and the waits that they lengthened: made-up tables with known answers."""

from __future__ import annotations

import json
import re
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from sample_capture import FRAMES, MANIFEST, STACKS, START_NS, write_capture

from latrace.analysis import chunks, retransmits
from latrace.analysis.capture import Capture, open_capture
from latrace.analysis.losses import Losses, peer_name
from latrace.analysis.page import Page
from latrace.analysis.report_html import losses as losses_html
from latrace.analysis.report_html import render_html
from latrace.analysis.report_html.series import Window
from latrace.analysis.retransmits import (
    EVIDENCE,
    SOON_NS,
    Retransmits,
    read_retransmits,
    summarise_retransmits,
)
from latrace.analysis.retransmits_text import answer, lengthened_text
from latrace.analysis.retransmits_text import retransmits as write_section
from latrace.analysis.schema import TABLES
from latrace.analysis.selection import Selection
from latrace.analysis.summary import summarise
from latrace.analysis.text import render_text
from latrace.analysis.words import cells
from latrace.flamegraphs import build_profile

MS = 1_000_000
PROCESS, READER, OTHER = 812, 813, 815


def sent_again(at_ms: float, kind: str = "rto", **more: Any) -> dict[str, Any]:
    """A retransmit; times in ms after the capture began."""
    return {
        "ts_ns": START_NS + round(at_ms * MS),
        "kind": kind,
        "segs": 1,
        "err": 0,
        "saddr": "10.0.0.1",
        "sport": 40000,
        "daddr": "10.0.0.5",
        "dport": 5432,
        "state": "established",
        "tgid": PROCESS,
        "tid": READER,
        "cookie": 7,
        "srtt_us": 1000,
        "rto_us": 200_000,
        "in_flight": 1,
    } | more


def event(at_ms: float, what: str, tid: int = READER, cookie: int = 7) -> dict[str, Any]:
    return {
        "ts_ns": START_NS + round(at_ms * MS),
        "event": what,
        "cookie": cookie,
        "tgid": PROCESS,
        "tid": tid,
    }


def wait(
    begin_ms: float, end_ms: float, syscall: str = "recvfrom", tid: int = READER, **more: Any
) -> dict[str, Any]:
    """A wait that ran 20 us after it was woken, at `end_ms`."""
    woken = START_NS + round(end_ms * MS)
    return {
        "run_ns": woken + 20_000,
        "wait_ns": 20_000,
        "tid": tid,
        "tgid": PROCESS,
        "blocked_ns": round((end_ms - begin_ms) * MS),
        "syscall": syscall,
        "stack": -1,
        "weight_ns": 0,
        "blocked_weight_ns": 0,
    } | more


def filled(name: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    table = pa.Table.from_pylist(list(rows), schema=TABLES[name])
    return {field: table[field].combine_chunks() for field in table.column_names}


def captured(
    tmp_path: Path,
    sent: Sequence[dict[str, Any]],
    events: Sequence[dict[str, Any]] = (),
    waits: Sequence[dict[str, Any]] = (),
) -> Capture:
    threads = [
        {"tid": tid, "tgid": PROCESS, "comm": comm, "start_ns": 1}
        for tid, comm in ((PROCESS, "app"), (READER, "reader"), (OTHER, "worker"))
    ]
    tables = {
        "waits": sorted(waits, key=lambda row: int(row["run_ns"])),
        "retransmits": sent,
        "socket_events": events,
        "threads": threads,
    }
    tmp_path.mkdir(exist_ok=True)
    given = {name: filled(name, rows) for name, rows in tables.items() if rows}
    return open_capture(
        write_capture(tmp_path / "c", {**given, "stacks": STACKS, "frames": FRAMES})
    )


def spans(losses: Losses) -> list[tuple[float, float]]:
    """From when to when each lasted, in ms after the capture began."""
    return [
        ((begin - START_NS) / MS, (end - START_NS) / MS)
        for begin, end in zip(losses.begin_ns.tolist(), losses.end_ns.tolist(), strict=True)
    ]


def found(tmp_path: Path, *tables: Sequence[dict[str, Any]]) -> list[tuple[int, float, str]]:
    """The lengthened waits: their threads, by how much in ms, with what evidence."""
    waits = read_retransmits(captured(tmp_path, *tables)).waits
    return [
        (tid, ns / MS, EVIDENCE[grade])
        for tid, ns, grade in zip(
            waits.tid.tolist(), waits.overlap_ns.tolist(), waits.evidence.tolist(), strict=True
        )
    ]


# --- from when to when -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "begin_ms"),
    [
        (sent_again(1000, "rto"), 800),
        (sent_again(1000, "tlp"), 800),
        (sent_again(1000, "tlp", in_flight=5), 1000 - 2 - 8),
        (sent_again(1000, "tlp", in_flight=5, srtt_us=500_000), 800),
        (sent_again(1000, "fast"), 999),
        (sent_again(1000, "unknown"), 999),
        (sent_again(1000, "of a later kernel"), 999),
        (sent_again(1000, "synack", srtt_us=0, rto_us=0), 0),
        (sent_again(1000, "rto", state="syn-sent", srtt_us=0, rto_us=1_000_000), 0),
    ],
)
def test_a_loss_begins_when_the_timer_was_set(
    tmp_path: Path, row: dict[str, Any], begin_ms: float
) -> None:
    capture = captured(tmp_path, [row], [event(1003, "recovered")])
    ((begin, _),) = spans(read_retransmits(capture).losses)
    assert begin == begin_ms


@pytest.mark.parametrize(
    ("kind", "events", "end_ms"),
    [
        ("rto", [event(1040, "recovered"), event(1041, "received")], 1040),
        ("fast", [event(1040, "recovered")], 1040),
        ("rto", [event(900, "recovered"), event(1050, "received")], 1050),
        ("rto", [event(1050, "recovered", cookie=8)], 1001),
        ("rto", [], 1001),
        # After a probe the state stays what it is until more is sent: that is no measure.
        ("tlp", [event(9000, "recovered")], 1001),
        ("tlp", [event(1000.4, "received")], 1000.4),
        ("tlp", [event(1700, "received")], 1001),
        ("synack", [event(1700, "received")], 1000),
    ],
)
def test_a_loss_ends_when_data_flow_again(
    tmp_path: Path, kind: str, events: list[dict[str, Any]], end_ms: float
) -> None:
    capture = captured(tmp_path, [sent_again(1000, kind)], events)
    ((_, end),) = spans(read_retransmits(capture).losses)
    assert end == end_ms


def test_timeouts_that_follow_on_one_another_are_one_loss(tmp_path: Path) -> None:
    rows = [
        sent_again(200),
        sent_again(605, rto_us=400_000),  # fired 5 ms late
        sent_again(1415, rto_us=800_000),
        # What goes out as acknowledgements come in has no timer that ran.
        sent_again(1416, rto_us=1_600_000),
        sent_again(3000),
    ]
    losses = read_retransmits(captured(tmp_path, rows, [event(1420, "recovered")])).losses
    assert spans(losses) == [(0, 1420), (2800, 3001)]
    assert losses.kinds == [(("rto", 4),), (("rto", 1),)]


def test_a_timeout_follows_on_the_probe_before_it(tmp_path: Path) -> None:
    rows = [sent_again(400, "tlp"), sent_again(608, "rto")]
    losses = read_retransmits(captured(tmp_path, rows, [event(609, "recovered")])).losses
    assert spans(losses) == [(200, 609)]
    assert losses.kinds == [(("rto", 1), ("tlp", 1))]


def test_what_was_over_is_not_part_of_the_next(tmp_path: Path) -> None:
    rows = [sent_again(200), sent_again(410)]
    events = [event(201, "recovered"), event(411, "recovered")]
    losses = read_retransmits(captured(tmp_path, rows, events)).losses
    assert spans(losses) == [(0, 201), (210, 411)]
    assert losses.early_ns[1] == START_NS + 201 * MS


def test_the_handshakes_of_a_listener_are_apart(tmp_path: Path) -> None:
    def synack(at_ms: float, cookie: int) -> dict[str, Any]:
        return sent_again(at_ms, "synack", cookie=cookie, srtt_us=0, rto_us=0)

    rows = [synack(1000, 1), synack(3000, 1), synack(7000, 1), synack(3000, 2)]
    losses = read_retransmits(captured(tmp_path, rows)).losses
    assert spans(losses) == [(0, 7000), (2000, 3000)]


def test_sockets_are_apart(tmp_path: Path) -> None:
    rows = [sent_again(1000 + cookie, cookie=cookie) for cookie in (3, 1, 2)]
    losses = read_retransmits(captured(tmp_path, rows, [event(1500, "recovered", cookie=2)])).losses
    assert dict(zip(losses.cookie.tolist(), spans(losses), strict=True)) == {
        1: (801, 1002),
        2: (802, 1500),
        3: (803, 1004),
    }


# --- which waits -------------------------------------------------------------------------------

LOSS = [sent_again(1000)]
OVER = [event(1001, "recovered")]


def test_what_a_wait_and_a_loss_have_in_common(tmp_path: Path) -> None:
    waits = [wait(100, 1001.5)]
    assert found(tmp_path, LOSS, OVER, waits) == [(READER, 201, "its socket")]


def test_a_wait_that_began_as_late_as_timers_fire_began_with_the_loss(tmp_path: Path) -> None:
    assert found(tmp_path, LOSS, OVER, [wait(790, 1001.5)]) == [(READER, 211, "its socket")]


def test_whoever_waits_for_connections_did_so_before(tmp_path: Path) -> None:
    rows = [sent_again(2000, "synack", srtt_us=0, rto_us=0)]
    waits = [wait(990, 2000.1, "accept4")]
    assert found(tmp_path, rows, [], waits) == [(READER, 1000, "its socket")]


def test_the_thread_that_read_next_is_the_one_that_waited(tmp_path: Path) -> None:
    events = [*OVER, event(1251, "received", tid=OTHER)]
    waits = [wait(790, 1001.5, "epoll_wait"), wait(500, 1250, tid=OTHER)]
    assert found(tmp_path, LOSS, events, waits) == [
        (READER, 211, "its socket"),
        (OTHER, 201, "read next"),
    ]


def test_a_read_much_later_is_another_matter(tmp_path: Path) -> None:
    events = [*OVER, event(1251 + SOON_NS / MS, "received", tid=OTHER)]
    waits = [wait(800, 1001.1), wait(500, 1250, tid=OTHER)]
    assert found(tmp_path, LOSS, events, waits) == [(READER, 201, "its socket")]


def test_whoever_was_sending_waited_for_no_read(tmp_path: Path) -> None:
    events = [*OVER, event(1003, "received")]
    waits = [wait(790, 1001.5, "sendto")]
    assert found(tmp_path, LOSS, events, waits) == [(READER, 211, "its socket")]


def test_what_ended_on_its_own_was_not_lengthened(tmp_path: Path) -> None:
    """A loop that waits 30 ms at a time, and one that is ended by something else much later."""
    waits = [wait(30.7 * n, 30.7 * n + 30, "epoll_wait") for n in range(40)]
    # One of them was under way at the retransmit, and ended longer after it than a round trip.
    assert found(tmp_path / "a", LOSS, OVER, waits) == [(READER, 18.6, "same process")]
    assert found(tmp_path / "b", LOSS, OVER, [wait(790, 4000, "epoll_wait")]) == [
        (READER, 211, "same process")
    ]


def test_only_the_process_is_said_where_nothing_better_is_known(tmp_path: Path) -> None:
    others = [wait(700, 1300, "epoll_wait", tid=OTHER), wait(0, 5000, "read", tid=PROCESS)]
    weak = [(OTHER, 201, "same process")]  # of two that have as much in common, the first
    assert found(tmp_path / "a", LOSS, OVER, others) == weak
    assert found(tmp_path / "b", LOSS, OVER, [*others, wait(800, 1001.5)]) == [
        (READER, 201, "its socket")
    ]


def test_waits_for_no_socket_and_of_others_are_left_out(tmp_path: Path) -> None:
    waits = [
        wait(700, 1001.5, "futex"),
        wait(700, 1001.5, "", tid=OTHER),
        wait(700, 1001.5, tid=99, tgid=99),
    ]
    assert found(tmp_path, LOSS, OVER, waits) == []


def test_a_wait_has_one_loss(tmp_path: Path) -> None:
    """An event loop with three sockets that all lost something."""
    rows = [
        sent_again(1000, cookie=1, dport=1),
        sent_again(1001, cookie=2, dport=2, rto_us=400_000),
        sent_again(1000.5, cookie=3, dport=3),
    ]
    events = [event(1002, "recovered", cookie=n) for n in (1, 2, 3)]
    events.append(event(1002.1, "received", cookie=3))
    capture = captured(tmp_path, rows, events, [wait(0, 1002.05, "epoll_wait")])
    told = summarise_retransmits(read_retransmits(capture))
    (line,) = told["lengthened"]
    assert (line["peer"], line["evidence"]) == ("10.0.0.5:3", "read next")
    assert told["lengthened_ns"] == line["overlap_ns"] == 201_500_000
    # Without that read the one with the most in common.
    capture = captured(tmp_path / "b", rows, events[:-1], [wait(0, 1002.05, "epoll_wait")])
    (line,) = summarise_retransmits(read_retransmits(capture))["lengthened"]
    assert (line["peer"], line["overlap_ns"]) == ("10.0.0.5:2", 401 * MS)


def test_a_part_of_a_capture(tmp_path: Path) -> None:
    rows = [sent_again(1000), sent_again(5000, tid=OTHER, cookie=8)]
    waits = [wait(790, 1001), wait(4790, 5001, tid=OTHER)]
    capture = captured(tmp_path, rows, [], waits)

    def told(**chosen: Any) -> tuple[int, int, list[int]]:
        summary = summarise_retransmits(read_retransmits(capture, Selection(**chosen)))
        return summary["count"], summary["losses"], [line["tid"] for line in summary["lengthened"]]

    assert told() == (2, 2, [READER, OTHER])
    assert told(since_ns=2_000 * MS) == (1, 1, [OTHER])
    assert told(until_ns=2_000 * MS) == (1, 1, [READER])
    assert told(tids=(OTHER,)) == (1, 1, [OTHER])
    assert told(over_ns=10**12) == (2, 2, [READER, OTHER])  # that is of waits for the CPU


# --- against plain loops -----------------------------------------------------------------------


def plainly(losses: Losses, capture: Capture) -> dict[int, tuple[int, int]]:
    """By row of `waits`: the grade and the overlap that the rules give, loop by loop."""
    rows = capture.table("waits").to_pylist()
    sent, events = (capture.table(name).to_pylist() for name in ("retransmits", "socket_events"))
    best: dict[int, tuple[int, int]] = {}
    strong: set[int] = set()
    by_loss: dict[int, tuple[int, int]] = {}
    for weak in (False, True):
        for number, row in enumerate(rows):
            if row["syscall"] not in retransmits.CALLS or not row["blocked_ns"]:
                continue
            woken = row["run_ns"] - row["wait_ns"]
            begin = woken - row["blocked_ns"]
            for at in range(len(losses)):
                first, last, end = (
                    int(column[at]) for column in (losses.first_ns, losses.last_ns, losses.end_ns)
                )
                cookie, trip = int(losses.cookie[at]), int(losses.trip_ns[at])
                starts = int(losses.begin_ns[at])
                if begin >= losses.early_ns[at]:
                    starts = begin
                overlap = min(woken, end) - max(begin, starts)
                later = losses.first_ns[(losses.cookie == cookie) & (losses.first_ns > first)]
                until = int(later.min()) if len(later) else 2**62
                moments = [
                    (one["ts_ns"], one["tid"])
                    for one in sent
                    if one["cookie"] == cookie and first <= one["ts_ns"] <= last
                ]
                moments.append((end, int(losses.tid[at])))
                read = any(
                    one["event"] == "received"
                    and row["syscall"] in retransmits.READS
                    and one["cookie"] == cookie
                    and one["tid"] == row["tid"]
                    and first <= one["ts_ns"] < until
                    and row["run_ns"] <= one["ts_ns"] <= row["run_ns"] + SOON_NS
                    and not any(
                        other["tid"] == row["tid"]
                        and row["run_ns"] < other["run_ns"] <= one["ts_ns"]
                        and other["syscall"] in retransmits.CALLS
                        for other in rows
                    )
                    for one in events
                )
                used = any(
                    tid == row["tid"] and begin <= moment <= woken <= moment + trip + SOON_NS
                    for moment, tid in moments
                )
                grade = 0 if read else 1 if used else 2
                if weak and (
                    at in strong or row["tgid"] != losses.tgid[at] or not begin <= last <= woken
                ):
                    continue
                if overlap <= 0 or (grade == 2) != weak:
                    continue
                if weak:
                    if at not in by_loss or overlap > -by_loss[at][0]:
                        by_loss[at] = -overlap, number
                    continue
                strong.add(at)
                known = best.get(number)
                if known is None or (grade, -overlap) < (known[0], -known[1]):
                    best[number] = grade, overlap
    for negative, number in by_loss.values():
        grade, overlap = best.get(number, (2, 0))
        best[number] = grade, max(overlap, -negative) if grade == 2 else overlap
    return best


@pytest.mark.parametrize("seed", range(8))
def test_the_same_as_by_plain_loops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(chunks, "_ROWS", 50)
    monkeypatch.setattr(retransmits, "_PAIRS", 7)
    rng = np.random.default_rng(seed)
    tids = [900, 901, 902, 950]
    waits = []
    for tid in tids:
        at = 0.0
        for _ in range(40):
            at += rng.exponential(3)
            long = float(rng.exponential(60))
            call = str(
                rng.choice(["recvfrom", "epoll_wait", "futex", "sendto"], p=[0.4, 0.3, 0.1, 0.2])
            )
            waits.append(wait(at, at + long, call, tid, tgid=950 if tid == 950 else 900))
            at += long + 0.02
    sent, events = [], []
    for cookie in range(12):
        tgid, at = (950 if cookie == 11 else 900), 0.0
        for _ in range(rng.integers(1, 8)):
            at += rng.exponential(250)
            sent.append(
                sent_again(
                    at,
                    str(rng.choice(["rto", "fast", "tlp", "synack"])),
                    cookie=cookie,
                    dport=cookie,
                    tgid=tgid,
                    tid=950 if tgid == 950 else int(rng.choice(tids[:3])),
                    srtt_us=int(rng.choice([50, 3000])),
                    in_flight=int(rng.integers(0, 4)),
                )
            )
            if rng.random() < 0.6:
                events.append(event(at + rng.exponential(20), "recovered", 0, cookie))
            if rng.random() < 0.8:
                ended = rng.choice([row["run_ns"] for row in waits if row["tid"] != 950])
                events.append(
                    event((ended - START_NS) / MS + 0.01, "received", int(rng.choice(tids)), cookie)
                )
    capture = captured(tmp_path, sent, sorted(events, key=lambda one: int(one["ts_ns"])), waits)
    read = read_retransmits(capture)
    got = {
        row: (grade, ns)
        for row, grade, ns in zip(
            read.waits.row.tolist(),
            read.waits.evidence.tolist(),
            read.waits.overlap_ns.tolist(),
            strict=True,
        )
    }
    assert got == plainly(read.losses, capture)
    assert {grade for grade, _ in got.values()} >= {1}


# --- a lot of it -------------------------------------------------------------------------------


def test_a_million_waits_beside_ten_thousand_losses(tmp_path: Path) -> None:
    """Memory is bounded by pieces of the table, and the sums are those of the parts."""
    many, threads, lost = 1_000_000, 100, 10_000
    each = many // threads
    turn = 10_000_000  # ns; every thread waits for 9 ms of it
    number = np.arange(many)
    tid = 1000 + number % threads
    run = START_NS + (number // threads + 1) * turn
    at = np.sort(np.random.default_rng(1).integers(turn, each * turn, lost)) + START_NS
    owner = 1000 + np.arange(lost) % threads
    text = np.full(lost, "rto")
    tables = {
        "waits": {
            "run_ns": run.astype(np.uint64),
            "wait_ns": np.full(many, 1000, np.uint64),
            "blocked_ns": np.full(many, 9_000_000, np.uint64),
            "tid": tid.astype(np.int32),
            "tgid": np.full(many, 1000, np.int32),
            "syscall": ["recvfrom"] * many,
        },
        "retransmits": {
            "ts_ns": at.astype(np.uint64),
            "kind": text.tolist(),
            "segs": np.ones(lost, np.uint16),
            "daddr": ["10.0.0.5"] * lost,
            "dport": np.full(lost, 80, np.uint16),
            "sport": np.full(lost, 40000, np.uint16),
            "tgid": np.full(lost, 1000, np.int32),
            "tid": owner.astype(np.int32),
            "cookie": np.arange(lost).astype(np.uint64),
            "srtt_us": np.full(lost, 6_000, np.uint32),
            "rto_us": np.full(lost, 200_000, np.uint32),
            "in_flight": np.ones(lost, np.uint32),
        },
    }
    capture = open_capture(write_capture(tmp_path / "c", tables))
    tracemalloc.start()
    read = read_retransmits(capture)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 150_000_000  # the tables alone take 40 MB, as does every column of objects
    told = summarise_retransmits(read)
    assert (told["count"], told["losses"], told["segs"]) == (lost, lost, lost)
    # At nine of ten retransmits, and one round trip later, its thread was in a wait.
    assert told["lengthened_count"] > 0.9 * lost
    good = read.waits.counts
    assert told["lengthened_ns"] == int(read.waits.overlap_ns[good].sum())
    assert (read.waits.overlap_ns <= read.waits.blocked_ns).all()
    assert len(np.unique(read.waits.row)) == len(read.waits)


# --- in words and pictures ---------------------------------------------------------------------


@pytest.fixture
def lossy(tmp_path: Path) -> Capture:
    """Two waits with good evidence, one of them sampled with twice its weight; a weak one."""
    rows = [
        *(sent_again(at, segs=2) for at in (200, 601)),
        sent_again(2000, "tlp", cookie=8, daddr="fd77::2"),
        sent_again(4000, "fast", cookie=9, daddr="10.0.0.9", dport=50123, sport=80, tid=PROCESS),
    ]
    events = [event(602, "recovered"), event(602.5, "received"), event(4001, "recovered", cookie=9)]
    sampled = {"stack": 2, "blocked_weight_ns": 1_400 * MS}
    waits = [
        wait(-100, 602.4, "epoll_wait", **sampled),
        wait(1800, 2000.9, "sendto", stack=2, blocked_weight_ns=201 * MS),
        wait(3500, 4500, "epoll_wait", tid=OTHER, stack=2, blocked_weight_ns=1_000 * MS),
    ]
    return captured(tmp_path, rows, events, waits)


def test_the_sums_of_the_machine_interface(lossy: Capture) -> None:
    told = summarise(lossy)["retransmits"]
    json.dumps(told)
    assert (told["count"], told["segs"], told["losses"], told["connections"]) == (4, 6, 3, 3)
    assert told["by_kind"] == {
        "rto": {"count": 2, "segs": 4},
        "fast": {"count": 1, "segs": 1},
        "tlp": {"count": 1, "segs": 1},
    }
    assert [(peer["peer"], peer["segs"]) for peer in told["by_peer"]] == [
        ("10.0.0.5:5432", 4),
        ("10.0.0.9 -> :80", 1),
        ("[fd77::2]:5432", 1),
    ]
    assert told["lengthened"][0] == {
        "tid": READER,
        "tgid": PROCESS,
        "comm": "reader",
        "syscall": "epoll_wait",
        "begin_ns": START_NS - 100 * MS,
        "blocked_ns": 702_400_000,
        "overlap_ns": 602 * MS,
        "peer": "10.0.0.5:5432",
        "kinds": {"rto": 2},
        "evidence": "read next",
    }
    assert [line["evidence"] for line in told["lengthened"]] == list(EVIDENCE)
    assert (told["lengthened_count"], told["weak_count"]) == (2, 1)
    assert told["lengthened_ns"] == 602 * MS + 200_900_000
    assert told["blocked_ns"] == 702_400_000 + 200_900_000


def test_lists_are_cut_and_sums_are_not(lossy: Capture) -> None:
    told = summarise(lossy, top=1)["retransmits"]
    assert (len(told["by_peer"]), told["peers"], len(told["lengthened"])) == (1, 3, 1)
    assert told["lengthened_count"] == 2
    assert told["count"] == sum(kind["count"] for kind in told["by_kind"].values())


def test_a_capture_without_any(tmp_path: Path) -> None:
    capture = captured(tmp_path, [], [], [wait(0, 10)])
    summary = summarise(capture)
    told = summary["retransmits"]
    assert (told["count"], told["by_peer"], told["lengthened"]) == (0, [], [])
    assert "TCP" not in render_text(summary)
    assert b"Lost TCP" not in render_html(capture, summary)
    assert lengthened_text(told) == ""


def test_the_words(lossy: Capture) -> None:
    summary = summarise(lossy)
    text = " ".join(render_text(summary).split())
    assert (
        "803 ms of 2 blocking calls overlap lost TCP segments, the longest 602 ms in epoll_wait "
        "of reader (tid 813), 2 rto of 10.0.0.5:5432." in text
    )
    assert (
        "reader (tid 813) waited 702 ms in epoll_wait; 602 ms of it overlaps 2 rto of "
        "10.0.0.5:5432; it then read from that socket" in text
    )
    assert "waited 201 ms in sendto; all of it overlaps tlp of [fd77::2]:5432; it had used" in text
    assert "in all 803 ms of 903 ms in 2 calls" in text
    assert "besides, 1 call of which only the process is that of the socket" in text
    assert "10.0.0.5:5432 2 rto 2 4 1" in text


def test_what_only_the_process_speaks_for_is_no_answer(tmp_path: Path) -> None:
    capture = captured(tmp_path, LOSS, OVER, [wait(700, 1300, "epoll_wait", tid=OTHER)])
    summary = summarise(capture)
    assert answer(summary) == ""
    assert "the process owns that socket, no more is known" in " ".join(
        lengthened_text(summary["retransmits"]).split()
    )


def test_waits_for_the_cpu_that_took_longer_come_first(lossy: Capture) -> None:
    summary = summarise(lossy)
    assert answer(summary)
    summary["waits"]["tail"]["total_ns"] = 10**10
    assert answer(summary) == ""


HOSTILE = "<b>\x1b[2J\u202e]]>&" + "漢" * 60


@pytest.mark.parametrize("width", [60, 80, 120])
def test_names_stay_names_and_lines_stay_short(tmp_path: Path, width: int) -> None:
    rows = [sent_again(1000, daddr=HOSTILE, kind=HOSTILE)]
    waits = [wait(990, 1000.1, "epoll_wait")]
    told = summarise(captured(tmp_path, rows, [], waits))["retransmits"]
    told["lengthened"][0]["comm"] = HOSTILE
    page = Page(width, colour=False)
    write_section(page, told)
    lines = (page.text() + lengthened_text(told, width=width)).splitlines()
    assert len(lines) > 4
    for line in lines:
        assert cells(line) <= width
        assert line.isprintable()


def test_the_marks_on_the_page(lossy: Capture) -> None:
    window = Window(capture_ns=START_NS, begin_ns=0, end_ns=10_000 * MS)
    drawn = losses_html.strip(read_retransmits(lossy), window)
    wide = drawn.partition('<div class="narrow">')[0]
    assert re.findall("<title>([^<]*)", wide.replace("\xa0", " ")) == [
        "200 ms: 2 segments sent again (1 rto) to 10.0.0.5:5432",
        "601 ms: 2 segments sent again (1 rto) to 10.0.0.5:5432",
        "2.00 s: 1 segment sent again (1 tlp) to [fd77::2]:5432",
        "4.00 s: 1 segment sent again (1 fast) to 10.0.0.9 -&gt; :80",
    ]
    assert wide.count("class=missing") == 3


def test_the_page_has_no_markup_of_a_peer(tmp_path: Path) -> None:
    rows = [sent_again(1000, daddr="<script>alert(1)</script>", kind='"><img>')]
    capture = captured(tmp_path, rows, [], [wait(995, 1000.1)])
    page = render_html(capture, summarise(capture)).decode()
    assert "<script>alert" not in page and "<img>" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_the_flame_graph_keeps_its_width(lossy: Capture) -> None:
    profile = build_profile(lossy, kind="offcpu")
    tips = {stack[-1].name: us for stack, us in profile.stacks if stack[-1].kind == "network"}
    # The sample that stands for twice its wait has twice its overlap.
    assert tips == {
        "[tcp rto 10.0.0.5:5432]": 1_400_000 * 602_000 // 702_400,
        "[tcp tlp [fd77::2]:5432]": 201_000 * 200_900 // 200_900,
    }
    blocked = [us for stack, us in profile.stacks if stack[0].name == "[blocked]"]
    assert sum(blocked) == (1_400 + 201 + 1_000) * 1000
    assert profile.total_us == sum(us for _, us in profile.stacks)


def test_peers() -> None:
    assert peer_name("10.0.0.5", 5432, 40000) == "10.0.0.5:5432"
    assert peer_name("fd77::2", 443, 40000) == "[fd77::2]:443"
    assert peer_name("10.0.0.9", 50123, 443) == "10.0.0.9 -> :443"
    assert peer_name("10.0.0.9", 50123, 50124) == "10.0.0.9:50123"


def test_a_manifest_that_knows_no_start(tmp_path: Path) -> None:
    path = write_capture(
        tmp_path / "c",
        {"retransmits": filled("retransmits", LOSS), "waits": filled("waits", [wait(790, 1001)])},
        manifest={key: value for key, value in MANIFEST.items() if key != "start_ns"},
    )
    read: Retransmits = read_retransmits(open_capture(path), Selection(since_ns=0))
    assert len(read.waits) == 1
