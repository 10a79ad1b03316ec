"""Kernel symbols, from made-up and from real text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from symbols_tools import addresses

from latrace.tracer.symbols import Frame, Symbolizer
from latrace.tracer.symbols.kallsyms import KernelSymbols

TEXT = """\
ffffffff81000100 T second
ffffffff81000000 T first
ffffffff81000000 t alias_of_first
0000000000000000 A fixed_percpu_data
ffffffff81000200 D some_data
ffffffffc0001000 t in_module\t[xfs]
ffffffffc0001080 t also_in_module\t[xfs]
ffffffffc0200000 t bpf_prog_6deef7357e7b4530_lat\t[bpf]
"""


def symbols(folder: Path, text: str = TEXT) -> KernelSymbols:
    path = folder / "kallsyms"
    path.write_text(text)
    return KernelSymbols(path)


def frames(table: KernelSymbols, *addrs: int, behind: int = 0) -> list[Frame]:
    return table.frames(addresses(*addrs), addresses(*([behind] * len(addrs))))


def test_a_symbol_ends_where_the_next_begins(tmp_path):
    table = symbols(tmp_path)
    assert frames(table, 0xFFFFFFFF81000000, 0xFFFFFFFF810000FF, 0xFFFFFFFF81000100) == [
        Frame("first", "[kernel]", 0, "kernel"),
        Frame("first", "[kernel]", 0xFF, "kernel"),
        Frame("second", "[kernel]", 0, "kernel"),
    ]


def test_modules_and_bpf_programs_have_their_names(tmp_path):
    assert frames(symbols(tmp_path), 0xFFFFFFFFC0001085, 0xFFFFFFFFC0200007) == [
        Frame("also_in_module", "xfs", 5, "kernel"),
        Frame("bpf_prog_6deef7357e7b4530_lat", "bpf", 7, "kernel"),
    ]


def test_a_return_address_belongs_to_the_call_before_it(tmp_path):
    assert frames(symbols(tmp_path), 0xFFFFFFFF81000100, behind=1) == [
        Frame("first", "[kernel]", 0x100, "kernel")
    ]


def test_beyond_a_module_nothing_is_claimed(tmp_path):
    far, before = 0xFFFFFFFFC0100000, 0xFFFFFFFF80000000
    assert frames(symbols(tmp_path), far, before) == [
        Frame(None, "[kernel]", far, "kernel"),
        Frame(None, "[kernel]", before, "kernel"),
    ]


@pytest.mark.parametrize("text", ["", TEXT.replace("f", "0").replace("c", "0").replace("8", "0")])
def test_hidden_addresses_are_noticed(tmp_path, text):
    only_zero = "\n".join("0" * 16 + line[16:] for line in text.splitlines()) + "\n"
    table = symbols(tmp_path, only_zero if text else "")
    assert table.hidden
    assert frames(table, 0xFFFFFFFF81000000)[0].symbol is None


def test_a_missing_file_is_a_hidden_one(tmp_path):
    assert KernelSymbols(tmp_path / "nothing").hidden


@pytest.mark.kernel
def test_this_kernel_agrees_line_by_line():
    """Every address of /proc/kallsyms resolves to one of the names it has there."""
    names: dict[int, set[str]] = {}
    for line in Path("/proc/kallsyms").read_text().splitlines():
        addr, kind, name, *module = line.split()
        # Modules and BPF programs come and go while we look; the kernel proper stays.
        if kind not in "aA" and not module:
            names.setdefault(int(addr, 16), set()).add(name)
    symbolizer = Symbolizer()
    some = list(names)[:: max(len(names) // 20_000, 1)]
    found = symbolizer.kernel(np.array(some, dtype=np.uint64))
    wrong = [
        (hex(addr), frame)
        for addr, frame in zip(some, found, strict=True)
        if frame.symbol not in names[addr] or frame.module != "[kernel]"
    ]
    assert not wrong
    assert not symbolizer.stats["kernel"]["hidden"]
    symbolizer.close()
