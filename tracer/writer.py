"""Write a capture while it is being recorded: one Arrow IPC stream per table, and the manifest.

What was appended is on disk, as whole record batches, after every `flush`; whatever happens to
the process then, the capture opens up to there. Columns of names carry their own small dictionary
with each batch (a replacement, in Arrow's words), so that a batch depends on none before it.

pyarrow is imported when a writer is made, not with this module: the probes are attached first.
"""

# ruff: noqa: PLC0415 - that is why imports stand inside functions here

from __future__ import annotations

import copy
import errno
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from latrace.tracer.errors import LatraceError
from latrace.tracer.outputs import OutputDir, write_error

if TYPE_CHECKING:
    import numpy.typing as npt
    import pyarrow as pa

# What a row refers to is on disk before it.
ORDER = (
    "frames", "stacks", "threads", "sleeps", "waits", "slices", "samples",
    "connections", "retransmits", "socket_events", "totals", "hist",
)  # fmt: skip

# Measured with a million rows of waits, append and flush together: lz4 0.18 us of CPU and 27
# bytes a row, zstd 0.23 us and 14 bytes, none 0.34 us and 96 bytes (the page cache costs more).
_COMPRESSION = "lz4"

_PENDING_ROWS = 1 << 18  # as many waiting rows (about 25 MB of waits) are written at once


def names_from_bytes(values: npt.NDArray[np.bytes_]) -> pa.DictionaryArray:
    """Turn an array of `S<n>` (a comm of each row) into a column of names, in bulk.

    A name ends at its first NUL. Bytes that are not UTF-8 become backslash escapes.
    """
    import pyarrow as pa

    values = np.ascontiguousarray(values)
    fixed = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(values.dtype.itemsize), len(values), [None, pa.py_buffer(values)]
    )
    encoded = fixed.dictionary_encode()
    return _renamed(encoded, map(_text, encoded.dictionary.to_pylist()))


def names_from_raw(
    values: npt.NDArray[np.uint8], name_of: Callable[[bytes], str]
) -> pa.DictionaryArray:
    """Turn an array of bytes, shape (n, width), into a column of names: `name_of` once for each."""
    import pyarrow as pa

    fixed = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(values.shape[1]), len(values), [None, pa.py_buffer(np.ascontiguousarray(values))]
    )
    encoded = fixed.dictionary_encode()
    return _renamed(encoded, map(name_of, encoded.dictionary.to_pylist()))


def names_from_codes(
    codes: npt.NDArray[np.integer[Any]], name_of: Callable[[int], str | None]
) -> pa.DictionaryArray:
    """Turn an array of integers into a column of names, calling `name_of` once for each value.

    None becomes null.
    """
    import pyarrow as pa

    encoded = pa.array(np.ascontiguousarray(codes)).dictionary_encode()
    return _renamed(encoded, map(name_of, encoded.dictionary.to_pylist()))


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")


def _renamed(encoded: pa.DictionaryArray, names: Iterable[str | None]) -> pa.DictionaryArray:
    """Give the codes of `encoded` new names; codes that get the same name become one."""
    import pyarrow as pa

    distinct: dict[str, int] = {}
    renumber = [
        None if name is None else distinct.setdefault(name, len(distinct)) for name in names
    ]
    indices = encoded.indices
    if renumber != list(range(len(distinct))):
        indices = pa.array(renumber, pa.int32()).take(indices)
    return pa.DictionaryArray.from_arrays(indices, _strings(list(distinct)))


def _strings(values: Sequence[str | None]) -> pa.Array:
    import pyarrow as pa

    try:
        return pa.array(values, pa.utf8())
    except UnicodeEncodeError:  # surrogates: bytes of a path or command line that are not UTF-8
        return pa.array([None if value is None else _escaped(value) for value in values], pa.utf8())


def _escaped(value: str) -> str:
    try:
        raw = value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # a surrogate that stands for no byte
        raw = value.encode("utf-8", "backslashreplace")
    return raw.decode("utf-8", "backslashreplace")


def first_manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What the file says from the beginning of a capture: `manifest`, and that it goes on."""
    from latrace.analysis import schema

    first: dict[str, Any] = {"schema": schema.SCHEMA_VERSION}
    _merge(first, {**manifest, "complete": False})
    return first


def encode_manifest(manifest: Mapping[str, Any]) -> bytes:
    """A manifest as the file's content. Raises TypeError or ValueError for what JSON lacks."""
    text = json.dumps(manifest, indent=1, allow_nan=False, default=_plain)
    return text.encode("ascii") + b"\n"


class CaptureWriter:
    """Writes a capture into a directory made by `create_output_dir`, which it then owns.

    Appending copies what it is given; nothing keeps a view of the caller's arrays. Not
    thread-safe. Errors of writing are LatraceError, told once: the writer is dead then, and
    closing it only lets go of what it holds.
    """

    def __init__(self, out: OutputDir, manifest: Mapping[str, Any]) -> None:
        """Write the manifest, marked as not complete."""
        from latrace.analysis import schema

        self._out = out
        self._schemas = schema.TABLES
        self._manifest_name = schema.MANIFEST
        self._suffix = schema.SUFFIX
        self._manifest: dict[str, Any] = {}
        self._tables: dict[str, _Table] = {}
        self._dead = False
        self._closed = False
        self.rows: dict[str, int] = dict.fromkeys(schema.TABLES, 0)
        """Rows appended so far, by table."""
        self.update_manifest(first_manifest(manifest))

    def append(self, table: str, batch: pa.RecordBatch | Mapping[str, Any]) -> None:
        """Add rows: a record batch, or columns by name (numpy arrays, lists or Arrow arrays).

        The first batch of a table settles which of the contract's columns the capture has.
        Columns of names take strings, or bytes of a fixed length as the kernel has them. One
        append to a snapshot table (`hist`, `totals`) is one whole snapshot.

        Raises ValueError for columns that are not the table's, LatraceError when writing fails.
        """
        target = self._tables.get(table)
        if target is None:
            target = _Table(table, self._schemas[table], batch)
        self.rows[table] += target.rows.add(batch)
        self._tables[table] = target
        if target.rows.count >= _PENDING_ROWS:
            self.flush()

    def flush(self) -> None:
        """Put everything appended on disk. Raises LatraceError."""
        if self._dead:
            return
        for name in ORDER:
            table = self._tables.get(name)
            if table is not None:
                self._write(table, table.encode)

    def update_manifest(self, changes: Mapping[str, Any]) -> None:
        """Change the manifest and replace the file. Nested objects are merged, lists replaced.

        Raises LatraceError.
        """
        merged = copy.deepcopy(self._manifest)
        _merge(merged, changes)
        data = encode_manifest(merged)
        self._manifest = merged
        if self._dead:
            return
        try:
            self._out.replace(self._manifest_name, data)
        except LatraceError:
            self._dead = True
            raise

    def close(self, *, complete: bool) -> None:
        """Write the rest, mark the capture complete (or not) and let its directory go.

        The manifest then says how many record batches each table has, so that a reader misses
        a table that went astray.

        Safe to call again. Raises LatraceError, unless an earlier call already did.
        """
        if self._closed:
            return
        self._closed = True
        try:
            self.flush()
            for table in self._tables.values():
                self._write(table, table.finish)
            batches = {name: table.batches for name, table in self._tables.items()}
            self.update_manifest({"complete": complete, "batches": batches})
        finally:
            for table in self._tables.values():
                table.close()
            self._out.close()

    def _write(self, table: _Table, encode: Callable[[], bytes]) -> None:
        if self._dead:
            return
        name = table.name + self._suffix
        try:
            data = encode()
            if data:
                if table.file is None:
                    table.file = self._out.open_new(name)
                _write_all(table.file, data)
        except OSError as error:
            self._dead = True
            raise write_error(self._out.path / name, error) from error
        except LatraceError:
            self._dead = True
            raise


class Rows:
    """Rows of one table on their way out, as Arrow has them; see `CaptureWriter.append`."""

    def __init__(
        self, name: str, contract: pa.Schema, first: pa.RecordBatch | Mapping[str, Any]
    ) -> None:
        import pyarrow as pa

        have = first.schema.names if isinstance(first, pa.RecordBatch) else list(first)
        unknown = set(have) - set(contract.names)
        if unknown:
            raise ValueError(f"{name} has no column {min(unknown)!r}")
        self.name = name
        self.schema = pa.schema([field for field in contract if field.name in have])
        self.count = 0
        self._pending: list[pa.RecordBatch] = []

    def add(self, batch: pa.RecordBatch | Mapping[str, Any]) -> int:
        """Take rows; returns how many."""
        import pyarrow as pa

        names = batch.schema.names if isinstance(batch, pa.RecordBatch) else list(batch)
        if set(names) != set(self.schema.names):
            odd = min(set(names) ^ set(self.schema.names))
            raise ValueError(f"{self.name}: column {odd!r} is not in every batch")
        columns = [_column(batch[field.name], field.type) for field in self.schema]
        added = pa.RecordBatch.from_arrays(columns, schema=self.schema)
        if added.num_rows:
            self._pending.append(added)
            self.count += added.num_rows
        return int(added.num_rows)

    def take(self) -> pa.RecordBatch | None:
        """All that was added since, as one record batch."""
        import pyarrow as pa

        if not self._pending:
            return None
        pending, self._pending, self.count = self._pending, [], 0
        if len(pending) == 1:
            return pending[0]
        (batch,) = pa.Table.from_batches(pending).combine_chunks().to_batches()
        return batch


class Stream:
    """Record batches as the bytes of an Arrow IPC stream."""

    def __init__(self, schema: pa.Schema) -> None:
        from pyarrow import ipc

        self._sink = _Sink()
        options = ipc.IpcWriteOptions(compression=_COMPRESSION, use_threads=False)
        self._writer = ipc.new_stream(self._sink, schema, options=options)

    def encode(self, batch: pa.RecordBatch) -> None:
        """Put a batch behind the others."""
        self._writer.write_batch(batch)

    def finish(self) -> None:
        """Put the mark there that ends the stream."""
        self._writer.close()

    def take(self) -> bytes:
        """The bytes that came since."""
        return self._sink.take()


class _Table:
    """One table's rows on their way to its stream."""

    def __init__(
        self, name: str, contract: pa.Schema, first: pa.RecordBatch | Mapping[str, Any]
    ) -> None:
        self.name = name
        self.rows = Rows(name, contract, first)
        self.file: BinaryIO | None = None
        self.batches = 0
        self._stream = Stream(self.rows.schema)

    def encode(self) -> bytes:
        """Encode the pending rows as one record batch."""
        batch = self.rows.take()
        if batch is not None:
            self._stream.encode(batch)
            self.batches += 1
        return self._stream.take()

    def finish(self) -> bytes:
        """Encode the mark that ends the stream."""
        self._stream.finish()
        return self._stream.take()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


class _Sink:
    """What Arrow's writer takes for a file: it hands over many small pieces."""

    closed = False

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def write(self, piece: bytes) -> int:
        self._pieces.append(piece)
        return len(piece)

    def take(self) -> bytes:
        data = b"".join(self._pieces)
        self._pieces.clear()
        return data

    def flush(self) -> None:
        """Nothing is held back here."""

    def close(self) -> None:
        """The file is the table's to close."""


def _column(values: Any, kind: pa.DataType) -> pa.Array:
    import pyarrow as pa

    if isinstance(values, pa.Array):
        return values if values.type == kind else values.cast(kind)
    if pa.types.is_dictionary(kind):
        if isinstance(values, np.ndarray) and values.dtype.kind == "S":
            return names_from_bytes(values)
        return _strings(list(values)).dictionary_encode()
    if pa.types.is_string(kind):
        return _strings(list(values))
    if isinstance(values, np.ndarray):
        return pa.array(values.copy(), kind)  # Arrow would keep a view of a contiguous one
    return pa.array(values, kind)


def _write_all(file: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        written = file.write(view)
        if not written:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        view = view[written:]


def _merge(into: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        present = into.get(key)
        if isinstance(value, Mapping) and isinstance(present, dict):
            _merge(present, value)
        elif isinstance(value, Mapping):
            into[key] = dict(value)
        else:
            into[key] = value


def _plain(value: Any) -> Any:
    """Let numpy's numbers into the manifest."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be in the manifest")
