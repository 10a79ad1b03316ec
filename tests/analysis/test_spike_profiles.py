"""What a Go service says of itself, beside the tables of a bundle, is read and set against them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sample_capture import START_NS
from spike_samples import (
    FIRED_REALTIME_NS,
    MS,
    US,
    Rows,
    S,
    document,
    neighbour,
    trigger,
    write_bundle,
)
from test_go_runtime import GOROUTINES, heap

from latrace.analysis.capture import open_capture
from latrace.analysis.go_runtime import summarise_go
from latrace.analysis.spike_text import headline
from latrace.analysis.spikes import explain

FILES = ["pprof-heap-before.txt", "pprof-heap.txt", "pprof-goroutines.txt"]
SPIKE = FIRED_REALTIME_NS - 200 * MS  # it begins here, and is 300 ms long


def every(step: int, begin: int, end: int, pause: int = 50 * US) -> list[tuple[int, int]]:
    return [(at, pause) for at in range(begin, end, step)]


def bundle(path: Path, texts: dict[str, str | bytes], *, listed: Any = FILES) -> Path:
    write_bundle(path, neighbour(), document(profiles={"url": "x", "files": listed}))
    for name, text in texts.items():
        (path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def gc_of(path: Path) -> Any:
    told = explain(open_capture(path))
    assert told is not None
    written = told.document()
    assert json.loads(json.dumps(written, allow_nan=False)) == written
    return written["profiles"].get("gc")


def test_the_spike_against_the_time_before(tmp_path: Path) -> None:
    before = every(S, SPIKE - 6 * S, SPIKE)
    storm = every(20 * MS, SPIKE + MS, SPIKE + 300 * MS, 100 * US)
    texts = {
        FILES[0]: heap(*before, *storm[:10]),
        FILES[1]: heap(*before, *storm, (SPIKE + S, 9 * MS)),
        FILES[2]: GOROUTINES,
    }
    path = bundle(tmp_path / "b", texts)
    gc = gc_of(path)
    assert (gc["pauses"], gc["pause_ns"], gc["max_pause_ns"]) == (15, 1500 * US, 100 * US)
    assert gc["at_least"] is False and gc["notes"] == []
    assert gc["seconds"] == pytest.approx(0.3)
    assert gc["baseline"]["pauses"] == 6 and gc["baseline"]["max_pause_ns"] == 50 * US
    assert gc["baseline"]["seconds"] == pytest.approx(8)
    assert gc["goroutines"] == 61
    told = explain(open_capture(path))
    assert told is not None
    assert (
        "Go's garbage collector stopped the world 15 times in the spike (50.0 times a second, 0.8 "
        "before), for 1.50 ms in all, the longest 100 us." in told.analysis["sentences"]
    )
    assert not any("go tool" in text for text in told.analysis["sentences"])
    assert told.analysis["locked"] == "49 of 61 goroutines waited for a lock in main.holdLock"


def test_the_time_before_is_known_as_far_as_the_ring_goes(tmp_path: Path) -> None:
    many = every(10 * MS, SPIKE - 4 * S, SPIKE)
    gc = gc_of(bundle(tmp_path / "b", {FILES[0]: heap(*many), FILES[1]: heap(*many)}))
    assert gc["baseline"]["pauses"] == 256
    assert gc["baseline"]["seconds"] == pytest.approx(2.56)
    assert (gc["pauses"], gc["at_least"]) == (0, False)
    many = every(MS, SPIKE - S, SPIKE + 100 * MS)
    gc = gc_of(bundle(tmp_path / "c", {FILES[0]: heap(*many), FILES[1]: heap(*many)}))
    assert gc["baseline"] is None  # 156 ms of it are known
    assert (gc["pauses"], gc["at_least"]) == (100, False)


def test_pauses_that_nobody_has_are_told(tmp_path: Path) -> None:
    storm = every(MS, SPIKE, SPIKE + 300 * MS)
    early, late = heap(*storm[:20]), heap(*storm)
    for name, texts, pauses, at_least in (
        ("only-late", {FILES[1]: late}, 256, True),
        ("only-early", {FILES[0]: early}, 20, True),
        ("a-gap", {FILES[0]: early, FILES[1]: late}, 276, True),
        ("no-gap", {FILES[0]: heap(*storm[:44]), FILES[1]: late}, 300, False),
    ):
        gc = gc_of(bundle(tmp_path / name, texts))
        assert (gc["pauses"], gc["at_least"]) == (pauses, at_least), name


def test_a_gap_before_the_spike_does_not_matter() -> None:
    old = every(MS, SPIKE - 10 * S, SPIKE - 9 * S)
    new = every(MS, SPIKE - 5 * S, SPIKE - 4 * S)
    told = summarise_go(heap(*old), heap(*old, *new), None, SPIKE, SPIKE + S)
    assert (told["pauses"], told["at_least"]) == (0, False)
    told = summarise_go(heap(*old), heap(*old, *new), None, SPIKE - 8 * S, SPIKE + S)
    assert (told["pauses"], told["at_least"]) == (256, True)


def test_which_profiles_are_there(tmp_path: Path) -> None:
    errors = ["pprof-trace.out: answers\x1b[2J 500", "x", 3]
    profiles = {"files": ["pprof-cpu.pb.gz"], "errors": errors}
    path = write_bundle(tmp_path / "b", neighbour(), document(profiles=profiles))
    told = explain(open_capture(path))
    assert told is not None
    assert told.analysis["sentences"][-2:] == [
        "The bundle has profiles of the seconds after the watch fired "
        "(go tool pprof pprof-cpu.pb.gz).",
        "A profile of the service is missing: pprof-trace.out: answers\\x1b[2J 500 (and 1 more).",
    ]


@pytest.mark.parametrize("listed", [None, 3, [], ["pprof-cpu.pb.gz", 3], "pprof-heap.txt"])
def test_only_what_is_listed_is_read(tmp_path: Path, listed: Any) -> None:
    texts = {FILES[1]: heap((SPIKE, US)), "pprof-cpu.pb.gz": b"\x1f\x8b"}
    assert gc_of(bundle(tmp_path / "b", texts, listed=listed)) is None


def _link(path: Path) -> None:
    (path.parent.parent / "elsewhere").write_text(heap((SPIKE, US)))
    path.symlink_to(path.parent.parent / "elsewhere")


def _large(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


@pytest.mark.parametrize("make", [_link, os.mkfifo, Path.mkdir, _large])
def test_what_is_no_plain_file_is_not_read(tmp_path: Path, make: Callable[[Path], object]) -> None:
    path = bundle(tmp_path / "b", {FILES[2]: GOROUTINES})
    make(path / FILES[1])
    gc = gc_of(path)
    assert gc["pauses"] is None and gc["goroutines"] == 61
    (note,) = gc["notes"]
    assert FILES[1] in note


@pytest.mark.parametrize("text", [b"", b"\xff" * 100, b"\0", heap()[:-900].encode()])
def test_texts_that_say_nothing(tmp_path: Path, text: bytes) -> None:
    gc = gc_of(bundle(tmp_path / "b", dict.fromkeys(FILES, text)))
    assert gc["pauses"] is gc["goroutines"] is None
    assert len(gc["notes"]) == 3


def _stacks(*stacks: list[str]) -> dict[str, Any]:
    names = sorted({name for stack in stacks for name in stack})
    return {
        "frames": {
            "id": np.arange(len(names), dtype=np.int32),
            "symbol": names,
            "module": ["/srv/service"] * len(names),
            "offset": np.zeros(len(names), np.uint64),
            "space": ["user"] * len(names),
        },
        "stacks": {
            "id": np.arange(len(stacks), dtype=np.int32),
            "frames": [[names.index(name) for name in stack] for stack in stacks],
            "whole": [True] * len(stacks),
            "kernel_frames": np.zeros(len(stacks), np.int32),
        },
    }


MARKS = ["runtime.scanobject", "runtime.gcDrain", "runtime.gcBgMarkWorker.func2"]
PARKED = ["runtime.futex.abi0", "runtime.notesleep", "runtime.stopm", "runtime.findRunnable"]
LOCKED = ["runtime.futex.abi0", "runtime.notesleep", "runtime.lock2", "main.handler"]
OWN = ["main.spin", "main.handler"]


@pytest.mark.parametrize(("waiting", "idle"), [(PARKED, True), (LOCKED, False)])
def test_threads_of_go_without_work_are_no_reason(
    tmp_path: Path, waiting: list[str], idle: bool
) -> None:
    """They stand in a futex, too; what the others did is the reason, and whose it was is told."""
    rows = Rows()
    rows.steady(0, 12 * S)
    rows.tables |= _stacks(waiting, MARKS, OWN)
    rows.wait(8 * S, 20 * US, blocked_ns=5 * S, syscall="futex", stack=0, blocked_weight_ns=5 * S)
    rows.samples = [
        {
            **{"tid": 5, "tgid": 5, "weight_ns": 20 * MS},
            **{"ts_ns": START_NS + 5 * S + at * 20 * MS, "stack": 2 if at % 5 == 0 else 1},
        }
        for at in range(100 if idle else 10)
    ]
    fired = trigger(
        rule="--metric took P99", kind="metric", unit="s", value=0.4, threshold=0.1, count=200,
        since_ns=START_NS + 4 * S, until_ns=START_NS + 8 * S,
    )  # fmt: skip
    told = explain(open_capture(write_bundle(tmp_path / "b", rows, document(fired))))
    assert told is not None
    (futex,) = [line for line in told.analysis["grew"] if line["name"] == "futex"]
    assert futex["idle"] is idle
    (first, second, *_) = told.analysis["sentences"]
    assert first.endswith(" rose to 400 ms (limit 100 ms) in the 4.00 s from 11:32:00 UTC on.")
    if idle:
        assert told.analysis["grew"][-1] == futex
        assert told.analysis["cause"] == "on_cpu"
        assert told.analysis["where"]["collector"] == pytest.approx(0.8)
        assert second.endswith(", 80 % of it in Go's garbage collector.")
        assert not any("futex" in text for text in told.analysis["sentences"])
    else:
        assert told.analysis["cause"] == "blocked"
        assert told.analysis["where"]["function"] == "main.handler"


def test_own_threads_that_collect_garbage(tmp_path: Path) -> None:
    """Where threads wait for each other, it is told whose work the others did."""
    rows = Rows()
    rows.steady(0, 8 * S)
    for at in range(50):
        rows.wait(8 * S + at * 20 * MS, 12 * MS, "own")
    rows.tables |= _stacks(MARKS, OWN)
    rows.samples = [
        {
            **{"tid": 5, "tgid": 5, "weight_ns": 20 * MS},
            **{"ts_ns": START_NS + 8 * S + at * 20 * MS, "stack": at % 4 // 3},
        }
        for at in range(45)
    ]
    told = explain(open_capture(write_bundle(tmp_path / "b", rows, document())))
    assert told is not None
    assert told.analysis["cause"] == "own"
    assert headline(told.analysis).endswith(
        " 100 % own threads; 76 % of its work on the CPU was Go's garbage collector."
    )
