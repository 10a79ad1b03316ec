"""Targets made to mislead: a trace of one ends in time, says what it refused, and reads no secret.

What a target controls is its files, its memory and its view of the file system. The programs are
tests/workloads/hostile.c, run as nobody; they are traced as a user types it.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import latrace
from latrace.tracer.symbols.elf import BytesSource, read_headers
from latrace.tracer.symbols.perfmap import SIZE_LIMIT, perf_map_path
from latrace.tracer.unwinding.walk import MAX_FRAMES

pytestmark = pytest.mark.kernel

SOURCE = Path(__file__).parents[1] / "workloads/hostile.c"
LATRACE = (
    *(sys.executable, "-c"),
    "import sys; sys.argv[0] = 'latrace'; from latrace.tracer.cli import main; sys.exit(main())",
)
NOBODY = 65534
TRACED = "1s"
ENDS_WITHIN_S = 40.0
"""On a busy machine; the trace itself is a second of it."""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that nobody may read: pytest's own ones are closed to others."""
    with tempfile.TemporaryDirectory(prefix="latrace-hostile-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def secret(folder: Path) -> Iterator[Path]:
    """A file of root's that others may not read; the test fails when anybody did, or changed it."""
    path = folder / "secret"
    path.write_bytes(b"root's own\n" * 100)
    path.chmod(0o600)
    # Read before it was written, by these times: with relatime the next read shows.
    os.utime(path, (1_000_000_000, 1_000_000_001))
    before = path.lstat()
    yield path
    after = path.lstat()
    for field in ("st_atime_ns", "st_mtime_ns", "st_ctime_ns", "st_size", "st_mode", "st_nlink"):
        assert getattr(after, field) == getattr(before, field), f"{field} of the secret changed"
    path.read_bytes()
    assert path.lstat().st_atime_ns != before.st_atime_ns, "reads do not show here"


def build(folder: Path, *options: str, name: str = "hostile") -> Path:
    program = folder / name
    subprocess.run(["cc", "-O1", "-Wall", *options, "-o", program, SOURCE], check=True)
    return program


@dataclass(frozen=True, slots=True)
class Target:
    """A program that runs, and what it printed before it was ready."""

    pid: int
    printed: list[str]


class Stage:
    """Programs that run as nobody, all of them traced together, and ended."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.targets: dict[str, Target] = {}
        self._stack = stack

    def start(
        self, name: str, program: Path, *arguments: str, wrapper: Sequence[str] = ()
    ) -> Target:
        user = None if wrapper else NOBODY
        process = subprocess.Popen(
            [*wrapper, str(program), *(arguments or ("plain",))],
            stdout=subprocess.PIPE,
            text=True,
            user=user,
            group=user,
            extra_groups=None if wrapper else [],
        )
        self._stack.enter_context(process)
        self._stack.callback(process.kill)
        printed: list[str] = []
        assert process.stdout is not None
        while (line := process.stdout.readline().strip()) != "ready":
            assert line, f"{name} did not start"
            printed.append(line)
        self.targets[name] = Target(process.pid, printed)
        return self.targets[name]

    def attach(self) -> dict[str, Any]:
        """Trace them all; `quality.symbols`. Ends with 0, in time, without a word of Python's."""
        began = time.monotonic()
        pids = ",".join(str(target.pid) for target in self.targets.values())
        done = subprocess.run(
            [*LATRACE, "attach", "--pid", pids, "-d", TRACED, "-o", str(self.folder / "c")],
            capture_output=True,
            text=True,
            timeout=3 * ENDS_WITHIN_S,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert time.monotonic() - began < ENDS_WITHIN_S
        for text in ("Traceback", "Warning", "Error", "\x1b"):
            assert text not in done.stdout + done.stderr
        manifest = json.loads((self.folder / "c/manifest.json").read_text())
        return dict(manifest["quality"]["symbols"])

    def stacks(self, name: str) -> list[tuple[list[str | None], str]]:
        """User symbols, leaf first, and how the walk ended, of each stack of a target."""
        capture = latrace.open(self.folder / "c")
        names = {row["id"]: row["symbol"] for row in capture.frames.to_pylist()}
        waits = capture.table("waits", columns=["tid", "stack"]).to_pylist()
        used = {row["stack"] for row in waits if row["tid"] == self.targets[name].pid}
        found = [
            ([names[frame] for frame in row["frames"][row["kernel_frames"] :]], row["end"])
            for row in capture.stacks.to_pylist()
            if row["id"] in used
        ]
        assert found, f"no stack of {name}"
        for symbols, _ in found:
            assert len(symbols) <= MAX_FRAMES
            assert all(symbol is None or symbol.isprintable() for symbol in symbols)
        return found


@pytest.fixture
def stage(folder: Path) -> Iterator[Stage]:
    with ExitStack() as stack:
        yield Stage(folder, stack)


# --- stacks that go around in circles -----------------------------------------------------------


def test_stacks_that_lead_nowhere(stage: Stage) -> None:
    program = build(stage.folder)
    kinds = ("pointers", "back", "up", "signal")
    for kind in kinds:
        stage.start(kind, program, kind)
    stage.attach()
    for kind in kinds:
        for symbols, end in stage.stacks(kind):
            assert symbols[0] == f"trap_{kind}"
            assert set(symbols) <= {f"trap_{kind}", None}
            assert end != "whole"


# --- files that lie -----------------------------------------------------------------------------


def rubbish(size: int) -> bytes:
    return bytes((at * 167 + at // 256 * 61 + 13) % 256 for at in range(size))


def control(size: int) -> bytes:
    """Names that drive a terminal, and end nowhere."""
    text = b"\x1b[2J\x1b]0;owned\x07\xe2\x80\xae\xff\n"
    return (b"\0" + text * (size // len(text) + 1))[:size]


def every_seventh(old: bytes) -> bytes:
    """Sound records, but for some of their instructions."""
    new = bytearray(old)
    new[40::7] = rubbish(len(new[40::7]))
    return bytes(new)


CRAFTED: dict[str, tuple[bytes, Callable[[bytes], bytes]]] = {
    "symbols": (b".symtab", lambda old: rubbish(len(old))),
    "names": (b".strtab", lambda old: control(len(old))),
    "frames": (b".eh_frame", lambda old: rubbish(len(old))),
    "ones": (b".eh_frame", lambda old: b"\xff" * len(old)),
    "some": (b".eh_frame", every_seventh),
}


def test_running_programs_with_crafted_sections(stage: Stage) -> None:
    whole = build(stage.folder)
    data = whole.read_bytes()
    headers = read_headers(BytesSource(data))
    for name, (section, craft) in CRAFTED.items():
        found = headers.named(section)
        assert found is not None
        begin = int(found["offset"])
        end = begin + int(found["size"])
        program = stage.folder / name
        program.write_bytes(data[:begin] + craft(data[begin:end]) + data[end:])
        program.chmod(0o755)
        stage.start(name, program)
    # More dynamic symbols than the file has bytes.
    at = int.from_bytes(data[40:48], "little") + 64 * headers.names.index(b".dynsym") + 32
    program = stage.folder / "huge"
    program.write_bytes(data[:at] + (1 << 62).to_bytes(8, "little") + data[at + 8 :])
    program.chmod(0o755)
    stage.start("huge", program)
    said = stage.attach()
    assert said["worker"]["timeouts"] == said["worker"]["deaths"] == 0
    assert said["files"]["failed"]["not a sound ELF file"] == 1
    for name in (*CRAFTED, "huge"):
        stage.stacks(name)
    assert "plain" in {name for names, _ in stage.stacks("some") for name in names}
    assert set(CRAFTED) - {"symbols", "names"} <= set(said["unwinding"]["modules"])


def test_code_in_a_file_that_says_it_is_at_the_last_address(stage: Stage) -> None:
    """Its caller is the next address, one more than 64 bits hold."""
    file = stage.folder / "last"
    code = struct.pack("<IIQQQQQQ", 1, 5, 4096, (1 << 64) - 1, 0, 4096, 4096, 1)
    fields = (3, 62, 1, 0, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    header = b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHIQQQIHHHHHH", *fields)
    file.write_bytes((header + code).ljust(8192, b"\0"))
    os.chown(file, NOBODY, NOBODY)
    stage.start("last", build(stage.folder), "file", str(file))
    stage.attach()
    assert ["_start"] in [symbols[2:] for symbols, _ in stage.stacks("last")]
    frames = latrace.open(stage.folder / "c").frames.to_pylist()
    assert 0 in [frame["offset"] for frame in frames if frame["module"] == "last"]


def endless(number: int) -> str:
    """A C++ name of 330 letters that describes one of 2**30: A<B, B>, each B the one before."""
    name = f"_Z3f{number:02d}1AIiiE"
    for at in "0123456789ABCDEFGHIJKLMNOPQRST":
        name += f"S_IS{at}_S{at}_E"
    return name


def test_names_that_never_end(stage: Stage) -> None:
    """They stay as they are, cost seconds, and cost nobody else anything."""
    source = stage.folder / "endless.c"
    calls = [
        f'int f{at}(int) __asm__("{endless(at)}");\n'
        f"__attribute__((noinline)) int f{at}(int x) {{ return f{at + 1}(x) + {at}; }}"
        for at in reversed(range(30))
    ]
    source.write_text(
        "#include <stdio.h>\n#include <time.h>\n"
        "__attribute__((noinline)) int f30(int x) { struct timespec t = {0, 200000};\n"
        "for (;;) { nanosleep(&t, 0); for (volatile int i = 0; i < 50000; i++); } return x; }\n"
        + "\n".join(calls)
        + '\nint main(void) { puts("ready"); fflush(stdout); return f0(1); }'
    )
    program = stage.folder / "endless"
    subprocess.run(["cc", "-O1", "-o", program, source], check=True)
    stage.start("endless", program)
    stage.start("honest", build(stage.folder))
    said = stage.attach()
    assert said["late"] == said["worker"]["timeouts"] == 0
    assert said["worker"]["deaths"] > 0
    assert {endless(at) for at in range(30)} <= set(stage.stacks("endless")[0][0])
    assert "plain" in stage.stacks("honest")[0][0]


# --- other files than its own -------------------------------------------------------------------

IDENTITY = "1234567890abcdef1234567890abcdef123456"
SECRETS = {
    "link": "ln -s {secret} {debug}",
    "relative": "ln -s ../../../../../../../../..{secret} {debug}",
    "bound": "touch {debug}; mount --bind {secret} {debug}",
    "fifo": "mkfifo {debug}",
    "device": "mknod {debug} c 1 5",
}


def debug_file(identity: str) -> str:
    return f"/usr/lib/debug/.build-id/{identity[:2]}/{identity[2:]}.debug"


def unshared(debug: str, script: str) -> tuple[str, ...]:
    """Run what follows as nobody in a mount namespace of its own, where `script` made `debug`."""
    unshare, setpriv = shutil.which("unshare"), shutil.which("setpriv")
    if unshare is None or setpriv is None:
        pytest.skip("needs unshare and setpriv")
    drop = f'exec {setpriv} --reuid={NOBODY} --regid={NOBODY} --clear-groups -- "$@"'
    made = f"mount -t tmpfs -o mode=755 none /usr/lib/debug; mkdir -p {Path(debug).parent}"
    inside = f"set -e; {made}; {script}; {drop}"
    return (unshare, "--mount", "--propagation", "private", "sh", "-c", inside, "sh")


def stripped(folder: Path, name: str, identity: str) -> Path:
    program = build(folder, f"-Wl,--build-id=0x{identity}", name=name)
    subprocess.run(["strip", program], check=True)
    return program


def test_debug_files_that_are_something_of_root_s(stage: Stage, secret: Path) -> None:
    for number, (name, script) in enumerate(SECRETS.items()):
        identity = f"{IDENTITY}{number:02x}"
        debug = debug_file(identity)
        put = script.format(secret=secret, debug=debug)
        program = stripped(stage.folder, name, identity)
        stage.start(name, program, wrapper=unshared(debug, put))
    failed = stage.attach()["files"]["failed"]
    assert failed["debug file: not readable by the target"] == 3
    assert failed["debug file: not a regular file"] == 2
    for name in SECRETS:
        assert not {"main", "plain"} & set(stage.stacks(name)[0][0])


def test_the_build_id_of_another_program(stage: Stage) -> None:
    """It gets that program's names for its own addresses; nobody else does."""
    other, debug = stage.folder / "other.c", stage.folder / "other.debug"
    other.write_text("int stolen(void) { return 1; } int main(void) { return stolen(); }")
    identity = f"{IDENTITY}00"
    options = ["-g", f"-Wl,--build-id=0x{identity}", "-o", str(debug), str(other)]
    subprocess.run(["cc", *options], check=True)
    place = debug_file(identity)
    program = stripped(stage.folder, "claims", identity)
    stage.start("claims", program, wrapper=unshared(place, f"cp {debug} {place}"))
    stage.start("honest", build(stage.folder))
    # Others that are seen have debug files as well.
    assert stage.attach()["files"]["debug_files"] >= 1
    for symbols, _ in stage.stacks("claims"):
        assert "plain" not in symbols
    assert "plain" in stage.stacks("honest")[0][0]


# --- perf maps ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PerfMaps:
    """What lies where perf maps would; all of it goes away."""

    stack: ExitStack

    def put(self, target: Target, make: Callable[[Path], object]) -> Path:
        path = Path(perf_map_path(target.pid))
        assert not path.exists()
        self.stack.callback(lambda: path.rmdir() if path.is_dir() else path.unlink())
        make(path)
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
        return path


@pytest.fixture
def perf_maps() -> Iterator[PerfMaps]:
    with ExitStack() as stack:
        yield PerfMaps(stack)


def sized(size: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.touch()
        os.truncate(path, size)

    return make


def test_perf_maps_that_are_none(stage: Stage, perf_maps: PerfMaps, secret: Path) -> None:
    """The last one is all zeros up to the limit: one endless line."""
    program = build(stage.folder)
    refused: dict[str, tuple[Callable[[Path], object], str]] = {
        "link": (lambda path: path.symlink_to(secret), "a symbolic link"),
        "fifo": (os.mkfifo, "not a regular file"),
        "folder": (Path.mkdir, "not a regular file"),
        "sparse": (sized(1 << 40), "too big"),
        "big": (sized(SIZE_LIMIT + 1), "too big"),
        "public": (lambda path: (path.touch(), path.chmod(0o666)), "writable by everybody"),
        "root's": (Path.touch, "owned by another user"),
    }
    for name, (make, _) in refused.items():
        path = perf_maps.put(stage.start(name, program, "jit"), make)
        if name == "root's":
            os.chown(path, 0, 0)
    perf_maps.put(stage.start("zeros", program, "jit"), sized(SIZE_LIMIT))
    said = stage.attach()["perf_maps"]
    reasons = [why for _, why in refused.values()]
    assert said["refused"] == {why: reasons.count(why) for why in reasons}
    told = {(one["tgid"], one["path"]): one["why"] for one in said["refusals"]}
    for name, (_, why) in refused.items():
        pid = stage.targets[name].pid
        assert told[pid, perf_map_path(pid)] == why
    assert said["read"] == 1


def test_a_perf_map_that_grows_and_shrinks_while_it_is_read(
    stage: Stage, perf_maps: PerfMaps
) -> None:
    target = stage.start("jit", build(stage.folder), "jit")
    path = perf_maps.put(target, Path.touch)
    code, stop = int(target.printed[0], 16), threading.Event()

    def write() -> None:
        noise = b"".join(b"%x 40 noise\x1b[2J %d\n" % (at * 64, at) for at in range(20_000))
        while not stop.wait(0.02):
            with path.open("ab") as file:
                file.write(b"%x 1000 real_name\nzz\n" % code + noise)
            if path.stat().st_size > 16 << 20:
                os.truncate(path, 0)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        said = stage.attach()["perf_maps"]
    finally:
        stop.set()
        writer.join()
    assert said["read"] >= 1
    assert said["malformed_lines"] > 0
    assert "real_name" in {name for symbols, _ in stage.stacks("jit") for name in symbols}
