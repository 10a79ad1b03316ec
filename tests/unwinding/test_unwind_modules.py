"""A file's table comes from the worker or from the cache, and never from what cannot be trusted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from unwind_modules import module, section_of

from latrace.tracer.symbols.client import Worker
from latrace.tracer.unwinding.cache import TableCache, key_of
from latrace.tracer.unwinding.cfi import compile_section
from latrace.tracer.unwinding.modules import ModuleTables
from latrace.tracer.unwinding.sections import Kind, Place
from latrace.tracer.unwinding.table import UnwindTable

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: only root keeps tables")


@pytest.fixture
def worker() -> Iterator[Worker]:
    running = Worker()
    yield running
    running.close()


@pytest.fixture
def cache(tmp_path: Path) -> TableCache:
    return TableCache(tmp_path / "cache")


def table(tables: ModuleTables, path: Path) -> UnwindTable | str:
    fd = os.open(path, os.O_RDONLY)
    try:
        return tables.table(fd)
    finally:
        os.close(fd)


def program(folder: Path, text: str = "int main(void) { return 0; }", *options: str) -> Path:
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    target = folder / "program"
    command = ["gcc", "-O2", "-x", "c", "-", "-o", str(target), *options]
    subprocess.run(command, check=True, input=text.encode())
    return target


def test_a_table_is_the_one_that_is_made_here(worker: Worker) -> None:
    libgcc = module("libgcc_s.so.1")
    there = table(ModuleTables(worker), libgcc)
    assert isinstance(there, UnwindTable)
    assert there.to_bytes() == compile_section(section_of(libgcc)).to_bytes()


@needs_root
def test_a_table_is_made_once(worker: Worker, cache: TableCache) -> None:
    tables = ModuleTables(worker, cache=cache)
    first, second = (table(tables, module("libgcc_s.so.1")) for _ in range(2))
    assert (tables.made, tables.found) == (1, 1)
    assert isinstance(first, UnwindTable)
    assert isinstance(second, UnwindTable)
    assert first.to_bytes() == second.to_bytes()


@needs_root
def test_each_table_is_made_by_a_worker_of_its_own(worker: Worker, cache: TableCache) -> None:
    started: list[Worker] = []

    def another() -> Worker:
        started.append(Worker())
        return started[-1]

    tables = ModuleTables(worker, cache=cache, another=another)
    for name in ("libgcc_s.so.1", "libm.so.6", "libm.so.6"):
        assert isinstance(table(tables, module(name)), UnwindTable)
    assert [one.starts for one in started] == [1, 1]
    assert [one.pid for one in started] == [None, None]


def test_debug_frame_is_used_where_there_is_no_eh_frame(worker: Worker, tmp_path: Path) -> None:
    options = ("-g", "-fno-asynchronous-unwind-tables", "-nostdlib", "-Wl,-e,main", "-static")
    for packed in ("none", "zlib"):
        path = program(tmp_path, "int main(void) { return 0; }", *options, f"-gz={packed}")
        found = table(ModuleTables(worker), path)
        assert isinstance(found, UnwindTable)
        assert len(found) > 1


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"#!/bin/sh\n", "not a sound ELF file"),
        (b"\x7fELF\x01\x01" + bytes(100), "not a sound ELF file"),
        (b"", "not a sound ELF file"),
    ],
)
def test_other_files_have_no_table(worker: Worker, tmp_path: Path, data: bytes, why: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    assert table(ModuleTables(worker), path) == why


def test_another_machine_has_no_table(worker: Worker, tmp_path: Path) -> None:
    data = bytearray(module("libgcc_s.so.1").read_bytes())
    data[18] = 183  # AArch64
    path = tmp_path / "file"
    path.write_bytes(data)
    assert table(ModuleTables(worker), path) == "not a sound ELF file"


# --- the cache

PLACE = Place(0, 4, Kind.EH_FRAME, False, 0x2000, 0, 0x1000, 0x2000)


def a_table() -> bytes:
    return compile_section(section_of(module("libgcc_s.so.1"), most=2000)).to_bytes()


def test_the_key_is_all_that_a_table_is_made_of() -> None:
    elsewhere = replace(PLACE, offset=99)
    moved = replace(PLACE, address=0x2008)
    assert key_of([PLACE], b"abcd") == key_of([elsewhere], b"abcd")
    assert key_of([PLACE], b"abcd") != key_of([PLACE], b"abce")
    assert key_of([PLACE], b"abcd") != key_of([moved], b"abcd")
    assert key_of([PLACE, moved], b"abcd") != key_of([moved, PLACE], b"abcd")


@needs_root
def test_what_is_damaged_counts_as_missing(cache: TableCache, tmp_path: Path) -> None:
    key, data = key_of([PLACE], b"abcd"), a_table()
    assert cache.find(key) is None
    cache.keep(key, data)
    found = cache.find(key)
    assert found is not None
    assert found.to_bytes() == data
    file = tmp_path / "cache" / key
    whole = file.read_bytes()
    for damaged in (b"", whole[:-1], whole + b"x", whole[:100] + b"x" + whole[101:]):
        file.write_bytes(damaged)
        assert cache.find(key) is None


@needs_root
def test_what_others_can_write_is_not_believed(cache: TableCache, tmp_path: Path) -> None:
    key = key_of([PLACE], b"abcd")
    cache.keep(key, a_table())
    folder = tmp_path / "cache"
    assert folder.stat().st_mode & 0o777 == 0o700
    for path, mode in ((folder / key, 0o666), (folder, 0o777)):
        before = path.stat().st_mode & 0o777
        path.chmod(mode)
        assert cache.find(key) is None
        path.chmod(before)
        assert cache.find(key) is not None
    (folder / key).rename(folder / "other")
    (folder / key).symlink_to("other")
    assert cache.find(key) is None


@needs_root
def test_the_longest_unused_go_first(tmp_path: Path) -> None:
    data = a_table()
    cache = TableCache(tmp_path / "cache", size_limit=3 * len(data) + 200)
    keys = [key_of([PLACE], bytes([number])) for number in range(4)]
    for key in keys[:3]:
        cache.keep(key, data)
        time.sleep(0.01)
    assert cache.find(keys[0]) is not None
    time.sleep(0.01)
    cache.keep(keys[3], data)
    assert [cache.find(key) is not None for key in keys] == [True, False, True, True]


def test_without_a_place_for_it_nothing_is_kept(tmp_path: Path) -> None:
    cache = TableCache(tmp_path / "no" / "such")
    cache.keep(key_of([PLACE], b"abcd"), a_table())
    assert cache.find(key_of([PLACE], b"abcd")) is None


def test_a_table_that_is_being_made_is_given_up(worker: Worker) -> None:
    code = "import sys, time; time.sleep(1000)"
    slow = Worker(command=(sys.executable, "-c", code), file_timeout_s=60)
    tables = ModuleTables(worker, another=lambda: slow)
    timer = threading.Timer(1.0, tables.abandon)
    timer.start()
    began = time.monotonic()
    found = [table(tables, module("libgcc_s.so.1")) for _ in range(2)]
    assert time.monotonic() - began < 20
    timer.join()
    assert found[0] in ("the worker died", "the worker was given up")
    assert found[1] == "the worker was given up"
