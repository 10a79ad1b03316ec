"""Two profiles in one flame graph: where the time is, and where it grew or shrank.

Both are put on the same length of time first. A frame is as wide as the mean of the two, so what
is in one of them only is seen too; its colour says how much more (red) or less (blue) of it there
is in the second.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Final, TypeAlias

from latrace.flamegraphs.layout import Box
from latrace.flamegraphs.profile import Frame, Profile, merged, whole_microseconds
from latrace.flamegraphs.svg import Paint, to_svg
from latrace.flamegraphs.text import human_us

STEPS: Final = 4
"""Shades of each colour, for changes of up to 1/4, 1/2, 3/4 and all of the two together."""
_LITTLE: Final = 0.05
"""Of the two together: a smaller change has no colour."""

_Stack: TypeAlias = tuple[Frame, ...]


def to_diff_svg(a: Profile, b: Profile, *, a_s: float, b_s: float) -> str:
    """Return both profiles as one SVG document.

    `a_s`, `b_s`: how long their captures are, in seconds, above 0. Times are shown as if A had
    taken as long as B.
    """
    before = _per_stack(a, Fraction(b_s) / Fraction(a_s))
    after = _per_stack(b, Fraction(1))
    ordered = [stack for stack, _ in merged((stack, 0) for stack in {*before, *after})]
    doubled = [before.get(stack, Fraction(0)) + after.get(stack, Fraction(0)) for stack in ordered]
    # In ns, so that nothing is lost but below a microsecond.
    means = whole_microseconds([int(weight * 500) for weight in doubled])
    mean = Profile(
        title=f"{b.title} · compared",
        subtitle="Width is the mean of A and B. Red: more of it in B; blue: less. A is put on the "
        f"length of B, {human_us(round(b_s * 1e6))}.",
        stacks=[(stack, us) for stack, us in zip(ordered, means, strict=True) if us],
        facts=[
            ("A", f"{a.title}, {human_us(a.total_us)} in {human_us(round(a_s * 1e6))}"),
            ("B", f"{b.title}, {human_us(b.total_us)} in {human_us(round(b_s * 1e6))}"),
        ],
        warnings=[f"{name}: {text}" for name, one in (("A", a), ("B", b)) for text in one.warnings],
    )
    return to_svg(mean, paint=_Compare(mean, before, after))


def _per_stack(profile: Profile, scale: Fraction) -> dict[_Stack, Fraction]:
    return {stack: weight * scale for stack, weight in merged(profile.stacks)}


class _Compare(Paint):
    """Colours each frame by its change: the stacks above it are neighbours in drawing order."""

    def __init__(
        self, mean: Profile, before: Mapping[_Stack, Fraction], after: Mapping[_Stack, Fraction]
    ) -> None:
        drawn = merged(mean.stacks)
        self._starts = _cumulated([Fraction(us) for _, us in drawn])
        self._before = _cumulated([before.get(stack, Fraction(0)) for stack, _ in drawn])
        self._after = _cumulated([after.get(stack, Fraction(0)) for stack, _ in drawn])

    def of(self, box: Box) -> tuple[str, str]:
        """Return the class of its colour, and what to say of it."""
        first = bisect_left(self._starts, box.start)
        last = bisect_left(self._starts, box.start + box.value)
        before = self._before[last] - self._before[first]
        after = self._after[last] - self._after[first]
        told = (
            f"A {human_us(round(before))} → B {human_us(round(after))} ({_change(before, after)})"
        )
        return _shade(before, after), told

    legend = (
        ("less4", "only in A"),
        ("less2", "less in B"),
        ("same", "the same"),
        ("more2", "more in B"),
        ("more4", "only in B"),
    )


def _cumulated(values: Sequence[Fraction]) -> list[Fraction]:
    sums = [Fraction(0)]
    for value in values:
        sums.append(sums[-1] + value)
    return sums


def _shade(before: Fraction, after: Fraction) -> str:
    both = before + after
    share = float((after - before) / both) if both else 0.0
    if abs(share) < _LITTLE:
        return "same"
    step = min(STEPS, int(abs(share) * STEPS) + 1)
    return f"{'more' if share > 0 else 'less'}{step}"


def _change(before: Fraction, after: Fraction) -> str:
    if not before:
        return "only in B"
    if not after:
        return "only in A"
    if after < 2 * before:
        return f"{float(100 * (after - before) / before):+.0f} %"
    return f"x{float(after / before):,.1f}"
