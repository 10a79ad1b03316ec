"""Sampled stacks on their way from ring cells to the capture's `stacks` and `frames` tables.

The cells of a stack are joined and each distinct stack gets its id at once, in the drain; names are
looked up by a thread of their own, because opening and parsing a target's files takes time in
which the ring would fill.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .records import STACK, STACK_CELL_FRAMES, STACK_USER_FRAMES
from .symbols import Frame, Space, Symbolizer

# Frames of the tracepoint and of our own program above the point where the thread stood.
_KERNEL_ENTRY = ("__schedule", "try_to_wake_up", "wake_up_new_task")

# First functions of a thread: a walk that ends in one of them is whole.
_ROOTS = frozenset(
    {
        "_start",
        "__libc_start_main",
        "__libc_start_call_main",
        "__libc_start_main_impl",
        "clone",
        "__clone",
        "clone3",
        "__clone3",
        "start_thread",
        "runtime.goexit",
        "runtime.goexit.abi0",
        "runtime.mstart",
        "runtime.mstart.abi0",
        "runtime.rt0_go",
        "runtime.rt0_go.abi0",
    }
)

_CULPRIT_KEYS = 1 << 62  # see probes/causes.h
_WAITING_CELLS, _WAITING_STACKS = 1 << 12, 1 << 14
_REMEMBERED = 1 << 17  # distinct stacks; beyond, all are forgotten: one that recurs gets a new id

_LAST_ID = 2**31 - 1  # the ids of a capture are 32 bits wide, signed

_Key = tuple[int, int, bytes]


@dataclass(frozen=True, slots=True)
class RawStack:
    """A distinct stack: addresses leaf first, the kernel's before the user's."""

    id: int
    tgid: int
    kernel: npt.NDArray[np.uint64]
    user: npt.NDArray[np.uint64]
    has_user: bool
    """Whether there is a user stack to be had: not in an interrupt, nor of a kernel thread."""


class StackCells:
    """Joins the cells of stacks as they arrive and gives each distinct stack an id."""

    def __init__(self, on_new: Callable[[RawStack], None]) -> None:
        self._on_new = on_new
        self._ids: dict[_Key, int] = {}
        self._next_id = 0
        self._dropped = 0
        self._waiting: npt.NDArray[np.void] = np.empty(0, STACK)
        self._by_key: dict[int, int] = {}

    def intern(
        self,
        tgid: int,
        kernel: npt.NDArray[np.uint64],
        user: npt.NDArray[np.uint64],
        *,
        has_user: bool = True,
    ) -> int:
        """The id of a stack, the same for equal stacks of one process."""
        key = (tgid, len(kernel), kernel.tobytes() + user.tobytes())
        found = self._ids.get(key)
        if found is None:
            if len(self._ids) >= _REMEMBERED:
                self._ids.clear()
            found = self._ids[key] = self._next_id
            self._next_id = (self._next_id + 1) & _LAST_ID
            self._on_new(RawStack(found, tgid, kernel.copy(), user.copy(), has_user))
        return found

    def add(self, cells: npt.NDArray[np.void]) -> None:
        """Take cells, shape (n,) of dtype STACK, in ring order."""
        if len(self._by_key) > _WAITING_STACKS:  # their rows were lost to a full ring
            self._dropped += self._unclaimed()
            self._by_key.clear()
        cells = np.concatenate([self._waiting, cells])
        order = np.lexsort((cells["part"], cells["key"]))
        cells = cells[order]
        keys, starts, counts = np.unique(cells["key"], return_index=True, return_counts=True)
        depth = cells["kernel"][starts].astype(int) + cells["user"][starts]
        whole = counts == np.maximum(1, -(-depth // STACK_CELL_FRAMES))
        for index in np.flatnonzero(whole):
            start, first = starts[index], cells[starts[index]]
            frames = cells["frames"][start : start + counts[index]].ravel()
            kernel = int(first["kernel"])
            self._by_key[int(keys[index])] = self.intern(
                int(first["tgid"]),
                frames[:kernel],
                frames[kernel : int(depth[index])],
                has_user=bool(first["has_user"]),
            )
        # The rest of a stack follows at once. What is still in parts after so many cells has lost
        # one to a full ring.
        self._waiting = cells[np.repeat(~whole, counts)][-_WAITING_CELLS:]

    def begin_epoch(self) -> None:
        """Give no id from before again: what it stands for may be forgotten."""
        self._ids.clear()

    def ids(self, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.int32]:
        """Stack ids of keys; -1 for key 0 and for stacks that have not come. Each is given once."""
        found = np.full(len(keys), -1, np.int32)
        for index in np.flatnonzero(keys):
            found[index] = self._by_key.pop(int(keys[index]), -1)
        return found

    def arrived(self, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Which keys need no more waiting: those of 0, and those whose stack is here."""
        here: npt.NDArray[np.bool_] = keys == 0
        for index in np.flatnonzero(~here):
            here[index] = int(keys[index]) in self._by_key
        return here

    def _unclaimed(self) -> int:
        """Stacks whose row did not come, though it was sent."""
        return sum(not key & _CULPRIT_KEYS for key in self._by_key)

    def forget(self) -> int:
        """Drop what waits for cells that never came or rows that never came; returns how many."""
        dropped = self._dropped + len(np.unique(self._waiting["key"])) + self._unclaimed()
        self._waiting = np.empty(0, STACK)
        self._by_key.clear()
        return dropped


@dataclass(slots=True)
class NamedStacks:
    """Rows for the tables `frames` and `stacks`, and how the stacks ended."""

    frames: list[tuple[int, Frame]]
    stacks: list[tuple[int, list[int], bool, int]]


class _Epoch:
    """A place in the queue: stacks behind it refer to no frame before it."""


class Naming:
    """Names the frames of new stacks on a thread of its own."""

    def __init__(self) -> None:
        self._symbolizer = Symbolizer()
        self._todo: queue.SimpleQueue[RawStack | int | _Epoch | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[NamedStacks] = queue.SimpleQueue()
        self._frame_ids: dict[Frame, int] = {}
        self._next_frame = 0
        self._unnamed: dict[int, RawStack] = {}
        self._late = 0
        self._thread = threading.Thread(target=self._run, name="latrace-names", daemon=True)
        self._thread.start()

    def add(self, stack: RawStack) -> None:
        """Name a stack; its rows come out of `take` later."""
        self._unnamed[stack.id] = stack
        self._todo.put(stack)

    def changed(self, tgid: int) -> None:
        """The process has mapped something new, by exec at the latest."""
        self._todo.put(tgid)

    def begin_epoch(self) -> None:
        """Let the rows of stacks added from now on refer to none of the rows before.

        Programs that have not been seen since the last time are forgotten.
        """
        self._todo.put(_Epoch())

    @property
    def is_idle(self) -> bool:
        """Whether all that was added has been named; `take` then has it."""
        return not self._unnamed

    def take(self) -> NamedStacks:
        """All rows that are ready."""
        rows = NamedStacks([], [])
        while not self._done.empty():
            ready = self._done.get()
            rows.frames += ready.frames
            rows.stacks += ready.stacks
        return rows

    def finish(self, timeout_s: float) -> NamedStacks:
        """Wait for what is under way, at most so long; returns the last rows.

        The frames of stacks that are not named by then are addresses.
        """
        self._todo.put(None)
        self._thread.join(timeout_s)
        rows = self.take()
        named = {number for number, *_ in rows.stacks}
        late = [stack for stack in list(self._unnamed.values()) if stack.id not in named]
        self._late += len(late)
        for stack in late:
            kernel = _addresses("kernel", stack.kernel)
            self._add_rows(rows, stack, kernel, _addresses("user", stack.user))
        self._unnamed.clear()
        return rows

    def stats(self) -> dict[str, Any]:
        """What the look-up refused or could not read, by reason."""
        return self._symbolizer.stats | {"late": self._late}

    def _run(self) -> None:
        known: set[int] = set()
        try:
            while (item := self._todo.get()) is not None:
                if isinstance(item, _Epoch):
                    self._frame_ids.clear()
                    known.clear()
                    self._symbolizer.let_go()
                    continue
                if isinstance(item, int):
                    if item in known:
                        self._symbolizer.remember(item)
                    continue
                if item.tgid not in known and len(item.user):
                    known.add(item.tgid)
                    self._symbolizer.remember(item.tgid)
                self._done.put(self._name(item))
                self._unnamed.pop(item.id, None)
        finally:
            self._symbolizer.close()

    def _name(self, stack: RawStack) -> NamedStacks:
        kernel = _from_entry(self._symbolizer.kernel(stack.kernel))
        returns = np.arange(len(stack.user)) > 0
        user = self._symbolizer.user(stack.tgid, stack.user, return_addresses=returns)
        rows = NamedStacks([], [])
        self._add_rows(rows, stack, kernel, user)
        return rows

    def _add_rows(
        self, rows: NamedStacks, stack: RawStack, kernel: list[Frame], user: list[Frame]
    ) -> None:
        ids = []
        for frame in kernel + user:
            number = self._frame_ids.get(frame)
            if number is None:
                number = self._frame_ids[frame] = self._next_frame
                self._next_frame = (number + 1) & _LAST_ID
                rows.frames.append((number, frame))
            ids.append(number)
        whole = (
            len(user) < STACK_USER_FRAMES and user[-1].symbol in _ROOTS
            if user
            else not stack.has_user
        )
        rows.stacks.append((stack.id, ids, whole, len(kernel)))


def _addresses(space: Space, addresses: npt.NDArray[np.uint64]) -> list[Frame]:
    """Frames that nobody had the time to name."""
    return [Frame(None, "[not looked up]", address, space) for address in addresses.tolist()]


def _from_entry(frames: list[Frame]) -> list[Frame]:
    """Kernel frames from the scheduler's entry on, without the tracing above it."""
    for index, frame in enumerate(frames):
        if frame.symbol in _KERNEL_ENTRY:
            return frames[index:]
    return frames
