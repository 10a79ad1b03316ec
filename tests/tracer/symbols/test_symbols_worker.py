"""The unprivileged worker: what it may do, and what the tracer does when it misbehaves."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from symbols_tools import SAMPLE, Functions, addresses, build, libc, worker

import latrace.tracer.symbols
from latrace.tracer.symbols import wire
from latrace.tracer.symbols.client import (
    MAX_DEADLY_NAMES,
    MAX_FAILED_STARTS,
    NAMES_TIMEOUT_S,
    Worker,
    WorkerError,
)
from latrace.tracer.symbols.elf import FdSource, read_image
from latrace.tracer.symbols.table import Image

IMPORTS = "import os, socket, sys, time; s = socket.socket(fileno=int(sys.argv[1]));"


def fake(code: str) -> tuple[str, ...]:
    """A command that plays the worker's part."""
    return (sys.executable, "-c", IMPORTS + code)


def parse(running: Worker, path: Path) -> Image | int:
    fd = os.open(path, os.O_RDONLY)
    try:
        return running.elf(fd)
    finally:
        os.close(fd)


def test_an_image_arrives_as_it_was_parsed():
    fd = os.open(libc(), os.O_RDONLY)
    here = read_image(FdSource(fd))
    os.close(fd)
    with worker() as running:
        there = parse(running, libc())
    assert isinstance(there, Image)
    assert there.symbols.all_names() == here.symbols.all_names()
    assert there.symbols.starts.tolist() == here.symbols.starts.tolist()
    assert there.symbols.ends.tolist() == here.symbols.ends.tolist()
    assert there.segments.tolist() == here.segments.tolist()
    assert (there.build_id, there.symtab) == (here.build_id, here.symtab)


def test_a_file_without_symbols_and_a_file_that_is_none(tmp_path):
    rubbish = tmp_path / "rubbish"
    rubbish.write_bytes(b"\x7fELF" + bytes(1000))
    empty = tmp_path / "empty"
    empty.touch()
    with worker() as running:
        assert parse(running, rubbish) == wire.STATUS_BAD_FILE
        assert parse(running, empty) == wire.STATUS_BAD_FILE
        assert running.demangle([]) == []
        assert isinstance(parse(running, libc()), Image)
        assert (running.starts, running.deaths, running.timeouts) == (1, 0, 0)


def test_names_come_back_in_order():
    names = [b"_Z1fi", b"", b"plain", b"_RNvC1a1b", b"_Zbad\xff\0"]
    with worker() as running:
        expected = [b"f(int)", b"", b"plain", b"a::b", b"_Zbad\xff\0"]
        assert running.demangle(names * 2000) == expected * 2000


def test_a_killed_worker_is_started_again():
    with worker() as running:
        assert running.demangle([b"_Z1fi"]) == [b"f(int)"]
        first = running.pid
        assert first is not None
        os.kill(first, 9)
        # The names come all the same: a batch that fails is tried name by name.
        assert running.demangle([b"_Z1fi"]) == [b"f(int)"]
        assert running.pid != first
        assert running.deaths == 1


def test_a_worker_that_hangs_is_given_up(monkeypatch):
    monkeypatch.setattr("latrace.tracer.symbols.client.START_TIMEOUT_S", 0.0)
    with worker(command=fake("time.sleep(1000)"), file_timeout_s=0.2) as running:
        with pytest.raises(WorkerError, match="too long"):
            parse(running, libc())
        assert running.timeouts == 1
        assert running.pid is None


def test_a_worker_that_drips_does_not_stretch_the_deadline(monkeypatch):
    monkeypatch.setattr("latrace.tracer.symbols.client.START_TIMEOUT_S", 0.0)
    code = "[(s.send(b'l'), time.sleep(0.05)) for _ in range(100000)]"
    with (
        worker(command=fake(code), file_timeout_s=0.5) as running,
        pytest.raises(WorkerError, match="too long"),
    ):
        parse(running, libc())


@pytest.mark.parametrize(
    "answer",
    [
        "b''",
        "b'x' * 1000",
        # An image of 2**32 - 1 symbols, and one with names of 2**63 bytes.
        "__import__('struct').pack('=4sIIIQIIII', b'lsy1', 0, 0, 2**32 - 1, 0, 0, 0, 0, 0)",
        "__import__('struct').pack('=4sIIIQIIII', b'lsy1', 0, 0, 0, 2**63, 0, 0, 0, 0)",
        # Two symbols out of order.
        "__import__('struct').pack('=4sIIIQIIII', b'lsy1', 0, 0, 2, 2, 0, 0, 0, 0)"
        " + __import__('struct').pack('=QQQQII', 9, 1, 10, 2, 1, 2) + b'ab'",
        # A debug link that leaves its directory.
        "__import__('struct').pack('=4sIIIQIIII', b'lsy1', 0, 0, 0, 0, 0, 4, 0, 0) + b'../x'",
        "__import__('struct').pack('=4sIIIQIIII', b'lsy1', 77, 0, 0, 0, 0, 0, 0, 0)",
    ],
)
def test_nonsense_from_the_worker_is_not_believed(answer):
    with worker(command=fake(f"s.recv(9999); s.sendall({answer})")) as running:
        with pytest.raises(WorkerError, match="died"):
            parse(running, libc())
        assert running.deaths == 1
        assert running.demangle([b"_Z1fi"]) == [b"_Z1fi"]


def test_a_worker_that_never_starts_is_not_tried_for_ever():
    with worker(command=fake("sys.exit(3)")) as running:
        for _ in range(10):
            with pytest.raises(WorkerError):
                parse(running, libc())
        assert running.starts == MAX_FAILED_STARTS
    with worker(command=("/nonexistent/python",)) as running, pytest.raises(WorkerError):
        running.start()


def test_a_worker_is_given_up_by_another_thread():
    with worker(command=fake("s.recv(9999); time.sleep(1000)"), file_timeout_s=60) as running:
        timer = threading.Timer(0.3, running.abandon)
        timer.start()
        began = time.monotonic()
        with pytest.raises(WorkerError, match="died"):
            parse(running, libc())
        assert time.monotonic() - began < 20
        timer.join()
        with pytest.raises(WorkerError, match="given up"):
            parse(running, libc())
        assert running.demangle([b"_Z1fi"]) == [b"_Z1fi"]


DEADLY = """
import os, sys
from latrace.tracer.symbols import worker
class Deadly(worker.Demangler):
    def __call__(self, name):
        if name == b"_Zdeadly":
            os._exit(1)
        return super().__call__(name)
worker.Demangler = Deadly
worker.main()
"""


def test_a_name_that_kills_the_demangler_costs_only_itself():
    command = (sys.executable, "-c", DEADLY)
    with worker(command=command) as running:
        names = [b"_Z1fi", b"_Zdeadly", b"_Z1gi", b"_Zdeadly"]
        assert running.demangle(names) == [b"f(int)", b"_Zdeadly", b"g(int)", b"_Zdeadly"]
        assert running.deaths == 3


def endless(number: int) -> bytes:
    """A C++ name of 330 letters that describes one of 2**30: A<B, B>, each B the one before."""
    name, digits = b"_Z2f%da1AIiiE" % number, "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    for at in range(30):
        before = b"S%s_" % digits[at].encode()
        name += b"S_I" + before + before + b"E"
    return name


@pytest.mark.parametrize("count", [1, 60])
def test_names_that_never_end_cost_little_time(count):
    endless_ones = [endless(number) for number in range(count)]
    with worker() as running:
        assert running.demangle([b"_Z1fi"]) == [b"f(int)"]
        began = time.monotonic()
        names = running.demangle([b"_Z1gi", *endless_ones, b"_Z1hi"])
        assert time.monotonic() - began < 5 * NAMES_TIMEOUT_S
        assert names[:-1] == [b"g(int)", *endless_ones]
        # After so many nobody's name is worth the time.
        assert names[-1] == (b"h(int)" if count == 1 else b"_Z1hi")
        assert running.timeouts == 0 and running.deaths <= 1 + MAX_DEADLY_NAMES
        assert running.demangle([b"_Z1hi"]) == [b"h(int)"]


def test_slow_names_are_not_tried_for_ever():
    code = DEADLY.replace("os._exit(1)", "time.sleep(0.3)").replace("os,", "os, time,")
    with worker(command=(sys.executable, "-c", code), names_timeout_s=1.0) as running:
        assert running.demangle([b"_Z1fi"]) == [b"f(int)"]
        began = time.monotonic()
        names = running.demangle([b"_Z1fi", *[b"_Zdeadly"] * 100])
        assert len(names) == 101 and names[0] == b"f(int)" and names[-1] == b"_Zdeadly"
        assert time.monotonic() - began < 10


def test_files_that_kill_it_do_not_end_it_for_good():
    code = DEADLY.replace(
        "worker.main()", "worker._about_file = lambda *_: os._exit(1)\nworker.main()"
    )
    with worker(command=(sys.executable, "-c", code)) as running:
        for deaths in range(1, 2 + MAX_FAILED_STARTS):
            with pytest.raises(WorkerError, match="died"):
                parse(running, libc())
            assert running.deaths == deaths
        assert running.demangle([b"_Z1fi"]) == [b"f(int)"]


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


@pytest.mark.kernel
def test_the_worker_has_no_rights_left():
    with worker() as running:
        assert running.demangle([b"_Z1fi"]) == [b"f(int)"]
        pid = running.pid
        assert pid is not None
        told = status(pid)
        assert told["Uid"].split() == ["65534"] * 4
        assert told["Gid"].split() == ["65534"] * 4
        assert told["Groups"] == ""
        assert [told[key] for key in ("CapInh", "CapPrm", "CapEff", "CapAmb")] == ["0" * 16] * 4
        assert told["NoNewPrivs"] == "1"
        assert told["Threads"] == "1"
        folder = Path(f"/proc/{pid}")
        assert str((folder / "cwd").readlink()) == "/"
        kinds = sorted(re.sub(r"\d+", "N", str(fd.readlink())) for fd in (folder / "fd").iterdir())
        assert kinds == ["/dev/null"] * 3 + ["socket:[N]"]
        # Nobody's other processes may not look into it either.
        assert (folder / "mem").stat().st_uid == 0
        limits = {
            line[:26].strip(): line[26:].split()[:2]
            for line in (folder / "limits").read_text().splitlines()
        }
        assert limits["Max processes"] == ["0", "0"]
        assert limits["Max file size"] == ["0", "0"]
        assert limits["Max core file size"] == ["0", "0"]
        assert limits["Max open files"] == ["16", "16"]
        assert limits["Max address space"] == [str(2 << 30)] * 2
        assert int(limits["Max cpu time"][0]) <= 30


@pytest.mark.kernel
def test_a_program_that_only_root_can_read_still_has_a_worker(tmp_path):
    package = Path(latrace.tracer.symbols.__file__).parent
    hidden = tmp_path / "hidden"
    target = hidden / "latrace/tracer/symbols"
    shutil.copytree(package, target, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(package.parent / "unprivileged.py", target.parent)
    for folder in (target.parent, target.parent.parent):
        (folder / "__init__.py").touch()
    hidden.chmod(0o700)
    code = f"import sys; sys.path.insert(0, {str(hidden)!r}); "
    code += "from latrace.tracer.symbols import worker; assert sys.path[0] in worker.__file__; "
    with worker(command=(sys.executable, "-I", "-c", code + "worker.main()")) as running:
        assert running.demangle([b"_Z1fi"]) == [b"f(int)"]
        assert isinstance(parse(running, libc()), Image)
        assert status(running.pid or 0)["Uid"].split()[0] == "65534"


BARRED = """
import os, sys
from latrace.tracer.symbols import worker
class Barred:
    def find_spec(self, name, path=None, target=None):
        os._exit(1)
drop_rights = worker.drop_rights
def drop_and_bar(keep, *, limits):
    drop_rights(keep, limits=limits)
    sys.meta_path.insert(0, Barred())
worker.drop_rights = drop_and_bar
worker.main()
"""


def test_all_modules_are_there_before_the_rights_are_given_up(tmp_path):
    """Afterwards nobody may be able to read them: a newcomer's home is closed to others."""
    rubbish = tmp_path / "rubbish"
    rubbish.write_bytes(b"\x7fELF" + bytes(1000))
    program = build(SAMPLE, tmp_path / "sample", "-Wl,-z,lazy", "-fcf-protection=branch")
    damaged = tmp_path / "damaged"
    damaged.write_bytes(program.read_bytes()[:-100])
    with worker(command=(sys.executable, "-I", "-c", BARRED)) as running:
        assert running.demangle([b"_Z1fi", b"_RNvC1a1b"]) == [b"f(int)", b"a::b"]
        assert isinstance(parse(running, libc()), Image)
        assert isinstance(parse(running, program), Image)
        assert parse(running, rubbish) == wire.STATUS_BAD_FILE
        assert parse(running, damaged) == wire.STATUS_BAD_FILE
        fd = os.open(program, os.O_RDONLY)
        assert running.debug(fd, build_id=b"", crc=1) == wire.STATUS_MISMATCH
        os.close(fd)
        assert running.deaths == 0


def test_the_worker_loads_nothing_it_does_not_need():
    code = "import latrace.tracer.symbols.worker, sys; print(*sys.modules)"
    out = subprocess.run(
        [sys.executable, "-I", "-c", code], check=True, capture_output=True, text=True
    )
    assert not {"bcc", "pyarrow", "rich", "typer", "elftools"} & set(out.stdout.split())


def test_a_debug_file_must_be_of_the_same_build(tmp_path):
    program = build(SAMPLE, tmp_path / "sample", "-Wl,--build-id=0xaabbccdd")
    start = Functions(program).start_of("static_function")
    with worker() as running:
        fd = os.open(program, os.O_RDONLY)
        good = running.debug(fd, build_id=bytes.fromhex("aabbccdd"), crc=0)
        assert isinstance(good, Image)
        assert good.symbols.lookup(addresses(start))[0] >= 0
        assert running.debug(fd, build_id=b"other", crc=0) == wire.STATUS_MISMATCH
        assert running.debug(fd, build_id=b"", crc=0) == wire.STATUS_MISMATCH
        os.close(fd)


# --- replies, without a process ----------------------------------------------------------------


def reader(data: bytes) -> Callable[[int], bytes]:
    position = 0

    def read(length: int) -> bytes:
        nonlocal position
        piece = data[position : position + length]
        if len(piece) < length:
            raise EOFError
        position += length
        return piece

    return read


@pytest.fixture(scope="module")
def reply() -> bytes:
    fd = os.open(libc(), os.O_RDONLY)
    image = read_image(FdSource(fd))
    os.close(fd)
    small = Image(
        image.segments, image.symbols, image.symtab, image.build_id, b"link.debug", 7
    )  # fmt: skip
    return b"".join(wire.image_reply(small))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_damaged_reply_is_refused_or_harmless(data, reply):
    changed = bytearray(reply)
    head = st.integers(0, 63)
    anywhere = st.integers(0, len(reply) - 1)
    for at in data.draw(st.lists(st.one_of(head, anywhere), min_size=1, max_size=4)):
        changed[at] = data.draw(st.integers(0, 255))
    try:
        image = wire.read_image(reader(bytes(changed)))
    except (wire.WireError, EOFError):
        return
    if isinstance(image, Image):
        table = image.symbols
        assert (table.starts[1:] > table.starts[:-1]).all()
        assert int(table.name_ends[-1]) == len(table.names) if len(table) else True
        table.lookup(addresses(0, 2**63, 2**64 - 1))
        image.vaddrs(addresses(0, 2**63, 2**64 - 1))


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_as_a_reply(body):
    for text in (body, wire.MAGIC + body):
        for read in (wire.read_image, lambda source: wire.read_names(source, 3)):
            try:
                read(reader(text))
            except (wire.WireError, EOFError):
                continue


def test_it_is_nice_until_somebody_waits_for_it() -> None:
    running = Worker()
    try:
        ours = os.getpriority(os.PRIO_PROCESS, 0)
        for niceness in (min(ours + 10, 19), ours, ours):
            running.start()
            assert running.pid is not None
            assert os.getpriority(os.PRIO_PROCESS, running.pid) == niceness
            running.hurry()
            assert os.getpriority(os.PRIO_PROCESS, running.pid) == ours and running.hurried
            running.close()  # the next one begins as this one ended
    finally:
        running.close()
