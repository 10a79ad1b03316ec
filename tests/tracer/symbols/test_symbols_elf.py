"""Functions of real ELF files against readelf and gdb, and of damaged ones against nothing."""

from __future__ import annotations

import lzma
import os
import random
import shutil
import struct
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from symbols_tools import SAMPLE, U64, Functions, addresses, build, build_library, libc, need

from latrace.tracer.symbols.elf import BytesSource, ElfError, FdSource, read_image
from latrace.tracer.symbols.frames import NAME_LIMIT
from latrace.tracer.symbols.table import Image


def image_of(path: Path) -> Image:
    fd = os.open(path, os.O_RDONLY)
    try:
        return read_image(FdSource(fd))
    finally:
        os.close(fd)


def code_addresses(image: Image, count: int, seed: int = 1) -> U64:
    """Random virtual addresses in the executable segments."""
    rng = np.random.default_rng(seed)
    spans = [row for row in image.segments.tolist() if row[3] & 1]
    parts = [
        rng.integers(vaddr, vaddr + size, count // len(spans), dtype=np.uint64)
        for _offset, size, vaddr, _flags in spans
    ]
    return np.concatenate(parts)


def names_at(image: Image, addrs: U64) -> list[str | None]:
    return [
        image.symbols.name(index).decode() if index >= 0 else None
        for index in image.symbols.lookup(addrs).tolist()
    ]


def disagreements(image: Image, oracle: Functions, addrs: U64) -> list[tuple[str, object, object]]:
    wrong = []
    for addr, name in zip(addrs.tolist(), names_at(image, addrs), strict=True):
        if name is not None and name.endswith("@plt"):
            continue
        names = oracle.at(addr)
        # What is claimed for a function without a size has tests of its own.
        if (name in names) if names else (name is None or name in oracle.unsized):
            continue
        wrong.append((hex(addr), name, names))
    return wrong


@pytest.fixture(scope="module", params=["pie", "no-pie", "static", "m-stripped"])
def sample(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {
        "pie": ["-pie", "-fPIE"],
        "no-pie": ["-no-pie"],
        "static": ["-static", "-DWITHOUT_DLOPEN"],
        "m-stripped": ["-rdynamic", "-s"],
    }[request.param]
    return build(SAMPLE, tmp_path_factory.mktemp("elf") / request.param, *options)


def test_a_compiled_program_agrees_with_readelf(sample):
    image, oracle = image_of(sample), Functions(sample)
    assert len(oracle) > 3
    edges = np.concatenate(
        (oracle.starts, oracle.starts + oracle.sizes, oracle.starts + oracle.sizes - np.uint64(1))
    )
    addrs = np.concatenate((code_addresses(image, 4000), edges))
    assert disagreements(image, oracle, addrs) == []


def test_libc_agrees_with_readelf():
    image, oracle = image_of(libc()), Functions(libc())
    assert len(oracle) > 1000
    addrs = np.concatenate((code_addresses(image, 4000), oracle.starts))
    assert disagreements(image, oracle, addrs) == []


def test_node_agrees_with_readelf():
    node = Path(os.path.realpath(need("node")))
    image, oracle = image_of(node), Functions(node)
    if len(oracle) < 1000:
        pytest.skip("this node has no symbols of its own")
    addrs = np.concatenate((code_addresses(image, 3000), oracle.starts[:: len(oracle) // 1000]))
    assert disagreements(image, oracle, addrs) == []


def gdb_symbols(path: Path, addrs: U64, folder: Path) -> list[tuple[str, int] | None]:
    """(name, start) by gdb's `info symbol`, None where it knows none."""
    script = folder / "commands"
    script.write_text("".join(f"info symbol {addr:#x}\n" for addr in addrs.tolist()))
    out = subprocess.run(
        [
            need("gdb"),
            "-nx",
            "-batch",
            "-iex",
            "set debug-file-directory /nonexistent",
            "-ex",
            "set print asm-demangle off",
            "-x",
            str(script),
            str(path),
        ],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    found: list[tuple[str, int] | None] = []
    lines = [line for line in out.splitlines() if " in section " in line or "No symbol" in line]
    for line, addr in zip(lines, addrs.tolist(), strict=True):
        if line.startswith("No symbol"):
            found.append(None)
            continue
        name, _, rest = line.partition(" in section ")[0].partition(" + ")
        found.append((name, addr - int(rest or 0)))
    return found


@pytest.mark.parametrize("which", ["program", "libc"])
def test_gdb_says_the_same(which, tmp_path):
    path = libc() if which == "libc" else build(SAMPLE, tmp_path / "sample", "-no-pie")
    image = image_of(path)
    addrs = code_addresses(image, 2000)
    if which == "libc":
        # In .plt gdb names the slots of relative relocations after their targets.
        functions = image.symbols.starts[image.symbols.lookup(addrs)]
        addrs = addrs[functions > 0]
    indices = image.symbols.lookup(addrs)
    wrong = []
    for addr, index, theirs in zip(
        addrs.tolist(), indices.tolist(), gdb_symbols(path, addrs, tmp_path), strict=True
    ):
        if index < 0:
            # gdb takes labels without type for functions as well; they are not.
            continue
        start = int(image.symbols.starts[index])
        if theirs is None or theirs[1] != start:
            wrong.append((hex(addr), image.symbols.name(index), theirs))
    assert wrong == []
    assert (indices >= 0).mean() > 0.2


def test_nothing_is_claimed_in_the_hole_behind_a_function(tmp_path):
    path = build(SAMPLE, tmp_path / "sample", "-no-pie")
    image, oracle = image_of(path), Functions(path)
    outer, inner = oracle.start_of("outer_function"), oracle.start_of("inner_function")
    assert names_at(image, addresses(outer, inner, inner + 15, inner + 16, outer + 80)) == [
        "outer_function",
        "inner_function",
        "inner_function",
        "outer_function",
        "outer_function",
    ]
    assert names_at(image, addresses(outer + 81, outer + 81 + 60)) == [None, None]


def test_a_function_without_size_ends_at_the_next_one(tmp_path):
    path = build(SAMPLE, tmp_path / "sample", "-no-pie")
    image, oracle = image_of(path), Functions(path)
    unsized, following = oracle.start_of("unsized_function"), oracle.start_of("outer_function")
    assert names_at(image, addresses(unsized, following - 1)) == ["unsized_function"] * 2
    finish = oracle.start_of("_fini")
    out = subprocess.run(["readelf", "-SW", str(path)], check=True, capture_output=True, text=True)
    size = next(
        int(line.split(".fini", 1)[1].split()[3], 16)
        for line in out.stdout.splitlines()
        if " .fini " in line
    )
    assert names_at(image, addresses(finish, finish + size - 1, finish + size)) == [
        "_fini",
        "_fini",
        None,
    ]


def test_stubs_have_the_name_of_what_they_call(tmp_path):
    path = build_library(tmp_path)
    image = image_of(path)
    out = subprocess.run(
        [
            need("objdump"),
            "-d",
            "--no-show-raw-insn",
            "-j",
            ".plt",
            "-j",
            ".plt.got",
            "-j",
            ".plt.sec",
            str(path),
        ],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    stubs = {
        line.split()[1].strip("<>:"): int(line.split()[0], 16)
        for line in out.splitlines()
        if line.endswith("@plt>:") and "*ABS*" not in line
    }
    assert {"puts@plt", "atoi@plt", "strtol@plt"} & set(stubs)
    assert names_at(image, addresses(*stubs.values())) == list(stubs)


def test_of_several_names_the_plain_one_is_shown():
    image = image_of(libc())
    functions = Functions(libc())
    for name in ("write", "read", "nanosleep", "malloc"):
        start = next(
            (
                int(s)
                for s, names in zip(functions.starts, functions.names, strict=True)
                if name in names
            ),
            None,
        )
        assert start is not None
        assert names_at(image, addresses(start)) == [name]


def test_the_build_id_is_that_of_readelf(tmp_path):
    path = build(SAMPLE, tmp_path / "sample", "-Wl,--build-id=0xfeedfacecafe")
    assert image_of(path).build_id.hex() == "feedfacecafe"
    without = build(SAMPLE, tmp_path / "without", "-Wl,--build-id=none")
    assert image_of(without).build_id == b""


def test_a_compressed_symbol_table_in_the_file_is_used(tmp_path):
    path = build(SAMPLE, tmp_path / "sample", "-no-pie")
    packed = tmp_path / "packed"
    packed.write_bytes(lzma.compress(path.read_bytes()))
    stripped = tmp_path / "stripped"
    for command in (
        ["strip", "-o", str(stripped), str(path)],
        ["objcopy", "--add-section", f".gnu_debugdata={packed}", str(stripped)],
    ):
        subprocess.run(command, check=True)
    start = Functions(path).start_of("static_function")
    assert names_at(image_of(stripped), addresses(start)) == ["static_function"]


def test_32_bit_and_big_endian_headers_are_understood():
    """Made by hand, since no compiler for them is at hand."""
    strings = b"\0here\0"
    body = struct.pack(">IIIBBH", 1, 0x8000, 16, 2, 0, 1)
    shoff = 52 + 32 + len(strings) + 2 + len(body)
    header = (
        b"\x7fELF\x01\x02\x01"
        + bytes(9)
        + struct.pack(">HHIIIIIHHHHHH", 2, 8, 1, 0x8000, 52, shoff, 0, 52, 32, 1, 40, 3, 0)
    )
    segment = struct.pack(">IIIIIIII", 1, 0, 0x8000, 0x8000, 4096, 4096, 5, 4096)
    at = 52 + 32

    def section(kind: int, offset: int, size: int, link: int, entsize: int) -> bytes:
        return struct.pack(">IIIIIIIIII", 0, kind, 0, 0, offset, size, link, 0, 1, entsize)

    sections = (
        bytes(40)
        + section(3, at, len(strings), 0, 0)
        + section(2, at + len(strings) + 2, len(body), 1, 16)
    )
    image = read_image(BytesSource(header + segment + strings + b"\0\0" + body + sections))
    assert names_at(image, addresses(0x8000, 0x800F, 0x8010)) == ["here", "here", None]
    assert image.vaddrs(addresses(0x10))[0].tolist() == [0x8010]


# --- hostile files -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return build_library(tmp_path_factory.mktemp("fuzz")).read_bytes()


def survives(data: bytes) -> None:
    """Parsing ends soon, with an image that holds together or with one of its own errors."""
    began = time.process_time()
    try:
        image = read_image(BytesSource(data))
    except ElfError:
        pass
    else:
        table = image.symbols
        assert (table.starts[1:] > table.starts[:-1]).all()
        assert (table.ends > table.starts).all()
        assert all(len(name) <= NAME_LIMIT + 4 for name in table.all_names())
        table.lookup(addresses(0, 0x1100, 2**63, 2**64 - 1))
        image.vaddrs(addresses(0, 0x1100, 2**63, 2**64 - 1))
    # No limit on the time of a machine, but on what grows without bound.
    assert time.process_time() - began < 30


def places(data: bytes) -> list[int]:
    """Offsets where a changed byte hurts: headers and tables, not code."""
    (shoff,) = struct.unpack_from("<Q", data, 40)
    headers = list(range(64 + 56 * 12)) + list(range(shoff, len(data)))
    dynamic = list(range(0x200, 0x600))
    return headers + dynamic


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_changed_bytes_never_escape_the_parser(data, library_bytes):
    changed = bytearray(library_bytes)
    where = st.sampled_from(places(library_bytes))
    for at, value in data.draw(st.lists(st.tuples(where, st.integers(0, 255)), max_size=8)):
        changed[at] = value
    for at in data.draw(st.lists(where, max_size=2)):
        wide = data.draw(st.sampled_from([2**64 - 1, 2**63, 2**32, 0x7FFFFFFF, 0]))
        changed[at : at + 8] = wide.to_bytes(8, "little")[: len(changed) - at]
    survives(bytes(changed[: data.draw(st.sampled_from([len(changed), 64, 120, 4096]))]))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_behind_an_elf_magic(body):
    survives(b"\x7fELF\x02\x01\x01" + body)
    survives(b"\x7fELF\x01\x02\x01" + body)


def hostile(symbols: bytes, strings: bytes) -> bytes:
    """A 64-bit file with just a symbol table; sections 1 holds code at 0x1000, 64 KiB."""
    at = 64
    shoff = at + len(strings) + len(symbols)

    def section(kind: int, offset: int, size: int, *, addr: int = 0, link: int = 0) -> bytes:
        return struct.pack("<IIQQQQIIQQ", 0, kind, 0, addr, offset, size, link, 0, 1, 24)

    table = section(0, 0, 0) + section(1, 0, 0x10000, addr=0x1000)
    table += section(3, at, len(strings))
    table += section(2, at + len(strings), len(symbols), link=2)
    header = (
        b"\x7fELF\x02\x01\x01"
        + bytes(9)
        + struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 0, shoff, 0, 64, 56, 0, 64, 4, 0)
    )
    return header + strings + symbols + table


def symbol(name: int, value: int, size: int, *, section: int = 1, info: int = 0x12) -> bytes:
    return struct.pack("<IBBHQQ", name, info, 0, section, value, size)


def test_a_name_of_a_megabyte_is_cut():
    data = hostile(symbol(1, 0x1000, 16), b"\0" + b"x" * (1 << 20) + b"\0")
    assert names_at(read_image(BytesSource(data)), addresses(0x1000)) == ["x" * NAME_LIMIT]


def test_many_symbols_that_share_a_long_name_are_refused():
    symbols = b"".join(symbol(1, 0x1000 + i, 1) for i in range(60_000))
    data = hostile(symbols, b"\0" + b"x" * 8192 + b"\0")
    with pytest.raises(ElfError):
        read_image(BytesSource(data))


def test_absurd_sizes_end_nowhere_and_wrap_nowhere():
    symbols = symbol(1, 0x1000, 2**64 - 1) + symbol(2, 2**64 - 8, 100) + symbol(3, 0x2000, 0)
    symbols += symbol(4, 0x9_0000, 0) + symbol(5, 0x2100, 0, section=200)
    image = read_image(BytesSource(hostile(symbols, b"\0abcdefgh\0")))
    assert names_at(image, addresses(0x1000, 0xFFF, 2**64 - 9, 2**64 - 8, 0x2000)) == [
        "abcdefgh",
        None,
        "abcdefgh",
        "bcdefgh",
        "cdefgh",
    ]
    # Unsized: not beyond its section, and none at all in a section that does not exist.
    assert b"defgh" not in image.symbols.all_names()
    assert b"efgh" not in image.symbols.all_names()


def test_symbols_and_names_out_of_bounds_are_left_out():
    symbols = symbol(2**32 - 1, 0x1000, 16) + symbol(0, 0x1100, 16) + symbol(1, 0x1200, 16)
    image = read_image(BytesSource(hostile(symbols, b"\0ok")))
    assert image.symbols.all_names() == [b"ok"]


def test_thousands_of_linkage_tables_take_little_time():
    """Each of them is the same megabyte of the file."""
    names, strings = b"\0.plt\0", b"\0f\0"
    parts = [names, strings, symbol(1, 0x1000, 16) * 2, struct.pack("<QIIq", 0x2000, 7, 1, 0)]
    parts.append((b"\xff\x25" + bytes(14)) * (1 << 16))
    at = [64 + sum(map(len, parts[:number])) for number in range(len(parts) + 1)]

    def section(number: int, kind: int, entry: int = 0, link: int = 0, name: int = 0) -> bytes:
        place = (at[number], len(parts[number]))
        return struct.pack("<IIQQQQIIQQ", name, kind, 0, 0x10000, *place, link, 0, 1, entry)

    table = bytes(64) + section(0, 3) + section(1, 3) + section(2, 11, 24, 2) + section(3, 4, 24)
    table += section(4, 1, 16, 0, 1) * 20_000
    shape = (3, 62, 1, 0, 0, at[-1], 0, 64, 56, 0, 64, 20_005, 1)
    header = b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHIQQQIHHHHHH", *shape)
    began = time.process_time()
    read_image(BytesSource(header + b"".join(parts) + table))
    assert time.process_time() - began < 3


@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"#!/bin/sh\n", b"MZ" + bytes(4096)])
def test_what_is_no_elf_file_is_said_to_be_none(content):
    with pytest.raises(ElfError):
        read_image(BytesSource(content))


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = tmp_path / "shrinking"
    shutil.copy(libc(), path)
    fd = os.open(path, os.O_RDONLY)
    source = FdSource(fd)
    os.truncate(path, 100)
    with pytest.raises(ElfError):
        read_image(source)
    os.close(fd)


def test_random_rubbish_in_all_tables(library_bytes):
    """Heavier damage than a few bytes, from a fixed seed."""
    rng = random.Random(7)  # noqa: S311 - damage need not be secret
    for _ in range(300):
        changed = bytearray(library_bytes)
        for at in rng.sample(places(library_bytes), 200):
            changed[at] = rng.randrange(256)
        survives(bytes(changed))
