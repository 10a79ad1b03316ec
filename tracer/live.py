"""What a trace shows while it runs: a block of lines redrawn on a terminal, plain lines elsewhere.

The terminal's modes are never touched (no hidden cursor, no alternate screen): even after a
SIGKILL there is nothing to restore. Nothing heavy is imported: this runs beside the tracer.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from latrace.analysis.words import cells, duration, plural, visible
from latrace.tracer.commands.console import Status, columns_of, is_terminal, wants_colour

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from latrace.tracer.session import Snapshot

_PLAIN_EVERY_S = 5.0
_USUAL_COLUMNS = 80
_DIM, _BOLD, _ALARM, _RESET = "\x1b[2m", "\x1b[1m", "\x1b[1;31m", "\x1b[0m"


class View(Protocol):
    """What follows a running trace."""

    def update(self, snapshot: Snapshot) -> None:
        """Show the state of the trace; called about once a second."""

    def close(self) -> None:
        """End the display; what comes next starts on a fresh line."""


def make_view(status: Status, *, redraw: bool = True) -> View:
    """The view that suits `status`: redrawn on a terminal, sparse lines elsewhere.

    `redraw` False: the terminal is shared with the traced program, so stay out of its way.
    """
    if status.quiet or not redraw:
        return WarningsOnly(status)
    if is_terminal(status.stream):
        return Panel(status)
    return PlainLines(status)


class WarningsOnly:
    """Says only what degraded, when it does."""

    def __init__(self, status: Status) -> None:
        self.status = status
        self._told: set[str] = set()
        self._lost = False

    def update(self, snapshot: Snapshot) -> None:
        """Tell each new degradation, and the first loss, once."""
        for line in self.news(snapshot):
            self.status.warn(line)

    def close(self) -> None:
        """Nothing is open."""

    def news(self, snapshot: Snapshot) -> list[str]:
        """Warnings not told yet."""
        lines = [f"!!! {text}" for text in snapshot.degraded if text not in self._told]
        self._told.update(snapshot.degraded)
        if snapshot.lost and not self._lost:
            self._lost = True
            lines.append(
                f"!!! {snapshot.lost:,} details lost so far; counts and percentiles stay exact"
            )
        return lines


class PlainLines(WarningsOnly):
    """One line every few seconds, for logs and pipes."""

    def __init__(self, status: Status, *, every_s: float = _PLAIN_EVERY_S) -> None:
        super().__init__(status)
        self._every_s = every_s
        self._due_s = every_s

    def update(self, snapshot: Snapshot) -> None:
        """Print the line that is due, if any."""
        super().update(snapshot)
        if snapshot.elapsed_s + 0.05 < self._due_s:  # a tick comes a little early or late
            return
        self._due_s += self._every_s * (1 + int((snapshot.elapsed_s - self._due_s) / self._every_s))
        figures = "  ".join(f"{name} {value}" for name, value in _figures(snapshot))
        self.status.say(f"{show_elapsed(snapshot.elapsed_s)}  {figures}")


class Panel(WarningsOnly):
    """Three lines at the bottom of a terminal, redrawn in place."""

    def __init__(self, status: Status) -> None:
        super().__init__(status)
        self._colour = wants_colour(status.stream)
        self._drawn: list[int] = []
        """How wide each line of the block is."""

    def update(self, snapshot: Snapshot) -> None:
        """Draw the block anew, below any new warnings."""
        room = columns_of(self.status.stream) - 1
        lines = [_cut(line, room) for line in _panel(snapshot)]
        news = "".join(f"{self._paint(line, _ALARM)}\n" for line in self.news(snapshot))
        drawn = "".join(
            "".join(self._paint(part.text, part.code) for part in line) + "\n" for line in lines
        )
        self.status.write(self._erase() + news + drawn)
        self._drawn = [sum(len(part.text) for part in line) for line in lines]

    def close(self) -> None:
        """Take the block away."""
        self.status.write(self._erase())
        self._drawn = []

    def _erase(self) -> str:
        """Up over what was drawn and clear to the end of the screen.

        This also takes the ^C with which the terminal echoes the key. A terminal that was made
        narrower has broken the lines.
        """
        columns = columns_of(self.status.stream)
        height = sum(max(1, -(-width // columns)) for width in self._drawn)
        return f"\x1b[{height}A\r\x1b[J" if height else ""

    def _paint(self, text: str, code: str) -> str:
        return f"{code}{text}{_RESET}" if self._colour and code and text else text


@dataclass(frozen=True, slots=True)
class _Part:
    text: str
    code: str = ""


def _panel(snapshot: Snapshot) -> list[list[_Part]]:
    first: list[_Part] = [_Part(f"{show_elapsed(snapshot.elapsed_s):>7}  ", _DIM)]
    for name, value in _figures(snapshot)[:-1]:
        alarming = name == "lost" and snapshot.lost
        first += [_Part(f"{name} ", _DIM), _Part(f"{value}   ", _ALARM if alarming else _BOLD)]
    second = (
        f"{plural(snapshot.waits, 'wait')} of {plural(snapshot.threads, 'thread')},"
        f" {snapshot.rows:,} recorded in detail"
    )
    return [
        first,
        [_Part(" " * 9), _Part(second, _DIM)],
        [_Part(" " * 9), _Part(f"our own cost: {_cost(snapshot)} of one CPU", _DIM)],
    ]


def _figures(snapshot: Snapshot) -> list[tuple[str, str]]:
    return [
        ("waits/s", f"{snapshot.waits_per_s:,.0f}"),
        ("p50", duration(snapshot.p50_ns)),
        ("p99", duration(snapshot.p99_ns)),
        ("max", duration(snapshot.max_ns)),
        ("lost", f"{snapshot.lost:,}"),
        ("cost", _cost(snapshot).replace(" ", "")),
    ]


def _cost(snapshot: Snapshot) -> str:
    """Our CPU use: the reader's, and the probes' where it is measured."""
    if snapshot.bpf_percent is None:
        return f"{snapshot.self_cpu_percent:.1f} %"
    return f"{snapshot.self_cpu_percent:.1f} % + probes {snapshot.bpf_percent:.1f} %"


def _cut(parts: list[_Part], room: int) -> list[_Part]:
    """The line of `parts`, cut to `room` columns so that it never wraps."""
    cut: list[_Part] = []
    for part in parts:
        cut.append(_Part(part.text[:room], part.code))
        room = max(0, room - len(part.text))
    return cut


def show_elapsed(seconds: float) -> str:
    """The time since the start: `12 s`, `3:05`, `1:02:03`."""
    whole = int(seconds + 0.05)
    if whole < 120:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


# --- retransmits --------------------------------------------------------------------------------

_LINES_PER_S = 20
_KINDS: Final = {"unknown": "?"}
_STATES: Final = {"established": "estab", "new-syn-recv": "syn-recv"}
_RETRANSMIT = "{:>8} {:<6} {:>4} {:<33} {:<10} {}"


class RetransmitLines:
    """A plain line for each retransmit, at most twenty a second; the rest is counted.

    `write` gets whole lines; `clock` is what seconds are told by.
    """

    def __init__(
        self, write: Callable[[str], None], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._write = write
        self._clock = clock
        self._second_s = clock()
        self._lines = 0
        self._left_out = self._left_out_segs = 0

    def begin(self) -> None:
        """Print what the columns are."""
        head = ("TIME", "KIND", "SEGS", "CONNECTION", "STATE", "OWNER")
        self._write(_RETRANSMIT.format(*head) + "\n")

    def add(self, rows: npt.NDArray[np.void], start_ns: int) -> None:
        """Print retransmits, shape (n,) of dtype SOCKET; times count from `start_ns`."""
        text = self._next_second()
        # The last line of a second is kept for how many were left out.
        shown = rows[: max(0, _LINES_PER_S - 1 - self._lines)]
        self._lines += len(shown)
        self._left_out += len(rows) - len(shown)
        self._left_out_segs += int(rows["segs"][len(shown) :].sum())
        text += "".join(_retransmit(row, start_ns) for row in shown)
        if text:
            self._write(text)

    def update(self) -> None:
        """Tell what was left out, when the second is over; to be called about once a second."""
        if text := self._next_second():
            self._write(text)

    def close(self) -> None:
        """Tell it now."""
        if text := self._told():
            self._write(text)

    def _next_second(self) -> str:
        now = self._clock()
        if now < self._second_s + 1:
            return ""
        self._second_s, self._lines = now, 0
        return self._told()

    def _told(self) -> str:
        if not self._left_out:
            return ""
        segs = plural(self._left_out_segs, "segment")
        told = f"{'...':>8} {self._left_out:,} more in that second, {segs}\n"
        self._left_out = self._left_out_segs = 0
        return told


def _retransmit(row: np.void, start_ns: int) -> str:
    from latrace.tracer.sockets import kind_name, socket_ends, state_name  # noqa: PLC0415 - numpy

    state = state_name(int(row["state"])) or "?"
    source, target = socket_ends(row)
    name = row["comm"].decode("utf-8", "backslashreplace")
    failed = f" not sent: {errno.errorcode.get(-row['err'], row['err'])}" if row["err"] < 0 else ""
    fields = (
        f"{(int(row['ts_ns']) - start_ns) / 1e9:.3f}",
        _KINDS.get(kind := kind_name(int(row["kind"])), kind),
        str(row["segs"]),
        f"{source} > {target}",
        _STATES.get(state, state),
        f"{visible(name) if name else '?'}/{row['tgid']}{failed}",
    )
    line = _RETRANSMIT.format(*fields)
    if cells(line) > _USUAL_COLUMNS:  # its columns give way before it breaks
        line = " ".join((f"{fields[0]:>8} {fields[1]:<6} {fields[2]:>4}", *fields[3:]))
    return line + "\n"
