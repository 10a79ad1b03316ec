"""TCP segments sent once more, on the live kernel: each of them, why, and whose they are."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from network import Host, two_hosts
from tracing import WORKLOADS, Traced, trace, trace_running

from latrace.analysis.connections import summarise_connections
from latrace.tracer.options import Options

pytestmark = pytest.mark.kernel

TALK = [sys.executable, "-I", WORKLOADS / "talk.py"]
PORT = 7700
LARGE = "meta length > 500"  # data, and not what is sent without


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts() as both:
        yield both


@pytest.fixture
def plain_hosts() -> Iterator[tuple[Host, Host]]:
    """On their wire every segment is a packet of its own."""
    with two_hosts(offload=False) as both:
        yield both


def sink(host: Host) -> None:
    host.start(*TALK, "sink", PORT)
    host.wait_for_listener(PORT)


def talk(host: Host, output: Path, mode: str, *args: object, **how: Any) -> Traced:
    """Trace one of the modes of tests/workloads/talk.py."""
    return trace(
        host.command(*TALK, mode, *args),
        output,
        make_options=lambda pid: Options(pids=(pid,), children=True),
        **how,
    )


def children_of(pid: int) -> set[int]:
    return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def rows(traced: Traced) -> list[dict[str, Any]]:
    assert traced.quality["lost_events"] == 0
    found: list[dict[str, Any]] = traced.capture.table("retransmits").to_pylist()
    return found


def connections(traced: Traced) -> list[dict[str, Any]]:
    table = traced.capture.table("connections").to_pylist()
    return [row for row in table if row["state"] != "listen"]


def agree(traced: Traced) -> int:
    """Assert that rows, connections and the program's TCP_INFO tell the same; how many segments."""
    told = rows(traced)
    total = 0
    for name, segs in traced.facts.items():
        kind, _, ports = name.partition(".")
        if kind != "segs":
            continue
        sport, dport = map(int, ports.split("-"))
        mine = [row for row in told if (row["sport"], row["dport"]) == (sport, dport)]
        assert sum(row["segs"] for row in mine) == segs
        assert {row["tgid"] for row in mine} <= {traced.facts[f"owner.{ports}"]}
        assert {row["tid"] for row in mine} <= {traced.facts[f"tid.{ports}"]}
        (connection,) = [
            each for each in connections(traced) if (each["sport"], each["dport"]) == (sport, dport)
        ]
        assert connection["end_total_retrans"] == segs
        assert {row["cookie"] for row in mine} <= {connection["cookie"]}
        for row, before in zip(mine[1:], mine, strict=False):
            assert row["total_retrans"] == before["total_retrans"] + row["segs"]
        total += int(segs)
    assert sum(row["segs"] for row in told) == total
    return total


@pytest.mark.parametrize("where", ["arriving", "leaving"])
@pytest.mark.parametrize("offload", [True, False], ids=["joined", "single"])
def test_each_segment_that_the_kernel_counts(tmp_path: Path, *, offload: bool, where: str) -> None:
    """Joined into large buffers or not, lost unseen or refused on the way out: 20,000 and more."""
    with two_hosts(offload=offload) as (near, far):
        sink(far)
        far.lose(f"tcp dport {PORT} {LARGE} numgen inc mod 6 5", chain="input")
        if where == "leaving":
            # The sender is told of these: what it sends once more counts, and fails.
            near.lose(f"tcp dport {PORT} {LARGE} numgen inc mod 40 39")
        size = 120_000_000 if offload else 100_000_000
        traced = talk(near, tmp_path / "c", "connect", far.v4, PORT, size, 65536)
        total = agree(traced)
        assert total >= 5_000
        # All of this namespace's are those of the one socket.
        assert near.counter("TcpRetransSegs") == total
        errors = [row["err"] for row in rows(traced)]
        assert any(errors) == (where == "leaving")
        assert offload == (len(errors) < 0.5 * total)


LOST = {
    # Which of 20 packets of data are lost, and what is done about it, in order.
    "one": ("== 10", ["fast"]),
    "two-apart": ("{ 5, 10 }", ["fast", "fast"]),
    "the-last": ("== 19", ["tlp"]),
    "the-last-and-its-probe": ("{ 19, 20 }", ["tlp", "rto"]),
    "and-the-timeout": ("{ 19, 20, 21 }", ["tlp", "rto", "rto"]),
}


@pytest.mark.parametrize("what", LOST)
def test_why_it_was_sent_again(tmp_path: Path, plain_hosts: tuple[Host, Host], what: str) -> None:
    """Packets that follow tell of a loss; where none does, a probe, and then the timer."""
    near, far = plain_hosts
    sink(far)
    which, kinds = LOST[what]
    far.lose(f"tcp dport {PORT} {LARGE} numgen inc mod 1000000 {which}", chain="input")
    traced = talk(near, tmp_path / "c", "connect", far.v4, PORT, 20_000, 1000)
    assert agree(traced) == len(kinds)
    told = rows(traced)
    assert [row["kind"] for row in told] == kinds
    assert {(row["segs"], row["len"], row["err"]) for row in told} == {(1, 1000, 0)}
    assert {row["state"] for row in told} == {"established"}


def test_a_syn_that_is_lost(tmp_path: Path, hosts: tuple[Host, Host]) -> None:
    near, far = hosts
    sink(far)
    far.lose(f"tcp dport {PORT} tcp flags syn / syn,ack numgen inc mod 1000 == 0", chain="input")
    traced = talk(near, tmp_path / "c", "connect", far.v4, PORT, 5000, 1000)
    assert agree(traced) == 1
    (row,) = rows(traced)
    assert (row["kind"], row["state"], row["len"]) == ("rto", "syn-sent", 1)
    assert row["rto_us"] >= 1_000_000


def test_a_syn_ack_that_is_lost(tmp_path: Path, hosts: tuple[Host, Host]) -> None:
    """It is the listener's: the connection has nobody yet."""
    near, far = hosts
    far.lose(
        f"tcp sport {PORT} tcp flags syn,ack / syn,ack numgen inc mod 1000 == 0", chain="input"
    )
    far.start(*TALK, "fetch", near.v4, PORT, 1)
    traced = talk(near, tmp_path / "c", "accept", near.v4, PORT, 5000, 1000)
    assert agree(traced) >= 1
    told = rows(traced)
    assert {row["kind"] for row in told} == {"synack"}
    assert {row["state"] for row in told} == {"new-syn-recv"}


def test_a_request_is_of_all_who_listen(tmp_path: Path, hosts: tuple[Host, Host]) -> None:
    """Three processes wait for it: the SYN-ACK that is sent again is of each."""
    near, far = hosts
    # No answer is heard: the listeners wait on, until the trace has ended.
    far.lose(f"tcp sport {PORT}", chain="input")
    far.start(*TALK, "fetch", near.v4, PORT, 1)
    program = near.start(*TALK, "workers", near.v4, PORT, 1000, 1000, stdin=subprocess.DEVNULL)
    near.wait_for_listener(PORT)
    options = Options(pids=(program.pid,), children=True, duration_s=3.5)
    summary = summarise_connections(trace_running(options, tmp_path / "c").capture)
    (each,) = summary["connections"]
    assert each["by_kind"]["synack"] == each["segs"] >= 1
    processes = {program.pid, *children_of(program.pid)}
    assert {owner["tgid"] for owner in each["owners"]} == processes
    assert len(processes) == 4


@pytest.mark.parametrize("mode", ["connect", "earlier", "shared", "threads", "passed"])
def test_whose_it_is_where_it_connects(
    tmp_path: Path, plain_hosts: tuple[Host, Host], mode: str
) -> None:
    """Also one that was there before, threads with a socket each, and one handed to a child."""
    near, far = plain_hosts
    sink(far)
    far.lose(f"tcp dport {PORT} {LARGE} numgen inc mod 7 3", chain="input")
    traced = talk(near, tmp_path / "c", mode, far.v4, PORT, 200_000, 1000)
    assert agree(traced) > 20
    owners = {tgid for name, tgid in traced.facts.items() if name.startswith("owner.")}
    tids = {tid for name, tid in traced.facts.items() if name.startswith("tid.")}
    assert (traced.pid in owners) == (mode not in {"passed", "shared"})
    assert len(tids) == (2 if mode == "threads" else 1)
    (was,) = {row["start_total_retrans"] for row in connections(traced)}
    assert was == (0 if mode in {"earlier", "shared"} else None)
    if mode == "shared":
        (have,) = [row["owners"] for row in connections(traced)]
        assert have == sorted({traced.pid, *owners})


@pytest.mark.parametrize(("mode", "peers"), [("accept", 1), ("workers", 3), ("reuseport", 6)])
def test_whose_it_is_where_it_accepts(
    tmp_path: Path, plain_hosts: tuple[Host, Host], mode: str, peers: int
) -> None:
    """One process, three that share a listener, three with a listener each on the same port."""
    near, far = plain_hosts
    far.lose(f"tcp sport {PORT} {LARGE} numgen inc mod 7 3", chain="input")
    far.start(*TALK, "fetch", near.v4, PORT, peers)
    traced = talk(near, tmp_path / "c", mode, near.v4, PORT, 200_000, 1000)
    assert agree(traced) > 20 * peers
    owners = {tgid for name, tgid in traced.facts.items() if name.startswith("owner.")}
    assert (traced.pid in owners) == (mode == "accept")
    assert len(connections(traced)) == peers
    if mode == "workers":
        assert len(owners) == 3


def test_both_families(tmp_path: Path, plain_hosts: tuple[Host, Host]) -> None:
    """IPv6, and IPv4 in a socket of the other family, each written as people write it."""
    near, far = plain_hosts
    sink(far)
    far.lose(f"tcp dport {PORT} {LARGE} numgen inc mod 7 3", chain="input")
    for number, (address, source) in enumerate([(far.v6, near.v6), (f"::ffff:{far.v4}", near.v4)]):
        traced = talk(near, tmp_path / str(number), "connect", address, PORT, 100_000, 1000)
        assert agree(traced) > 10
        told = {(row["family"], row["saddr"], row["daddr"]) for row in rows(traced)}
        assert told == {("inet6", source, far.v6 if number == 0 else far.v4)}
        assert {(row["family"], row["saddr"], row["daddr"]) for row in connections(traced)} == told


def test_a_container(tmp_path: Path, plain_hosts: tuple[Host, Host]) -> None:
    """In namespaces of its own for processes and files, as well."""
    near, far = plain_hosts
    sink(far)
    far.lose(f"tcp dport {PORT} {LARGE} numgen inc mod 7 3", chain="input")
    inside = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    traced = trace(
        near.command(*inside, *TALK, "connect", far.v4, PORT, 100_000, 1000),
        tmp_path / "c",
        make_options=lambda pid: Options(pids=(pid,), children=True),
    )
    told = rows(traced)
    (segs,) = [segs for name, segs in traced.facts.items() if name.startswith("segs.")]
    assert sum(row["segs"] for row in told) == segs > 10
    # The program knows itself as process 1; the rows have its number here.
    processes = {row["tgid"] for row in traced.capture.threads.to_pylist()}
    (owner,) = {row["tgid"] for row in told}
    assert owner in processes - {traced.pid, 1}
    assert {row["netns"] for row in told} == {row["netns"] for row in connections(traced)}
