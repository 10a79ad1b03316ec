"""What a watch says while it runs: a line that is redrawn on a terminal, and one for each event."""

from __future__ import annotations

import time

from latrace.tracer.commands.console import Status, columns_of, is_terminal


class WatchView:
    """Lines on stderr, each with the time of day; on a terminal also the state, in place."""

    def __init__(self, status: Status) -> None:
        self._status = status
        self._drawn = False
        self.draws = is_terminal(status.stream) and not status.quiet
        """Whether `update` shows anything."""

    def say(self, text: str) -> None:
        """An event. Those that begin with `!!!` are said even if quiet."""
        line = f"{time.strftime('%H:%M:%S')}  {text}"
        self.close()
        if text.startswith("!!!"):
            self._status.warn(line)
        else:
            self._status.say(line)

    def update(self, state: str) -> None:
        """Draw the state anew."""
        if not self.draws:
            return
        self._status.write(f"\r\x1b[K{state[: columns_of(self._status.stream) - 1]}")
        self._drawn = True

    def close(self) -> None:
        """Take the state away; what comes next starts on a fresh line."""
        if self._drawn:
            self._status.write("\r\x1b[K")
            self._drawn = False
