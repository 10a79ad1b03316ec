"""Walks the user stacks of sampled threads, by their copies and the maps of their processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Final, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import numpy as np
import numpy.typing as npt

from latrace.tracer.stacks import COPY_PAGES, RawStack
from latrace.tracer.symbols import Symbolizer
from latrace.tracer.symbols.client import Worker
from latrace.tracer.symbols.elf import BytesSource, ElfError
from latrace.tracer.symbols.files import MappedFile
from latrace.tracer.symbols.maps import Ranges
from latrace.tracer.symbols.symbolizer import PROCESS_LIMIT, VDSO_MODULE, read_vdso

from . import golang
from .cache import TableCache
from .modules import ModuleTables
from .places import End, Otherwise, Places
from .records import CfiError
from .sections import table_of
from .table import UnwindTable
from .trampolines import are_trampolines
from .walk import Stacks, unwind

WHOLE: Final = "whole"
"""The end of a walk that came to the thread's first function."""
TOO_SHORT: Final = "copy too short"
ON_ANOTHER_STACK: Final = "on another stack"

_WORDS: Final = {
    End.WHOLE: WHOLE,
    End.SHORT: TOO_SHORT,
    End.NO_TABLE: "no unwind table",
    End.NO_RULE: "no unwind rule",
    End.UNSUPPORTED: "unwind rule not understood",
    End.UNMAPPED: "no code there",
    End.STUCK: "frames do not rise",
    End.DEEP: "too deep",
    End.ELSEWHERE: ON_ANOTHER_STACK,
}
_CURABLE: Final = (_WORDS[End.NO_TABLE], _WORDS[End.UNMAPPED])
_ROUNDS: Final = 32
_NAMED_MODULES: Final = 200
TABLES_LIMIT: Final = 512 << 20
"""Bytes of unwinding tables kept; some 400 files of a host, browsers among them, take 137 MB."""
# Words of struct pt_regs (arch/x86/include/asm/ptrace.h) in DWARF's order of registers.
_DWARF_ORDER: Final = np.array([10, 12, 11, 5, 13, 14, 4, 19, 9, 8, 7, 6, 3, 2, 1, 0, 16])
_CS, _CS_64_BIT = 17, 0x33
_MOST_PAGES: Final = 8
# What keeps frame pointers where nothing is said of its frames: Go, and what V8 has compiled.
_KEEPS_FRAME_POINTERS: Final = (golang.MARK, b"Builtins_CEntry")
_JUDGED, _SHORT_SHARE = 64, 0.01  # walks; beyond this share more is copied
_CALM: Final = 1024  # walks, after which less is; then twice as many


class Walked(NamedTuple):
    """One stack: addresses from the leaf outwards, (n,) uint64; which ones are no return addresses,
    (n,) bool; and how the walk ended, in words."""

    addresses: npt.NDArray[np.uint64]
    exact: npt.NDArray[np.bool_]
    end: str


class Walker:
    """Walks stacks in batches. Not thread-safe: it asks its symbolizer, which is everybody's."""

    def __init__(self, worker: Worker | None = None) -> None:
        """`worker` reads the targets' files."""
        worker = worker or Worker()
        self.symbolizer = Symbolizer(worker=worker, on_parsed=self._add_table)
        self._tables = ModuleTables(worker, cache=TableCache())
        # A file is parsed once: what was made of it is kept for as long as the file is known.
        self._tables_of: WeakKeyDictionary[MappedFile, UnwindTable | str] = WeakKeyDictionary()
        self._parsed: WeakSet[MappedFile] = WeakSet()
        self._tables_bytes: int | None = 0
        self._places, self._trampolines = _nowhere()
        self._modules: dict[MappedFile, int] = {}
        self._spaces: dict[int, tuple[Ranges, set[MappedFile], int]] = {}
        self._ends: Counter[str] = Counter()
        self._how: dict[str, str] = {}
        self._judged = self._short = 0
        self._calm = _CALM
        self.copy_pages = COPY_PAGES
        """How much of a stack it takes, as far as the last walks tell."""

    @property
    def stats(self) -> dict[str, Any]:
        """How walks ended, since the start, and what each module is walked by."""
        return {
            "ends": dict(self._ends),
            "modules": dict(self._how),
            "copy_pages": self.copy_pages,
        }

    def abandon(self) -> None:
        """Have no more files read, at once; for another thread to call."""
        self._tables.abandon()

    def let_go(self) -> None:
        """Forget all memory maps; before the symbolizer forgets the files that were not used."""
        for file in self._modules:
            file.used = True
        self._places, self._trampolines = _nowhere()
        self._modules.clear()
        self._spaces.clear()
        self._tables_bytes = None  # files will be forgotten, and their tables with them

    def walk(self, stacks: Sequence[RawStack]) -> list[Walked | None]:
        """Walk them; None for one without a copy, or of a 32-bit program."""
        result: list[Walked | None] = [None] * len(stacks)
        todo = [
            index
            for index, stack in enumerate(stacks)
            if stack.copy is not None and stack.copy.regs[_CS] == _CS_64_BIT
        ]
        first = todo
        # Files are parsed when a stack leads there, and mappings looked at when it leads to none.
        for _ in range(_ROUNDS):
            walked = self._walk([stacks[index] for index in todo])
            for index, one in zip(todo, walked, strict=True):
                result[index] = one
            learnt = self._learn(
                {
                    (stacks[index].tgid, one.end, int(one.addresses[-1]) - (not one.exact[-1]))
                    for index, one in zip(todo, walked, strict=True)
                    if one is not None and one.end in _CURABLE
                }
            )
            todo = [
                index
                for index in todo
                if stacks[index].tgid in learnt and (one := result[index]) and one.end in _CURABLE
            ]
            if not todo:
                break
        ends = [one.end for index in first if (one := result[index])]
        self._ends.update(ends)
        self._judge(ends)
        return result

    def _learn(self, stopped: set[tuple[int, str, int]]) -> set[int]:
        """See to places (process, how the walk ended, pc); the processes of which more is known."""
        learnt = {
            tgid
            for tgid in {tgid for tgid, end, _ in stopped if end == _WORDS[End.UNMAPPED]}
            if self.symbolizer.look_again(tgid)
        }
        for tgid, end, pc in stopped:
            mapped = self.symbolizer.mapped(tgid)
            if end != _WORDS[End.NO_TABLE] or mapped is None:
                continue
            ranges, files = mapped
            at = int(ranges.find(np.array([pc], np.uint64))[0])
            if at >= 0 and self._parse(tgid, files[int(ranges.files[at])]):
                learnt.add(tgid)
        return learnt

    def _parse(self, tgid: int, file: MappedFile) -> bool:
        """Parse a file that was not; returns whether more is known of the process."""
        if file in self._parsed:
            return tgid not in self._spaces  # another place in it came first
        self._parsed.add(file)
        self.symbolizer.parse(tgid, file)
        if file.module == VDSO_MODULE and file.image is not None:
            self._add(file, _table_of_vdso())
        return tgid not in self._spaces

    def _walk(self, stacks: Sequence[RawStack]) -> list[Walked | None]:
        spaces = {tgid: self._space(tgid) for tgid in {stack.tgid for stack in stacks}}
        known = [at for at, stack in enumerate(stacks) if spaces[stack.tgid] >= 0]
        copies = [copy for at in known if (copy := stacks[at].copy) is not None]
        if not copies:
            return [None] * len(stacks)
        lengths = np.array([copy.memory.size for copy in copies], np.int64)
        walks = unwind(
            Stacks(
                np.stack([copy.regs for copy in copies])[:, _DWARF_ORDER],
                np.concatenate([copy.memory for copy in copies]),
                np.cumsum(lengths) - lengths,
                lengths,
                np.array([copy.base for copy in copies], np.uint64),
                np.array([spaces[stacks[at].tgid] for at in known], np.int64),
            ),
            self._places,
        )
        result: list[Walked | None] = [None] * len(stacks)
        behind = np.cumsum(walks.counts).tolist()
        for at, last, count, end in zip(
            known, behind, walks.counts.tolist(), walks.ends.tolist(), strict=True
        ):
            part = slice(last - count, last)
            result[at] = Walked(walks.addresses[part], walks.exact[part], _WORDS[End(end)])
        return result

    def _judge(self, ends: list[str]) -> None:
        """See whether the copies are too small, or may be smaller."""
        self._judged += len(ends)
        self._short += ends.count(TOO_SHORT)
        if self._judged >= _JUDGED and self._short > _SHORT_SHARE * self._judged:
            if self.copy_pages < _MOST_PAGES:
                self.copy_pages *= 2
                self._calm *= 2
            self._judged = self._short = 0
        elif self._judged >= self._calm:
            self.copy_pages = max(1, self.copy_pages // 2)
            self._judged = self._short = 0

    def _space(self, tgid: int) -> int:
        """The number of a process's memory map; -1: nothing is known of it."""
        mapped = self.symbolizer.mapped(tgid)
        if mapped is None:
            return -1
        ranges, files = mapped
        known = self._spaces.pop(tgid, None)
        if known is not None and known[0] is ranges:
            self._spaces[tgid] = known  # the last one to be dropped
            return known[2]
        if known is not None:
            self._places.drop_space(known[2])
        while len(self._spaces) >= PROCESS_LIMIT:
            self._places.drop_space(self._spaces.pop(next(iter(self._spaces)))[2])
        numbers = ranges.files.tolist()
        modules = np.array([self._module(files[number]) for number in numbers], np.int64)
        of_no_file = np.flatnonzero([files[number].anonymous for number in numbers])
        if of_no_file.size:
            made = are_trampolines(tgid, ranges.starts[of_no_file])
            modules[of_no_file[made]] = self._trampolines
        biases = ranges.starts.copy()
        for at, number in enumerate(numbers):
            image = files[number].image
            if image is not None:
                # Unsigned wrap-around is meant: a file may say that it is loaded anywhere.
                biases[at : at + 1] -= image.vaddrs(ranges.offsets[at : at + 1])[0]
        try:
            space = self._places.add_space(ranges.starts, ranges.ends, biases, modules)
        except ValueError:  # the maps changed while they were read
            return -1
        self._spaces[tgid] = ranges, {files[number] for number in numbers}, space
        return space

    def _module(self, file: MappedFile) -> int:
        known = self._modules.get(file)
        if known is None:
            table = self._tables_of.get(file)
            by_pointers = file.anonymous or _keeps_frame_pointers(file)
            known = self._modules[file] = self._places.add_module(
                table if isinstance(table, UnwindTable) else None,
                otherwise=Otherwise.FRAME_POINTERS if by_pointers else Otherwise.NOTHING,
                stretches=() if file.image is None else golang.stretches(file.image.symbols),
            )
        return known

    def _add_table(self, file: MappedFile, fd: int) -> None:
        self._parsed.add(file)
        self._add(file, self._tables.table(fd))

    def _add(self, file: MappedFile, table: UnwindTable | str) -> None:
        """Take the table of a file; whoever has it mapped gets it anew."""
        if isinstance(table, UnwindTable):
            if self._tables_bytes is None:
                known = self._tables_of.values()
                self._tables_bytes = sum(one.nbytes for one in known if not isinstance(one, str))
            if self._tables_bytes + table.nbytes > TABLES_LIMIT:
                table = "memory for unwind tables used up"
            else:
                self._tables_bytes += table.nbytes
        self._tables_of[file] = table
        if len(self._how) < _NAMED_MODULES:
            how = ["call frame information"] if isinstance(table, UnwindTable) else []
            how += ["frame pointers"] if _keeps_frame_pointers(file) else []
            self._how[file.module] = ", ".join(how) or str(table)
        self._modules.pop(file, None)
        for tgid in [tgid for tgid, (_, files, _) in self._spaces.items() if file in files]:
            self._places.drop_space(self._spaces.pop(tgid)[2])


def _nowhere() -> tuple[Places, int]:
    """No places yet, and the number of the module that stands for trampolines."""
    places = Places()
    return places, places.add_module(None, otherwise=Otherwise.TRAMPOLINE)


def _table_of_vdso() -> UnwindTable | str:
    try:
        return table_of(BytesSource(read_vdso())) or "without call frame information"
    except (ElfError, CfiError) as error:
        return str(error)


def _keeps_frame_pointers(file: MappedFile) -> bool:
    names = b"" if file.image is None else file.image.symbols.names
    return any(name in names for name in _KEEPS_FRAME_POINTERS)
