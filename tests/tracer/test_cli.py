"""The command line as a user meets it: help, errors, exit codes, streams. No kernel needed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest

import latrace
from latrace import flamegraphs
from latrace.tracer import doctor, loader
from latrace.tracer.cli import main
from latrace.tracer.commands import tracing
from latrace.tracer.commands.flame import EXTENSIONS, Format, Kind
from latrace.tracer.commands.run import describe_end
from latrace.tracer.errors import HostError
from latrace.tracer.options import Options
from latrace.tracer.outputs import OutputDir
from latrace.tracer.processes import read_task

COMMANDS = (
    "attach",
    "run",
    "watch",
    "trigger",
    "spikes",
    "tcp",
    "flame",
    "report",
    "diff",
    "doctor",
    "demo",
)
LATRACE = (
    *(sys.executable, "-c"),
    "import sys; from latrace.tracer.cli import main; sys.exit(main())",
)

Captured = pytest.CaptureFixture[str]


def latrace_process(*arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*LATRACE, *arguments], capture_output=True, text=True, check=False, **settings
    )


# --- help and version ---------------------------------------------------------------------------


def test_the_help_needs_no_utf_8() -> None:
    for command in COMMANDS:
        result = latrace_process(command, "-h", env=os.environ | {"PYTHONIOENCODING": "ascii"})
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("command", [(), *((command,) for command in COMMANDS)])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_goes_to_stdout_and_fits_the_page(
    command: tuple[str, ...], flag: str, capsys: Captured
) -> None:
    assert main([*command, flag]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Usage: latrace")
    assert max(len(line) for line in out.splitlines()) <= 80
    assert err == ""


def test_nothing_at_all_shows_the_help_as_a_usage_error(capsys: Captured) -> None:
    assert main([]) == 2
    out = capsys.readouterr().out
    for command in COMMANDS:
        assert f"\n  {command} " in out
    assert "..." not in out.partition("Commands:")[2]  # every summary fits on its line


def test_version(capsys: Captured) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"latrace {latrace.__version__}\n"


@pytest.mark.parametrize(
    "entry",
    [
        "import runpy; runpy.run_module('latrace', run_name='__main__')",
        "from latrace.tracer.cli import main; sys.exit(main())",
    ],
)
def test_the_program_has_our_name(entry: str) -> None:
    """In `ps` it is latrace, not the interpreter or a script of any name."""
    told = "print(open('/proc/self/comm').read(), end='')"
    code = f"import atexit, sys; {told}; atexit.register(lambda: {told}); {entry}"
    result = subprocess.run(
        [sys.executable, "-c", code, "--version"], capture_output=True, text=True, check=True
    )
    before, version, after = result.stdout.splitlines()
    assert before != "latrace"
    assert (version, after) == (f"latrace {latrace.__version__}", "latrace")


def test_who_only_calls_main_keeps_the_name() -> None:
    comm = Path("/proc/self/comm")
    before = comm.read_bytes()
    assert main(["--version"]) == 0
    assert comm.read_bytes() == before


def test_the_choices_of_flame_are_those_that_exist() -> None:
    assert {kind.value for kind in Kind} == set(flamegraphs.KINDS)
    assert set(EXTENSIONS) == set(Format)
    assert set(EXTENSIONS.values()) == set(flamegraphs.FORMATS)


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with nothing in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "cause"),
    [
        ("bogus", 2, "No such command 'bogus'"),
        ("attach", 2, "nothing to trace"),
        ("attach --bogus", 2, "No such option: --bogus"),
        ("attach --pid x", 2, "--pid 'x' is not a process or thread id"),
        ("attach --pid 1 --min 5", 2, "--min 5 has no unit"),
        ("attach --pid 1 --slow x", 2, "--slow 'x' is not a duration"),
        ("attach --pid 1 -d 0", 2, "--duration 0 is not a time to trace for"),
        ("attach --pid 1 --ring-size 3M", 2, "--ring-size 3M is not a power of two"),
        ("attach --pid 1 --without stacks", 2, "no such part"),
        ("attach --pid 1 --stack-budget 0", 2, "Invalid value for '--stack-budget'"),
        ("attach --pid 4194304", 4, "no process 4194304"),
        ("attach --tid 4194304", 4, "no thread 4194304"),
        ("attach --comm no-such-name", 4, "no process is named no-such-name"),
        ("attach --cgroup /no/such", 4, "no cgroup /no/such"),
        ("attach --pid 2", 2, "2 is the kernel thread kthreadd"),
        ("attach --pid OURS", 2, "latrace itself"),
        ("run", 2, "Missing argument 'CMD...'"),
        ("flame", 2, "Missing argument 'OUT'"),
        ("flame out.pdf", 2, "the name out.pdf does not tell the format"),
        ("flame out.svg --kind cake", 2, "Invalid value for '--kind'"),
        ("flame out.svg", 1, "no capture at latrace.data"),
        ("flame out.svg --only (", 2, "--only '(' is not a regular expression: missing )"),
        ("flame out.svg --hide a --hide [", 2, "--hide '[' is not a regular expression"),
        ("flame out.svg --per-thread --merge-threads", 2, "exclude each other"),
        ("report", 1, "no capture at latrace.data"),
        ("report -i /etc/hostname", 1, "/etc/hostname"),
    ],
)
def test_an_error_is_a_cause_a_hint_and_a_code(
    arguments: str, code: int, cause: str, capsys: Captured, empty_folder: Path
) -> None:
    assert main(arguments.replace("OURS", str(os.getpid())).split()) == code
    out, err = capsys.readouterr()
    assert out == ""
    first, second = err.splitlines()
    assert first.startswith("latrace: ")
    assert cause in first
    assert second.startswith("  hint: ")
    assert list(empty_folder.iterdir()) == []


def test_a_bug_is_a_traceback_not_an_error_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def bug() -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("latrace.tracer.commands.doctor.run_checks", bug)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["doctor"])


def test_a_reader_that_had_enough_is_met_quietly() -> None:
    with subprocess.Popen(
        [*LATRACE, "doctor"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait() == 1
    assert err == b""


def test_a_full_disk_behind_stdout_is_an_error() -> None:
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [*LATRACE, "doctor", "--json"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert result.returncode == 1
    assert result.stderr == (
        "latrace: can not write to standard output: No space left on device\n"
        "  hint: is the disk full?\n"
    )


def test_without_any_streams_it_still_works(tmp_path: Path) -> None:
    result = subprocess.run(
        ["/bin/sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *LATRACE, "attach", "--pid", "4194304"],
        cwd=tmp_path,
        check=False,
    )
    assert result.returncode == 4


def test_the_commands_import_nothing_heavy() -> None:
    script = (
        "import sys, latrace.tracer.commands.application\n"
        "heavy = {'rich', 'pyarrow', 'numpy', 'matplotlib', 'bcc', 'pygments', 'asyncio'}\n"
        "print(*sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == []


# --- the course of a trace, with a tracer that needs no kernel -----------------------------------


class FakeLoading:
    """Takes the place of what compiles and loads the probes."""

    def __init__(self, options: Options) -> None:
        self.options = options


class FakeTracer:
    """Takes the place of the tracer; `during` is what happens while it traces."""

    during: Callable[[threading.Event], None] = staticmethod(lambda _stop: None)
    seen: list[Options] = []  # noqa: RUF012 - one tracer at a time
    left_with: type[BaseException] | None = None
    live = False

    def __init__(
        self,
        options: Options,
        out: Callable[[], OutputDir],
        *,
        command: list[str],
        loading: FakeLoading,
    ) -> None:
        assert command == sys.argv
        assert loading.options == options
        self._make_out = out
        FakeTracer.seen.append(options)

    def __enter__(self) -> Self:
        self._out = self._make_out()
        return self

    def run(
        self,
        *,
        stop: threading.Event,
        on_tick: Callable[[Any], None] | None,
        on_retransmits: Callable[..., None] | None,
    ) -> None:
        assert on_tick is not None
        FakeTracer.live = on_retransmits is not None
        FakeTracer.during(stop)

    def __exit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        FakeTracer.left_with = kind
        self._out.open_new("manifest.json").close()
        self._out.close()


@pytest.fixture
def tracer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[FakeTracer]:
    """A tracer that needs no kernel, on a host where one may trace."""
    session = types.ModuleType("latrace.tracer.session")
    session.Tracer = FakeTracer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "latrace.tracer.session", session)
    monkeypatch.setattr(loader, "Loading", FakeLoading)
    monkeypatch.setattr(doctor, "require_tracing", lambda: None)
    monkeypatch.setattr(tracing, "read_summary", lambda path: {"path": str(path)})
    for command in ("attach", "run"):
        monkeypatch.setattr(
            f"latrace.tracer.commands.{command}.read_summary", lambda path: {"path": str(path)}
        )
    monkeypatch.setattr(FakeTracer, "during", staticmethod(lambda _stop: None))
    monkeypatch.setattr(FakeTracer, "seen", [])
    monkeypatch.setattr(FakeTracer, "left_with", None)
    monkeypatch.chdir(tmp_path)
    return FakeTracer


@pytest.fixture
def target() -> Any:
    """A process to name."""
    with subprocess.Popen(["sleep", "100"]) as process:
        yield process
        process.kill()


def test_a_trace_speaks_on_stderr_and_answers_on_stdout(
    tracer: type[FakeTracer], target: subprocess.Popen[bytes], capsys: Captured
) -> None:
    assert main(["attach", "--pid", str(target.pid), "--json", "-d", "2"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"path": "latrace.data"}
    lines = err.splitlines()
    assert lines[0] == (f"Tracing sleep (pid {target.pid}, 1 thread) for 2 s. Hit Ctrl-C to end.")
    assert lines[1] == "Wrote latrace.data (0 B)"
    assert lines[2].startswith("Next: latrace flame wait.svg")
    assert tracer.seen == [Options(pids=(target.pid,), duration_s=2.0)]
    assert tracer.left_with is None


@pytest.mark.parametrize(
    ("options", "ring_bytes"),
    [
        ("", 16 << 20),
        ("--min 50us", 16 << 20),
        ("--min 0", 64 << 20),
        ("--min 0 --ring-size 4M", 4 << 20),
    ],
)
def test_every_wait_in_detail_has_a_larger_ring(
    tracer: type[FakeTracer], target: subprocess.Popen[bytes], options: str, ring_bytes: int
) -> None:
    assert main(["attach", "-p", str(target.pid), "-q", "--json", *options.split()]) == 0
    assert [seen.ring_bytes for seen in tracer.seen] == [ring_bytes]


def test_every_option_reaches_the_tracer(
    tracer: type[FakeTracer], target: subprocess.Popen[bytes], capsys: Captured
) -> None:
    options = "--min 50us --slow 1ms --no-stacks --stack-budget 7 --ring-size 1M --children -q"
    options += " --cpu-samples 0 --without sleeps,culprits"
    pid = str(target.pid)
    arguments = ["attach", "-p", pid, "-t", pid, "--comm", "sleep", "--json", *options.split()]
    assert main([*arguments, "-o", "x.data"]) == 0
    assert capsys.readouterr().err == ""
    assert tracer.seen == [
        Options(
            pids=(target.pid,),
            tids=(target.pid,),
            comms=("sleep",),
            children=True,
            min_ns=50_000,
            slow_ns=1_000_000,
            stacks=False,
            stack_budget_per_s=7,
            cpu_samples_hz=0,
            without=frozenset({"sleeps", "culprits"}),
            ring_bytes=1 << 20,
        )
    ]
    assert Path("x.data").is_dir()


@pytest.mark.usefixtures("tracer")
def test_an_output_that_exists_is_refused_and_replaced_by_force(
    target: subprocess.Popen[bytes], capsys: Captured
) -> None:
    arguments = ["attach", "-p", str(target.pid), "-o", "x.data", "--json"]
    assert main(arguments) == 0
    assert main(arguments) == 2
    assert "x.data exists" in capsys.readouterr().err
    assert main([*arguments, "--force"]) == 0


@pytest.mark.usefixtures("tracer")
def test_an_output_that_can_not_be_made_is_an_error(
    target: subprocess.Popen[bytes], capsys: Captured
) -> None:
    assert main(["attach", "-p", str(target.pid), "-o", "no/such/x.data"]) == 1
    assert "latrace: " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_the_trace_with_its_report(
    tracer: type[FakeTracer], target: subprocess.Popen[bytes], capsys: Captured, name: str
) -> None:
    before = signal.getsignal(signal.Signals[name])

    def during(stop: threading.Event) -> None:
        signal.raise_signal(signal.Signals[name])
        assert stop.is_set()

    tracer.during = staticmethod(during)
    assert main(["attach", "-p", str(target.pid), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
    assert tracer.left_with is None
    assert signal.getsignal(signal.Signals[name]) == before


def test_a_second_ctrl_c_abandons(
    tracer: type[FakeTracer], target: subprocess.Popen[bytes], capsys: Captured
) -> None:
    def during(_stop: threading.Event) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    tracer.during = staticmethod(during)
    assert main(["attach", "-p", str(target.pid), "--json"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1] == "latrace: interrupted"
    assert tracer.left_with is KeyboardInterrupt


def test_an_ignored_hangup_stays_ignored(
    tracer: type[FakeTracer], target: subprocess.Popen[bytes]
) -> None:
    def during(stop: threading.Event) -> None:
        signal.raise_signal(signal.SIGHUP)
        assert not stop.is_set()

    tracer.during = staticmethod(during)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert main(["attach", "-p", str(target.pid), "--json"]) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_bug_while_tracing_still_closes_the_tracer(
    tracer: type[FakeTracer], target: subprocess.Popen[bytes]
) -> None:
    def during(_stop: threading.Event) -> None:
        raise ZeroDivisionError

    tracer.during = staticmethod(during)
    with pytest.raises(ZeroDivisionError):
        main(["attach", "-p", str(target.pid)])
    assert tracer.left_with is ZeroDivisionError


@pytest.mark.usefixtures("tracer")
def test_a_host_that_can_not_trace_is_told_before_anything_is_made(
    target: subprocess.Popen[bytes],
    capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def refuse() -> None:
        raise HostError("no", hint="yes")

    monkeypatch.setattr(doctor, "require_tracing", refuse)
    assert main(["attach", "-p", str(target.pid)]) == 3
    assert main(["run", "--", "touch", "made"]) == 3
    assert main(["demo"]) == 3
    assert capsys.readouterr().err == "latrace: no\n  hint: yes\n" * 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("tracer")
def test_the_kernels_refusal_is_exit_3(
    target: subprocess.Popen[bytes],
    capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_self: FakeTracer) -> FakeTracer:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(FakeTracer, "__enter__", refuse)
    assert main(["attach", "-p", str(target.pid)]) == 3
    assert "the kernel refused what tracing needs" in capsys.readouterr().err


# --- run: a program that is held until tracing is in place ---------------------------------------


def test_a_program_begins_only_when_traced(
    tracer: type[FakeTracer], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def during(stop: threading.Event) -> None:
        assert not stop.is_set()
        (tmp_path / "attached").write_text("")
        while not (tmp_path / "seen").exists():
            stop.wait(0.01)

    tracer.during = staticmethod(during)
    script = "while [ ! -e attached ]; do sleep 0.01; done; touch seen; exit 7"
    assert main(["run", "--json", "--", "/bin/sh", "-c", script]) == 0
    err = capfd.readouterr().err
    assert "/bin/sh ended with exit status 7." in err
    assert "Tracing /bin/sh (pid " in err


def test_a_programs_own_options_are_its_own(
    tracer: type[FakeTracer], capfd: pytest.CaptureFixture[str]
) -> None:
    def during(stop: threading.Event) -> None:
        pid = tracer.seen[0].pids[0]
        while (task := read_task(pid)) and not task.has_ended:
            stop.wait(0.01)

    tracer.during = staticmethod(during)
    assert main(["run", "--json", "-q", "echo", "-n", "--pid", "hello"]) == 0
    assert "--pid hello" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("command", "cause"),
    [
        (["no-such-program"], "can not start no-such-program: No such file or directory"),
        (["/no/such/program"], "can not start /no/such/program: No such file or directory"),
        (["/etc/passwd"], "can not start /etc/passwd: Permission denied"),
    ],
)
def test_a_program_that_can_not_start_is_one_clear_line(
    tracer: type[FakeTracer], capsys: Captured, tmp_path: Path, command: list[str], cause: str
) -> None:
    assert main(["run", "--", *command]) == 1
    err = capsys.readouterr().err
    assert f"latrace: {cause}\n  hint: " in err
    assert tracer.seen == []
    assert list(tmp_path.iterdir()) == []  # found out before anything was written


@pytest.mark.usefixtures("tracer")
def test_a_file_that_is_no_program(capsys: Captured, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_text("")
    empty.chmod(0o755)
    assert main(["run", "--", "./empty"]) == 1
    assert "can not start ./empty: Exec format error" in capsys.readouterr().err


@pytest.mark.usefixtures("tracer")
def test_a_program_that_outlives_the_trace_is_asked_to_end(capsys: Captured) -> None:
    assert main(["run", "--json", "--", "sleep", "100"]) == 0
    assert "sleep was ended by SIGTERM." in capsys.readouterr().err


def test_the_end_of_a_program_in_words() -> None:
    assert describe_end("x", 0, pid=5) == "x ended with exit status 0."
    assert describe_end("x", 3 << 8, pid=5) == "x ended with exit status 3."
    assert describe_end("x", 11, pid=5) == "x was ended by SIGSEGV."
    assert describe_end("x", 40, pid=5) == "x was ended by signal 40."
    assert describe_end("x", None, pid=5) == "x (pid 5) still runs, no longer traced."
