"""Look-ups in symbol tables, against a search by brute force."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from symbols_tools import addresses

from latrace.tracer.symbols.frames import NAME_LIMIT, clean
from latrace.tracer.symbols.table import Image, build_table, empty_table, merge

Spans = list[tuple[int, int]]
SPANS = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=20)


def table_of(spans: Spans, tag: str = "f"):
    starts = dict(sorted(spans))
    return build_table(
        addresses(*starts),
        addresses(*(start + size for start, size in starts.items())),
        [f"{tag}{start}".encode() for start in starts],
    )


@settings(deadline=None)
@given(SPANS, st.lists(st.integers(0, 90), min_size=1))
def test_the_innermost_function_that_holds_the_address_is_found(spans, wanted):
    table = table_of(spans)
    held = dict(spans and sorted(spans))
    for addr, index in zip(wanted, table.lookup(addresses(*wanted)).tolist(), strict=True):
        holding = [start for start, size in held.items() if start <= addr < start + size]
        assert (table.name(index) if index >= 0 else None) == (
            f"f{max(holding)}".encode() if holding else None
        )


@settings(deadline=None)
@given(SPANS, SPANS)
def test_merge_prefers_the_first_table_and_keeps_order(first, second):
    merged = merge(table_of(first, "a"), table_of(second, "b"))
    starts = merged.starts.tolist()
    assert starts == sorted({start for start, _ in first + second})
    expected = {start: b"b%d" % start for start, _ in second}
    expected |= {start: b"a%d" % start for start, _ in first}
    assert merged.all_names() == [expected[start] for start in starts]


def test_empty_table_finds_nothing():
    assert empty_table().lookup(addresses(0, 1, 2**64 - 1)).tolist() == [-1, -1, -1]


def test_file_offsets_become_virtual_addresses_only_inside_segments():
    rows = np.array([[0x1000, 0x500, 0x401000, 5], [0, 0x800, 0x400000, 4]], dtype=np.uint64)
    image = Image(rows, empty_table(), False, b"", b"", 0)
    vaddrs, known = image.vaddrs(addresses(0x1000, 0x14FF, 0x1500, 0x10, 0x900))
    assert vaddrs.tolist() == [0x401000, 0x4014FF, 0x1500, 0x400010, 0x900]
    assert known.tolist() == [True, True, False, True, False]


@settings(deadline=None)
@given(st.binary(max_size=64))
def test_cleaned_names_are_printable_on_one_line(raw):
    text = clean(raw)
    assert not any(char < " " or "\x7f" <= char <= "\x9f" for char in text)
    assert len(text.splitlines()) <= 1


def test_clean_cuts_escapes_and_keeps_text():
    assert clean(b"a" * 10_000_000) == "a" * NAME_LIMIT
    assert clean("größe".encode()) == "größe"
    assert clean(b"\x1b[31mred\n") == "\\x1b[31mred\\x0a"
    assert clean(b"bad \xff utf-8") == "bad \\xff utf-8"
    assert clean("a\u202eb\u2028".encode()) == "a\\x202eb\\x2028"
