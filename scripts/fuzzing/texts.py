"""Texts: perf maps, memory maps, kernel symbols, against plain readers."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Final

import numpy as np

from latrace.tracer.symbols import perfmap
from latrace.tracer.symbols.frames import clean
from latrace.tracer.symbols.kallsyms import KernelSymbols
from latrace.tracer.symbols.maps import Ranges, make_ranges, parse_maps, renew
from latrace.tracer.symbols.perfmap import PerfMap
from latrace.tracer.symbols.procfs import Fd

from .damage import damaged
from .programs import addresses
from .target import Target, hold

_PIECE: Final = 96
"""Instead of a MiB, so that pieces and lines too long for one come up."""


@contextmanager
def _in_memory(name: str) -> Iterator[int]:
    fd = os.memfd_create(name)
    try:
        yield fd
    finally:
        os.close(fd)


# --- perf maps ------------------------------------------------------------------------------------


def _number(random: Random, most: int) -> bytes:
    value = random.choice((random.randrange(most), random.randrange(256), most - 1, 0, 1))
    text = f"{value:x}"
    if random.random() < 0.1:
        text = random.choice(("0x" + text, "0X" + text, text.upper(), text.zfill(16), "0" + text))
    if random.random() < 0.05:
        text = random.choice(("", "0x", "g", text + "h", "-1", "1" * 17, " " + text, "\t"))
    return text.encode()


def _make_perf_map(random: Random) -> bytes:
    """A text; its first byte tells in how many pieces it grows."""
    lines = []
    for _ in range(random.randrange(24)):
        start = b"%x" % (0x1000 + random.randrange(0x200))
        if random.random() < 0.2:
            start = _number(random, 1 << 64)
        name = random.choice((b"f", b"a b", b"\0", b"\xff\xfe", b"x" * random.randrange(150), b""))
        lines.append(b" ".join((start, _number(random, 0x80), name)))
    text = b"\n".join(lines) + random.choice((b"\n", b""))
    if random.random() < 0.4 and text:
        text = damaged(random, text, most=4)
    return bytes([random.randrange(8)]) + text


def _plain_number(text: bytes) -> int | None:
    if len(text) > 2 and text[:2].lower() == b"0x":
        text = text[2:]
    return int(text, 16) if re.fullmatch(rb"[0-9a-fA-F]{1,16}", text) else None


def _plain_perf_map(text: bytes) -> tuple[list[tuple[int, int, str]], int]:
    """Entries in the order of the file, and how many lines are none."""
    found, malformed = [], 0
    at = 0
    while True:
        end = text.find(b"\n", at)
        if end < 0 or end + 1 - at > _PIECE:
            # Too long for a piece, or not yet whole.
            malformed += (len(text) if end < 0 else end + 1) - at >= _PIECE
            if end < 0:
                return found, malformed
            at = end + 1
            continue
        line, at = text[at:end], end + 1
        start_text, blank, rest = line.partition(b" ")
        size_text, other, name = rest.partition(b" ")
        start, size = _plain_number(start_text), _plain_number(size_text)
        if (
            not blank
            or not other
            or not name
            or start is None
            or size is None
            or not 0 < size <= 1 << 30
            or start + size >= 1 << 64
        ):
            malformed += 1
        else:
            found.append((start, start + size, clean(name) or "[jit]"))


def _check_perf_map(case: bytes) -> None:
    pieces, text = 1 + case[0] % 8, case[1:]
    before, perfmap.PIECE = perfmap.PIECE, _PIECE
    try:
        with _in_memory("perf-map") as fd:
            entries = PerfMap(Fd(os.dup(fd)))
            for number in range(pieces):
                part = text[len(text) * number // pieces : len(text) * (number + 1) // pieces]
                os.write(fd, part)
                while entries.catch_up(200):
                    pass
            for _ in range(len(text) // 200 + 2):
                entries.catch_up(200)
            expected, malformed = _plain_perf_map(text)
            hold(len(entries) == len(expected), f"{len(entries)} entries, not {len(expected)}")
            hold(entries.malformed == malformed, f"{entries.malformed} malformed, not {malformed}")
            ends = {each for start, end, _ in expected for each in (start, end, end - 1)}
            wanted = addresses(0, 0x1000, 0x1080, (1 << 64) - 1, *ends)
            for addr, index in zip(wanted.tolist(), entries.lookup(wanted).tolist(), strict=True):
                held = [at for at, (start, end, _) in enumerate(expected) if start <= addr < end]
                hold(index == max(held, default=-1), f"{addr:#x} is in {index}, not {held}")
                if index >= 0:
                    found = entries.start(index), entries.name(index)
                    hold(found == expected[index][::2], f"{found}, not {expected[index]}")
            # Written anew while it is read, and then gone.
            os.ftruncate(fd, len(text) // 2)
            entries.catch_up(1 << 20)
            entries.lookup(wanted)
            if len(entries):
                entries.name(len(entries) - 1)
            entries.close()
    finally:
        perfmap.PIECE = before


# --- memory maps ----------------------------------------------------------------------------------


def _make_maps(random: Random) -> bytes:
    if random.random() < 0.3:
        return damaged(random, Path("/proc/self/maps").read_bytes()[:3000])
    lines, at = [], random.randrange(1 << 40)
    for _ in range(random.randrange(16)):
        start = at + random.randrange(4) * 4096
        at = start + random.randrange(1, 5) * 4096
        if random.random() < 0.05:
            start, at = random.randrange(1 << 64), random.randrange(1 << 64)
        bits = random.choice(("r-xp", "rwxs", "--xp", "r--p", "rw-p", "rxwp"))
        device = random.choice(("08:01", "00:00", "fffff:fffff", "fffffff:1", "f" * 9 + ":0", ":"))
        inode = random.choice(("0", "12", "18446744073709551615", "9" * random.randrange(1, 5000)))
        path = random.choice(
            ("", "/a b", "/x (deleted)", r"/n\012\134x", r"/\777\8", "[vdso]", "\0")
        )
        offset = f"{random.choice((0, 4096, (1 << 64) - 1)):x}"
        blanks = " " * random.randrange(1, 30)
        lines.append(f"{start:x}-{at:x} {bits} {offset} {device} {inode}{blanks}{path}")
    text = "\n".join(lines).encode() + b"\n"
    return damaged(random, text, most=4) if random.random() < 0.4 else text


def _check_ranges(ranges: Ranges, wanted: np.ndarray) -> None:
    found = ranges.find(wanted)
    for addr, index in zip(wanted.tolist(), found.tolist(), strict=True):
        if index >= 0:
            low, high = int(ranges.starts[index]), int(ranges.ends[index])
            hold(low <= addr < high, f"{addr:#x} is not in {low:#x}-{high:#x}")


def _check_maps(case: bytes) -> None:
    found = parse_maps(case)
    lines = [line for line in case.split(b"\n") if b"x" in line[:60]]
    hold(len(found) <= len(lines), "more mappings than lines")
    for mapping in found:
        hold(0 <= mapping.start < 1 << 64 and 0 <= mapping.end < 1 << 64, "beyond all memory")
        hold(b"\n" not in mapping.path or rb"\012" in case, "a path of two lines")
        clean(mapping.path)
    ranges = make_ranges(found, list(range(len(found))))
    edges = [each for one in found for each in (one.start, one.end)]
    wanted = addresses(0, (1 << 64) - 1, *edges)
    _check_ranges(ranges, wanted)
    other = make_ranges(found[::2], list(range(len(found[::2]))))
    _check_ranges(renew(ranges, other), wanted)
    _check_ranges(renew(other, ranges), wanted)


# --- the kernel's symbols -------------------------------------------------------------------------


def _make_kallsyms(random: Random) -> bytes:
    lines = []
    for _ in range(random.randrange(24)):
        addr = random.choice((0, 0xFFFF_FFFF_8100_0000, (1 << 64) - 256)) + random.randrange(256)
        kind = random.choice("tTaAwbB ")
        name = random.choice(
            ("f", "do_it.constprop.0", "x" * random.randrange(60), "\x1b[2J", "a b")
        )
        module = random.choice(("", "", "\t[nf_tables]", "\t[bpf]", "\t[", "\t"))
        lines.append(f"{addr:016x} {kind} {name}{module}")
    text = "\n".join(lines).encode() + random.choice((b"\n", b""))
    return damaged(random, text, most=4) if random.random() < 0.5 and text else text


def _plain_kallsyms(text: bytes) -> dict[int, str]:
    """What is where, the first one to say so."""
    found: dict[int, str] = {}
    for line in text.split(b"\n")[:-1]:
        if len(line) < 20 or not re.match(rb"[0-9a-f]{16} [^aA]", line):
            continue
        found.setdefault(int(line[:16], 16), clean(line[19:].partition(b"\t")[0]))
    return found


def _check_kallsyms(case: bytes) -> None:
    with _in_memory("kallsyms") as fd:
        os.write(fd, case)
        symbols = KernelSymbols(Path(f"/proc/self/fd/{fd}"))
    expected = _plain_kallsyms(case)
    if not any(expected):
        hold(symbols.hidden and not len(symbols), "addresses where all are zero")
        return
    hold(len(symbols) == len(expected), f"{len(symbols)} symbols, not {len(expected)}")
    wanted = addresses(*expected)
    for frame, addr in zip(
        symbols.frames(wanted, np.zeros(wanted.shape, np.uint64)), expected, strict=True
    ):
        hold((frame.symbol, frame.offset) == (expected[addr], 0), f"{addr:#x} is {frame}")
    more = np.append(wanted, addresses(0, 1, (1 << 64) - 1))
    for frame in symbols.frames(more, np.minimum(more, np.uint64(1))):
        hold(0 <= frame.offset < 1 << 64, f"an offset out of bounds: {frame}")


TARGETS = (
    Target(
        "perf-map", "growing perf maps, against a plain reader", _make_perf_map, _check_perf_map
    ),
    Target("maps", "memory maps", _make_maps, _check_maps),
    Target("kallsyms", "kernel symbols, against a plain reader", _make_kallsyms, _check_kallsyms),
)
