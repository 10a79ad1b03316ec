"""`latrace spikes`: the bundles of a watch, one on a line."""

from __future__ import annotations

import calendar
import json
import os
import shlex
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latrace.analysis.words import cells, fit, pad, plural, size, visible
from latrace.tracer.commands.console import Status, program, write_out
from latrace.tracer.commands.tracing import say_next
from latrace.tracer.errors import LatraceError
from latrace.tracer.watch.bundles import DEFAULT_NAME, NAME, age

if TYPE_CHECKING:
    from latrace.analysis.spike_file import Spike

Folder = Annotated[
    Path, typer.Argument(metavar="DIR", help="Where latrace watch puts its bundles.")
]
Json = Annotated[bool, typer.Option("--json", help="Print them as JSON, for machines.")]

_MANIFEST = "manifest.json"
_MOST_BUNDLES = 10_000
_MOST_FILES = 1000

_WIDTH = 80
_NAMES, _WHEN, _FIRED, _SAW, _SIZE = 23, 7, 14, 9, 9  # columns, the gap before or after included
_SECONDS = (("y", 31_557_600, 63_115_200), ("d", 86400, 172800), ("h", 3600, 5400), ("min", 60, 90))


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """A bundle as it is found on the disk."""

    path: Path
    fired_realtime_ns: int
    spike: Spike | None
    complete: bool
    bytes: int
    trouble: str
    """Why its `spike.json` cannot be read; "": it can, or there is none."""


def spikes(*, folder: Folder = Path(DEFAULT_NAME), as_json: Json = False) -> None:
    """List what a watch has captured: when, how bad, and why.

    The newest is the last. Needs no root.

    \b
    latrace spikes
    latrace spikes /var/lib/latrace --json | jq '.[-1].analysis.sentences'
    """
    found = find_bundles(folder)
    if as_json:
        write_out(json.dumps([_object(one) for one in found], indent=2, ensure_ascii=True) + "\n")
        return
    if not found and (folder / _MANIFEST).exists():
        raise LatraceError(
            f"{visible(str(folder))} is a capture, not a directory of bundles",
            hint=f"{program()} report -i {shlex.quote(visible(str(folder)))}",
        )
    if not found:
        write_out(f"No bundles in {visible(str(folder))} yet\n")
        return
    now_ns = time.time_ns()
    write_out("".join(line + "\n" for line in table(found, now_ns=now_ns)))
    newest, status = found[-1], Status()
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(newest.fired_realtime_ns // 10**9))
    status.say(
        f"{plural(len(found), 'bundle')}, {size(sum(one.bytes for one in found))}; the newest is "
        f"of {at} local time"
    )
    source = f"-i {shlex.quote(visible(str(newest.path)))}"
    say_next(((f"{program()} report {source}", "what the newest is made of"),), status=status)


def find_bundles(folder: Path) -> list[Listed]:
    """What bundles are in a directory, the oldest first. Raises `LatraceError`."""
    try:
        with os.scandir(folder) as entries:
            paths = [
                Path(entry.path)
                for entry in entries
                if NAME.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
            ]
    except FileNotFoundError:
        raise LatraceError(
            f"there is no directory {visible(str(folder))}",
            hint="latrace watch makes it when it starts; name it: latrace spikes DIR",
        ) from None
    except OSError as error:
        raise LatraceError(
            f"cannot list {visible(str(folder))}: {(error.strerror or str(error)).lower()}",
            hint="name the directory that latrace watch writes to: latrace spikes DIR",
        ) from error
    return [_look(path) for path in sorted(paths, key=lambda path: age(path.name))[-_MOST_BUNDLES:]]


def _look(path: Path) -> Listed:
    from latrace.analysis.errors import CaptureError  # noqa: PLC0415
    from latrace.analysis.spike_file import read_object, read_spike  # noqa: PLC0415

    spike, trouble, whole = None, "", False
    try:
        spike = read_spike(path)
    except CaptureError as error:
        trouble = error.cause
    try:
        manifest = read_object(path / _MANIFEST)
        whole = manifest is not None and manifest.get("complete") is True
    except CaptureError as error:
        trouble = trouble or error.cause
    return Listed(
        path=path,
        fired_realtime_ns=_named_ns(path) if spike is None else spike.fired_realtime_ns,
        spike=spike,
        complete=whole and spike is not None and spike.complete,
        bytes=_weigh(path),
        trouble=trouble,
    )


def _named_ns(path: Path) -> int:
    """When it fired, from its name."""
    try:
        return calendar.timegm(time.strptime(age(path.name)[0], "%Y%m%d-%H%M%S")) * 10**9
    except (ValueError, OverflowError):  # digits that are no date
        return 0


def _weigh(path: Path) -> int:
    total = 0
    try:
        with os.scandir(path) as entries:
            for number, entry in enumerate(entries):
                status = entry.stat(follow_symlinks=False)
                total += status.st_size if stat.S_ISREG(status.st_mode) else 0
                if number >= _MOST_FILES:
                    break
    except OSError:  # not ours to read, or removed just now
        return total
    return total


def _object(one: Listed) -> dict[str, Any]:
    document = {} if one.spike is None else one.spike.document
    return {
        "name": one.path.name,
        "path": str(one.path),
        "fired_realtime_ns": one.fired_realtime_ns,
        "triggers": document.get("triggers", []),
        "analysis": document.get("analysis"),
        "complete": one.complete,
        "bytes": one.bytes,
        "trouble": one.trouble,
    }


# --- lines -------------------------------------------------------------------------------------


def table(found: list[Listed], *, now_ns: int) -> Iterator[str]:
    """The bundles as lines of at most 80 columns, after a line of titles."""
    names = max([_NAMES, *(cells(one.path.name) + 1 for one in found)])
    why = _WIDTH - names - _WHEN - _FIRED - 2 - _SAW - 2 - _SIZE
    yield (
        pad("fired at (UTC)", names)
        + "ago".rjust(_WHEN)
        + pad("  fired by", _FIRED + 2)
        + "saw".rjust(_SAW)
        + pad("  mostly", why + 2)
        + "size".rjust(_SIZE)
    )
    for one in found:
        fired, saw, mostly = _words(one, why)
        yield (
            pad(one.path.name, names)
            + ago(now_ns - one.fired_realtime_ns).rjust(_WHEN)
            + f"  {pad(fired, _FIRED)}"
            + fit(saw, _SAW - 1).rjust(_SAW)
            + f"  {pad(mostly, why)}"
            + size(one.bytes).rjust(_SIZE)
        )


def ago(ns: int) -> str:
    """How long ago, in one unit: `12 min`."""
    seconds = max(0, ns // 10**9)
    for unit, length, least in _SECONDS:
        if seconds >= least:
            return f"{seconds // length:,} {unit}"
    return f"{seconds} s"


def _words(one: Listed, room: int) -> tuple[str, str, str]:
    """What fired, what it saw, and why."""
    from latrace.analysis.spike_text import quantity  # noqa: PLC0415

    if one.spike is None:
        return "damaged" if one.trouble else "not complete", "-", "-"
    trigger = one.spike.main
    more = f" +{len(one.spike.triggers) - 1}" if len(one.spike.triggers) > 1 else ""
    # Of a metric its name tells more than what it was asked for with.
    rule = trigger.rule.removeprefix("--metric ").removeprefix("--")
    rule = visible(rule) or trigger.kind
    fired = fit(rule, _FIRED - cells(more)) + more
    told = one.spike.document.get("analysis")
    told = told if isinstance(told, dict) else {}
    seen = told.get("value")
    if not isinstance(seen, int | float) or isinstance(seen, bool) or abs(seen) >= 2**63:
        seen = trigger.value
    saw = (
        "-" if seen is None else quantity(seen, "" if trigger.unit == "segments" else trigger.unit)
    )
    if not one.complete:
        return fired, saw, "not complete"
    return fired, saw, fit(_why(told), room) if told else "not analysed"


def _why(told: Mapping[str, Any]) -> str:
    """The culprit, or else the main cause: the file may say anything."""
    from latrace.analysis.attribution_text import SHORT  # noqa: PLC0415
    from latrace.analysis.spike_text import COLLECTED  # noqa: PLC0415

    cause, culprit, name = (told.get(key) for key in ("cause", "culprit", "name"))
    cause, name = (visible(text) if isinstance(text, str) else "" for text in (cause, name))
    comm = culprit.get("comm") if isinstance(culprit, dict) else None
    if isinstance(comm, str) and comm:
        return f"own {visible(comm)}" if cause == "own" else visible(comm)
    where, locked = told.get("where"), told.get("locked")
    if cause == "on_cpu" and isinstance(locked, str) and locked:
        return "goroutine lock"
    collector = where.get("collector") if isinstance(where, dict) else None
    if cause == "on_cpu" and isinstance(collector, float) and collector >= COLLECTED:
        return "Go's collector"
    words = {"lost": "lost segments", "on_cpu": "own work", "blocked": name or "blocked", "": "-"}
    return words.get(cause) or SHORT.get(cause) or name or cause
