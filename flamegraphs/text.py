"""Names that a traced program chose, made safe to show; times and shares made human."""

from __future__ import annotations

import unicodedata
from typing import Final

ELLIPSIS: Final = "…"
_MARKS_IN_A_ROW: Final = 2


def visible(text: str, *, limit: int | None = None) -> str:
    r"""Return `text` with everything that is not plainly visible written as an escape.

    Control characters, line separators, bidirectional overrides, zero-width and unassigned
    characters and lone surrogates become `\x1b`, `\u202e`, …; so do combining marks beyond the
    second on one letter, which would climb out of their line. The rest is legal in XML. `limit`
    cuts the middle out of a longer text, in characters before escaping.
    """
    if limit is not None and len(text) > limit:
        tail = limit // 4
        text = text[: limit - tail - 1] + ELLIPSIS + text[-tail:]
    if text.isascii() and text.isprintable():
        return text
    out: list[str] = []
    marks = 0
    for char in text:
        marks = marks + 1 if unicodedata.category(char) in ("Mn", "Me") else 0
        out.append(char if char.isprintable() and marks <= _MARKS_IN_A_ROW else _escape(char))
    return "".join(out)


def _escape(char: str) -> str:
    code = ord(char)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def cells(text: str) -> int:
    """Return how many columns of a monospaced font `text` takes (never less than it really does).

    Marks count as one column, so that a name made of them is not endless.
    """
    if text.isascii():
        return len(text)
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def fit(text: str, columns: int) -> str:
    """Return as much of `text` as fits `columns`, with an ellipsis if cut; "" if next to nothing.

    At least two characters of a cut text must remain: less says nothing.
    """
    if cells(text) <= columns:
        return text
    used, end = 1, 0
    for char in text:
        used += cells(char)
        if used > columns:
            break
        end += 1
    return text[:end].rstrip() + ELLIPSIS if end >= 2 else ""


def human_us(us: int) -> str:
    """Return a time in microseconds with three digits and a unit: `812 µs`, `12.3 ms`, `1.20 s`."""
    if us < 1000:
        return f"{us} µs"
    if us < 60_000_000:
        unit, value = ("ms", us / 1000) if us < 1_000_000 else ("s", us / 1_000_000)
        digits = 2 if value < 10 else 1 if value < 100 else 0
        return f"{value:.{digits}f} {unit}"
    minutes, seconds = divmod(us // 1_000_000, 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def human_share(part: int, whole: int) -> str:
    """Return `part` of `whole` in percent: `0 %`, `< 0.01 %`, `12.34 %`, `100 %`."""
    if not part:
        return "0 %"
    if part == whole:
        return "100 %"
    percent = 100 * part / whole
    if percent < 0.01:
        return "< 0.01 %"
    return f"{min(percent, 99.99):.2f} %"
