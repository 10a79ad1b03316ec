"""A watch: a trace that is kept in memory, and written down when a rule fires.

    armed ──fires──► a bundle is open (--after) ──► it is explained ──► cooldown ──► armed

The probes, the ring and the drain are those of any trace (tracer/session.py); only the rows go to
a flight recorder instead of a capture's files.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from latrace.analysis.words import duration, visible
from latrace.tracer.cgroups import limited_since, limits
from latrace.tracer.cost import steal_ns
from latrace.tracer.errors import LatraceError
from latrace.tracer.loader import Loading
from latrace.tracer.options import Options
from latrace.tracer.owners import Owners
from latrace.tracer.records import SOCKET, THREAD, WAIT, Place, Record, ThreadEvent
from latrace.tracer.session import Tracer
from latrace.tracer.sleeps import sleep_totals

from . import marks
from .bundles import Bundles
from .control import ControlSocket, Request
from .flight import FlightRecorder
from .host import HostUsage
from .marks import Mark
from .pprof import Profiles
from .settings import Settings
from .thrift import Thrift
from .triggers import Firing, Histograms, Longest, Retransmits, Rule

if TYPE_CHECKING:
    from latrace.tracer.session import Snapshot

    from .bundle import Bundle

TICK_S: Final = 0.2
"""So often the rules look, at least; each look has its price, and percentiles are of seconds."""
SETTLE_S: Final = 1.0
"""No rule fires earlier: that we begin is felt by the target, too."""
EPOCH_S: Final = 300.0
"""So often all stacks are named anew, so that what is not seen any more is forgotten."""

_MARKS: Final = 10  # in --before
_SHARE: Final = 1 / 500  # of a CPU that marks may take, and as much again what stands behind them
_STACKS_FOLLOW_S: Final = 0.6  # see recorder.STACK_FOLLOWS_NS
_NAMES_FOLLOW_S: Final = 5.0
_MEMORY_LEFT: Final = 3 / 4  # of --memory, once there is too much: not soon again
_MOST_ENDED: Final = 100_000  # threads that ended within --before


class State(Enum):
    """What a watch is doing."""

    ARMED = "armed"
    OPEN = "a bundle is being written"
    COOLDOWN = "cooling down"


@dataclass(frozen=True, slots=True)
class _Backdrop:
    """What is too dear to be looked at with each mark."""

    at_ns: int
    limits: dict[str, dict[str, Any]]
    steal_ns: int
    connections: Mapping[int, Any]


class Watch(Tracer):
    """Watches the targets of `options`; a context manager, as `Tracer` is.

    `host`, `control` and `profiles` stay the caller's. `say` gets lines for people; `on_bundle`
    the path of each bundle when it is on disk.
    """

    sleep_max_s = TICK_S

    def __init__(
        self,
        options: Options,
        settings: Settings,
        rules: Sequence[Rule],
        bundles: Bundles,
        *,
        command: list[str],
        host: HostUsage,
        control: ControlSocket | None,
        profiles: Profiles | None,
        say: Callable[[str], None],
        on_bundle: Callable[[Path], None],
        loading: Loading | None = None,
    ) -> None:
        super().__init__(options, self._no_output, command=command, loading=loading)
        self._settings = settings
        self._rules = tuple(rules)
        self._bundles = bundles
        self._host = host
        self._control = control
        self._profiles = profiles
        self._say = say
        self._on_bundle = on_bundle
        self._flight = FlightRecorder()
        self._marks: deque[Mark] = deque()
        self._backdrops: deque[_Backdrop] = deque()
        self._ended_threads: deque[tuple[int, npt.NDArray[np.void], dict[int, str]]] = deque()
        self._mark_s = self._look_s = self._backdrop_s = self._epoch_s = 0.0
        self._marked = (0, 0)
        self._counted = (-1, -1)
        self._counts: Histograms = {}
        self._dropped_ns = 0
        self._short = False
        self.state = State.COOLDOWN
        self._armed_ns = 0
        self._bundle: Bundle | None = None
        self._firings: tuple[Firing, ...] = ()
        self._fired_ns = 0
        self._end: Mark | None = None
        self._end_stacks: int | None = None
        self._by_hand: list[str] = []
        self._on_look: Callable[[], None] = lambda: None

    @staticmethod
    def _no_output() -> Any:
        raise NotImplementedError("a watch makes its captures when it fires")

    def watch(
        self,
        *,
        stop: threading.Event,
        on_look: Callable[[], None],
        on_tick: Callable[[Snapshot], None] | None = None,
    ) -> None:
        """Watch until `stop` is set, the duration is over or all targets have ended.

        `on_look` is called some five times a second, `on_tick` once.
        """
        self._on_look = on_look
        self.run(stop=stop, on_tick=on_tick)

    # ------------------------------------------------------------ recording

    def _open_capture(self) -> None:
        # What a bundle needs is read now: a spike is no time for it.
        from latrace.tracer.recorder import Recorder  # noqa: PLC0415 - heavy: after the attach

        from . import bundle  # noqa: F401, PLC0415

        self._recorder = Recorder(self._flight)
        self._thrift = Thrift(
            self._settings.budget_percent,
            cost=self._cost,
            budget=self._budget,
            sampler=self._sampler,
            say=self._say,
        )
        now = time.monotonic()
        self._epoch_s = now + EPOCH_S
        self._armed_ns = time.monotonic_ns() + int(SETTLE_S * 1e9)
        self._take_mark(now)

    def _end_threads(self, ended: npt.NDArray[np.void]) -> None:
        cgroups = {tgid: self._cgroups.get(tgid, "") for tgid in set(ended["tgid"].tolist())}
        self._ended_threads.append((time.monotonic_ns(), ended.copy(), cgroups))
        if len(self._ended_threads) > _MOST_ENDED:
            self._ended_threads.popleft()

    def _add_rows(self, record: Record, rows: npt.NDArray[np.void]) -> None:
        super()._add_rows(record, rows)
        for rule in self._rules:
            if isinstance(rule, Longest) and rule.kind == "max" and record == Record.WAIT:
                rule.note(int(rows.view(WAIT)["wait_ns"].max()))
            if isinstance(rule, Retransmits) and record == Record.RETRANSMIT:
                rule.note(time.monotonic_ns(), int(rows.view(SOCKET)["segs"].sum()))

    def _keep(self, now: float) -> None:
        if now >= self._mark_s or self._flight.exceeds(self._settings.memory_bytes):
            self._take_mark(now)
        if now >= self._look_s:
            self._look_s = now + TICK_S / 2  # not just too early every other time
            self._look(time.monotonic_ns())
            self._on_look()
        if self._bundle is not None:
            self._go_on(self._bundle)
            self._thrift.skip()
        else:
            self._thrift.step()

    def _take_mark(self, now: float) -> None:
        """Flush, note how the counters stand, and drop what is too old or too much."""
        if now >= self._backdrop_s:
            self._take_backdrop(now)
        self._recorder.flush(time.monotonic_ns())
        began = time.thread_time()  # rows cost what they cost, however often
        self._host.snapshot()
        if now >= self._epoch_s:
            self._epoch_s = now + EPOCH_S
            self._recorder.begin_epoch()
            self._flight.begin_epoch()
            self._owners = Owners()
            self._forget_processes()
        self._marks.append(self._mark())
        if self._bundle is not None:
            self._bundle.hold()
        self._forget()
        every_s = max(1.0, self._settings.before_s / _MARKS)
        self._mark_s = now + max(every_s, (time.thread_time() - began) / _SHARE)

    def _mark(self) -> Mark:
        """The counters now."""
        seen = (self._shared.waits(), self._ring.produced)
        if self._marks and seen == self._marked:  # nothing has happened: as they were
            return replace(self._marks[-1], at_ns=time.monotonic_ns(), epoch=self._flight.epoch)
        self._marked = seen
        raw = self._read_iterator("lat_iter_seed")
        return marks.take(
            self._shared,
            self._slots(),
            np.frombuffer(raw, THREAD),
            epoch=self._flight.epoch,
            segs=self._namespaces.now(),
            overhead=self._cost.report(),
        )

    def _take_backdrop(self, now: float) -> None:
        began = time.thread_time()
        self._backdrops.append(
            _Backdrop(time.monotonic_ns(), limits(), steal_ns(), self._connections.now())
        )
        took_s = time.thread_time() - began
        self._backdrop_s = now + max(self._settings.before_s, took_s / _SHARE)

    def _forget(self) -> None:
        """Drop what lies before the window, and what the memory does not allow."""
        begin_ns = self._marks[-1].at_ns - int(self._settings.before_s * 1e9)
        while len(self._marks) > 1 and self._marks[1].at_ns <= begin_ns:
            self._marks.popleft()
        self._flight.drop(self._marks[0].at_ns, before_epoch=self._marks[0].epoch)
        excess = self._flight.exceeds(self._settings.memory_bytes)
        while excess and self._flight.bytes > _MEMORY_LEFT * self._settings.memory_bytes:
            dropped_ns = self._flight.drop_oldest()
            if dropped_ns is None:
                break
            self._dropped_ns = max(self._dropped_ns, dropped_ns)
            while len(self._marks) > 1 and self._marks[0].at_ns < dropped_ns:
                self._marks.popleft()
        # A bundle that is open began at a mark that may be gone by now.
        start_ns = (self._marks[0] if self._bundle is None else self._bundle.start).at_ns
        while self._ended_threads and self._ended_threads[0][0] <= start_ns:
            self._ended_threads.popleft()
        while len(self._backdrops) > 1 and self._backdrops[1].at_ns <= start_ns:
            self._backdrops.popleft()

    def _forget_processes(self) -> None:
        """Forget the names of processes that have ended: others may need the room."""
        self._names = {tgid: name for tgid, name in self._names.items() if tgid in self._alive}
        self._command_lines = {
            tgid: line for tgid, line in self._command_lines.items() if tgid in self._names
        }

    @property
    def targets_ended(self) -> bool:
        """Whether no target is left and none can come."""
        return self._all_ended()

    def describe(self, snapshot: Snapshot) -> str:
        """Where the watch stands, in a line."""
        rules = "  ".join(rule.state() for rule in self._rules)
        cost = snapshot.self_cpu_percent + (snapshot.bpf_percent or 0.0)
        return (
            f"{self.state.value}  {snapshot.waits_per_s:,.0f} waits/s  {rules}  cost {cost:.1f} %"
        )

    # --------------------------------------------------------------- firing

    def trigger(self, reason: str) -> None:
        """Fire by hand at the next look. May be called from a signal handler."""
        self._by_hand.append(reason)

    def _histograms(self) -> Histograms:
        seen = (self._shared.waits(), int(self._shared.overshoots["count"].sum()))
        if seen == self._counted:
            return self._counts
        self._counted = seen
        sleeps: npt.NDArray[np.uint64] = self._shared.overshoots["slots"].sum(axis=0)
        self._counts = {"wait": self._shared.slot_counts(), "sleep": sleeps}
        return self._counts

    def _look(self, now_ns: int) -> None:
        """Ask the rules, and do what is due."""
        counts = self._histograms()
        by_hand, self._by_hand = self._by_hand, []
        requests = [] if self._control is None else self._control.poll()
        if self.state == State.OPEN:
            for rule in self._rules:
                rule.spike(now_ns, counts)
            self._refuse(by_hand, requests, f"a bundle is being written already: {self._path()}")
            return
        if self._profiles is not None and self._profiles.running:
            self._profiles.poll()  # those of a bundle that was given up
        ended = self._settings.once and bool(self._firings)
        if ended:
            self._refuse(by_hand, requests, "there is a bundle, and with --once no other")
            by_hand, requests = [], []
        fired = [firing for rule in self._rules if (firing := rule.look(now_ns, counts))]
        if self.state == State.COOLDOWN:
            fired = []
            if now_ns >= self._armed_ns and not ended:
                self.state = State.ARMED
                for rule in self._rules:
                    rule.rearm(now_ns, counts)
        by_hand += [request.reason for request in requests]
        fired += [self._manual(now_ns, reason) for reason in by_hand]
        if fired:
            self._fire(tuple(fired), now_ns)
        for request in requests:
            opened = self.state == State.OPEN
            wanted = f"{self._path()}, whole in {self._settings.after_s:g} s"
            request.answer(wanted if opened else "the bundle cannot be written", ok=opened)

    def _refuse(self, by_hand: Sequence[str], requests: Sequence[Request], why: str) -> None:
        for request in requests:
            request.answer(why, ok=False)
        if by_hand:
            self._say(f"not fired by hand: {why}")

    def _manual(self, now_ns: int, reason: str) -> Firing:
        since_ns = now_ns - int(self._settings.window_s * 1e9)
        return Firing(
            rule="by hand", kind="manual", since_ns=since_ns, until_ns=now_ns, reason=reason
        )

    def _path(self) -> str:
        return "" if self._bundle is None else str(self._bundle.out.path)

    def _fire(self, firings: tuple[Firing, ...], now_ns: int) -> None:
        """Open a bundle."""
        from .bundle import Bundle  # noqa: PLC0415 - heavy, after the attach

        self._firings, self._fired_ns, self._end = firings, now_ns, None
        self._armed_ns = now_ns + int(self._settings.cooldown_s * 1e9)
        self._host.snapshot(now=True)
        if self._profiles is not None:
            self._profiles.start(self._settings.after_s)
        self._say(f"fired: {headline(firings)}")
        start = self._marks[0]
        self._short = self._dropped_ns > now_ns - int(self._settings.before_s * 1e9)
        self._connections.begin_at(self._backdrops[0].connections)
        head = self._head(start)
        try:
            out = self._bundles.new(time.time_ns(), head)
        except LatraceError as error:
            self._give_up(error)
            return
        try:
            self._bundle = Bundle(out, self._flight, start=start, head=head)
            self.state = State.OPEN
        except LatraceError as error:
            self._bundles.discard(out)
            self._give_up(error)
            return
        self._tidy()

    def _head(self, start: Mark) -> dict[str, Any]:
        """The manifest's first words, of a capture that began at `start`."""
        head = self._manifest_head()
        offset_ns = self._start_realtime_ns - self._start_ns
        head |= {"start_ns": start.at_ns, "started_realtime_ns": start.at_ns + offset_ns}
        return head

    def _go_on(self, bundle: Bundle) -> None:
        """Write what has come, and close the bundle when it is time."""
        now_ns = time.monotonic_ns()
        profiled = self._profiles is None or self._profiles.poll()
        try:
            if self._end is None:
                if now_ns >= self._fired_ns + int(self._settings.after_s * 1e9):
                    self._marked = (-1, -1)  # where each thread stands is wanted, too
                    self._take_mark(time.monotonic())
                    self._host.snapshot(now=True)
                    self._end, self._end_stacks = self._marks[-1], None
                bundle.step()
                return
            bundle.step(until_ns=self._end.at_ns)
            late_s = (now_ns - self._end.at_ns) / 1e9
            if late_s < _STACKS_FOLLOW_S:
                return
            if self._end_stacks is None:
                self._end_stacks = self._recorder.stacks
                self._recorder.hurry()
            named = self._recorder.has_named(self._end_stacks)
            # The profiles end on their own, at their deadlines.
            if profiled and (named or late_s > _NAMES_FOLLOW_S):
                self._recorder.flush(now_ns if named else None)
                self._close(bundle, self._end)
        except LatraceError as error:
            bundle.abandon()
            self._give_up(error)

    def _close(self, bundle: Bundle, end: Mark) -> None:
        """Write the rest of a bundle."""
        while not bundle.step(until_ns=end.at_ns):
            pass
        start = bundle.start
        ended = [
            (rows, cgroups)
            for at_ns, rows, cgroups in self._ended_threads
            if start.at_ns < at_ns <= end.at_ns
        ]
        cgroups = dict(self._cgroups)
        for _, known in ended:
            cgroups |= known
        alive = end.threads.copy()
        alive["event"] = ThreadEvent.END
        threads = marks.grown_threads(
            start,
            np.concatenate([marks.no_threads(), *(rows for rows, _ in ended)]),
            alive,
            bundle.longest(),
        )
        waits, overshoots = bundle.count(end, threads, cgroups)
        columns, _ = self._connections.finish()
        bundle.append("connections", columns)
        counters = marks.grown_counters(start, end)
        quality = self._quality_of(counters, waits=waits)
        waiting = np.isin(alive["place"], (Place.WAITING, Place.UNKNOWN))
        backdrop = self._backdrops[0]
        notes = []
        if self._short:
            notes.append("the memory allowed less than was asked for (--memory)")
        bundle.close(
            {
                "end_ns": end.at_ns,
                "targets": self._targets(),
                "owners": self._owners.told(),
                "quality": {
                    **quality,
                    "open_at_end": int(waiting.sum()),
                    "symbols": self._recorder.symbols(),
                    "tcp_info_refused": self._connections.refused,
                },
                "sleeps": sleep_totals(overshoots, counters),
                "cgroups_limited": limited_since(backdrop.limits),
                "steal_ns": steal_ns() - backdrop.steal_ns,
                "netns": [
                    {
                        "inum": inum,
                        "retrans_segs_start": start.segs.get(inum),
                        "retrans_segs_end": segs,
                    }
                    for inum, segs in end.segs.items()
                ],
                "overhead": marks.grown_overhead(start, end),
            },
            {**self._spike(bundle, end, notes), "profiles": self._write_profiles(bundle)},
        )
        self._bundle = None
        self.state = State.COOLDOWN
        self._on_bundle(bundle.out.path)
        self._tidy()

    def _spike(self, bundle: Bundle, end: Mark, notes: list[str]) -> dict[str, Any]:
        """What spike.json says before it is explained."""
        settings = asdict(self._settings)
        for name in ("memory_bytes", "once", "budget_percent"):
            del settings[name]
        offset_ns = self._start_realtime_ns - self._start_ns
        return {
            "schema": 1,
            "name": bundle.out.path.name,
            "complete": True,
            "fired_ns": self._fired_ns,
            "fired_realtime_ns": self._fired_ns + offset_ns,
            "start_ns": bundle.start.at_ns,
            "end_ns": end.at_ns,
            "triggers": [firing.document() for firing in self._firings],
            "settings": settings,
            "host": self._host.between(bundle.start.at_ns, end.at_ns),
            "notes": notes,
            "analysis": None,
        }

    def _write_profiles(self, bundle: Bundle) -> dict[str, Any] | None:
        """Lay the application's profiles into the bundle; returns what spike.json says of them."""
        if self._profiles is None:
            return None
        files, errors = self._profiles.take()
        for name, data in files.items():
            bundle.write_file(name, data)
        for error in errors:
            self._say(f"!!! {visible(error)}")
        return {"url": str(self._profiles.url), "files": sorted(files), "errors": errors}

    def _give_up(self, error: LatraceError) -> None:
        """A bundle could not be written: say so, and go on."""
        self._bundle, self._firings = None, ()  # with --once, too, the next one counts
        self.state = State.COOLDOWN
        self._say(f"!!! no bundle: {error.cause}")

    def _tidy(self) -> None:
        tidied = self._bundles.tidy()
        for removed in tidied.removed:
            self._say(f"removed {removed.path.name}, the oldest")
        for note in tidied.notes:
            self._say(f"!!! {note}")

    # ------------------------------------------------------------------ end

    def _finish(self, *, complete: bool) -> None:
        bundle, end = self._bundle, self._end
        if bundle is not None and complete and end is None:
            self._marked = (-1, -1)  # see _go_on
            end = self._mark()
            self._host.snapshot(now=True)
        self._cost.close()
        self._sampler.close()
        self._probes.detach()
        while self._ring.used():
            self._drain()
        if bundle is not None and complete and end is not None:
            self._recorder.finish()
            self._recorder.flush(time.monotonic_ns())
            try:
                self._close(bundle, end)
            except LatraceError as error:
                bundle.abandon()
                self._give_up(error)
        elif bundle is not None:
            bundle.abandon()
        with contextlib.suppress(LatraceError):
            self._recorder.close(complete=complete)


def headline(firings: Sequence[Firing]) -> str:
    """Why a watch fired, in a line."""
    first = firings[0]
    more = f" (and {len(firings) - 1} more)" if len(firings) > 1 else ""
    if first.kind == "manual":
        reason = f": {visible(first.reason)}" if first.reason else ""
        return f"by hand{reason}{more}"
    value, limit = (_quantity(each or 0, first.unit) for each in (first.value, first.threshold))
    usual = f", usually {_quantity(first.baseline, first.unit)}" if first.baseline else ""
    return f"{first.rule}: {value}, over {limit}{usual}{more}"


def _quantity(value: float, unit: str) -> str:
    if unit == "segments":
        return f"{value:,.0f}"
    return duration(value * 1e9 if unit == "s" else value)
