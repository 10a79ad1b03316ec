"""What a running trace shows: redrawn on a terminal, sparse lines elsewhere, warnings always."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import re
import struct
import termios
from collections.abc import Iterator

import pytest

from latrace.tracer.commands.console import Status
from latrace.tracer.live import Panel, PlainLines, WarningsOnly, make_view, show_elapsed
from latrace.tracer.session import Snapshot


def snapshot(
    elapsed_s: float = 1.0, *, lost: int = 0, degraded: tuple[str, ...] = (), waits: int = 12_345
) -> Snapshot:
    return Snapshot(
        elapsed_s=elapsed_s,
        waits=waits,
        waits_per_s=12_345.0,
        p50_ns=12_300,
        p99_ns=1_240_000,
        max_ns=8_300_000,
        lost=lost,
        rows=waits,
        threads=4,
        self_cpu_percent=1.25,
        bpf_percent=0.42,
        degraded=degraded,
    )


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[io.TextIOWrapper, int]]:
    """A terminal of 80 columns: the stream to write to, and the other end's descriptor."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    screen, device = os.openpty()
    resize(device, 80)
    with os.fdopen(device, "w") as stream:
        yield stream, screen
    os.close(screen)


def resize(fd: int, columns: int) -> None:
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))


def shown(stream: io.TextIOWrapper, screen: int) -> str:
    """Return what has been written to the terminal since the last look."""
    # The kernel passes it on in pieces, when it finds the time: read up to a mark of our own.
    stream.write("\0")
    stream.flush()
    text = b""
    while not text.endswith(b"\0"):
        text += os.read(screen, 1 << 16)
    return text[:-1].decode().replace("\r\n", "\n")


def test_plain_lines_come_every_few_seconds() -> None:
    stream = io.StringIO()
    view = PlainLines(Status(stream=stream), every_s=5)
    for second in range(1, 13):
        view.update(snapshot(second - 0.01))
    view.close()
    lines = stream.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["5 s", "10 s"]
    assert lines[0] == (
        "5 s  waits/s 12,345  p50 12.3 us  p99 1.24 ms  max 8.30 ms  lost 0  cost 1.2%+probes0.4%"
    )


def test_a_late_tick_does_not_bring_a_burst() -> None:
    stream = io.StringIO()
    view = PlainLines(Status(stream=stream), every_s=5)
    view.update(snapshot(31))
    view.update(snapshot(32))
    view.update(snapshot(35))
    assert [line.split("  ")[0] for line in stream.getvalue().splitlines()] == ["31 s", "35 s"]


def test_warnings_are_told_once_even_when_quiet() -> None:
    stream = io.StringIO()
    view = make_view(Status(quiet=True, stream=stream))
    view.update(snapshot(1, degraded=("rows only above 50 us",)))
    view.update(snapshot(2, degraded=("rows only above 50 us", "no stacks"), lost=7))
    view.update(snapshot(3, degraded=("rows only above 50 us", "no stacks"), lost=9))
    view.close()
    assert stream.getvalue().splitlines() == [
        "!!! rows only above 50 us",
        "!!! no stacks",
        "!!! 7 details lost so far; counts and percentiles stay exact",
    ]


def test_the_view_suits_the_stream(terminal: tuple[io.TextIOWrapper, int]) -> None:
    stream, _ = terminal
    assert isinstance(make_view(Status(stream=stream)), Panel)
    assert type(make_view(Status(stream=stream), redraw=False)) is WarningsOnly
    assert isinstance(make_view(Status(stream=io.StringIO())), PlainLines)


def test_a_dumb_terminal_gets_plain_lines(
    terminal: tuple[io.TextIOWrapper, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(make_view(Status(stream=terminal[0])), PlainLines)


def test_the_panel_is_redrawn_in_place_and_taken_away(
    terminal: tuple[io.TextIOWrapper, int],
) -> None:
    stream, screen = terminal
    view = Panel(Status(stream=stream))
    view.update(snapshot(1))
    first = shown(stream, screen)
    assert first.count("\n") == 3
    assert "p99 1.24 ms" in first
    assert "12,345 waits of 4 threads" in first
    assert "\x1b" not in first  # NO_COLOR, and nothing to erase yet
    view.update(snapshot(2))
    assert shown(stream, screen).startswith("\x1b[3A\r\x1b[J    2 s")
    view.close()
    assert shown(stream, screen) == "\x1b[3A\r\x1b[J"
    view.close()  # nothing is left to erase
    stream.write("end")
    stream.flush()
    assert shown(stream, screen) == "end"


def test_the_panel_leaves_the_terminals_modes_alone(
    terminal: tuple[io.TextIOWrapper, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR")
    stream, screen = terminal
    before = termios.tcgetattr(stream.fileno())
    view = Panel(Status(stream=stream))
    view.update(snapshot(1, lost=3, degraded=("slower",)))
    view.update(snapshot(2))
    view.close()
    text = shown(stream, screen)
    assert termios.tcgetattr(stream.fileno()) == before
    # Cursor up, erase and colours; no private modes such as a hidden cursor.
    assert set(re.findall(r"\x1b\[[0-9;?]*([A-Za-z])", text)) == {"A", "J", "m"}
    assert "?" not in text
    assert "\x1b[1;31m!!! slower\x1b[0m" in text


def test_a_terminal_that_does_not_know_its_width_has_the_usual_one(
    terminal: tuple[io.TextIOWrapper, int],
) -> None:
    stream, screen = terminal
    resize(stream.fileno(), 0)
    view = Panel(Status(stream=stream))
    view.update(snapshot(1))
    view.close()
    assert "p99 1.24 ms" in shown(stream, screen)


@pytest.mark.parametrize("columns", [40, 20])
def test_a_narrow_terminal_never_wraps_the_panel(
    terminal: tuple[io.TextIOWrapper, int], columns: int
) -> None:
    stream, screen = terminal
    resize(stream.fileno(), columns)
    view = Panel(Status(stream=stream))
    view.update(snapshot(1, waits=10**12))
    assert max(len(line) for line in shown(stream, screen).splitlines()) < columns


def test_a_panel_that_the_terminal_broke_is_erased_whole(
    terminal: tuple[io.TextIOWrapper, int],
) -> None:
    stream, screen = terminal
    view = Panel(Status(stream=stream))
    view.update(snapshot(1))
    widths = [len(line) for line in shown(stream, screen).splitlines()]
    resize(stream.fileno(), 40)
    view.close()
    height = sum(-(-width // 40) for width in widths)
    assert height > 3
    assert shown(stream, screen) == f"\x1b[{height}A\r\x1b[J"


class GoneTerminal(io.StringIO):
    """A terminal after its window was closed."""

    def write(self, _text: str, /) -> int:
        raise OSError(errno.EIO, "Input/output error")


def test_a_terminal_that_went_away_costs_nothing() -> None:
    view = Panel(Status(stream=GoneTerminal()))
    view.update(snapshot(1, degraded=("slower",)))
    view.close()


def test_elapsed_times() -> None:
    assert [show_elapsed(s) for s in (0.99, 59, 119.99, 125, 3725)] == [
        "1 s",
        "59 s",
        "2:00",
        "2:05",
        "1:02:05",
    ]
