"""Where a watch puts its bundles: a directory of captures, at most so many and so large.

A bundle is a capture's directory, `spike-20261121-113205` (UTC), with spike.json, report.html and
the profiles of the application beside the tables. The directory may hold anything else, too, and
several watches may share it. A bundle is counted and removed only when it is a directory of that
name, of the user we act for, with nothing in it but what latrace writes. Everything is done with
the calling user's rights on directories held by descriptor (tracer/outputs.py).
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latrace.tracer.errors import LatraceError
from latrace.tracer.outputs import MANIFEST, OutputDir, OutputFolder, open_output_folder

DEFAULT_NAME = "latrace.spikes"
SPIKE = "spike.json"
NAME = re.compile(r"spike-(\d{8}-\d{6})(?:-([1-9]\d{0,4}))?", re.ASCII)
"""A bundle's name: the second (UTC) that it fired in, and a number for all but the first of it."""

_FILES = re.compile(r"spike\.json|report\.html|pprof-[a-z0-9-]+\.(?:pb\.gz|txt|out)")
_MOST_OF_A_SECOND = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Removed:
    """A bundle that had to go."""

    path: Path
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tidied:
    """What `Bundles.tidy` did."""

    removed: tuple[Removed, ...]
    notes: tuple[str, ...]
    """Why a bundle is left alone or could not be removed; each is said once."""


class Bundles:
    """The bundles below one directory.

    Right after `new` is the time for a `tidy`: the new one counts already, and never has to go.
    Then at most `keep` are there while it is written, too; once it is whole, another `tidy` sees
    its size.

    Raises LatraceError (UsageError) when the directory cannot be opened or made.
    """

    def __init__(self, path: Path, *, keep: int, disk_bytes: int) -> None:
        self._folder = open_output_folder(path, files=_FILES)
        self._keep = max(1, keep)
        self._disk_bytes = disk_bytes
        self._newest = ""
        self._told: dict[str, str] = {}

    @property
    def path(self) -> Path:
        """The directory, absolute."""
        return self._folder.path

    def new(self, fired_realtime_ns: int, manifest: Mapping[str, Any]) -> OutputDir:
        """Make the directory of a new bundle, locked as long as it is open.

        `manifest`: its first words. It is there with them, marked as not complete, or not at all,
        whatever kills us. Should somebody have removed the directory of bundles, it is made again.
        Raises LatraceError when there is no room, no right, or no free name.
        """
        # It brings numpy and pyarrow.
        from latrace.tracer.writer import encode_manifest, first_manifest  # noqa: PLC0415

        first = {MANIFEST: encode_manifest(first_manifest(manifest))}
        if self._folder.is_removed():
            self._open_again()
        name = time.strftime("spike-%Y%m%d-%H%M%S", time.gmtime(fired_realtime_ns // 10**9))
        for number in range(1, _MOST_OF_A_SECOND + 1):
            out = self._folder.make(name if number == 1 else f"{name}-{number}", first)
            if out is not None:
                self._newest = out.path.name
                return out
        raise LatraceError(
            f"cannot make {self.path / name}: the name is taken, and so are all that follow",
            hint="choose another place with -o",
        )

    def discard(self, out: OutputDir) -> None:
        """Let go of a new one that nothing could be written to, and remove it if that works."""
        out.close()
        with suppress(LatraceError):
            self._folder.remove(out.path.name)

    def _open_again(self) -> None:
        folder: OutputFolder = open_output_folder(self.path, files=_FILES)
        self._folder.close()
        self._folder = folder

    def tidy(self) -> Tidied:
        """Remove the oldest until at most `keep` are there and all take at most `disk_bytes`.

        Oldest by name. Never the newest, never the one that `new` made last, never one that is
        being written; one that cannot be removed makes no younger one go in its place. Raises
        nothing for what is wrong with single bundles or the directory: that is in the notes.
        """
        trouble: dict[str, str] = {}
        try:
            names = self._folder.names(NAME)
        except LatraceError as error:
            names, trouble[""] = [], error.cause
        for name in names:
            if NAME.fullmatch(name) is None:  # half made or removed: a kill came in between
                self._remove(name, trouble)
        excess: list[Removed] = []
        count = size_bytes = 0
        for name in sorted(filter(NAME.fullmatch, names), key=age, reverse=True):
            try:
                own_bytes = self._folder.weigh(name)
            except LatraceError as error:
                trouble[name] = f"{error.cause}; it stays, and does not count"
                continue
            if own_bytes is None:
                continue
            count, size_bytes = count + 1, size_bytes + own_bytes
            fits = count <= self._keep and size_bytes <= self._disk_bytes
            if not fits and count > 1 and name != self._newest:
                excess.append(Removed(path=self.path / name, size_bytes=own_bytes))
        removed = [one for one in reversed(excess) if self._remove(one.path.name, trouble)]
        notes = [cause for name, cause in trouble.items() if self._told.get(name) != cause]
        self._told = trouble  # of what is there: it does not grow over the weeks
        return Tidied(removed=tuple(removed), notes=tuple(notes))

    def _remove(self, name: str, trouble: dict[str, str]) -> bool:
        try:
            return self._folder.remove(name)
        except LatraceError as error:
            trouble[name] = error.cause
            return False

    def close(self) -> None:
        """Let the directory go. Safe to call again."""
        self._folder.close()


def write_spike(out: OutputDir, document: Mapping[str, Any]) -> None:
    """Write a bundle's spike.json, whole or not at all. Raises LatraceError."""
    text = json.dumps(document, indent=1, ensure_ascii=True, allow_nan=False)
    out.replace(SPIKE, text.encode("ascii") + b"\n")


def age(name: str) -> tuple[str, int]:
    """What bundles are sorted by: the moment as it is named, then the number within that second.

    Raises ValueError when that is not a bundle's name.
    """
    found = NAME.fullmatch(name)
    if found is None:
        raise ValueError(name)
    return found[1], int(found[2] or 1)
