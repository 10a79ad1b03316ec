"""Who else used the host: what /proc and the control groups say of the seconds around a spike.

`HostUsage.snapshot` is called about once a second for weeks, and keeps the last ones in memory.
What it reads has a price, so each part has a pace of its own: not more often than its interval, and
so seldom that it takes its share of one CPU at most, whatever the host's size. A snapshot that is
taken `now`, as a trigger fires and as its bundle closes, reads everything.

- counters of the whole host (/proc/stat, load, CPU pressure): every second, 0.01 % at most;
- the CPU time of each process (/proc/PID/stat): every 5 s, 0.04 % at most;
- the throttling of control groups: every 5 s, 0.02 % at most.

Measured (2 CPUs, Linux 6.18, Python 3.11, a snapshot each second): the counters 28 us, a process 9
to 12 us, three control groups 0.18 ms. In all 0.06 % of one CPU with 200 processes, a look at them
every 5 s; with 2000 a look is 24 ms, so there is one in 60 s, and what `now` asks for. A look at
them keeps 65 bytes of each.

CPU times come in clock ticks (10 ms): a process's is less than a tick too small for user and for
system time each. A process that started and ended between two looks was never seen: its parent has
its time, as `ended_children_ns`, if it waited for it.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from latrace.tracer.cgroups import cgroup_mounts, limits

_COUNTERS_EVERY_S, _COUNTERS_SHARE = 1.0, 1e-4
_PROCESSES_EVERY_S, _PROCESSES_SHARE = 5.0, 4e-4
_LIMITS_EVERY_S, _LIMITS_SHARE = 5.0, 2e-4
_EARLY_S = 0.1  # a loop that comes once a second may be a little early
_MOST_COUNTERS, _MOST_OTHERS = 600, 60
_MOST_THROTTLED = 32

TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
_PF_KTHREAD = 0x0020_0000  # include/linux/sched.h
_KINDS = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")  # proc_stat(5)
_BUSY = ("user", "nice", "system")
_READ_BYTES = 1 << 16

_PROCESS = np.dtype(
    [
        ("pid", "i4"),
        ("ppid", "i4"),
        ("started", "u8"),  # ticks since boot; with the pid it is one process and no other
        ("cpu", "i8"),  # ticks, of all its threads
        ("children", "i8"),  # ticks, of those that ended and were waited for
        ("kernel", "?"),
        ("comm", "S32"),
    ]
)
_Processes = npt.NDArray[np.void]
_Limits = dict[str, tuple[int, int, int, int, int]]
"""Of each group with a CPU quota: quota and period in us, periods, throttled ones, throttled ns."""
_NOTHING = (0, 0, 0, 0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSnapshot:
    """The counters of the whole host at one moment, as read; looked into only when asked for."""

    at_ns: int
    """CLOCK_MONOTONIC."""
    stat: bytes
    """/proc/stat without the interrupts."""
    load: bytes
    pressure: bytes | None
    """/proc/pressure/cpu; None where PSI is off."""
    cgroup_pressure: bytes | None
    """The target's group's cpu.pressure; None where there is none."""


class HostUsage:
    """Keeps what snapshots of the last `before_s` + `after_s` saw, and says what happened between.

    `target_pid`: whose control group's CPU pressure is read, too (cgroup v2).
    """

    def __init__(
        self, *, before_s: float, after_s: float = 60.0, target_pid: int | None = None
    ) -> None:
        span_s = before_s + after_s
        self._keep_ns = round(span_s * 1e9)
        others_s = span_s / (_MOST_OTHERS // 2)
        self._counters = _Ring[HostSnapshot](
            max(_COUNTERS_EVERY_S, span_s / (_MOST_COUNTERS // 2)), _COUNTERS_SHARE, _MOST_COUNTERS
        )
        self._processes = _Ring[_Processes](
            max(_PROCESSES_EVERY_S, others_s), _PROCESSES_SHARE, _MOST_OTHERS
        )
        self._limits = _Ring[_Limits](max(_LIMITS_EVERY_S, others_s), _LIMITS_SHARE, _MOST_OTHERS)
        self._proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._stat = _Counter(Path("/proc/stat"))
        self._load = _Counter(Path("/proc/loadavg"))
        self._pressure = _Counter(Path("/proc/pressure/cpu"))
        group = None if target_pid is None else _unified_group(target_pid)
        self._cgroup_pressure = _Counter(None if group is None else group / "cpu.pressure")
        self.spent_ns = 0
        """CPU time that all snapshots took so far."""

    def snapshot(self, *, now: bool = False) -> HostSnapshot:
        """Read what is due, or with `now` everything; returns the newest look at the counters."""
        began_ns = lap_ns = time.thread_time_ns()
        at_ns = time.monotonic_ns()
        if now or self._counters.is_due(at_ns):
            taken = self._read_counters(at_ns)
            lap_ns = self._counters.add(at_ns, taken, lap_ns, keep_ns=self._keep_ns)
        if now or self._processes.is_due(at_ns):
            processes = np.array(list(_processes(self._proc)), dtype=_PROCESS)
            lap_ns = self._processes.add(at_ns, processes, lap_ns, keep_ns=self._keep_ns)
        if now or self._limits.is_due(at_ns):
            lap_ns = self._limits.add(at_ns, _read_limits(), lap_ns, keep_ns=self._keep_ns)
        self.spent_ns += lap_ns - began_ns
        return self._counters.newest()

    def _read_counters(self, at_ns: int) -> HostSnapshot:
        return HostSnapshot(
            at_ns=at_ns,
            stat=_without_interrupts(self._stat.read() or b""),
            load=self._load.read() or b"",
            pressure=self._pressure.read(),
            cgroup_pressure=self._cgroup_pressure.read(),
        )

    def between(self, start_ns: int, end_ns: int, *, top: int = 10) -> dict[str, Any]:
        """Say who used the host from `start_ns` to `end_ns` (CLOCK_MONOTONIC), for spike.json.

        Of each part the looks that lie closest around the window are compared; `since_ns` and
        `until_ns` beside it say which. Needs at least one snapshot; what is not known is null.
        """
        looks = [look for _, look in self._counters.around(start_ns, end_ns)]
        return {
            "start": _edge(looks[0]),
            "end": _edge(looks[-1]),
            "cpu": _cpu(looks[0], looks[-1]),
            "pressure": _pressure_between(looks[0], looks[-1]),
            **self._users(start_ns, end_ns, top),
            **self._throttled(start_ns, end_ns),
        }

    def _users(self, start_ns: int, end_ns: int, top: int) -> dict[str, Any]:
        looks = self._processes.around(start_ns, end_ns)
        (since_ns, _), (until_ns, _) = looks[0], looks[-1]
        users = _cpu_users([look for _, look in looks])
        elapsed_ns = until_ns - since_ns
        for user in users:
            user["cpu_percent"] = _percent(user["cpu_ns"], elapsed_ns)
        seen_ns = sum(user["cpu_ns"] + user["ended_children_ns"] for user in users)
        # The same moments: whenever processes are read, something close by was read of the CPUs.
        around = [look for _, look in self._counters.around(since_ns, until_ns)]
        _, totals = _ticks_between(around[0], around[-1])
        busy_ns = TICK_NS * sum(totals.get(kind, 0) for kind in _BUSY)
        shown = [user for user in users if user["cpu_ns"] or user["ended_children_ns"]]
        return {
            "top_cpu": shown[:top],
            "processes": {
                "since_ns": since_ns,
                "until_ns": until_ns,
                "seen": len(users),
                "cpu_ns": seen_ns,
                "unseen_cpu_ns": max(0, busy_ns - seen_ns),
            },
        }

    def _throttled(self, start_ns: int, end_ns: int) -> dict[str, Any]:
        looks = self._limits.around(start_ns, end_ns)
        before = looks[0][1]
        after: _Limits = {}
        for _, look in looks:
            after |= look  # of a group that was removed, the last that is known
        groups = []
        for cgroup, now in after.items():
            then = before.get(cgroup, _NOTHING)
            if now[2] < then[2]:  # counters that went back are another's, of the same name
                then = _NOTHING
            quota_us, period_us, *counters = now
            periods, throttled, ns = (
                new - old for new, old in zip(counters, then[2:], strict=True)
            )
            if throttled or ns:
                groups.append((-ns, cgroup, quota_us, period_us, periods, throttled))
        groups.sort()
        return {
            "throttled": [
                {
                    "cgroup": cgroup,
                    "quota_us": quota_us,
                    "period_us": period_us,
                    "nr_periods": periods,
                    "nr_throttled": throttled,
                    "throttled_ns": -ns,
                }
                for ns, cgroup, quota_us, period_us, periods, throttled in groups[:_MOST_THROTTLED]
            ],
            "limits": {
                "since_ns": looks[0][0],
                "until_ns": looks[-1][0],
                "cgroups": len(after),
                "throttled": len(groups),
            },
        }

    def close(self) -> None:
        """Let go of the files. Safe to call again."""
        for counter in (self._stat, self._load, self._pressure, self._cgroup_pressure):
            counter.close()
        if self._proc >= 0:
            os.close(self._proc)
            self._proc = -1


# --- when, and for how long ----------------------------------------------------------------------

_Look = TypeVar("_Look")


class _Ring(Generic[_Look]):
    """The last looks at something, and when the next one is due."""

    def __init__(self, every_s: float, share: float, most: int) -> None:
        self._every_ns = round((every_s - _EARLY_S) * 1e9)
        self._share = share
        self._most = most
        self._due_ns = 0
        self._looks: deque[tuple[int, _Look]] = deque()

    def is_due(self, at_ns: int) -> bool:
        return at_ns >= self._due_ns

    def add(self, at_ns: int, look: _Look, began_ns: int, *, keep_ns: int) -> int:
        """Take in a look that cost the thread's CPU time since `began_ns`; returns that clock."""
        ended_ns = time.thread_time_ns()
        pause_ns = max(self._every_ns, round((ended_ns - began_ns) / self._share))
        self._due_ns = at_ns + pause_ns
        self._looks.append((at_ns, look))
        # What is older than any window goes, but for one look: the window begins after it.
        while len(self._looks) > 1 and self._looks[1][0] <= at_ns - keep_ns:
            self._looks.popleft()
        while len(self._looks) > self._most:
            self._looks.popleft()
        return ended_ns

    def newest(self) -> _Look:
        return self._looks[-1][1]

    def around(self, start_ns: int, end_ns: int) -> list[tuple[int, _Look]]:
        """The looks from the last one before a window to the first one after it."""
        first, last = 0, len(self._looks) - 1
        for index, (at_ns, _) in enumerate(self._looks):
            if at_ns <= start_ns:
                first = index
            if at_ns >= end_ns:
                last = index
                break
        return list(self._looks)[first : last + 1]


# --- reading -------------------------------------------------------------------------------------


class _Counter:
    """A small file of the kernel's that is read again and again; it stays open."""

    def __init__(self, path: Path | None) -> None:
        self._fd = -1
        if path is not None:
            try:
                self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:  # not in this kernel, or switched off
                return

    def read(self) -> bytes | None:
        """All of it; None when there is no such file, or none any more."""
        if self._fd < 0:
            return None
        try:
            data = os.pread(self._fd, _READ_BYTES, 0)
            while len(data) % _READ_BYTES == 0 and (
                more := os.pread(self._fd, _READ_BYTES, len(data))
            ):
                data += more
        except OSError:  # PSI is switched off (EOPNOTSUPP), the control group is gone (ENODEV)
            return None
        return data

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _without_interrupts(stat: bytes) -> bytes:
    """Leave out the one long line: a number for each interrupt that the host may have."""
    head, found, tail = stat.partition(b"\nintr ")
    return head + b"\n" + tail.partition(b"\n")[2] if found else stat


def _processes(proc: int) -> Iterator[tuple[int, int, int, int, int, bool, bytes]]:
    """All processes as rows of `_PROCESS`; what vanished meanwhile is left out."""
    for name in os.listdir(proc):
        if not name.isdigit():
            continue
        try:
            fd = os.open(f"{name}/stat", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc)
        except OSError:
            continue
        try:
            raw = os.read(fd, 4096)
        except OSError:
            continue
        finally:
            os.close(fd)
        # The name may hold brackets itself; the numbers follow the last one (proc_pid_stat(5)).
        end = raw.rfind(b")")
        fields = raw[end + 1 :].split(None, 20)
        if end < 0 or len(fields) < 20:
            continue
        yield (
            int(name),
            int(fields[1]),
            int(fields[19]),
            int(fields[11]) + int(fields[12]),
            int(fields[13]) + int(fields[14]),
            bool(int(fields[6]) & _PF_KTHREAD),
            raw[raw.find(b"(") + 1 : end],
        )


def _read_limits() -> _Limits:
    return {
        # Names of control groups are made by whoever may make groups.
        os.fsencode(name).decode("utf-8", "backslashreplace"): (
            limit["quota_us"],
            limit["period_us"],
            limit["nr_periods"],
            limit["nr_throttled"],
            limit["throttled_ns"],
        )
        for name, limit in limits().items()
    }


def _unified_group(pid: int) -> Path | None:
    """The directory of a process's cgroup v2; None when there is none that we see."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_bytes().split(b"\n")
    except OSError:
        return None
    inside = next((line[3:] for line in lines if line.startswith(b"0::/")), None)
    if inside is None:
        return None
    for mount in cgroup_mounts():
        root = os.fsencode(mount.root).rstrip(b"/")
        if mount.unified and (inside + b"/").startswith(root + b"/"):
            return mount.point / os.fsdecode(inside[len(root) :].lstrip(b"/"))
    return None


# --- comparing -----------------------------------------------------------------------------------


def _edge(look: HostSnapshot) -> dict[str, Any]:
    load = look.load.split()
    fields = dict(_lines(look.stat))
    known = len(load) >= 3
    return {
        "at_ns": look.at_ns,
        "load_1min": float(load[0]) if known else None,
        "load_5min": float(load[1]) if known else None,
        "load_15min": float(load[2]) if known else None,
        "runnable": _number(fields.get(b"procs_running")),
        "blocked": _number(fields.get(b"procs_blocked")),
        "cpu_pressure": _pressure(look.pressure),
        "cgroup_cpu_pressure": _pressure(look.cgroup_pressure),
    }


def _lines(stat: bytes) -> Iterator[tuple[bytes, bytes]]:
    for line in stat.split(b"\n"):
        key, _, rest = line.partition(b" ")
        yield key, rest


def _number(text: bytes | None) -> int | None:
    return int(text) if text else None


def _pressure(text: bytes | None) -> dict[str, Any] | None:
    """`some` of a PSI file (Documentation/accounting/psi.rst): somebody waited for a CPU."""
    for line in (text or b"").split(b"\n"):
        kind, *pairs = line.split()[:5] or [b""]
        if kind == b"some":
            values = dict(pair.split(b"=", 1) for pair in pairs)
            return {
                "some_10s_percent": float(values[b"avg10"]),
                "some_60s_percent": float(values[b"avg60"]),
                "some_total_ns": int(values[b"total"]) * 1000,
            }
    return None


def _pressure_between(first: HostSnapshot, last: HostSnapshot) -> dict[str, Any]:
    """How much of the time somebody waited for a CPU, on the host and in the target's group."""

    def percent(before: bytes | None, after: bytes | None) -> float | None:
        then, now = _pressure(before), _pressure(after)
        if then is None or now is None or last.at_ns <= first.at_ns:
            return None
        return _percent(now["some_total_ns"] - then["some_total_ns"], last.at_ns - first.at_ns)

    return {
        "host_some_percent": percent(first.pressure, last.pressure),
        "cgroup_some_percent": percent(first.cgroup_pressure, last.cgroup_pressure),
    }


def _ticks_between(
    first: HostSnapshot, last: HostSnapshot
) -> tuple[dict[int, dict[str, int]], dict[str, int]]:
    """What each CPU did, in ticks by kind, and what all together did."""

    def of_cpus(look: HostSnapshot) -> dict[int, list[int]]:
        return {
            int(key[3:]): [int(field) for field in rest.split()[: len(_KINDS)]]
            for key, rest in _lines(look.stat)
            if key.startswith(b"cpu") and key != b"cpu"
        }

    before, after = of_cpus(first), of_cpus(last)
    by_cpu = {
        cpu: {
            # Idle time may go back by a little (proc_stat(5)).
            kind: max(0, new - old)
            for kind, new, old in zip(_KINDS, after[cpu], before[cpu], strict=False)
        }
        for cpu in sorted(before.keys() & after.keys())
    }
    totals = {kind: sum(ticks.get(kind, 0) for ticks in by_cpu.values()) for kind in _KINDS}
    return by_cpu, totals


def _cpu(first: HostSnapshot, last: HostSnapshot) -> dict[str, Any]:
    by_cpu, totals = _ticks_between(first, last)
    elapsed_ns = last.at_ns - first.at_ns
    then, now = (_number(dict(_lines(look.stat)).get(b"ctxt")) or 0 for look in (first, last))
    return {
        "since_ns": first.at_ns,
        "until_ns": last.at_ns,
        "cpus": len(by_cpu),
        "time_ns": TICK_NS * sum(totals.values()),
        "steal_ns": TICK_NS * totals["steal"],
        "context_switches_per_s": round((now - then) / elapsed_ns * 1e9) if elapsed_ns else None,
        **_shares(totals),
        "by_cpu": [{"cpu": cpu, **_shares(ticks)} for cpu, ticks in by_cpu.items()],
    }


def _shares(ticks: dict[str, int]) -> dict[str, float | None]:
    """Each kind in percent of the CPU's, or the CPUs', time: together 100."""
    total = sum(ticks.values())
    return {
        f"{kind}_percent": 100 * count / total if total else None for kind, count in ticks.items()
    }


def _percent(part: int, whole: int) -> float | None:
    return 100 * part / whole if whole > 0 else None


def _cpu_users(looks: list[_Processes]) -> list[dict[str, Any]]:
    """What each process used from the first to the last look, those that used most first."""
    seen: dict[tuple[int, int], _Use] = {}
    for number, look in enumerate(looks):
        for pid, ppid, started, cpu, children, kernel, comm in look.tolist():
            use = seen.get((pid, started))
            if use is None:
                base = (cpu, children) if number == 0 else (0, 0)
                use = seen[pid, started] = _Use(pid, kernel, number, *base)
            use.ppid, use.comm, use.last = ppid, comm, number
            use.cpu, use.children = cpu, children
    # Its parent has the time of one that has ended, all of it: what is shown as its own comes off.
    inherited: dict[int, int] = {}
    for use in seen.values():
        if use.last < len(looks) - 1:
            inherited[use.ppid] = inherited.get(use.ppid, 0) + use.cpu + use.children
    for use in seen.values():
        use.cpu = max(0, use.cpu - use.cpu_before)
        use.children -= use.children_before + inherited.get(use.pid, 0)
        use.children = max(0, use.children)
    return [
        {
            "pid": use.pid,
            "comm": use.comm.decode("utf-8", "backslashreplace"),
            "kernel_thread": use.kernel,
            "cpu_ns": TICK_NS * use.cpu,
            "ended_children_ns": TICK_NS * use.children,
            "started": use.first > 0,
            "ended": use.last < len(looks) - 1,
        }
        for use in sorted(seen.values(), key=lambda use: (-use.cpu - use.children, use.pid))
    ]


@dataclass(slots=True)
class _Use:
    """A process over several looks; times in ticks."""

    pid: int
    kernel: bool
    first: int
    cpu_before: int
    children_before: int
    last: int = 0
    ppid: int = 0
    comm: bytes = b""
    cpu: int = 0
    children: int = 0
