"""Who else used the host, and what the service's own profiles say: of `spike.json`, in words.

Both sections were written by the watch, but the file may come from anywhere: what is not as it
should be is left out.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final

from latrace.analysis.page import comm
from latrace.analysis.spike_file import Spike
from latrace.analysis.words import duration, fit, plural, visible

_NOTABLE_PERCENT: Final = 5.0
_STEAL_PERCENT: Final = 1.0
_BUSY_PERCENT: Final = 20.0
_SHOWN: Final = 3
_LISTED: Final = 10
_FRAMES: Final = 3


def cpu_users(spike: Spike, targets: Collection[int]) -> list[dict[str, Any]]:
    """List the processes that used most of the CPUs around the spike, without the targets.

    `cpu_percent` is of one CPU; `started`: it began in that time.
    """
    users: list[tuple[float, dict[str, Any]]] = []
    for line in _lines(spike.host.get("top_cpu")):
        percent, pid = _number(line.get("cpu_percent")), line.get("pid")
        if percent is None or not isinstance(pid, int) or pid in targets:
            continue
        if percent >= _NOTABLE_PERCENT:
            name = line.get("comm")
            user = {
                "pid": pid,
                "comm": name if isinstance(name, str) else "",
                "cpu_percent": percent,
                "started": line.get("started") is True,
            }
            users.append((percent, user))
    return [user for _, user in sorted(users, key=lambda one: -one[0])][:_LISTED]


def host_words(spike: Spike, users: list[dict[str, Any]]) -> Iterator[str]:
    """Say in sentences who else used the host, and whether it had CPUs to give."""
    if users:
        said = ", ".join(
            f"{comm(user['comm']) or 'process'} (pid {user['pid']}"
            f"{', newly started' if user['started'] else ''}) with "
            f"{user['cpu_percent']:.0f} % of a CPU"
            for user in users[:_SHOWN]
        )
        yield f"Who else used the CPUs in those seconds: {said}."
    steal = _number(_object(spike.host.get("cpu")).get("steal_percent"))
    if steal is not None and steal >= _STEAL_PERCENT:
        yield f"The hypervisor kept {steal:.0f} % of the CPUs' time for others (steal)."
    pressure = _number(_object(spike.host.get("pressure")).get("host_some_percent"))
    if pressure is not None and pressure >= _BUSY_PERCENT:
        yield (
            f"For {min(pressure, 100):.0f} % of that time some process of the host waited for a "
            "CPU (pressure)."
        )
    for group in _lines(spike.host.get("throttled"))[:1]:
        stopped = _number(group.get("throttled_ns"))
        name = group.get("cgroup")
        if stopped and isinstance(name, str):
            yield (
                f"The control group stopped longest by its CPU quota: {fit(visible(name), 48)}, "
                f"{duration(stopped)}."
            )


def service_words(spike: Spike, begin_ns: int, end_ns: int) -> Iterator[str]:
    """Say in sentences what the Go runtime of the service tells, set against the spike.

    `begin_ns`, `end_ns`: the spike, CLOCK_MONOTONIC.
    """
    told = _object(spike.profiles.get("gc"))
    pauses, total = _number(told.get("pauses")), _number(told.get("pause_ns"))
    longest = _number(told.get("max_pause_ns"))
    if pauses and total is not None and longest is not None:
        stops = plural(int(pauses), "time")
        text = f"Go's collector stopped all goroutines {stops}, {duration(total)} in all"
        inside = _inside(told.get("longest"), spike.realtime_ns(begin_ns), end_ns - begin_ns)
        where = f", the longest in the spike {duration(inside)}" if inside else ""
        yield f"{text}; the longest stop took {duration(longest)}{where}."
    elif pauses == 0:
        yield "Go's collector did not stop the goroutines in those seconds."
    goroutines = _number(told.get("goroutines"))
    if goroutines:
        text = f"The service had {plural(int(goroutines), 'goroutine')}"
        for group in _lines(told.get("largest"))[:1]:
            count, stack = _number(group.get("count")), group.get("stack")
            if count and isinstance(stack, list) and stack:
                names = [fit(visible(str(name)), 48) for name in stack[:_FRAMES]]
                text += f", {int(count):,} of them in {' < '.join(names)}"
        yield f"{text}."


def _inside(longest: object, begin_ns: int, length_ns: int) -> int:
    """Tell the longest stop of those listed that lies in the spike; times of day, ns."""
    most = 0
    for line in _lines(longest):
        end, took = _number(line.get("end_realtime_ns")), _number(line.get("pause_ns"))
        if end is not None and took is not None and end >= begin_ns:
            most = max(most, int(took)) if end - took <= begin_ns + length_ns else most
    return most


def _lines(value: object) -> list[Mapping[str, Any]]:
    listed = value if isinstance(value, list) else []
    return [line for line in listed if isinstance(line, dict)]


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: object) -> float | None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if abs(value) < 2**63 and math.isfinite(value) else None
