"""What older kernels lack is done without, and said: built for them, run on this one."""

from __future__ import annotations

import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import pytest

import latrace
from latrace.tracer import loader
from latrace.tracer.options import Options
from latrace.tracer.outputs import create_output_dir
from latrace.tracer.session import Tracer

pytestmark = pytest.mark.kernel


class WithoutExitTracepoint(loader.Loading):
    """Loads the probes as for a kernel that has no sched_exit_tp."""

    def _run(self) -> None:
        build = replace(loader.build_for(self._options), user_stacks=False)
        self._probes = loader.load(build)


def test_kernel_stacks_where_user_stacks_cannot_be_had(waits: Path, tmp_path: Path) -> None:
    program = subprocess.Popen([waits, "sleepers", "800"], stdin=subprocess.PIPE)
    assert program.stdin
    options = Options(pids=(program.pid,), min_ns=0)
    with Tracer(
        options,
        lambda: create_output_dir(tmp_path / "c", force=False),
        command=[],
        loading=WithoutExitTracepoint(options),
    ) as tracer:
        program.stdin.write(b"x")
        program.stdin.close()
        tracer.run(stop=threading.Event())
    program.wait()
    capture = latrace.open(tmp_path / "c")
    frames = {row["id"]: row["symbol"] for row in capture.frames.to_pylist()}
    sampled = {row["stack"] for row in capture.waits.to_pylist()} - {-1}
    assert sampled
    stacks = [row for row in capture.stacks.to_pylist() if row["id"] in sampled]
    assert all(row["kernel_frames"] == len(row["frames"]) > 0 for row in stacks)
    assert not any(row["whole"] for row in stacks)
    seen = {frames[frame] for row in stacks for frame in row["frames"]}
    assert "hrtimer_nanosleep" in seen
