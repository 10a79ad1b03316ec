"""Reading /proc/PID/maps, and keeping what was mapped before."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from symbols_tools import addresses

from latrace.tracer.symbols.maps import Mapping, make_ranges, parse_maps, renew

TEXT = rb"""55d0c0a00000-55d0c0a02000 r--p 00000000 fe:00 131  /usr/bin/cat
55d0c0a02000-55d0c0a06000 r-xp 00002000 fe:00 131                        /usr/bin/cat
7f0000000000-7f0000001000 r-xp 00001000 00:01 77                         /tmp/a b (deleted)
7f0000002000-7f0000003000 rwxp 00000000 00:00 0
7f0000004000-7f0000005000 r-xs 00000000 00:05 9                          /tmp/new\012line
7ffd00000000-7ffd00002000 r-xp 00000000 00:00 0                          [vdso]
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
nonsense
"""


def test_executable_mappings_are_read_and_nothing_else():
    device = os.makedev(0xFE, 0)
    expected = [
        Mapping(0x55D0C0A02000, 0x55D0C0A06000, 0x2000, device, 131, b"/usr/bin/cat", False),
        Mapping(0x7F0000000000, 0x7F0000001000, 0x1000, 1, 77, b"/tmp/a b", True),
        Mapping(0x7F0000002000, 0x7F0000003000, 0, 0, 0, b"", False),
        Mapping(0x7F0000004000, 0x7F0000005000, 0, 5, 9, b"/tmp/new\nline", False),
        Mapping(0x7FFD00000000, 0x7FFD00002000, 0, 0, 0, b"[vdso]", False),
        Mapping(0xFFFFFFFFFF600000, 0xFFFFFFFFFF601000, 0, 0, 0, b"[vsyscall]", False),
    ]
    assert parse_maps(TEXT) == expected


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        (b"55d0c0a02000-", b"155d0c0a02000000a-"),
        (b" 00002000 ", b" 10000000000000000 "),
        (b"fe:00 131  ", b"fffffffff:00 131  "),
        (b" 131  ", b" " + b"9" * 5000 + b"  "),
    ],
)
def test_a_number_that_no_kernel_writes_is_none(good, bad):
    text = TEXT.replace(good, bad)
    assert text != TEXT
    assert len(parse_maps(text)) == 5
    make_ranges(parse_maps(text), list(range(5)))


def test_our_own_maps_are_understood():
    text = Path("/proc/self/maps").read_bytes()
    executable = [line for line in text.splitlines() if b"x" in line.split()[1]]
    assert len(parse_maps(text)) == len(executable) > 0


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_no_text_breaks_the_parser(text):
    parse_maps(text)
    parse_maps(TEXT[:150] + text + TEXT[150:])


def ranges_of(cells: set[int], file: int):
    mappings = [Mapping(cell * 16, cell * 16 + 16, 0, 0, 0, b"", False) for cell in sorted(cells)]
    return make_ranges(mappings, [file] * len(mappings))


CELLS = st.sets(st.integers(0, 12))


@settings(deadline=None)
@given(CELLS, CELLS, st.integers(0, 8))
def test_new_ranges_win_and_old_ones_stay_where_nothing_new_is(old, new, shift):
    """Old cells are shifted, so that some overlap a new one in part: those go as a whole."""
    before = ranges_of(old, 1)
    before = type(before)(
        before.starts + np.uint64(shift),
        before.ends + np.uint64(shift),
        before.offsets,
        before.files,
    )
    after = renew(before, ranges_of(new, 2))
    assert (np.diff(after.starts.astype(np.int64)) > 0).all()
    kept = {
        cell
        for cell in old
        if not any(c * 16 < cell * 16 + shift + 16 and cell * 16 + shift < c * 16 + 16 for c in new)
    }
    for addr in range(0, 16 * 15):
        expected = -1
        if addr // 16 in new:
            expected = 2
        elif (addr - shift) // 16 in kept and addr >= shift:
            expected = 1
        index = int(after.find(addresses(addr))[0])
        assert (int(after.files[index]) if index >= 0 else -1) == expected
