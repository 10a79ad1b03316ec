"""Read `spike.json`: what fired, and when, of a capture that `latrace watch` wrote.

The file may come from anywhere: it is opened without following a link, read up to a bound, and
everything in it is checked before it is used. Texts in it are hostile: `latrace.analysis.words`
makes them fit to print.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn, TypeGuard

from latrace.analysis.errors import CaptureError, damaged, unreadable

SPIKE_FILE: Final = "spike.json"
SPIKE_SCHEMA: Final = 1
KINDS: Final = ("wait", "sleep", "max", "retransmits", "metric", "manual")

_MOST_BYTES = 4 << 20
_MOST_TRIGGERS = 64
_MOST_NOTES = 200
_MOST_TEXT = 4096
_MOST_NS = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Trigger:
    """A rule that fired."""

    rule: str
    """As it was typed."""
    kind: str
    """One of `KINDS`."""
    value: float | None
    threshold: float | None
    unit: str
    """Of `value`, `threshold` and `baseline`: `ns`, `s`, `segments`, or none."""
    count: int
    """Values that it is a percentile of; 0: means nothing."""
    baseline: float | None
    """What is usual."""
    since_ns: int
    """From here to `until_ns` the rule looked (CLOCK_MONOTONIC)."""
    until_ns: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Spike:
    """What `spike.json` says. Times are CLOCK_MONOTONIC unless they are named otherwise."""

    name: str
    complete: bool
    fired_ns: int
    fired_realtime_ns: int
    start_ns: int
    end_ns: int
    triggers: tuple[Trigger, ...]
    """At least one; the first is the main one."""
    settings: Mapping[str, Any]
    host: Mapping[str, Any]
    """Who else used the host; empty: not known."""
    profiles: Mapping[str, Any]
    """Of the service itself; empty: none."""
    notes: tuple[str, ...]
    document: Mapping[str, Any]
    """The whole file."""

    @property
    def main(self) -> Trigger:
        """The rule that is told of first."""
        return self.triggers[0]

    def realtime_ns(self, at_ns: int) -> int:
        """Tell the time of day, in ns since 1970, of a moment."""
        return self.fired_realtime_ns + at_ns - self.fired_ns


class Told(NamedTuple):
    """A spike, and what it was made of."""

    spike: Spike
    analysis: Mapping[str, Any]
    """As `latrace.analysis.spikes.analyse` gives it."""

    def document(self) -> dict[str, Any]:
        """Give what `spike.json` says, the analysis in its place."""
        return {**self.spike.document, "analysis": self.analysis}


def read_spike(bundle: str | os.PathLike[str]) -> Spike | None:
    """Read what fired in a bundle; None: this capture has no `spike.json`.

    Raises CaptureError for a file that is damaged, or that a newer latrace wrote.
    """
    file = Path(bundle) / SPIKE_FILE
    document = read_object(file)
    if document is None:
        return None
    version = document.get("schema")
    if not _is_int(version) or version < 1:
        raise _damaged(file, "it has no schema version")
    if version > SPIKE_SCHEMA:
        raise CaptureError(
            f"{file} has schema {version}; this latrace reads up to {SPIKE_SCHEMA}",
            hint="read it with the latrace that wrote it",
        )
    return _Reader(file).spike(document)


def read_object(file: Path, *, most_bytes: int = _MOST_BYTES) -> dict[str, Any] | None:
    """Read a JSON object from a regular file that is no link; None: there is none.

    Raises CaptureError when it cannot be read, is larger, or is something else.
    """
    text = read_file(file, most_bytes=most_bytes)
    if text is None:
        return None
    try:
        found = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise _damaged(file, str(error)) from error
    if not isinstance(found, dict):
        raise _damaged(file, "it is not a JSON object")
    return found


def read_file(file: Path, *, most_bytes: int) -> bytes | None:
    """Read a regular file that is no link; None: there is none.

    Raises CaptureError when it cannot be read, is larger, or is something else.
    """
    try:
        # Not blocking: or a named pipe would be waited for.
        fd = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _damaged(file, "it is a symbolic link") from error
        raise unreadable(file, error) from error
    try:
        with os.fdopen(fd, "rb") as stream:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise _damaged(file, "it is not a regular file")
            text = stream.read(most_bytes + 1)
    except OSError as error:
        raise unreadable(file, error) from error
    if len(text) > most_bytes:
        raise _damaged(file, f"it is larger than {most_bytes >> 20} MiB")
    return text


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_constant(text[:20])


class _Reader:
    """Takes the document apart; every complaint names the file."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def spike(self, document: Mapping[str, Any]) -> Spike:
        triggers = document.get("triggers")
        if not isinstance(triggers, list) or not 0 < len(triggers) <= _MOST_TRIGGERS:
            raise _damaged(self._file, "it names no trigger, or too many")
        notes = document.get("notes") or []
        if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
            raise _damaged(self._file, "its notes are not texts")
        start, end = self._ns(document, "start_ns"), self._ns(document, "end_ns")
        if end < start:
            raise _damaged(self._file, "it ends before it starts")
        return Spike(
            name=self._text(document, "name"),
            complete=document.get("complete") is True,
            fired_ns=self._ns(document, "fired_ns"),
            fired_realtime_ns=self._ns(document, "fired_realtime_ns"),
            start_ns=start,
            end_ns=end,
            triggers=tuple(map(self._trigger, triggers)),
            settings=self._object(document, "settings"),
            host=self._object(document, "host"),
            profiles=self._object(document, "profiles"),
            notes=tuple(note[:_MOST_TEXT] for note in notes[:_MOST_NOTES]),
            document=document,
        )

    def _trigger(self, entry: object) -> Trigger:
        if not isinstance(entry, dict):
            raise _damaged(self._file, "a trigger is not an object")
        kind = entry.get("kind")
        if kind not in KINDS:
            raise _damaged(self._file, f"there is no kind of trigger {str(kind)[:40]!r}")
        since, until = self._ns(entry, "since_ns"), self._ns(entry, "until_ns")
        return Trigger(
            rule=self._text(entry, "rule"),
            kind=kind,
            value=self._number(entry, "value"),
            threshold=self._number(entry, "threshold"),
            unit=self._text(entry, "unit"),
            count=self._ns(entry, "count") if entry.get("count") is not None else 0,
            baseline=self._number(entry, "baseline"),
            since_ns=min(since, until),
            until_ns=until,
            reason=self._text(entry, "reason"),
        )

    def _ns(self, owner: Mapping[str, Any], key: str) -> int:
        value = owner.get(key)
        if not _is_int(value) or not 0 <= value <= _MOST_NS:
            raise _damaged(self._file, f"{key} is not a number that can be")
        return value

    def _number(self, owner: Mapping[str, Any], key: str) -> float | None:
        value = owner.get(key)
        if value is None:
            return None
        usable = isinstance(value, int | float) and not isinstance(value, bool)
        if not usable or not -_MOST_NS <= value <= _MOST_NS or not math.isfinite(value):
            raise _damaged(self._file, f"{key} is not a number that can be")
        number: float = value
        return number

    def _text(self, owner: Mapping[str, Any], key: str) -> str:
        value = owner.get(key)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise _damaged(self._file, f"{key} is not a text")
        return value[:_MOST_TEXT]

    def _object(self, owner: Mapping[str, Any], key: str) -> Mapping[str, Any]:
        value = owner.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise _damaged(self._file, f"{key} is not an object")
        return value


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _damaged(file: Path, why: str) -> CaptureError:
    return damaged(
        file, why, hint=f"the rest of the capture can be read once {SPIKE_FILE} is moved away"
    )
