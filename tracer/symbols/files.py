"""The ELF files that targets have mapped: opened while they can be, parsed when first asked for."""

from __future__ import annotations

import os
import resource
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from latrace.tracer.symbols import wire
from latrace.tracer.symbols.client import Worker, WorkerError
from latrace.tracer.symbols.demangle import PREFIXES
from latrace.tracer.symbols.frames import clean
from latrace.tracer.symbols.procfs import (
    Fd,
    Refused,
    for_eyes_of,
    open_beneath,
    regular,
    reopen,
)
from latrace.tracer.symbols.table import I64, U64, Image, merge

DEBUG_FOLDER = b"/usr/lib/debug"
"""Where packages put debug files."""
OPEN_LIMIT: Final = 512
"""Descriptors kept for files that nobody has asked about yet."""
KNOWN_LIMIT: Final = 1 << 16
"""Files known at all; a target that maps ever new ones meets it."""
MEMORY_LIMIT: Final = 768 << 20
"""Bytes of symbol tables kept; a file that comes after that stays without symbols."""

Bools = npt.NDArray[np.bool_]
Key = tuple[int, int, int, int, int]
"""device, inode, size, mtime, ctime: the last cannot be set by whoever rewrites the bytes."""


def key_of(status: os.stat_result) -> Key:
    """The identity of a file's content."""
    return (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )


@dataclass(slots=True, eq=False, weakref_slot=True)
class MappedFile:
    """One file, or one that could not be opened or is none (`[vdso]`, `[heap]`): no `key`.

    `pending` is open until the file is `tried`, with the `root` its debug file is sought beneath,
    for the eyes of `uid`.
    `used`: since the last `FileTable.let_go`. `shown_path` and `build_id` (hex) are for frames.
    """

    module: str
    path: bytes = b""
    key: Key | None = None
    image: Image | None = None
    anonymous: bool = False
    tried: bool = False
    used: bool = False
    pending: Fd | None = None
    root: Fd | None = None
    uid: int = -1
    names: dict[int, str] = field(default_factory=dict)
    shown_path: str | None = None
    build_id: str | None = None

    def name(self, index: int) -> str:
        """What a symbol is called, readable if that is known."""
        known = self.names.get(index)
        if known is None:
            known = "" if self.image is None else clean(self.image.symbols.name(index))
        return known

    def locate(self, offsets: U64) -> tuple[U64, I64, Bools]:
        """File offsets to virtual addresses, symbol indices (-1), and which addresses are known.

        An unknown address is the file offset.
        """
        if self.image is None:
            nowhere = np.full(offsets.shape, -1, dtype=np.int64)
            return offsets, nowhere, np.zeros(offsets.shape, dtype=np.bool_)
        vaddrs, known = self.image.vaddrs(offsets)
        indices = self.image.symbols.lookup(vaddrs)
        indices[~known] = -1
        return vaddrs, indices, known


OnParsed = Callable[[MappedFile, int], None]
"""Takes a file and a descriptor of it."""


class FileTable:
    """All files of all targets, one entry for each content. Not thread-safe.

    `failed` counts files without symbols by reason.
    """

    def __init__(self, worker: Worker, on_parsed: OnParsed | None = None) -> None:
        """`on_parsed` is called once with each file that was parsed, while it is open."""
        self._worker = worker
        self._on_parsed = on_parsed
        self._files: dict[Key, MappedFile] = {}
        self._pending: OrderedDict[Key, MappedFile] = OrderedDict()
        self._open_limit = min(OPEN_LIMIT, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
        self._bytes = 0
        self.parsed = 0
        self.debug_files = 0
        self.failed: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._files)

    @property
    def table_bytes(self) -> int:
        """Memory held by symbol tables."""
        return self._bytes

    def add(self, pinned: Fd, *, path: bytes, root: Fd | None, uid: int) -> MappedFile:
        """The entry for a pinned file, opened for reading if it was not known.

        Raises Refused or OSError for one that is not to be read.
        """
        status = regular(pinned)
        key = key_of(status)
        known = self._files.get(key)
        if known is not None and (known.tried or known.pending is not None):
            return known
        if known is None and len(self._files) >= KNOWN_LIMIT:
            raise Refused("too many files")
        file = known or MappedFile(clean(path.rsplit(b"/", 1)[-1]), path, key)
        self._files[key] = file
        file.pending, file.root, file.uid = reopen(pinned), root, uid
        self._pending[key] = file
        while len(self._pending) > self._open_limit:
            _, oldest = self._pending.popitem(last=False)
            oldest.pending = oldest.root = None
        return file

    def image(self, file: MappedFile) -> Image | None:
        """The parsed file, None where it gave nothing; parses it on the first call."""
        if file.image is not None or file.key is None:
            return file.image
        pending, root = file.pending, file.root
        if pending is None:
            return None
        self._pending.pop(file.key, None)
        file.pending = file.root = None
        file.tried = True
        if self._bytes > MEMORY_LIMIT:
            self.failed["memory for symbols used up"] += 1
            return None
        try:
            found = self._worker.elf(pending.number)
            if isinstance(found, int):
                self.failed[wire.STATUS_WORDS[found]] += 1
                return None
            file.image = self._with_debug_file(found, file.path, root, file.uid)
            # One string for all frames of the file.
            file.shown_path = clean(file.path)
            file.build_id = found.build_id.hex() or None
            if self._on_parsed is not None:
                self._on_parsed(file, pending.number)
        except WorkerError as error:
            self.failed[str(error)] += 1
            return None
        finally:
            pending.close()
        self.parsed += 1
        self._bytes += file.image.symbols.nbytes
        return file.image

    def _with_debug_file(self, image: Image, path: bytes, root: Fd | None, uid: int) -> Image:
        if image.symtab or root is None:
            return image
        for candidate in debug_paths(image.build_id, image.debuglink, path):
            try:
                pinned = open_beneath(root.number, candidate)
                for_eyes_of(uid, regular(pinned))
                opened = reopen(pinned)
            except Refused as error:
                self.failed[f"debug file: {error}"] += 1
                continue
            except OSError:
                continue
            found = self._worker.debug(
                opened.number, build_id=image.build_id, crc=image.debuglink_crc
            )
            if isinstance(found, int):
                self.failed["debug file: " + wire.STATUS_WORDS[found]] += 1
                continue
            self.debug_files += 1
            symbols = merge(found.symbols, image.symbols)
            return Image(image.segments, symbols, True, image.build_id, b"", 0)
        return image

    def names(self, wanted: list[tuple[MappedFile, I64]], *, trusted: bool = True) -> None:
        """See that the files have the readable names of these symbols (indices, may repeat).

        Without `trusted` only those that are as they are read; the others stay mangled.
        """
        missing: list[tuple[MappedFile, int]] = []
        raw: list[bytes] = []
        for file, indices in wanted:
            if file.image is None:
                continue
            for index in np.unique(indices).tolist():
                if index < 0 or index in file.names:
                    continue
                name = file.image.symbols.name(index)
                if name.startswith(PREFIXES):
                    if trusted:
                        missing.append((file, index))
                        raw.append(name)
                else:
                    file.names[index] = clean(name)
        if missing:
            for (file, index), name in zip(missing, self._worker.demangle(raw), strict=True):
                file.names[index] = clean(name)

    def let_go(self) -> None:
        """Close every file, and forget those that were not used since the last time."""
        self.close()
        for key, file in list(self._files.items()):
            if not file.used:
                del self._files[key]
                self._bytes -= 0 if file.image is None else file.image.symbols.nbytes
            file.used = False

    def close(self) -> None:
        """Close every file."""
        for file in self._pending.values():
            file.pending = file.root = None
        self._pending.clear()


def debug_paths(build_id: bytes, debuglink: bytes, path: bytes) -> list[bytes]:
    """Where gdb would look for the debug file of the file at `path`, in its order."""
    found = []
    if len(build_id) > 1:
        digest = build_id.hex().encode()
        found.append(DEBUG_FOLDER + b"/.build-id/" + digest[:2] + b"/" + digest[2:] + b".debug")
    if debuglink and path.startswith(b"/"):
        folder = path.rsplit(b"/", 1)[0]
        found += [
            folder + b"/" + debuglink,
            folder + b"/.debug/" + debuglink,
            DEBUG_FOLDER + folder + b"/" + debuglink,
        ]
    # The file itself may be what its link names.
    return [candidate for candidate in found if candidate != path]
