from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import ipc
from sample_capture import FRAMES, MANIFEST, STACKS, exact_tables, make_waits, write_capture

import latrace
from latrace.analysis.capture import open_capture
from latrace.analysis.errors import CaptureError
from latrace.analysis.schema import SCHEMA_VERSION, TABLES
from latrace.tracer.outputs import create_output_dir
from latrace.tracer.writer import CaptureWriter


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[CaptureWriter]:
    made = CaptureWriter(create_output_dir(tmp_path / "c", force=False), MANIFEST)
    yield made
    made.close(complete=False)


def rows(first: int, count: int) -> dict[str, Any]:
    """Waits whose run_ns counts up; every batch has names of its own."""
    return {
        "run_ns": np.arange(first, first + count, dtype=np.uint64),
        "wait_ns": np.full(count, 7, np.uint64),
        "waker": [f"waker-{first}", "another"] * (count // 2) + [f"waker-{first}"] * (count % 2),
    }


# --- whole captures ------------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    waits = make_waits(1000)
    tables = {"waits": waits, "stacks": STACKS, "frames": FRAMES, **exact_tables(waits)}
    capture = latrace.open(write_capture(tmp_path / "c", tables))
    assert capture.complete
    assert capture.truncated == []
    assert capture.manifest["kernel"] == MANIFEST["kernel"]
    assert capture.manifest["schema"] == SCHEMA_VERSION
    assert capture.waits["wait_ns"].to_pylist() == waits["wait_ns"].tolist()
    assert capture.waits["kind"].to_pylist() == waits["kind"].to_pylist()
    assert capture.waits["waker"].to_pylist() == [name.decode() for name in waits["waker"]]
    assert capture.stacks["frames"].to_pylist() == STACKS["frames"]
    assert capture.frames["symbol"].to_pylist() == FRAMES["symbol"]
    assert capture.totals["waits"].to_pylist() == [1000]
    assert sum(capture.hist["count"].to_pylist()) == 1000
    assert capture.threads.num_rows == 5


def test_every_table_has_the_columns_and_types_of_the_contract(tmp_path: Path) -> None:
    capture = open_capture(write_capture(tmp_path / "c", {"waits": rows(0, 3)}))
    for name, contract in TABLES.items():
        table = getattr(capture, name)
        assert table.schema.names == contract.names
        assert table.schema.types == contract.types
    assert capture.waits["own_ns"].null_count == 3
    assert capture.waits["syscall"].to_pylist() == [None] * 3
    assert capture.hist.num_rows == 0


def test_some_columns_only(tmp_path: Path) -> None:
    capture = open_capture(write_capture(tmp_path / "c", {"waits": rows(0, 3)}))
    table = capture.table("waits", columns=["waker", "sleep"])
    assert table.column_names == ["waker", "sleep"]
    assert table["waker"].to_pylist() == ["waker-0", "another", "waker-0"]
    assert capture.table("waits", columns=["sleep"]).num_rows == 3
    with pytest.raises(KeyError):
        capture.table("waits", columns=["nonsense"])
    with pytest.raises(KeyError):
        capture.table("nonsense")


def test_batches_are_what_was_written(tmp_path: Path, writer: CaptureWriter) -> None:
    for first in (0, 10, 20):
        writer.append("waits", rows(first, 10))
        writer.flush()
    pieces = list(open_capture(tmp_path / "c").batches("waits", columns=["run_ns", "waker"]))
    assert [piece["run_ns"].to_pylist()[0] for piece in pieces] == [0, 10, 20]
    assert [piece["waker"].to_pylist()[0] for piece in pieces] == [
        "waker-0",
        "waker-10",
        "waker-20",
    ]


def test_dictionaries_that_change_are_joined(tmp_path: Path, writer: CaptureWriter) -> None:
    writer.append("waits", rows(0, 2))
    writer.flush()
    writer.append("waits", rows(2, 2))
    writer.append("waits", rows(4, 2))
    writer.flush()
    waker = open_capture(tmp_path / "c").waits["waker"]
    assert waker.to_pylist() == ["waker-0", "another", "waker-2", "another", "waker-4", "another"]
    assert len({tuple(chunk.dictionary.to_pylist()) for chunk in waker.chunks}) == 1


def test_columns_that_are_not_in_the_contract_are_kept(tmp_path: Path) -> None:
    path = write_capture(tmp_path / "c", {})
    table = pa.table(
        {"wait_ns": pa.array([3], pa.uint64()), "later_ns": pa.array([4], pa.uint64())}
    )
    with ipc.new_stream(os.fspath(path / "waits.arrows"), table.schema) as stream:
        stream.write_table(table)
    waits = open_capture(path).waits
    assert waits["later_ns"].to_pylist() == [4]
    assert waits["wait_ns"].to_pylist() == [3]
    assert waits.column_names[:-1] == TABLES["waits"].names


def test_a_column_of_a_narrower_type_is_widened(tmp_path: Path) -> None:
    path = write_capture(tmp_path / "c", {})
    table = pa.table({"wait_ns": pa.array([3], pa.uint16()), "kind": pa.array(["new"])})
    with ipc.new_stream(os.fspath(path / "waits.arrows"), table.schema) as stream:
        stream.write_table(table)
    waits = open_capture(path).waits
    assert waits.schema.field("wait_ns").type == pa.uint64()
    assert waits["kind"].to_pylist() == ["new"]


# --- snapshots and threads -----------------------------------------------------------------------


def test_the_last_snapshot_that_both_tables_have_is_taken(
    tmp_path: Path, writer: CaptureWriter
) -> None:
    for snapshot in (1, 2, 3):
        counted = [10 * snapshot]
        hist = {"metric": ["wait"], "lo_ns": [1], "hi_ns": [2], "count": counted}
        writer.append("totals", {"tgid": [5], "waits": counted, "snapshot": [snapshot]})
        if snapshot < 3:  # killed between the two
            writer.append("hist", {**hist, "snapshot": [snapshot]})
        writer.flush()
    capture = open_capture(tmp_path / "c")
    assert capture.totals["waits"].to_pylist() == [20]
    assert capture.hist["count"].to_pylist() == [20]
    assert capture.table("totals", columns=["waits"]).to_pydict() == {"waits": [20]}


def test_the_last_row_of_a_thread_counts(tmp_path: Path, writer: CaptureWriter) -> None:
    writer.append("threads", {"tid": [9, 3], "start_ns": [1, 1], "waits": [1, 2]})
    writer.flush()
    writer.append("threads", {"tid": [3, 3], "start_ns": [1, 8], "waits": [5, 6]})
    writer.flush()
    threads = open_capture(tmp_path / "c").threads
    assert threads.select(["tid", "start_ns", "waits"]).to_pylist() == [
        {"tid": 3, "start_ns": 1, "waits": 5},
        {"tid": 3, "start_ns": 8, "waits": 6},
        {"tid": 9, "start_ns": 1, "waits": 1},
    ]


# --- captures that were cut off ------------------------------------------------------------------


def test_a_stream_cut_anywhere_reads_up_to_the_last_whole_batch(
    tmp_path: Path, writer: CaptureWriter
) -> None:
    file = tmp_path / "c" / "waits.arrows"
    ends = [0]
    for first in (0, 10, 20):
        writer.append("waits", rows(first, 10))
        writer.flush()
        ends.append(file.stat().st_size)
    writer.close(complete=False)
    whole = file.read_bytes()
    cut = tmp_path / "cut"
    cut.mkdir()
    shutil.copy(tmp_path / "c" / "manifest.json", cut)
    for size in range(len(whole) + 1):
        (cut / "waits.arrows").write_bytes(whole[:size])
        capture = open_capture(cut)
        batches = sum(size >= end for end in ends[1:])
        assert capture.waits["run_ns"].to_pylist() == list(range(10 * batches)), size
        assert (
            capture.waits["waker"].to_pylist()[-2:-1]
            == [f"waker-{10 * batches - 10}"][: bool(batches)]
        )
        # The manifest tells how many batches there were, so even a clean border is noticed.
        assert capture.truncated == (
            [] if batches == 3 and size in (ends[3], len(whole)) else ["waits"]
        )


def test_a_clean_border_of_a_killed_capture_is_no_damage(
    tmp_path: Path, writer: CaptureWriter
) -> None:
    writer.append("waits", rows(0, 10))
    writer.flush()
    capture = open_capture(tmp_path / "c")
    assert not capture.complete
    assert capture.truncated == []
    assert capture.waits.num_rows == 10


@pytest.mark.parametrize("how", ["missing", "empty", "half", "no end"])
def test_a_complete_capture_that_lost_a_piece_is_noticed(tmp_path: Path, how: str) -> None:
    file = write_capture(tmp_path / "c", {"waits": rows(0, 10)}) / "waits.arrows"
    data = file.read_bytes()
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes({"empty": b"", "half": data[: len(data) // 2], "no end": data[:-8]}[how])
    capture = open_capture(tmp_path / "c")
    assert capture.truncated == ["waits"]
    assert capture.waits.num_rows == (10 if how == "no end" else 0)


def test_a_capture_being_written_can_be_read(tmp_path: Path, writer: CaptureWriter) -> None:
    assert open_capture(tmp_path / "c").waits.num_rows == 0
    writer.append("waits", rows(0, 10))
    assert open_capture(tmp_path / "c").waits.num_rows == 0
    writer.flush()
    assert open_capture(tmp_path / "c").waits.num_rows == 10


# --- captures that cannot be read ----------------------------------------------------------------


def test_no_capture(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="there is no capture at") as caught:
        open_capture(tmp_path / "nowhere")
    assert "latrace attach" in caught.value.hint
    assert caught.value.exit_code == 1
    with pytest.raises(CaptureError, match="is not a capture"):
        open_capture(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CaptureError, match="is not a capture"):
        open_capture(tmp_path / "file")


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"{}", b'{"schema": "1"}', b'{"schema": 0}', b"\xff\xfe", b"[" * 100_000],
)
def test_a_damaged_manifest(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(text)
    with pytest.raises(CaptureError, match="is damaged"):
        open_capture(tmp_path)


def test_a_newer_schema_is_refused_with_a_hint(tmp_path: Path) -> None:
    newer = {"schema": SCHEMA_VERSION + 1, "latrace": "9.9"}
    (tmp_path / "manifest.json").write_text(json.dumps(newer))
    with pytest.raises(CaptureError, match=f"has schema {SCHEMA_VERSION + 1}") as caught:
        open_capture(tmp_path)
    assert "9.9" in caught.value.hint


def test_damage_in_the_middle_is_no_truncation(tmp_path: Path) -> None:
    path = write_capture(tmp_path / "c", {"waits": make_waits(500)})
    file = path / "waits.arrows"
    data = bytearray(file.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4096] = b"\xa5" * 4096
    file.write_bytes(bytes(data))
    with pytest.raises(CaptureError, match=r"waits\.arrows is damaged"):
        _ = open_capture(path).waits


@pytest.mark.parametrize("data", [b"not an arrow stream", b"\0" * 64, b"\xff" * 64])
def test_a_table_that_is_something_else(tmp_path: Path, data: bytes) -> None:
    path = write_capture(tmp_path / "c", {})
    (path / "waits.arrows").write_bytes(data)
    capture = open_capture(path)
    if data.startswith(b"\xff"):  # a message longer than the file: as if it had been cut off
        assert capture.truncated == ["waits"]
    else:
        with pytest.raises(CaptureError, match="is damaged"):
            _ = capture.waits


def test_a_table_of_another_shape_is_damaged(tmp_path: Path) -> None:
    path = write_capture(tmp_path / "c", {})
    table = pa.table({"wait_ns": pa.array(["many"])})
    with ipc.new_stream(os.fspath(path / "waits.arrows"), table.schema) as stream:
        stream.write_table(table)
    with pytest.raises(CaptureError, match="is damaged"):
        _ = open_capture(path).waits


def test_names_that_point_outside_their_dictionary_are_damage(tmp_path: Path) -> None:
    path = write_capture(tmp_path / "c", {})
    names = pa.DictionaryArray.from_arrays(
        pa.array([0, 1_000_000], pa.int32()), pa.array(["new"]), safe=False
    )
    batch = pa.RecordBatch.from_arrays([names], names=["kind"])
    with ipc.new_stream(os.fspath(path / "waits.arrows"), batch.schema) as stream:
        stream.write_batch(batch)
    with pytest.raises(CaptureError, match="is damaged"):
        _ = open_capture(path).waits


def test_random_damage_raises_nothing_else(tmp_path: Path) -> None:
    path = write_capture(tmp_path / "c", {"waits": rows(0, 20)})
    file = path / "waits.arrows"
    whole = file.read_bytes()
    rng = np.random.default_rng(7)
    refused = 0
    for _ in range(300):
        data = bytearray(whole)
        for position in rng.integers(0, len(data), 3):
            data[position] = rng.integers(0, 256)
        file.write_bytes(bytes(data))
        try:
            capture = open_capture(path)
            _ = capture.truncated, capture.waits.to_pylist()
        except CaptureError:
            refused += 1
    assert refused > 10
