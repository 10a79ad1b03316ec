"""Quantities with a unit, as the command line takes them: `50us`, `10ms`, `30s`, `16M`."""

from __future__ import annotations

import re
from decimal import Decimal

from latrace.tracer.errors import UsageError

_NS_PER_UNIT = {
    "ns": 1,
    "us": 1_000,
    "µs": 1_000,
    "ms": 1_000_000,
    "s": 1_000_000_000,
    "m": 60_000_000_000,
    "h": 3_600_000_000_000,
}
_BYTES_PER_UNIT = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
_NUMBER = r"(?P<number>[0-9]{1,15}(?:\.[0-9]{1,9})?)"
_DURATION = re.compile(_NUMBER + r"\s*(?P<unit>[a-zµ]*)")
_PIECES = re.compile(r"[0-9.]+[a-zµ]+")
_MOMENT = re.compile(rf"(?:{_PIECES.pattern}){{2,6}}")
_SIZE = re.compile(_NUMBER + r"\s*(?P<unit>[kmg]?)(?:ib|b)?", re.IGNORECASE)
_PAGE = 4096
_MAX_RING = 1 << 30
_DAY_NS = 24 * 3_600_000_000_000


def parse_duration(text: str, *, option: str, bare_unit: str | None = None) -> int:
    """Nanoseconds of a duration such as `1.5ms`.

    A bare number is taken in `bare_unit`, or refused if there is none (0 needs no unit). Raises
    `UsageError` naming `option`.
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise UsageError(
            f"{option} {text!r} is not a duration", hint=f"write for example {option} 50us"
        )
    number, unit = Decimal(match["number"]), match["unit"] or bare_unit
    if unit is None:
        if number == 0:
            return 0
        raise UsageError(
            f"{option} {text} has no unit",
            hint=f"say which: {option} {text}us, {text}ms or {text}s",
        )
    if unit not in _NS_PER_UNIT:
        raise UsageError(
            f"{option} {text}: there is no unit {unit!r}", hint="units are ns us ms s m h"
        )
    return int(number * _NS_PER_UNIT[unit])


def parse_run_time(text: str) -> float:
    """Seconds of `-d/--duration`: suffixed, or bare seconds; more than 0, at most 30 days."""
    nanoseconds = parse_duration(text, option="--duration", bare_unit="s")
    if not 0 < nanoseconds <= 30 * _DAY_NS:
        raise UsageError(
            f"--duration {text} is not a time to trace for",
            hint="leave it out to trace until Ctrl-C",
        )
    return nanoseconds / 1e9


def parse_moment(text: str, *, option: str) -> int:
    """Nanoseconds from the start of a capture: `2s`, `1m30s`, `250ms`. Raises `UsageError`."""
    pieces = _PIECES.findall(text) if _MOMENT.fullmatch(text) else [text]
    return sum(parse_duration(piece, option=option) for piece in pieces)


def parse_span(text: str, *, option: str, least_s: float = 0.1) -> float:
    """Seconds of an option such as `--window 5s`: at least `least_s`, at most an hour."""
    seconds = parse_duration(text, option=option, bare_unit="s") / 1e9
    if not least_s <= seconds <= 3600:
        raise UsageError(
            f"{option} {text} is out of range",
            hint=f"it takes {show_seconds(least_s)} to 1 h",
        )
    return seconds


def parse_percent(text: str, *, option: str) -> float:
    """A share such as `2%` or `0.5`, in percent: above 0, at most 100. Raises `UsageError`."""
    try:
        percent = float(text.strip().removesuffix("%"))
    except ValueError:
        percent = 0.0
    if not 0 < percent <= 100:
        raise UsageError(
            f"{option} {text!r} is not a share of a CPU", hint=f"write for example {option} 2%"
        )
    return percent


def parse_size(text: str, *, option: str) -> int:
    """Bytes of a size such as `256M`, at least 1M. Raises `UsageError`."""
    match = _SIZE.fullmatch(text.strip())
    size = int(Decimal(match["number"]) * _BYTES_PER_UNIT[match["unit"].lower()]) if match else 0
    if size < 1 << 20:
        raise UsageError(
            f"{option} {text!r} is not a size of 1M or more", hint=f"write for example {option} 1G"
        )
    return size


def parse_ring_size(text: str) -> int:
    """Bytes of the ring buffer; the kernel takes powers of two of at least one page."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(
            f"--ring-size {text!r} is not a size", hint="write for example --ring-size 16M"
        )
    size = int(Decimal(match["number"]) * _BYTES_PER_UNIT[match["unit"].lower()])
    if not _PAGE <= size <= _MAX_RING:
        raise UsageError(
            f"--ring-size {text} is out of range", hint="the ring holds 4K to 1G; 16M is usual"
        )
    if size & (size - 1):
        below = 1 << (size.bit_length() - 1)
        raise UsageError(
            f"--ring-size {text} is not a power of two, as the kernel wants it",
            hint=f"take {_show_ring(below)} or {_show_ring(2 * below)}",
        )
    return size


def _show_ring(size: int) -> str:
    """A power of two as the option takes it: `16M`."""
    for unit, factor in (("G", 1 << 30), ("M", 1 << 20)):
        if size >= factor:
            return f"{size // factor}{unit}"
    return f"{size >> 10}K"


def show_seconds(seconds: float) -> str:
    """A run time for people: `5 s`, `250 ms`, `2 min`, `1 h 5 min`."""
    if seconds < 1:
        return f"{seconds * 1e3:.4g} ms"
    if seconds < 120:
        return f"{seconds:.4g} s"
    minutes, hours = round(seconds / 60), round(seconds / 60) // 60
    if not hours:
        return f"{minutes} min"
    return f"{hours} h {minutes % 60} min" if minutes % 60 else f"{hours} h"
