"""Frames looked up after the capture: only in files of the same build, whatever a capture says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from symbols_tools import SAMPLE, WORKLOADS, Functions, build, build_id_of, need, open_to_all

from latrace.analysis import schema
from latrace.analysis.capture import Capture, FrameName, open_capture
from latrace.tracer.cli import main
from latrace.tracer.symbols import files, later
from latrace.tracer.symbols.client import Worker
from latrace.tracer.symbols.dwarf import Libdw
from latrace.tracer.symbols.frames import NOT_LOOKED_UP
from latrace.tracer.symbols.later import look_up

INLINED = WORKLOADS / "inlined.c"
needs_libdw = pytest.mark.skipif(not Libdw().available, reason="needs libdw1")


def write(folder: Path, frames: Sequence[dict[str, Any]]) -> Path:
    """A capture of one wait, in a stack of these frames."""
    folder.mkdir(exist_ok=True)
    ids = [frame["id"] for frame in frames]
    rows: dict[str, Sequence[dict[str, Any]]] = {
        "frames": frames,
        "stacks": [{"id": 1, "frames": ids, "whole": True, "kernel_frames": 0}],
        "waits": [{"tid": 1, "tgid": 1, "stack": 1, "wait_ns": 5_000, "weight_ns": 5_000}],
        "totals": [{"tgid": 1, "waits": 1, "wait_ns": 5_000, "snapshot": 1}],
        "threads": [{"tid": 1, "tgid": 1, "comm": "app"}],
    }
    manifest = {"schema": schema.SCHEMA_VERSION, "complete": True}
    (folder / schema.MANIFEST).write_text(json.dumps(manifest))
    for name, found in rows.items():
        table = pa.Table.from_pylist(list(found), schema=schema.TABLES[name])
        path = str(folder / f"{name}{schema.SUFFIX}")
        with pa.OSFile(path, "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
    return folder


def capture(folder: Path, frames: Sequence[dict[str, Any]]) -> Capture:
    return open_capture(write(folder / "c", frames))


def frame(id_: int, path: Path | str, build_id: str | None, address: int, **more: Any) -> Any:
    name = str(path).rsplit("/", 1)[-1]
    row = {"id": id_, "symbol": None, "module": name, "offset": address, "space": "user"}
    return row | {"path": str(path), "build_id": build_id, "address": address} | more


def stripped(folder: Path) -> tuple[Path, Path, str]:
    """A program without symbols, its debug file, and its build id."""
    whole, bare, debug = folder / "whole", folder / "program", folder / "program.debug"
    build(INLINED, whole, "-O2", "-g", "-Wl,--build-id=sha1")
    subprocess.run([need("objcopy"), "--only-keep-debug", str(whole), str(debug)], check=True)
    subprocess.run([need("strip"), "-o", str(bare), str(whole)], check=True)
    found = build_id_of(bare)
    assert found
    return bare, debug, found


@pytest.fixture
def debug_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where packages put debug files, for once."""
    folder = tmp_path / "debug"
    folder.mkdir()
    monkeypatch.setattr(files, "DEBUG_FOLDER", str(folder).encode())
    return folder


@pytest.fixture
def public_folder() -> Iterator[Path]:
    with open_to_all() as folder:
        yield folder


def install(debug_folder: Path, debug: Path, build_id: str) -> Path:
    target = debug_folder / ".build-id" / build_id[:2] / f"{build_id[2:]}.debug"
    target.parent.mkdir(parents=True)
    shutil.copy(debug, target)
    return target


def place_of(program: Path, debug: Path, function: str, callee: str) -> int:
    """An address in `function` where `callee` is the innermost of what is inlined."""
    start = Functions(debug).start_of(function)
    libdw = Libdw()
    fd = os.open(debug, os.O_RDONLY)
    wanted = list(range(start, start + 4000))
    chains = libdw.chains(fd, wanted)
    os.close(fd)
    for address, chain in zip(wanted, chains, strict=True):
        if chain and chain[0] == callee.encode() and chain[-1] == function.encode():
            return address
    raise AssertionError(f"no {callee} in {function} of {program}")


# --- names --------------------------------------------------------------------------------------


def test_a_debug_file_that_came_later_names_the_frames(tmp_path, debug_folder):
    program, debug, build_id = stripped(tmp_path)
    functions = Functions(debug)
    start = functions.start_of("work")
    made = capture(
        tmp_path,
        [
            frame(1, program, build_id, start + 8, offset=start + 9),
            frame(2, program, build_id, start + 4, symbol="known", offset=3),
            frame(3, program, build_id, 1),
        ],
    )
    nothing = look_up(made, inlines=False)
    assert (nothing.names, nothing.inlined, nothing.told) == ({}, {}, [])
    install(debug_folder, debug, build_id)
    found = look_up(made, inlines=False)
    assert found.names == {1: FrameName("work", "program", 9)}
    made.name_frames(found.names)
    rows = {row["id"]: row for row in made.table("frames").to_pylist()}
    assert (rows[1]["symbol"], rows[1]["module"], rows[1]["offset"]) == ("work", "program", 9)
    assert (rows[2]["symbol"], rows[2]["offset"], rows[3]["symbol"]) == ("known", 3, None)
    assert made.table("frames", columns=["symbol"])["symbol"].to_pylist() == ["work", "known", None]
    # The file itself may be gone.
    program.unlink()
    assert look_up(open_capture(made.path), inlines=False).names == found.names


def test_the_worker_is_not_started_without_a_reason(tmp_path, debug_folder):
    program, _debug, build_id = stripped(tmp_path)
    worker = Worker()
    look_up(capture(tmp_path, [frame(1, program, build_id, 1)]), inlines=False, worker=worker)
    assert worker.starts == 0
    assert debug_folder.exists()


def test_what_nobody_had_the_time_to_look_up(tmp_path):
    program = build(SAMPLE, tmp_path / "program", "-Wl,--build-id=sha1")
    start = Functions(program).start_of("main")
    rows = [frame(1, program, build_id_of(program), start + 2, module=NOT_LOOKED_UP)]
    found = look_up(capture(tmp_path, rows), inlines=False)
    assert found.names == {1: FrameName("main", "program", 2)}


def test_a_debug_file_of_another_build_is_refused(tmp_path, debug_folder):
    program, debug, _build_id = stripped(tmp_path)
    start = Functions(debug).start_of("work")
    other = "ab" * 20
    install(debug_folder, debug, other)
    made = capture(tmp_path, [frame(1, program, other, start)])
    assert look_up(made, inlines=True).names == {}


# --- inlined functions --------------------------------------------------------------------------


@needs_libdw
def test_inlined_functions_from_the_file_itself(tmp_path):
    whole = build(INLINED, tmp_path / "program", "-O2", "-g", "-Wl,--build-id=sha1")
    build_id = build_id_of(whole)
    nap = place_of(whole, whole, "work", "nap")
    start = Functions(whole).start_of("work")
    rows = [
        frame(1, whole, build_id, nap, symbol="work"),
        frame(2, whole, build_id, start, symbol="work"),
        frame(3, whole, None, nap, symbol="work"),
    ]
    found = look_up(capture(tmp_path, rows), inlines=True)
    assert found.inlined[1] == ("nap", "step")
    assert 3 not in found.inlined
    assert found.told == ["no inlined functions for 1 frame, no build id: program (1)"]


@needs_libdw
def test_inlined_functions_from_a_debug_file(tmp_path, debug_folder):
    program, debug, build_id = stripped(tmp_path)
    nap = place_of(program, debug, "work", "nap")
    made = capture(tmp_path, [frame(1, program, build_id, nap)])
    told = look_up(made, inlines=True).told
    assert told == ["no inlined functions for 1 frame, no DWARF: program (1)"]
    install(debug_folder, debug, build_id)
    found = look_up(made, inlines=True)
    assert found.inlined == {1: ("nap", "step")} and found.told == []
    assert found.names[1].symbol == "work"


@needs_libdw
def test_inlined_functions_by_the_debug_link(tmp_path):
    program, debug, build_id = stripped(tmp_path)
    nap = place_of(program, debug, "work", "nap")
    command = [need("objcopy"), f"--add-gnu-debuglink={debug}", str(program)]
    subprocess.run(command, check=True, cwd=tmp_path)
    found = look_up(capture(tmp_path, [frame(1, program, build_id, nap)]), inlines=True)
    assert found.inlined == {1: ("nap", "step")}


@needs_libdw
def test_what_dwz_put_aside_is_taken_from_the_debug_folder_only(tmp_path, debug_folder):
    program, debug, build_id = stripped(tmp_path)
    nap = place_of(program, debug, "work", "nap")
    target = install(debug_folder, debug, build_id)
    twin = tmp_path / "twin.debug"
    shutil.copy(debug, twin)
    (debug_folder / ".dwz").mkdir()
    common = debug_folder / ".dwz" / "common.debug"
    link = os.path.relpath(common, target.parent)
    command = [need("dwz"), "-m", str(common), "-M", link, str(target), str(twin)]
    subprocess.run(command, check=True, capture_output=True)
    made = capture(tmp_path, [frame(1, program, build_id, nap)])
    assert look_up(made, inlines=True).inlined == {1: ("nap", "step")}
    # Without it the functions are there, but not their names.
    common.rename(tmp_path / "common.debug")
    assert look_up(made, inlines=True).inlined == {}


@needs_libdw
def test_a_file_replaced_by_another_build_is_not_used(tmp_path):
    program = build(INLINED, tmp_path / "program", "-O2", "-g", "-Wl,--build-id=sha1")
    build_id = build_id_of(program)
    nap = place_of(program, program, "work", "nap")
    made = capture(tmp_path, [frame(1, program, build_id, nap, module=NOT_LOOKED_UP)])
    assert look_up(made, inlines=True).inlined == {1: ("nap", "step")}
    build(INLINED, program, "-O2", "-g", "-DOTHER", "-Wl,--build-id=0x1234567890")
    found = look_up(made, inlines=True)
    assert (found.inlined, found.names) == ({}, {})
    assert found.told == ["no inlined functions for 1 frame, another build by now: program (1)"]
    program.unlink()
    assert "not found" in look_up(made, inlines=True).told[0]


def test_only_regular_files_are_opened(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    (tmp_path / "link").symlink_to("/proc/self/fd/0")
    paths = [fifo, tmp_path / "link", tmp_path, "/dev/zero", "/dev/tty", "/proc/self/mem", "", "x"]
    paths += ["/proc/self/exe", "a\0b", "../" * 2000]
    rows = [frame(number, path, "ab" * 20, 1) for number, path in enumerate(paths)]
    rows += [frame(100, "/bin/true", build_id, 1) for build_id in ("", "zz", "ab", "00" * 1000)]
    began = time.monotonic()
    found = look_up(capture(tmp_path, rows), inlines=True)
    assert time.monotonic() - began < 20
    assert (found.names, found.inlined) == ({}, {})


def test_captures_of_before_are_looked_at_as_well(tmp_path):
    folder = write(tmp_path / "c", [frame(1, "/bin/true", "ab" * 20, 1)])
    table = pa.Table.from_pylist([{"id": 1, "symbol": "f", "module": "m", "space": "user"}])
    path = str(folder / "frames.arrows")
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    made = open_capture(folder)
    found = look_up(made, inlines=True)
    assert found.inlined == {}
    assert found.told == [
        "no inlined functions for 1 frame, the capture does not say where they are: m (1)"
    ]
    assert look_up(made, inlines=False).told == []
    assert made.table("frames", columns=["path", "address"]).to_pylist() == [
        {"path": None, "address": None}
    ]


WITHOUT = """
from latrace.tracer.symbols import dwarf, worker
dwarf.LIBRARY = "libdw.so.none"
worker.main()
"""


def test_without_libdw_it_says_what_to_install(tmp_path):
    program = build(INLINED, tmp_path / "program", "-O2", "-g", "-Wl,--build-id=sha1")
    rows = [frame(1, program, build_id_of(program), 1), frame(2, "/bin/true", "ab" * 20, 1)]
    worker = Worker(command=(sys.executable, "-c", WITHOUT))
    found = look_up(capture(tmp_path, rows), inlines=True, worker=worker)
    assert found.told == [
        "no inlined functions: libdw is not installed (sudo apt-get install libdw1)"
    ]


KILLED = """
import os
from latrace.tracer.symbols import worker
worker.Libdw.chains = lambda *_, **__: os.kill(os.getpid(), 11)
worker.main()
"""


@needs_libdw
def test_dwarf_that_kills_the_worker_is_given_up(tmp_path):
    program = build(INLINED, tmp_path / "program", "-O2", "-g", "-Wl,--build-id=sha1")
    build_id = build_id_of(program)
    rows = []
    for number in range(8):
        copy = tmp_path / f"copy{number}"
        shutil.copy(program, copy)
        rows.append(frame(number, copy, build_id, 1))
    worker = Worker(command=(sys.executable, "-c", KILLED))
    found = look_up(capture(tmp_path, rows), inlines=True, worker=worker)
    assert found.inlined == {}
    assert worker.deaths == later.DEATHS_LIMIT
    assert found.told == [
        "no inlined functions for 8 frames, not readable: copy0 (1), copy1 (1), copy2 (1) and 5"
        " more files"
    ]


@pytest.mark.kernel
def test_under_sudo_only_what_the_user_may_read(tmp_path, monkeypatch, public_folder):
    program = build(SAMPLE, public_folder / "program", "-Wl,--build-id=sha1")
    start = Functions(program).start_of("main")
    row = frame(1, program, build_id_of(program), start, module=NOT_LOOKED_UP)
    made = capture(tmp_path, [row])
    monkeypatch.setenv("SUDO_UID", "65534")
    monkeypatch.setenv("SUDO_GID", "65534")
    program.chmod(0o755)
    assert look_up(made, inlines=False).names[1].symbol == "main"
    program.chmod(0o700)
    assert look_up(made, inlines=False).names == {}


# --- the command --------------------------------------------------------------------------------


@needs_libdw
def test_flame_shows_them(tmp_path, capsys):
    program = build(INLINED, tmp_path / "program", "-O2", "-g", "-Wl,--build-id=sha1")
    nap = place_of(program, program, "work", "nap")
    row = frame(1, program, build_id_of(program), nap, symbol="work")
    folder = write(tmp_path / "c", [row, frame(2, "/bin/gone", "ab" * 20, 1, symbol="main")])
    out = tmp_path / "out.folded"
    assert main(["flame", "-i", str(folder), str(out)]) == 0
    assert out.read_text() == "app;main;work 5\n"
    assert "!!!" not in capsys.readouterr().err
    assert main(["flame", "-f", "-q", "-i", str(folder), "--inlines", str(out)]) == 0
    assert out.read_text() == "app;main;work;step;nap 5\n"
    assert capsys.readouterr().err == (
        "!!! no inlined functions for 1 frame, not found: gone (1)\n"
    )


def test_the_report_has_names_that_came_later(tmp_path, debug_folder, capsys):
    program, debug, build_id = stripped(tmp_path)
    start = Functions(debug).start_of("work")
    folder = str(write(tmp_path / "c", [frame(1, program, build_id, start + 8)]))
    for installed in (False, True):
        assert main(["report", "-i", folder, "--json"]) == 0
        assert ('"work"' in capsys.readouterr().out) == installed
        if not installed:
            install(debug_folder, debug, build_id)


@needs_libdw
@pytest.mark.parametrize("cut", [0.2, 0.5, 0.8])
def test_flame_survives_a_file_that_is_cut_off(tmp_path, capsys, cut):
    program = build(INLINED, tmp_path / "program", "-O2", "-g", "-Wl,--build-id=sha1")
    folder = write(tmp_path / "c", [frame(1, program, build_id_of(program), 4096, symbol="work")])
    data = program.read_bytes()
    program.write_bytes(data[: int(len(data) * cut)])
    out = tmp_path / "out.folded"
    assert main(["flame", "-i", str(folder), "--inlines", str(out)]) == 0
    assert out.read_text() == "app;work 5\n"
    assert "!!! no inlined functions for 1 frame" in capsys.readouterr().err
