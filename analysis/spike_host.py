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
from latrace.analysis.words import duration, fit, visible

_NOTABLE_PERCENT: Final = 5.0
_STEAL_PERCENT: Final = 1.0
_BUSY_PERCENT: Final = 20.0
_SHOWN: Final = 3
_LISTED: Final = 10


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


def _lines(value: object) -> list[Mapping[str, Any]]:
    listed = value if isinstance(value, list) else []
    return [line for line in listed if isinstance(line, dict)]


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: object) -> float | None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if abs(value) < 2**63 and math.isfinite(value) else None
