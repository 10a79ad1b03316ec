"""Inlined functions by DWARF, held against addr2line and llvm-symbolizer at every address."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from symbols_tools import WORKLOADS, build, need, open_to_all, worker

from latrace.tracer.symbols import wire
from latrace.tracer.symbols.client import Worker, WorkerError
from latrace.tracer.symbols.dwarf import Libdw
from latrace.tracer.symbols.elf import FdSource, read_links

C, CXX = WORKLOADS / "inlined.c", WORKLOADS / "inlined.cc"
LIBDW = Libdw()
pytestmark = pytest.mark.skipif(not LIBDW.available, reason="needs libdw1")

Chains = list[list[str]]


@cache
def folder() -> tempfile.TemporaryDirectory[str]:
    """For programs that several tests look at and none changes."""
    return tempfile.TemporaryDirectory(prefix="latrace-dwarf-")


@cache
def program(source: Path, *options: str) -> Path:
    """A program with DWARF, built once."""
    compiler = "g++" if source.suffix == ".cc" else "gcc"
    target = Path(folder().name, "-".join((source.name, *options)).replace("/", "_"))
    return build(source, target, "-O2", "-g", *options, compiler=compiler)


def section(file: Path, name: str) -> tuple[int, int] | None:
    """Address and size of a section by readelf."""
    command = [need("readelf"), "-SW", str(file)]
    for line in subprocess.run(command, check=True, capture_output=True, text=True).stdout.split(
        "\n"
    ):
        fields = line.partition("]")[2].split()
        if fields[:1] == [name]:
            return int(fields[2], 16), int(fields[4], 16)
    return None


def addresses_of(file: Path, step: int = 1) -> list[int]:
    """Addresses all over the code of a file."""
    text = section(file, ".text")
    assert text is not None
    return list(range(text[0], sum(text), step))


def ours(file: Path, addresses: Sequence[int], alt: Path | None = None) -> Chains:
    fds = [os.open(one, os.O_RDONLY) for one in (file, alt) if one is not None]
    try:
        found = LIBDW.chains(fds[0], addresses, alt=fds[1] if alt else None)
    finally:
        for fd in fds:
            os.close(fd)
    return [[name.decode() for name in chain] for chain in found]


def by_addr2line(file: Path, addresses: Sequence[int]) -> Chains:
    command = [need("addr2line"), "-i", "-f", "-a", "-e", str(file)]
    text = "\n".join(map(hex, addresses))
    out = subprocess.run(command, check=True, capture_output=True, text=True, input=text).stdout
    chains: Chains = []
    is_name = True
    for line in out.splitlines():
        if line.startswith("0x"):
            chains.append([])
            is_name = True
            continue
        if is_name:
            chains[-1].append(line)
        is_name = not is_name
    return chains


def by_llvm(file: Path, addresses: Sequence[int]) -> Chains:
    tool = shutil.which("llvm-symbolizer")
    if tool is None:
        return []
    command = [tool, "--inlines", "--functions=linkage", "--no-demangle", "-e", str(file)]
    text = "\n".join(map(hex, addresses))
    out = subprocess.run(command, check=True, capture_output=True, text=True, input=text).stdout
    return [block.splitlines()[::2] for block in out.split("\n\n") if block.strip()]


def equal(found: list[str], told: list[str]) -> bool:
    """Ours may say more: the scopes of what has no linkage name."""
    pairs = list(zip(found, told, strict=False))
    return len(found) == len(told) and all(a == b or a.endswith("::" + b) for a, b in pairs)


def compare(file: Path, addresses: Sequence[int], alt: Path | None = None) -> int:
    """See that all say the same; returns at how many addresses something is inlined.

    Both tools put a symbol of the symbol table in the place of one name: addr2line of the innermost
    and the outermost, llvm-symbolizer of the outermost function.
    """
    found = ours(file, addresses, alt)
    assert len(found) == len(addresses)
    for address, chain, told in zip(addresses, found, by_addr2line(file, addresses), strict=True):
        assert len(chain) == len(told) or (not chain and len(told) == 1), hex(address)
        assert equal(chain[1:-1], told[1:-1]) or not chain, hex(address)
    llvm = by_llvm(file, addresses)
    for address, chain, told in zip(addresses, found, llvm, strict=bool(llvm)):
        assert equal(chain[:-1], told[:-1]) or not chain, hex(address)
    return sum(len(chain) > 1 for chain in found)


OPTIONS = {
    "dwarf 4": ("-gdwarf-4",),
    "dwarf 5": ("-gdwarf-5",),
    "compressed": ("-gz",),
    "sections": ("-ffunction-sections", "-fno-pie", "-no-pie"),
    "lto": ("-flto",),
}


@pytest.mark.parametrize("source", [C, CXX], ids=["c", "c++"])
@pytest.mark.parametrize("kind", OPTIONS)
def test_every_address_has_the_chain_that_others_find(source, kind):
    file = program(source, *OPTIONS[kind])
    inlined = compare(file, addresses_of(file))
    assert inlined > (100 if source is C else 4000)


def test_a_chain_by_name():
    file = program(C)
    chains = {tuple(chain) for chain in ours(file, addresses_of(file))}
    assert ("nap", "step", "work") in chains
    assert ("mix", "digest", "both") in chains
    assert ("mix", "both") in chains
    assert ("main",) in chains
    assert not any(chain[-1] in ("nap", "step", "mix") for chain in chains if chain)


def test_functions_without_a_linkage_name_have_their_scopes():
    file = program(CXX)
    names = {name for chain in ours(file, addresses_of(file)) for name in chain}
    assert {"(anonymous namespace)::helper", "deep::total", "_ZNK4deep5State3getEi"} <= names
    assert any(name.startswith("main::{lambda}::operator()<") for name in names)


@pytest.mark.parametrize("source", [C, CXX], ids=["c", "c++"])
def test_without_an_index_of_addresses(tmp_path, source):
    """As clang writes it."""
    file = program(source)
    bare = tmp_path / "bare"
    command = [need("objcopy"), "-R", ".debug_aranges", str(file), str(bare)]
    subprocess.run(command, check=True)
    assert section(file, ".debug_aranges") and not section(bare, ".debug_aranges")
    wanted = addresses_of(file)
    assert ours(bare, wanted) == ours(file, wanted)


def test_a_separate_debug_file_says_the_same(tmp_path):
    file = program(CXX)
    debug, stripped = tmp_path / "program.debug", tmp_path / "stripped"
    subprocess.run([need("objcopy"), "--only-keep-debug", str(file), str(debug)], check=True)
    subprocess.run([need("strip"), "-o", str(stripped), str(file)], check=True)
    wanted = addresses_of(file)
    assert ours(debug, wanted) == ours(file, wanted)
    fds = [os.open(one, os.O_RDONLY) for one in (file, debug, stripped)]
    links = [read_links(FdSource(fd)) for fd in fds]
    assert [one.dwarf for one in links] == [True, True, False]
    assert len({one.build_id for one in links}) == 1 and links[0].build_id
    for fd in fds:
        os.close(fd)


def test_what_dwz_put_aside_is_found_in_its_file(tmp_path):
    """As Debian's debug packages have it: abstract functions are in a file of their own."""
    files = []
    for name in ("one", "two"):
        files.append(tmp_path / name)
        shutil.copy(program(CXX), files[-1])
    wanted = addresses_of(files[0])
    before = ours(files[0], wanted)
    common = tmp_path / "common.debug"
    command = [need("dwz"), "-m", str(common), "-M", str(common), *map(str, files)]
    subprocess.run(command, check=True, capture_output=True)
    fd = os.open(files[0], os.O_RDONLY)
    links = read_links(FdSource(fd))
    os.close(fd)
    assert links.altlink == str(common).encode()
    fd = os.open(common, os.O_RDONLY)
    assert read_links(FdSource(fd)).build_id == links.alt_build_id
    os.close(fd)
    assert ours(files[0], wanted, common) == before


def test_rust(tmp_path):
    source = tmp_path / "sample.rs"
    source.write_text(
        "trait Area { fn area(&self) -> usize; }\n"
        "struct Words<T> { all: Vec<T> }\n"
        "impl Area for Words<String> { fn area(&self) -> usize {\n"
        "    self.all.iter().map(|w| w.len()).filter(|n| n % 2 == 0).sum() } }\n"
        "fn main() { let mut w = Words { all: std::env::args().collect::<Vec<_>>() };\n"
        '    w.all.sort(); println!("{} {:?}", w.area(), w.all.iter().rev().next()); }\n'
    )
    for scheme in (["-C", "symbol-mangling-version=v0"], []):
        file = tmp_path / f"sample-{len(scheme)}"
        options = ["-O", "-g", *scheme]
        built = subprocess.run(
            [need("rustc"), *options, "-o", str(file), str(source)],
            check=False,
            capture_output=True,
        )
        if built.returncode:
            pytest.skip("rustc does not build here")
        assert compare(file, addresses_of(file, 37)) > 1000


def test_go(tmp_path):
    source = tmp_path / "main.go"
    source.write_text(
        'package main\nimport ("fmt"; "sort"; "strings")\n'
        'func main() { x := strings.Fields("c b a"); sort.Strings(x); fmt.Println(x) }\n'
    )
    home = {**os.environ, "HOME": str(tmp_path), "GO111MODULE": "off", "GOFLAGS": ""}
    file = tmp_path / "main"
    subprocess.run([need("go"), "build", "-o", str(file), str(source)], check=True, env=home)
    assert compare(file, addresses_of(file, 61)) > 1000


# --- through the worker ---------------------------------------------------------------------------


def ask(
    running: Worker, file: Path, addresses: Sequence[int], build_id: bytes | None = None
) -> Chains | int:
    fd = os.open(file, os.O_RDONLY)
    try:
        if build_id is None:
            links = running.links(fd)
            if isinstance(links, int):
                return links
            build_id = links.build_id
        answer = running.chains(fd, addresses, alt=None, build_id=build_id)
        if isinstance(answer, int):
            return answer
        chains, names = answer
        texts = [name.decode("utf-8", "backslashreplace") for name in names]
        return [[texts[place] for place in chain] for chain in chains]
    finally:
        os.close(fd)


def test_the_worker_says_the_same():
    file = program(CXX)
    wanted = [*addresses_of(file), 0, 2**64 - 1, addresses_of(file)[0]]
    with worker() as running:
        assert ask(running, file, wanted) == ours(file, wanted)
        assert ask(running, file, []) == []
        # It can be asked for more than it may have open.
        for _ in range(20):
            assert ask(running, file, wanted[:1]) == ours(file, wanted[:1])
        assert (running.starts, running.deaths, running.timeouts) == (1, 0, 0)


def test_another_build_and_a_file_without_dwarf_are_refused(tmp_path):
    file = program(C)
    stripped = tmp_path / "stripped"
    subprocess.run([need("strip"), "-o", str(stripped), str(file)], check=True)
    with worker() as running:
        assert ask(running, file, [1], b"another build") == wire.STATUS_MISMATCH
        assert ask(running, stripped, [1]) == wire.STATUS_BAD_FILE
        stripped.write_bytes(b"\x7fELF" + bytes(1000))
        assert ask(running, stripped, [1]) == wire.STATUS_BAD_FILE
        assert running.deaths == 0


WITHOUT = """
from latrace.tracer.symbols import dwarf, worker
dwarf.LIBRARY = "libdw.so.none"
worker.main()
"""


def test_without_libdw_that_is_the_answer():
    file = program(C)
    with worker(command=(sys.executable, "-c", WITHOUT)) as running:
        assert ask(running, file, [1]) == wire.STATUS_NO_LIBDW
        assert running.demangle([b"_Z1fi"]) == [b"f(int)"]


@pytest.fixture
def public_folder() -> Iterator[Path]:
    with open_to_all() as folder:
        yield folder


def test_dwarf_that_names_another_file_does_not_make_the_worker_open_it(tmp_path, public_folder):
    """libdw would open what the link names: a pipe, for one, that nobody writes to."""
    pipe = public_folder / "pipe"
    os.mkfifo(pipe)
    pipe.chmod(0o666)
    files = []
    for name in ("one", "two"):
        files.append(tmp_path / name)
        shutil.copy(program(CXX), files[-1])
    common = tmp_path / "pipe.debug"
    command = [need("dwz"), "-m", str(common), "-M", str(pipe), *map(str, files)]
    subprocess.run(command, check=True, capture_output=True)
    with worker() as running:
        began = time.monotonic()
        found = ask(running, files[0], addresses_of(files[0], 16))
        assert isinstance(found, list) and any(found)
        assert time.monotonic() - began < 10
        assert (running.deaths, running.timeouts) == (0, 0)


def damaged(data: bytes, spans: Sequence[tuple[int, int]], random_: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(random_.choice((1, 4, 64))):
        begin, size = random_.choice(spans)
        changed[begin + random_.randrange(size)] = random_.choice((0, 1, 0x7F, 0x80, 0xFF, 0x2E))
    return bytes(changed)


def debug_spans(file: Path) -> list[tuple[int, int]]:
    """Offsets and sizes of what DWARF is made of."""
    command = [need("readelf"), "-SW", str(file)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    fields = [line.partition("]")[2].split() for line in out.splitlines()]
    return [(int(one[3], 16), int(one[4], 16)) for one in fields if one and ".debug_" in one[0]]


@pytest.mark.parametrize("version", [4, 5])
def test_damaged_dwarf_costs_no_more_than_the_answer(tmp_path, version):
    file = program(CXX, f"-gdwarf-{version}")
    wanted = addresses_of(file, 61)
    data, spans = file.read_bytes(), debug_spans(file)
    random_ = random.Random(version)  # noqa: S311 - damage, the same each time
    answers = 0
    hurt = tmp_path / "hurt"
    with worker() as running:
        build_id = read_build_id(file)
        for _ in range(150):
            hurt.write_bytes(damaged(data, spans, random_))
            began = time.monotonic()
            try:
                found = ask(running, hurt, wanted, build_id)
            except WorkerError:
                found = []
            assert time.monotonic() - began < 40
            answers += isinstance(found, list) and any(found)
        # Most damage is to what nobody looks at.
        assert answers > 30
        assert ask(running, file, wanted) == ours(file, wanted)


def read_build_id(file: Path) -> bytes:
    fd = os.open(file, os.O_RDONLY)
    found = read_links(FdSource(fd)).build_id
    os.close(fd)
    return found


# --- what the worker may say ----------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_replies_are_refused_or_harmless(data):
    reply = bytearray(b"".join(wire.chains_reply([[b"a", b"main"], [], [b"b", b"a", b"main"]])))
    for at in data.draw(st.lists(st.integers(0, len(reply) - 1), min_size=1, max_size=4)):
        reply[at] = data.draw(st.integers(0, 255))
    position = 0

    def read(length: int) -> bytes:
        nonlocal position
        piece = bytes(reply[position : position + length])
        if len(piece) < length:
            raise EOFError
        position += length
        return piece

    try:
        found = wire.read_chains(read, 3)
    except (wire.WireError, EOFError):
        return
    if not isinstance(found, int):
        chains, names = found
        assert len(chains) == 3
        assert all(0 <= place < len(names) for chain in chains for place in chain)
