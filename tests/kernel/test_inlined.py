"""A program that waits in an inlined function, from the kernel to the flame graph."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from tracing import WORKLOADS, Traced, trace

from latrace.tracer.cli import main
from latrace.tracer.options import Options
from latrace.tracer.symbols.dwarf import Libdw

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(not Libdw().available, reason="needs libdw1"),
]


@pytest.fixture(scope="module")
def napping(tmp_path_factory: pytest.TempPathFactory) -> tuple[Traced, Path]:
    """A program that sleeps a millisecond and computes in turn, all of it inlined into `work`."""
    folder = tmp_path_factory.mktemp("inlined")
    program = folder / "napper"
    source = WORKLOADS / "inlined.c"
    flags = ["-O2", "-g", "-fno-omit-frame-pointer", "-Wl,--build-id=sha1"]
    subprocess.run(["cc", *flags, "-o", program, source], check=True)
    traced = trace(
        [program, "1200", "wait"],
        folder / "c",
        make_options=lambda pid: Options(pids=(pid,), min_ns=0, cpu_samples_hz=499),
    )
    return traced, program


def flame(traced: Traced, out: Path, *options: str) -> dict[str, int]:
    """Microseconds by stack."""
    source = str(traced.capture.path)
    assert main(["flame", "-q", "-f", "-i", source, *options, str(out)]) == 0
    rows = (line.rpartition(" ") for line in out.read_text().splitlines())
    return {stack: int(us) for stack, _, us in rows}


def of_work(stacks: dict[str, int], inside: str) -> int:
    """The time of the stacks in which that is inside of `work`."""
    return sum(us for stack, us in stacks.items() if f";main;work;{inside};" in stack)


def test_blocked_time_is_of_the_function_that_slept(
    napping: tuple[Traced, Path], tmp_path: Path
) -> None:
    traced, program = napping
    rows = [row for row in traced.capture.frames.to_pylist() if row["symbol"] == "work"]
    assert rows and {row["path"] for row in rows} == {str(program)}
    out = tmp_path / "o.folded"
    bare = flame(traced, out, "--kind", "offcpu")
    with_inlines = flame(traced, out, "--kind", "offcpu", "--inlines")
    assert sum(with_inlines.values()) == sum(bare.values())
    # 1,200 sleeps of a millisecond and a little; `work` itself calls nothing that blocks.
    asleep = of_work(with_inlines, "step;nap")
    assert asleep == sum(
        us for stack, us in bare.items() if ";work;" in stack and "nanosleep" in stack
    )
    assert asleep > 1_000_000
    assert not any("nap" in stack.split(";") for stack in bare)


def test_cpu_time_is_of_the_function_that_computed(
    napping: tuple[Traced, Path], tmp_path: Path
) -> None:
    traced, _ = napping
    stacks = flame(traced, tmp_path / "o.folded", "--kind", "wall", "--inlines")
    on_cpu = {stack: us for stack, us in stacks.items() if stack.startswith("[on CPU];")}
    spinning = sum(us for stack, us in on_cpu.items() if stack.endswith(";work;spin"))
    assert spinning > 0.5 * sum(on_cpu.values())


def test_a_program_built_anew_is_not_asked(
    napping: tuple[Traced, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    traced, program = napping
    before = program.read_bytes()
    try:
        program.unlink()
        source = WORKLOADS / "causes.c"
        subprocess.run(["cc", "-O1", "-g", "-pthread", "-o", program, source], check=True)
        stacks = flame(traced, tmp_path / "o.folded", "--kind", "offcpu", "--inlines")
        assert not any("nap" in stack.split(";") for stack in stacks)
        assert "another build by now: napper (" in capsys.readouterr().err
    finally:
        program.unlink()
        program.write_bytes(before)
        program.chmod(0o755)
