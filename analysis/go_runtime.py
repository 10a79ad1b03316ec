"""What a Go service says of itself: stops of the world by its collector, and its goroutines.

Pure functions of the texts of its `/debug/pprof/heap?debug=1` and `/debug/pprof/goroutine?debug=1`.
They come from the service, so that anything may stand in them: what is read is bounded, what is
missing is None, and no text raises anything but GoTextError.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

HEAP_BEFORE: Final = "pprof-heap-before.txt"
HEAP: Final = "pprof-heap.txt"
GOROUTINES: Final = "pprof-goroutines.txt"
"""How these texts are called in a bundle."""

MAX_TEXT: Final = 16 << 20
MAX_GROUPS: Final = 100_000
LARGEST: Final = 5
TOP: Final = 8
"""Functions of a stack that are told."""
MAX_NAME: Final = 200

_RING: Final = 256  # runtime/mstats.go: MemStats.PauseNs
_LIMIT: Final = 1 << 63

_STACK: Final = 65536  # characters of one
_OURS: Final = "\tnet/http/pprof."
_STATS: Final = "\n# runtime.MemStats\n"
_FIELD: Final = re.compile(r"^# ([A-Za-z]{1,30}) = ([^\n]{0,40})$", re.ASCII | re.MULTILINE)
_TOTAL: Final = re.compile(r"goroutine profile: total ([0-9]{1,12})\n", re.ASCII)
_GROUP: Final = re.compile(r"^([0-9]{1,12}) @(?: 0x[0-9a-f]+)*$", re.ASCII | re.MULTILINE)
_FRAME: Final = re.compile(r"^#\t0x[0-9a-f]+\t([^\t\n]+)\t", re.ASCII | re.MULTILINE)
_OFFSET: Final = re.compile(r"\+0x[0-9a-f]+$", re.ASCII)


class GoTextError(ValueError):
    """The text is not what it is said to be."""


# --- the collector -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MemStats:
    """Go's runtime.MemStats, as far as it tells of pauses."""

    num_gc: int
    """Collections since the process began."""
    pauses: tuple[tuple[int, int], ...]
    """(end, length) of the last collections' stops of the world, at most 256, in the order of their
    ends: CLOCK_REALTIME in nanoseconds, and nanoseconds. A collection stops the world twice; the
    length is that of both together, the end that of the second."""
    gc_cpu_fraction: float | None
    """Share of all CPU time since the process began that the collector took."""
    heap_bytes: int | None
    """Allocated and not yet freed."""
    next_gc_bytes: int | None
    """Size of the heap at which the next collection begins."""
    forced: int | None
    """Collections that the program asked for itself."""

    @property
    def known_since_ns(self) -> int:
        """From when on `pauses` has all of them, CLOCK_REALTIME; 0: since the process began."""
        if self.num_gc <= len(self.pauses) or not self.pauses:
            return 0
        return self.pauses[0][0]


def parse_memstats(text: str) -> MemStats:
    """Read the statistics at the end of a heap profile. Raises GoTextError if there are none."""
    at = text[:MAX_TEXT].find(_STATS)
    if at < 0:
        raise GoTextError("no runtime.MemStats")
    text = text[at : at + 65536]
    fields = dict(_FIELD.findall(text))
    num_gc = _whole(fields.get("NumGC"))
    if num_gc is None:
        raise GoTextError("no NumGC")
    pauses, ends = _ring(text, "PauseNs"), _ring(text, "PauseEnd")
    if len(pauses) != len(ends):
        raise GoTextError("not as many ends as pauses")
    known = sorted((end, pause) for end, pause in zip(ends, pauses, strict=True) if end)
    fraction = _fraction(fields.get("GCCPUFraction"))
    return MemStats(
        num_gc=num_gc,
        pauses=tuple(known),
        gc_cpu_fraction=fraction,
        heap_bytes=_whole(fields.get("HeapAlloc")),
        next_gc_bytes=_whole(fields.get("NextGC")),
        forced=_whole(fields.get("NumForcedGC")),
    )


def _ring(text: str, name: str) -> list[int]:
    """One of the rings of 256 numbers: those not used yet are 0."""
    begin = text.find(f"\n# {name} = [")
    end = text.find("]", begin)
    if begin < 0 or end < 0:
        raise GoTextError(f"no {name}")
    words = text[begin:end].partition("[")[2].split()
    numbers = [_whole(word) for word in words[: _RING + 1]]
    if len(numbers) > _RING or None in numbers:
        raise GoTextError(f"{name} is no ring of {_RING} numbers")
    return [number for number in numbers if number is not None]


def _whole(text: str | None) -> int | None:
    if text is None or not re.fullmatch(r"[0-9]{1,19}", text, re.ASCII):
        return None
    number = int(text)
    return number if number < _LIMIT else None


def _fraction(text: str | None) -> float | None:
    if text is None or not re.fullmatch(r"[0-9.]+(?:e[-+][0-9]{1,3})?", text, re.ASCII):
        return None
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value <= 1 else None


# --- goroutines --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Group:
    """Goroutines with one and the same stack."""

    count: int
    stack: tuple[str, ...]
    """Functions, the innermost first, at most `TOP`. Names are the program's: not for a terminal
    as they are."""


@dataclass(frozen=True, slots=True)
class Goroutines:
    """All goroutines of a moment."""

    total: int
    largest: tuple[Group, ...]
    """The largest groups, at most `LARGEST`, without those that answer for these profiles."""


def parse_goroutines(text: str) -> Goroutines:
    """Read a goroutine profile with counts and stacks. Raises GoTextError if it is none."""
    text = text[:MAX_TEXT]
    total = _TOTAL.match(text)
    if total is None:
        raise GoTextError("no goroutine profile")
    groups: list[tuple[int, int, int]] = []
    for match in _GROUP.finditer(text):
        if groups:
            groups[-1] = (*groups[-1][:2], match.start())
        if len(groups) >= MAX_GROUPS:
            break
        groups.append((int(match[1]), match.end(), len(text)))
    # Who fetches profiles has some goroutines of its own in there, each of them alone.
    some = heapq.nlargest(2 * LARGEST, groups, key=lambda group: group[0])
    others = [each for each in some if _OURS not in text[each[1] : min(each[2], each[1] + _STACK)]]
    return Goroutines(
        total=int(total[1]),
        largest=tuple(
            Group(count, _stack(text[begin:end])) for count, begin, end in others[:LARGEST]
        ),
    )


def _stack(text: str) -> tuple[str, ...]:
    names = []
    for match in _FRAME.finditer(text[:_STACK]):
        names.append(_OFFSET.sub("", match[1])[:MAX_NAME])
        if len(names) == TOP:
            break
    return tuple(names)


# --- both, set against a spike -----------------------------------------------------------------


def summarise_go(
    heap_before: str | None,
    heap_after: str | None,
    goroutines: str | None,
    since_realtime_ns: int,
    until_realtime_ns: int,
) -> dict[str, Any]:
    """Sum up what the texts say of the time from `since_realtime_ns` to `until_realtime_ns`.

    A pause counts if any of it lies in there. Texts that are None or not what they should be leave
    their numbers None, and a line in `notes`. Never raises.

    Returns `pauses` (count), `pause_ns`, `max_pause_ns`, `longest` [{end_realtime_ns, pause_ns}],
    `at_least` (whether there may have been more), `known_since_realtime_ns` (from when on all are
    known until `heap_before`, or if that is None `heap_after`; 0: always), `collections` and
    `missed` (between the two texts; those that the ring no longer has), `gc_cpu_fraction`,
    `heap_bytes`, `goroutines`, `largest` [{count, stack}], `notes`.
    """
    notes: list[str] = []
    before = _try("memory statistics before", heap_before, parse_memstats, notes)
    after = _try("memory statistics after", heap_after, parse_memstats, notes)
    crowd = _try("dump of goroutines", goroutines, parse_goroutines, notes)
    told: dict[str, Any] = dict.fromkeys(
        ("pauses", "pause_ns", "max_pause_ns", "collections", "missed", "gc_cpu_fraction")
    )
    told |= {"heap_bytes": None, "longest": [], "goroutines": None, "largest": [], "notes": notes}
    told |= {"at_least": None, "known_since_realtime_ns": None}
    first, last = before or after, after or before
    if first is not None and last is not None:
        within = _within(before, after, since_realtime_ns, until_realtime_ns)
        told |= {
            "pauses": len(within),
            "pause_ns": sum(pause for _, pause in within),
            "max_pause_ns": max((pause for _, pause in within), default=0),
            "longest": [
                {"end_realtime_ns": end, "pause_ns": pause}
                for end, pause in heapq.nlargest(LARGEST, within, key=lambda each: each[1])
            ],
            "at_least": after is None or _may_lack(first, after, since_realtime_ns),
            "known_since_realtime_ns": first.known_since_ns,
            "gc_cpu_fraction": last.gc_cpu_fraction,
            "heap_bytes": last.heap_bytes,
        }
    if before is not None and after is not None and after.num_gc >= before.num_gc:
        told["collections"] = after.num_gc - before.num_gc
        told["missed"] = max(0, told["collections"] - _RING)
        if told["missed"]:
            notes.append(
                f"{told['missed']} of {told['collections']} collections are not in the statistics:"
                f" Go keeps the last {_RING}"
            )
    if crowd is not None:
        told["goroutines"] = crowd.total
        told["largest"] = [
            {"count": group.count, "stack": list(group.stack)} for group in crowd.largest
        ]
    return told


def _try(what: str, text: str | None, parse: Any, notes: list[str]) -> Any:
    if text is None:
        return None
    try:
        return parse(text)
    except GoTextError as error:
        notes.append(f"the {what}: {error}")
        return None


def _may_lack(first: MemStats, last: MemStats, since_ns: int) -> bool:
    """Whether pauses from `since_ns` on may be in neither text."""
    if since_ns >= last.known_since_ns:
        return False
    between = last.num_gc - first.num_gc
    return since_ns < first.known_since_ns or not 0 <= between <= len(last.pauses)


def _within(
    before: MemStats | None, after: MemStats | None, since_ns: int, until_ns: int
) -> Sequence[tuple[int, int]]:
    """Pauses that overlap a span; what both texts have counts once."""
    every = {pause for stats in (before, after) if stats is not None for pause in stats.pauses}
    return sorted((end, ns) for end, ns in every if end >= since_ns and end - ns <= until_ns)
