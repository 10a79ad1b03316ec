"""The compiled table says, row by row, what pyelftools decodes of the same section."""

from __future__ import annotations

import numpy as np
import pytest
from unwind_modules import (
    cfa_of,
    decoded,
    expected_cfa,
    expected_register,
    module,
    section_of,
)

from latrace.tracer.unwinding.cfi import compile_section
from latrace.tracer.unwinding.records import Section
from latrace.tracer.unwinding.rules import BAD_RULE, CFA_UNSUPPORTED, COLUMNS, NO_RULE


def compare(section: Section) -> int:
    """Checks every row and every gap; how many rows there were."""
    table = compile_section(section)
    known: set[tuple[int, object]] = set()
    addresses: set[int] = set()
    begins, ends = set(), set()
    count = 0
    for begin, end, signal, rows in decoded(section):
        if not section.low <= begin < section.high or begin == end:
            continue
        begins.add(begin)
        ends.add(end)
        pcs = [row["pc"] for row in rows]
        # The last one to speak about an address is right.
        spoken = [
            row
            for row, following in zip(rows, [*pcs[1:], end], strict=True)
            if row["pc"] < following
        ]
        at = np.array([row["pc"] for row in spoken], dtype=np.uint64)
        last = np.append(at[1:], np.uint64(end)) - np.uint64(1)
        numbers, same = table.lookup(at), table.lookup(last)
        assert (numbers == same).all(), hex(begin)
        addresses.update(at.tolist())
        for row, number in zip(spoken, numbers.tolist(), strict=True):
            count += 1
            said = (number, str({key: row[key] for key in row if key != "pc"}), signal)
            if said in known:
                continue
            known.add(said)
            rule = table.rules[number]
            cfa = expected_cfa(row)
            if cfa[0] == CFA_UNSUPPORTED:
                assert number == BAD_RULE
                continue
            assert number > BAD_RULE, (hex(row["pc"]), row)
            assert cfa_of(rule) == cfa, (hex(row["pc"]), row)
            assert bool(rule["signal"]) == signal
            for column in range(COLUMNS):
                ours = tuple(int(rule[name][column]) for name in ("kind", "base", "offset"))
                assert ours == expected_register(row, column), (hex(row["pc"]), column)
    gaps = np.array(sorted(ends - begins), dtype=np.uint64)
    assert (table.lookup(gaps) == NO_RULE).all()
    mine = {table.base + pc for pc in table.pcs.tolist()}
    assert mine <= addresses | ends
    return count


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("libc.so.6", 100_000),
        ("ld-linux-x86-64.so.2", 1 << 20),
        ("libstdc++.so.6", 80_000),
        ("libcrypto.so.3", 100_000),
        ("libgcc_s.so.1", 1 << 20),
        ("nginx", 60_000),
        ("redis-server", 60_000),
        ("postgres", 60_000),
        ("python3.11", 60_000),
        ("node", 100_000),
        ("/usr/lib/chromium/chromium", 60_000),
    ],
)
def test_table_says_what_pyelftools_decodes(name: str, most: int) -> None:
    assert compare(section_of(module(name), most=most)) > 500
