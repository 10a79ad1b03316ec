"""What `latrace watch` refuses, before it traces: an exit code, a cause and a remedy."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from latrace.tracer.cli import main

Captured = pytest.CaptureFixture[str]

METRIC = ("--metric", "request_seconds")
METRICS = ("--metrics", "http://127.0.0.1:1/metrics")
NOBODY = 65534
NO_PROCESS = 2**22 - 1  # the last there can be (PID_MAX_LIMIT)


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    """The number of a process that does nothing."""
    with subprocess.Popen(["sleep", "1000"]) as process:
        yield str(process.pid)
        process.kill()


def refused(arguments: tuple[str, ...], capsys: Captured) -> tuple[int, str]:
    """The exit code and the cause, of which there is one line, and one more with the remedy."""
    code = main(["watch", *arguments])
    out, err = capsys.readouterr()
    cause, hint = err.splitlines()
    assert out == ""
    assert cause.startswith("latrace: ") and hint.startswith("  hint: ")
    return code, cause.removeprefix("latrace: ")


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (("--p99", "soon"), "--p99 'soon' is not a duration"),
        (("--p99", "10"), "--p99 10 has no unit"),
        (("--p50", "-1ms"), "--p50 '-1ms' is not a duration"),
        (("--p99", "0ms"), "--p99 0ms would fire all the time"),
        (("--max", "sleep=0"), "--max 0 would fire all the time"),
        (("--p999", "1parsec"), "--p999 1parsec: there is no unit 'parsec'"),
        (("--p99", "disk=10ms"), "'disk=10ms': there is no percentile of 'disk'"),
        (("--p99-ratio", "three"), "--p99-ratio 'three' is not a number above 1"),
        (("--p99-ratio", "0.5"), "--p99-ratio '0.5' is not a number above 1"),
        (("--p99-ratio", "nan"), "--p99-ratio 'nan' is not a number above 1"),
        (("--max", "sleep="), "--max '' is not a duration"),
        (("--floor", "x"), "--floor 'x' is not a duration"),
        (("--retransmits", "0"), "Invalid value for '--retransmits'"),
        (("--min-count", "few"), "Invalid value for '--min-count'"),
        (("--quantile", "1.5"), "Invalid value for '--quantile'"),
        (("--keep", "0"), "Invalid value for '--keep'"),
        (("--window", "0"), "--window 0 is out of range"),
        (("--before", "0"), "--before 0 is out of range"),
        (("--after", "2h"), "--after 2h is out of range"),
        (("--cooldown", "-1s"), "--cooldown '-1s' is not a duration"),
        (("--memory", "10"), "--memory '10' is not a size of 1M or more"),
        (("--disk", "1T"), "--disk '1T' is not a size of 1M or more"),
        (("--duration", "0"), "--duration 0 is not a time to trace for"),
        ((*METRIC, "--above", "1s"), "--metrics, --metric and --above belong together"),
        ((*METRICS, *METRIC), "--metrics, --metric and --above belong together"),
        ((*METRICS, "--above", "1s"), "--metrics, --metric and --above belong together"),
        ((*METRICS, *METRIC, "--above", "x"), "--above 'x' is not a duration"),
        ((*METRICS, "--metric", "a{", "--above", "1s"), "--metric a{: is no name of a metric"),
        (
            ("--metrics", "https://a/metrics", *METRIC, "--above", "1s"),
            "--metrics https://a/metrics: https is not spoken here",
        ),
        (("--pprof", "junk"), "--pprof junk: is no address"),
        (("--pprof", "ftp://a/"), "--pprof ftp://a/: the scheme ftp is not known here"),
        (("--pprof", "http://a:99999/"), "--pprof http://a:99999/: there is no port 99999"),
        (("--on-spike", ""), "--on-spike is empty"),
        (("--on-spike", "tell 'me"), '--on-spike "tell \'me": No closing quotation'),
        (("spikes",), "Got unexpected extra argument(s) (spikes)"),
        (("--p42", "1ms"), "No such option: --p42"),
    ],
)
def test_what_cannot_be_meant(
    arguments: tuple[str, ...], cause: str, target: str, capsys: Captured, tmp_path: Path
) -> None:
    output = tmp_path / "s"
    code, told = refused(("--pid", target, "-o", str(output), *arguments), capsys)
    assert (code, told[: len(cause)]) == (2, cause)
    assert not output.exists()


def test_nothing_to_watch(capsys: Captured) -> None:
    assert refused((), capsys) == (2, "nothing to trace")
    assert refused(("--pid", "me"), capsys) == (2, "--pid 'me' is not a process or thread id")


@pytest.mark.parametrize(
    ("named", "cause"),
    [
        (("--pid", str(NO_PROCESS)), f"no process {NO_PROCESS}"),
        (("--tid", str(NO_PROCESS)), f"no thread {NO_PROCESS}"),
        (("--comm", "no-such-name"), "no process is named no-such-name"),
    ],
)
def test_nobody_to_watch(
    named: tuple[str, ...], cause: str, capsys: Captured, tmp_path: Path
) -> None:
    output = tmp_path / "s"
    assert refused((*named, "-o", str(output)), capsys) == (4, cause)
    assert not output.exists()


AS_NOBODY = """
import os, sys
from latrace.tracer.cli import main
import latrace.tracer.commands.watch, latrace.tracer.watch.service
import latrace.tracer.watch.rules, latrace.tracer.watch.pprof
if os.geteuid() == 0:
    os.setgroups([]); os.setresgid({0}, {0}, {0}); os.setresuid({0}, {0}, {0})
sys.exit(main(sys.argv[1:]))
"""


def test_without_the_right_to_trace(target: str, tmp_path: Path) -> None:
    """The remedy is there, and no directory that could only be in the way."""
    output = tmp_path / "s"
    words = ("watch", "--pid", target, "--p99", "10ms", "-o", str(output))
    result = subprocess.run(
        [sys.executable, "-c", AS_NOBODY.format(NOBODY), *words],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        timeout=60,
    )
    assert result.returncode == 3, result.stderr
    assert result.stdout == ""
    cause, hint = result.stderr.splitlines()
    assert cause.startswith("latrace: ") and "sudo" in hint, result.stderr
    assert not output.exists()


@pytest.mark.parametrize("words", [(*METRICS, *METRIC, "--above", "1s"), ("--pprof", METRICS[1])])
def test_an_application_that_is_not_named(
    words: tuple[str, ...], capsys: Captured, tmp_path: Path
) -> None:
    """Whose network the address is in has to be known."""
    output = tmp_path / "s"
    code, told = refused(("--comm", "redis-server", "-o", str(output), *words), capsys)
    assert code == 2
    assert told == f"{words[0]} is asked in the network of a process, and none is named"
    assert not output.exists()


@pytest.mark.kernel
def test_a_directory_that_is_none(target: str, capsys: Captured, tmp_path: Path) -> None:
    it = ("--pid", target)
    assert refused((*it, "-o", "/"), capsys) == (2, "/ cannot be a name for an output")
    (tmp_path / "file").write_text("")
    for path, cause in (
        (tmp_path / "file", "not a directory"),
        (tmp_path / "none" / "s", "no such directory"),
    ):
        assert refused((*it, "-o", str(path)), capsys) == (1, f"cannot write {path}: {cause}")


TOLD = """
import sys
from pathlib import Path
from types import SimpleNamespace
from latrace.tracer.commands.console import Status
from latrace.tracer.watch.explain import Explained
from latrace.tracer.watch.service import _Service
from latrace.tracer.watch.view import WatchView
plan = SimpleNamespace(as_json=sys.argv[1] == "json", once=False)
service = _Service(plan, None, WatchView(Status()), None)
for line in sys.stdin:
    service.tell(Explained(Path("/s", line.strip()), "The P99 rose.", ""))
    print("told", file=sys.stderr, flush=True)
"""


@pytest.mark.parametrize("form", ["paths", "json"])
def test_whose_output_nobody_reads_any_more(form: str) -> None:
    """As with `| head -1`: that is said once, and no reason to end."""
    with subprocess.Popen(
        [sys.executable, "-c", TOLD, form],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write("one\n")
        process.stdin.flush()
        first = process.stdout.readline()
        assert first == ("/s/one\n" if form == "paths" else '{"path": "/s/one"}\n')
        process.stdout.close()
        process.stdin.write("two\nthree\n")
        process.stdin.close()
        lines = [line.rstrip("\n").partition("  ")[2] or line for line in process.stderr]
    assert process.returncode == 0, lines
    assert lines.count("The P99 rose.") == lines.count("told\n") == 3
    (trouble,) = (line for line in lines if line.startswith("!!!"))
    assert trouble == "!!! nobody reads the standard output any more; the watch goes on"
