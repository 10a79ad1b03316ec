"""Addresses of the kernel and of many processes to frames, also after a process has ended."""

from __future__ import annotations

import os
import time
from collections import Counter, OrderedDict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt

from latrace.tracer.symbols.client import Worker
from latrace.tracer.symbols.elf import BytesSource, ElfError, read_image
from latrace.tracer.symbols.files import Bools, FileTable, MappedFile, OnParsed
from latrace.tracer.symbols.frames import Frame, clean
from latrace.tracer.symbols.kallsyms import KernelSymbols
from latrace.tracer.symbols.maps import (
    MAPS_LIMIT,
    Mapping,
    Ranges,
    make_ranges,
    parse_maps,
    renew,
)
from latrace.tracer.symbols.perfmap import PerfMap, open_perf_map, perf_map_path
from latrace.tracer.symbols.procfs import Fd, Identity, ProcessDir, Refused, open_beneath
from latrace.tracer.symbols.table import U64

PROCESS_LIMIT: Final = 4096
"""Processes remembered; the one not used for longest goes first."""
CACHE_LIMIT: Final = 1 << 18
"""Resolved addresses kept for each process."""
NEW_FILES_LIMIT: Final = 1024
"""Files opened for one process in one look at its maps."""
DEATHS_LIMIT: Final = 3
"""A process whose files or names ended the worker so often gets no more of them parsed."""
JIT_REMEMBER_BYTES: Final = 1 << 20
JIT_RESOLVE_BYTES: Final = 32 << 20
"""How much of a perf map one call indexes at most: a growing one cannot hold us up."""
REFUSALS_KEPT: Final = 32
LOOK_AGAIN_S: Final = 0.1
"""How long after a look at a process an address in no mapping brings about another."""
SPENT_SHARE: Final = 20
"""Looking again waits for so many times what the last look took: no target, however many
mappings and JIT entries it makes, gets more than a twentieth of our time for them."""
CHEAP_S: Final = 0.01
"""Indexing what was appended to a perf map is not put off when it last took less than this."""
FILES_LIMIT: Final = 1 << 16
"""Mapped files remembered for one process; one that maps ever new ones begins anew."""

_HIGHEST: Final = (1 << 64) - 1

UNKNOWN_MODULE: Final = "[unknown]"
JIT_MODULE: Final = "[jit]"
VDSO_MODULE: Final = "[vdso]"

_Cache = dict[int, Frame]


@dataclass(slots=True, eq=False)
class _Process:
    identity: Identity
    root: Fd | None = None
    mappings: list[Mapping] = field(default_factory=list)
    ranges: Ranges = field(default_factory=lambda: make_ranges([], []))
    files: list[MappedFile] = field(default_factory=list)
    numbers: dict[tuple[int, int, bytes], int] = field(default_factory=dict)
    perf_map: PerfMap | None = None
    refused: str = ""
    deaths: int = 0
    look_again_at: float = 0.0
    map_again_at: float = 0.0
    grow_again_at: float = 0.0
    renamed: int = 0
    # Looked-up addresses to frames, exact ones and return addresses: those of parsed files, and
    # those that a growing perf map or a new mapping may change.
    lasting: tuple[_Cache, _Cache] = field(default_factory=lambda: ({}, {}))
    passing: tuple[_Cache, _Cache] = field(default_factory=lambda: ({}, {}))

    def cached(self, addr: int, back: int) -> Frame | None:
        return self.lasting[back].get(addr) or self.passing[back].get(addr)

    def keep(self, addr: int, back: int, frame: Frame, *, passing: bool) -> None:
        cache = (self.passing if passing else self.lasting)[back]
        if len(cache) >= CACHE_LIMIT:
            cache.clear()
        cache[addr] = frame

    def clear(self) -> None:
        for cache in (*self.passing, *self.lasting):
            cache.clear()

    def rename(self) -> None:
        """The perf map is another one, or has more in it."""
        for cache in self.passing:
            cache.clear()
        self.renamed += 1


class Symbolizer:
    """Resolves addresses for one tracing session. Not thread-safe: one thread uses it.

    `remember` while a process lives is what makes `user` work once it has ended. Nothing a target
    does makes a method raise; what could not be had is counted in `stats`.
    """

    def __init__(
        self,
        *,
        privileged: bool = True,
        worker: Worker | None = None,
        on_parsed: OnParsed | None = None,
    ) -> None:
        """`privileged`: try /proc/PID/map_files, which needs CAP_SYS_ADMIN.

        `on_parsed`: see `FileTable`.
        """
        self._privileged = privileged
        self._worker = worker or Worker()
        self._files = FileTable(self._worker, on_parsed)
        self._kernel: KernelSymbols | None = None
        self._processes: OrderedDict[int, _Process] = OrderedDict()
        self._roots: WeakValueDictionary[tuple[int, int, int], Fd] = WeakValueDictionary()
        self._anonymous = MappedFile(JIT_MODULE, anonymous=True)
        self._vdso: MappedFile | None = None
        self._vdso_size = 0
        self._counts: Counter[str] = Counter()
        self._open_failed: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._refusals: list[dict[str, Any]] = []
        self._malformed = self._dropped = 0

    # Kernel

    def kernel(self, addrs: U64, *, return_addresses: Bools | None = None) -> list[Frame]:
        """Frames of kernel addresses, (n,) uint64. Reads /proc/kallsyms at the first call."""
        if self._kernel is None:
            self._kernel = KernelSymbols()
        return self._kernel.frames(addrs, _behind(addrs, return_addresses))

    # Processes

    def remember(self, tgid: int) -> None:
        """Look at a process's mappings and open what is needed to resolve its addresses later.

        Cheap when nothing changed. Ranges that are no longer mapped stay known until something
        else is mapped there. A process that is gone keeps what was known of it.
        """
        self._look(tgid, None)

    def _look(self, tgid: int, only: _Process | None) -> None:
        """Look at a process; with `only`, at nobody else who has its id by now."""
        began = time.monotonic()
        process = self._open(tgid, only) or only
        if process is not None:
            if process is self._processes.get(tgid):
                self._take_perf_map(tgid, process)
            ended = time.monotonic()
            wait = max(LOOK_AGAIN_S, SPENT_SHARE * (ended - began))
            process.look_again_at = ended + wait

    def _open(self, tgid: int, only: _Process | None) -> _Process | None:
        """Read its maps and open its files; None where that cannot be."""
        try:
            with ProcessDir(tgid) as folder:
                identity = folder.identity()
                process = self._processes.get(tgid)
                if process is None or process.identity.start_time != identity.start_time:
                    if only is not None:
                        self._counts["gone"] += 1
                        return None
                    self.forget(tgid)
                    process = self._processes[tgid] = _Process(identity)
                    while len(self._processes) > PROCESS_LIMIT:
                        self.forget(next(iter(self._processes)))
                        self._counts["processes_evicted"] += 1
                process.identity = identity
                self._take_root(process, folder)
                self._take_maps(process, folder)
                return process
        except (FileNotFoundError, ProcessLookupError):
            self._counts["gone"] += 1
        except (OSError, ValueError, IndexError):
            self._counts["unreadable"] += 1
        return None

    def forget(self, tgid: int) -> None:
        """Drop what is known of a process; parsed files are kept for others."""
        process = self._processes.pop(tgid, None)
        if process is not None and process.perf_map is not None:
            self._close_perf_map(process)

    def hurry(self) -> None:
        """Let nobody go before the parsing of files any more: somebody waits for the names."""
        self._worker.hurry()

    def let_go(self) -> None:
        """Forget all processes, and the files that were not used since the last time.

        Processes are looked at again when they are asked about; those that have ended can't be.
        """
        for tgid in list(self._processes):
            self.forget(tgid)
        self._files.let_go()

    def _take_root(self, process: _Process, folder: ProcessDir) -> None:
        key, root = folder.root()
        process.root = self._roots.setdefault(key, root)

    def _take_maps(self, process: _Process, folder: ProcessDir) -> None:
        text = folder.read("maps", MAPS_LIMIT)
        if len(text) >= MAPS_LIMIT:
            self._counts["maps_cut"] += 1
        mappings = parse_maps(text)
        if mappings == process.mappings:
            return
        if len(process.files) > FILES_LIMIT:
            process.ranges, process.mappings = make_ranges([], []), []
            process.files.clear()
            process.numbers.clear()
        opened = 0
        numbers = []
        # Within one snapshot device and inode are one file; a later one may be another.
        known = {_file_key(mapping) for mapping in process.mappings}
        fresh: set[tuple[int, int, bytes]] = set()
        for mapping in mappings:
            key = _file_key(mapping)
            number = process.numbers.get(key)
            if number is None or (key not in known and key not in fresh):
                opened += 1
                process.files.append(
                    self._file(process, folder, mapping, may_open=opened <= NEW_FILES_LIMIT)
                )
                number = process.numbers[key] = len(process.files) - 1
                fresh.add(key)
            numbers.append(number)
        process.mappings = mappings
        process.ranges = renew(process.ranges, make_ranges(mappings, numbers))
        # What was resolved in memory that is now something else must not be served again.
        process.clear()

    def _file(
        self, process: _Process, folder: ProcessDir, mapping: Mapping, *, may_open: bool
    ) -> MappedFile:
        if mapping.path == b"[vdso]":
            return self._own_vdso(mapping.end - mapping.start)
        if not mapping.file_backed:
            # Executable heaps, stacks and named anonymous memory hold JIT code too.
            if mapping.path.startswith((b"[heap", b"[stack", b"[anon")):
                return MappedFile(clean(mapping.path), anonymous=True)
            return MappedFile(clean(mapping.path)) if mapping.path else self._anonymous
        module = clean(mapping.path.rsplit(b"/", 1)[-1]) or UNKNOWN_MODULE
        if not may_open:
            self._open_failed["too many files mapped"] += 1
            return MappedFile(module)
        try:
            pinned = self._pin(process, folder, mapping)
            uid = process.identity.uid
            return self._files.add(pinned, path=mapping.path, root=process.root, uid=uid)
        except Refused as error:
            self._open_failed[str(error)] += 1
        except OSError as error:
            self._open_failed[error.strerror or "unreadable"] += 1
        return MappedFile(module)

    def _pin(self, process: _Process, folder: ProcessDir, mapping: Mapping) -> Fd:
        if self._privileged:
            try:
                return folder.mapped_file(mapping.start, mapping.end)
            except OSError:
                self._counts["map_files_failed"] += 1
        if mapping.deleted or process.root is None:
            raise Refused("deleted, and map_files cannot be read")
        pinned = open_beneath(process.root.number, mapping.path)
        # Filesystems differ in the device they show here, none in the inode.
        if _inode(pinned) != mapping.inode:
            raise Refused("replaced, and map_files cannot be read")
        return pinned

    def _own_vdso(self, size: int) -> MappedFile:
        """The vDSO: the same bytes in every 64-bit process, so our own is read."""
        if self._vdso is None:
            self._vdso = MappedFile(VDSO_MODULE)
            data = read_vdso()
            self._vdso_size = len(data)
            with suppress(ElfError):
                self._vdso.image = read_image(BytesSource(data))
        # A 32-bit process has another one.
        return self._vdso if size == self._vdso_size else MappedFile(VDSO_MODULE)

    # For whoever walks stacks

    def mapped(self, tgid: int) -> tuple[Ranges, list[MappedFile]] | None:
        """The executable memory of a process and the files it is of; None when it is not known.

        As long as nothing is mapped anew, the ranges are the same object.
        """
        if tgid not in self._processes:
            self.remember(tgid)
        process = self._processes.get(tgid)
        return None if process is None else (process.ranges, process.files)

    def look_again(self, tgid: int) -> bool:
        """Look at a process's mappings anew, if that may be worth it; returns whether it was."""
        process = self._processes.get(tgid)
        if process is None or time.monotonic() <= process.look_again_at:
            return False
        before = process.ranges
        self._look(tgid, process)
        return process.ranges is not before

    def places(self, tgid: int, addrs: U64, *, return_addresses: Bools) -> list[Frame | None]:
        """Frames without names, of what is known already; None where that is too little.

        Reads and parses nothing, so that another thread may ask while one resolves.
        """
        found: list[Frame | None] = [None] * addrs.size
        process = self._processes.get(tgid)
        if process is None:
            return found
        back = _behind(addrs, return_addresses)
        ranges, files = process.ranges, list(process.files)
        where = ranges.find(addrs - back)
        mapped = np.flatnonzero(where >= 0)
        at = where[mapped]
        offsets = addrs[mapped] - back[mapped] - ranges.starts[at] + ranges.offsets[at]
        for number in np.unique(ranges.files[at]).tolist():
            file = files[number] if number < len(files) else None
            if file is None or file.image is None or file.build_id is None:
                continue
            mine = ranges.files[at] == number
            vaddrs, known = file.image.vaddrs(offsets[mine])
            columns = (mapped[mine].tolist(), vaddrs.tolist(), known.tolist())
            for position, vaddr, good in zip(*columns, strict=True):
                if good:
                    place = file.shown_path, file.build_id, vaddr
                    offset = vaddr + int(back[position])
                    found[position] = Frame(None, file.module, offset, "user", *place)
        return found

    def parse(self, tgid: int, file: MappedFile) -> None:
        """Parse a file of a process, if that was not done."""
        process = self._processes.get(tgid)
        if process is not None:
            self._parse(process, file)

    # Perf maps

    def renamed(self, tgid: int) -> int:
        """Look at a process's perf map; how often it has named JIT code anew, or more of it.

        Compilers make their map when they compile first, long after their memory, or when they are
        asked to.
        """
        process = self._processes.get(tgid)
        if process is None:
            return 0
        now = time.monotonic()
        if now > process.map_again_at:
            process.map_again_at = now + LOOK_AGAIN_S
            self._take_perf_map(tgid, process)
        return process.renamed

    def _take_perf_map(self, tgid: int, process: _Process) -> None:
        if process.root is None:
            return
        why = ""
        try:
            opened = open_perf_map(
                process.root, inner_pid=process.identity.inner_pid, uid=process.identity.uid
            )
            current = PerfMap(opened)
            if process.perf_map is not None and process.perf_map.identity == current.identity:
                current.close()
            else:
                self._close_perf_map(process)
                process.perf_map = current
                process.rename()
                self._counts["perf_maps"] += 1
        except FileNotFoundError:
            pass
        except Refused as error:
            why = str(error)
        except OSError as error:
            why = error.strerror or "unreadable"
        if why and why != process.refused:
            self._refused[why] += 1
            if len(self._refusals) < REFUSALS_KEPT:
                path = perf_map_path(process.identity.inner_pid)
                self._refusals.append({"tgid": tgid, "path": path, "why": why})
        process.refused = why
        self._grow_perf_map(process, JIT_REMEMBER_BYTES)

    def _grow_perf_map(self, process: _Process, budget: int) -> None:
        began = time.monotonic()
        if process.perf_map is None or began < process.grow_again_at:
            return
        try:
            if process.perf_map.catch_up(budget):
                process.perf_map.sort()
                process.rename()
        except OSError:
            self._close_perf_map(process)
        ended = time.monotonic()
        if ended - began > CHEAP_S:
            process.grow_again_at = ended + SPENT_SHARE * (ended - began)

    def _close_perf_map(self, process: _Process) -> None:
        if process.perf_map is not None:
            self._malformed += process.perf_map.malformed
            self._dropped += process.perf_map.dropped
            process.perf_map.close()
            process.perf_map = None

    # Resolving

    def user(self, tgid: int, addrs: U64, *, return_addresses: Bools | None = None) -> list[Frame]:
        """Frames of addresses in a process, (n,) uint64, in their order.

        `return_addresses` (n,) is true where the address follows a call, so that the call is what
        is looked up; the frame's offset is that of the address given. A process not remembered
        yet is, and one with addresses in no known mapping is looked at again.
        """
        addrs = np.ascontiguousarray(addrs, dtype=np.uint64)
        if tgid not in self._processes:
            self.remember(tgid)
        process = self._processes.get(tgid)
        if process is None:
            self._counts["unresolved"] += addrs.size
            return [Frame(None, UNKNOWN_MODULE, addr, "user") for addr in addrs.tolist()]
        self._processes.move_to_end(tgid)
        behind = _behind(addrs, return_addresses)
        pairs = list(zip(addrs.tolist(), behind.tolist(), strict=True))
        result = [process.cached(addr, back) for addr, back in pairs]
        missing = [position for position, frame in enumerate(result) if frame is None]
        if missing:
            wanted = list(dict.fromkeys(pairs[position] for position in missing))
            found = dict(zip(wanted, self._resolve(tgid, process, wanted), strict=True))
            for position in missing:
                result[position] = found[pairs[position]]
        return [frame for frame in result if frame is not None]

    def _resolve(self, tgid: int, process: _Process, pairs: list[tuple[int, int]]) -> list[Frame]:
        """Frames of unique (address, bytes to look behind it), put into the caches as well."""
        wanted = np.array([addr - back for addr, back in pairs], dtype=np.uint64)
        where = process.ranges.find(wanted)
        stale = time.monotonic() > process.look_again_at
        if stale and (where < 0).any():
            # Mapped since the last look, or rubbish from a walk along no frame pointers.
            self._look(tgid, process)
            where = process.ranges.find(wanted)

        mapped = np.flatnonzero(where >= 0)
        ranges, at = process.ranges, where[mapped]
        numbers = np.full(wanted.shape, -1, dtype=np.int64)
        numbers[mapped] = ranges.files[at]
        values = wanted.copy()
        symbols = np.full(wanted.shape, -1, dtype=np.int64)
        offsets = wanted[mapped] - ranges.starts[at] + ranges.offsets[at]
        named = []
        in_file = np.zeros(wanted.shape, dtype=np.bool_)
        placed = np.zeros(wanted.shape, dtype=np.bool_)
        for number in np.unique(numbers[mapped]).tolist():
            file = process.files[number]
            self._parse(process, file)
            if not file.anonymous:
                mine = mapped[numbers[mapped] == number]
                values[mine], symbols[mine], placed[mine] = file.locate(
                    offsets[numbers[mapped] == number]
                )
                in_file[mine] = file.image is not None
                named.append((file, symbols[mine]))
        before = self._troubles
        self._files.names(named, trusted=process.deaths < DEATHS_LIMIT)
        process.deaths += self._troubles - before

        if not in_file.all():
            self.renamed(tgid)
        jit = self._resolve_jit(process, wanted, np.flatnonzero(~in_file))
        frames = []
        columns = np.stack((numbers, symbols, placed), axis=1).tolist()
        places: list[int] = values.tolist()
        for (addr, back), (number, symbol, known), value in zip(
            pairs, columns, places, strict=True
        ):
            owner = process.files[number] if number >= 0 else None
            compiled = jit.get(addr - back)
            if compiled is not None:
                frame = Frame(compiled[0], JIT_MODULE, addr - compiled[1], "jit")
            elif owner is None:
                frame = Frame(None, UNKNOWN_MODULE, addr, "user")
            elif owner.anonymous:
                frame = Frame(None, owner.module, addr, "jit")
            elif owner.image is None:
                frame = Frame(None, owner.module, value + back, "user")
            else:
                # A file may say that it is loaded up to the last address there is.
                start = 0 if symbol < 0 else int(owner.image.symbols.starts[symbol])
                frame = Frame(
                    None if symbol < 0 else owner.name(symbol),
                    owner.module,
                    value + back - start & _HIGHEST,
                    "user",
                    owner.shown_path,
                    owner.build_id,
                    value if known else None,
                )
            frames.append(frame)
            self._counts["unresolved" if frame.symbol is None else "resolved"] += 1
            process.keep(addr, back, frame, passing=owner is None or owner.image is None)
        return frames

    def _parse(self, process: _Process, file: MappedFile) -> None:
        file.used = True
        if file.tried or file.key is None:
            return
        if process.deaths >= DEATHS_LIMIT:
            self._counts["files_distrusted"] += 1
            return
        before = self._troubles
        self._files.image(file)
        process.deaths += self._troubles - before

    @property
    def _troubles(self) -> int:
        """How often the worker had to be started anew, whoever's file or name it was."""
        return self._worker.deaths + self._worker.timeouts

    def _resolve_jit(
        self, process: _Process, wanted: U64, positions: npt.NDArray[np.int64]
    ) -> dict[int, tuple[str, int]]:
        """Names and starts of the addresses that a perf map knows, by address."""
        if positions.size:
            self._grow_perf_map(process, JIT_RESOLVE_BYTES)
        if process.perf_map is None or not positions.size:
            return {}
        found = {}
        indices = process.perf_map.lookup(wanted[positions])
        for addr, index in zip(wanted[positions].tolist(), indices.tolist(), strict=True):
            name = process.perf_map.name(index) if index >= 0 else None
            if name is not None:
                found[addr] = (name, process.perf_map.start(index))
        return found

    # Ends

    @property
    def stats(self) -> dict[str, Any]:
        """What was read and what could not be: counts since the start, reasons in words.

        Plain dicts, strings and numbers. May be read by another thread than the one that resolves.
        """
        known = list(self._processes.values())
        maps = [process.perf_map for process in known if process.perf_map is not None]
        counts = self._counts
        return {
            "kernel": {
                "symbols": 0 if self._kernel is None else len(self._kernel),
                "hidden": self._kernel is not None and self._kernel.hidden,
            },
            "processes": {
                "known": len(self._processes),
                "gone": counts["gone"],
                "unreadable": counts["unreadable"],
                "evicted": counts["processes_evicted"],
                "maps_cut": counts["maps_cut"],
            },
            "files": {
                "known": len(self._files),
                "parsed": self._files.parsed,
                "debug_files": self._files.debug_files,
                "table_bytes": self._files.table_bytes,
                "not_opened": dict(self._open_failed),
                "failed": dict(self._files.failed),
                "distrusted": counts["files_distrusted"],
                "map_files_failed": counts["map_files_failed"],
            },
            "perf_maps": {
                "read": counts["perf_maps"],
                "refused": dict(self._refused),
                "refusals": list(self._refusals),
                "malformed_lines": self._malformed + sum(m.malformed for m in maps),
                "dropped_entries": self._dropped + sum(m.dropped for m in maps),
            },
            "worker": {
                "starts": self._worker.starts,
                "deaths": self._worker.deaths,
                "timeouts": self._worker.timeouts,
            },
            "addresses": {"resolved": counts["resolved"], "unresolved": counts["unresolved"]},
        }

    def close(self) -> None:
        """End the worker and close every file."""
        for tgid in list(self._processes):
            self.forget(tgid)
        self._files.close()
        self._worker.close()


def _behind(addrs: U64, return_addresses: Bools | None) -> U64:
    """1 where the byte before the address is looked up, else 0. Zero has no byte before it."""
    if return_addresses is None:
        return np.zeros(addrs.shape, dtype=np.uint64)
    return (return_addresses & (addrs > 0)).astype(np.uint64)


def _file_key(mapping: Mapping) -> tuple[int, int, bytes]:
    # The vDSO's size tells whose it is; pseudo files have no inode to tell them apart.
    return mapping.device, mapping.inode, mapping.path


def _inode(pinned: Fd) -> int:
    return os.fstat(pinned.number).st_ino


def read_vdso() -> bytes:
    """Our own vDSO, which the kernel made; empty where there is none."""
    try:
        text = Path("/proc/self/maps").read_bytes()
        for mapping in parse_maps(text):
            if mapping.path == b"[vdso]":
                with Path("/proc/self/mem").open("rb", buffering=0) as memory:
                    return os.pread(memory.fileno(), mapping.end - mapping.start, mapping.start)
    except OSError:
        pass
    return b""
