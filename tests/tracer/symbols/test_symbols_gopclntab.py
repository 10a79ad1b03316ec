"""Names of stripped Go programs are those that its own tools give the unstripped one."""

from __future__ import annotations

import os
import re
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from symbols_tools import need

from latrace.tracer.symbols.elf import FdSource, read_image
from latrace.tracer.symbols.gopclntab import PclntabError, read_functions
from latrace.tracer.symbols.table import Image

PROGRAM = """
package main

import "fmt"

//go:noinline
func double(n int) int { return 2 * n }

func main() { fmt.Println(double(21)) }
"""


def built(folder: Path, name: str, *flags: str) -> Image:
    need("go")
    (folder / "main.go").write_text(PROGRAM)
    command = ["go", "build", *flags, "-o", folder / name, folder / "main.go"]
    environment = os.environ | {"GOCACHE": str(folder / "cache"), "CGO_ENABLED": "0"}
    subprocess.run(command, check=True, env=environment, cwd=folder)
    fd = os.open(folder / name, os.O_RDONLY)
    try:
        return read_image(FdSource(fd))
    finally:
        os.close(fd)


def written(name: str) -> str:
    """As the runtime itself writes it: without the ABI, and without what a type stands for."""
    return re.sub(r"\[.*\]", "[...]", name.removesuffix(".abi0"))


def test_a_stripped_program_has_the_names_of_the_other(tmp_path: Path) -> None:
    full = built(tmp_path, "full")
    assert full.symtab
    for name, flags in (("stripped", ()), ("pie", ("-buildmode=pie",))):
        stripped = built(tmp_path, name, *flags, "-ldflags=-s -w")
        assert not stripped.symtab
        assert len(stripped.symbols) > 1000
        names = {text.decode() for text in stripped.symbols.all_names()}
        assert {"main.main", "main.double", "runtime.morestack"} <= names
    listed = subprocess.check_output(["go", "tool", "nm", tmp_path / "full"], text=True)
    lines = [line.split(None, 2) for line in listed.splitlines()]
    code = [(int(line[0], 16), line[2]) for line in lines if len(line) == 3 and line[1] in "Tt"]
    stripped = built(tmp_path, "stripped", "-ldflags=-s -w")
    where = stripped.symbols.lookup(np.array([address for address, _ in code], np.uint64))
    found = {
        (written(name), written(stripped.symbols.name(index).decode()) if index >= 0 else "")
        for (_, name), index in zip(code, where.tolist(), strict=True)
    }
    wrong = [pair for pair in found if pair[0] != pair[1]]
    # Marks of the linker that are no functions.
    assert len(wrong) <= 0.01 * len(found), wrong


def section(path: Path) -> bytes:
    out = path.with_suffix(".pclntab")
    subprocess.run(["objcopy", "-O", "binary", "--only-section=.gopclntab", path, out], check=True)
    return out.read_bytes()


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("go")
    built(folder, "program")
    return section(folder / "program")


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_damaged_table_is_refused_or_bounded(table: bytes, data: st.DataObject) -> None:
    damaged = bytearray(table)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, 80) | st.integers(0, len(table) - 8))
        struct.pack_into("<Q", damaged, at, data.draw(st.integers(0, 2**64 - 1)))
    cut = data.draw(st.integers(0, len(table)))
    for raw in (bytes(damaged), table[:cut]):
        try:
            functions = read_functions(raw, "<", 0x401000)
        except PclntabError:
            continue
        assert (functions.starts[1:] > functions.starts[:-1]).all()
        assert (functions.ends > functions.starts).all()
        assert all(len(name) <= 4096 for name in functions.all_names())


def test_what_is_no_table() -> None:
    for raw in (
        b"",
        b"\xf0\xff\xff\xff",
        b"\0" * 4096,
        b"\xf0\xff\xff\xff\0\0\x01\x08" + b"\xff" * 64,
    ):
        with pytest.raises(PclntabError):
            read_functions(raw, "<", 0)
