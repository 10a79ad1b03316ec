"""The live lines of retransmits: what they say, how wide they are, how many there may be."""

from __future__ import annotations

import errno
import ipaddress
from typing import Any

import numpy as np
import numpy.typing as npt

from latrace.tracer.live import RetransmitLines
from latrace.tracer.records import SOCKET
from latrace.tracer.sockets import STATES

START_NS = 10**12


def retransmits(count: int = 1, **fields: Any) -> npt.NDArray[np.void]:
    rows = np.zeros(count, SOCKET)
    wanted = {
        "ts_ns": START_NS + 1_234_567_890,
        "kind": 1,
        "segs": 3,
        "family": 2,
        "state": STATES.index("established"),
        "sport": 40001,
        "dport": 443,
        "tgid": 812,
        "comm": "nginx",
        "saddr": ipaddress.ip_address("10.0.0.1").packed,
        "daddr": ipaddress.ip_address("10.0.0.2").packed,
    } | fields
    for name, value in wanted.items():
        address = name in {"saddr", "daddr"}
        rows[name] = np.void(value.ljust(16, b"\0")) if address else value
    return rows


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def lines_of(*batches: npt.NDArray[np.void]) -> list[str]:
    told: list[str] = []
    lines = RetransmitLines(told.append)
    lines.begin()
    for rows in batches:
        lines.add(rows, START_NS)
    lines.close()
    return "".join(told).splitlines()


def test_a_line_says_what_it_was_and_whose() -> None:
    head, line = lines_of(retransmits())
    assert head == "    TIME KIND   SEGS CONNECTION                        STATE      OWNER"
    assert line == "   1.235 rto       3 10.0.0.1:40001 > 10.0.0.2:443     estab      nginx/812"


def test_an_owner_without_a_name_and_a_failure() -> None:
    failed = retransmits(kind=0, err=-errno.EPERM, state=99, comm="")
    line = " ".join(lines_of(failed)[1].split())
    assert line == "1.235 ? 3 10.0.0.1:40001 > 10.0.0.2:443 ? ?/812 not sent: EPERM"


def test_addresses_of_ipv6_and_those_of_ipv4_in_it() -> None:
    ends = {
        "saddr": ipaddress.ip_address("fd77::1").packed,
        "daddr": ipaddress.ip_address("::ffff:10.0.0.9").packed,
    }
    line = lines_of(retransmits(family=10, **ends))[1]
    assert " [fd77::1]:40001 > 10.0.0.9:443 " in line


def test_columns_give_way_before_a_line_breaks() -> None:
    usual = retransmits(tgid=12_000, kind=4, state=STATES.index("new-syn-recv"))
    assert len(lines_of(usual)[1]) <= 80
    widest = retransmits(
        tgid=4_000_000,
        comm="a-name-of-15-by",
        **{end: ipaddress.ip_address("255.255.255.255").packed for end in ("saddr", "daddr")},
    )
    line = lines_of(widest)[1]
    assert "  255" not in line
    assert line.endswith(" estab a-name-of-15-by/4000000")


def test_names_are_hostile() -> None:
    line = lines_of(retransmits(comm="\x1b[2Jx\n\u202e".encode()))[1]
    assert line.endswith(r" \x1b[2Jx\n\u202e/812")


def test_twenty_lines_a_second_and_how_many_were_left_out() -> None:
    clock = Clock()
    told: list[str] = []
    lines = RetransmitLines(told.append, clock=clock)
    for _ in range(10):
        lines.add(retransmits(5), START_NS)
    shown = "".join(told).splitlines()
    assert len(shown) == 19
    clock.now = 1.0
    lines.update()
    lines.update()
    shown = "".join(told).splitlines()
    assert shown[19:] == ["     ... 31 more in that second, 93 segments"]
    lines.add(retransmits(3), START_NS)
    assert len("".join(told).splitlines()) == 23
    lines.close()
    assert len("".join(told).splitlines()) == 23
    lines.add(retransmits(100), START_NS)
    lines.close()
    shown = "".join(told).splitlines()
    assert len(shown) == 20 + 20
    assert shown[-1] == "     ... 84 more in that second, 252 segments"
