"""What the kernel found by frame pointers, where a walk by its rules did not come to the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from latrace.tracer.symbols import Frame

from . import golang
from .places import U64
from .walker import ON_ANOTHER_STACK, TOO_SHORT, Walked

BY_FRAME_POINTERS: Final = "frame pointers"
"""The end of a stack of which frame pointers told no more."""

OUTERMOST: Final = frozenset(name.decode() for name in golang.ROOTS)
"""Functions that surely have no caller: what frame pointers lead to from there is left over."""

_OUT_OF_THE_COPY: Final = (TOO_SHORT, ON_ANOTHER_STACK)
_JOINT: Final = 3
"""Frames at the end of a walk in which it meets the other: some keep no frame pointer."""


def join(walked: Walked | None, pointers: U64) -> Walked:
    """A walk that left its copy, and what frame pointers lead to from there; else these alone.

    pointers: (n,) addresses from the leaf outwards. Go's runtime works on stacks beside those of
    the goroutines; the copy is of one of them, and the kernel follows the pointers to the other.
    """
    if walked is not None and walked.end in _OUT_OF_THE_COPY:
        common = np.flatnonzero(np.isin(pointers, walked.addresses[-_JOINT:]))
        if common.size:
            further = pointers[int(common[-1]) + 1 :]
            return Walked(
                np.concatenate((walked.addresses, further)),
                np.concatenate((walked.exact, np.zeros(len(further), np.bool_))),
                BY_FRAME_POINTERS,
            )
    return Walked(pointers, np.arange(len(pointers)) == 0, BY_FRAME_POINTERS)


def depth_of(frames: Sequence[Frame]) -> int:
    """How many of these, leaf first, there are up to one that surely has no caller."""
    for depth, frame in enumerate(frames, 1):
        if frame.symbol in OUTERMOST:
            return depth
    return len(frames)
