"""The parts of a sleep call against a model that knows only what happened, moment by moment."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from host_build import PROBES, compile_c
from hypothesis import given
from hypothesis import strategies as st

from latrace.tracer import sleeps, syscalls

SOURCE = """
#include "latrace.h"
#include "sleep.h"

unsigned long state_size(void) { return sizeof(struct sleep_state); }
int call_of(long long syscall) { return sleep_call_of(syscall); }
void begin(struct sleep_state *s, u64 enter, u64 armed, u64 deadline, u64 fires, u64 every, int f)
{
	*s = (struct sleep_state){ enter, armed, deadline, fires };
	s->interval_ns = every;
	s->from = f;
}
void woken(struct sleep_state *s, u64 now) { s->woken_ns = now; }
void ran(struct sleep_state *s, u64 now, u64 wait) { sleep_ran(s, now, wait); }
void back(struct sleep_state *s, u64 now) { s->back_ns = now; }
void parts(struct sleep_state *s, struct sleep_parts *p) { sleep_parts(s, p); }
"""


class Parts(ctypes.Structure):
    """struct sleep_parts."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("exit", "late", "expirations")),
        *(
            (name, ctypes.c_int64)
            for name in ("overshoot", "entry", "timer", "run_queue", "returning")
        ),
        ("early", ctypes.c_int),
    )


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    directory = tmp_path_factory.mktemp("sleep")
    loaded = ctypes.CDLL(str(compile_c(SOURCE, directory / "sleep.so", "-shared", "-fPIC")))
    u64, pointer = ctypes.c_uint64, ctypes.c_void_p
    loaded.state_size.restype = ctypes.c_ulong
    loaded.call_of.argtypes = [ctypes.c_longlong]
    loaded.begin.argtypes = [pointer, *[u64] * 5, ctypes.c_int]
    loaded.woken.argtypes = loaded.back.argtypes = [pointer, u64]
    loaded.ran.argtypes = [pointer, u64, u64]
    loaded.parts.argtypes = [pointer, ctypes.POINTER(Parts)]
    return loaded


@dataclass
class Lived:
    """One call as it went by; `waits`: stays on a run queue, as (begin, end), in order."""

    enter: int
    armed: int
    deadline: int
    fires: int
    woken: int
    waits: list[tuple[int, int]]
    back: int
    """When it was seen at the door to user mode; 0: it was not."""


def taken_apart(probe: ctypes.CDLL, lived: Lived, *, interval: int = 0, source: int = 0) -> Parts:
    state = ctypes.create_string_buffer(probe.state_size())
    probe.begin(state, lived.enter, lived.armed, lived.deadline, lived.fires, interval, source)
    probe.woken(state, lived.woken)
    for begin, end in lived.waits:
        probe.ran(state, end, end - begin)
    if lived.back:
        probe.back(state, lived.back)
    parts = Parts()
    probe.parts(state, ctypes.byref(parts))
    return parts


@st.composite
def lives(draw: st.DrawFn) -> Lived:
    step = st.integers(0, 10**7)
    enter = 10**9 + draw(step)
    armed = enter + draw(step)
    deadline = max(1, enter + draw(st.integers(-(10**7), 10**8)))
    fires = deadline + draw(step)
    woken = armed + draw(st.integers(0, 2 * 10**8))
    # Its first wait begins where it is woken, or before: preempted on its way to sleep.
    begin = woken - draw(st.sampled_from([0, draw(step)]))
    now = woken + draw(step)
    waits = [(begin, now)]
    for _ in range(draw(st.integers(0, 3))):
        begin = now + draw(step)
        now = begin + draw(step)
        waits.append((begin, now))
    return Lived(enter, armed, deadline, fires, woken, waits, draw(st.sampled_from([0, now + 1])))


@given(lives())
def test_parts_are_what_happened(probe: ctypes.CDLL, lived: Lived) -> None:
    parts = taken_apart(probe, lived)
    over = lived.back or lived.waits[-1][1]
    due = max(lived.enter, lived.deadline)
    assert parts.exit == over
    assert parts.late == max(0, lived.enter - lived.deadline)
    assert bool(parts.early) == (lived.woken < due)
    if parts.early:
        assert (parts.overshoot, parts.entry, parts.timer, parts.run_queue) == (0, 0, 0, 0)
        return
    queued = sum(end - max(begin, lived.woken) for begin, end in lived.waits)
    assert parts.overshoot == over - due
    assert parts.run_queue == queued
    assert parts.returning == over - lived.woken - queued
    assert parts.entry + parts.timer == lived.woken - due
    assert min(parts.entry, parts.timer, parts.run_queue, parts.returning) >= 0
    if lived.woken >= lived.fires:
        assert parts.entry == max(lived.armed, lived.fires, due) - due


def test_preempted_before_it_armed_its_timer(probe: ctypes.CDLL) -> None:
    """poll() notes its deadline, 1,000 on, then loses the CPU until 5,000 after it."""
    late = Lived(1000, 7000, 2000, 2000, 7300, [(7300, 7400)], 7450)
    parts = taken_apart(probe, late)
    assert (parts.entry, parts.timer, parts.run_queue, parts.returning) == (5000, 300, 100, 50)


def test_quota_after_the_wake_up(probe: ctypes.CDLL) -> None:
    """Back on the CPU, and off again on its way out: all of it is run queue."""
    lived = Lived(1000, 1000, 2000, 2000, 2060, [(2060, 2100), (2110, 90_000)], 90_005)
    parts = taken_apart(probe, lived)
    assert (parts.timer, parts.run_queue, parts.returning) == (60, 40 + 87_890, 15)


def test_the_last_time_at_the_door_counts(probe: ctypes.CDLL) -> None:
    """At the door it was sent off the CPU again: that was not the return."""
    state = ctypes.create_string_buffer(probe.state_size())
    probe.begin(state, 1000, 1000, 2000, 2000, 0, 0)
    probe.woken(state, 2000)
    probe.ran(state, 2010, 10)
    probe.back(state, 2015)
    probe.ran(state, 9000, 6980)
    parts = Parts()
    probe.parts(state, ctypes.byref(parts))
    assert (parts.exit, parts.run_queue, parts.returning) == (9000, 6990, 10)


@pytest.mark.parametrize(("after", "expirations"), [(0, 1), (99, 1), (100, 2), (350, 4)])
def test_expirations_of_a_periodic_timerfd(
    probe: ctypes.CDLL, after: int, expirations: int
) -> None:
    lived = Lived(1000, 1000, 2000, 2000, 2000, [(2000, 2000 + after)], 0)
    assert taken_apart(probe, lived, interval=100, source=2).expirations == expirations
    assert taken_apart(probe, lived, source=0).expirations == 0


def test_calls_are_those_of_the_tracer(probe: ctypes.CDLL) -> None:
    """Each number is the kernel's for that name, and no other number is a sleep call."""
    text = (Path(PROBES) / "sleep.h").read_text()
    declared = re.search(r"enum sleep_call \{(.*?)SLEEP_CALLS", text, re.S)
    assert declared
    names = re.findall(r"SLEEP_(\w+)", declared[1])
    assert [name.lower() for name in names] == list(sleeps.CALLS)
    for number in range(500):
        index = probe.call_of(number)
        name = syscalls.syscall_name(number)
        assert (index < len(sleeps.CALLS)) == (name in sleeps.CALLS), name
        if index < len(sleeps.CALLS):
            assert sleeps.CALLS[index] == name
    assert probe.call_of(-1) == len(sleeps.CALLS)
