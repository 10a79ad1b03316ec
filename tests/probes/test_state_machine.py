"""The wait state machine against a model that knows only the definition of a wait.

A wait is a stay on a run queue: from the first moment the thread is runnable and off the CPU to
the moment it runs.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st


@dataclass
class Model:
    """One thread, by the definition. Starts out on the CPU."""

    on_cpu: bool = True
    runnable: bool = True
    runnable_since: int = 0
    off_since: int = 0
    blocked_ns: int = 0
    woken_on_cpu: bool = False
    kind: int = 2
    waits: list[tuple[int, int, int]] = field(default_factory=list)

    def waking(self, now: int) -> None:
        if self.on_cpu:
            self.woken_on_cpu = True
        elif not self.runnable:
            self.runnable, self.runnable_since, self.kind = True, now, 0
            self.blocked_ns = now - self.off_since

    def queued(self, now: int) -> None:
        if self.on_cpu:
            self.woken_on_cpu = False
        else:
            self.waking(now)

    def leave(self, now: int, runnable: bool) -> None:
        woken, self.woken_on_cpu = self.woken_on_cpu, False
        self.on_cpu, self.off_since = False, now
        self.runnable = runnable or woken
        self.runnable_since, self.kind, self.blocked_ns = now, 2 if runnable else 0, 0

    def enter(self, now: int) -> None:
        self.waits.append((now - self.runnable_since, self.kind, self.blocked_ns))
        self.on_cpu, self.woken_on_cpu = True, False


class Real:
    """The same thread, in the probes' C."""

    def __init__(self, probes: ctypes.CDLL) -> None:
        self.c = probes
        self.state = ctypes.create_string_buffer(probes.state_size())
        self.waits: list[tuple[int, int, int]] = []
        started = ctypes.c_int()
        self.c.enter(self.state, 1, ctypes.byref(started))
        assert not started.value

    def waking(self, now: int) -> None:
        self.c.waking(self.state, now)

    def queued(self, now: int) -> None:
        self.c.queued(self.state, now)

    def leave(self, now: int, runnable: bool) -> None:
        self.c.leave(self.state, now, runnable)

    def enter(self, now: int) -> None:
        started = ctypes.c_int()
        wait = self.c.enter(self.state, now, ctypes.byref(started))
        assert started.value
        self.waits.append((wait, self.c.kind(self.state), self.c.blocked(self.state)))


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["waking", "queued", "block", "preempt", "enter"]), st.integers(0, 10**7)
    ),
    max_size=60,
)


@given(STEPS)
def test_any_order_the_kernel_can_produce(
    probes: ctypes.CDLL, steps: list[tuple[str, int]]
) -> None:
    """Wakings come at any time; a thread leaves a CPU it is on and enters one when runnable."""
    model, real, now = Model(), Real(probes), 1000
    for step, later in steps:
        now += later + 1
        if step in ("block", "preempt"):
            if model.on_cpu:
                model.leave(now, step == "preempt")
                real.leave(now, step == "preempt")
        elif step == "enter":
            if not model.on_cpu and model.runnable:
                model.enter(now)
                real.enter(now)
        else:
            getattr(model, step)(now)
            getattr(real, step)(now)
    assert real.waits == model.waits


def test_the_first_waking_counts(probes: ctypes.CDLL) -> None:
    real = Real(probes)
    real.leave(100, False)
    for now in (200, 250, 270):
        real.waking(now)
    real.queued(280)
    real.enter(300)
    assert real.waits == [(100, 0, 100)]


def test_queued_later_than_woken(probes: ctypes.CDLL) -> None:
    real = Real(probes)
    real.leave(100, False)
    real.waking(200)
    real.queued(220)
    assert probes.wakeup(real.state) == 220


def test_a_preempted_thread_is_queued_all_along(probes: ctypes.CDLL) -> None:
    """Preempted between setting its state to sleep and sleeping, then woken."""
    real = Real(probes)
    real.leave(100, True)
    real.waking(150)
    real.queued(151)
    assert probes.wakeup(real.state) == 0
    real.enter(200)
    assert real.waits == [(100, 2, 0)]


def test_a_waking_that_raced_with_the_switch_out(probes: ctypes.CDLL) -> None:
    real = Real(probes)
    real.waking(90)
    real.leave(100, False)
    real.queued(110)
    real.enter(130)
    assert real.waits == [(30, 0, 0)]


def test_a_wake_up_before_it_slept_is_no_wait(probes: ctypes.CDLL) -> None:
    real = Real(probes)
    real.waking(90)
    real.queued(91)
    real.leave(100, False)
    real.waking(150)
    real.enter(160)
    assert real.waits == [(10, 0, 50)]


def test_clocks_that_disagree_give_no_huge_wait(probes: ctypes.CDLL) -> None:
    real = Real(probes)
    real.leave(100, False)
    real.waking(205)
    real.enter(200)
    assert real.waits == [(0, 0, 105)]
