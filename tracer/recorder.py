"""What the drain and the counters give, written into the capture's tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .counters import counter_columns, thread_columns
from .naming import NamedStacks, Naming
from .records import (
    CELL_BYTES,
    PT_REGS,
    SAMPLE,
    SLEEP,
    SLICE,
    SOCKET,
    THREAD,
    WAIT,
    Place,
    Record,
)
from .rows import sample_columns, slice_columns, wait_columns
from .sleeps import sleep_columns
from .sockets import retransmit_columns, socket_event_columns
from .stacks import RawStack, StackCells
from .target_stack import copy_stack
from .unwinding.walker import WHOLE

STACK_FOLLOWS_NS, NAME_FOLLOWS_NS = 500_000_000, 10_000_000_000
"""A stack's cells follow its wait at once; to walk and name it can take the parsing of a file. A
row that is older has waited in vain."""

_ROWS_PER_APPEND = 1 << 16
_NAMING_TIMEOUT_S = 30.0

Copies = Sequence[tuple[npt.NDArray[np.void], npt.NDArray[np.uint8]]]

# Record → its dtype, table, a time in it, its columns, and the keys of the stacks it refers to.
_ROWS: dict[Record, tuple[np.dtype[np.void], str, str, Callable[..., Any], tuple[str, ...]]] = {
    Record.WAIT: (WAIT, "waits", "run_ns", wait_columns, ("stack_key", "waker_key")),
    Record.SLICE: (SLICE, "slices", "victim_run_ns", slice_columns, ("stack_key",)),
    Record.SLEEP: (SLEEP, "sleeps", "exit_ns", sleep_columns, ("stack_key",)),
    Record.SAMPLE: (SAMPLE, "samples", "ts_ns", sample_columns, ("stack_key",)),
    Record.RETRANSMIT: (SOCKET, "retransmits", "ts_ns", retransmit_columns, ()),
    Record.SOCKET: (SOCKET, "socket_events", "ts_ns", socket_event_columns, ()),
}


class Writer(Protocol):
    """Where the rows go: to the files of a capture, or into memory; see `CaptureWriter`."""

    def append(self, table: str, batch: Mapping[str, Any]) -> None:
        """Add rows: columns by name."""

    def flush(self) -> None:
        """Let go of everything appended."""

    def update_manifest(self, changes: Mapping[str, Any]) -> None:
        """Change the manifest."""

    def close(self, *, complete: bool) -> None:
        """Nothing more comes. Safe to call again."""


@dataclass(slots=True)
class _Held:
    """Rows not yet written."""

    dtype: np.dtype[np.void]
    parts: list[npt.NDArray[np.void]] = field(default_factory=list)
    count: int = 0


class Recorder:
    """Turns records into rows. Not thread-safe; the names of frames are looked up elsewhere.

    Every method that writes raises LatraceError when that fails.
    """

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._naming = Naming()
        self._stacks = StackCells(self._naming.add)
        self._held = {record: _Held(dtype) for record, (dtype, *_) in _ROWS.items()}
        self._snapshots = 0
        self.lost_stacks = 0
        """Stacks that came without their row, or in part; known at the end."""

    def add_stacks(self, cells: npt.NDArray[np.void], copies: Copies) -> None:
        """Take stack cells, shape (n,) of dtype STACK, and the copies read after them."""
        self._stacks.add_copies(copies)
        self._stacks.add(cells)

    def add(self, record: Record, rows: npt.NDArray[np.void], now_ns: int) -> None:
        """Take rows of one table, shape (n,) of the record's cells, in the order of the ring."""
        held = self._held[record]
        held.parts.append(rows.view(held.dtype))
        held.count += len(rows)
        if held.count >= _ROWS_PER_APPEND:
            self._write_rows(record, now_ns)
            self._writer.flush()

    def append(self, table: str, columns: Mapping[str, Any]) -> None:
        """Write rows that refer to no stack."""
        self._writer.append(table, columns)

    def exec(self, tgid: int) -> None:
        """The process maps other files from now on."""
        self._naming.changed(tgid)

    def begin_epoch(self) -> None:
        """Let rows from now on refer to no stack and no frame that was written before."""
        self._write_all(None)
        self._naming.begin_epoch()

    @property
    def stacks(self) -> int:
        """How many stacks have come."""
        return self._naming.added

    def hurry(self) -> None:
        """Have the stacks that have come named at once, and not when there are more."""
        self._naming.hurry()

    def has_named(self, stacks: int) -> bool:
        """Whether a flush now would write the names of the first so many stacks."""
        return self._naming.has_named(stacks)

    @property
    def copy_pages(self) -> int:
        """How many pages the copies of user stacks should have."""
        return self._naming.copy_pages

    def flush(self, now_ns: int | None) -> None:
        """Put everything known so far on disk; with None also rows whose stack may still come."""
        self._write_all(now_ns)
        self._writer.flush()

    def _write_all(self, now_ns: int | None) -> None:
        self._take_names(self._naming.take())
        for record in self._held:
            self._write_rows(record, now_ns)

    def _take_names(self, named: NamedStacks) -> None:
        self._stacks.resolve(named.numbers)
        self._write_names(named)

    def _write_rows(self, record: Record, now_ns: int | None) -> None:
        """Write rows; those whose stack may still come are held back, unless `now_ns` is None."""
        held = self._held[record]
        if not held.parts:
            return
        _, table, time_field, columns, keys = _ROWS[record]
        rows = np.concatenate(held.parts)
        held.parts, held.count = [], 0
        if now_ns is not None:
            ready = np.ones(len(rows), np.bool_)
            for absent, unnamed in (self._stacks.waits_for(rows[key]) for key in keys):
                ready &= ~absent | (rows[time_field] + np.uint64(STACK_FOLLOWS_NS) < now_ns)
                ready &= ~unnamed | (rows[time_field] + np.uint64(NAME_FOLLOWS_NS) < now_ns)
            if not ready.all():
                held.parts = [rows[~ready]]
                held.count = len(held.parts[0])
                rows = rows[ready]
        self._writer.append(table, columns(rows, *(self._stacks.ids(rows[key]) for key in keys)))

    def write_threads(
        self,
        threads: npt.NDArray[np.void],
        cgroups: Mapping[int, str],
        stacks: list[int] | None = None,
    ) -> None:
        """Write the final rows of threads.

        `threads`: shape (n,) of dtype THREAD; `cgroups` by process; `stacks`: ids of where they
        stand, -1 unknown.
        """
        self._writer.append("threads", thread_columns(threads, cgroups, stacks))

    def write_open_threads(
        self, raw: bytes, cgroups: Mapping[int, str], *, end_ns: int, stacks: bool, copies: bool
    ) -> int:
        """Write the final rows of threads still there; returns how many of them wait right now.

        `raw`: what the iterator at the end wrote, records with the kernel stack and the user's
        registers behind each. `stacks`: take those, with `copies` of user stacks.
        """
        at = 0
        records: list[npt.NDArray[np.void]] = []
        ids: list[int] = []
        while at < len(raw):
            record = np.frombuffer(raw, THREAD, 1, at)
            at += CELL_BYTES
            depth = int(record["frames"][0])
            kernel = np.frombuffer(raw, "<u8", depth, at)
            at += 8 * depth
            user, copy = record["user_ip"][record["user_ip"] != 0], None
            number = -1
            if len(user):
                if stacks and copies:
                    regs = np.frombuffer(raw, "<u8", PT_REGS, at)
                    copy = copy_stack(int(record["tgid"][0]), regs)
                at += 8 * PT_REGS
            if stacks and depth:
                stack = RawStack(
                    0, int(record["tgid"][0]), kernel, user, has_user=len(user) > 0, copy=copy
                )
                number = self._naming.number(stack)
            records.append(record)
            ids.append(number)
        if not records:
            return 0
        threads = np.concatenate(records)
        after_end = threads["ts_ns"] - np.minimum(threads["ts_ns"], end_ns)
        threads["open_ns"] -= np.minimum(threads["open_ns"], after_end)
        self.write_threads(threads, cgroups, ids)
        return int(np.isin(threads["place"], (Place.WAITING, Place.UNKNOWN)).sum())

    def _write_names(self, named: NamedStacks) -> None:
        if named.frames:
            numbers, frames = zip(*named.frames, strict=True)
            self._writer.append(
                "frames",
                {
                    "id": list(numbers),
                    "symbol": [frame.symbol for frame in frames],
                    "module": [frame.module for frame in frames],
                    "offset": np.array([frame.offset for frame in frames], np.uint64),
                    "space": [frame.space for frame in frames],
                    "path": [frame.path for frame in frames],
                    "build_id": [frame.build_id for frame in frames],
                    "address": [frame.address for frame in frames],
                },
            )
        if named.stacks:
            numbers, ids, ends, kernel_frames = zip(*named.stacks, strict=True)
            self._writer.append(
                "stacks",
                {
                    "id": list(numbers),
                    "frames": list(ids),
                    "whole": [end == WHOLE for end in ends],
                    "end": list(ends),
                    "kernel_frames": list(kernel_frames),
                },
            )

    def write_counters(
        self,
        hist: npt.NDArray[np.void],
        slots: Mapping[int, int],
        overshoots: npt.NDArray[np.void],
    ) -> None:
        """Write the exact counters as they are now, so that a killed trace has them too.

        `hist`: shape (histograms, cpus) of dtype HIST; `slots`: whose each histogram is;
        `overshoots`: shape (sleep calls,) of dtype OVERSHOOT.
        """
        tables = counter_columns(hist, slots, overshoots, snapshot=self._snapshots)
        for table, columns in tables.items():
            self._writer.append(table, columns)
        self._snapshots += bool(tables)

    def update_manifest(self, changes: Mapping[str, Any]) -> None:
        """Change the manifest and replace its file."""
        self._writer.update_manifest(changes)

    def symbols(self) -> dict[str, Any]:
        """How the look-up of names has fared so far."""
        return self._naming.stats()

    def finish(self) -> dict[str, Any]:
        """Wait for the last names and write what was held back; returns how the look-up fared."""
        self._take_names(self._naming.finish(_NAMING_TIMEOUT_S))
        for record in self._held:
            self._write_rows(record, None)
        self.lost_stacks += self._stacks.forget()
        return self.symbols()

    def close(self, *, complete: bool) -> None:
        """Close the capture. Safe to call again."""
        self._naming.close()
        self._writer.close(complete=complete)
