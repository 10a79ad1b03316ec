"""`latrace report` as a user types it: parts of a capture, and mistakes in saying which."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from latrace.tracer.cli import main
from latrace.tracer.commands.quantities import parse_moment
from latrace.tracer.errors import UsageError
from latrace.tracer.outputs import create_output_dir
from latrace.tracer.writer import CaptureWriter

START_NS, S, MS = 10**15, 10**9, 10**6


@pytest.fixture(scope="module")
def capture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wait at the end of each of 100 seconds, as many milliseconds long, by two threads."""
    path = tmp_path_factory.mktemp("report") / "c"
    manifest = {"start_ns": START_NS, "end_ns": START_NS + 101 * S}
    writer = CaptureWriter(create_output_dir(path, force=False), manifest)
    seconds = np.arange(1, 101)
    writer.append(
        "waits",
        {
            "run_ns": (START_NS + S * seconds).astype(np.uint64),
            "wait_ns": (MS * seconds).astype(np.uint64),
            "tid": (800 + seconds % 2).astype(np.int32),
            "tgid": np.full(100, 800, np.int32),
        },
    )
    writer.close(complete=True)
    return path


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ([], range(1, 101)),
        (["--since", "1m30s"], range(90, 101)),
        (["--until", "2s"], range(1, 2)),
        (["--since", "10s", "--until", "1m"], range(10, 60)),
        (["--tid", "801"], range(1, 101, 2)),
        (["-t", "800,801"], range(1, 101)),
        (["--over", "5ms"], range(6, 101)),
        (["--since", "50s", "--tid", "800", "--over", "0.08s"], range(82, 101, 2)),
        (["--since", "5m"], range(0)),
    ],
)
def test_parts(
    capture: Path, options: list[str], chosen: range, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "-i", str(capture), "--json", *options]) == 0
    summary = json.loads(capsys.readouterr().out)
    waits = summary["waits"]
    assert waits["count"] == len(chosen)
    assert waits["total_ns"] == MS * sum(chosen) == sum(waits["by_cause_ns"].values())
    assert (summary["selection"] is None) == (not options)
    assert main(["report", "-i", str(capture), *options]) == 0
    text = capsys.readouterr().out
    assert ("Only waits and sleep calls" in text) == bool(options)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--over", "5"], "--over 5 has no unit"),
        (["--since", "yesterday"], "--since 'yesterday' is not a duration"),
        (["--since", "1m30"], "--since '1m30' is not a duration"),
        (["--until", "1m3x"], "there is no unit 'x'"),
        (["--since", "2s", "--until", "1s"], "nothing lies between --since 2s and --until 1s"),
        (["--until", "0"], "nothing lies between"),
        (["--tid", "redis"], "'redis' is not a process or thread id"),
    ],
)
def test_mistakes(
    capture: Path, options: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "-i", str(capture), *options]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert told in err


@pytest.mark.parametrize(
    ("text", "ns"),
    [
        ("0", 0),
        ("2s", 2 * S),
        ("1m30s", 90 * S),
        ("1h2m3.5s", 3723 * S + 500 * MS),
        ("1s250ms", 1250 * MS),
        (" 2 s ", 2 * S),
    ],
)
def test_moments(text: str, ns: int) -> None:
    assert parse_moment(text, option="--since") == ns


@pytest.mark.parametrize("text", ["", "1m30", "m", "-1s", "1m-30s", "1.2.3s4m", "1s" * 7])
def test_what_is_no_moment(text: str) -> None:
    with pytest.raises(UsageError):
        parse_moment(text, option="--since")
