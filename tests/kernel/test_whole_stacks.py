"""User stacks of code without frame pointers are whole on the live kernel; nothing else is kept."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_known_answers import check_invariants
from tracing import WORKLOADS, Traced, trace_running

from latrace.analysis.summary import summarise
from latrace.tracer.options import Options

pytestmark = pytest.mark.kernel

CHAIN = ["rest", "third", "second", "first"]
SECRET = b"mltwi{" * 8
"""What tests/workloads/deep.c has on its stack."""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("deep") / "deep"
    flags = ["-O2", "-fomit-frame-pointer", "-pthread", "-Wall"]
    subprocess.run(["cc", *flags, "-o", path, WORKLOADS / "deep.c"], check=True)
    return path


@contextmanager
def running(program: Path) -> Iterator[int]:
    with subprocess.Popen(["taskset", "-c", "1", program], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout and process.stdout.readline() == b"ready\n"
            yield process.pid
        finally:
            process.kill()


def trace(program: Path, output: Path, *, copies: bool = True) -> Traced:
    with (
        running(program) as pid,
        subprocess.Popen(["taskset", "-c", "1", "sh", "-c", "while :; do :; done"]) as hog,
    ):
        try:
            options = Options(pids=(pid,), duration_s=3.0, user_copies=copies, cpu_samples_hz=499)
            return trace_running(options, output)
        finally:
            hog.kill()


def user_stacks(traced: Traced) -> dict[int, tuple[list[str | None], str]]:
    """Symbols in user space, leaf first, and how the walk ended, by number."""
    capture = traced.capture
    symbols = {row["id"]: row["symbol"] for row in capture.frames.to_pylist()}
    return {
        row["id"]: (
            [symbols[frame] for frame in row["frames"][row["kernel_frames"] :]],
            row["end"],
        )
        for row in capture.stacks.to_pylist()
    }


def sampled(traced: Traced, table: str) -> list[int]:
    numbers = traced.capture.table(table, columns=["stack"])["stack"].to_pylist()
    return [number for number in numbers if number >= 0]


def test_each_stack_is_the_chain_that_was_called(program: Path, tmp_path: Path) -> None:
    traced = trace(program, tmp_path / "c")
    check_invariants(traced)
    stacks = user_stacks(traced)
    for table in ("waits", "samples"):
        found = [stacks[number] for number in sampled(traced, table)]
        assert len(found) > 50, table
        # A sample may come in main's own beginning, or in the library's.
        right = [
            symbols
            for symbols, end in found
            if end == "whole" and symbols[-1] == "_start" and is_chain(symbols)
        ]
        assert len(right) >= 0.98 * len(found), (
            table,
            [one for one in found if one not in right][:5],
        )
    counts = summarise(traced.capture)["quality"]["stacks"]
    assert counts["truncated"] <= 0.02 * counts["whole"]


def is_chain(symbols: list[str | None]) -> bool:
    """Whether the functions are there, from `first` inwards, with nothing of theirs between."""
    inner = list(itertools.takewhile(lambda name: name != "main", symbols))
    ours = [name for name in inner if name in CHAIN]
    return ours == CHAIN[len(CHAIN) - len(ours) :] and len(ours) > 0


def test_who_waits_for_ever_stands_where_it_does(program: Path, tmp_path: Path) -> None:
    traced = trace(program, tmp_path / "c")
    stacks = user_stacks(traced)
    threads = traced.capture.table("threads").to_pylist()
    (other,) = (row for row in threads if row["tid"] != traced.pid)
    symbols, end = stacks[other["stack"]]
    assert other["open"] == "blocked" and end == "whole"
    assert [name for name in symbols if name in {*CHAIN, "forever"}] == [*CHAIN, "forever"]


def test_nothing_of_the_stack_is_on_the_disk(program: Path, tmp_path: Path) -> None:
    """The copies are walked in memory, and what they hold beside is in no file."""
    with running(program) as pid:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            if line.endswith("[stack]"):
                start, end = (int(word, 16) for word in line.split()[0].split("-"))
                with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
                    memory.seek(start)
                    assert SECRET in memory.read(end - start)  # it is there to be copied
    traced = trace(program, tmp_path / "c")
    assert len(sampled(traced, "waits")) > 50
    files = [path for path in (tmp_path / "c").iterdir() if path.is_file()]
    assert len(files) > 5
    # Compression keeps what has not been there before as it is.
    assert not [path for path in files if SECRET[:6] in path.read_bytes()]


def test_without_copies_the_targets_memory_is_not_read(program: Path, tmp_path: Path) -> None:
    traced = trace(program, tmp_path / "c", copies=False)
    assert traced.capture.manifest["options"]["user_copies"] is False
    stacks = user_stacks(traced)
    found = [stacks[number] for number in sampled(traced, "waits")]
    assert len(found) > 50
    assert {end for _, end in found} == {"frame pointers"}
    assert traced.capture.manifest["quality"]["symbols"]["unwinding"]["ends"] == {}
