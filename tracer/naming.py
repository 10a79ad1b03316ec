"""Sampled stacks become frames with names, on a thread of its own.

User stacks are walked by what the compiler says of each function (tracer/unwinding), in batches,
from the copy that the probes made; the copy is dropped then, and never leaves the memory. Without
one, or where its walk comes to nothing, what the kernel found by frame pointers stands.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from latrace.analysis.start_up import is_start_up

from .stacks import RawStack
from .symbols import Frame, Space
from .symbols.frames import NOT_LOOKED_UP
from .unwinding.pointers import OUTERMOST, depth_of, join
from .unwinding.walker import WHOLE, Walked, Walker

# Frames of the tracepoint and of our own program above the point where the thread stood.
_KERNEL_ENTRY = ("__schedule", "try_to_wake_up", "wake_up_new_task")

_REMEMBERED = 1 << 17  # distinct stacks; beyond, all are forgotten: one that recurs gets a new id
_NAMED = -1  # for good; else a number that changes when JIT code without a name may have got one
_LAST_ID = 2**31 - 1  # the ids of a capture are 32 bits wide, signed
_BATCH, _GATHER_S = 512, 5.0  # a walk of few takes as long as one of many
_CLOSE_TIMEOUT_S = 60.0  # it looks at what it has at hand, but reads no files any more
_COPIES_BYTES = 64 << 20  # that wait to be walked; beyond, frame pointers have to do

_Key = tuple[int, int, bytes, str]
_Numbered = tuple[int, RawStack]
_Item = list[_Numbered]
"""Stacks by the order in which they came."""


@dataclass(slots=True)
class NamedStacks:
    """Rows for the tables `frames` and `stacks`, and whose they are."""

    numbers: list[tuple[int, int]] = field(default_factory=list)
    """Key of a sampled stack → its row in `stacks`."""
    frames: list[tuple[int, Frame]] = field(default_factory=list)
    stacks: list[tuple[int, list[int], str, int]] = field(default_factory=list)
    """Number, frames, how the walk ended (`whole`, or why not), and how many are the kernel's."""


class _Epoch:
    """A place in the queue: stacks behind it refer to no frame before it."""


class _Now:
    """A place in the queue: stacks before it are not to wait for more."""


class Naming:
    """Walks and names stacks. `add` and `take` are for one thread, the work is done on another."""

    def __init__(self) -> None:
        self._walker = Walker()
        self._symbolizer = self._walker.symbolizer
        self._todo: queue.SimpleQueue[_Item | int | _Epoch | _Now | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[NamedStacks] = queue.SimpleQueue()
        self._ids: dict[_Key, tuple[int, int]] = {}
        self._next_id = itertools.count()
        self._frame_ids: dict[Frame, int] = {}
        self._next_frame = 0
        self._added = 0
        self._unnamed: dict[int, RawStack] = {}
        self._waiting_bytes = 0
        self._counts: Counter[str] = Counter()
        self._cpu_s = 0.0
        self._met: set[int] = set()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="latrace-names", daemon=True)
        self._thread.start()

    def add(self, stacks: Iterable[RawStack]) -> None:
        """Name stacks; their rows come out of `take` later."""
        item: _Item = []
        for stack in stacks:
            if stack.copy is not None and self._waiting_bytes > _COPIES_BYTES:
                self._counts["copies_dropped"] += 1
                stack = replace(stack, copy=None)  # noqa: PLW2901
            self._waiting_bytes += stack.copy_bytes
            item.append((self._added + len(item), stack))
        self._unnamed.update(item)
        self._added += len(item)
        self._todo.put(item)  # each one wakes the other thread

    def number(self, stack: RawStack) -> int:
        """The number that a stack has from now on, whatever it looks like; its rows come later."""
        numbered = replace(stack, number=next(self._next_id) & _LAST_ID)
        self.add([numbered])
        return numbered.number

    def changed(self, tgid: int) -> None:
        """The process has mapped something new, by exec at the latest."""
        self._todo.put(tgid)

    def hurry(self) -> None:
        """Name what has been added, and do not wait for more."""
        self._todo.put(_Now())

    def begin_epoch(self) -> None:
        """Let the rows of stacks added from now on refer to none of the rows before.

        Programs that have not been seen since the last time are forgotten.
        """
        self._todo.put(_Epoch())

    @property
    def copy_pages(self) -> int:
        """How many pages the copies of user stacks should have."""
        return self._walker.copy_pages

    @property
    def added(self) -> int:
        """How many stacks have been added."""
        return self._added

    def has_named(self, added: int) -> bool:
        """Whether the first so many that were added have been named; `take` then has them."""
        return all(serial >= added for serial in list(self._unnamed))

    def take(self) -> NamedStacks:
        """All rows that are ready."""
        rows = NamedStacks()
        while not self._done.empty():
            ready = self._done.get()
            rows.numbers += ready.numbers
            rows.frames += ready.frames
            rows.stacks += ready.stacks
        return rows

    def finish(self, timeout_s: float) -> NamedStacks:
        """Wait for what is under way, at most so long; returns the last rows.

        The frames of stacks that are not named by then are addresses.
        """
        self._symbolizer.hurry()  # the trace is over, and nothing of it can be disturbed
        self._todo.put(None)
        self._thread.join(timeout_s)
        rows = self.take()
        named = {key for key, _ in rows.numbers}
        late = [stack for stack in list(self._unnamed.values()) if stack.key not in named]
        self._counts["late"] += len(late)
        for stack in late:
            number = next(self._next_id) & _LAST_ID if stack.number < 0 else stack.number
            rows.numbers.append((stack.key, number))
            kernel = _addresses("kernel", stack.kernel)
            self._add_rows(rows, number, kernel, self._late_frames(stack), "not looked up")
        self._unnamed.clear()
        return rows

    def close(self) -> None:
        """Drop what is not named yet, and wait for the thread: it must not outlive the process.

        (A thread that the interpreter ends within a library's code takes the process with it.)
        """
        self._closing = True
        self._todo.put(None)
        self._walker.abandon()
        self._thread.join(_CLOSE_TIMEOUT_S)

    def stats(self) -> dict[str, Any]:
        """What the look-up refused or could not read, by reason; and the CPU time of its thread for
        so many stacks."""
        counts = {name: self._counts[name] for name in ("late", "copies_dropped")}
        took = {"stacks": self._added, "cpu_s": round(self._cpu_s, 6)}
        return self._symbolizer.stats | counts | took | {"unwinding": self._walker.stats}

    def _run(self) -> None:
        try:
            for item in self._items():
                if isinstance(item, _Epoch):
                    self._ids.clear()
                    self._frame_ids.clear()
                    self._met.clear()
                    self._walker.let_go()
                    self._symbolizer.let_go()
                elif isinstance(item, int):
                    if item in self._met:
                        self._symbolizer.remember(item)
                elif isinstance(item, list) and not self._closing:
                    self._name(item)
        finally:
            self._symbolizer.close()

    def _items(self) -> Iterator[_Item | int | _Epoch | _Now]:
        """What is to be done, stacks in batches of what comes within a moment."""
        batch: _Item = []
        end_s = 0.0
        while True:
            try:
                wait_s = max(0.0, end_s - time.monotonic()) if batch else None
                item = self._todo.get(timeout=wait_s)
            except queue.Empty:
                yield batch
                batch = []
                continue
            if isinstance(item, list):
                end_s = end_s if batch else time.monotonic() + _GATHER_S
                if self._closing:
                    continue
                batch += item
                for _, stack in item:
                    self._meet(stack)
                if len(batch) < _BATCH:
                    continue
            if batch:
                yield batch
                batch = []
            if item is None:
                return
            if not isinstance(item, list):
                yield item

    def _meet(self, stack: RawStack) -> None:
        """Look at a process when its first stack comes: it may not be there for much longer."""
        if stack.has_user and stack.tgid not in self._met:
            self._met.add(stack.tgid)
            self._symbolizer.remember(stack.tgid)

    def _name(self, batch: _Item) -> None:
        stacks = [stack for _, stack in batch]
        rows = NamedStacks()
        for stack, walked in zip(stacks, self._walker.walk(stacks), strict=True):
            number = self._numbered(rows, stack, walked)
            if stack.number < 0:
                rows.numbers.append((stack.key, number))
            self._waiting_bytes -= stack.copy_bytes
        self._cpu_s = time.thread_time()
        self._done.put(rows)
        for serial, _ in batch:
            self._unnamed.pop(serial, None)

    def _numbered(self, rows: NamedStacks, stack: RawStack, walked: Walked | None) -> int:
        """The number of a stack; its rows are made when it is new."""
        if walked is None or walked.end != WHOLE:
            pointers = join(walked, stack.user)
            frames = self._name_user(stack.tgid, pointers)
            depth = depth_of(frames)
            if walked is None or self._is_rooted(frames[:depth]):
                walked = Walked(pointers.addresses[:depth], pointers.exact[:depth], pointers.end)
        kernel, user = stack.kernel, walked.addresses
        key = (stack.tgid, len(kernel), kernel.tobytes() + user.tobytes(), walked.end)
        known = self._ids.get(key) if stack.number < 0 else None
        if known is not None and known[1] in (_NAMED, self._symbolizer.renamed(stack.tgid)):
            return known[0]
        number = next(self._next_id) & _LAST_ID if stack.number < 0 else stack.number
        if len(self._ids) >= _REMEMBERED:
            self._ids.clear()
        kernel_frames = _from_entry(self._symbolizer.kernel(kernel))
        renamed = self._symbolizer.renamed(stack.tgid)
        user_frames = self._name_user(stack.tgid, walked)
        nameless = any(frame.space == "jit" and frame.symbol is None for frame in user_frames)
        self._ids[key] = number, renamed if nameless else _NAMED
        end = walked.end
        if not stack.has_user or self._is_rooted(user_frames):
            end = WHOLE
        self._add_rows(rows, number, kernel_frames, user_frames, end)
        return number

    def _name_user(self, tgid: int, walked: Walked) -> list[Frame]:
        return self._symbolizer.user(tgid, walked.addresses, return_addresses=~walked.exact)

    @staticmethod
    def _is_rooted(frames: list[Frame]) -> bool:
        """Whether the outermost function is the first of a thread."""
        symbol = frames[-1].symbol if frames else None
        return symbol is not None and (symbol in OUTERMOST or is_start_up(symbol))

    def _late_frames(self, stack: RawStack) -> list[Frame]:
        """Frames without names; with what a later look-up needs, where that is known."""
        callers = np.arange(len(stack.user)) > 0
        places = self._symbolizer.places(stack.tgid, stack.user, return_addresses=callers)
        bare = _addresses("user", stack.user)
        return [
            late if place is None else place._replace(module=late.module)
            for place, late in zip(places, bare, strict=True)
        ]

    def _add_rows(
        self, rows: NamedStacks, number: int, kernel: list[Frame], user: list[Frame], end: str
    ) -> None:
        ids = []
        for frame in kernel + user:
            known = self._frame_ids.get(frame)
            if known is None:
                known = self._frame_ids[frame] = self._next_frame
                self._next_frame = (known + 1) & _LAST_ID
                rows.frames.append((known, frame))
            ids.append(known)
        rows.stacks.append((number, ids, end, len(kernel)))


def _addresses(space: Space, addresses: npt.NDArray[np.uint64]) -> list[Frame]:
    """Frames that nobody had the time to name."""
    return [Frame(None, NOT_LOOKED_UP, address, space) for address in addresses.tolist()]


def _from_entry(frames: list[Frame]) -> list[Frame]:
    """Kernel frames from the scheduler's entry on, without the tracing above it."""
    for index, frame in enumerate(frames):
        if frame.symbol in _KERNEL_ENTRY:
            return frames[index:]
    return frames
