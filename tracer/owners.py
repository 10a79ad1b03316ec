"""What the processes are called whose sockets sent something again.

Who used a socket last comes with its name; who else has it open is looked up while it lives.
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
    """Collects the names of processes."""

    def __init__(self, *, proc: Path = PROC) -> None:
        self._proc = proc
        self._cookies: set[int] = set()
        self._names: dict[int, str] = {}

    def sent_again(self, rows: npt.NDArray[np.void]) -> None:
        """Note whose these are; `rows`: retransmits, shape (n,) of dtype SOCKET."""
        for tgid, comm in dict(
            zip(rows["tgid"].tolist(), rows["comm"].tolist(), strict=True)
        ).items():
            self._name(tgid, comm)
        if len(self._cookies) < _MOST:
            self._cookies.update(rows["cookie"].tolist())

    def connected(self, columns: Mapping[str, Any]) -> None:
        """Look who else has those connections; `columns`: of the table `connections`."""
        for cookie, owners in zip(
            np.asarray(columns["cookie"]).tolist(), columns["owners"], strict=True
        ):
            if cookie in self._cookies:
                for tgid in owners:
                    if tgid not in self._names:
                        self._look(tgid)

    def _look(self, tgid: int) -> None:
        with contextlib.suppress(OSError):
            self._name(tgid, (self._proc / str(tgid) / "comm").read_bytes().removesuffix(b"\n"))

    def _name(self, tgid: int, comm: bytes) -> None:
        if tgid in self._names or len(self._names) < _MOST:
            self._names[tgid] = comm.decode("utf-8", "backslashreplace")

    def told(self) -> list[dict[str, Any]]:
        """The manifest's `owners`."""
        return [{"tgid": tgid, "comm": comm} for tgid, comm in self._names.items()]
