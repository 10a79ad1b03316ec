"""What the processes are called whose sockets sent something again.

Only of the targets the probes tell the names. Whoever is asked for here had a segment lost a moment
ago, and most live on for as long as the loss lasts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .processes import PROC

_MOST: Final = 1000  # in the manifest, whoever floods us


class Owners:
    """Collects the names; `names` has them by process."""

    def __init__(self, *, proc: Path = PROC) -> None:
        self._proc = proc
        self._cookies: set[int] = set()
        self.names: dict[int, str] = {}

    def sent_again(self, rows: npt.NDArray[np.void]) -> None:
        """Look who these are of; `rows`: retransmits, shape (n,) of dtype SOCKET."""
        # Anew each time: it may have executed another program since.
        for tgid in np.unique(rows["tgid"]).tolist():
            self._look(tgid)
        if len(self._cookies) < _MOST:
            self._cookies.update(rows["cookie"].tolist())

    def connected(self, columns: Mapping[str, Any]) -> None:
        """Look who else has those connections; `columns`: of the table `connections`."""
        for cookie, owners in zip(
            np.asarray(columns["cookie"]).tolist(), columns["owners"], strict=True
        ):
            if cookie in self._cookies:
                for tgid in owners:
                    if tgid not in self.names:
                        self._look(tgid)

    def _look(self, tgid: int) -> None:
        if tgid not in self.names and len(self.names) >= _MOST:
            return
        with contextlib.suppress(OSError):
            raw = (self._proc / str(tgid) / "comm").read_bytes()
            self.names[tgid] = raw.removesuffix(b"\n").decode("utf-8", "backslashreplace")

    def told(self) -> list[dict[str, Any]]:
        """The manifest's `owners`."""
        return [{"tgid": tgid, "comm": comm} for tgid, comm in self.names.items()]
