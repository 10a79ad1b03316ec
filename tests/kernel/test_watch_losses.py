"""`latrace watch --retransmits` of a service in a network of its own, whose wire loses segments."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from network import Host, two_hosts
from watching import said, watching

# What else a shared machine does can be a spike of its own, or hide one.
pytestmark = pytest.mark.kernel

PORT = 7720
QUICK = ("--before", "4s", "--after", "2s", "--window", "3s", "--cooldown", "1s")
ANSWERS = """
import socket, sys, threading
def answer(connection):
    with connection, connection.makefile("rwb") as stream:
        while size := stream.readline():
            stream.read(int(size))
            stream.write(b"done\\n")
            stream.flush()
with socket.create_server(("::", int(sys.argv[1])), family=socket.AF_INET6,
                          dualstack_ipv6=True) as server:
    while True:
        threading.Thread(target=answer, args=(server.accept()[0],), daemon=True).start()
"""
ASKS = """
import socket, sys, threading, time
def ask():
    with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as connection:
        with connection.makefile("rwb") as stream:
            while True:
                stream.write(b"20000\\n" + bytes(20000))
                stream.flush()
                if stream.readline() != b"done\\n":
                    return  # whoever answered has been ended
                time.sleep(0.005)
for _ in range(4):
    threading.Thread(target=ask).start()
print("ready", flush=True)
"""
"""Threads that send 20 kB, and wait for the answer, again and again."""
LOSES = f"tcp dport {PORT} meta length > 500 numgen inc mod 12 5"


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts(offload=False) as (near, far):
        far.start(sys.executable, "-Ic", ANSWERS, PORT)
        far.wait_for_listener(PORT)
        yield near, far


def service(near: Host, far: Host) -> subprocess.Popen[str]:
    process: subprocess.Popen[str] = near.start(
        sys.executable, "-Ic", ASKS, far.v4, PORT, stdout=subprocess.PIPE, text=True
    )
    with process.stdout or contextlib.nullcontext() as stdout:
        assert stdout and stdout.readline() == "ready\n"
    return process


def test_a_burst_of_loss(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    """The loss comes first, with the peer, and the waits for an answer that it made longer."""
    near, far = hosts
    asks = service(near, far)
    with watching(
        tmp_path / "s", "--pid", asks.pid, "--retransmits", 20, *QUICK, "--once"
    ) as watch:
        time.sleep(3)
        began_ns = time.monotonic_ns()
        far.lose(LOSES, chain="input")
        watch.wait_for("fired: --retransmits 20: ")
        far.heal()
        assert watch.ended() == 0
        sent_again = near.counter("TcpRetransSegs")
    capture, spike = watch.bundle().capture, watch.bundle().spike
    assert capture.complete
    (trigger,) = spike["triggers"]
    assert trigger["kind"] == "retransmits" and trigger["value"] >= trigger["threshold"] == 20
    # Every segment that the namespace counted in that time, and no other.
    (books,) = capture.manifest["netns"]
    counted = books["retrans_segs_end"] - books["retrans_segs_start"]
    assert sum(capture.table("retransmits")["segs"].to_pylist()) == counted <= sent_again
    analysis = spike["analysis"]
    assert began_ns < analysis["spike"]["start_ns"] < analysis["spike"]["end_ns"]
    assert analysis["cause"] == "lost"
    assert analysis["name"] == f"{far.v4}:{PORT}"
    lost = analysis["parts"]["spike"]["retransmits"]
    assert trigger["threshold"] <= lost["segs"] <= counted
    # On a busy host a segment is sent again now and then that was not lost, but late (TLP).
    assert analysis["parts"]["baseline"]["retransmits"]["segs"] < lost["segs"] / 2
    # Who waits for an answer waits longer.
    assert lost["lengthened_count"] > 0 and 0 < lost["lengthened_ns"] <= lost["blocked_ns"]
    first, second, *_ = analysis["sentences"]
    assert first.startswith(f"{lost['segs']:,} TCP segments were sent again (limit 20) at ")
    assert second.startswith(f"They went to {far.v4}:{PORT}; ")
    assert "waited for what was lost" in second
    (headline,) = said(watch, first)
    assert headline == f"{first} Lost TCP segments to {far.v4}:{PORT}."


def test_a_wire_that_loses_nothing(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    near, far = hosts
    asks = service(near, far)
    with watching(tmp_path / "s", "--pid", asks.pid, "--retransmits", 20, *QUICK) as watch:
        time.sleep(8)
        assert watch.bundles == []
        far.lose(LOSES, chain="input")  # it was armed, and could have
        watch.wait_for("fired: --retransmits 20: ")
        far.heal()
        assert watch.stop() == 0
    assert len(watch.bundles) == 1
