"""What the kernel's own tracing says ran on a CPU: a second witness, independent of our probes.

A tracing instance of its own records switches and interrupts into the kernel's ring buffer, whose
pages are decoded here (the text that tracefs prints has microseconds only).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

# What a CPU does, where it is not a thread: thread ids are positive, the idle task is 0.
IRQ, SOFTIRQ, UNSEEN = -1, -2, -3

_PAGE = 4096
_BUFFER_KB = 64 << 10
_DRAIN_S = 0.2
_MISSED = 1 << 31  # in a page's header: events before it were overwritten
_PADDING, _TIME_EXTEND, _TIME_STAMP = 29, 30, 31

# Interrupts that the kernel enters beside the numbered ones.
_VECTORS = ("local_timer", "reschedule", "call_function", "call_function_single", "irq_work")


@dataclass(slots=True)
class Timeline:
    """What each instant of one CPU was spent on, from `start_ns` to `end_ns`."""

    cpu: int
    start_ns: int = 0
    end_ns: int = 0
    edges: list[int] = field(default_factory=list)
    states: list[int] = field(default_factory=list)

    def forget(self, since: int) -> None:
        """Who ran from edge number `since` on is not known after all."""
        for i in range(since, len(self.states)):
            if self.states[i] not in (IRQ, SOFTIRQ):
                self.states[i] = UNSEEN

    def spent(
        self,
        start_ns: np.ndarray[Any, Any],
        end_ns: np.ndarray[Any, Any],
        matches: Callable[[int], bool],
    ) -> np.ndarray[Any, Any]:
        """Tell how many ns of each [start, end) the CPU was in a state that `matches`."""
        edges = np.array(self.edges, np.int64)
        kinds = {state: matches(state) for state in set(self.states)}
        mask = np.array([kinds[state] for state in self.states], np.int64)
        total = np.concatenate(([0], np.cumsum(np.diff(edges) * mask[:-1])))

        def until(when: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            at = np.searchsorted(edges, when, "right") - 1
            return total[at] + mask[at] * (when - edges[at])

        return np.asarray(until(end_ns.astype(np.int64)) - until(start_ns.astype(np.int64)))


class Recording:
    """Records one CPU from `start` to `stop`; `timeline` decodes it, when there is time."""

    def __init__(self, tracefs: Path, cpu: int) -> None:
        self._cpu = cpu
        self._instance = tracefs / "instances" / f"latrace-test-{os.getpid()}"
        self._events: dict[int, tuple[str, int, int]] = {}
        """By number: what it is, and where the fields that matter lie (one twice, if only one)."""
        self._pages: list[bytes] = []
        self._instance.mkdir()
        self._fd = -1
        self._stopped = threading.Event()
        self._drainer = threading.Thread(target=self._drain, daemon=True)

    def start(self) -> None:
        write = self._write
        write("tracing_on", "0")
        write("trace_clock", "mono")
        write("tracing_cpumask", f"{1 << self._cpu:x}")
        write(f"per_cpu/cpu{self._cpu}/buffer_size_kb", str(_BUFFER_KB))
        self._enable("sched/sched_switch", "switch", "next_pid", "prev_pid")
        self._enable("irq/softirq_entry", "softirq_entry", "vec")
        self._enable("irq/softirq_exit", "softirq_exit", "vec")
        self._enable("irq/irq_handler_entry", "irq_entry", "irq")
        self._enable("irq/irq_handler_exit", "irq_exit", "irq")
        for vector in _VECTORS:
            if (self._instance / f"events/irq_vectors/{vector}_entry").exists():
                self._enable(f"irq_vectors/{vector}_entry", "irq_entry", "vector")
                self._enable(f"irq_vectors/{vector}_exit", "irq_exit", "vector")
        pipe = self._instance / f"per_cpu/cpu{self._cpu}/trace_pipe_raw"
        self._fd = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        write("tracing_on", "1")
        self._drainer.start()

    def _write(self, name: str, text: str) -> None:
        (self._instance / name).write_text(text)

    def _enable(self, event: str, kind: str, wanted: str, besides: str = "") -> None:
        folder = self._instance / "events" / event
        offsets = {}
        for line in (folder / "format").read_text().splitlines():
            parts = [part.strip() for part in line.split(";")]
            if parts[0].startswith("field:"):
                offsets[parts[0].split()[-1]] = int(parts[1].removeprefix("offset:"))
        number = int((folder / "id").read_text())
        self._events[number] = (kind, offsets[wanted], offsets[besides or wanted])
        (folder / "enable").write_text("1")

    def close(self) -> None:
        if self._drainer.is_alive():
            self.stop()
        self._instance.rmdir()

    def stop(self) -> None:
        """End the recording and take it over from the kernel."""
        self._write("tracing_on", "0")
        self._stopped.set()
        self._drainer.join()
        self._take()
        os.close(self._fd)

    def _drain(self) -> None:
        """Take pages as they fill: how many there will be depends on the machine."""
        while not self._stopped.wait(_DRAIN_S):
            self._take()

    def _take(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while page := os.read(self._fd, _PAGE):
                self._pages.append(page)

    def timeline(self) -> Timeline:
        """Tell what the CPU did. Fails when an event was lost."""
        result = Timeline(self._cpu)
        occupant, hard, soft, since = UNSEEN, 0, 0, 0
        for when, kind, value, before in chain.from_iterable(map(self._decode, self._pages)):
            if kind == "switch":
                if before != occupant:  # a switch that the kernel fired no event for
                    result.forget(since)
                occupant, since = value, len(result.edges)
            elif kind == "irq_entry":
                hard += 1
            elif kind == "irq_exit":
                hard = max(0, hard - 1)
            elif kind == "softirq_entry":
                soft += 1
            else:
                soft = max(0, soft - 1)
            state = IRQ if hard else SOFTIRQ if soft else occupant
            if not result.states or result.states[-1] != state:
                result.edges.append(when)
                result.states.append(state)
            result.end_ns = when
        assert result.edges, "nothing was recorded"
        first = next((i for i, state in enumerate(result.states) if state != UNSEEN), 0)
        result.start_ns = result.edges[first]
        return result

    def _decode(self, page: bytes) -> Iterator[tuple[int, str, int, int]]:
        """Decode the events of a page, as in include/linux/ring_buffer.h."""
        when, commit = struct.unpack_from("QQ", page)
        assert not commit & _MISSED, "the kernel's buffer overflowed"
        at, end = 16, 16 + (commit & 0xFFFFF)
        while at < end:
            (header,) = struct.unpack_from("I", page, at)
            length, delta = header & 31, header >> 5
            at += 4
            if length == _TIME_EXTEND:
                when += (struct.unpack_from("I", page, at)[0] << 27) + delta
                at += 4
                continue
            if length == _TIME_STAMP:
                low = (struct.unpack_from("I", page, at)[0] << 27) + delta
                when = when & ~((1 << 59) - 1) | low
                at += 4
                continue
            if length == _PADDING:
                if not delta:
                    return
                when += delta
                at += struct.unpack_from("I", page, at)[0]
                continue
            when += delta
            if length:
                body, size = at, length * 4
            else:
                size = struct.unpack_from("I", page, at)[0]
                body = at + 4
            at += size
            event = self._events.get(struct.unpack_from("H", page, body)[0])
            if event is not None:
                (value,) = struct.unpack_from("i", page, body + event[1])
                (besides,) = struct.unpack_from("i", page, body + event[2])
                yield when, event[0], value, besides


@contextlib.contextmanager
def recording(cpu: int) -> Iterator[Recording]:
    """Record what `cpu` does; nothing of it stays."""
    with contextlib.ExitStack() as undo:
        tracefs = Path("/sys/kernel/tracing")
        if not (tracefs / "instances").exists():
            tracefs = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="latrace-fs-")))
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.mount(b"none", os.fsencode(tracefs), b"tracefs", ctypes.c_ulong(0), None):
                raise OSError(ctypes.get_errno(), "no tracefs")
            undo.callback(libc.umount2, os.fsencode(tracefs), 2)  # MNT_DETACH
        one = Recording(tracefs, cpu)
        undo.callback(one.close)
        one.start()
        yield one
