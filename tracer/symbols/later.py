"""What can be said of a capture's frames after it: names that were missing, inlined functions.

A capture says of which file each frame is, by path and build id. A file is looked into only if its
build id is still that one, with the rights of the user who asks, and by the unprivileged worker.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow.compute as pc

from latrace.analysis.capture import Capture, FrameName
from latrace.tracer.errors import LatraceError
from latrace.tracer.outputs import acting_as, calling_user
from latrace.tracer.symbols import files, wire
from latrace.tracer.symbols.client import Worker, WorkerError
from latrace.tracer.symbols.demangle import PREFIXES
from latrace.tracer.symbols.dwarf import NAMELESS
from latrace.tracer.symbols.elf import Links
from latrace.tracer.symbols.files import debug_paths
from latrace.tracer.symbols.frames import NOT_LOOKED_UP, clean
from latrace.tracer.symbols.procfs import Fd, Refused, open_beneath, regular, reopen
from latrace.tracer.symbols.table import SymbolTable, empty_table, merge

TIME_LIMIT_S: Final = 60.0
"""For all files of a capture together; what is not looked into by then stays as it is."""
DEATHS_LIMIT: Final = 3
SHOWN_MODULES: Final = 3
BUILD_ID_BYTES: Final = 4
"""A shorter one tells nothing."""

NO_DWARF: Final = "no DWARF"
ANOTHER_BUILD: Final = "another build by now"
NOT_THERE: Final = "not found"
NO_BUILD_ID: Final = "no build id"
NOT_RECORDED: Final = "the capture does not say where they are"
UNREADABLE: Final = "not readable"
TOO_LATE: Final = "it took too long"

_COLUMNS: Final = ("id", "symbol", "module", "offset", "space", "path", "build_id", "address")


@dataclass(frozen=True, slots=True)
class Found:
    """Frame ids to what was found of them, and what is to be told about the rest.

    inlined: the functions that the frame's function had inlined there, innermost first.
    """

    names: dict[int, FrameName]
    inlined: dict[int, tuple[str, ...]]
    told: list[str]


@dataclass(slots=True)
class _Module:
    """The frames of one build of one file."""

    path: bytes
    build_id: bytes
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return clean(self.path.rsplit(b"/", 1)[-1])

    @property
    def addresses(self) -> list[int]:
        return [row["address"] for row in self.rows]


def look_up(capture: Capture, *, inlines: bool, worker: Worker | None = None) -> Found:
    """Look the capture's frames up again, as far as that is worth it.

    Names: of frames that nobody had the time to look up, and of files that have got a debug file
    since. With `inlines`: what was inlined, of all frames. Raises CaptureError only.
    """
    modules, without = _modules(capture)
    search = _Search(worker or Worker())
    try:
        for module in modules:
            search.name(module)
        if inlines:
            search.without |= without
            for module in sorted(modules, key=lambda one: -len(one.rows)):
                search.expand(module)
    finally:
        search.close()
    return Found(search.names, search.inlined, search.told())


def with_names(capture: Capture) -> Capture:
    """The capture, with the names that its frames lacked when it was recorded."""
    capture.name_frames(look_up(capture, inlines=False).names)
    return capture


def _modules(capture: Capture) -> tuple[list[_Module], dict[str, Counter[str]]]:
    """The files of the frames, and how many frames of which file cannot be looked up, by reason."""
    table = capture.table("frames", columns=_COLUMNS)
    modules: dict[tuple[str, str], _Module] = {}
    without: dict[str, Counter[str]] = {}
    for row in table.filter(pc.equal(table["space"], "user")).to_pylist():
        key = row["path"], row["build_id"]
        if None in key or row["address"] is None:
            name = str(row["module"] or "[unknown]")
            why = NOT_RECORDED if row["path"] is None else NO_BUILD_ID
            if not name.startswith("["):
                without.setdefault(why, Counter())[name] += 1
            continue
        if key not in modules:
            try:
                build_id = bytes.fromhex(key[1])
            except ValueError:
                continue  # somebody else made this capture
            if len(build_id) < BUILD_ID_BYTES:
                continue
            modules[key] = _Module(key[0].encode(), build_id)
        modules[key].rows.append(row)
    return list(modules.values()), without


class _Search:
    """One pass over the files of a capture."""

    def __init__(self, worker: Worker) -> None:
        self.names: dict[int, FrameName] = {}
        self.inlined: dict[int, tuple[str, ...]] = {}
        self._worker = worker
        self._caller = calling_user()
        self._root = Fd(os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        self._deadline_s = time.monotonic() + TIME_LIMIT_S
        self.without: dict[str, Counter[str]] = {}
        self._no_libdw = False

    def close(self) -> None:
        """End the worker."""
        self._worker.close()
        self._root.close()

    @property
    def _trusted(self) -> bool:
        return self._worker.deaths + self._worker.timeouts < DEATHS_LIMIT

    def _open(self, path: bytes) -> Fd | None:
        """A regular file that the user may read; None for anything else."""
        try:
            with acting_as(self._caller):
                pinned = open_beneath(self._root.number, path)
                regular(pinned)
                return reopen(pinned)
        except (OSError, Refused, LatraceError):
            return None

    # Names

    def name(self, module: _Module) -> None:
        """Find the names that its frames lack, if there is a reason to think that they are there.

        A file was asked for them while it was traced: what is new since is a debug file, which
        packages put under its build id.
        """
        bare = [row for row in module.rows if row["symbol"] is None]
        if not bare or not self._trusted or time.monotonic() > self._deadline_s:
            return
        by_id = self._open(debug_paths(module.build_id, b"", b"")[0])
        if by_id is None and not any(row["module"] == NOT_LOOKED_UP for row in bare):
            return
        try:
            symbols = self._symbols(module, by_id)
        except WorkerError:
            return
        found = symbols.lookup(np.array([row["address"] for row in bare], np.uint64)).tolist()
        hits = [(row, index) for row, index in zip(bare, found, strict=True) if index >= 0]
        texts = self._readable([symbols.name(index) for _, index in hits])
        for (row, index), text in zip(hits, texts, strict=True):
            # Until now the offset is the virtual address.
            offset = max(0, (row["offset"] or 0) - int(symbols.starts[index]))
            self.names[row["id"]] = FrameName(text, module.name, offset)

    def _symbols(self, module: _Module, by_id: Fd | None) -> SymbolTable:
        """All functions of its file and of its debug file. Raises WorkerError."""
        symbols, link = empty_table(), b""
        own = self._open(module.path)
        if own is not None:
            image = self._worker.elf(own.number)
            if not isinstance(image, int) and image.build_id == module.build_id:
                symbols, link = image.symbols, image.debuglink
                if image.symtab:
                    return symbols
        others = [by_id] if by_id is not None else []
        for path in debug_paths(module.build_id, link, module.path)[1:] if link else []:
            found = self._open(path)
            others += [] if found is None else [found]
        for fd in others:
            debug = self._worker.debug(fd.number, build_id=module.build_id, crc=0)
            if not isinstance(debug, int):
                return merge(debug.symbols, symbols)
        return symbols

    def _readable(self, raw: list[bytes]) -> list[str]:
        """Demangled and clean."""
        mangled = list(dict.fromkeys(name for name in raw if name.startswith(PREFIXES)))
        known = dict(zip(mangled, self._worker.demangle(mangled), strict=True))
        return [clean(known.get(name, name)) for name in raw]

    # Inlined functions

    def expand(self, module: _Module) -> None:
        """Find what was inlined at the addresses of its frames."""
        if self._no_libdw:
            return
        if time.monotonic() > self._deadline_s:
            self._miss(module, TOO_LATE)
            return
        try:
            why = self._expand(module) if self._trusted else UNREADABLE
        except WorkerError:
            why = UNREADABLE
        if why:
            self._miss(module, why)

    def _miss(self, module: _Module, why: str) -> None:
        self.without.setdefault(why, Counter())[module.name] += len(module.rows)

    def _expand(self, module: _Module) -> str:
        """Returns why there is nothing, or "". Raises WorkerError."""
        paths = [*debug_paths(module.build_id, b"", b"")[:1], module.path]
        why = NOT_THERE
        for path in paths:  # it grows
            fd = self._open(path)
            if fd is None:
                continue
            links = self._worker.links(fd.number)
            if isinstance(links, int):
                why = UNREADABLE
                continue
            if links.build_id != module.build_id:
                why = ANOTHER_BUILD if path == module.path else why
                continue
            why = NO_DWARF
            if path == module.path and links.debuglink:
                paths += debug_paths(module.build_id, links.debuglink, path)[1:]
            if links.dwarf:
                return self._chains(module, fd, self._alternate(path, links))
        return why

    def _alternate(self, path: bytes, links: Links) -> Fd | None:
        """What dwz put aside for several files; only of where packages install debug files."""
        if not links.altlink or len(links.alt_build_id) < BUILD_ID_BYTES:
            return None
        there = os.path.normpath(os.path.join(os.path.dirname(path), links.altlink))  # noqa: PTH118, PTH120 - bytes
        candidates = debug_paths(links.alt_build_id, b"", b"")
        candidates += [there] if there.startswith(files.DEBUG_FOLDER + b"/") else []
        for candidate in candidates:
            fd = self._open(candidate)
            if fd is not None:
                told = self._worker.links(fd.number)
                if not isinstance(told, int) and told.build_id == links.alt_build_id:
                    return fd
        return None

    def _chains(self, module: _Module, fd: Fd, alt: Fd | None) -> str:
        answer = self._worker.chains(
            fd.number,
            module.addresses[: wire.MAX_ADDRESSES],
            alt=None if alt is None else alt.number,
            build_id=module.build_id,
        )
        if isinstance(answer, int):
            self._no_libdw = answer == wire.STATUS_NO_LIBDW
            return "" if self._no_libdw else UNREADABLE
        chains, raw = answer
        names = self._readable(raw)
        for row, chain in zip(module.rows, chains, strict=False):
            # The last one is the function itself.
            inside = tuple(names[place] for place in chain[:-1] if raw[place] != NAMELESS)
            if inside:
                self.inlined[row["id"]] = inside
        return ""

    # Ends

    def told(self) -> list[str]:
        """What is to be said of the frames without an answer, a line for each reason."""
        if self._no_libdw:
            return ["no inlined functions: libdw is not installed (sudo apt-get install libdw1)"]
        lines = []
        for why, counts in self.without.items():
            most = counts.most_common(SHOWN_MODULES)
            shown = ", ".join(f"{name} ({count:,})" for name, count in most)
            more = f" and {len(counts) - len(most)} more files" if len(counts) > len(most) else ""
            frames = sum(counts.values())
            of = f"{frames:,} frame" + ("s" if frames > 1 else "")
            lines.append(f"no inlined functions for {of}, {why}: {shown}{more}")
        return lines
