"""scripts/fuzz: every target runs for a moment, and a finding is one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

TREE = Path(__file__).resolve().parents[1]
for folder in ("scripts", "tests/unwinding", "tests/flamegraphs"):
    sys.path.append(str(TREE / folder))

from fuzzing import __main__ as command  # noqa: E402
from fuzzing.suite import TARGETS  # noqa: E402
from fuzzing.supervisor import run  # noqa: E402
from fuzzing.target import Target, hold  # noqa: E402


def fuzz(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [TREE / "scripts/fuzz", *arguments], capture_output=True, text=True, check=False
    )


def test_every_target_finds_nothing_in_a_moment() -> None:
    done = fuzz("--minutes", "0.1", "--seed", "tests")
    assert done.returncode == 0, done.stderr
    told = dict(re.findall(r"^(\S+) +(\d+) cases", done.stdout, re.MULTILINE))
    left_out = re.findall(r"^(\S+): left out: ", done.stderr, re.MULTILINE)
    assert set(told) == set(TARGETS)
    assert {name for name, count in told.items() if count == "0"} <= set(left_out)


FOUND = {
    "an exception": (lambda: hold(False, "as planned"), "AssertionError: as planned"),
    "a warning": (lambda: __import__("warnings").warn("wrapped", stacklevel=1), "wrapped"),
    "no end": (lambda: [None for _ in iter(int, 1)], "more than 0.2 s of CPU time"),
    "a crash": (lambda: os.kill(os.getpid(), signal.SIGKILL), "ended by SIGKILL"),
    "memory": (lambda: bytes(1 << 40), "MemoryError"),
}


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("what", FOUND)
def test_a_finding_ends_the_child_and_is_told_with_its_case(what: str, tmp_path: Path) -> None:
    act, expected = FOUND[what]

    def check(case: bytes) -> None:
        if case == b"\x07":
            act()

    target = Target("made", what, lambda random: random.randbytes(1), check, limit_s=0.2)
    outcome = run(target, seed="1", seconds=30, base=tmp_path)
    assert expected in outcome.finding
    assert outcome.case == b"\x07" and outcome.cases > 0


def test_the_same_seed_makes_the_same_cases(tmp_path: Path) -> None:
    seen: list[list[bytes]] = []
    for _ in range(2):
        random = command.Random("tests")
        seen.append([TARGETS["perf-map"].make(random) for _ in range(20)])  # type: ignore[union-attr]
    assert seen[0] == seen[1]
    assert fuzz("--only", "nothing").returncode == 2
    case = tmp_path / "case"
    case.write_bytes(b"\x00zz\n")
    assert fuzz("--only", "perf-map", "--case", str(case)).returncode == 0
