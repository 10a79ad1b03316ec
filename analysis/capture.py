"""Read a capture: complete, cut off by a kill in the middle of a write, or still being written.

A stream is read up to its last whole record batch. Where it ends is found by walking the frames
of its messages (the encapsulated message format of Arrow's columnar specification), so that a
stream that was cut off is told from one that is damaged.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import ipc

from latrace.analysis.errors import CaptureError, damaged, unreadable
from latrace.analysis.schema import MANIFEST, SCHEMA_VERSION, SNAPSHOTS, SUFFIX, TABLES
from latrace.analysis.sleeps import sleep_of_waits

DEFAULT_PATH = Path("latrace.data")

# What tells which rows of these tables to take.
_KEYS = {**dict.fromkeys(SNAPSHOTS, ("snapshot",)), "threads": ("tid", "start_ns")}


class FrameName(NamedTuple):
    """What a frame is called, of which file, and how far into that function."""

    symbol: str
    module: str
    offset: int


class Capture:
    """A recorded run. Tables are read when they are first asked for. Made by `open_capture`.

    Every table has at least the columns of `schema.TABLES`, with their types; what the capture
    does not have is null. `hist` and `totals` hold the last whole snapshot only, `threads` the
    last row of each thread.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        """The capture's directory."""
        self.manifest = manifest
        """What manifest.json says: host, clock, targets, options, quality, overhead."""
        self._named_later: Mapping[int, FrameName] = {}

    def __repr__(self) -> str:
        return f"<Capture {os.fspath(self.path)!r}{'' if self.complete else ' (not complete)'}>"

    @property
    def complete(self) -> bool:
        """Whether the recording was closed in order. Otherwise its last moments are missing."""
        return self.manifest.get("complete") is True

    @cached_property
    def truncated(self) -> list[str]:
        """The tables whose stream ends in the middle, or too early: their last rows are lost."""
        return [name for name in TABLES if self._lacks(name)]

    @cached_property
    def waits(self) -> pa.Table:
        """One row for each recorded wait; not all waits, if the row threshold was above 0.

        `sleep`, the row in `sleeps` of the call that a wait lay in, is joined here: a call gets
        its row after its waits have theirs.
        """
        waits = self.table("waits")
        if waits["sleep"].null_count < waits.num_rows:
            return waits
        return _with_column(waits, "sleep", _calls_of(waits, self.table("sleeps")))

    @cached_property
    def slices(self) -> pa.Table:
        """What ran on a CPU while a target waited there: parts of recorded waits."""
        return self.table("slices")

    @cached_property
    def sleeps(self) -> pa.Table:
        """One row for each recorded sleep call.

        `stack` is joined here: that of the first wait in the call that has one.
        """
        sleeps = self.table("sleeps")
        waits = self.table("waits", columns=("tid", "run_ns", "stack"))
        call, stack = _calls_of(waits, sleeps), _numpy(waits, "stack", -1)
        taken = np.flatnonzero((call >= 0) & (stack >= 0))[::-1]  # of several, the first one stays
        found = np.full(sleeps.num_rows, -1, np.int32)
        found[call[taken]] = stack[taken]
        return _with_column(sleeps, "stack", found)

    @cached_property
    def samples(self) -> pa.Table:
        """What targets did on the CPU, sampled by the clock."""
        return self.table("samples")

    @cached_property
    def retransmits(self) -> pa.Table:
        """TCP segments that sockets of the targets sent once more."""
        return self.table("retransmits")

    @cached_property
    def socket_events(self) -> pa.Table:
        """When the losses of a socket were over, and who received something first then."""
        return self.table("socket_events")

    @cached_property
    def connections(self) -> pa.Table:
        """TCP connections with their TCP_INFO, when the trace began and in the end."""
        return self.table("connections")

    @cached_property
    def stacks(self) -> pa.Table:
        """Stacks as lists of frame ids, leaf first."""
        return self.table("stacks")

    @cached_property
    def frames(self) -> pa.Table:
        """The frames that stacks refer to."""
        return self.table("frames")

    @cached_property
    def threads(self) -> pa.Table:
        """One row for each thread of the targets, with its exact totals."""
        return self.table("threads")

    @cached_property
    def hist(self) -> pa.Table:
        """The exact in-kernel histograms: buckets that are not empty."""
        return self.table("hist")

    @cached_property
    def totals(self) -> pa.Table:
        """The exact in-kernel totals of each process."""
        return self.table("totals")

    def table(self, name: str, *, columns: Sequence[str] | None = None) -> pa.Table:
        """Read a table, or only some of its columns; nothing is kept.

        Raises KeyError for a name that is not in the contract, CaptureError for a damaged file.
        """
        named = self._named_later if name == "frames" else {}
        keys = ("id",) if named else _KEYS.get(name, ())
        wanted = None if columns is None else list(dict.fromkeys([*columns, *keys]))
        table = self._read(name, wanted)
        if name in SNAPSHOTS:
            snapshot = self._snapshots.get(name)
            if snapshot is not None:
                table = table.filter(pc.equal(table["snapshot"], pa.scalar(snapshot, pa.uint32())))
        elif named:
            table = _with_names(table, named)
        elif keys:
            table = _last_of_each(table, keys)
        return table if columns is None else table.select(list(columns))

    def name_frames(self, names: Mapping[int, FrameName]) -> None:
        """Let `frames` have these names, found after the recording, by frame id."""
        self._named_later = names

    @cached_property
    def _snapshots(self) -> dict[str, int]:
        """The snapshot to take of each table: the last one that all of them have."""
        present = {
            name: set(self._read(name, ["snapshot"])["snapshot"].drop_null().to_pylist())
            for name in SNAPSHOTS
        }
        present = {name: numbers for name, numbers in present.items() if numbers}
        shared = set.intersection(*present.values()) if present else set()
        return {name: max(shared or numbers) for name, numbers in present.items()}

    def _lacks(self, name: str) -> bool:
        """Tell whether rows of a table that was written are not there."""
        extent = self._extent(name)
        batches = self.manifest.get("batches")
        written = batches.get(name, 0) if isinstance(batches, dict) else 0
        if extent is None:
            return bool(written)
        if isinstance(written, int) and extent.batches < written:
            return True
        return extent.cut or (self.complete and not extent.ended)

    def _extent(self, name: str) -> _Extent | None:
        """Tell how much of a stream can be read; None: there is no such file."""
        file = self._file(name)
        try:
            with file.open("rb") as stream:
                return _measure(stream)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise unreadable(file, error) from error
        except _DamagedError as error:
            raise damaged(file, str(error)) from error

    def batches(self, name: str, *, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Yield a table piece by piece, as it was written: for tables larger than memory.

        `hist`, `totals` and `threads` come as written too, earlier snapshots included.

        Raises KeyError for a name that is not in the contract, CaptureError for a damaged file.
        """
        for batch in self._batches(name, columns):
            yield self._conform(pa.Table.from_batches([batch]), name, columns, rows=batch.num_rows)

    def _read(self, name: str, columns: Sequence[str] | None) -> pa.Table:
        batches = list(self._batches(name, columns))
        if not batches:
            return self._conform(pa.table({}), name, columns, rows=0)
        rows = sum(batch.num_rows for batch in batches)
        return self._conform(pa.Table.from_batches(batches), name, columns, rows=rows)

    def _batches(self, name: str, columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
        """Yield the whole record batches of a stream, with those of `columns` that it has."""
        extent = self._extent(name)
        if extent is None or not extent.schema:
            return
        file = self._file(name)
        try:
            with pa.OSFile(os.fspath(file)) as source:
                present = ipc.open_stream(source).schema.names
            if len(set(present)) != len(present):
                raise damaged(file, "it has a column twice")
            chosen = [
                index
                for index, column in enumerate(present)
                if columns is None or column in columns
            ] or [0]  # Arrow takes an empty list for all; the number of rows is wanted
            with pa.OSFile(os.fspath(file)) as source:
                options = ipc.IpcReadOptions(included_fields=chosen)
                reader = ipc.open_stream(source, options=options)
                for _ in range(extent.batches):
                    batch = reader.read_next_batch()
                    # Someone else may have made this capture: let no index point outside.
                    batch.validate(full=True)
                    yield batch
        except OSError as error:
            if error.errno is None:  # Arrow's own, such as a body that does not decompress
                raise damaged(file, str(error)) from error
            raise unreadable(file, error) from error
        except (pa.ArrowException, ValueError) as error:  # ValueError: names that are not UTF-8
            raise damaged(file, str(error)) from error

    def _conform(
        self, table: pa.Table, name: str, wanted: Sequence[str] | None, *, rows: int
    ) -> pa.Table:
        """Give a table the wanted columns, of the contract's types; those it lacks become null.

        With `wanted` None: those of the contract, then what the table has besides.
        """
        contract = TABLES[name]
        if wanted is None:
            wanted = list(dict.fromkeys([*contract.names, *table.column_names]))
        columns = []
        for column in wanted:
            if column not in contract.names:
                columns.append(table[column])
                continue
            kind = contract.field(column).type
            if column not in table.column_names:
                columns.append(pa.chunked_array([pa.nulls(rows, kind)]))
            elif table[column].type == kind:
                columns.append(table[column])
            else:
                try:
                    columns.append(table[column].cast(kind))
                except pa.ArrowException as error:
                    raise damaged(self._file(name), str(error)) from error
        return pa.table(dict(zip(wanted, columns, strict=True))).unify_dictionaries()

    def _file(self, name: str) -> Path:
        return self.path / (name + SUFFIX)


def open_capture(path: str | os.PathLike[str] = DEFAULT_PATH) -> Capture:
    """Open the capture in the directory `path`.

    Raises CaptureError when there is none, or it cannot be read by this program.
    """
    directory = Path(path)
    file = directory / MANIFEST
    try:
        text = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        if directory.exists():
            raise CaptureError(
                f"{directory} is not a capture: it has no {MANIFEST}",
                hint="name the directory that latrace wrote",
            ) from None
        raise CaptureError(
            f"there is no capture at {directory}",
            hint="record one with: sudo latrace attach --pid PID",
        ) from None
    except OSError as error:
        raise unreadable(file, error) from error
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise damaged(file, str(error)) from error
    version = manifest.get("schema") if isinstance(manifest, dict) else None
    if not isinstance(version, int) or version < 1:
        raise damaged(file, "it has no schema version")
    if version > SCHEMA_VERSION:
        raise CaptureError(
            f"{directory} has schema {version}; this latrace reads up to {SCHEMA_VERSION}",
            hint=f"read it with the latrace that wrote it ({manifest.get('latrace', 'newer')})",
        )
    return Capture(directory, manifest)


# --- tables ------------------------------------------------------------------------------------


def _numpy(table: pa.Table, name: str, null: int = 0) -> np.ndarray[Any, np.dtype[Any]]:
    found: np.ndarray[Any, np.dtype[Any]] = table[name].fill_null(null).to_numpy()
    return found


def _calls_of(waits: pa.Table, sleeps: pa.Table) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Tell the row in `sleeps` of the call that each wait lay in, -1: none."""
    return sleep_of_waits(
        *(_numpy(waits, name) for name in ("tid", "run_ns")),
        *(_numpy(sleeps, name) for name in ("tid", "enter_ns", "exit_ns")),
    )


def _with_column(
    table: pa.Table, name: str, values: np.ndarray[Any, np.dtype[np.integer[Any]]]
) -> pa.Table:
    """Give a table other values in a column that it has."""
    index = table.schema.get_field_index(name)
    return table.set_column(index, table.schema.field(index), pa.array(values))


def _with_names(frames: pa.Table, names: Mapping[int, FrameName]) -> pa.Table:
    """Put other names into rows of the table of frames."""
    found = [names.get(number) for number in frames["id"].to_pylist()]
    for index, column in enumerate(frames.schema):
        if column.name in FrameName._fields:
            values = frames[column.name].to_pylist()
            changed = [
                old if name is None else getattr(name, column.name)
                for old, name in zip(values, found, strict=True)
            ]
            frames = frames.set_column(index, column, pa.array(changed, column.type))
    return frames


def _last_of_each(table: pa.Table, key: Sequence[str]) -> pa.Table:
    """Keep the last row of those that share `key`, in the order of the first column."""
    if table.num_rows < 2:
        return table
    first, second = (
        table[name].combine_chunks().fill_null(0).to_numpy(zero_copy_only=False) for name in key
    )
    order = np.lexsort((np.arange(table.num_rows), second, first))
    first, second = first[order], second[order]
    last = np.append((first[1:] != first[:-1]) | (second[1:] != second[:-1]), True)
    return table.take(pa.array(order[last]))


# --- the frames of a stream --------------------------------------------------------------------

_CONTINUATION = 0xFFFFFFFF
_SCHEMA, _DICTIONARY, _RECORDS = 1, 2, 3  # MessageHeader in Arrow's format/Message.fbs


class _DamagedError(Exception):
    """A stream that cannot have been written like this."""


@dataclass(frozen=True, slots=True)
class _Extent:
    """How much of a stream can be read."""

    schema: bool  # its first message is there
    batches: int  # whole record batches
    cut: bool  # it ends inside a message, or before the records a dictionary came for
    ended: bool  # the mark of its end is there


def _measure(stream: BinaryIO) -> _Extent:
    size = os.fstat(stream.fileno()).st_size
    batches, schema, position, kind = 0, False, 0, 0
    for kind, end in _messages(stream, size):
        position = end
        schema = schema or kind == _SCHEMA
        batches += kind == _RECORDS
    ended = kind == 0 and position > 0
    cut = position != size and not ended
    return _Extent(schema, batches, cut or kind == _DICTIONARY, ended)


def _messages(stream: BinaryIO, size: int) -> Iterator[tuple[int, int]]:
    """Yield the kind of each whole message and where it ends; 0 is the mark of the end."""
    position = 0
    while position + 8 <= size:
        stream.seek(position)
        continuation, length = struct.unpack("<II", stream.read(8))
        if continuation != _CONTINUATION:
            raise _DamagedError(f"no message at byte {position}")
        position += 8
        if length == 0:
            yield 0, position
            return
        if position + length > size:
            return
        kind, body = _message_header(stream.read(length))
        position += length + body
        if position > size:
            return
        yield kind, position


def _message_header(data: bytes) -> tuple[int, int]:
    """Read the kind and the length of the body from a flatbuffer `Message`."""
    try:
        (table,) = struct.unpack_from("<I", data)
        (back,) = struct.unpack_from("<i", data, table)
        vtable = table - back
        (vtable_size,) = struct.unpack_from("<H", data, vtable)

        def field(index: int, form: str) -> int:
            # An absent field lies beyond the vtable's end or has offset 0: its value is 0.
            entry = 4 + 2 * index
            if entry + 2 > vtable_size:
                return 0
            (offset,) = struct.unpack_from("<H", data, vtable + entry)
            return int(struct.unpack_from(form, data, table + offset)[0]) if offset else 0

        kind, body = field(1, "<B"), field(3, "<q")
    except struct.error as error:
        raise _DamagedError("a message without a header") from error
    if kind not in (_SCHEMA, _DICTIONARY, _RECORDS) or body < 0:
        raise _DamagedError(f"a message of unknown kind {kind}")
    return kind, body
