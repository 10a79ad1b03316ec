"""The commands that trace, as a user types them, on the live kernel."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import latrace
from latrace.analysis.errors import CaptureError
from latrace.tracer.processes import processes, read_task

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("folder")]

LATRACE = (
    *(sys.executable, "-c"),
    "import sys; sys.argv[0] = 'latrace'; from latrace.tracer.cli import main; sys.exit(main())",
)
NAME = f"lat-t-{os.getpid()}"  # another run of these tests may be under way
SLEEPER = f"""
import time
open("/proc/self/comm", "w").write("{NAME}")
while True: time.sleep(0.001)
"""
NOBODY = 65534
BEHIND_SUDO = {"SUDO_UID": str(NOBODY), "SUDO_GID": str(NOBODY), "SUDO_USER": "nobody"}
TIMEOUT_S = 60
# v2 alone; or v1's cpu controller, and v2 beside it.
CGROUPS = [Path("/sys/fs/cgroup") / name for name in ("", "cpu", "unified")]


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory of nobody's, so that what root makes in it shows."""
    # pytest's own temporary directories are closed to others, anew with each run of it.
    with tempfile.TemporaryDirectory(prefix="latrace-test-") as name:
        os.chown(name, NOBODY, NOBODY)
        monkeypatch.chdir(name)
        yield Path(name)
        monkeypatch.undo()


@pytest.fixture
def victim() -> Iterator[subprocess.Popen[bytes]]:
    """A process that waits a thousand times a second."""
    with subprocess.Popen([sys.executable, "-c", SLEEPER]) as process:
        yield process
        process.kill()


def trace(
    *arguments: str, environ: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*LATRACE, *arguments],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=os.environ | (environ or {}),
        check=False,
    )


def start(*arguments: str, **settings: Any) -> subprocess.Popen[str]:
    """Start a trace and wait until it has attached."""
    process = subprocess.Popen(
        [*LATRACE, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **settings,
    )
    assert process.stderr
    while (line := process.stderr.readline()).startswith("Note: "):
        pass
    assert line.startswith("Tracing "), line + process.stderr.read()
    return process


# --- attach -------------------------------------------------------------------------------------


def test_attach_answers_and_anyone_can_read_on(
    folder: Path, victim: subprocess.Popen[bytes]
) -> None:
    arguments = ["attach", "--pid", str(victim.pid), "-d", "1", "--json"]
    result = trace(*arguments, environ=BEHIND_SUDO)
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["capture"]["complete"] is True
    assert summary["waits"]["count"] > 100
    told = [line for line in result.stderr.splitlines() if not line.startswith("!!!")]
    assert told[1].startswith("Wrote latrace.data (")
    for path in (folder / "latrace.data", *(folder / "latrace.data").iterdir()):
        assert path.stat().st_uid == NOBODY
        assert path.stat().st_mode & 0o077 == 0

    setpriv = shutil.which("setpriv")
    assert setpriv
    as_nobody = [setpriv, f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    # The one right that is kept is to read our code, wherever the checkout is; that the capture
    # is readable has just been asserted.
    as_nobody += ["--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"]
    for command in (["report", "--json"], ["flame", "wait.svg"], ["flame", "-"]):
        read = subprocess.run(
            [*as_nobody, *LATRACE, *command], capture_output=True, text=True, check=False
        )
        assert read.returncode == 0, read.stderr
        if command == ["report", "--json"]:
            assert json.loads(read.stdout)["waits"] == summary["waits"]
        elif command == ["flame", "-"]:
            total_us = sum(int(line.rpartition(" ")[2]) for line in read.stdout.splitlines())
            assert total_us == round(summary["waits"]["total_ns"] / 1000)
    assert (folder / "wait.svg").read_text().startswith("<svg ")

    again = trace(*arguments, environ=BEHIND_SUDO)
    assert again.returncode == 0, again.stderr
    assert (folder / "latrace.data.old").is_dir()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_with_a_report(
    folder: Path, victim: subprocess.Popen[bytes], number: signal.Signals
) -> None:
    process = start("attach", "--pid", str(victim.pid))
    time.sleep(0.3)
    process.send_signal(number)
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, err
    assert "waits in" in out
    assert "Wrote latrace.data" in err
    assert latrace.open(folder / "latrace.data").complete


def test_a_signal_before_it_has_attached_is_clean(victim: subprocess.Popen[bytes]) -> None:
    # Once it has begun itself: before that it is the interpreter that is interrupted.
    script = LATRACE[2].replace("sys.exit", "print('up', flush=True); sys.exit")
    for delay_s in (0.005, 0.05, 0.1, 0.2, 0.3, 0.4):
        process = subprocess.Popen(
            [sys.executable, "-c", script, "attach", "--pid", str(victim.pid)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout
        assert process.stdout.readline() == "up\n"
        time.sleep(delay_s)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode in (0, 1)
        assert "Traceback" not in err
        assert process.returncode == 0 or err == "latrace: interrupted\n"


def test_a_second_ctrl_c_abandons_but_leaves_what_there_is(
    folder: Path, victim: subprocess.Popen[bytes]
) -> None:
    process = start("attach", "--pid", str(victim.pid))
    time.sleep(1.2)  # two flushes
    process.send_signal(signal.SIGSTOP)  # so that both are there when it looks
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1, err
    assert err.splitlines()[-1] == "latrace: interrupted"
    assert not latrace.open(folder / "latrace.data").complete


def test_the_targets_end_is_the_end(victim: subprocess.Popen[bytes]) -> None:
    process = start("attach", "--pid", str(victim.pid), "--json")
    victim.kill()
    victim.wait()
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, err
    assert json.loads(out)["capture"]["complete"] is True


def test_quiet_says_nothing(victim: subprocess.Popen[bytes]) -> None:
    result = trace("attach", "-p", str(victim.pid), "-d", "0.5", "-q")
    assert result.returncode == 0
    assert not [line for line in result.stderr.splitlines() if not line.startswith("!!!")]
    assert "waits in" in result.stdout


def test_by_name(victim: subprocess.Popen[bytes]) -> None:
    result = trace("attach", "--comm", f"{NAME[:-1]}*", "-d", "0.5", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["waits"]["count"] > 50
    assert f"{NAME} (pid {victim.pid}" in result.stderr


@pytest.fixture(params=[base for base in CGROUPS if (base / "cgroup.procs").exists()], ids=str)
def cgroup(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A cgroup of our own, in each hierarchy that this host has."""
    base: Path = request.param
    group = base / "latrace-test-cli"
    group.mkdir()
    yield group
    for pid in (group / "cgroup.procs").read_text().split():
        (base / "cgroup.procs").write_text(pid)
    group.rmdir()


def test_by_cgroup_with_those_that_join_later(
    cgroup: Path, victim: subprocess.Popen[bytes]
) -> None:
    process = start("attach", "--cgroup", str(cgroup), "-d", "1.5", "--json")
    (cgroup / "cgroup.procs").write_text(str(victim.pid))
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, err
    summary = json.loads(out)
    assert [target["tgid"] for target in summary["capture"]["targets"]] == [victim.pid]
    assert summary["waits"]["count"] > 50


def test_a_folder_of_somebody_elses_is_not_written(
    folder: Path, victim: subprocess.Popen[bytes]
) -> None:
    os.chown(folder, 0, 0)
    result = trace("attach", "-p", str(victim.pid), "-d", "0.2", environ=BEHIND_SUDO)
    assert result.returncode == 1
    assert "latrace.data: permission denied" in result.stderr.lower()
    assert "  hint: " in result.stderr
    assert list(folder.iterdir()) == []


def test_a_full_disk_is_an_error_and_leaves_what_there_is(
    folder: Path, victim: subprocess.Popen[bytes]
) -> None:
    full = folder / "full"
    full.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(full)], check=True)
    try:
        arguments = ("-o", "full/x.data", "--min", "0", "-d", "30")
        result = trace("attach", "-p", str(victim.pid), *arguments)
        assert result.returncode == 1, result.stderr
        assert "the disk is full" in result.stderr
        assert "  hint: " in result.stderr
        assert not latrace.open(full / "x.data").complete
    finally:
        subprocess.run(["umount", str(full)], check=True)


def test_a_pid_of_an_inner_namespace() -> None:
    unshare = shutil.which("unshare")
    assert unshare
    inner = (
        "import os, sys, time\n"
        "pid = os.fork()\n"
        "if pid: os.waitpid(pid, 0)\n"
        # An id that the host does not use, as only a container could have it.
        "while True: time.sleep(0.001)\n"
    )
    with subprocess.Popen([unshare, "--pid", "--fork", sys.executable, "-c", inner]) as process:
        try:
            deadline = time.monotonic() + 10
            # 2 is kthreadd on the host, which can not be meant.
            result = trace("attach", "--pid", "2", "-d", "0.5", "--json")
            while result.returncode != 0 and time.monotonic() < deadline:
                result = trace("attach", "--pid", "2", "-d", "0.5", "--json")
            assert result.returncode == 0, result.stderr
            note = result.stderr.splitlines()[0]
            assert note.startswith("Note: PID 2 is a kernel thread on this host; traced is ")
            assert ", which has this PID in its container and is PID " in note
            assert json.loads(result.stdout)["waits"]["count"] > 50
        finally:
            subprocess.run(["pkill", "-KILL", "-P", str(process.pid)], check=False)
            process.kill()


def test_an_output_that_exists_is_refused(folder: Path, victim: subprocess.Popen[bytes]) -> None:
    (folder / "mine").mkdir()
    (folder / "mine/letter").write_text("dear")
    arguments = ["attach", "-p", str(victim.pid), "-d", "0.2", "-o", "mine"]
    result = trace(*arguments)
    assert result.returncode == 2
    assert "mine exists" in result.stderr
    result = trace(*arguments, "--force")  # not a capture: never removed
    assert result.returncode != 0
    assert (folder / "mine/letter").read_text() == "dear"


def test_a_capture_that_is_cut_off_can_be_reported(
    folder: Path, victim: subprocess.Popen[bytes]
) -> None:
    process = start("attach", "--pid", str(victim.pid))
    time.sleep(1.5)
    process.kill()
    process.communicate()
    waits = folder / "latrace.data/waits.arrows"
    with waits.open("r+b") as file:
        file.truncate(waits.stat().st_size - 7)
    result = trace("report")
    assert result.returncode == 0, result.stderr
    assert "waits" in result.stdout
    (folder / "latrace.data/manifest.json").write_text("{")
    result = trace("report")
    assert result.returncode == 1
    assert "hint: " in result.stderr
    with pytest.raises(CaptureError):
        latrace.open(folder / "latrace.data")


def test_heavy_modules_wait_until_the_probes_are_attached(victim: subprocess.Popen[bytes]) -> None:
    script = (
        "import sys\n"
        "from latrace.tracer import loader\n"
        "attach = loader.Probes.attach\n"
        "def spy(probes):\n"
        "    attach(probes)\n"
        "    heavy = {'pyarrow', 'rich', 'matplotlib', 'pygments', 'pandas', 'elftools'}\n"
        "    print('HEAVY', *sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
        "loader.Probes.attach = spy\n"
        "from latrace.tracer.cli import main\n"
        "sys.exit(main())\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, "attach", "-p", str(victim.pid), "-d", "0.2"],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert [line for line in result.stderr.splitlines() if line.startswith("HEAVY")] == ["HEAVY"]


@pytest.mark.parametrize(
    "command",
    ["attach -d 0.3", "attach -d 0.3 --json", "demo -d 1", "tcp -d 0.3", "tcp -d 0.3 --json"],
)
def test_our_files_are_read_before_root_is_given_up(
    victim: subprocess.Popen[bytes], command: str
) -> None:
    """Afterwards we may not be able to: a newcomer's home is closed to others."""
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from latrace.tracer.commands import tracing\n"
        "become, ours = tracing.become, (sys.prefix, str(Path(tracing.__file__).parents[2]))\n"
        "def hook(event, args):\n"
        "    if event == 'open' and str(args[0]).startswith(ours):\n"
        "        print('LATE', args[0], file=sys.stderr)\n"
        "def spy(account):\n"
        "    become(account)\n"
        "    sys.addaudithook(hook)\n"
        "    print('BECAME', file=sys.stderr)\n"
        "tracing.become = spy\n"
        "from latrace.tracer.cli import main\n"
        "sys.exit(main())\n"
    )
    arguments = command.split() + (["-p", str(victim.pid)] if "attach" in command else [])
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=os.environ | BEHIND_SUDO,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    told = [line for line in result.stderr.splitlines() if line.startswith(("BECAME", "LATE"))]
    assert told == ["BECAME"]


# --- on a terminal ------------------------------------------------------------------------------


class Terminal:
    """A command on a terminal of its own, as a shell's foreground job."""

    def __init__(self, *arguments: str) -> None:
        self.pid, self.screen = pty.fork()
        if self.pid == 0:
            os.environ["TERM"] = "xterm"
            os.execv(LATRACE[0], [*LATRACE, *arguments])  # noqa: S606
        self.text = ""
        self.modes = termios.tcgetattr(self.screen)

    def wait_for(self, pattern: str) -> str:
        """Read until `pattern` has been shown; returns all that was."""
        deadline = time.monotonic() + TIMEOUT_S
        while not re.search(pattern, self.text, re.S):
            assert time.monotonic() < deadline, self.text
            if select.select([self.screen], [], [], 0.1)[0]:
                try:
                    self.text += os.read(self.screen, 1 << 16).decode()
                except OSError:  # it has ended
                    pytest.fail(f"never seen: {pattern}\n{self.text}")
        return self.text

    def press(self, key: bytes) -> None:
        os.write(self.screen, key)

    def close(self) -> int:
        """Wait for the end; returns the exit code."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        assert termios.tcgetattr(self.screen) == self.modes
        os.close(self.screen)
        return code


def test_ctrl_c_on_a_terminal(victim: subprocess.Popen[bytes]) -> None:
    terminal = Terminal("attach", "--pid", str(victim.pid))
    terminal.wait_for(r"Hit Ctrl-C to end\.")
    terminal.wait_for(r"waits/s.*recorded in detail.*our own cost.*waits/s")
    terminal.press(b"\x03")
    text = terminal.wait_for(r"Next: latrace flame wait\.svg.*with plots")
    assert terminal.close() == 0
    # The panel was taken away, with the ^C in it, before the report.
    _, _, report = text.rpartition("\x1b[3A\r\x1b[J")
    assert "waits/s" not in report
    assert "waits in" in report
    assert "?25" not in text  # the cursor was never hidden


# --- run ----------------------------------------------------------------------------------------


def test_run_traces_from_the_start_as_the_user(folder: Path) -> None:
    script = "id -u; id -G; echo $HOME $USER ${SUDO_UID-none}; sleep 0.05; exit 3"
    result = trace("run", "--json", "-o", "r.data", "--", "sh", "-c", script, environ=BEHIND_SUDO)
    assert result.returncode == 0, result.stderr
    uid, groups, names, *rest = result.stdout.splitlines()
    assert uid == str(NOBODY)
    assert "0" not in groups.split()
    assert names == "/nonexistent nobody none"
    assert "sh ended with exit status 3." in result.stderr
    summary = json.loads("\n".join(rest))
    assert summary["capture"]["complete"] is True
    assert summary["waits"]["count"] >= 1
    assert [target["comm"] for target in summary["capture"]["targets"]] == ["sh"]
    assert (folder / "r.data").stat().st_uid == NOBODY


def test_run_follows_children_when_asked(folder: Path) -> None:
    script = "for i in 1 2 3; do sleep 0.02; done"
    counts = []
    for name, options in (("alone", ()), ("all", ("--children",))):
        result = trace("run", "-o", name, *options, "--json", "--", "sh", "-c", script)
        assert result.returncode == 0, result.stderr
        capture = latrace.open(folder / name)
        counts.append(len(set(capture.threads["tgid"].to_pylist())))
    assert counts == [1, 4]


def test_ctrl_c_goes_to_the_program_and_its_end_is_traced() -> None:
    script = "trap 'echo caught; exit 5' INT; echo up; while :; do sleep 0.05; done"
    terminal = Terminal("run", "--", "sh", "-c", script)
    terminal.wait_for("up")
    terminal.press(b"\x03")
    text = terminal.wait_for(r"Next: ")
    assert terminal.close() == 0
    assert "caught" in text
    assert "sh ended with exit status 5." in text
    assert "waits in" in text


def test_sigterm_is_passed_on() -> None:
    process = start("run", "--", "sleep", "100")
    time.sleep(0.2)
    process.terminate()
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0
    assert "sleep was ended by SIGTERM." in err


def test_a_program_that_was_never_released_ends_with_us() -> None:
    process = subprocess.Popen([*LATRACE, "run", "--", "sleep", "4242"], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 10
    held: list[str] = []
    while not held and time.monotonic() < deadline:
        found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        held = found.split()
    process.kill()
    process.communicate()
    assert held
    while Path(f"/proc/{held[0]}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    comm = Path(f"/proc/{held[0]}/cmdline")
    assert not comm.exists() or b"4242" not in comm.read_bytes()


# --- demo ---------------------------------------------------------------------------------------


def test_demo_explains_draws_and_cleans_up(folder: Path) -> None:
    for _ in range(2):  # the second replaces what the first wrote
        result = trace("demo", "-d", "1.5", environ=BEHIND_SUDO)
        assert result.returncode == 0, result.stderr
        assert "What the clients of demo-service saw:" in result.stdout
        assert "Wrote latrace-demo.data (" in result.stderr
        assert "and latrace-demo.svg" in result.stderr
        assert max(len(line) for line in result.stdout.splitlines()) <= 80
    svg = folder / "latrace-demo.svg"
    assert svg.stat().st_uid == NOBODY
    assert "demo-service" in svg.read_text()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_demo_leaves_no_program_behind(number: signal.Signals) -> None:
    process = subprocess.Popen(
        [*LATRACE, "demo", "-d", "30"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr
    while not process.stderr.readline().startswith("Tracing"):
        assert process.poll() is None
    players = {
        task.tid: task.comm
        for task in processes()
        if task.ppid == process.pid and task.comm.startswith("demo-")
    }
    assert sorted(players.values()) == ["demo-client", "demo-hog", "demo-service"]
    process.send_signal(number)
    process.communicate(timeout=TIMEOUT_S)
    deadline = time.monotonic() + 5
    while any(map(read_task, players)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(read_task, players))
