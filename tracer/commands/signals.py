"""Ctrl-C and its kin during a trace: the first one stops and prints, the second one abandons."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

# SIGHUP too: a closed terminal or a dropped connection must not cost the capture.
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopOnSignals:
    """Within the `with` block, `stop` is set by the first SIGINT, SIGTERM or SIGHUP.

    With `interrupt_grace_s` a SIGINT sets it only after that time: a program on the same terminal
    has got the same Ctrl-C, and its own end is part of the trace.

    A second one raises `KeyboardInterrupt` in the main thread, which unwinds without a report; a
    third has its default action. `received` is the first signal's number, or None. Signals that
    were ignored when we started (nohup, a shell's background job) stay so.
    """

    def __init__(self, *, interrupt_grace_s: float = 0.0) -> None:
        self.stop = threading.Event()
        self.received: int | None = None
        self._interrupt_grace_s = interrupt_grace_s
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in _STOPPING:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None:
            for other in self._before:
                signal.signal(other, signal.SIG_DFL)
            raise KeyboardInterrupt
        self.received = number
        if number == signal.SIGINT and self._interrupt_grace_s > 0:
            timer = threading.Timer(self._interrupt_grace_s, self.stop.set)
            timer.daemon = True
            timer.start()
        else:
            self.stop.set()
