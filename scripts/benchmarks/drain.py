"""One reader draining one ring that a producer fills: a process of its own for each measurement.

Arguments: reader, ring bytes, events per second (0: as many as possible), seconds, folder. Prints
JSON: what was written, lost and read, and the reader's CPU time.

Readers:
  decode    latrace's ring, cells split by type and viewed as records
  capture   the same, then the capture's rows, compressed and on disk: latrace's whole drain
  callback  bcc's ring_buffer_poll() with a callback that does nothing
  decoded   the same; the callback looks at the record through ctypes, as bcc's own tools do
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from latrace.tracer import compile as compiler
from latrace.tracer.outputs import create_output_dir
from latrace.tracer.records import STACK, WAIT, Record
from latrace.tracer.ring import Ring
from latrace.tracer.rows import split, wait_columns
from latrace.tracer.stacks import StackCells
from latrace.tracer.writer import CaptureWriter

from .children import OUR_ENVIRONMENT, python

READER_CPU, PRODUCER_CPU = 0, 1
_SOURCE = Path(__file__).with_name("producer.bpf.c")
_NO_WAKEUP, _WAKEUP_WHEN_NEEDED = 1, 0
_FLUSH_S = 0.5


class WaitRecord(ctypes.Structure):
    """struct wait_record of probes/latrace.h, for a reader that goes by ctypes."""

    _fields_ = tuple(
        (name, ctypes.c_char * 16 if kind.kind == "S" else np.ctypeslib.as_ctypes_type(kind))
        for name, kind in ((name, WAIT[name]) for name in WAIT.names or ())
    )


@dataclass(slots=True)
class Program:
    """The producer's program, loaded, and its maps."""

    module: Any
    fd: int
    ring_bytes: int

    @classmethod
    def load(cls, ring_bytes: int, submit_flags: int) -> Program:
        """Compile and load it."""
        constants = {
            "RING_PAGES": ring_bytes // mmap.PAGESIZE,
            "SUBMIT_FLAGS": submit_flags,
        }
        BPF = compiler.import_bcc().BPF
        module = BPF(
            text=_SOURCE.read_bytes(),
            cflags=[
                *(f"-D{name}={value}" for name, value in constants.items()),
                f"-I{compiler.PROBES}",
                "-Wno-unused-function",
            ],
        )
        return cls(module, module.load_func(b"lat_produce", BPF.SCHED_CLS).fd, ring_bytes)

    def counts(self) -> tuple[int, int]:
        """How many records were written and how many found the ring full."""
        table = self.module[b"lat_counts"]
        return table[0].value, table[1].value


class Pace:
    """When to look at the ring next, by the rule of latrace's session: an eighth full each time."""

    def __init__(self) -> None:
        self._sleep_s = 0.001

    def sleep(self, used: float) -> None:
        """Sleep; `used` is the share of the ring that was full at the last look."""
        self._sleep_s = min(max(self._sleep_s * min(2.0, 0.125 / max(used, 1e-3)), 0.001), 0.1)
        time.sleep(self._sleep_s)


def drain_decode(program: Program, ended: Callable[[], bool]) -> int:
    """Ring to records."""
    ring, pace, events = _ring(program), Pace(), 0
    while True:
        last, used = ended(), ring.used()
        while len(cells := ring.read()):
            events += len(split(cells)[Record.WAIT].view(WAIT))
        if last:
            return events
        pace.sleep(used)


def drain_capture(program: Program, ended: Callable[[], bool]) -> int:
    """Ring to a capture on disk."""
    ring, pace = _ring(program), Pace()
    folder = Path(sys.argv[5]) / "capture"
    writer = CaptureWriter(create_output_dir(folder, force=True), {})
    stacks = StackCells(lambda _stacks: None)
    stacks.add(np.empty(0, STACK))
    pending: list[np.ndarray[Any, np.dtype[np.void]]] = []
    flush_at, events = time.monotonic() + _FLUSH_S, 0

    def write() -> int:
        if not pending:
            return 0
        waits = np.concatenate(pending)
        pending.clear()
        # As the session does before it writes. None of these rows has a stack.
        ready = np.ones(len(waits), np.bool_)
        for key in ("stack_key", "waker_key"):
            absent, unnamed = stacks.waits_for(waits[key])
            ready &= ~(absent | unnamed)
        waits = waits if ready.all() else waits[ready]
        writer.append(
            "waits",
            wait_columns(waits, stacks.ids(waits["stack_key"]), stacks.ids(waits["waker_key"])),
        )
        return len(waits)

    while True:
        last, used = ended(), ring.used()
        while len(cells := ring.read()):
            pending.append(split(cells)[Record.WAIT].view(WAIT))
            if sum(map(len, pending)) >= 1 << 16:
                events += write()
        if last or time.monotonic() >= flush_at:
            events += write()
            writer.flush()
            flush_at = time.monotonic() + _FLUSH_S
        if last:
            writer.close(complete=True)
            return events
        pace.sleep(used)


def drain_callback(program: Program, ended: Callable[[], bool]) -> int:
    """bcc's way, and nothing done with the event."""
    events = 0

    def on_event(_context: Any, _data: Any, _size: int) -> None:
        nonlocal events
        events += 1

    _poll(program, ended, on_event)
    return events


def drain_decoded(program: Program, ended: Callable[[], bool]) -> int:
    """bcc's way, with the event looked at."""
    events, kind = 0, ctypes.POINTER(WaitRecord)

    def on_event(_context: Any, data: Any, _size: int) -> None:
        nonlocal events
        record = ctypes.cast(data, kind).contents
        if record.wait_ns:
            events += 1

    _poll(program, ended, on_event)
    return events


def _poll(
    program: Program, ended: Callable[[], bool], on_event: Callable[[Any, Any, int], None]
) -> None:
    program.module[b"lat_ring"].open_ring_buffer(on_event)
    while not ended():
        program.module.ring_buffer_poll(50)
    program.module.ring_buffer_consume()


def _ring(program: Program) -> Ring:
    return Ring(program.module[b"lat_ring"].map_fd, program.ring_bytes)


READERS = {
    "decode": (drain_decode, _NO_WAKEUP),
    "capture": (drain_capture, _NO_WAKEUP),
    "callback": (drain_callback, _WAKEUP_WHEN_NEEDED),
    "decoded": (drain_decoded, _WAKEUP_WHEN_NEEDED),
}


def main(reader: str, ring_bytes: int, per_s: int, seconds: float) -> dict[str, Any]:
    """Drain while a producer runs; returns what came of it."""
    drain, flags = READERS[reader]
    program = Program.load(ring_bytes, flags)
    os.sched_setaffinity(0, {READER_CPU})
    if reader == "capture":
        wait_columns(np.zeros(1, WAIT), np.zeros(1, np.int32), np.zeros(1, np.int32))
    producer = subprocess.Popen(
        python("producer", *map(str, (program.fd, per_s, seconds, PRODUCER_CPU))),
        pass_fds=[program.fd],
        env=OUR_ENVIRONMENT,
        stdout=subprocess.PIPE,
    )
    try:
        before_s = time.process_time()
        events = drain(program, lambda: producer.poll() is not None)
        cpu_s = time.process_time() - before_s
        made, took_s = producer.communicate()[0].split()
    finally:
        if producer.poll() is None:
            producer.kill()
            producer.wait()
    written, lost = program.counts()
    return {
        "made": int(made),
        "seconds": float(took_s),
        "written": written,
        "lost": lost,
        "read": events,
        "cpu_s": cpu_s,
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))))
