"""Sampled stacks on their way from the rings to the capture's `stacks` table.

The cells of a stack are joined, and put together with the copy that was made of its user stack.
Walking it and looking up names is done by a thread of their own (tracer/naming.py), because opening
and parsing a target's files takes time in which the ring would fill; what number a stack has is
known when that is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .records import STACK, STACK_CELL_FRAMES

COPY_PAGES = 4
"""Of each user stack that are copied to begin with, beside the one that it stands in."""

_CULPRIT_KEYS = 1 << 62  # see probes/causes.h
_WAITING_CELLS, _WAITING_STACKS, _WAITING_COPIES = 1 << 12, 1 << 14, 256


@dataclass(frozen=True, slots=True)
class Copy:
    """A user stack as it was: registers, shape (21,) uint64 in the order of struct pt_regs, and the
    bytes from the address `base` upwards."""

    regs: npt.NDArray[np.uint64]
    base: int
    memory: npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class RawStack:
    """A stack that was sampled: addresses leaf first, the kernel's before the user's."""

    key: int
    tgid: int
    kernel: npt.NDArray[np.uint64]
    user: npt.NDArray[np.uint64]
    """By frame pointers, as the kernel walks them."""
    has_user: bool
    """Whether there is a user stack to be had: not in an interrupt, nor of a kernel thread."""
    copy: Copy | None = None
    number: int = -1
    """What it is to have in the table; -1: that of an equal one, or a new one."""

    @property
    def copy_bytes(self) -> int:
        """The size of the copy."""
        return 0 if self.copy is None else self.copy.memory.nbytes


class StackCells:
    """Joins the cells of stacks as they arrive, and knows the numbers of those that are named."""

    def __init__(self, on_whole: Callable[[list[RawStack]], None]) -> None:
        self._on_whole = on_whole
        self._dropped = 0
        self._waiting: npt.NDArray[np.void] = np.empty(0, STACK)
        self._copies: dict[int, Copy] = {}
        self._unnamed: set[int] = set()
        self._numbers: dict[int, int] = {}

    def add_copies(
        self, copies: Iterable[tuple[npt.NDArray[np.void], npt.NDArray[np.uint8]]]
    ) -> None:
        """Take copies: heads, shape (1,) of dtype COPY, and bytes; before the stacks' cells."""
        for head, memory in copies:
            self._copies[int(head["key"][0])] = Copy(head["regs"][0], int(head["base"][0]), memory)
        # One is there before the cells of its stack are: what stays has lost them to a full ring.
        while len(self._copies) > _WAITING_COPIES:
            self._copies.pop(next(iter(self._copies)))

    def add(self, cells: npt.NDArray[np.void]) -> None:
        """Take cells, shape (n,) of dtype STACK, in ring order."""
        if len(self._numbers) > _WAITING_STACKS:  # their rows were lost to a full ring
            self._dropped += _of_waits(self._numbers)
            self._numbers.clear()
        cells = np.concatenate([self._waiting, cells])
        order = np.lexsort((cells["part"], cells["key"]))
        cells = cells[order]
        keys, starts, counts = np.unique(cells["key"], return_index=True, return_counts=True)
        depth = cells["kernel"][starts].astype(int) + cells["user"][starts]
        whole = counts == np.maximum(1, -(-depth // STACK_CELL_FRAMES))
        firsts, frames = cells[starts], cells["frames"].ravel()
        columns = [
            values[whole].tolist()
            for values in (
                keys,
                starts * STACK_CELL_FRAMES,
                depth,
                firsts["kernel"],
                firsts["tgid"],
                firsts["has_user"],
            )
        ]
        stacks = [
            RawStack(
                key,
                tgid,
                frames[start : start + kernel],
                frames[start + kernel : start + deep],
                has_user=bool(has_user),
                copy=self._copies.pop(key, None),
            )
            for key, start, deep, kernel, tgid, has_user in zip(*columns, strict=True)
        ]
        if stacks:
            self._unnamed.update(columns[0])
            self._on_whole(stacks)
        # The rest of a stack follows at once. What is still in parts after so many cells has lost
        # one to a full ring.
        self._waiting = cells[np.repeat(~whole, counts)][-_WAITING_CELLS:]

    def resolve(self, numbers: Iterable[tuple[int, int]]) -> None:
        """Take the numbers of stacks that are named: pairs of key and number."""
        for key, number in numbers:
            self._numbers[key] = number
            self._unnamed.discard(key)

    def ids(self, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.int32]:
        """Stack ids of keys; -1 for key 0 and for stacks that have none yet. Each is given once."""
        found = np.full(len(keys), -1, np.int32)
        for index in np.flatnonzero(keys):
            key = int(keys[index])
            found[index] = self._numbers.pop(key, -1)
            self._unnamed.discard(key)
        return found

    def waits_for(
        self, keys: npt.NDArray[np.uint64]
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Which keys have no number yet: of stacks that have not come, and that are not named."""
        absent, unnamed = np.zeros((2, len(keys)), np.bool_)
        for index in np.flatnonzero(keys):
            key = int(keys[index])
            unnamed[index] = key in self._unnamed
            absent[index] = not unnamed[index] and key not in self._numbers
        return absent, unnamed

    def forget(self) -> int:
        """Drop what waits for cells that never came or rows that never came; returns how many."""
        parts = len(np.unique(self._waiting["key"]))
        dropped = self._dropped + parts + _of_waits(self._numbers) + _of_waits(self._unnamed)
        self._waiting = np.empty(0, STACK)
        self._copies.clear()
        self._unnamed.clear()
        self._numbers.clear()
        return dropped


def _of_waits(keys: Iterable[int]) -> int:
    """Those whose row has to come, as it was sent; a culprit's may not have been."""
    return sum(not key & _CULPRIT_KEYS for key in keys)
