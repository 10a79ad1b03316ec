"""What the kernel itself counted as sent again in network namespaces: Tcp: RetransSegs (RFC 4022).

A namespace is known by its number, as in the records, and read by way of a process that lives in
it. Those of the targets are kept open, so that they can be read when the last target has ended; the
others are not, or a trace of the whole host would keep every one of them from ending.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .processes import PROC

_MOST = 256
"""Namespaces that are read: each costs a file, and its counters are summed over all CPUs."""


@dataclass(slots=True)
class _Namespace:
    start: int
    file: int | None
    """Open for the whole trace; None: to be found again."""


class Namespaces:
    """Reads the counter of each network namespace twice: first in `begin`, then in `finish`."""

    def __init__(self, *, proc: Path = PROC) -> None:
        self._proc = proc
        self._known: dict[int, _Namespace] = {}

    def begin(self, tgids: Iterable[int] | None) -> None:
        """Note the namespaces of some processes, or of all that live."""
        kept = tgids is not None
        for tgid in self._processes() if tgids is None else tgids:
            if len(self._known) >= _MOST:
                return
            with contextlib.suppress(OSError, ValueError):  # it has just ended, or is not ours
                self._add(tgid, kept=kept)

    def _add(self, tgid: int, *, kept: bool) -> None:
        inum = self._inum(tgid)
        if inum in self._known:
            return
        file = self._open(tgid)
        try:
            self._known[inum] = _Namespace(_retrans_segs(file), file if kept else None)
        finally:
            if inum not in self._known or not kept:
                os.close(file)

    def now(self) -> dict[int, int]:
        """The counters as they are, by namespace; of those alone that are kept open."""
        ends = {inum: self._end(each) for inum, each in self._known.items()}
        return {inum: end for inum, end in ends.items() if end is not None}

    def finish(self) -> list[dict[str, Any]]:
        """The manifest's `netns`; None at the end where nobody was left to read it by."""
        ends = {inum: self._end(each) for inum, each in self._known.items()}
        missing = {inum for inum, end in ends.items() if end is None}
        for tgid in self._processes():
            if not missing:
                break
            with contextlib.suppress(OSError, ValueError):
                inum = self._inum(tgid)
                if inum in missing:
                    file = self._open(tgid)
                    try:
                        ends[inum] = _retrans_segs(file)
                    finally:
                        os.close(file)
                    missing.discard(inum)
        return [
            {"inum": inum, "retrans_segs_start": each.start, "retrans_segs_end": ends[inum]}
            for inum, each in self._known.items()
        ]

    @staticmethod
    def _end(namespace: _Namespace) -> int | None:
        if namespace.file is None:
            return None
        with contextlib.suppress(OSError, ValueError):
            return _retrans_segs(namespace.file)
        return None

    def close(self) -> None:
        """Let the namespaces go. Safe to call twice."""
        for each in self._known.values():
            if each.file is not None:
                os.close(each.file)
                each.file = None

    def _inum(self, tgid: int) -> int:
        return os.stat(f"{self._proc}/{tgid}/ns/net").st_ino  # noqa: PTH116 - of the whole host

    def _open(self, tgid: int) -> int:
        return os.open(f"{self._proc}/{tgid}/net/snmp", os.O_RDONLY | os.O_CLOEXEC)

    def _processes(self) -> Iterator[int]:
        return (int(name) for name in os.listdir(self._proc) if name.isdigit())  # noqa: PTH208


def _retrans_segs(file: int) -> int:
    """The counter as it is now. Raises OSError, and ValueError for what is no such file."""
    text = os.pread(file, 1 << 16, 0).decode("ascii")
    heads, values = (line.split() for line in text.splitlines() if line.startswith("Tcp:"))
    return int(values[heads.index("RetransSegs")])
