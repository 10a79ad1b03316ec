"""The symbolizer on live processes: programs of every kind, containers, JITs, and their ends."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from symbols_tools import (
    SAMPLE,
    Functions,
    addresses,
    build,
    build_id_of,
    build_library,
    libc,
    need,
    running,
)

from latrace.tracer.naming import NamedStacks, Naming
from latrace.tracer.stacks import RawStack
from latrace.tracer.symbols import Frame, Symbolizer
from latrace.tracer.symbols.client import Worker
from latrace.tracer.symbols.demangle import Demangler
from latrace.tracer.symbols.elf import BytesSource, read_image
from latrace.tracer.symbols.perfmap import perf_map_path
from latrace.tracer.symbols.symbolizer import DEATHS_LIMIT, LOOK_AGAIN_S

NOBODY = 65534
KINDS = {
    "pie": ["-pie", "-fPIE"],
    "no-pie": ["-no-pie"],
    "static": ["-static", "-DWITHOUT_DLOPEN"],
    "static-pie": ["-static-pie", "-DWITHOUT_DLOPEN"],
}


def open_descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


@pytest.fixture
def symbolizer() -> Iterator[Symbolizer]:
    before = open_descriptors()
    result = Symbolizer()
    yield result
    result.close()
    assert open_descriptors() == before, "descriptors stay open"


def frame(symbolizer: Symbolizer, pid: int, addr: int) -> Frame:
    return shown(symbolizer.user(pid, addresses(addr))[0])


def shown(found: Frame) -> Frame:
    """A frame without what it takes to look it up again."""
    return Frame(*found[:4])


def assert_all_named(symbolizer: Symbolizer, pid: int, printed: dict[str, int], name: str) -> None:
    frames = symbolizer.user(pid, addresses(*printed.values()))
    named = [Frame(function, name, 0, "user") for function in printed]
    assert [shown(frame) for frame in frames] == named


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_program_on_a_live_process(symbolizer, tmp_path, kind):
    program = build(SAMPLE, tmp_path / kind, *KINDS[kind])
    with running(program) as (pid, printed):
        symbolizer.remember(pid)
        assert_all_named(symbolizer, pid, printed, kind)
        inside = printed["outer_function"] + 80
        assert frame(symbolizer, pid, inside) == Frame("outer_function", kind, 80, "user")
        hole = frame(symbolizer, pid, inside + 1)
        assert (hole.symbol, hole.module, hole.space) == (None, kind, "user")
        # Without a symbol the offset is what addr2line takes.
        start = Functions(program).start_of("outer_function")
        assert hole.offset == start + 81


def test_a_return_address_at_the_end_belongs_to_its_function(symbolizer, tmp_path):
    program = build(SAMPLE, tmp_path / "sample")
    with running(program) as (pid, printed):
        end = printed["outer_function"] + 81
        frames = symbolizer.user(
            pid, addresses(end, end, 0), return_addresses=np.array([False, True, True])
        )
        assert frames[0].symbol is None
        assert shown(frames[1]) == Frame("outer_function", "sample", 81, "user")
        # What was looked up is the byte before, in the file.
        start = Functions(program).start_of("outer_function")
        assert frames[1].address == start + 80
        assert (frames[1].path, frames[1].build_id) == (str(program), build_id_of(program))
        assert frames[2] == Frame(None, "[unknown]", 0, "user")


def test_places_are_those_of_a_look_up_without_the_names(symbolizer, tmp_path):
    program = build(SAMPLE, tmp_path / "sample")
    with running(program) as (pid, printed):
        wanted = addresses(printed["outer_function"] + 80, printed["main"] + 1, 1)
        callers = np.array([False, True, True])
        assert symbolizer.places(pid, wanted, return_addresses=callers) == [None] * 3
        symbolizer.remember(pid)
        assert symbolizer.places(pid, wanted, return_addresses=callers) == [None] * 3
        found = symbolizer.user(pid, wanted, return_addresses=callers)
        places = symbolizer.places(pid, wanted, return_addresses=callers)
        assert places[2] is None
        for place, frame_ in zip(places[:2], found[:2], strict=True):
            assert place is not None and place.address is not None
            assert place.symbol is None and place[4:] == frame_[4:]
        assert [place.offset - place.address for place in places[:2]] == [0, 1]
        assert symbolizer.stats["addresses"]["resolved"] == 2


def test_libraries_loaded_later_are_seen(symbolizer, tmp_path):
    program = build(SAMPLE, tmp_path / "sample")
    library = build_library(tmp_path)
    with running(program, library) as (pid, printed):
        found = frame(symbolizer, pid, printed["in_library"])
        assert found == Frame("in_library", "libsample.so", 0, "user")


def test_letting_go_keeps_what_was_used_since(symbolizer, tmp_path):
    """So does one who watches for weeks: whoever was on the host once must not stay for ever."""
    program = build(SAMPLE, tmp_path / "sample")
    with running(program) as (pid, printed):
        before = open_descriptors()
        for _ in range(3):
            symbolizer.remember(pid)
            assert open_descriptors() > before  # libraries that nobody has asked about
            assert_all_named(symbolizer, pid, printed, "sample")
            symbolizer.let_go()
            assert len(open_descriptors()) <= len(before) + 1  # the worker
            assert symbolizer.stats["files"]["known"] == 1
            assert symbolizer.stats["files"]["parsed"] == 1
    symbolizer.let_go()
    files = symbolizer.stats["files"]
    assert (files["known"], files["table_bytes"]) == (0, 0)


def test_symbols_of_a_process_that_has_ended(symbolizer, tmp_path):
    program = build(SAMPLE, tmp_path / "sample")
    with running(program) as (pid, printed):
        symbolizer.remember(pid)
    program.unlink()
    assert not Path(f"/proc/{pid}").exists()
    assert_all_named(symbolizer, pid, printed, "sample")
    symbolizer.forget(pid)
    assert frame(symbolizer, pid, printed["main"]).module == "[unknown]"


def test_a_process_that_was_never_seen_is_unknown_and_counted(symbolizer):
    with subprocess.Popen(["true"]) as process:
        process.wait()
    assert frame(symbolizer, process.pid, 4096) == Frame(None, "[unknown]", 4096, "user")
    assert symbolizer.stats["processes"]["gone"] > 0


def test_exec_replaces_what_was_mapped(symbolizer, tmp_path):
    program = build(SAMPLE, tmp_path / "sample", "-no-pie")
    with subprocess.Popen(
        ["sh", "-c", f"read line; exec {program}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            symbolizer.remember(process.pid)
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()
            name, addr = process.stdout.readline().split()
            symbolizer.remember(process.pid)
            found = frame(symbolizer, process.pid, int(addr, 16))
            assert found == Frame(name, "sample", 0, "user")
        finally:
            process.kill()


def test_thousands_of_libc_addresses_agree_with_readelf(symbolizer):
    """In this very process, through its real mappings."""
    path = libc()
    base, oracle = None, Functions(path)
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path)) and " r-xp " in line:
            low, high = (int(part, 16) for part in line.split()[0].split("-"))
            base = low - int(line.split()[2], 16)
    assert base is not None
    # For libc file offsets and virtual addresses of code are the same.
    rng = np.random.default_rng(3)
    addrs = rng.integers(low, high, 5000, dtype=np.uint64)
    debug = Path("/usr/lib/debug/.build-id")
    wrong = []
    for addr, found in zip(addrs.tolist(), symbolizer.user(os.getpid(), addrs), strict=True):
        names = oracle.at(addr - base)
        assert found.module == path.name
        if not names and (found.symbol or "").endswith("@plt"):
            continue  # linkage stubs are in no symbol table
        if found.symbol not in names and (names or found.symbol is not None):
            wrong.append((hex(addr - base), found, names))
    if debug.is_dir():
        # A debug file knows more functions than the library; those it shares must agree.
        wrong = [item for item in wrong if item[2] and item[1].symbol is None]
    assert wrong == []


def test_the_vdso_of_our_own_process(symbolizer):
    libc_library = ctypes.CDLL(None)
    libc_library.getauxval.restype = ctypes.c_ulong
    base = libc_library.getauxval(33)
    if not base:
        pytest.skip("this kernel gives no vDSO")
    table = read_image(BytesSource(ctypes.string_at(base, 8192))).symbols
    frames = symbolizer.user(os.getpid(), table.starts + np.uint64(base))
    assert [item.symbol for item in frames] == [name.decode() for name in table.all_names()]
    assert {item.module for item in frames} == {"[vdso]"}
    assert any("clock_gettime" in (item.symbol or "") for item in frames)


# --- files that are no longer what their path says ---------------------------------------------


@pytest.mark.kernel
def test_a_deleted_and_a_replaced_file(symbolizer, tmp_path):
    program = build(SAMPLE, tmp_path / "sample", "-no-pie")
    other = tmp_path / "other.c"
    other.write_text("int wrong(void) { return 1; } int main(void) { return wrong(); }")
    with running(program) as (pid, printed):
        program.unlink()
        assert_all_named(symbolizer, pid, printed, "sample")
        build(other, program, "-no-pie")
        fresh = Symbolizer()
        assert_all_named(fresh, pid, printed, "sample")
        fresh.close()


@pytest.mark.parametrize("replacement", ["other file", "link to shadow", "fifo", "nothing"])
def test_without_map_files_a_replaced_path_is_not_believed(tmp_path, replacement):
    program = build(SAMPLE, tmp_path / "sample", "-no-pie")
    symbolizer = Symbolizer(privileged=False)
    with running(program) as (pid, printed):
        program.rename(tmp_path / "moved")
        hidden = tmp_path / "moved"
        shutil.copy(hidden, tmp_path / "copy")
        # The kernel shows the new name; put something else under it.
        hidden.unlink()
        {
            "other file": lambda: (tmp_path / "copy").rename(hidden),
            "link to shadow": lambda: hidden.symlink_to("/etc/shadow"),
            "fifo": lambda: os.mkfifo(hidden),
            "nothing": lambda: None,
        }[replacement]()
        found = frame(symbolizer, pid, printed["main"])
        assert (found.symbol, found.module) == (None, "moved")
        assert sum(symbolizer.stats["files"]["not_opened"].values()) >= 1
    symbolizer.close()


def test_without_map_files_a_file_is_found_beneath_the_root(tmp_path):
    program = build(SAMPLE, tmp_path / "sample")
    symbolizer = Symbolizer(privileged=False)
    with running(program) as (pid, printed):
        assert_all_named(symbolizer, pid, printed, "sample")
    symbolizer.close()


# --- other namespaces and roots ----------------------------------------------------------------


def unshare(*script: str) -> tuple[str, ...]:
    """Run what follows in a mount namespace of its own, after a script; $0 is the program."""
    return (need("unshare"), "--mount", "--propagation", "private", "sh", "-ec", " ".join(script))


@pytest.mark.kernel
@pytest.mark.parametrize("privileged", [True, False])
def test_a_program_that_only_its_mount_namespace_shows(tmp_path, privileged):
    program = build(SAMPLE, tmp_path / "sample")
    inside = tmp_path / "inside"
    inside.mkdir()
    script = f"mount -t tmpfs none {inside}; cp $0 {inside}/hidden; exec {inside}/hidden"
    symbolizer = Symbolizer(privileged=privileged)
    with running(program, wrapper=unshare(script)) as (pid, printed):
        assert not list(inside.iterdir())
        assert_all_named(symbolizer, pid, printed, "hidden")
    symbolizer.close()


@contextmanager
def chrooted(root: Path, program: Path) -> Iterator[tuple[int, dict[str, int]]]:
    with running("/" + program.name, wrapper=(need("chroot"), str(root))) as started:
        yield started


def debug_parts(folder: Path, *options: str) -> tuple[Path, Path]:
    """A stripped static program in a root of its own, and its debug file, not yet in place."""
    whole = build(SAMPLE, folder / "whole", "-static", "-DWITHOUT_DLOPEN", *options)
    root = folder / "root"
    root.mkdir()
    program, debug = root / "program", folder / "program.debug"
    for command in (
        ["strip", "-o", str(program), str(whole)],
        ["objcopy", "--only-keep-debug", str(whole), str(debug)],
    ):
        subprocess.run(command, check=True)
    return program, debug


@pytest.mark.kernel
def test_a_stripped_program_has_only_its_module_and_offset(symbolizer, tmp_path):
    program, _debug = debug_parts(tmp_path)
    start = Functions(tmp_path / "whole").start_of("main")
    with chrooted(tmp_path / "root", program) as (pid, printed):
        expected = Frame(None, "program", start, "user")
        assert frame(symbolizer, pid, printed["main"]) == expected


@pytest.mark.kernel
def test_a_debug_file_is_found_by_build_id_in_the_target_s_root(symbolizer, tmp_path):
    program, debug = debug_parts(tmp_path, "-Wl,--build-id=0x1234567890abcdef")
    place = tmp_path / "root/usr/lib/debug/.build-id/12/34567890abcdef.debug"
    place.parent.mkdir(parents=True)
    shutil.move(debug, place)
    with chrooted(tmp_path / "root", program) as (pid, printed):
        symbolizer.remember(pid)
    # Parsed only now: the root is held, though nobody lives in it any more.
    assert_all_named(symbolizer, pid, printed, "program")
    assert symbolizer.stats["files"]["debug_files"] == 1


@pytest.mark.kernel
@pytest.mark.parametrize("whose", ["its own", "another's"])
def test_a_debug_file_is_found_by_link_and_checksum(tmp_path, whose):
    program, debug = debug_parts(tmp_path, "-Wl,--build-id=none")
    subprocess.run(["objcopy", f"--add-gnu-debuglink={debug}", str(program)], check=True)
    if whose == "another's":
        with debug.open("ab") as file:
            file.write(b"!")
    # The link is looked for beside the path that the kernel shows, as seen from the root.
    script = f"mount --bind {tmp_path}/root /mnt; exec /mnt/program"
    symbolizer = Symbolizer()
    (tmp_path / "root/.debug").mkdir()
    shutil.move(debug, tmp_path / "root/.debug/program.debug")
    with running(program, wrapper=unshare(script)) as (pid, printed):
        if whose == "its own":
            assert_all_named(symbolizer, pid, printed, "program")
        else:
            assert frame(symbolizer, pid, printed["main"]).symbol is None
            assert "debug file: debug file of another build" in symbolizer.stats["files"]["failed"]
    symbolizer.close()


# --- perf maps ---------------------------------------------------------------------------------


@contextmanager
def perf_map(pid: int, text: str, *, owner: int) -> Iterator[Path]:
    path = Path(perf_map_path(pid))
    path.write_text(text)
    os.chown(path, owner, owner)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


@pytest.fixture
def public_sample() -> Iterator[Path]:
    """The sample where nobody may run it: pytest's own directories are closed to others."""
    folder = Path("/tmp") / f"latrace-symbols-{os.getpid()}"  # noqa: S108 - made by us, 0755
    folder.mkdir(mode=0o755)
    yield build(SAMPLE, folder / "sample")
    shutil.rmtree(folder)


@pytest.mark.kernel
def test_code_of_a_jit_has_the_names_of_its_perf_map(symbolizer, public_sample):
    with running(public_sample, "--jit", user=NOBODY) as (pid, printed):
        jit = printed["jit"]
        with perf_map(pid, f"{jit:x} 40 first\n", owner=NOBODY) as path:
            assert frame(symbolizer, pid, jit + 4) == Frame("first", "[jit]", 4, "jit")
            unnamed = jit + 0x40
            assert frame(symbolizer, pid, unnamed) == Frame(None, "[jit]", unnamed, "jit")
            with path.open("a") as file:
                file.write(f"{jit + 0x40:x} 40 second\n{jit:x} 20 newer\n")
            symbolizer.remember(pid)
            assert frame(symbolizer, pid, unnamed) == Frame("second", "[jit]", 0, "jit")
            assert frame(symbolizer, pid, jit + 4) == Frame("newer", "[jit]", 4, "jit")
            assert frame(symbolizer, pid, jit + 0x20) == Frame("first", "[jit]", 0x20, "jit")
            end = symbolizer.user(pid, addresses(jit + 0x80), return_addresses=np.array([True]))
            assert end == [Frame("second", "[jit]", 0x40, "jit")]
        maps = symbolizer.stats["perf_maps"]
        assert (maps["read"], maps["refused"], maps["malformed_lines"]) == (1, {}, 0)


@pytest.mark.kernel
def test_a_perf_map_written_anew_is_read_anew(symbolizer, public_sample):
    """Over the old one, and as another file in its place."""
    with running(public_sample, "--jit", user=NOBODY) as (pid, printed):
        jit = printed["jit"]

        def name() -> str | None:
            time.sleep(2 * LOOK_AGAIN_S)
            symbolizer.renamed(pid)
            return frame(symbolizer, pid, jit).symbol

        assert name() is None
        with perf_map(pid, f"{jit:x} 40 first\n", owner=NOBODY) as path:
            before = symbolizer.renamed(pid)
            assert name() == "first"
            assert symbolizer.renamed(pid) > before
            path.write_text(f"{jit + 0x80:x} 40 other\n{jit:x} 40 second\n")
            assert name() == "second"
            path.unlink()
            assert name() == "second"
            path.write_text(f"{jit:x} 40 third\n")
            os.chown(path, NOBODY, NOBODY)
            assert name() == "third"
            path.unlink()
            path.write_text(f"{jit:x} 40 lie\n")
            assert name() == "third"
        assert symbolizer.stats["perf_maps"]["read"] == 2
        assert symbolizer.stats["perf_maps"]["refused"] == {"owned by another user": 1}


@pytest.mark.kernel
def test_a_stack_gets_its_names_once_there_are_any(public_sample):
    naming = Naming()
    with running(public_sample, "--jit", user=NOBODY) as (pid, printed):
        nothing, user = np.zeros(0, np.uint64), addresses(printed["jit"])

        def number() -> tuple[int, NamedStacks]:
            time.sleep(2 * LOOK_AGAIN_S)
            naming.add([RawStack(1, pid, nothing, user, has_user=True)])
            naming.hurry()
            while not naming.has_named(naming.added):
                time.sleep(0.01)
            rows = naming.take()
            return rows.numbers[0][1], rows

        nameless, rows = number()
        assert [frame.symbol for _, frame in rows.frames] == [None]
        assert number()[0] == nameless
        with perf_map(pid, f"{printed['jit']:x} 40 late\n", owner=NOBODY):
            named, rows = number()
            assert named != nameless
            assert [frame.symbol for _, frame in rows.frames] == ["late"]
            assert number()[0] == named
    naming.close()


@pytest.mark.kernel
@pytest.mark.parametrize(("uid", "owner"), [(NOBODY, 0), (NOBODY, 1), (0, NOBODY)])
def test_the_perf_map_of_another_user_is_refused(symbolizer, public_sample, uid, owner):
    with running(public_sample, "--jit", user=uid) as (pid, printed):
        jit = printed["jit"]
        with perf_map(pid, f"{jit:x} 40 lie\n", owner=owner) as path:
            for _ in range(3):
                symbolizer.remember(pid)
                assert frame(symbolizer, pid, jit) == Frame(None, "[jit]", jit, "jit")
        maps = symbolizer.stats["perf_maps"]
        assert maps["read"] == 0
        assert maps["refused"] == {"owned by another user": 1}
        assert maps["refusals"] == [
            {"tgid": pid, "path": str(path), "why": "owned by another user"}
        ]


@pytest.mark.kernel
def test_a_link_or_a_fifo_for_a_perf_map_is_refused(symbolizer, public_sample):
    with running(public_sample, "--jit", user=NOBODY) as (pid, printed):
        path = Path(perf_map_path(pid))
        for make in (lambda: path.symlink_to("/etc/shadow"), lambda: os.mkfifo(path)):
            make()
            try:
                symbolizer.remember(pid)
                assert frame(symbolizer, pid, printed["jit"]).symbol is None
            finally:
                path.unlink()
        assert symbolizer.stats["perf_maps"]["refused"] == {
            "a symbolic link": 1,
            "not a regular file": 1,
        }


@pytest.mark.kernel
def test_in_a_container_the_perf_map_has_the_inner_pid(symbolizer, tmp_path):
    program = build(SAMPLE, tmp_path / "sample")
    folder = tmp_path / "tmp"
    folder.mkdir()
    wrapper = (need("unshare"), "--mount", "--propagation", "private", "--pid", "--fork",
               "--kill-child", "sh", "-ec", f"mount --bind {folder} /tmp; exec $0 $1")  # fmt: skip
    kept = Path("/opt") / f"latrace-symbols-{os.getpid()}"
    shutil.copy(program, kept)
    try:
        with running(kept, "--jit", wrapper=wrapper) as (outer, printed):
            children = Path(f"/proc/{outer}/task/{outer}/children").read_text().split()
            pid = int(children[0])
            (folder / "perf-1.map").write_text(f"{printed['jit']:x} 40 in_container\n")
            found = frame(symbolizer, pid, printed["jit"])
            assert found == Frame("in_container", "[jit]", 0, "jit")
    finally:
        kept.unlink()


@pytest.mark.kernel
def test_node_names_its_own_functions_and_v8_s(symbolizer, tmp_path):
    node = need("node")
    script = """
        function hotFunction(n) { for (var s = 0, i = 0; i < n; i++) s += Math.sqrt(i); return s }
        for (let i = 0; i < 500; i++) hotFunction(1e4);
        console.log("ready"); setInterval(() => hotFunction(1e4), 10);
    """
    with subprocess.Popen(
        [node, "--perf-basic-prof", "-e", script],
        stdout=subprocess.PIPE,
        cwd=tmp_path,  # some versions leave an isolate-*-v8.log there
    ) as process:
        path = Path(perf_map_path(process.pid))
        try:
            assert process.stdout is not None
            process.stdout.readline()
            symbolizer.remember(process.pid)
            lines = [line.split(" ", 2) for line in path.read_text().splitlines()]
            latest = {int(start, 16): (int(size, 16), name) for start, size, name in lines}
            hot = [start for start, (_, name) in latest.items() if "*hotFunction" in name]
            assert hot
            for start in hot:
                found = frame(symbolizer, process.pid, start + 1)
                assert found.symbol is not None
                assert re.match(r"(JS|LazyCompile):\*hotFunction", found.symbol)
                assert (found.module, found.space) == ("[jit]", "jit")
            mapped = [
                item
                for item in symbolizer.user(
                    process.pid, addresses(*(start for start in latest if start > 1 << 20))
                )
                if item.space == "jit"
            ]
            assert len(mapped) > 20
            assert all(item.symbol for item in mapped)
        finally:
            process.kill()
            path.unlink(missing_ok=True)


@pytest.mark.kernel
def test_redis_and_its_libraries(symbolizer, tmp_path):
    server = need("redis-server")
    socket = tmp_path / "redis.sock"
    with subprocess.Popen(
        [server, "--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", str(tmp_path)],
        stdout=subprocess.DEVNULL,
    ) as process:
        try:
            for _ in range(200):
                if socket.exists():
                    break
                time.sleep(0.05)
            maps = [
                line.split(maxsplit=5)
                for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines()
                if " r-xp " in line and "/" in line
            ]
            assert len(maps) > 3
            symbolizer.remember(process.pid)
            rng, demangler = np.random.default_rng(5), Demangler()
            for span, _, offset, _, _, path in maps:
                low, high = (int(part, 16) for part in span.split("-"))
                addrs = rng.integers(low, high, 300, dtype=np.uint64)
                oracle = Functions(Path(path))
                segment = code_segment(Path(path), int(offset, 16))
                for addr, found in zip(
                    addrs.tolist(), symbolizer.user(process.pid, addrs), strict=True
                ):
                    assert found.module == Path(path).name
                    vaddr = addr - low + int(offset, 16) - segment[0] + segment[1]
                    names = {demangler(name.encode()).decode() for name in oracle.at(vaddr)}
                    if names:
                        assert found.symbol in names
        finally:
            process.kill()


def code_segment(path: Path, offset: int) -> tuple[int, int]:
    """(file offset, virtual address) of the loadable segment a mapping shows, by readelf."""
    out = subprocess.run(["readelf", "-lW", str(path)], check=True, capture_output=True, text=True)
    for line in out.stdout.splitlines():
        fields = line.split()
        if fields[:1] == ["LOAD"] and int(fields[1], 16) // 4096 == offset // 4096:
            return int(fields[1], 16), int(fields[2], 16)
    raise AssertionError(f"no segment of {path} at {offset:#x}")


@pytest.mark.kernel
def test_cxx_and_rust_programs_are_readable(symbolizer, tmp_path):
    cxx = tmp_path / "program.cc"
    cxx.write_text(
        SAMPLE.read_text().replace("first_function", "ns_first")
        .replace("__attribute__((noinline)) int ns_first(int x)",
                 "namespace ns { template <int N> __attribute__((noinline)) int f(int x) "
                 "{ return x * N + getpid(); } }\n"
                 "__attribute__((noinline)) int ns_first(int x)")
        .replace("return x * 3 + getpid();", "return ns::f<3>(x);")
        .replace('printf("ns_first %p\\n", (void *)ns_first);',
                 'printf("ns_first %p\\n", (void *)ns::f<3>);')
    )  # fmt: skip
    with running(build(cxx, tmp_path / "cxx", "-fpermissive", "-w", compiler="g++")) as (pid, out):
        found = frame(symbolizer, pid, out["ns_first"])
        assert found == Frame("int ns::f<3>(int)", "cxx", 0, "user")
    rust = tmp_path / "program.rs"
    rust.write_text(
        "mod inner { pub struct S<T>(pub T); impl<T: Copy + Into<u64>> S<T> {\n"
        "  #[inline(never)] pub fn get(&self) -> u64 { self.0.into() } } }\n"
        "fn main() { let s = inner::S(7u32); let f: fn(&inner::S<u32>) -> u64 = inner::S::get;\n"
        '  println!("get {:#x}", f as usize); println!("value {}", f(&s));\n'
        "  loop { std::thread::park(); } }\n"
    )
    command = [need("rustc"), "-O", "-o", str(tmp_path / "rust"), str(rust)]
    subprocess.run(command, check=True, capture_output=True)
    with running(tmp_path / "rust") as (pid, out):
        found = frame(symbolizer, pid, out["get"])
        assert found.module == "rust"
        # In the v0 scheme, and in the older one, which does not tell types.
        assert found.symbol in ("<program::inner::S<u32>>::get", "program::inner::S<T>::get")


# --- a worker that dies ------------------------------------------------------------------------


def test_a_process_whose_files_kill_the_worker_is_distrusted(tmp_path):
    """Its own symbols are lost; those of others are not."""
    code = (
        "import os, socket, sys; s = socket.socket(fileno=int(sys.argv[1])); s.recv(9); os._exit(1)"
    )
    symbolizer = Symbolizer(worker=Worker(command=(sys.executable, "-c", code)))
    program = build(SAMPLE, tmp_path / "sample")
    library = build_library(tmp_path)
    with running(program, library) as (pid, printed):
        frames = symbolizer.user(pid, addresses(*printed.values()))
        assert [item.symbol for item in frames] == [None] * len(printed)
        assert {item.module for item in frames} == {"sample", "libsample.so"}
        stats: dict[str, Any] = symbolizer.stats
        assert stats["worker"]["deaths"] == 2
        assert stats["files"]["failed"] == {"the worker died": 2}
        # A file that failed is not tried again.
        symbolizer.user(pid, addresses(printed["main"] + 1))
        assert symbolizer.stats["worker"]["deaths"] == 2
    symbolizer.close()


class Dying(Worker):
    """A worker that every name ends."""

    asked = 0

    def demangle(self, names: Sequence[bytes]) -> list[bytes]:
        self.asked += 1
        self.deaths += 1
        return list(names)


def test_a_process_whose_names_end_the_worker_is_distrusted(tmp_path):
    source = tmp_path / "named.c"
    lines = [f'int f{at}(void) __asm__("_Z2f{at}v"); int f{at}(void) {{ return {at}; }}'
             for at in range(6)]  # fmt: skip
    lines += ["#include <stdio.h>", "#include <unistd.h>", "int main(void) {"]
    lines += [f'printf("f{at} %p\\n", (void *)f{at});' for at in range(6)]
    source.write_text("\n".join([*lines, 'puts("value 0"); fflush(stdout); pause(); }']))
    dying = Dying()
    symbolizer = Symbolizer(worker=dying)
    with running(build(source, tmp_path / "named")) as (pid, printed):
        found = [frame(symbolizer, pid, addr).symbol for addr in printed.values()]
    assert found == [f"_Z2f{at}v" for at in range(6)]
    assert dying.asked == DEATHS_LIMIT
    symbolizer.close()


@pytest.mark.parametrize("method", ["user", "kernel"])
def test_order_and_repeats_are_kept(symbolizer, method):
    call: Callable[..., list[Frame]] = getattr(symbolizer, method)
    here = ctypes.cast(ctypes.CDLL(None).getpid, ctypes.c_void_p).value or 0
    arguments = (os.getpid(),) if method == "user" else ()
    mixed = addresses(here, 7, here, 2**64 - 1, 0, 7)
    frames = call(*arguments, mixed)
    assert len(frames) == 6
    assert frames[0] == frames[2]
    assert frames[1] == frames[5]
    assert call(*arguments, mixed) == frames
    assert call(*arguments, addresses()) == []
