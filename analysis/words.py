"""Numbers and names for people: times with units, shares, and names that a terminal survives."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence

_UNITS = (("ns", 1), ("us", 1_000), ("ms", 1_000_000), ("s", 1_000_000_000))


def duration(ns: float) -> str:
    """Say a time in three digits and its unit: `870 ns`, `12.3 us`, `1.20 s`, `4 min 05 s`."""
    if abs(ns) < 999.5:
        return f"{ns:.0f} ns"
    for unit, size in _UNITS[1:]:
        text = _three_digits(ns / size)
        if abs(float(text)) < 1000 and not (unit == "s" and abs(ns) >= 120e9):
            return f"{text} {unit}"
    minutes, seconds = divmod(round(ns / 1e9), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: int) -> str:
    """Say a number of bytes: `812 B`, `12.3 MB`."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 999.5:
            return f"{_three_digits(value) if unit != 'B' else count} {unit}"
        value /= 1000
    return f"{_three_digits(value)} GB"


def share(part: float, whole: float) -> str:
    """Say `part` of `whole` in percent; never 100 or 0 for what is only nearly so."""
    if not whole:
        return "-"
    percent = 100 * part / whole
    if 0 < percent < 0.1:
        return "<0.1 %"
    if 99.9 < percent < 100:
        return ">99.9 %"
    return f"{percent:.1f} %"


def tenths(parts: Sequence[int], whole: int, *, of: int | None = None) -> list[int]:
    """Give parts of `whole` in tenths of a percent, rounded so that they add up as the parts do.

    Every figure is rounded down or up to the next, never further. `of` is what they must add up
    to, where that was rounded before.
    """
    if not whole:
        return [0 for _ in parts]
    exact = [1000 * part / whole for part in parts]
    rounded = [math.floor(value) for value in exact]
    spare = (round(sum(exact)) if of is None else of) - sum(rounded)
    by_rest = sorted(range(len(parts)), key=lambda index: rounded[index] - exact[index])
    for index in by_rest[: max(spare, 0)]:
        rounded[index] += 1
    return rounded


def say_tenths(rounded: int, part: float, whole: float) -> str:
    """Say one of `tenths`; never 0 for what is not, nor 100 for what is only nearly the whole."""
    if not whole:
        return "-"
    if not rounded and part:
        return "<0.1 %"
    if rounded >= 1000 and part < whole:
        return ">99.9 %"
    return f"{rounded / 10:.1f} %"


def shares(parts: Sequence[int], whole: int) -> list[str]:
    """Say parts of `whole` in percent so that what is printed adds up as the parts do."""
    return [
        say_tenths(rounded, part, whole)
        for part, rounded in zip(parts, tenths(parts, whole), strict=True)
    ]


def percent(part: float, whole: float) -> str:
    """Say `part` of `whole` for a sentence, in whole percent: `97 %`, `0.4 %`, `>99 %`."""
    if not whole:
        return "-"
    value = 100 * part / whole
    if 99.5 <= value < 100:
        return ">99 %"
    if 0 < value < 0.1:
        return "<0.1 %"
    return f"{value:.1f} %" if 0 < value < 0.95 else f"{value:.0f} %"


def plural(count: int, one: str, many: str = "") -> str:
    """Say a count with its noun: `1 wait`, `1,234 waits`."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def visible(text: str) -> str:
    r"""Write what a terminal would obey, or not show, as escapes: `\x1b`, `\u202e`.

    Names come from the traced programs. Marks that combine with the letter before are escaped
    too: a name could pile them up.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        char
        if char.isprintable() and not unicodedata.category(char).startswith("M")
        # repr() writes nothing but ASCII here, and never a quote, which is printable.
        else ascii(char)[1:-1]
        for char in text
    )


def cells(text: str) -> int:
    """Tell how many columns of a terminal a visible text takes."""
    if text.isascii():
        return len(text)
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def fit(text: str, columns: int) -> str:
    """Cut a visible text to some columns, marking the cut with `..`."""
    if cells(text) <= columns:
        return text
    kept = ""
    for char in text:
        if cells(kept + char) > columns - 2:
            break
        kept += char
    return kept + ".."


def pad(text: str, columns: int) -> str:
    """Cut or fill a visible text to exactly some columns."""
    text = fit(text, columns)
    return text + " " * (columns - cells(text))


def endpoint(host: str, port: int) -> str:
    """Say one end of a connection: `10.0.0.1:443`, `[fd77::1]:443`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _three_digits(value: float) -> str:
    magnitude = abs(value)
    return f"{value:.{2 if magnitude < 9.995 else 1 if magnitude < 99.95 else 0}f}"
