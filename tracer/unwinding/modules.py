"""The table of a file that a target has mapped: kept from before, or made by the worker.

Two workers take part, because a table is believed by later runs, about other processes. The one
that parses the targets' files says where the sections are and reads them; were it taken over by
what it parsed, it could lie about this file now, and no more. The table is then made by a worker
that was started for it and has seen nothing but those sections, and is kept under a digest of the
very bytes that this worker got. So what is found under a digest depends on the bytes with that
digest alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from latrace.tracer.symbols import wire
from latrace.tracer.symbols.client import Worker, WorkerError

from .cache import TableCache, key_of
from .sections import Place
from .table import TableError, UnwindTable


class ModuleTables:
    """Tables by file. Not thread-safe. `found` of them were kept from before, `made` were not."""

    def __init__(
        self,
        worker: Worker,
        *,
        cache: TableCache | None = None,
        another: Callable[[], Worker] = Worker,
    ) -> None:
        """`worker` reads the files; `another` starts one for a single table."""
        self._worker = worker
        self._cache = cache
        self._another = another
        self._maker: Worker | None = None
        self._abandoned = False
        self.found = 0
        self.made = 0

    def abandon(self) -> None:
        """Make no more of them; what is being made ends at once. For another thread to call."""
        self._abandoned = True
        self._worker.abandon()
        maker = self._maker
        if maker is not None:
            maker.abandon()

    def table(self, fd: int) -> UnwindTable | str:
        """The table of the file open as `fd`; a string says why there is none. Never raises."""
        try:
            answer = self._worker.section(fd)
            if isinstance(answer, int):
                return wire.STATUS_WORDS[answer]
            fields, data = answer
            if not fields:
                return "without call frame information"
            return self._table([Place.from_dict(each) for each in json.loads(fields)], data)
        except WorkerError as error:
            return str(error)
        except (ValueError, KeyError, TypeError, TableError, RecursionError):
            return "the worker talks nonsense"

    def _table(self, places: list[Place], sections: bytes) -> UnwindTable | str:
        key = key_of(places, sections)
        known = None if self._cache is None else self._cache.find(key)
        if known is not None:
            self.found += 1
            return known
        worker = self._maker = self._another()
        if self._worker.hurried:
            worker.hurry()
        try:
            if self._abandoned:
                worker.abandon()
            data = worker.unwind_table([place.as_dict() for place in places], sections)
        finally:
            self._maker = None
            worker.close()
        if isinstance(data, int):
            return wire.STATUS_WORDS[data]
        table = UnwindTable.from_bytes(data)
        self.made += 1
        if self._cache is not None:
            self._cache.keep(key, data)
        return table
