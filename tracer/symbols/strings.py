"""Tables of strings that each end at a zero byte."""

from __future__ import annotations

import numpy as np

from latrace.tracer.symbols.frames import NAME_LIMIT
from latrace.tracer.symbols.table import I64


class Strings:
    """The strings in `data` from `begin` on; the last one may lack its zero byte."""

    def __init__(self, data: bytes, begin: int = 0) -> None:
        self.data = data
        letters = np.frombuffer(data, dtype=np.uint8)
        self._stops = np.append(np.flatnonzero(letters[begin:] == 0) + begin, len(data))

    def __len__(self) -> int:
        return len(self.data)

    def ends(self, starts: I64) -> I64:
        """Where the strings end that begin there, each after `NAME_LIMIT` bytes at the latest.

        (n,) positions in `data`, none beyond its end, to (n,).
        """
        stops = self._stops[np.searchsorted(self._stops, starts)]
        return np.asarray(np.minimum(stops, starts + NAME_LIMIT), dtype=np.int64)
