"""The last seconds of a trace, in memory: what its files would hold, in pieces that grow old.

Each flush turns the rows of a table that came since into one piece, an Arrow IPC stream of its own,
compressed as in a capture's files. So memory is counted to the byte, and what is dropped is dropped
whole. A bundle is made of the pieces that lie in its window.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from latrace.tracer.writer import ORDER, Rows, Stream

if TYPE_CHECKING:
    import pyarrow as pa

TIMES: Final = {
    "waits": "run_ns",
    "slices": "victim_run_ns",
    "sleeps": "exit_ns",
    "samples": "ts_ns",
    "retransmits": "ts_ns",
    "socket_events": "ts_ns",
    "connections": "closed_ns",
}
"""By which column a row of the table lies in a window or not."""

_NAMES: Final = frozenset({"stacks", "frames"})
"""What rows of other tables refer to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Rows of one table that were flushed together."""

    number: int
    """Counts up with every piece."""
    table: str
    first_ns: int
    last_ns: int
    """Of its rows, CLOCK_MONOTONIC; names have no age: 0."""
    epoch: int
    """See `FlightRecorder.begin_epoch`."""
    data: bytes

    def between(self, after_ns: int, until_ns: int) -> Iterator[pa.RecordBatch]:
        """Yield the rows later than `after_ns` and not later than `until_ns`."""
        import pyarrow as pa  # noqa: PLC0415 - heavy, after the probes are attached
        import pyarrow.compute as pc  # noqa: PLC0415
        from pyarrow import ipc  # noqa: PLC0415

        for batch in ipc.open_stream(self.data):
            column = TIMES.get(self.table)
            if column is None or after_ns < self.first_ns <= self.last_ns <= until_ns:
                yield batch
                continue
            times = batch.column(column)
            yield batch.filter(
                pc.and_(
                    pc.greater(times, pa.scalar(after_ns, pa.uint64())),
                    pc.less_equal(times, pa.scalar(until_ns, pa.uint64())),
                )
            )


class FlightRecorder:
    """Takes rows as a capture's writer does, and keeps them until they are dropped.

    Not thread-safe. Nothing here can fail for want of a disk.
    """

    def __init__(self) -> None:
        self._pending: dict[str, Rows] = {}
        self._pieces: deque[Piece] = deque()
        self._names: deque[Piece] = deque()
        self._next = 0
        self.epoch = 0
        self.bytes = 0
        """What is kept."""

    # ---------------------------------------------------------- as a Writer

    def append(self, table: str, batch: Mapping[str, Any]) -> None:
        """Add rows; see `CaptureWriter.append`."""
        from latrace.analysis import schema  # noqa: PLC0415 - as above

        rows = self._pending.get(table)
        if rows is None:
            rows = self._pending[table] = Rows(table, schema.TABLES[table], batch)
        rows.add(batch)

    def flush(self) -> None:
        """Make pieces of everything appended."""
        for table in ORDER:
            rows = self._pending.get(table)
            batch = None if rows is None else rows.take()
            if batch is not None:
                self._keep(table, batch)

    def _keep(self, table: str, batch: pa.RecordBatch) -> None:
        stream = Stream(batch.schema)
        stream.encode(batch)
        stream.finish()
        first_ns = last_ns = 0
        if table in TIMES:
            times = np.asarray(batch.column(TIMES[table]))
            first_ns, last_ns = int(times.min()), int(times.max())
        piece = Piece(
            number=self._next,
            table=table,
            first_ns=first_ns,
            last_ns=last_ns,
            epoch=self.epoch,
            data=stream.take(),
        )
        self._next += 1
        self.bytes += len(piece.data)
        (self._names if table in _NAMES else self._pieces).append(piece)

    def update_manifest(self, changes: Mapping[str, Any]) -> None:
        """Nothing: each bundle has a manifest of its own."""

    def close(self, *, complete: bool) -> None:  # noqa: ARG002 - as of a Writer
        """Forget everything. Safe to call again."""
        self._pieces.clear()
        self._names.clear()
        self._pending.clear()
        self.bytes = 0

    # ------------------------------------------------------- age and memory

    def begin_epoch(self) -> None:
        """From now on no row refers to a name of an epoch before (see Recorder.begin_epoch).

        Names have no age: a row may refer to one that was flushed long before. An epoch's can be
        dropped when none of its rows is kept.
        """
        self.epoch += 1

    def drop(self, until_ns: int, *, before_epoch: int) -> None:
        """Drop pieces that end at `until_ns` or earlier, and the names of epochs before one."""
        # Rows come about in the order of time; one that has to wait for its stack is a little late.
        kept = [piece for piece in self._pieces if piece.last_ns > until_ns]
        if len(kept) < len(self._pieces):
            self._pieces = deque(kept)
        while self._names and self._names[0].epoch < before_epoch:
            self._names.popleft()
        self.bytes = sum(len(each.data) for each in (*self._pieces, *self._names))

    def exceeds(self, most_bytes: int) -> bool:
        """Whether more is kept, and some of it can go."""
        return self.bytes > most_bytes and bool(self._pieces)

    def drop_oldest(self) -> int | None:
        """Drop the oldest piece of rows; returns when its last row was; None: there is none."""
        if not self._pieces:
            return None
        piece = self._pieces.popleft()
        self.bytes -= len(piece.data)
        return piece.last_ns

    def since(self, number: int) -> list[Piece]:
        """The pieces from a number on, in the order in which they can be written."""
        found = [piece for piece in (*self._names, *self._pieces) if piece.number >= number]
        return sorted(found, key=lambda piece: piece.number)

    @property
    def next_number(self) -> int:
        """The number of the piece that comes next."""
        return self._next
