"""A bundle on its way to the disk: what the flight recorder holds, and what comes until its end.

It is written from the moment the watch fires, so that a kill costs its end and not its beginning.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from latrace.tracer.counters import counter_columns, thread_columns
from latrace.tracer.errors import LatraceError
from latrace.tracer.outputs import OutputDir
from latrace.tracer.writer import CaptureWriter

from .bundles import write_spike
from .flight import FlightRecorder, Piece
from .marks import LongestWaits, Mark, grown_hist, grown_overshoots

_PIECES_AT_ONCE: Final = 8
_NO_END: Final = 2**63 - 1


@dataclass(slots=True)
class _Waits:
    """What is kept of the rows that were written: who waited for how long at most."""

    tid: list[npt.NDArray[np.int32]] = field(default_factory=list)
    tgid: list[npt.NDArray[np.int32]] = field(default_factory=list)
    wait_ns: list[npt.NDArray[np.uint64]] = field(default_factory=list)

    def longest(self) -> LongestWaits:
        """The longest wait by thread and by process, ns."""
        if not self.tid:
            return LongestWaits({}, {})
        wait_ns = np.concatenate(self.wait_ns)
        return LongestWaits(
            _greatest(np.concatenate(self.tid), wait_ns),
            _greatest(np.concatenate(self.tgid), wait_ns),
        )


def _greatest(keys: npt.NDArray[np.int32], values: npt.NDArray[np.uint64]) -> dict[int, int]:
    order = np.lexsort((values, keys))
    keys, values = keys[order], values[order]
    last = np.append(keys[1:] != keys[:-1], True) if len(keys) else np.zeros(0, np.bool_)
    return dict(zip(keys[last].tolist(), values[last].tolist(), strict=True))


class Bundle:
    """Writes the capture of one spike. Every method raises LatraceError when that fails.

    `start`: where its window begins; `head`: the manifest's first words.
    """

    def __init__(
        self, out: OutputDir, flight: FlightRecorder, *, start: Mark, head: Mapping[str, Any]
    ) -> None:
        self.out = out
        self.start = start
        self._writer = CaptureWriter(out, head)
        self._flight = flight
        self._next = 0
        self._todo: list[Piece] = []
        self._waits = _Waits()
        self.hold()

    def hold(self) -> None:
        """Hold on to the pieces that came since, so that they cannot be dropped meanwhile."""
        self._todo += self._flight.since(self._next)
        self._next = self._flight.next_number

    def step(self, *, until_ns: int = _NO_END) -> bool:
        """Write some of what there is, up to a moment; returns whether that was all."""
        self.hold()
        for piece in self._todo[:_PIECES_AT_ONCE]:
            for batch in piece.between(self.start.at_ns, until_ns):
                if piece.table == "waits":
                    self._waits.tid.append(np.asarray(batch.column("tid")))
                    self._waits.tgid.append(np.asarray(batch.column("tgid")))
                    self._waits.wait_ns.append(np.asarray(batch.column("wait_ns")))
                self._writer.append(piece.table, batch)
        del self._todo[:_PIECES_AT_ONCE]
        self._writer.flush()
        return not self._todo

    def append(self, table: str, columns: Mapping[str, Any]) -> None:
        """Add rows that were in no piece."""
        if columns:
            self._writer.append(table, columns)

    def write_file(self, name: str, data: bytes) -> None:
        """Lay a file beside the tables."""
        self.out.replace(name, data)

    def longest(self) -> LongestWaits:
        """The longest waits of the rows written so far."""
        return self._waits.longest()

    def count(
        self, end: Mark, threads: npt.NDArray[np.void], cgroups: Mapping[int, str]
    ) -> tuple[int, npt.NDArray[np.void]]:
        """Write what the kernel counted between the start and `end`.

        `threads`: shape (n,) of dtype THREAD, already of that time alone. Returns how many waits
        there were, and the sleep calls, shape (sleep calls,) of dtype OVERSHOOT.
        """
        hist = grown_hist(self.start, end, self.longest())
        overshoots = grown_overshoots(self.start, end)
        slots = dict(enumerate(end.tgids))
        tables = counter_columns(hist.reshape(-1, 1), slots, overshoots, snapshot=0)
        for table, columns in tables.items():
            self.append(table, columns)
        if len(threads):
            self.append("threads", thread_columns(threads, cgroups))
        return int(hist["kinds"].sum()), overshoots

    def close(self, manifest: Mapping[str, Any], spike: Mapping[str, Any]) -> None:
        """Write the last words and mark it complete."""
        self._writer.flush()
        self._writer.update_manifest(manifest)
        write_spike(self.out, spike)
        self._writer.close(complete=True)

    def abandon(self) -> None:
        """Leave it as it is: not complete."""
        with contextlib.suppress(LatraceError):
            self._writer.close(complete=False)
