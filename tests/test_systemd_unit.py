"""The unit of `latrace watch`: its command line is ours, and the tracer works inside its walls.

No service manager runs here. What systemd would set up for the unit is set up by hand, from the
unit's own lines: capabilities, system calls, memory that is never writable and executable, what is
read-only or hidden. Not tried: IPAddressDeny=, RestrictNamespaces=, limits of memory and tasks.
"""

from __future__ import annotations

import ctypes.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

import latrace
from latrace.tracer.commands.application import app

TREE = Path(__file__).resolve().parents[1]
UNIT = TREE / "scripts" / "systemd" / "latrace-watch@.service"
NOBODY = 65534


def settings(name: str) -> list[str]:
    """All values of a setting of the unit, in order."""
    lines = UNIT.read_text().splitlines()
    return [line.partition("=")[2] for line in lines if line.startswith(f"{name}=")]


def words(name: str) -> list[str]:
    return [word for value in settings(name) for word in value.split()]


def exec_start(*, options: str = "", target: str = "") -> list[str]:
    """The unit's command, as systemd.service(5) makes it of ExecStart= and the environment."""
    (line,) = settings("ExecStart")
    (environment,) = settings("Environment")
    variables = dict(word.split("=", 1) for word in shlex.split(environment))
    variables |= {"OPTIONS": options} if options else {}
    variables |= {"TARGET": target} if target else {}
    made = []
    for word in line.split():
        # An unbraced variable that is a word of its own becomes as many words as it has.
        made += variables[word[1:]].split() if word.startswith("$") else [word]
    return [word.replace("%i", "redis-server").replace("%S", "/var/lib") for word in made]


def parses(command: list[str]) -> None:
    """Let our command line take it, without running it. Raises what it says against it."""
    context = typer.Context(get_command(app), info_name="latrace")
    group = context.command
    name, found, rest = group.resolve_command(context, command[1:])  # type: ignore[attr-defined]
    assert found is not None
    found.make_context(name, rest, parent=context)


def watch_exists() -> bool:
    return "watch" in get_command(app).commands  # type: ignore[attr-defined]


# --- its lines -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["", "--p99 10ms --max 50ms --keep 50"])
@pytest.mark.parametrize("target", ["", "--cgroup system.slice/postgresql.service"])
def test_the_command_is_one_of_ours(options: str, target: str) -> None:
    if not watch_exists():
        pytest.skip("`latrace watch` is not a command of this version")
    command = exec_start(options=options, target=target)
    assert command[0] == "/usr/local/bin/latrace"
    parses(command)
    with pytest.raises(typer.TyperException):
        parses([*command, "--no-such-option"])


def test_what_its_comments_say_can_be_set_is_what_the_test_sets() -> None:
    comments = [line[1:].strip() for line in UNIT.read_text().splitlines() if line[:1] == "#"]
    assert "OPTIONS=--p99 10ms --max 50ms --keep 50" in comments
    assert "TARGET=--cgroup system.slice/postgresql.service" in comments


def test_every_capability_is_explained() -> None:
    text = UNIT.read_text()
    comment = text.partition("what is missing without:")[2].partition("CapabilityBoundingSet=")[0]
    lines = [line for line in comment.splitlines() if line[:4] == "#   " and line[4] != " "]
    explained = {word.strip(",") for line in lines for word in line[4:].partition("  ")[0].split()}
    assert {f"CAP_{name}" for name in explained} == set(words("CapabilityBoundingSet"))


@pytest.mark.parametrize("instance", ["redis-server", "a.out", "my\\x20app"])
def test_systemd_finds_nothing_wrong_with_it(tmp_path: Path, instance: str) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze (package systemd)")
    copy = tmp_path / f"latrace-watch@{instance}.service"
    # The program need not be installed where the tests run.
    copy.write_text(UNIT.read_text().replace("/usr/local/bin/latrace", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


# --- inside its walls ----------------------------------------------------------------------------

WALLS = r"""
import ctypes, json, os, resource, struct, sys

wanted = json.loads(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)


def check(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def mount(source, target, kind, flags):
    check(libc.mount(source.encode(), target.encode(), kind, ctypes.c_ulong(flags), None))


def set_read_only(path, on):  # mount_setattr(2), recursively
    attributes = struct.pack("QQQQ", int(on), int(not on), 0, 0)
    check(libc.syscall(442, -100, path.encode(), 0x8000, attributes, ctypes.c_size_t(32)))


BIND, REC, PRIVATE = 0x1000, 0x4000, 0x40000
check(libc.unshare(0x00020000 | 0x04000000))  # mounts, host name
mount("none", "/", None, REC | PRIVATE)
for source, target in wanted["writable"].items():
    mount(source, target, None, BIND)
set_read_only("/", True)
for target in (*wanted["writable"].values(), "/dev", "/proc"):
    set_read_only(target, False)
for path in wanted["read_only"]:
    mount(path, path, None, BIND | REC)
    set_read_only(path, True)
for path in wanted["hidden"]:
    mount("/dev/null" if not os.path.isdir(path) else "none", path, *(
        (b"tmpfs", 0) if os.path.isdir(path) else (None, BIND)))
for path in wanted["own"]:
    mount("none", path, b"tmpfs", 0)

for number in range(64):
    if number not in wanted["capabilities"]:
        if libc.prctl(24, number, 0, 0, 0) < 0:  # PR_CAPBSET_DROP
            break
check(libc.prctl(38, 1, 0, 0, 0))  # PR_SET_NO_NEW_PRIVS
if wanted["filter"]:
    seccomp = ctypes.CDLL(wanted["filter"])
    seccomp.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(seccomp.seccomp_init(0x00050000 | 1))  # else: EPERM
    for name in wanted["calls"]:
        number = seccomp.seccomp_syscall_resolve_name(name.encode())
        if number >= 0:
            check(seccomp.seccomp_rule_add_array(context, 0x7FFF0000, number, 0, None))
    check(seccomp.seccomp_load(context))
libc.prctl(65, 1, 0, 0, 0)  # PR_SET_MDWE, Linux 6.3
os.umask(0o077)
os.execv(sys.argv[2], sys.argv[2:])
"""

# A program of nobody's: threads that wait for a CPU, sleep, and talk over TCP; its library is a
# file that only nobody can read.
TARGET = """
import ctypes, os, socket, sys, threading, time
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
burn = ctypes.CDLL(sys.argv[1]).latrace_test_burn
listener = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(listener.getsockname())
server, _ = listener.accept()
os.sched_setaffinity(0, [max(os.sched_getaffinity(0))])
for _ in range(3):
    threading.Thread(target=burn, daemon=True).start()
print("ready", flush=True)
while True:
    time.sleep(0.001)
    client.send(b"x"); server.recv(10)
"""
LIBRARY = """
static volatile unsigned long sum;
__attribute__((noinline)) void latrace_test_inner(void)
{ for (int i = 0; i < 1000; i++) sum += i; }
void latrace_test_burn(void) { for (;;) { latrace_test_inner(); sum++; } }
"""

CAPABILITIES = {
    "CAP_DAC_READ_SEARCH": 2,
    "CAP_KILL": 5,
    "CAP_SETGID": 6,
    "CAP_SETUID": 7,
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_ADMIN": 21,
    "CAP_SYSLOG": 34,
    "CAP_PERFMON": 38,
    "CAP_BPF": 39,
}


def allowed_calls() -> list[str]:
    """The system calls of the unit's filters, their groups resolved by systemd itself."""

    def resolve(name: str) -> set[str]:
        if not name.startswith("@"):
            return {name}
        listed = subprocess.run(
            ["systemd-analyze", "syscall-filter", "--no-pager", name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split("\n")[1:]
        members = [line.strip() for line in listed if line.strip() and "#" not in line]
        return set().union(*(resolve(member) for member in members))

    allowed: set[str] = set()
    for value in settings("SystemCallFilter"):
        named = set().union(*(resolve(name) for name in value.lstrip("~").split()))
        allowed = allowed - named if value.startswith("~") else allowed | named
    # What systemd allows in any case, for its own call of the program (systemd.exec(5)).
    return sorted(allowed | resolve("@default") | {"execve", "exit", "rt_sigreturn"})


@pytest.fixture
def target(tmp_path: Path) -> Iterator[int]:
    """A process of nobody's with a library that only nobody may read."""
    folder = Path(tempfile.mkdtemp(prefix="latrace-test-"))
    try:
        (tmp_path / "burn.c").write_text(LIBRARY)
        library = folder / "liblatrace_test.so"
        flags = ["-O1", "-fno-omit-frame-pointer", "-shared", "-fPIC"]
        subprocess.run(["cc", *flags, "-o", library, tmp_path / "burn.c"], check=True)
        for path in (library, folder):
            os.chown(path, NOBODY, NOBODY)
        library.chmod(0o600)
        command = ["unshare", "--net", "sh", "-c", 'ip link set lo up; exec "$@"', "sh"]
        command += ["/usr/bin/python3", "-c", TARGET, str(library)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout and process.stdout.readline() == "ready\n"
            try:
                yield process.pid
            finally:
                process.kill()
    finally:
        shutil.rmtree(folder)


def run_within(
    tmp_path: Path, pid: int, *, without: str = "", cold: bool = False
) -> subprocess.CompletedProcess[str]:
    """Trace `pid` within the unit's walls, into `state/c`, less one capability or system call."""
    state = tmp_path / "state"
    state.mkdir()
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    writable = {str(state): "/mnt"}  # tmp_path itself is out of sight in there
    if cold and Path("/var/cache/latrace").exists():
        writable[str(cache)] = "/var/cache/latrace"
    seen = {path for one in (TREE, Path(sys.prefix)) for path in (one, *one.parents)}
    library = ctypes.util.find_library("seccomp")
    filtered = library is not None and shutil.which("systemd-analyze") is not None
    wanted: dict[str, Any] = {
        "capabilities": [CAPABILITIES[name] for name in words("CapabilityBoundingSet")],
        "writable": writable,
        "read_only": words("ReadOnlyPaths"),
        "hidden": [
            path
            for path in (
                *("/home", "/root", "/run/user", "/usr/lib/modules"),
                *(path.lstrip("-") for path in words("InaccessiblePaths")),
            )
            if Path(path).exists() and Path(path) not in seen
        ],
        "own": [path for path in ("/tmp", "/var/tmp") if Path(path) not in seen],  # noqa: S108
        "filter": library if filtered else "",
        "calls": [call for call in allowed_calls() if call != without] if filtered else [],
    }
    if without in CAPABILITIES:
        wanted["capabilities"].remove(CAPABILITIES[without])
    command = [sys.executable, "-c", WALLS, json.dumps(wanted)]
    command += [sys.executable, "-m", "latrace", "attach", "--pid", str(pid)]
    command += ["-d", "2s", "--slow", "10us", "-o", "/mnt/c"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=TREE)
    if str(cache) in writable:
        assert list(cache.iterdir())  # it has compiled, and kept what came of it
    return done


def found(capture: Any) -> set[str]:
    """Which of the things that may be missing are there."""
    quality, overhead = capture.manifest["quality"], capture.manifest["overhead"]
    symbols = quality["symbols"]
    names = set(capture.frames.column("symbol").to_pylist())
    return {
        name
        for name, there in {
            "waits": capture.waits.num_rows > 100,
            "sleeps": capture.sleeps.num_rows > 100,
            "samples": quality["samples"] > 0,
            "cost": overhead["bpf_ns"] > 0,
            "congestion": any(capture.connections.column("congestion").to_pylist()),
            "netns": len(capture.manifest["netns"]) == 1,
            "kernel names": symbols["kernel"]["symbols"] > 0,
            "names": symbols["worker"]["deaths"] == 0 and symbols["files"]["parsed"] > 0,
            "names of others' files": "latrace_test_inner" in names,
        }.items()
        if there
    }


ALL = {
    *("waits", "sleeps", "samples", "cost", "congestion", "netns"),
    *("kernel names", "names", "names of others' files"),
}
OF_NAMES = {"names", "names of others' files"}


@pytest.mark.kernel
def test_the_tracer_works_within_its_walls(tmp_path: Path, target: int) -> None:
    """Everything, the compiler included: nothing is cached."""
    done = run_within(tmp_path, target, cold=True)
    assert done.returncode == 0, done.stderr
    capture = latrace.open(tmp_path / "state" / "c")
    assert found(capture) == ALL and capture.complete
    assert "Traceback" not in done.stderr and "!" not in done.stderr


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("CAP_SYS_ADMIN", {"cost", "congestion"}),
        ("CAP_SYS_PTRACE", {"netns", "congestion", *OF_NAMES}),
        ("CAP_SYSLOG", {"kernel names"}),
        ("CAP_DAC_READ_SEARCH", {"names of others' files"}),
        ("CAP_SETUID", OF_NAMES),
        ("CAP_SETGID", OF_NAMES),
    ],
)
def test_each_capability_is_needed_for_what_the_unit_says(
    tmp_path: Path, target: int, name: str, missing: set[str]
) -> None:
    done = run_within(tmp_path, target, without=name)
    assert done.returncode == 0, done.stderr
    assert found(latrace.open(tmp_path / "state" / "c")) == ALL - missing


@pytest.mark.kernel
@pytest.mark.parametrize("call", ["bpf", "perf_event_open"])
def test_the_walls_are_there(tmp_path: Path, target: int, call: str) -> None:
    """Each system call that the unit allows by name is one that tracing needs."""
    if ctypes.util.find_library("seccomp") is None or shutil.which("systemd-analyze") is None:
        pytest.skip("needs libseccomp and systemd-analyze")
    done = run_within(tmp_path, target, without=call)
    if call == "bpf":
        assert done.returncode == 3 and "not permitted" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert found(latrace.open(tmp_path / "state" / "c")) == ALL - {"samples"}
