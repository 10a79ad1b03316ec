"""`latrace flame` of a capture on disk: what each option comes to, and how patterns fail."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest
from flame_samples import drawn
from test_flame_shape import captured

from latrace.flamegraphs import shape
from latrace.tracer.cli import main


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a capture in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latrace.data").mkdir()
    captured().write(tmp_path / "latrace.data")
    return tmp_path


def flame(folder: Path, arguments: str, name: str = "out.folded") -> bytes:
    assert main(["flame", "-f", "-q", *arguments.split(), name]) == 0
    return (folder / name).read_bytes()


IRQ = "[waiting: irq];[not sampled] 1\n"
OTHER = "[waiting: other];[not sampled] 1\n"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            "--collapse",
            f"{IRQ}[waiting: other];app;main;f;-;schedule 8\n{OTHER}",
        ),
        (
            "--merge-threads --collapse --hide ^main$ --hide schedule|^-$",
            f"{IRQ}[waiting: other];f 8\n{OTHER}",
        ),
        (
            "--per-thread --only ^worker --reverse",
            "schedule;-;f;main;_start;[waiting: other];worker/101 2\n[not matched] 6\n"
            "[not sampled];[waiting: irq] 1\n[not sampled];[waiting: other] 1\n",
        ),
    ],
)
def test_options(arguments: str, text: str, folder: Path) -> None:
    assert flame(folder, arguments).decode() == text


@pytest.mark.parametrize("kind", ["wait", "culprit", "offcpu", "waker", "wall"])
@pytest.mark.parametrize("options", ["--reverse", "--per-thread --collapse --only app --hide f"])
def test_every_format_has_the_options(kind: str, options: str, folder: Path) -> None:
    arguments = f"--kind {kind} {options}"
    lines = flame(folder, arguments).decode().splitlines()
    total = sum(int(line.rpartition(" ")[2]) for line in lines)
    names = {name for line in lines for name in line.rpartition(" ")[0].split(";")}
    speedscope = json.loads(flame(folder, arguments, "o.speedscope.json"))
    assert {frame["name"] for frame in speedscope["shared"]["frames"]} == names
    assert speedscope["profiles"][0]["endValue"] == total
    boxes = drawn(flame(folder, arguments, "o.svg").decode())
    assert {box.name for box in boxes[1:]} == names and boxes[0].value == total
    pprof = gzip.decompress(flame(folder, arguments, "o.pb.gz"))
    assert all(name.encode() in pprof for name in names)


def test_a_pattern_without_end_is_a_usage_error(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shape, "PATTERN_SECONDS", 0.1)
    assert main(["flame", "out.svg", "--hide", "(.+.?)+.?x{9}\x1b"]) == 2
    cause, hint = capsys.readouterr().err.splitlines()
    assert cause == "latrace: the pattern '(.+.?)+.?x{9}\\x1b' took over 0.1 s"
    assert hint.startswith("  hint: ")
    assert not (folder / "out.svg").exists()


def test_what_to_type_instead_of_a_bad_pattern(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["flame", "out.svg", "--only", "f(x"]) == 2
    hint = capsys.readouterr().err.splitlines()[1]
    assert hint == "  hint: to find that very text: --only 'f\\(x'"
    assert main(["flame", "-q", "out.folded", "--only", "f\\(x"]) == 0
    assert "[not matched] 8" in (folder / "out.folded").read_text()


def test_pprof_says_how_to_read_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["flame", "wait.pb.gz"]) == 0
    assert "Next: go tool pprof -top wait.pb.gz\n" in capsys.readouterr().err
    assert (folder / "wait.pb.gz").read_bytes()[:2] == b"\x1f\x8b"


def test_no_profile_on_a_terminal(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["flame", "--format", "pprof", "-"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "not for a terminal" in err
    assert folder.exists()
