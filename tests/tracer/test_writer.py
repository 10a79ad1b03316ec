from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latrace.analysis.capture import open_capture
from latrace.tracer.errors import LatraceError
from latrace.tracer.outputs import create_output_dir
from latrace.tracer.writer import CaptureWriter, names_from_bytes, names_from_codes


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "c"


@pytest.fixture
def writer(path: Path) -> Iterator[CaptureWriter]:
    made = CaptureWriter(create_output_dir(path, force=False), {"host": "h"})
    yield made
    made.close(complete=False)


def manifest(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "manifest.json").read_text())
    return found


# --- the manifest --------------------------------------------------------------------------------


def test_the_manifest_is_there_from_the_start(path: Path, writer: CaptureWriter) -> None:
    assert manifest(path) == {"schema": 1, "host": "h", "complete": False}
    writer.close(complete=True)
    assert manifest(path)["complete"] is True


def test_the_manifest_is_merged_and_replaced_whole(path: Path, writer: CaptureWriter) -> None:
    quality = {"lost": np.uint64(1), "degraded": [1]}
    writer.update_manifest({"quality": quality})
    writer.update_manifest({"quality": {"lost": 2, "stacks": {"a": 0.5}}, "end_ns": 2**63})
    writer.update_manifest({"quality": {"degraded": [], "stacks": {"b": 1}}})
    found = manifest(path)
    assert found["quality"] == {"lost": 2, "degraded": [], "stacks": {"a": 0.5, "b": 1}}
    assert found["end_ns"] == 2**63
    assert quality == {"lost": 1, "degraded": [1]}


def test_the_manifest_takes_command_lines_that_are_not_utf8(
    path: Path, writer: CaptureWriter
) -> None:
    writer.update_manifest({"command": [os.fsdecode(b"caf\xe9"), "\x1b[2J"]})
    assert manifest(path)["command"] == ["caf\udce9", "\x1b[2J"]


@pytest.mark.parametrize("value", [float("nan"), object(), b"bytes"])
def test_the_manifest_takes_nothing_that_json_has_not(writer: CaptureWriter, value: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        writer.update_manifest({"odd": value})
    writer.close(complete=True)  # it is not in the manifest


# --- appending -----------------------------------------------------------------------------------


def test_what_is_appended_is_a_copy(path: Path, writer: CaptureWriter) -> None:
    record = np.zeros(3, dtype=[("wait", "u8"), ("comm", "S16")])
    record["wait"], record["comm"] = [1, 2, 3], b"before"
    plain = record["wait"].copy()
    writer.append("waits", {"wait_ns": record["wait"], "run_ns": plain, "waker": record["comm"]})
    record["wait"], record["comm"], plain[:] = 9, b"after", 9
    writer.flush()
    waits = open_capture(path).waits
    assert waits["wait_ns"].to_pylist() == [1, 2, 3]
    assert waits["run_ns"].to_pylist() == [1, 2, 3]
    assert waits["waker"].to_pylist() == ["before"] * 3


def test_many_ways_to_give_a_column(path: Path, writer: CaptureWriter) -> None:
    for kind, waker in (
        (["new", None], np.array([b"a", b"b\0c"], "S16")),
        (pa.array(["new", "wakeup"]), ["a", "b"]),
        (pa.array(["new", None]).dictionary_encode(), np.array(["a", "b"])),
        (names_from_codes(np.array([0, 1]), ["new", "wakeup"].__getitem__), np.array([b"", b"b"])),
    ):
        writer.append("waits", {"kind": kind, "waker": waker, "wait_ns": [1, 2]})
    batch = pa.RecordBatch.from_pydict(
        {"kind": ["new"], "waker": ["a"], "wait_ns": pa.array([3], pa.uint64())}
    )
    writer.append("waits", batch)
    assert writer.rows["waits"] == 9
    writer.flush()
    waits = open_capture(path).waits
    assert waits["kind"].to_pylist() == [
        "new",
        None,
        "new",
        "wakeup",
        "new",
        None,
        "new",
        "wakeup",
        "new",
    ]
    assert waits["waker"].to_pylist() == ["a", "b", "a", "b", "a", "b", "", "b", "a"]


def test_nothing_appended_is_nothing_written(path: Path, writer: CaptureWriter) -> None:
    writer.append("waits", {"wait_ns": np.array([], np.uint64)})
    writer.flush()
    assert [file.name for file in path.iterdir()] == ["manifest.json"]
    writer.close(complete=True)
    assert open_capture(path).waits.num_rows == 0
    assert open_capture(path).truncated == []


def test_columns_must_be_the_tables(writer: CaptureWriter) -> None:
    with pytest.raises(ValueError, match="no column 'wait'"):
        writer.append("waits", {"wait": [1]})
    with pytest.raises(KeyError):
        writer.append("nonsense", {"wait_ns": [1]})
    writer.append("waits", {"wait_ns": [1], "tid": [1]})
    with pytest.raises(ValueError, match="'tid' is not in every batch"):
        writer.append("waits", {"wait_ns": [1]})
    with pytest.raises(ValueError, match="'cpu' is not in every batch"):
        writer.append("waits", {"wait_ns": [1], "tid": [1], "cpu": [1]})


def test_a_first_batch_that_is_refused_leaves_no_trace(path: Path, writer: CaptureWriter) -> None:
    with pytest.raises((ValueError, OverflowError)):
        writer.append("waits", {"wait_ns": np.array([-1])})
    writer.append("waits", {"wait_ns": [1], "tid": [1]})
    writer.flush()
    assert open_capture(path).waits["wait_ns"].to_pylist() == [1]


def test_many_rows_are_written_without_being_asked(path: Path, writer: CaptureWriter) -> None:
    for _ in range(5):
        writer.append("waits", {"wait_ns": np.ones(100_000, np.uint64)})
    assert open_capture(path).waits.num_rows >= 300_000


def test_what_rows_refer_to_is_written_before_them(
    writer: CaptureWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    real = writer._out.open_new
    monkeypatch.setattr(writer._out, "open_new", lambda name: order.append(name) or real(name))
    for table in ("waits", "stacks", "frames"):
        writer.append(table, {"wait_ns" if table == "waits" else "id": [1]})
    writer.flush()
    assert order == ["frames.arrows", "stacks.arrows", "waits.arrows"]


def test_closing_twice_is_once(path: Path, writer: CaptureWriter) -> None:
    writer.close(complete=True)
    writer.close(complete=False)
    assert manifest(path)["complete"] is True


# --- names in bulk -------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=16), min_size=1, max_size=60))
def test_names_from_bytes(names: list[bytes]) -> None:
    fixed = np.zeros(len(names), "S16")
    fixed.view(np.uint8).reshape(-1, 16)[:] = [list(name.ljust(16, b"\0")) for name in names]
    column = names_from_bytes(fixed)
    expected = [name.split(b"\0")[0].decode("utf-8", "backslashreplace") for name in names]
    assert column.to_pylist() == expected
    assert column.dictionary.to_pylist() == list(dict.fromkeys(expected))


def test_names_from_a_field_of_records() -> None:
    records = np.zeros(4, dtype=[("tid", "i4"), ("comm", "S16")])
    records["comm"] = [b"a", b"b", b"a", b"0123456789abcdef"]
    assert names_from_bytes(records["comm"]).to_pylist() == ["a", "b", "a", "0123456789abcdef"]


@given(st.lists(st.integers(-3, 300), max_size=60))
def test_names_from_codes(codes: list[int]) -> None:
    def name_of(code: int) -> str | None:
        return None if code < 0 else f"call{code % 7}"

    asked: list[int] = []
    column = names_from_codes(
        np.array(codes, np.int32), lambda code: asked.append(code) or name_of(code)
    )
    assert column.to_pylist() == [name_of(code) for code in codes]
    assert len(asked) == len(set(codes))
    assert column.dictionary.null_count == 0


def test_names_that_are_not_utf8_are_escaped(path: Path, writer: CaptureWriter) -> None:
    comm = np.array([b"\xff\xfe", b"\xc3\xa9"], "S16")
    writer.append("threads", {"tid": [1, 2], "comm": comm, "cgroup": [os.fsdecode(b"/\xff"), ""]})
    writer.append("threads", {"tid": [3, 4], "comm": [None, "\ud800"], "cgroup": ["/", None]})
    writer.append("frames", {"symbol": [None, os.fsdecode(b"f\xff")]})
    writer.flush()
    capture = open_capture(path)
    assert capture.threads["comm"].to_pylist() == ["\\xff\\xfe", "\u00e9", None, "\\ud800"]
    assert capture.threads["cgroup"].to_pylist() == ["/\\xff", "", "/", None]
    assert capture.frames["symbol"].to_pylist() == [None, "f\\xff"]


# --- when the disk is against us -----------------------------------------------------------------

CHILD = """
import sys
from pathlib import Path
import numpy as np
from latrace.tracer.errors import LatraceError
from latrace.tracer.outputs import create_output_dir
from latrace.tracer.writer import CaptureWriter

writer = CaptureWriter(create_output_dir(Path(sys.argv[1]), force=False), {})
rng = np.random.default_rng(0)
count, first = int(sys.argv[2]), 0
print("started", flush=True)
try:
    while True:
        run = np.arange(first, first + count, dtype=np.uint64)
        noise = rng.integers(0, 2**62, count).astype(np.uint64)
        waker = np.array([b"w%d" % (first // count)], "S16").repeat(count)
        writer.append("waits", {"run_ns": run, "wait_ns": noise, "waker": waker})
        writer.append("stacks", {"id": [first], "frames": [[1, 2, 3]], "whole": [True]})
        writer.flush()
        first += count
        print(first, flush=True)
except LatraceError as error:
    for _ in range(2):  # the second does nothing, and raises nothing
        writer.append("waits", {"run_ns": run, "wait_ns": noise, "waker": waker})
        writer.flush()
        writer.close(complete=True)
    print(error.cause, "/", error.hint, flush=True)
"""


def check_rows(path: Path, *, at_least: int, count: int) -> int:
    capture = open_capture(path)
    assert not capture.complete
    run = capture.waits["run_ns"].to_pylist()
    assert run == list(range(len(run)))
    assert len(run) % count == 0
    assert len(run) >= at_least
    assert capture.waits["waker"].to_pylist() == [f"w{value // count}" for value in run]
    assert capture.stacks.num_rows >= len(run) // count
    return len(run)


def test_after_sigkill_it_opens_up_to_the_last_flush(tmp_path: Path) -> None:
    """Killed at random moments; the seed is not fixed, so that every run tries others."""
    total = 0
    for attempt in range(5):
        count = 20_000
        with subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tmp_path / str(attempt)), str(count)],
            stdout=subprocess.PIPE,
            text=True,
        ) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "started\n"
            for _ in range(random.randrange(4)):  # noqa: S311
                child.stdout.readline()
            time.sleep(random.random() * 0.01)  # noqa: S311
            child.send_signal(signal.SIGKILL)
            said = [int(line) for line in child.stdout.read().split("\n") if line.isdigit()]
        total += check_rows(tmp_path / str(attempt), at_least=max(said, default=0), count=count)
    assert total > 0


def run_until_full(
    path: Path, count: int, prefix: list[str], limit: Callable[[], None] | None = None
) -> tuple[int, str]:
    """Let the child write until it fails; return what it had flushed, and what it then said."""
    done = subprocess.run(
        [*prefix, sys.executable, "-c", CHILD, str(path), str(count)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        preexec_fn=limit,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    *flushed, said = done.stdout.splitlines()[1:]
    return max(map(int, flushed), default=0), said


def test_a_file_size_limit_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "c"
    flushed, said = run_until_full(
        path,
        1000,
        [],
        limit=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)),
    )
    assert said.startswith(f"cannot write {path}/waits.arrows: the file-size limit is reached / ")
    assert flushed >= 10_000
    assert check_rows(path, at_least=flushed, count=1000) == flushed
    assert open_capture(path).truncated == ["waits"]


@pytest.mark.kernel
def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    # The mount is in a namespace of its own: copy out what was written before it ends.
    script = tmp_path / "script"
    script.write_text(
        "set -e\n"
        'mount -t tmpfs -o size=400k latrace-test "$1"\n'
        'shift; "$@"; cp -r "${0%/*}/small/c" "${0%/*}/out"\n'
    )
    flushed, said = run_until_full(
        mount / "c", 1000, ["unshare", "--mount", "sh", os.fspath(script), os.fspath(mount)]
    )
    assert said.startswith(f"cannot write {mount}/c/waits.arrows: the disk is full / make room")
    assert flushed >= 10_000
    assert check_rows(tmp_path / "out", at_least=flushed, count=1000) == flushed


def test_a_manifest_that_cannot_be_written_is_told_once(
    path: Path, writer: CaptureWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str, data: bytes) -> None:
        raise LatraceError(f"cannot write {name}", hint=str(len(data)))

    monkeypatch.setattr(writer._out, "replace", fail)
    with pytest.raises(LatraceError, match="cannot write manifest"):
        writer.update_manifest({"a": 1})
    writer.append("waits", {"wait_ns": [1]})
    writer.close(complete=True)
    assert manifest(path)["complete"] is False
