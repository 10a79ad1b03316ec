"""The flight recorder: what it keeps, drops and gives back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from latrace.analysis import schema
from latrace.analysis.histogram import bounds, slot_of
from latrace.tracer.records import HIST
from latrace.tracer.watch.flight import FlightRecorder
from latrace.tracer.watch.marks import LongestWaits, Mark, grown_hist


def samples(*times_ns: int) -> dict[str, Any]:
    count = len(times_ns)
    return {
        "ts_ns": np.array(times_ns, np.uint64),
        "tid": np.full(count, 7, np.int32),
        "tgid": np.full(count, 7, np.int32),
        "cpu": np.zeros(count, np.int32),
        "stack": np.arange(count, dtype=np.int32),
        "weight_ns": np.ones(count, np.uint64),
    }


def stacks(*ids: int) -> dict[str, Any]:
    return {
        "id": list(ids),
        "frames": [[0]] * len(ids),
        "whole": [True] * len(ids),
        "kernel_frames": [0] * len(ids),
    }


def times(flight: FlightRecorder, after_ns: int, until_ns: int) -> list[int]:
    found: list[int] = []
    for piece in flight.since(0):
        if piece.table == "samples":
            for batch in piece.between(after_ns, until_ns):
                assert batch.schema == schema.SAMPLES
                found += batch.column("ts_ns").to_pylist()
    return found


def test_rows_come_back_cut_to_the_window() -> None:
    flight = FlightRecorder()
    for second in range(10):
        flight.append("samples", samples(*range(second * 10, second * 10 + 10)))
        flight.flush()
    assert times(flight, -1, 1000) == list(range(100))
    assert times(flight, 14, 37) == list(range(15, 38))
    flight.drop(39, before_epoch=0)
    assert times(flight, -1, 1000) == list(range(40, 100))
    assert flight.bytes == sum(len(piece.data) for piece in flight.since(0))


def test_a_late_row_keeps_its_piece() -> None:
    flight = FlightRecorder()
    flight.append("samples", samples(5, 100))
    flight.flush()
    flight.append("samples", samples(50))
    flight.flush()
    flight.drop(60, before_epoch=0)
    assert times(flight, 60, 1000) == [100]


def test_names_stay_as_long_as_a_row_of_their_epoch() -> None:
    flight = FlightRecorder()
    flight.append("stacks", stacks(1))
    flight.append("samples", samples(10))
    flight.flush()
    flight.begin_epoch()
    flight.append("stacks", stacks(2))
    flight.append("samples", samples(20))
    flight.flush()
    flight.drop(15, before_epoch=0)
    assert [piece.table for piece in flight.since(0)] == ["stacks", "stacks", "samples"]
    flight.drop(15, before_epoch=1)
    assert [piece.table for piece in flight.since(0)] == ["stacks", "samples"]
    # What a row refers to is written before it.
    numbers = [piece.number for piece in flight.since(0)]
    assert numbers == sorted(numbers)
    assert flight.since(flight.next_number) == []


def test_the_oldest_goes_first() -> None:
    flight = FlightRecorder()
    for second in range(5):
        flight.append("samples", samples(second))
        flight.flush()
    before = flight.bytes
    assert flight.drop_oldest() == 0
    assert flight.drop_oldest() == 1
    assert flight.bytes < before
    assert times(flight, -1, 100) == [2, 3, 4]
    for _ in range(3):
        assert flight.drop_oldest() is not None
    assert flight.drop_oldest() is None
    assert flight.bytes == 0


def test_every_piece_stands_alone() -> None:
    flight = FlightRecorder()
    for name in ("futex", "futex", "poll"):
        columns = {
            "ts_ns": [1],
            "event": [name],
            "cookie": [1],
            "netns": [1],
            "tgid": [1],
            "tid": [1],
        }
        flight.append("socket_events", columns)
        flight.flush()
    pieces = flight.since(0)
    for piece, name in reversed(list(zip(pieces, ("futex", "futex", "poll"), strict=True))):
        (batch,) = piece.between(0, 10)
        assert batch.column("event").to_pylist() == [name]
    table = pa.Table.from_batches([batch for piece in pieces for batch in piece.between(0, 10)])
    assert table.num_rows == 3


def mark(at_ns: int, *hists: tuple[int, dict[str, Any]]) -> Mark:
    hist = np.zeros(len(hists), HIST)
    for entry, (_, fields) in zip(hist, hists, strict=True):
        for name, value in fields.items():
            if name == "slots":
                for slot, count in value.items():
                    entry["slots"][slot] = count
            else:
                entry[name] = value
    return Mark(
        at_ns=at_ns,
        epoch=0,
        hist=hist,
        tgids=tuple(tgid for tgid, _ in hists),
        overshoots=np.zeros(0),
        counters={},
        threads=np.zeros(0),
        segs={},
        overhead={},
    )


def test_the_growth_of_histograms_and_its_longest_wait() -> None:
    start = mark(0, (7, {"wait_ns": 100, "max_ns": 90, "slots": {10: 1, 90: 1}}))
    end = mark(
        1,
        (7, {"wait_ns": 160, "max_ns": 90, "slots": {10: 3, 40: 1, 90: 1}}),
        (8, {"wait_ns": 5, "max_ns": 5, "slots": {5: 1}}),
    )
    none = LongestWaits({}, {})
    grown = grown_hist(start, end, none)
    assert grown["wait_ns"].tolist() == [60, 5]
    assert grown["slots"][0][[10, 40, 90]].tolist() == [2, 1, 0]
    assert grown["max_ns"].tolist() == [40, 5]  # the bucket's upper end: below 128 ns a value each
    longer = mark(1, (7, {"wait_ns": 300, "max_ns": 120, "slots": {10: 1, 90: 1, 120: 1}}))
    assert grown_hist(start, longer, none)["max_ns"].tolist() == [120]


def test_the_longest_wait_between_two_marks_is_that_of_its_row() -> None:
    top = int(slot_of(1000))
    low, high = (int(bound) for bound in bounds(top))
    start = mark(0, (7, {"max_ns": 5000, "slots": {top + 50: 1}}))
    end = mark(1, (7, {"max_ns": 5000, "slots": {top: 1, top + 50: 1}}))

    def longest(row_ns: int, end: Mark = end) -> int:
        grown = grown_hist(start, end, LongestWaits({}, {7: row_ns}))
        return int(grown["max_ns"][0])

    assert longest(1000) == 1000
    assert (longest(low), longest(high - 1)) == (low, high - 1)
    assert (longest(low - 1), longest(high)) == (high - 1, high - 1)  # another wait's
    assert longest(0, start) == 0  # nobody waited
