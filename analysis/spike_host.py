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
_TOOLS: Final = {
    "pprof-cpu.pb.gz": "go tool pprof pprof-cpu.pb.gz",
    "pprof-trace.out": "go tool trace pprof-trace.out",
}
_CROWD: Final = 10
_LOCKS: Final = ("sync.(*Mutex).", "sync.(*RWMutex).")
_INNERMOST: Final = 4  # frames in which a lock's own functions stand
_RUNTIME: Final = ("runtime.", "internal/", "sync.runtime_")


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


def service_words(spike: Spike) -> Iterator[str]:
    """Say in sentences what the Go runtime of the service tells of the spike."""
    told = _object(spike.profiles.get("gc"))
    pauses, total = _number(told.get("pauses")), _number(told.get("pause_ns"))
    longest = _number(told.get("max_pause_ns"))
    if pauses and pauses > 0 and total is not None and longest is not None:
        times = "once" if pauses == 1 else plural(int(pauses), "time")
        least = "at least " if told.get("at_least") is True else ""
        yield (
            f"Go's garbage collector stopped the world {least}{times} in the spike"
            f"{_compared(told)}, for {duration(total)} in all, the longest {duration(longest)}."
        )
    elif pauses == 0 and told.get("at_least") is False:
        yield f"Go's garbage collector did not stop the world in the spike{_compared(told)}."
    goroutines = _number(told.get("goroutines"))
    if goroutines and goroutines > 0:
        text = f"The service had {plural(int(goroutines), 'goroutine')} when the watch fired"
        count, stack = _largest(told)
        if count > 1:
            path = " < ".join(fit(visible(name), 48) for name in _telling(stack)[:_FRAMES])
            text += f", {count:,} of them in {path}"
        yield f"{text}."


def profile_words(spike: Spike) -> Iterator[str]:
    """Say in sentences which of the service's own profiles are there, and how to read them."""
    files, errors = (spike.profiles.get(key) for key in ("files", "errors"))
    found = [tool for name, tool in _TOOLS.items() if isinstance(files, list) and name in files]
    if found:
        tools = ", ".join(found)
        yield f"The bundle has profiles of the seconds after the watch fired ({tools})."
    missing = [text for text in errors if isinstance(text, str)] if isinstance(errors, list) else []
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        yield f"A profile of the service is missing: {fit(visible(missing[0]), 160)}{more}."


def lock_words(spike: Spike) -> str:
    """Say where most goroutines waited for a lock; "": that is not what most of them did."""
    told = _object(spike.profiles.get("gc"))
    total, (count, stack) = _number(told.get("goroutines")), _largest(told)
    if total is None or count < max(_CROWD, total / 2):
        return ""
    if not any(name.startswith(_LOCKS) for name in stack[:_INNERMOST]):
        return ""
    own = next(
        (name for name in stack if not _is_inside(name) and not name.startswith("sync.")), ""
    )
    where = f" in {fit(visible(own), 48)}" if own else ""
    return f"{count:,} of {int(total):,} goroutines waited for a lock{where}"


def _largest(told: Mapping[str, Any]) -> tuple[int, list[str]]:
    """Tell how many goroutines the largest group has, and their stack; 0: none."""
    for group in _lines(told.get("largest"))[:1]:
        count, stack = _number(group.get("count")), group.get("stack")
        if count and isinstance(stack, list) and stack:
            return int(count), [str(name) for name in stack]
    return 0, []


def _compared(told: Mapping[str, Any]) -> str:
    """Set how often the collector stopped the world against the time before."""
    before = _object(told.get("baseline"))
    now, then = (
        (_number(part.get("pauses")), _number(part.get("seconds"))) for part in (told, before)
    )
    if None in (*now, *then) or not now[1] or not then[1]:
        return ""
    rates = (count / seconds for count, seconds in (now, then) if count is not None and seconds)
    spike, baseline = (f"{rate:,.1f}" for rate in rates)
    return f" ({spike} times a second, {baseline} before)"


def _telling(stack: list[str]) -> list[str]:
    """Leave out the frames that only tell how the runtime makes a goroutine wait."""
    begin = next((at for at, name in enumerate(stack) if not _is_inside(name)), 0)
    return stack[begin:]


def _is_inside(name: str) -> bool:
    own = name.rpartition(".")[2]
    return name.startswith(_RUNTIME) or (name.startswith("sync.") and own[:1].islower())


def _lines(value: object) -> list[Mapping[str, Any]]:
    listed = value if isinstance(value, list) else []
    return [line for line in listed if isinstance(line, dict)]


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: object) -> float | None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if abs(value) < 2**63 and math.isfinite(value) else None
