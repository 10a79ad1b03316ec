"""Lines of text of one width, and how names and stacks are put into them."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence

from latrace.analysis.names import fit_name
from latrace.analysis.words import cells, fit, pad, visible

NUMBER = 11  # columns of a number, the gap before it included
LABEL = 13
SHOWN = 3  # functions of a stack on a line

# Between a number and its unit no line ends. No text has such a space of its own: `visible` would
# have escaped it.
_BEFORE_UNIT = re.compile(r"(?<=\d) (?=(?:%|[num]?s|min|h|[kMG]?B)(?!\w))")
_NO_BREAK = "\xa0"

BOLD, DIM, ALARM = "\x1b[1m", "\x1b[2m", "\x1b[1;31m"
_RESET = "\x1b[0m"


class Page:
    """Lines of one width."""

    def __init__(self, width: int, *, colour: bool) -> None:
        self.width = width
        self._colour = colour
        self._lines: list[str] = []

    def line(self, text: str = "", *, style: str = "") -> None:
        """Write one line, cut to the width."""
        text = fit(text, self.width).rstrip()
        self._lines.append(f"{style}{text}{_RESET}" if style and self._colour else text)

    def prose(self, text: str, *, label: str = "", indent: str = "  ", style: str = "") -> None:
        """Break a sentence into lines; those after the first hang below its first word."""
        first = indent + (pad(label, LABEL) if label else "")
        wrapper = textwrap.TextWrapper(
            width=self.width,
            initial_indent=first,
            subsequent_indent=" " * cells(first),
            break_on_hyphens=False,
        )
        for piece in wrapper.wrap(_BEFORE_UNIT.sub(_NO_BREAK, text)):
            self.line(piece.replace(_NO_BREAK, " "), style=style)

    def warn(self, text: str) -> None:
        """Write what nobody should miss."""
        self.prose(text, indent="!!! ", style=ALARM)

    def table(
        self, title: str, heads: Sequence[str], rows: Iterable[tuple[str, list[str]]]
    ) -> None:
        """Write a table: names at the left, numbers at the right."""
        room = self.width - NUMBER * len(heads)
        self.line()
        self.line(pad(title, room) + "".join(head.rjust(NUMBER) for head in heads), style=BOLD)
        for name, numbers in rows:
            self.line(pad("  " + name, room) + "".join(number.rjust(NUMBER) for number in numbers))

    def more(self, total: int, shown: int) -> None:
        """Say how many lines a list was cut by."""
        if total > shown:
            self.line(f"  and {total - shown:,} more", style=DIM)

    def text(self) -> str:
        """Give all lines, each ended."""
        return "\n".join(self._lines) + "\n"


def comm(value: object) -> str:
    """Make a thread's name safe to print; "" when there is none."""
    return fit(visible(value), 24) if isinstance(value, str) else ""


def who(number: int, name: str) -> str:
    """Say a thread or process for a column: its number, right-aligned, and its name."""
    return f"{number:>7} {comm(name) or '(name not recorded)'}"


def frames(names: Sequence[str], room: int) -> str:
    """The three frames nearest to the leaf: `names`, leaf first, in `room` columns."""
    if not names:
        return "[no stack]"
    shown = [visible(name) for name in names[:SHOWN]]
    if cells(" < ".join(shown)) > room:
        each = (room - 3 * (len(shown) - 1)) // len(shown)
        spare = sum(max(0, each - cells(name)) for name in shown)
        long = max(1, sum(cells(name) > each for name in shown))
        shown = [fit_name(name, each + spare // long) for name in shown]
    return " < ".join(shown)
