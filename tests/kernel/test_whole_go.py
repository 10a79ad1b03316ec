"""Stacks of a Go program on the live kernel: whole, and of whom they are said to be."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from tracing import Traced, trace_running
from traffic import Traffic, build_service

from latrace.tracer.options import Options

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module", params=["as built", "stripped"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    flags = ["-s", "-w"] if request.param == "stripped" else []
    return build_service(tmp_path_factory.mktemp("service"), linker_flags=flags)


def trace(program: Path, output: Path, *, copies: bool = True) -> Traced:
    with subprocess.Popen([program], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            address = process.stdout.readline().strip()
            with Traffic(address, clients=8, period_s=0.002) as traffic:
                traffic.burst("/gc?mb=8&times=1", clients=1, times=40)
                options = Options(
                    pids=(process.pid,), duration_s=4.0, cpu_samples_hz=499, user_copies=copies
                )
                return trace_running(options, output)
        finally:
            process.kill()


def stacks(traced: Traced) -> dict[int, tuple[list[str], str]]:
    """Symbols in user space, leaf first, and how the walk ended, by number."""
    symbols = {row["id"]: row["symbol"] or "?" for row in traced.capture.frames.to_pylist()}
    return {
        row["id"]: (
            [
                symbols[frame].removesuffix(".abi0")
                for frame in row["frames"][row["kernel_frames"] :]
            ],
            row["end"],
        )
        for row in traced.capture.stacks.to_pylist()
    }


def sampled(traced: Traced, table: str) -> list[tuple[list[str], str]]:
    numbers = traced.capture.table(table, columns=["stack"])["stack"].to_pylist()
    known = stacks(traced)
    return [known[number] for number in numbers if number >= 0]


def test_its_stacks_are_whole(program: Path, tmp_path: Path) -> None:
    traced = trace(program, tmp_path / "c")
    for table in ("waits", "samples"):
        found = sampled(traced, table)
        assert len(found) > 100, table
        short = [one for one in found if one[1] != "whole"]
        assert len(short) <= 0.02 * len(found), (table, short[:5])
        # What is behind the scheduler's entry would be of a goroutine that is not there any more.
        roots = {"runtime.mcall", "runtime.morestack", "runtime.mstart", "runtime.goexit"}
        assert not [one for one in found if roots & {*one[0][:-1]}], table
        assert {symbols[-1] for symbols, end in found if end == "whole"} & roots
    # Who waits for work came there from the scheduler.
    idle = [one for one, _ in sampled(traced, "waits") if "runtime.stopm" in one]
    assert len(idle) > 20
    assert {one[-1] for one in idle} <= {"runtime.mcall", "runtime.mstart", "runtime.morestack"}
    # A function without a frame of its own hides nobody.
    leaves = [one for one, _ in sampled(traced, "waits") if one[:1] == ["runtime.futex"]]
    assert len(leaves) > 20
    callers = [one[1] in ("runtime.futexsleep", "runtime.futexwakeup") for one in leaves]
    assert sum(callers) > 0.9 * len(leaves)  # a copy may be lost where all CPUs are taken
    # On the system's stack it still is the goroutine that runs.
    for one, end in sampled(traced, "samples"):
        if "runtime.systemstack" in one and end == "whole":
            assert one[-1] in ("runtime.goexit", "runtime.rt0_go"), one
            break
    else:
        pytest.fail("nothing was sampled on the system's stack")


def test_without_copies_nothing_is_made_up(program: Path, tmp_path: Path) -> None:
    traced = trace(program, tmp_path / "c", copies=False)
    found = sampled(traced, "waits")
    assert len(found) > 100
    assert sum(end == "whole" for _, end in found) > 0.9 * len(found)
    assert not [one for one, _ in found if "runtime.mcall" in one[:-1]]
