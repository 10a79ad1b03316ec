"""One trace, from attaching the probes to the closed capture.

    ring ─► split ─► waits, stacks ─► recorder ─► `waits`, `stacks`, `frames`
                  └► threads ─► who is there ───► `threads`

Histograms and totals are not events: they are read from memory shared with the probes.
"""

from __future__ import annotations

import contextlib
import os
import platform
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from latrace.analysis import histogram

from . import bpf, loader
from .alive import Alive
from .budget import Budget
from .cgroups import cgroup_of, limited_since, limits
from .connections import Connections
from .cost import Cost, steal_ns
from .errors import LatraceError, NoTargetError
from .membership import members, write_rules
from .namespaces import Namespaces
from .options import Options
from .owners import Owners
from .processes import read_task
from .records import SOCKET, STACK, THREAD, Record, ThreadEvent
from .ring import CopyRing, Ring
from .rows import split
from .sampling import Sampler
from .shared import TARGET_PROCESS, TARGET_THREAD, Shared
from .sleeps import sleep_totals, tell_timerfd
from .stacks import COPY_PAGES

if TYPE_CHECKING:
    from .outputs import OutputDir

_FLUSH_S = 0.5
_SLEEP_MIN_S, _QUIET_SLEEP_S = 0.001, 0.5
_SETTLE_S = 0.002  # programs that run on another CPU while we detach end within microseconds
_LAST_SWITCH_S = 0.2
_NAMED_PROCESSES = 100  # in the manifest: a fork bomb must not fill it


OnRetransmits = Callable[[npt.NDArray[np.void], int], None]
"""Takes retransmits as they come, shape (n,) of dtype SOCKET; and when the trace began,
CLOCK_MONOTONIC."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The trace at one moment, for a live view. Percentiles are of the whole trace, exact."""

    elapsed_s: float
    waits: int
    waits_per_s: float
    p50_ns: int
    p99_ns: int
    max_ns: int
    lost: int
    rows: int
    threads: int
    self_cpu_percent: float
    bpf_percent: float | None
    degraded: tuple[str, ...]


class Tracer:
    """Traces the targets of `options` into a capture; a context manager.

    On entry the probes are attached and the state of threads already there is known. Raises
    HostError when this host cannot, NoTargetError when no target is left, LatraceError when the
    capture cannot be written. On exit everything is detached and the capture closed, complete
    unless an exception came through. `loading`: the probes, where loading them has begun already.
    """

    sleep_max_s = 0.1
    """Between two looks at a ring that is far from full."""

    def __init__(
        self,
        options: Options,
        out: OutputDir | Callable[[], OutputDir],
        *,
        command: list[str],
        loading: loader.Loading | None = None,
    ) -> None:
        self._options = options
        self._loading = loading or loader.Loading(options)
        self._out = out
        self._command = command
        self._live: dict[int, int] = {}
        """Threads alive now, to their processes."""
        self._alive = Alive()
        self._cgroups: dict[int, str] = {}
        """Of every process seen."""
        self._names: dict[int, str] = {}
        """The first name of the first processes seen."""
        self._command_lines: dict[int, str] = {}
        """Theirs, as they last were."""
        self._ended: list[tuple[float, int]] = []
        """When processes ended, and which; their numbers are still targets."""
        self._owners = Owners()
        self._namespaces = Namespaces()
        self._on_retransmits: OnRetransmits | None = None
        self._last_count, self._last_count_s = 0, time.monotonic()
        self._flush_s = self._snapshot_s = 0.0
        self._resources = contextlib.ExitStack()

    # ---------------------------------------------------------------- attach

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            self._attach(undo)
            self._open_capture()
            undo.callback(self._recorder.close, complete=False)
            self._resources = undo.pop_all()
        return self

    def _attach(self, undo: contextlib.ExitStack) -> None:
        options = self._options
        self._probes = self._loading.result()
        undo.callback(self._probes.close)
        self._shared = Shared(self._probes)
        self._ring = Ring(self._probes.maps["lat_ring"], options.ring_bytes)
        self._copies = CopyRing(self._probes.maps["lat_copies"], self._probes.build.copies_bytes)
        undo.callback(self._alive.close)
        self._budget = Budget(self._shared, options, self._probes)
        self._budget.start()
        self._cost = Cost(self._probes.programs)
        undo.callback(self._cost.close)
        self._sampler = Sampler(self._probes, self._shared, options)
        undo.callback(self._sampler.close)
        tell_timerfd(self._probes)
        self._shared.control["all_sockets"] = options.all_sockets
        if options.user_copies:
            self._shared.control["copy_pages"] = COPY_PAGES
        self._probes.attach()
        self._sampler.start()
        self._start_ns, self._start_realtime_ns = time.monotonic_ns(), time.time_ns()
        write_rules(self._shared.control, options)
        self._shared.targets[list(options.tids)] |= TARGET_THREAD
        self._shared.targets[list(options.pids)] |= TARGET_PROCESS
        # Twice: a process may have come before the kernel followed by itself.
        for _ in range(2):
            self._shared.targets[list(members(options))] |= TARGET_PROCESS
            self._take_threads(np.frombuffer(self._read_iterator("lat_iter_seed"), THREAD))
        undo.callback(self._namespaces.close)
        if "lat_retransmit" in self._probes.programs:
            self._namespaces.begin(None if options.all_sockets else set(self._live.values()))
        self._connections = Connections(self._probes)
        self._connections.begin()
        # Many groups take a while to read: the targets are traced by now.
        self._limits, self._steal_ns = limits(), steal_ns()
        if not self._live and not (options.comms or options.cgroups or options.all_sockets):
            raise NoTargetError(
                "the target ended before it could be traced", hint="name one that still runs"
            )

    def _read_iterator(self, name: str) -> bytes:
        """What one of the iterators over threads writes; nothing where sockets alone are traced."""
        program = self._probes.programs.get(name)
        return b"" if program is None else bpf.read_iterator(program)

    def _open_capture(self) -> None:
        # Heavy imports come here, when the probes already count.
        from .recorder import Recorder  # noqa: PLC0415
        from .writer import CaptureWriter  # noqa: PLC0415

        out = self._out() if callable(self._out) else self._out
        self._recorder = Recorder(CaptureWriter(out, self._manifest_head()))

    def _manifest_head(self) -> dict[str, Any]:
        from latrace import __version__  # noqa: PLC0415

        options = self._options
        return {
            "latrace": __version__,
            "host": platform.node(),
            "kernel": platform.release(),
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "started_realtime_ns": self._start_realtime_ns,
            "start_ns": self._start_ns,
            "clock": {"realtime_minus_monotonic_ns": self._start_realtime_ns - self._start_ns},
            "command": self._command,
            "targets": self._targets(),
            "options": {
                "all_sockets": options.all_sockets,
                "pids": options.pids,
                "tids": options.tids,
                "comms": options.comms,
                "cgroups": [str(cgroup) for cgroup in options.cgroups],
                "children": options.children,
                "min_ns": options.min_ns,
                "slow_ns": options.slow_ns,
                "stacks": options.stacks,
                "user_copies": options.user_copies,
                "stack_budget_per_s": options.stack_budget_per_s,
                "cpu_samples_hz": options.cpu_samples_hz,
                "without": sorted(options.without),
                "ring_bytes": options.ring_bytes,
                "duration_s": options.duration_s,
            },
        }

    def _targets(self) -> list[dict[str, Any]]:
        """The processes traced, most of them at most: a fork bomb must not fill the manifest."""
        for tgid in self._names:
            if tgid in self._alive and (line := _command_line(tgid)):
                self._command_lines[tgid] = line
        return [
            {"tgid": tgid, "comm": comm, "cmdline": self._command_lines.get(tgid, "")}
            for tgid, comm in self._names.items()
        ]

    # ------------------------------------------------------------------- run

    def run(
        self,
        *,
        stop: threading.Event,
        on_tick: Callable[[Snapshot], None] | None = None,
        tick_s: float = 1.0,
        on_retransmits: OnRetransmits | None = None,
    ) -> None:
        """Record until `stop` is set, the duration is over or all targets have ended."""
        self._on_retransmits = on_retransmits
        started_s = self._last_count_s = time.monotonic()
        duration_s = self._options.duration_s
        end_s = started_s + duration_s if duration_s is not None else float("inf")
        self._flush_s = self._snapshot_s = started_s + _FLUSH_S
        tick_at_s, sleep_s = started_s + tick_s, _SLEEP_MIN_S
        produced, waits = 0, 0
        while True:
            used = self._ring.used()
            before, produced = (produced, waits), self._ring.produced
            waits = self._shared.waits()
            quiet = before == (produced, waits)
            self._drain()
            self._budget.step(used)
            if self._options.user_copies:
                self._shared.control["copy_pages"] = self._recorder.copy_pages
            self._sampler.step()
            self._cost.step()
            now = time.monotonic()
            self._keep(now)
            if on_tick is not None and now >= tick_at_s:
                on_tick(self.snapshot())
                tick_at_s += tick_s * (1 + (now - tick_at_s) // tick_s)
            if stop.is_set() or now >= end_s or self._all_ended():
                return
            # Aim at a ring an eighth full at each look: no wake-up per event, none in vain.
            most_s = _QUIET_SLEEP_S if quiet or self._budget.share < 1 else self.sleep_max_s
            sleep_s = min(max(sleep_s * min(2.0, 0.125 / max(used, 1e-3)), _SLEEP_MIN_S), most_s)
            self._sleep(min(sleep_s, max(0.0, end_s - now)))

    def _keep(self, now: float) -> None:
        """Let nothing stay in memory for long; called at each look at the ring."""
        if now < self._flush_s:
            return
        self._recorder.flush(time.monotonic_ns())
        self._flush_s = now + _FLUSH_S
        if now >= self._snapshot_s:
            self._write_snapshot()
            traced_s = time.monotonic() - self._start_ns / 1e9
            self._snapshot_s = now + min(10.0, max(_FLUSH_S, traced_s / 20))

    def _sleep(self, seconds: float) -> None:
        """Sleep, less when a target process ends."""
        now = time.monotonic()
        self._ended += [(now, tgid) for tgid in self._alive.wait(seconds)]
        # Its number may come back as another process, but its last switch is still to come.
        while self._ended and self._ended[0][0] < now - _LAST_SWITCH_S:
            tgid = self._ended.pop(0)[1]
            if tgid not in self._alive:
                self._shared.targets[tgid] &= ~np.uint8(TARGET_PROCESS)

    def _all_ended(self) -> bool:
        """Whether no target is left and none can come."""
        if self._options.comms or self._options.cgroups or self._options.all_sockets:
            return False
        if self._options.tids and not self._options.pids and not self._live:
            return True
        if len(self._alive):
            return False
        # Gone before we could watch them, or their last record was lost.
        return all((task := read_task(tid)) is None or task.has_ended for tid in self._live)

    # ----------------------------------------------------------------- drain

    def _drain(self) -> None:
        """Take what is in the ring, once around at most: a flood must not keep us from the rest."""
        taken = 0
        while taken < self._ring.size and len(cells := self._ring.read()):
            taken += cells.nbytes
            records = split(cells)
            stacks = records.get(Record.STACK)
            if stacks is not None and len(stacks):
                self._recorder.add_stacks(stacks.view(STACK), self._copies.read())
            threads = records.get(Record.THREAD)
            if threads is not None and len(threads):
                self._take_threads(threads.view(THREAD))
            for record, rows in records.items():
                if record == Record.RETRANSMIT and len(rows):
                    self._owners.sent_again(rows.view(SOCKET))
                    if self._on_retransmits is not None:
                        self._on_retransmits(rows.view(SOCKET), self._start_ns)
                if record == Record.CLOSED and len(rows):
                    self._add_connections(self._connections.closed(rows.view(SOCKET)))
                elif record not in {Record.STACK, Record.THREAD} and len(rows):
                    self._add_rows(record, rows)

    def _add_rows(self, record: Record, rows: npt.NDArray[np.void]) -> None:
        """Take rows of one table, shape (n,) of the record's cells."""
        self._recorder.add(record, rows, time.monotonic_ns())

    def _add_connections(self, columns: Mapping[str, Any]) -> None:
        """`columns`: of the table `connections`; none where there are no rows."""
        if columns:
            self._owners.connected(columns)
            self._recorder.append("connections", columns)

    def _take_threads(self, threads: npt.NDArray[np.void]) -> None:
        """Follow who is there; `threads`: shape (n,) of dtype THREAD."""
        ended = threads[threads["event"] == ThreadEvent.EXIT]
        for event, tid, tgid, ppid, comm in zip(
            threads["event"].tolist(),
            threads["tid"].tolist(),
            threads["tgid"].tolist(),
            threads["ppid"].tolist(),
            threads["comm"].tolist(),
            strict=True,
        ):
            if event == ThreadEvent.EXIT:
                self._live.pop(tid, None)
                continue
            self._live[tid] = tgid
            if tgid not in self._alive:
                self._add_process(tgid, ppid, comm, forked=event == ThreadEvent.FORK)
            if event == ThreadEvent.EXEC:
                self._recorder.exec(tgid)
        if len(ended):
            self._end_threads(ended)
        for tid in ended["tid"][ended["tid"] == ended["tgid"]].tolist():
            self._cgroups.pop(tid, None)

    def _end_threads(self, ended: npt.NDArray[np.void]) -> None:
        """Threads have ended; `ended`: their last records, shape (n,) of dtype THREAD."""
        self._recorder.write_threads(ended, self._cgroups)

    def _add_process(self, tgid: int, ppid: int, comm: bytes, *, forked: bool) -> None:
        if len(self._names) < _NAMED_PROCESSES:
            self._names.setdefault(tgid, comm.decode("utf-8", "backslashreplace"))
        # A child is born into its parent's group: no need to ask for each of many.
        inherited = self._cgroups.get(ppid) if forked else None
        self._cgroups[tgid] = cgroup_of(tgid) if inherited is None else inherited
        self._alive.add(tgid)

    # ---------------------------------------------------- counters and quality

    def _write_snapshot(self) -> None:
        self._recorder.write_counters(self._shared.hist, self._slots(), self._shared.overshoots)
        self._recorder.update_manifest(
            {
                "end_ns": time.monotonic_ns(),
                "targets": self._targets(),
                "owners": self._owners.told(),
                "quality": self._quality(),
                "sleeps": sleep_totals(self._shared.overshoots, self._shared.counters()),
            }
        )

    def _slots(self) -> dict[int, int]:
        """Histogram number → process; number 0 is all processes that got none of their own."""
        slots = {slot: tgid for tgid, slot in self._probes.table("lat_slots")}
        return {0: -1} | slots

    def _quality(self) -> dict[str, Any]:
        quality = self._quality_of(self._shared.counters(), waits=self._shared.waits())
        self._budget.note_loss(quality["lost_events"])
        quality["degraded"] = self._budget.degraded
        return quality

    def _quality_of(self, counters: Mapping[str, int], *, waits: int) -> dict[str, Any]:
        """What the manifest says of the quality, from counters of the whole trace or a part."""
        lost = counters["lost_waits"] + counters["lost_threads"] + counters["lost_slices"]
        lost += counters["lost_sockets"]
        return {
            "waits": waits,
            "rows": counters["rows"],
            "samples": counters["samples"],
            "samples_lowest_hz": self._sampler.lowest_hz,
            "samples_refused": self._sampler.refused,
            "lost_events": lost,
            "lost_threads": counters["lost_threads"],
            "lost_slices": counters["lost_slices"],
            "lost_sleeps": counters["lost_sleeps"],
            "lost_copies": counters["lost_copies"],
            "lost_sockets": counters["lost_sockets"],
            "lost_stacks": counters["lost_stacks"]
            + counters["missed_stacks"]
            + self._recorder.lost_stacks,
            "open_at_start": counters["open_at_start"],
            "no_start": counters["no_start"],
            "missed_switches": counters["missed_switches"],
            "unseen_ns": counters["unseen_ns"],
            "recovered": counters["recovered"],
            "discarded": counters["discarded"],
            "no_storage": counters["no_storage"],
            "degraded": list(self._budget.degraded),
            "row_threshold_ns": int(self._shared.control["min_ns"][0]),
            "highest_slow_ns": self._budget.highest_slow_ns,
            "kernel_run_delay_ns": counters["kernel_ns"],
            "traced_run_delay_ns": counters["timed_ns"],
            "traced_by_kernel_clock_ns": counters["clock_ns"],
            "kernel_pcount": counters["kernel_count"],
            "timed_waits": counters["timed_waits"],
            "unbooked": counters["unbooked"],
            "books_blind": {"count": counters["blind_waits"], "ns": counters["blind_ns"]},
        }

    def snapshot(self) -> Snapshot:
        """The trace as it stands."""
        counts = self._shared.slot_counts()
        longest = int(self._shared.hist["max_ns"].max())
        p50, p99 = histogram.quantiles(counts, [0.5, 0.99], max_ns=longest)
        waits, now = int(counts.sum()), time.monotonic()
        rate = (waits - self._last_count) / max(1e-3, now - self._last_count_s)
        self._last_count, self._last_count_s = waits, now
        quality = self._quality()
        return Snapshot(
            elapsed_s=(time.monotonic_ns() - self._start_ns) / 1e9,
            waits=waits,
            waits_per_s=rate,
            p50_ns=p50,
            p99_ns=p99,
            max_ns=longest,
            lost=quality["lost_events"] + quality["lost_stacks"],
            rows=quality["rows"],
            threads=len(self._live),
            self_cpu_percent=self._cost.self_cpu_percent(),
            bpf_percent=self._cost.bpf_percent(),
            degraded=tuple(f"{note['what']}: {note['why']}" for note in self._budget.degraded),
        )

    # ------------------------------------------------------------------- end

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._resources:
            if kind is None or not issubclass(kind, LatraceError):
                self._finish(complete=kind is None)

    def _finish(self, *, complete: bool) -> None:
        end_ns = time.monotonic_ns()
        self._cost.close()
        self._sampler.close()
        self._probes.detach()
        # At once: what is sent again from now on is in these counters and in no row.
        netns, (connections, unseen) = self._namespaces.finish(), self._connections.finish()
        time.sleep(_SETTLE_S)
        open_at_end = self._recorder.write_open_threads(
            self._read_iterator("lat_iter_end"),
            self._cgroups,
            end_ns=end_ns,
            stacks=self._options.stacks,
            copies=self._options.user_copies,
        )
        while self._ring.used():
            self._drain()
        self._add_connections(connections)
        if len(unseen):
            self._owners.sent_again(unseen)
            self._recorder.add(Record.RETRANSMIT, unseen, end_ns)
        symbols = self._recorder.finish()
        self._write_snapshot()
        self._recorder.update_manifest(
            {
                "end_ns": end_ns,
                "cgroups_limited": limited_since(self._limits),
                "steal_ns": steal_ns() - self._steal_ns,
                "netns": netns,
                "quality": {
                    "open_at_end": open_at_end,
                    "symbols": symbols,
                    "tcp_info_refused": self._connections.refused,
                },
                "overhead": self._cost.report(),
            }
        )
        self._recorder.close(complete=complete)


def _command_line(tgid: int) -> str:
    try:
        raw = Path(f"/proc/{tgid}/cmdline").read_bytes()[:4096]
    except OSError:
        return ""
    return raw.rstrip(b"\0").replace(b"\0", b" ").decode("utf-8", "backslashreplace")
