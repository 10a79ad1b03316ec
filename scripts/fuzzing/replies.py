"""Replies of the worker, damaged: read from memory, and from a child that lies."""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any, Final
from unittest import mock

import numpy as np
import pyarrow as pa

from latrace.analysis import schema
from latrace.tracer.stacks import Copy, RawStack
from latrace.tracer.symbols import client, wire
from latrace.tracer.symbols.client import Worker, WorkerError
from latrace.tracer.symbols.elf import BytesSource, Links, read_image
from latrace.tracer.symbols.frames import Frame
from latrace.tracer.symbols.table import Image, SymbolTable
from latrace.tracer.unwinding.cfi import compile_section
from latrace.tracer.unwinding.modules import ModuleTables
from latrace.tracer.unwinding.sections import locate
from latrace.tracer.unwinding.table import UnwindTable
from latrace.tracer.unwinding.walker import Walker

from . import programs
from .damage import FILES, damaged
from .elf_files import check_table
from .frames_of_code import check_unwind_table, sections
from .target import Missing, Target, hold

_NAMES: Final = [b"_Z1fi", b"_ZN1a1bEv", b"_RNvC1a1b"]


@functools.cache
def _path() -> str:
    found = (*programs.small(), *programs.real("libc.so.6"))
    if not found:
        raise Missing("no ELF file")
    return found[0]


@functools.cache
def _replies() -> tuple[bytes, ...]:
    """What an honest worker says: images, names, sections, a table, a refusal."""
    source = BytesSource(FILES[_path()])
    image, places = read_image(source), locate(source)
    short = image.symbols
    if len(short) > 40:
        ends = short.name_ends[:40]
        short = SymbolTable(short.starts[:40], short.ends[:40], ends, short.names[: int(ends[-1])])
    linked = Image(image.segments, short, image.symtab, image.build_id, b"link.debug", 7)
    table = compile_section(sections()[0])
    pieces = [
        wire.image_reply(linked),
        wire.names_reply([b"f(int)", b"a::b()", b"a::b"]),
        wire.blobs_reply(b"", table.to_bytes()),
        [wire.failure(wire.STATUS_BAD_FILE)],
        wire.links_reply(Links(b"12345678", True, b"link.debug", b"/usr/lib/debug/alt", b"abcd")),
        wire.chains_reply([[b"inner", b"outer"], [b"outer"]]),
    ]
    if places:
        data = source.read(places[0].offset, min(places[0].size, 2000))
        fields = [{**places[0].as_dict(), "size": len(data)}]
        pieces.append(wire.blobs_reply(json.dumps(fields).encode(), data))
    return tuple(b"".join(parts) for parts in pieces)


def _make(random: Random) -> bytes:
    reply = random.choice(_replies())
    if random.random() < 0.5:  # the sizes that it begins with
        head = damaged(random, reply[: wire.REPLY.size], most=2)
        return head + reply[wire.REPLY.size :]
    return damaged(random, reply, most=4)


class _Stream:
    """A reply in memory, that ends."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def __call__(self, length: int) -> bytes:
        hold(0 <= length <= 1 << 30, f"{length} bytes are asked for")
        piece = self.data[self.at : self.at + length]
        if len(piece) < length:
            raise EOFError
        self.at += length
        return piece


def _check_image(image: Image) -> None:
    check_table(image.symbols)
    hold(b"/" not in image.debuglink and len(image.build_id) <= wire.MAX_ID, "a link or id")


def _check(case: bytes) -> None:
    for read in (
        wire.read_image,
        lambda read: wire.read_names(read, 3),
        wire.read_blobs,
        wire.read_links,
        lambda read: wire.read_chains(read, 2),
    ):
        try:
            found: Any = read(_Stream(case))
        except (wire.WireError, EOFError):
            continue
        if isinstance(found, tuple) and isinstance(found[0], list):
            hold(len(found[0]) == 2, "not a chain for each address")
            places = [place for chain in found[0] for place in chain]
            hold(all(0 <= place < len(found[1]) for place in places), "a name that is not there")
        if isinstance(found, Image):
            _check_image(found)
        elif isinstance(found, list):
            hold(len(found) == 3, "not as many names as were asked for")


# --- a child that lies ----------------------------------------------------------------------------

_LIAR: Final = """
import socket, sys, time
s = socket.socket(fileno=int(sys.argv[2]))
case = open(sys.argv[1], "rb").read()
how, reply = case[0] % 8, case[1:]
try:
    while s.recv(1 << 20):
        if how == 1:
            for at in range(0, len(reply), 7):
                s.sendall(reply[at:at + 7])
        elif how == 2:
            s.sendall(reply * 3)
        elif how == 3:
            s.sendall(reply[:len(reply) // 2]); time.sleep(60)
        elif how == 4:
            s.sendall(reply); break
        else:
            s.sendall(reply)
except OSError:
    pass
"""


def _make_liar(random: Random) -> bytes:
    how = random.choice((0, 0, 0, 1, 2, 3, 4))
    return bytes([how]) + (_make(random) if random.random() < 0.8 else random.choice(_replies()))


def _open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@contextmanager
def _liar(case: bytes) -> Iterator[Worker]:
    with tempfile.NamedTemporaryFile(prefix="latrace-fuzz-") as file:
        file.write(case)
        file.flush()
        command = (sys.executable, "-I", "-S", "-c", _LIAR, file.name)
        worker = Worker(command=command, file_timeout_s=0.3, names_timeout_s=0.3)
        try:
            yield worker
        finally:
            worker.close()
            hold(worker.pid is None, "a child stays")


def _check_liar(case: bytes) -> None:
    before, began = _open_files(), time.monotonic()
    with (
        mock.patch.object(client, "START_TIMEOUT_S", 0.5),
        tempfile.TemporaryFile(prefix="latrace-fuzz-") as file,
        _liar(case) as worker,
        _liar(case) as other,
    ):
        try:
            found = worker.elf(file.fileno())
            hold(isinstance(found, Image | int), "no image")
            if isinstance(found, Image):
                _check_image(found)
        except WorkerError:
            pass
        names = worker.demangle(_NAMES)
        hold(len(names) == len(_NAMES), "not a name for each")
        table = ModuleTables(worker, another=lambda: other).table(file.fileno())
        hold(isinstance(table, UnwindTable | str), "no table and no reason")
        if isinstance(table, UnwindTable):
            check_unwind_table(table)
    hold(_open_files() == before, "descriptors stay open")
    hold(time.monotonic() - began < 60, "it took longer than all limits together")


# --- what is made of a reply that can be read -----------------------------------------------------


class _Told(Worker):
    """A worker that says what it was given."""

    def __init__(self, image: Image | int) -> None:
        super().__init__(command=("/nonexistent",))
        self._image = image

    def elf(self, _fd: int) -> Image | int:
        return self._image

    def debug(self, _fd: int, **_: Any) -> Image | int:
        return self._image

    def demangle(self, names: Any) -> list[bytes]:
        return list(names)


class _Tables(ModuleTables):
    def __init__(self, worker: Worker, table: UnwindTable) -> None:
        super().__init__(worker)
        self._made = table

    def table(self, _fd: int) -> UnwindTable | str:
        return self._made


def _make_told(random: Random) -> bytes:
    """An image that can be read, its segments often far away, and a seed."""
    data = bytearray(_replies()[0])
    for _ in range(random.randrange(4)):
        at = wire.REPLY.size + 8 * random.randrange(12)
        wide = (0, 1, 1 << 63, (1 << 64) - 1, (1 << 64) - 4096, 1 << 47)
        data[at : at + 8] = random.choice(wide).to_bytes(8, "little")
    return random.randbytes(8) + (bytes(data) if random.random() < 0.8 else _make(random))


def _own_code() -> list[tuple[int, int]]:
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if " r-xp " in line:
            low, _, high = line.split()[0].partition("-")
            found.append((int(low, 16), int(high, 16)))
    return found


def _check_frames(frames: list[Frame], count: int) -> None:
    hold(len(frames) == count, "not a frame for each address")
    # As they are written.
    offsets = schema.FRAMES.field("offset").type
    pa.array([frame.offset for frame in frames], offsets)
    for frame in frames:
        for text in (frame.symbol or "", frame.module):
            hold(not any(ord(char) < 32 for char in text), f"a control character in {text!r}")


def _check_told(case: bytes) -> None:
    random = np.random.default_rng(int.from_bytes(case[:8], "little"))
    try:
        image: Image | int = wire.read_image(_Stream(case[8:]))
    except (wire.WireError, EOFError):
        image = wire.STATUS_BAD_FILE
    table = compile_section(sections()[case[0] % len(sections())])
    worker = _Told(image)
    walker = Walker(worker)
    symbolizer = walker.symbolizer
    walker._tables = _Tables(worker, table)
    try:
        code = [at for low, high in _own_code() for at in (low, low + 1, high - 1, high)]
        wanted = np.array([0, 1, (1 << 64) - 1, 1 << 63, *code], dtype=np.uint64)
        flags = random.random(wanted.size) < 0.5
        _check_frames(symbolizer.user(os.getpid(), wanted, return_addresses=flags), wanted.size)
        stack = 0x7FFF_0000_0000
        words = random.choice(wanted, size=(4, 64))
        nothing = np.zeros(0, np.uint64)
        stacks = []
        for number in range(4):
            regs = np.zeros(21, np.uint64)
            regs[16], regs[19], regs[4], regs[17] = random.choice(wanted), stack, stack + 32, 0x33
            copy = Copy(regs, stack, words[number].view(np.uint8))
            stacks.append(RawStack(number, os.getpid(), nothing, nothing, has_user=True, copy=copy))
        for walked in walker.walk(stacks):
            hold(walked is not None and len(walked.addresses) > 0, "no walk")
            if walked is not None:
                frames = symbolizer.user(
                    os.getpid(), walked.addresses, return_addresses=~walked.exact
                )
                _check_frames(frames, len(walked.addresses))
    finally:
        symbolizer.close()


TARGETS = (
    Target("wire", "damaged replies of the worker", _make, _check),
    Target(
        "liar", "a worker that lies, hangs and dies", _make_liar, _check_liar, limit_s=10.0, share=3
    ),
    Target(
        "told", "frames and walks by a file that says anything", _make_told, _check_told, share=3
    ),
)
