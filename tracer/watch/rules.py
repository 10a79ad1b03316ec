"""The rules of a watch, from the command line's texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from latrace.tracer.commands.quantities import parse_duration
from latrace.tracer.errors import UsageError

from .triggers import Longest, Percentile, Retransmits, Rule

FRACTIONS: Final = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p999": 0.999}
DEFAULT_RATIO: Final = "3"
"""What is watched for where nothing was asked for."""


def make_rules(
    *,
    percentiles: dict[str, Sequence[str]],
    ratios: Sequence[str],
    longest: Sequence[str],
    retransmits: int | None,
    window_s: float,
    least: int,
    floor_ns: int,
) -> list[Rule]:
    """The rules asked for. Raises UsageError.

    `percentiles`: values by the option's name (`p99`). A value is of waits, or after `sleep=` of
    how late sleep calls came back.
    """
    rules: list[Rule] = []
    for name, values in percentiles.items():
        for text in values:
            kind, value = _of(text)
            rules.append(
                Percentile(
                    rule=f"--{name} {text}",
                    kind=kind,
                    fraction=FRACTIONS[name],
                    window_s=window_s,
                    least=least,
                    above_ns=_limit(value, option=f"--{name}"),
                )
            )
    for text in ratios:
        kind, value = _of(text)
        rules.append(
            Percentile(
                rule=f"--p99-ratio {text}",
                kind=kind,
                fraction=FRACTIONS["p99"],
                window_s=window_s,
                least=least,
                ratio=_ratio(value),
                floor_ns=floor_ns,
            )
        )
    for text in longest:
        kind, value = _of(text)
        above_ns = _limit(value, option="--max")
        rules.append(
            Longest(
                rule=f"--max {text}", kind="sleep" if kind == "sleep" else "max", above_ns=above_ns
            )
        )
    if retransmits is not None:
        rules.append(
            Retransmits(rule=f"--retransmits {retransmits}", limit=retransmits, window_s=window_s)
        )
    return rules


def _of(text: str) -> tuple[str, str]:
    """What a value is of, and the value."""
    kind, equals, value = text.partition("=")
    if not equals:
        return "wait", text
    if kind not in {"wait", "sleep"}:
        raise UsageError(
            f"{text!r}: there is no percentile of {kind!r}",
            hint="10ms is of waits, sleep=10ms of how late sleep calls came back",
        )
    return kind, value


def _limit(text: str, *, option: str) -> int:
    above_ns = parse_duration(text, option=option)
    if not above_ns:
        raise UsageError(
            f"{option} {text} would fire all the time", hint=f"write for example {option} 10ms"
        )
    return above_ns


def _ratio(text: str) -> float:
    try:
        ratio = float(text)
    except ValueError:
        ratio = 0.0
    if not 1 < ratio < 1e6:
        raise UsageError(
            f"--p99-ratio {text!r} is not a number above 1",
            hint="3 fires when the P99 is three times as long as usual",
        )
    return ratio
