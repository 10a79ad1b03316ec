"""`latrace trigger` as root types it, against watches that are processes of their own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from latrace.tracer.watch.control import DIRECTORY

pytestmark = pytest.mark.kernel

NOBODY = 65534
WATCH = """
import sys, time
from latrace.tracer.watch.control import ControlSocket
watch = ControlSocket(sys.argv[1])
print("listening", flush=True)
try:
    while True:
        for request in watch.poll():
            print(f"{request.asked_by}: {request.reason}", flush=True)
            request.answer(f"a bundle of {sys.argv[1]}", ok=request.reason != "no")
        time.sleep(0.02)
except KeyboardInterrupt:
    watch.close()
"""
# As `latrace trigger`: the command in the project's own application.
TRIGGER = """
import sys
from latrace.tracer.cli import main
from latrace.tracer.commands.application import app
from latrace.tracer.commands.trigger import trigger
if trigger not in [command.callback for command in app.registered_commands]:
    app.command()(trigger)
sys.exit(main(["trigger", *sys.argv[1:]]))
"""


@pytest.fixture(autouse=True)
def run_directory() -> Iterator[None]:
    """A /run of the test's own (its mount table is): a watch of this host's is none of its."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run"], check=True)
    yield
    subprocess.run(["umount", "/run"], check=True)


@contextlib.contextmanager
def watching(what: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", WATCH, what]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "listening\n"
        try:
            yield process
        finally:
            process.send_signal(signal.SIGINT)


def trigger(*arguments: str, user: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", TRIGGER, *arguments],
        capture_output=True,
        text=True,
        check=False,
        user=user,
        env={**os.environ, **env},
    )


def test_the_watch_is_told_the_reason_and_its_answer_is_printed() -> None:
    with watching("redis") as watch:
        done = trigger("p99 alarm", SUDO_USER="alice")
        assert (done.returncode, done.stdout, done.stderr) == (0, "a bundle of redis\n", "")
        assert watch.stdout and watch.stdout.readline() == "alice: p99 alarm\n"
        refused = trigger("no")
    assert refused.returncode == 1 and refused.stdout == ""
    assert refused.stderr.startswith("latrace: a bundle of redis\n  hint: ")
    assert list(DIRECTORY.iterdir()) == []


def test_one_of_several_is_named() -> None:
    with watching("redis\x1b[2J") as one, watching("node") as other:
        unclear = trigger("why")
        assert unclear.returncode == 2
        assert f"{one.pid} (redis\\x1b[2J)" in unclear.stderr
        assert f"{other.pid} (node)" in unclear.stderr
        assert trigger("--watch", str(other.pid)).stdout == "a bundle of node\n"
        nobody = trigger("--watch", "1")
        assert nobody.returncode == 1 and "no watch runs as process 1" in nobody.stderr


def test_no_watch_is_running() -> None:
    done = trigger()
    assert done.returncode == 1
    assert "no watch is running" in done.stderr and "latrace watch" in done.stderr
    assert not DIRECTORY.exists()


def test_others_than_root_are_told_what_to_type() -> None:
    with watching("redis"):
        done = trigger("why", user=NOBODY)
    assert done.returncode == 3
    assert "needs root" in done.stderr and "hint: sudo " in done.stderr


def test_others_than_root_are_hung_up_on() -> None:
    """Even where somebody has opened the directory to them."""
    with watching("redis") as watch:
        DIRECTORY.chmod(0o755)
        path = DIRECTORY / f"watch-{watch.pid}.sock"
        path.chmod(0o777)
        program = (
            "import socket, sys\n"
            "client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
            "client.connect(sys.argv[1])\n"
            "client.settimeout(10)\n"
            "print(client.recv(100))\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, str(path)],
            capture_output=True,
            text=True,
            check=True,
            user=NOBODY,
        )
        assert done.stdout == "b''\n"
        assert trigger().returncode == 0
        assert watch.stdout and watch.stdout.readline().endswith(": \n")


def test_the_next_watch_removes_what_a_killed_one_has_left() -> None:
    with watching("killed") as killed:
        killed.kill()
        killed.wait()
        left = DIRECTORY / f"watch-{killed.pid}.sock"
        assert left.is_socket()
        with watching("redis"):
            assert not left.exists()
            assert trigger().stdout == "a bundle of redis\n"


def test_of_one_that_is_stopped_the_signal_is_named() -> None:
    with watching("redis") as watch:
        watch.send_signal(signal.SIGSTOP)
        done = trigger("--watch", str(watch.pid))
        assert done.returncode == 1
        assert f"kill -USR2 {watch.pid}" in done.stderr
        watch.send_signal(signal.SIGCONT)


def test_a_hostile_directory_is_not_used(tmp_path: Path) -> None:
    DIRECTORY.mkdir(mode=0o777)
    DIRECTORY.chmod(0o777)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as planted:
        planted.bind(str(DIRECTORY / "watch-1.sock"))
        planted.listen()
        done = trigger()
    assert done.returncode == 1 and "cannot use /run/latrace" in done.stderr
    (DIRECTORY / "watch-1.sock").unlink()
    DIRECTORY.rmdir()
    DIRECTORY.symlink_to(tmp_path)
    done = trigger()
    assert done.returncode == 1 and "a link or no directory" in done.stderr
