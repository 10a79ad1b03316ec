"""What every flame graph writer draws: weighted stacks and the facts of their capture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, NamedTuple, TypeAlias

FrameKind: TypeAlias = Literal[
    "state", "process", "thread", "user", "inlined", "jit", "kernel", "network", "marker"
]


class Frame(NamedTuple):
    """One frame of a stack; frames that are equal merge.

    A tuple, because a big profile hashes and compares millions of them. The texts come from the
    traced program and are hostile: writers escape them.
    """

    name: str
    kind: FrameKind
    module: str = ""


CODE: frozenset[FrameKind] = frozenset(("user", "inlined", "jit", "kernel"))
"""What is a function."""

NOT_SAMPLED = Frame("[not sampled]", "marker")
"""Carries exact time for which no stack was sampled; stands beside those it has."""

NOT_ITEMISED = Frame("[not itemised]", "state")
"""At the root: exact time of which no row tells whose it was."""

NOT_MATCHED = Frame("[not matched]", "marker")
"""At the root: the time of the stacks that were not asked for."""

# What is not known or not asked for is drawn after all else, in this order.
_LAST = {
    frame: Frame(f"\U0010ffff{place}", "marker")
    for place, frame in enumerate((NOT_MATCHED, NOT_ITEMISED, NOT_SAMPLED))
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Stacks, root first, each with its time in whole microseconds.

    `facts` are (key, value) pairs about the capture for people to read; `warnings` are sentences
    that must not be overlooked (loss, degradation). `exact` are the stacks before rounding, in
    nanoseconds, where they are known. `kind` is what the time is of; `started_ns` is of the wall
    clock, `period_ns` what a sample stands for. 0: not known. `innermost_first`: callers stand
    above what they call, not below.
    """

    title: str
    stacks: Sequence[tuple[tuple[Frame, ...], int]]
    unit: Literal["us"] = "us"
    subtitle: str = ""
    facts: Sequence[tuple[str, str]] = ()
    warnings: Sequence[str] = ()
    exact: Sequence[tuple[tuple[Frame, ...], int]] = ()
    kind: str = ""
    started_ns: int = 0
    duration_ns: int = 0
    period_ns: int = 0
    innermost_first: bool = False

    @property
    def stacks_ns(self) -> Sequence[tuple[tuple[Frame, ...], int]]:
        """The stacks with their time in nanoseconds."""
        return self.exact or [(stack, weight * 1000) for stack, weight in self.stacks]

    @property
    def total_ns(self) -> int:
        """The width of the root in nanoseconds."""
        return sum(weight for _, weight in self.stacks_ns)

    @property
    def total_us(self) -> int:
        """The width of the root."""
        return sum(weight for _, weight in self.stacks)


def whole_microseconds(weights_ns: Sequence[int], total_ns: int | None = None) -> list[int]:
    """Round weights to microseconds so that they add up to `round(total_ns / 1000)` exactly.

    Largest remainder: each weight is rounded down, and the microseconds missing from the sum go
    to the weights that lost most (the earlier one of two that lost the same), so no weight moves
    by as much as 1 µs. `total_ns` is their sum, and the default.
    """
    if total_ns is None:
        total_ns = sum(weights_ns)
    whole = [weight // 1000 for weight in weights_ns]
    missing = round(Fraction(total_ns, 1000)) - sum(whole)
    if not 0 <= missing <= len(whole):
        raise ValueError(f"{total_ns} ns is not the sum of the weights")
    by_loss = sorted(range(len(whole)), key=lambda i: -(weights_ns[i] % 1000))
    for i in by_loss[:missing]:
        whole[i] += 1
    return whole


def share_out(total: int, weights: Sequence[float]) -> list[int]:
    """Split `total` in proportion to some weights, into integers that add up to it.

    The weights' sum must be above 0. What rounding leaves goes to the greatest weight.
    """
    whole = Fraction(sum(map(Fraction, weights)))
    shares = [int(total * Fraction(weight) / whole) for weight in weights]
    shares[max(range(len(weights)), key=lambda i: weights[i])] += total - sum(shares)
    return shares


def merged(
    stacks: Iterable[tuple[tuple[Frame, ...], int]],
) -> list[tuple[tuple[Frame, ...], int]]:
    """Add up equal stacks and put them in drawing order: by name; what is not known comes last."""
    sums: dict[tuple[Frame, ...], int] = {}
    for stack, weight in stacks:
        sums[stack] = sums.get(stack, 0) + weight
    return sorted(sums.items(), key=lambda item: _place(item[0]))


def _place(stack: tuple[Frame, ...]) -> tuple[Frame, ...]:
    if stack and stack[0] in _LAST:
        return (_LAST[stack[0]], *stack[1:])
    return (*stack[:-1], _LAST[NOT_SAMPLED]) if stack[-1:] == (NOT_SAMPLED,) else stack
