"""`latrace tcp` as a user types it, over a wire that loses segments, on the live kernel."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from network import Host, two_hosts
from tracing import WORKLOADS

import latrace
from latrace.tracer import loader
from latrace.tracer.options import Options

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("folder")]

LATRACE = (
    *(sys.executable, "-c"),
    "import sys; sys.argv[0] = 'latrace'; from latrace.tracer.cli import main; sys.exit(main())",
)
TALK = (sys.executable, "-I", WORKLOADS / "talk.py")
SEND = """
import array, fcntl, os, socket, struct, sys, termios, time
address, port, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with socket.create_connection((address, port)) as connection:
    os.read(0, 1)
    connection.sendall(bytes(size))
    waiting = array.array("i", [1])
    while waiting[0]:
        time.sleep(0.002)
        fcntl.ioctl(connection, termios.TIOCOUTQ, waiting)
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    print(connection.getsockname()[1], struct.unpack_from("I", info, 100)[0])
time.sleep(0.5)  # for somebody to ask for our name
"""
"""Send when a byte comes; tell by which port, and TCP_INFO's total_retrans."""
NOBODY = 65534
PORT = 7710
LOSES = f"tcp dport {PORT} meta length > 500 numgen inc mod 60 7"
SIZE = 40_000_000
TIMEOUT_S = 60


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory of nobody's, so that what root makes in it shows."""
    with tempfile.TemporaryDirectory(prefix="latrace-test-") as name:
        os.chown(name, NOBODY, NOBODY)
        monkeypatch.chdir(name)
        yield Path(name)
        monkeypatch.undo()


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts; on the far one somebody reads all that comes to the port."""
    with two_hosts() as (near, far):
        far.start(*TALK, "sink", PORT)
        far.wait_for_listener(PORT)
        yield near, far


def until(true: Any) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def run(*arguments: object, **settings: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*LATRACE, "tcp", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        **settings,
    )


def start(*arguments: object, **settings: Any) -> subprocess.Popen[str]:
    """Start a trace and wait until it has attached."""
    process = subprocess.Popen(
        [*LATRACE, "tcp", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **settings,
    )
    assert process.stderr
    line = process.stderr.readline()
    assert line.startswith("Tracing "), line + process.stderr.read()
    return process


class Sender:
    """A process with a connection that sends when it is told to."""

    def __init__(
        self, near: Host, far: Host, *, v6: bool = False, name: str = "", size: int = SIZE
    ) -> None:
        address = far.v6 if v6 else far.v4
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        command = [sys.executable, "-I", "-c", SEND, address, PORT, size]
        if name:
            (Path.cwd() / name).symlink_to(sys.executable)
            command[0] = Path.cwd() / name
        self.process = near.start(*command, text=True, **pipes)
        self.pid = self.process.pid
        until(lambda: f":{PORT}" in near.run("ss", "-Htn", "state", "established").stdout)
        self.comm = Path(f"/proc/{self.pid}/comm").read_text().rstrip("\n")

    def send(self) -> tuple[int, int]:
        """Send all of it; returns the port that it left by, and how often TCP_INFO counted."""
        out, _ = self.process.communicate("x", timeout=TIMEOUT_S)
        port, segs = map(int, out.split())
        return port, segs


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, err
    return out, err


@pytest.mark.parametrize("v6", [False, True], ids=["IPv4", "IPv6"])
def test_a_process_in_another_network_namespace(
    folder: Path, hosts: tuple[Host, Host], *, v6: bool
) -> None:
    """The program's own count, the rows, TCP_INFO and the namespace's counter: all the same."""
    near, far = hosts
    far.lose(LOSES, chain="input")
    sender = Sender(near, far, v6=v6)
    before = near.counter("TcpRetransSegs")
    process = start("--pid", sender.pid, "--json")
    port, segs = sender.send()
    out, err = finish(process)  # it ends with its target
    assert segs > 20
    summary = json.loads(out)
    (found,) = summary["connections"]
    assert (found["sport"], found["dport"]) == (port, PORT)
    assert (found["saddr"], found["daddr"]) == ((near.v6, far.v6) if v6 else (near.v4, far.v4))
    assert found["owners"] == [{"tgid": sender.pid, "comm": sender.comm}]
    assert found["segs"] == found["total_retrans"] == segs
    assert sum(found["by_kind"].values()) == segs
    assert found["segs_out"] > SIZE // 1448 + segs
    assert found["rate"] == segs / found["segs_out"]
    assert found["bytes"] > 500 * segs
    assert found["opened"] is False
    assert found["closed"] is True
    assert (
        found["congestion"]
        in Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text().split()
    )
    assert found["rtt_us"] > 0
    assert found["cwnd"] > 0
    assert found["delivery_rate"] > 0
    assert summary["retransmits"]["segs"] == summary["checks"]["total_retrans"] == segs
    assert near.counter("TcpRetransSegs") - before == segs
    inum = found["netns"]
    assert summary["checks"]["netns"] == [{"inum": inum, "retrans_segs": segs, "segs": segs}]
    assert summary["quality"] == {"lost_sockets": 0, "tcp_info_refused": None}
    assert "Wrote latrace.data (" in err
    assert "latrace report" in err
    # Its waits were traced as well, and nothing that is not needed.
    capture = latrace.open(folder / "latrace.data")
    assert capture.complete
    assert capture.waits.num_rows
    assert capture.slices.num_rows == capture.samples.num_rows == 0
    # Of which the losses made some longer: those that it slept in until it could send more.
    assert summary["lengthened_ns"] <= summary["blocked_ns"]
    assert summary["lengthened_count"] == 0 or summary["lengthened"][0]["tgid"] == sender.pid


def test_all_processes_live_and_at_the_end(folder: Path, hosts: tuple[Host, Host]) -> None:
    near, far = hosts
    far.lose(LOSES, chain="input")
    near.start("sleep", "60")  # the namespace is read by way of it at the end
    process = start("-a", env=os.environ | {"SUDO_UID": str(NOBODY), "SUDO_GID": str(NOBODY)})
    name = "\x1b[1mred\n"
    sender = Sender(near, far, name=name)
    before = near.counter("TcpRetransSegs")
    port, segs = sender.send()
    after = near.counter("TcpRetransSegs")
    process.send_signal(signal.SIGINT)
    out, err = finish(process)
    assert after - before == segs > 20
    assert "\x1b" not in out
    live, _, told = out.partition("\n\n")
    head, *lines = live.splitlines()
    assert head.split() == ["TIME", "KIND", "SEGS", "CONNECTION", "STATE", "OWNER"]
    ours = [line for line in lines if f"{near.v4}:{port} > {far.v4}:{PORT}" in line]
    assert ours
    assert all(rf"\x1b[1mred\n/{sender.pid}" in line for line in ours)
    assert max(len(line) for line in out.splitlines()) <= 80
    assert rf"\x1b[1mred\n (pid {sender.pid}): " in told
    (line,) = [line for line in told.splitlines() if f":{port} > :{PORT}" in line]
    assert line.split()[3] == f"{segs:,}"
    inum = Path(f"/proc/{near.running[0].pid}/ns/net").stat().st_ino
    # Others may lose something on this host meanwhile, but not in this namespace.
    assert f"namespace {inum}, all sockets {segs:,} {segs:,} 0 " in " ".join(told.split())
    wrote, following = err.splitlines()[-2:]
    assert wrote.startswith("Wrote latrace.data (")
    assert following.startswith("Next: latrace tcp -i latrace.data ")
    for path in (folder / "latrace.data", *(folder / "latrace.data").iterdir()):
        assert path.stat().st_uid == NOBODY
    capture = latrace.open("latrace.data")
    assert capture.manifest["options"]["all_sockets"] is True
    (told_of,) = [each for each in capture.manifest["netns"] if each["inum"] == inum]
    assert told_of["retrans_segs_end"] - told_of["retrans_segs_start"] == segs
    (row,) = [row for row in capture.table("connections").to_pylist() if row["sport"] == port]
    assert (row["owners"], row["start_segs_out"]) == ([sender.pid], None)
    # Anybody can have it told once more.
    again = as_nobody("tcp", "-i", "latrace.data")
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout == told


@pytest.mark.parametrize("options", [[], ["-p"]], ids=["all", "pid"])
def test_nothing_sent_again(hosts: tuple[Host, Host], options: list[str]) -> None:
    near, far = hosts
    segs = -1
    for _ in range(5):  # on a busy host what nobody lost is sent again, too, now and then
        sender = Sender(near, far, size=1_000_000)
        process = start(*options, *([sender.pid] if options else ["-d", "2", "--force"]))
        _, segs = sender.send()
        out, _ = finish(process)
        if segs == 0:
            break
    assert segs == 0
    if options:
        assert re.search(r"^Nothing was sent again in .* segments of 1 TCP connection", out, re.M)
        watched = int(re.findall(r"([\d,]+) segments? of", out)[0].replace(",", ""))
        assert watched > 1_000_000 // 1448
        assert re.search(r"1 network namespace, all sockets +0 +0 +0$", out, re.M)
    else:  # others may talk here meanwhile
        assert "segments of" in " ".join(out.split())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_the_report(folder: Path, number: signal.Signals) -> None:
    with subprocess.Popen(["sleep", "100"]) as target:
        process = start("-p", target.pid)
        process.send_signal(number)
        out, err = finish(process)
        target.kill()
    assert "0 segments of 0 TCP connections watched" in out
    assert "Wrote latrace.data" in err
    assert latrace.open(folder / "latrace.data").complete


def test_a_reader_that_had_enough_ends_it(folder: Path, hosts: tuple[Host, Host]) -> None:
    near, far = hosts
    far.lose(LOSES, chain="input")
    sender = Sender(near, far)
    process = start()
    assert process.stdout
    process.stdout.readline()
    process.stdout.close()
    sender.send()
    assert process.wait(TIMEOUT_S) == 1
    assert latrace.open(folder / "latrace.data").complete
    assert process.stderr
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()


@pytest.mark.parametrize(
    ("arguments", "code", "cause"),
    [
        ("--pid 4194304", 4, "no process 4194304"),
        ("--pid x", 2, "--pid 'x' is not a process or thread id"),
        ("--pid 1 --all", 2, "--pid and --all exclude each other"),
        ("-d 0", 2, "--duration 0 is not a time to trace for"),
        ("-i latrace.data -d 1", 2, "--input reads a capture"),
        ("-i latrace.data", 1, "there is no capture at latrace.data"),
    ],
)
def test_an_error_is_a_cause_a_hint_and_a_code(
    folder: Path, arguments: str, code: int, cause: str
) -> None:
    result = run(*arguments.split())
    assert (result.returncode, result.stdout) == (code, "")
    first, second = result.stderr.splitlines()
    assert cause in first
    assert second.startswith("  hint: ")
    assert list(folder.iterdir()) == []


def as_nobody(*arguments: str) -> subprocess.CompletedProcess[str]:
    setpriv = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    # To read our code, wherever the checkout is.
    setpriv += ["--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"]
    return subprocess.run(
        [*setpriv, *LATRACE, *arguments], capture_output=True, text=True, check=False
    )


def test_without_root_it_says_so(folder: Path) -> None:
    result = as_nobody("tcp", "-d", "1")
    assert result.returncode == 3, result.stderr
    assert "needs root" in result.stderr
    assert list(folder.iterdir()) == []


def test_a_kernel_that_does_not_tell_of_retransmits(folder: Path) -> None:
    script = (
        "import sys\n"
        "from latrace.tracer import cache, compile\n"
        "compile._tcp_constants = lambda btf: {}\n"
        "cache.find = lambda key: None\n"
        "cache.keep = lambda *rest: None\n"
        "from latrace.tracer.cli import main\n"
        "sys.exit(main())\n"
    )
    for arguments in (["-d", "1"], ["-p", str(os.getppid())]):
        result = subprocess.run(
            [sys.executable, "-c", script, "tcp", *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 3, result.stderr
        assert "latrace: this kernel does not tell of TCP retransmits" in result.stderr
        assert "hint: Linux 5.19" in result.stderr
    assert list(folder.iterdir()) == []


def test_only_what_sockets_run_is_loaded() -> None:
    probes = loader.load(loader.build_for(Options(all_sockets=True)))
    try:
        assert set(probes.programs) == loader.SOCKET_PROGRAMS
        probes.attach()
        assert set(probes.links) == {
            name for name in loader.SOCKET_PROGRAMS if not name.startswith("lat_iter")
        }
    finally:
        probes.close()
