"""Kernel symbols from /proc/kallsyms, which has no sizes: a symbol ends where the next begins."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from latrace.tracer.symbols.frames import Frame, clean
from latrace.tracer.symbols.table import U64

KALLSYMS: Final = Path("/proc/kallsyms")
LONE_SPAN: Final = np.uint64(1 << 16)
"""How far a symbol may reach when what follows it belongs to another module: no kernel function
is longer, and beyond the end of a module there may be code that was loaded after the reading."""

KERNEL: Final = "[kernel]"
_HEX = np.full(256, 255, dtype=np.uint8)
_HEX[np.frombuffer(b"0123456789abcdef", dtype=np.uint8)] = np.arange(16, dtype=np.uint8)


class KernelSymbols:
    """The symbols of the running kernel, its modules and its BPF programs, read once.

    `hidden`: the addresses read as zero (kernel.kptr_restrict), so that every symbol is None.
    """

    def __init__(self, path: Path = KALLSYMS) -> None:
        try:
            text = path.read_bytes()
        except OSError:
            text = b""
        starts, lines = _index(text)
        self.hidden = not starts.size or not bool(starts.any())
        self._text = text
        self._cache: dict[int, Frame] = {}
        if self.hidden:
            starts, lines = starts[:0], lines[:0]
        self._starts, self._lines = starts, lines

    def __len__(self) -> int:
        return int(self._starts.size)

    def _entry(self, index: int) -> tuple[bytes, bytes]:
        begin = int(self._lines[index])
        line = self._text[begin : self._text.find(b"\n", begin)]
        name, _, module = line[19:].partition(b"\t")
        return name, module

    def _resolve(self, addr: int) -> Frame:
        index = int(np.searchsorted(self._starts, np.uint64(addr), side="right")) - 1
        if index < 0:
            return Frame(None, KERNEL, addr, "kernel")
        name, module = self._entry(index)
        start = int(self._starts[index])
        following = index + 1
        same = following < len(self) and self._entry(following)[1] == module
        if not same and addr - start >= int(LONE_SPAN):
            return Frame(None, KERNEL, addr, "kernel")
        label = clean(module.strip(b"[]")) if module else KERNEL
        return Frame(clean(name), label, addr - start, "kernel")

    def frames(self, addrs: U64, behind: U64) -> list[Frame]:
        """Frames of (n,) addresses; `behind` is 1 where the address is a return address."""
        cache, result = self._cache, []
        for addr, back in zip(addrs.tolist(), behind.tolist(), strict=True):
            key = addr << 1 | back
            frame = cache.get(key)
            if frame is None:
                found = self._resolve(addr - back)
                frame = cache[key] = found._replace(offset=found.offset + back)
            result.append(frame)
        return result


def _index(text: bytes) -> tuple[U64, U64]:
    """Sorted unique start addresses and where their lines begin in the text."""
    data = np.frombuffer(text, dtype=np.uint8)
    breaks = np.flatnonzero(data == ord("\n"))
    begins = np.concatenate((np.zeros(1, dtype=np.int64), breaks[:-1] + 1))[: breaks.size]
    begins = begins[breaks - begins > 19]
    if not begins.size:
        none = np.zeros(0, dtype=np.uint64)
        return none, none
    # Sixteen digits on 64-bit kernels, a blank, the type, a blank, the name.
    digits = _HEX[data[begins[:, None] + np.arange(16)]]
    sound = (digits < 16).all(axis=1) & (data[begins + 16] == ord(" "))
    # Absolute per-CPU offsets (type A) are no addresses.
    sound &= (data[begins + 17] | 0x20) != ord("a")
    begins, digits = begins[sound], digits[sound].astype(np.uint64)
    starts = np.zeros(begins.size, dtype=np.uint64)
    for column in range(16):
        starts = (starts << np.uint64(4)) | digits[:, column]
    order = np.argsort(starts, kind="stable")
    starts = starts[order]
    first = np.ones(starts.size, dtype=np.bool_)
    first[1:] = starts[1:] != starts[:-1]
    return starts[first], begins[order[first]].astype(np.uint64)
