"""`latrace watch` in trouble: kills, full disks, dying targets, signals, small memories."""

from __future__ import annotations

import contextlib
import ctypes
import http.server
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from watching import LATRACE, TIMEOUT_S, Bundle, Watching, build_steady, hog, said, steady, watching

import latrace
from latrace.analysis.summary import summarise
from latrace.tracer.cli import main

# What else a shared machine does can be a spike of its own, or hide one.
pytestmark = pytest.mark.kernel

SHORT = ("--before", "2s", "--after", "500ms", "--cooldown", "1h", "--window", "1s")
NEVER = ("--max", "1h", "--budget", "100%")
BY_HAND = (*NEVER, *SHORT)
NOBODY = 65534
SOCKETS = Path("/run/latrace")
KILLS = 7
PR_SET_CHILD_SUBREAPER = 36

Objects = Callable[[], set[tuple[str, int, str]]]
Orphans = Callable[..., list[str]]
Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_steady(tmp_path_factory.mktemp("workloads"))


@pytest.fixture
def orphans() -> Iterator[Orphans]:
    """Give the function that tells what runs on after the death of those who started it.

    It takes the processes that the test itself has started and not ended yet.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    before = set(children())

    def adopted(*known: int) -> list[str]:
        found = []
        for pid in set(children()) - before - set(known):
            if os.waitpid(pid, os.WNOHANG) == (0, 0):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                found.append(b" ".join(words).decode())
        return found

    yield adopted
    assert libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0) == 0


def is_worker(command: str) -> bool:
    """Whether it is not an explanation, which ends by itself."""
    return "watch.analysis" not in command


def children() -> list[int]:
    found = []
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that has just ended
            found += map(int, (thread / "children").read_text().split())
    return found


def comes(condition: Callable[[], object], timeout_s: float = TIMEOUT_S) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def fire(watch: Watching, *, count: int = 1) -> None:
    """Fire by hand, the `count`-th time."""
    watch.process.send_signal(signal.SIGUSR2)
    watch.wait_for("fired: by hand", count=count)


def check_whole(bundle: Bundle) -> None:
    """It is complete, explained, and has every row that was counted."""
    capture, spike = bundle.capture, bundle.spike
    assert capture.complete and not capture.truncated
    assert spike["complete"] and spike["analysis"] is not None
    assert (bundle.path / "report.html").stat().st_size > 10_000
    quality = capture.manifest["quality"]
    counted = sum(row["count"] for row in capture.hist.to_pylist() if row["metric"] == "wait")
    # The counters are not read at one moment.
    assert abs(counted - quality["waits"]) <= 4 < counted
    hidden = quality["no_start"] + quality["recovered"]
    assert abs(counted - capture.waits.num_rows) <= hidden + 10
    last = max(capture.waits["run_ns"].to_pylist())
    assert last <= spike["end_ns"] < last + 300_000_000


def check_readable(path: Path, capsys: Captured) -> bool:
    """Whatever is there can be read and reported on; returns whether it is complete."""
    capture = latrace.open(path)
    summarise(capture)
    assert main(["report", "-i", str(path)]) == 0, capsys.readouterr().err
    assert "latrace" in capsys.readouterr().out
    return capture.complete


def listed(folder: Path, capsys: Captured) -> list[dict[str, Any]]:
    """What `latrace spikes` says; as a table, too."""
    assert main(["spikes", str(folder)]) == 0
    table = capsys.readouterr().out
    assert main(["spikes", str(folder), "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    for one in found:
        (line,) = (line for line in table.splitlines() if line.startswith(f"{one['name']} "))
        assert one["trouble"] == ""
        assert ("not complete" in line) == (not one["complete"])
    return found


# --- killed ------------------------------------------------------------------------------------


class _Slow(http.server.BaseHTTPRequestHandler):
    """A service whose metrics come at once and whose profiles never do."""

    def do_GET(self) -> None:
        if self.path.startswith("/metrics"):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'l_seconds_bucket{le="+Inf"} 5\nl_seconds_sum 1\nl_seconds_count 5\n')
            return
        self.connection.recv(1)  # until the other end hangs up

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def slow_service() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Slow) as server:
        server.handle_error = lambda *_: None  # type: ignore[method-assign]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_killed_at_any_moment(
    program: Path,
    tmp_path: Path,
    bpf_objects: Objects,
    orphans: Orphans,
    capsys: Captured,
) -> None:
    """What is on disk is whole or says that it is not, and nothing else is left anywhere."""
    before, output = bpf_objects(), tmp_path / "s"
    chance = random.Random(7)  # noqa: S311 - moments
    states, socket = set(), SOCKETS / "watch-0.sock"
    with slow_service() as url, steady(program) as service:
        asking = ("--metrics", f"{url}/metrics", "--metric", "l_seconds", "--above", "1h")
        for number in range(KILLS):
            there = set(output.glob("spike-*"))
            more = (*asking, "--pprof", url) if number % 4 == 3 else ()
            with watching(output, "--pid", service.pid, *BY_HAND, *more) as watch:
                assert not socket.exists()  # of the one that was killed before
                socket = SOCKETS / f"watch-{watch.process.pid}.sock"
                assert socket.is_socket()
                if number:  # the first is killed while it is armed
                    fire(watch)
                if number % 3 == 1:  # as it is closed
                    watch.wait_for("wrote ")
                elif number:
                    time.sleep(3 * (number + chance.random()) / KILLS)
                watch.process.kill()
                watch.process.wait()
            assert comes(lambda: not any(map(is_worker, orphans(service.pid))), 5)
            assert comes(lambda: not bpf_objects() - before, 10), bpf_objects() - before
            # An explanation ends by itself.
            assert comes(lambda: not orphans(service.pid)), orphans(service.pid)
            for path in set(output.glob("spike-*")) - there:
                complete = check_readable(path, capsys)
                states.add(complete)
                (one,) = (one for one in listed(output, capsys) if one["path"] == str(path))
                assert one["complete"] == complete
                if complete:
                    assert Bundle(path).spike["end_ns"] > Bundle(path).spike["fired_ns"]
    assert states == {False, True}
    with steady(program) as service, watching(output, "--pid", service.pid, *BY_HAND):
        assert not socket.exists()


# --- no room -----------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(path: Path, size: str, *options: str) -> Iterator[Path]:
    path.mkdir()
    choice = ",".join((f"size={size}", "mode=0777", *options))
    subprocess.run(["mount", "-t", "tmpfs", "-o", choice, "tmpfs", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


@contextlib.contextmanager
def full(disk: Path, *, left: int) -> Iterator[None]:
    """So many bytes are left."""
    status = os.statvfs(disk)
    (disk / "filler").write_bytes(bytes(status.f_bavail * status.f_bsize - left))
    yield
    (disk / "filler").unlink()


@contextlib.contextmanager
def read_only(disk: Path) -> Iterator[None]:
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    yield
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)


@contextlib.contextmanager
def no_large_files(pid: int, most: int) -> Iterator[None]:
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (most, before[1]))
    yield
    resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def no_place(folder: Path) -> Iterator[None]:
    """The directory is gone, and a file has its name."""
    shutil.rmtree(folder)
    folder.write_text("")
    yield
    folder.unlink()


@contextlib.contextmanager
def removed(folder: Path) -> Iterator[None]:
    """The bundle is removed as soon as it is there."""

    def remove() -> None:
        comes(lambda: list(folder.glob("spike-*/manifest.json")), 20)
        for path in folder.glob("spike-*/manifest.json"):
            shutil.rmtree(path.parent)

    for path in folder.glob("*"):
        shutil.rmtree(path)
    remover = threading.Thread(target=remove)
    remover.start()
    yield
    remover.join()


def held_below(folder: Path, pid: int) -> Iterator[str]:
    """The files and directories there that a process has open."""
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if (target := str(link.readlink())).startswith(str(folder)):
                yield target


def test_nowhere_to_write_to(program: Path, tmp_path: Path, capsys: Captured) -> None:
    """Each is told in a line; the watch goes on, and the next bundle is whole again."""
    with small_disk(tmp_path / "disk", "8M") as disk, steady(program) as service:
        output = disk / "s"
        with watching(output, "--pid", service.pid, *BY_HAND) as watch:
            pid = watch.process.pid
            troubles = (
                ("the disk is full", full(disk, left=0)),
                ("the disk is full", full(disk, left=24 << 10)),
                ("the file system is read-only", read_only(disk)),
                ("the file-size limit is reached", no_large_files(pid, 8 << 10)),
                ("no such directory", removed(output)),
                ("not a directory", no_place(output)),
            )
            fired = 0
            for number, (words, trouble) in enumerate(troubles, 1):
                with trouble:
                    fired += 1
                    fire(watch, count=fired)
                    line = watch.wait_for("!!!", count=number)
                    assert line.startswith("!!! no bundle: cannot write "), line
                    assert line.endswith(f": {words}"), line
                fired += 1
                fire(watch, count=fired)
                watch.wait_for("wrote ", count=number)
                assert comes((watch.bundles[-1] / "report.html").exists), watch.lines
                assert watch.process.poll() is None
                check_whole(Bundle(watch.bundles[-1]))
                assert list(held_below(disk, pid)) == [str(output)]
            time.sleep(0.5)
            assert len(said(watch, "!!!")) == len(troubles), watch.lines
            for one in listed(output, capsys):
                assert check_readable(Path(one["path"]), capsys) == one["complete"]
            assert watch.stop() == 0


def test_a_full_disk_and_only_one_bundle_wanted(program: Path, tmp_path: Path) -> None:
    """One that could not be written is not the first."""
    with small_disk(tmp_path / "disk", "8M") as disk, steady(program) as service:
        with watching(disk / "s", "--pid", service.pid, *BY_HAND, "--once") as watch:
            with full(disk, left=0):
                fire(watch)
                watch.wait_for("!!! no bundle: ")
                assert watch.bundles == []  # nothing could be written to it
            fire(watch, count=2)
            assert watch.ended() == 0
        check_whole(watch.bundle())


def test_a_report_that_does_not_fit(program: Path, tmp_path: Path) -> None:
    """The bundle is whole, and why it has no report is said."""
    with small_disk(tmp_path / "disk", "8M") as disk, steady(program) as service:
        with watching(disk / "s", "--pid", service.pid, *BY_HAND, "--once") as watch:
            fire(watch)
            watch.wait_for("wrote ")
            with full(disk, left=32 << 10):
                line = watch.wait_for("!!! ")
                assert line.startswith("!!! not explained: cannot write "), line
                assert line.endswith(": the disk is full"), line
                assert watch.ended() == 0
        assert watch.bundle().capture.complete


def test_a_directory_that_was_closed_to_the_user(program: Path) -> None:
    """Behind sudo the files are made with the user's rights, and root's do not help."""
    user = {"SUDO_UID": str(NOBODY), "SUDO_GID": str(NOBODY)}
    with tempfile.TemporaryDirectory() as base, steady(program) as service:
        os.chown(base, NOBODY, NOBODY)
        output = Path(base, "s")
        with watching(output, "--pid", service.pid, *BY_HAND, env=user) as watch:
            output.chmod(0o500)
            fire(watch)
            line = watch.wait_for("!!!")
            assert line.startswith("!!! no bundle: cannot write ")
            assert line.endswith(": permission denied")
            output.chmod(0o700)
            fire(watch, count=2)
            watch.wait_for("wrote ")
            assert watch.stop() == 0
        assert len(said(watch, "!!!")) == 1, watch.lines
        (path,) = watch.bundles
        assert {each.stat().st_uid for each in (path, *path.iterdir())} == {NOBODY}
        check_whole(Bundle(path))


# --- the end of the target ---------------------------------------------------------------------


def test_the_target_is_killed_while_armed(program: Path, tmp_path: Path) -> None:
    with steady(program) as service, watching(tmp_path / "s", "--pid", service.pid, *BY_HAND) as w:
        service.process.kill()
        assert w.ended() == 0
    assert said(w, "no target is left"), w.lines
    assert w.bundles == []


def test_the_target_is_killed_while_a_bundle_is_open(program: Path, tmp_path: Path) -> None:
    """It has the spike up to the end of the target, and is explained."""
    arguments = (*NEVER, *SHORT[:2], "--after", "1h", *SHORT[4:])
    with (
        steady(program) as service,
        watching(tmp_path / "s", "--pid", service.pid, *arguments) as w,
    ):
        fire(w)
        time.sleep(0.7)
        service.process.kill()
        assert w.ended() == 0
    assert said(w, "no target is left") and said(w, "wrote "), w.lines
    check_whole(w.bundle())


def test_a_target_that_comes_back(program: Path, tmp_path: Path) -> None:
    """By its name it is followed into its next life; what ended within the window is told."""
    options = (*NEVER, "--max", "20ms", "--before", "3s", "--after", "3s", "--cooldown", "1h")
    with contextlib.ExitStack() as lives:
        first = lives.enter_context(steady(program))
        with watching(tmp_path / "s", "--comm", program.name, *options) as watch:
            time.sleep(2)
            lives.close()
            assert watch.process.poll() is None
            with steady(program) as second:
                time.sleep(1.5)
                hog(0.3)
                watch.wait_for("fired: --max 20ms")
                watch.wait_for("wrote ")
            assert not said(watch, "no target is left")
            assert watch.stop() == 0
    check_whole(watch.bundle())
    capture = watch.bundle().capture
    assert {row["tgid"] for row in capture.threads.to_pylist()} == {first.pid, second.pid}
    assert set(capture.waits["tgid"].to_pylist()) == {first.pid, second.pid}


# --- signals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ended_while_armed(number: signal.Signals, program: Path, tmp_path: Path) -> None:
    with steady(program) as service, watching(tmp_path / "s", "--pid", service.pid, *BY_HAND) as w:
        w.process.send_signal(number)
        assert w.ended() == 0
    assert w.bundles == []
    assert not said(w, "!!!") and not said(w, "no target is left")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ended_while_a_bundle_is_open(
    number: signal.Signals, program: Path, tmp_path: Path
) -> None:
    """It is closed at once, with all that was seen until then."""
    arguments = (*NEVER, *SHORT[:2], "--after", "1h", *SHORT[4:])
    with (
        steady(program) as service,
        watching(tmp_path / "s", "--pid", service.pid, *arguments) as w,
    ):
        fire(w)
        time.sleep(0.7)
        w.process.send_signal(number)
        assert w.ended() == 0
    check_whole(w.bundle())
    spike = w.bundle().spike
    assert spike["end_ns"] > spike["fired_ns"] + 400_000_000


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ended_while_one_is_explained(
    number: signal.Signals, program: Path, tmp_path: Path
) -> None:
    with steady(program) as service, watching(tmp_path / "s", "--pid", service.pid, *BY_HAND) as w:
        fire(w)
        w.wait_for("wrote ")
        w.process.send_signal(number)
        # Nor does a request that comes too late end it.
        time.sleep(0.4)
        w.process.send_signal(signal.SIGUSR2)
        assert w.ended() == 0
    assert not said(w, "!!!"), w.lines
    check_whole(w.bundle())


def test_a_second_interrupt_abandons_the_explanation(
    program: Path, tmp_path: Path, orphans: Orphans, capsys: Captured
) -> None:
    with steady(program) as service, watching(tmp_path / "s", "--pid", service.pid, *BY_HAND) as w:
        fire(w)
        w.wait_for("wrote ")
        w.process.send_signal(signal.SIGINT)
        time.sleep(0.4)
        w.process.send_signal(signal.SIGINT)
        assert w.ended(10) == 1
        assert comes(lambda: not orphans(service.pid), 5), orphans(service.pid)
    assert w.lines[-2].startswith("wrote ") and w.lines[-1] == "latrace: interrupted"
    assert not (w.bundles[0] / "report.html").exists()
    assert check_readable(w.bundles[0], capsys)


def test_a_second_interrupt_abandons_an_open_bundle(
    program: Path, tmp_path: Path, orphans: Orphans, capsys: Captured
) -> None:
    """Both come before the watch has looked once: the bundle stays, and is not complete."""
    arguments = (*NEVER, *SHORT[:2], "--after", "1h", *SHORT[4:])
    with (
        steady(program) as service,
        watching(tmp_path / "s", "--pid", service.pid, *arguments) as w,
    ):
        fire(w)
        time.sleep(0.7)
        w.process.send_signal(signal.SIGSTOP)
        w.process.send_signal(signal.SIGINT)
        w.process.send_signal(signal.SIGTERM)
        w.process.send_signal(signal.SIGCONT)
        assert w.ended(10) == 1
        assert comes(lambda: not orphans(service.pid), 5), orphans(service.pid)
    assert "Traceback" not in "".join(w.lines), w.lines
    assert not check_readable(w.bundles[0], capsys)
    assert [one["complete"] for one in listed(tmp_path / "s", capsys)] == [False]


# --- limits ------------------------------------------------------------------------------------


def test_the_oldest_bundles_go(program: Path, tmp_path: Path) -> None:
    with (
        steady(program) as service,
        watching(tmp_path / "s", "--pid", service.pid, *BY_HAND, "--keep", 2) as watch,
    ):
        names = []
        for count in (1, 2, 3, 4):
            fire(watch, count=count)
            watch.wait_for("wrote ", count=count)
            names.append(watch.bundles[-1].name)
        assert watch.stop() == 0
    assert [path.name for path in watch.bundles] == names[-2:]
    assert said(watch, "removed ") == [f"removed {name}, the oldest" for name in names[:-2]]


def test_the_oldest_bundles_go_when_they_take_too_much(program: Path, tmp_path: Path) -> None:
    def taken(path: Path) -> int:
        return sum(each.stat().st_size for each in path.iterdir())

    with (
        steady(program) as service,
        watching(tmp_path / "s", "--pid", service.pid, *BY_HAND, "--disk", "1M") as watch,
    ):
        names: list[str] = []
        while not said(watch, "removed "):
            assert len(names) < 12
            fire(watch, count=len(names) + 1)
            watch.wait_for("wrote ", count=len(names) + 1)
            newest = watch.bundles[-1]
            names.append(newest.name)
            assert comes((newest / "report.html").exists)
        assert watch.stop() == 0
    gone = len(said(watch, "removed "))
    assert said(watch, "removed ") == [f"removed {name}, the oldest" for name in names[:gone]]
    assert [path.name for path in watch.bundles] == names[gone:]
    assert sum(map(taken, watch.bundles[:-1])) <= 1 << 20


def test_little_memory(program: Path, tmp_path: Path) -> None:
    """The window is what fits, and the bundle says so; the memory does not grow."""

    def resident(pid: int) -> int:
        text = Path(f"/proc/{pid}/status").read_text()
        return next(int(line.split()[1]) << 10 for line in text.splitlines() if "VmRSS" in line)

    options = ("--memory", "1M", "--min", "0", "--before", "20s", "--after", "500ms", "--once")
    with (
        steady(program, threads=64, period_us=300, work_us=1) as service,
        watching(tmp_path / "s", "--pid", service.pid, *NEVER, *options) as watch,
    ):
        time.sleep(5)
        early = resident(watch.process.pid)
        time.sleep(10)
        grown = resident(watch.process.pid) - early
        fire(watch)
        assert watch.ended() == 0
    capture, spike = watch.bundle().capture, watch.bundle().spike
    assert capture.complete
    assert spike["fired_ns"] - spike["start_ns"] < 10_000_000_000
    assert any("--memory" in note for note in spike["notes"])
    rows_per_s = capture.waits.num_rows * 1e9 / (spike["end_ns"] - spike["start_ns"])
    assert grown < 15 * rows_per_s * 20  # less than the rows of that time would take


def test_little_memory_that_was_enough(program: Path, tmp_path: Path) -> None:
    """What is dropped after it fired is in the bundle: it is whole, and says nothing else."""
    options = ("--memory", "1M", "--min", "0", "--before", "2s", "--after", "6s", "--once")
    with (
        steady(program),
        watching(tmp_path / "s", "--comm", program.name, *NEVER, *options) as watch,
    ):
        time.sleep(2)
        fire(watch)
        with steady(program, threads=24, period_us=500, work_us=1):
            assert watch.ended() == 0
    assert watch.bundle().spike["notes"] == []
    check_whole(watch.bundle())


# --- the user's program ------------------------------------------------------------------------

TELL = """#!/bin/sh
{ id -u; id -g; id -G; env; } > "$0.env"
for word in "$@"; do printf '%s\\n' "$word"; done > "$0.words"
"""


def test_the_program_is_told_of_a_bundle(program: Path) -> None:
    """It runs as the user, without a shell, with the path as its last argument."""
    user = {"SUDO_UID": str(NOBODY), "SUDO_GID": str(NOBODY), "SUDO_USER": "nobody"}
    with tempfile.TemporaryDirectory() as base, steady(program) as service:
        os.chown(base, NOBODY, NOBODY)
        tell, victim = Path(base, "tell"), Path(base, "victim")
        tell.write_text(TELL)
        tell.chmod(0o755)
        words = ("--on-spike", f"{tell} -x 'a; touch {victim}' $HOME ; touch {victim}")
        with watching(
            Path(base, "s"), "--pid", service.pid, *BY_HAND, "--once", *words, env=user
        ) as watch:
            fire(watch)
            assert watch.ended() == 0
        assert comes(Path(f"{tell}.words").exists)
        (path,) = watch.bundles
        expected = ["-x", f"a; touch {victim}", "$HOME", ";", "touch", str(victim), str(path)]
        assert comes(lambda: Path(f"{tell}.words").read_text().splitlines() == expected)
        uid, gid, groups, *environment = Path(f"{tell}.env").read_text().splitlines()
        assert (uid, gid, groups) == (str(NOBODY), str(NOBODY), str(NOBODY))
        assert "USER=nobody" in environment
        assert not any(line.startswith("SUDO_") for line in environment)
        assert not victim.exists()
        assert Path(f"{tell}.words").stat().st_uid == NOBODY
        assert not said(watch, "!!!"), watch.lines


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("sh -c 'exit 3'", "!!! the --on-spike program ended with 3"),
        ("/nowhere/tell -x", "!!! the --on-spike program does not start: "),
        ("/etc/passwd", "!!! the --on-spike program does not start: "),
    ],
)
def test_a_program_that_fails(command: str, line: str, program: Path, tmp_path: Path) -> None:
    with (
        steady(program) as service,
        watching(
            tmp_path / "s", "--pid", service.pid, *BY_HAND, "--once", "--on-spike", command
        ) as watch,
    ):
        fire(watch)
        assert watch.ended() == 0
    (only,) = said(watch, "!!!")
    assert only.startswith(line)
    check_whole(watch.bundle())


# --- by hand -----------------------------------------------------------------------------------


def trigger(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*LATRACE, "trigger", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )


def test_asked_for_at_any_time(program: Path, tmp_path: Path) -> None:
    """Armed or cooling down, a request is granted; while a bundle is open, refused in a line."""
    arguments = (*NEVER, *SHORT[:2], "--after", "4s", *SHORT[4:])
    with (
        steady(program) as service,
        watching(tmp_path / "s", "--pid", service.pid, *arguments) as watch,
    ):
        result = trigger("slow; again\x1b[31m")
        assert result.returncode == 0, result.stderr
        assert str(watch.bundles[0]) in result.stdout + result.stderr
        result = trigger("once more")
        assert result.returncode == 1
        assert "a bundle is being written already" in result.stderr
        watch.process.send_signal(signal.SIGUSR2)
        watch.wait_for("not fired by hand: a bundle is being written already: ")
        watch.wait_for("wrote ")
        result = trigger("cooling")
        assert result.returncode == 0, result.stderr
        watch.wait_for("fired: by hand: cooling")
        watch.wait_for("wrote ", count=2)
        fire(watch, count=3)
        assert watch.stop() == 0
    reasons = [Bundle(path).spike["triggers"][0]["reason"] for path in watch.bundles]
    assert reasons[1:] == ["cooling", "SIGUSR2"]
    assert reasons[0].startswith("slow; again") and "\x1b" not in "".join(watch.lines)
    for number in range(3):
        check_whole(watch.bundle(number))


def test_two_watches_of_one_directory(program: Path, tmp_path: Path) -> None:
    """Each has its own bundles, of the same second, too; neither takes the other's away."""
    output = tmp_path / "s"
    with (
        steady(program) as service,
        watching(output, "--pid", service.pid, *BY_HAND, "--keep", 2) as one,
        watching(output, "--pid", service.pid, *BY_HAND, "--keep", 2) as two,
    ):
        result = trigger("which?")
        assert result.returncode == 2 and "2 watches are running" in result.stderr
        for count in (1, 2):
            for watch in (one, two):
                watch.process.send_signal(signal.SIGUSR2)
            for watch in (one, two):
                watch.wait_for("wrote ", count=count)
        result = trigger("this one", "--watch", one.process.pid)
        assert result.returncode == 0, result.stderr
        one.wait_for("wrote ", count=3)
        assert two.stop() == 0
        assert one.stop() == 0
        assert len(said(one, "wrote ")) == 3 and len(said(two, "wrote ")) == 2
    wrote = {Path(line.split()[1]).name for w in (one, two) for line in said(w, "wrote ")}
    assert len(wrote) == 5
    gone = [line.split()[1].rstrip(",") for w in (one, two) for line in said(w, "removed ")]
    assert len(gone) == len(set(gone)) == 3
    assert {path.name for path in one.bundles} == wrote - set(gone)
    for path in one.bundles:
        assert Bundle(path).capture.complete
