"""Unwind many stacks at once from copies of their registers and memory, a frame of each per step.

All that is followed is what the copies hold, and what they hold was written by strangers: every
read is checked against the bounds of its copy, each frame has to lie above the last one (a signal
may have come from another stack, a few times), and there are at most `MAX_FRAMES`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from .places import FRAME_POINTERS, I64, U8, U32, U64, Bool, End, Places, Steps
from .rules import CFA, CFA_DEREF, CFA_OFFSET, CFA_PLT, COLUMNS, MEMORY, RBP, RETURN, RSP, VALUE

MAX_FRAMES: Final = 256
MAX_SWITCHES: Final = 4
"""Signal frames of one stack that may lead to a lower address: to or from another stack."""

_WORD: Final = 8
_REACH: Final = 64 << 10
"""Bytes above the beginning of a copy; what lies beyond is on another stack, and would be in no
larger copy either."""


@dataclass(frozen=True, slots=True)
class Stacks:
    """What was copied of n threads.

    registers: (n, 17) uint64, in DWARF's order: rax, rdx, rcx, rbx, rsi, rdi, rbp, rsp, r8 to r15,
    and the instruction pointer. memory: (m,) uint8, all copies of stacks one after the other.
    starts, lengths, bases: (n,) for one copy of each thread or (n, k) for several: where it begins
    in `memory` and how long it is (both int64, 0 for none), and at which address it was (uint64).
    A base need not be rsp, but what lies outside of the copies cannot be followed. spaces: (n,)
    int64, each one a number that `Places.add_space` gave.
    """

    registers: U64
    memory: npt.NDArray[np.uint8]
    starts: I64
    lengths: I64
    bases: U64
    spaces: I64


@dataclass(frozen=True, slots=True)
class Walks:
    """What came out, for n stacks.

    addresses: flat uint64, of each stack from the leaf outwards, return addresses as they are.
    counts: (n,) int64, at least 1. exact: flat bool, an address that was interrupted (the leaf, and
    what a signal frame leads to) and is no return address. ends: (n,) uint8, `End`. stopped: (n,)
    uint64, the pc of the outermost frame.
    """

    addresses: U64
    counts: I64
    exact: Bool
    ends: U8
    stopped: U64


class _Copies:
    """The copies of memory, with every read checked."""

    def __init__(self, stacks: Stacks) -> None:
        count = len(stacks.registers)
        shape = (count, -1) if count else (0, 1)
        starts, lengths = stacks.starts.reshape(shape), stacks.lengths.reshape(shape)
        if starts.shape != lengths.shape or stacks.bases.reshape(shape).shape != starts.shape:
            raise ValueError("copies of different shapes")
        if (starts < 0).any() or (lengths < 0).any():
            raise ValueError("a copy of negative size")
        if (starts > stacks.memory.size - lengths).any():
            raise ValueError("a copy outside of the memory")
        memory = stacks.memory
        if memory.size < _WORD or not memory.flags.c_contiguous:
            memory = np.append(memory, np.zeros(_WORD, dtype=np.uint8))
        # One element for each byte: nobody promised that addresses are aligned.
        self._words = np.ndarray((memory.size - _WORD + 1,), "<u8", memory, strides=(1,))
        rooms = np.maximum(lengths - (_WORD - 1), 0).view(np.uint64)
        bases = stacks.bases.astype(np.uint64, copy=False).reshape(shape)
        self._parts = [
            tuple(np.ascontiguousarray(column[:, part]) for column in (bases, rooms, starts))
            for part in range(starts.shape[1])
        ]

    def is_near(self, addresses: U64, owners: I64) -> Bool:
        """Which addresses a larger copy of the same stack might have. (m,), (m,) to (m,)."""
        bases, _, _ = self._parts[0]
        near: Bool = addresses - bases[owners] < _REACH
        return near

    def read(self, addresses: U64, owners: I64) -> tuple[U64, Bool]:
        """Words at addresses of these stacks, and which ones there are (0 else). (m,), (m,)."""
        bases, rooms, starts = self._parts[0]
        distance = addresses - bases[owners]
        # Unsigned wrap-around makes one comparison of two.
        there = distance < rooms[owners]
        if there.all():
            return self._words[distance.view(np.int64) + starts[owners]], there
        values = np.zeros(addresses.shape, dtype=np.uint64)
        at = np.flatnonzero(there)
        values[at] = self._words[distance[at].view(np.int64) + starts[owners[at]]]
        for bases, rooms, starts in self._parts[1:]:
            missing = np.flatnonzero(~there)
            distance = addresses[missing] - bases[owners[missing]]
            found = distance < rooms[owners[missing]]
            at = missing[found]
            values[at] = self._words[distance[found].view(np.int64) + starts[owners[at]]]
            there[at] = True
        return values, there


class _Lanes:
    """The stacks that still go on, and one step of all of them.

    live: (w,) int64, which ones. registers: (w, 17) of the current frame. exact: (w,) bool.
    """

    def __init__(self, stacks: Stacks, places: Places) -> None:
        count = len(stacks.registers)
        if stacks.registers.shape != (count, COLUMNS) or stacks.spaces.shape != (count,):
            raise ValueError("registers or spaces of another shape")
        self._copies, self._places = _Copies(stacks), places
        self._keys = places.keys(stacks.spaces)
        self._steps: Steps = places.steps
        self._switches = np.zeros(count, dtype=np.int64)
        self.live = np.arange(count)
        self.registers = np.array(stacks.registers, dtype=np.uint64, order="C")
        self.exact = np.ones(count, dtype=np.bool_)
        # Bits of the registers whose value is not known; seldom any.
        self._lost = np.zeros(count, dtype=np.int64)
        self._any_lost = False

    def step(self, depth: int) -> U8:
        """Make each frame its caller's; the `End` of each stack, GOES_ON for most. (w,) uint8."""
        steps, registers = self._steps, self.registers
        pcs = registers[:, RETURN]
        numbers = self._places.find(pcs - ~self.exact, self._keys[self.live])
        end = steps.end[numbers]
        rows = np.arange(0, registers.size, COLUMNS)
        flat = registers.reshape(-1)
        bases = steps.base[numbers]
        cfa = flat[rows + bases] + steps.offset[numbers]
        kinds = steps.kind[numbers]
        if (kinds != CFA_OFFSET).any():
            self._special(numbers, kinds, pcs, cfa, end)
        if self._any_lost:
            end[(self._lost >> bases & 1 != 0) & (end == End.GOES_ON)] = End.SHORT
        grows = cfa > registers[:, RSP]
        if not grows.all():
            self._not_above(np.flatnonzero(~grows & (end == End.GOES_ON)), numbers, end, depth)

        counts = steps.counts[numbers]
        lanes = np.repeat(np.arange(counts.size), counts)
        behind = np.cumsum(counts)
        entries = np.arange(lanes.size) + (steps.firsts[numbers] - (behind - counts))[lanes]
        registers[:, CFA] = cfa
        rows = rows[lanes]
        values = flat[rows + steps.source[entries]] + steps.shift[entries]
        how, columns = steps.how[entries], steps.column[entries]
        read, there = self._copies.read(values, self.live[lanes])
        odd = how != MEMORY
        if odd.any() or self._any_lost or not there.all():
            read = np.where(how == VALUE, values, read)
            # What is said relative to a register that is lost is lost with it.
            sources = self._lost[lanes] >> steps.source[entries] & 1
            had = (there & ~odd | (how == VALUE)) & (sources == 0)
            # A stack pointer that is lost still lies beyond this frame, and so must the next one.
            read = np.where(had | (columns != RSP), read, cfa[lanes])
            self._lose(lanes, columns, had, cfa, end)
        registers[:, RSP] = cfa
        flat[rows + columns] = read
        root = registers[:, RETURN] == 0
        if root.any():
            end[root & (end == End.GOES_ON)] = End.WHOLE
        self.exact = steps.signal[numbers]
        return end

    def _special(self, numbers: U32, kinds: U8, pcs: U64, cfa: U64, end: U8) -> None:
        """A CFA that is no register with an offset; changes `cfa` and `end`."""
        at = np.flatnonzero(kinds == CFA_DEREF)
        values, there = self._copies.read(cfa[at], self.live[at])
        cfa[at] = values + self._steps.extra[numbers[at]]
        end[at[~there]] = End.SHORT
        at = np.flatnonzero(kinds == CFA_PLT)
        pushed = pcs[at] & np.uint64(15) >= self._steps.extra[numbers[at]]
        cfa[at] = self.registers[at, RSP] + np.where(pushed, np.uint64(16), np.uint64(8))

    def _not_above(self, at: I64, numbers: U32, end: U8, depth: int) -> None:
        """Frames that do not lie above the last one; changes `end`."""
        signal = self._steps.signal[numbers[at]] & (self._switches[self.live[at]] < MAX_SWITCHES)
        self._switches[self.live[at[signal]]] += 1
        at = at[~signal]
        end[at] = End.STUCK
        if depth:
            # By frame pointers, the outermost frame is the one that has none.
            outermost = (numbers[at] == FRAME_POINTERS) & (self.registers[at, RBP] == 0)
            end[at[outermost]] = End.WHOLE

    def _lose(self, lanes: I64, columns: I64, there: Bool, cfa: U64, end: U8) -> None:
        """Keep in mind which registers could not be had; changes `end`."""
        missing = np.flatnonzero(~there)
        without = lanes[missing[columns[missing] == RETURN]]
        without = without[end[without] == End.GOES_ON]
        near = self._copies.is_near(cfa[without], self.live[without])
        end[without] = np.where(near, End.SHORT, End.ELSEWHERE)
        bits = np.int64(1) << columns
        # The stack pointer is the CFA, unless something else was said.
        self._lost &= ~np.int64(1 << RSP)
        np.bitwise_and.at(self._lost, lanes, ~bits)
        np.bitwise_or.at(self._lost, lanes[missing], bits[missing])
        self._any_lost = bool(self._lost.any())

    def keep(self, which: I64) -> None:
        """Go on with these only."""
        self.live = self.live[which]
        self.registers = self.registers.take(which, axis=0)
        self.exact = self.exact[which]
        self._lost = self._lost[which]


def unwind(stacks: Stacks, places: Places) -> Walks:
    """Unwind all of them. Raises ValueError for arrays whose shapes or bounds do not fit."""
    lanes = _Lanes(stacks, places)
    count = lanes.live.size
    ends = np.full(count, End.DEEP, dtype=np.uint8)
    counts = np.zeros(count, dtype=np.int64)
    frames: list[tuple[I64, U64, Bool]] = []
    for depth in range(MAX_FRAMES):
        if not lanes.live.size:
            break
        live = lanes.live
        frames.append((live, lanes.registers[:, RETURN].copy(), lanes.exact))
        end = lanes.step(depth)
        if end.any():
            done = np.flatnonzero(end)
            ends[live[done]] = end[done]
            counts[live[done]] = depth + 1
            lanes.keep(np.flatnonzero(end == End.GOES_ON))
    counts[lanes.live] = len(frames)
    firsts = np.cumsum(counts) - counts
    addresses = np.zeros(int(counts.sum()), dtype=np.uint64)
    exact = np.zeros(addresses.shape, dtype=np.bool_)
    for depth, (live, pcs, interrupted) in enumerate(frames):
        at = firsts[live] + depth
        addresses[at], exact[at] = pcs, interrupted
    return Walks(addresses, counts, exact, ends, addresses[firsts + counts - 1])
