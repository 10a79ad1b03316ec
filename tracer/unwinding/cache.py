"""Unwinding tables kept between runs: the sections of a few modules take longer than their stacks.

A table is kept under a digest of all that it was made of: the sections' bytes, what they are
relative to, and the format; a build id is only what a file says of itself. The directory and its
files are root's alone. A file that is damaged, or whose keeper is another user, counts as missing;
where there is no cache to be had, nothing is kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from latrace.tracer.kept import KeptFiles

from .sections import Place
from .table import FORMAT, MAX_BYTES, TableError, UnwindTable

DIRECTORY: Final = Path("/var/cache/latrace-unwinding")
SIZE_LIMIT: Final = 256 << 20
"""Bytes of all files together; the ones unused for longest go first."""
_SUFFIX: Final = ".unwind"


def key_of(places: Sequence[Place], data: bytes) -> str:
    """The name under which the table of these sections is kept."""
    digest = hashlib.sha256()
    fields = [place.as_dict() for place in places]
    for each in fields:
        # Where a section is in its file makes no difference to what is in it.
        del each["offset"]
    digest.update(repr((FORMAT, [sorted(each.items()) for each in fields])).encode())
    digest.update(data)
    return digest.hexdigest() + _SUFFIX


class TableCache:
    """Tables in a directory. Never raises for what is wrong with it."""

    def __init__(self, directory: Path = DIRECTORY, *, size_limit: int = SIZE_LIMIT) -> None:
        largest = min(MAX_BYTES, size_limit)
        self._files = KeptFiles(
            directory, most_files=sys.maxsize, most_bytes=size_limit, largest=largest
        )

    def find(self, key: str) -> UnwindTable | None:
        """What was kept under this key, None when nothing (whole) was."""
        data = self._files.find(key, use=True)
        if data is not None:
            with contextlib.suppress(TableError):
                return UnwindTable.from_bytes(data)
        return None

    def keep(self, key: str, data: bytes) -> None:
        """Keep a table's bytes, and drop the longest unused beyond the limit."""
        self._files.keep(key, data)
