"""The course of a watch: everything around the tracer is made, run and taken down here."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from latrace.analysis.errors import CaptureError
from latrace.tracer.commands.console import Status, from_here, silence_stdout, write_out
from latrace.tracer.commands.signals import StopOnSignals
from latrace.tracer.doctor import explained, require_tracing
from latrace.tracer.errors import LatraceError
from latrace.tracer.options import Options
from latrace.tracer.targets import Targets

from .application import ApplicationLatency
from .bundles import Bundles
from .control import ControlSocket
from .explain import Explained, Explainer
from .host import HostUsage
from .plan import Plan
from .pprof import Profiles
from .triggers import Rule
from .view import WatchView

if TYPE_CHECKING:
    from latrace.tracer.session import Snapshot

    from .watcher import Watch

_EXPLAIN_S: Final = 120.0
"""That the last bundles may take to be explained when the watch ends."""


def run(
    plan: Plan, options: Options, targets: Targets, *, status: Status, signals: StopOnSignals
) -> str:
    """Watch until a signal, the duration, the targets' end, or with `once` the first bundle.

    Returns where the bundles are. `signals` must be active. Raises HostError when this host or
    this user cannot trace, LatraceError when the bundles cannot be written there.
    """
    require_tracing()
    view = WatchView(status)
    _keep_off_the_cpus_of(targets)
    with contextlib.ExitStack() as undo:
        # Before we can be fired and when we end, too, it must not kill.
        undo.enter_context(_on_fire_signal(lambda: None))
        bundles = Bundles(plan.output, keep=plan.keep, disk_bytes=plan.disk_bytes)
        undo.callback(bundles.close)
        explainer = Explainer(on_spike=plan.on_spike, say=view.say)
        undo.callback(explainer.close)
        service = _Service(plan, explainer, view, signals)
        with _watch(plan, options, targets, bundles, service) as watch:
            service.watch = watch
            watch.watch(
                stop=signals.stop,
                on_look=service.look,
                on_tick=service.tick if view.draws else None,
            )
            if watch.targets_ended and not signals.stop.is_set():
                view.say("no target is left: it has ended")
        # What was open is a bundle now, and explained like any other.
        for each in explainer.finish(_EXPLAIN_S):
            service.tell(each)
    return str(from_here(bundles.path))


@contextlib.contextmanager
def _watch(
    plan: Plan, options: Options, targets: Targets, bundles: Bundles, service: _Service
) -> Iterator[Watch]:
    """Attach, with all that a watch has around it; nothing of it is left afterwards."""
    view, settings = service.view, plan.settings
    with contextlib.ExitStack() as undo:
        host = HostUsage(
            before_s=settings.before_s,
            after_s=settings.after_s + settings.window_s,
            target_pid=next(iter(options.pids), None),
        )
        undo.callback(host.close)
        control = _control(targets.description, view)
        if control is not None:
            undo.callback(control.close)
        rules: list[Rule] = list(plan.rules)
        if plan.application is not None:
            application = ApplicationLatency(
                plan.application,
                options.pids[0],  # whose network the address is in
                window_s=settings.window_s,
                say=view.say,
            )
            undo.callback(application.close)
            rules.append(application)
        profiles = None
        if plan.pprof is not None:
            profiles = Profiles(plan.pprof, options.pids[0])
            undo.callback(profiles.close)
        with explained():
            from latrace.tracer.loader import Loading  # noqa: PLC0415 - errors come before it

            loading = Loading(options)
            from .watcher import Watch  # noqa: PLC0415

            watch = undo.enter_context(
                Watch(
                    options,
                    settings,
                    rules,
                    bundles,
                    command=sys.argv,
                    host=host,
                    control=control,
                    profiles=profiles,
                    say=view.say,
                    on_bundle=service.wrote,
                    loading=loading,
                )
            )
        undo.enter_context(_on_fire_signal(lambda: watch.trigger("SIGUSR2")))
        undo.callback(view.close)
        view.say(f"watching {targets.description}: {', '.join(rule.rule for rule in rules)}")
        yield watch


class _Service:
    """What the parts of a watch tell each other."""

    def __init__(
        self, plan: Plan, explainer: Explainer, view: WatchView, signals: StopOnSignals
    ) -> None:
        self._plan = plan
        self._explainer = explainer
        self.view = view
        self._signals = signals
        self.watch: Watch | None = None

    def wrote(self, path: Path) -> None:
        """A bundle is on disk."""
        self.view.say(f"wrote {from_here(path)}")
        self._explainer.add(path)

    def look(self) -> None:
        """Some five times a second."""
        for each in self._explainer.poll():
            self.tell(each)
            if self._plan.once:
                self._signals.stop.set()

    def tick(self, snapshot: Snapshot) -> None:
        """Once a second, on a terminal."""
        if self.watch is not None:
            self.view.update(self.watch.describe(snapshot))

    def tell(self, explained_one: Explained) -> None:
        """A bundle is done."""
        if explained_one.trouble:
            self.view.say(f"!!! not explained: {explained_one.trouble}")
        else:
            self.view.say(explained_one.headline)
        try:
            if self._plan.as_json:
                write_out(json.dumps(_document(explained_one.path)) + "\n")
            else:
                write_out(f"{from_here(explained_one.path)}\n")
        except BrokenPipeError:  # the reader had enough; the spikes go on
            silence_stdout()
            self.view.say("!!! nobody reads the standard output any more; the watch goes on")
        except (LatraceError, CaptureError) as error:  # the disk is full, the bundle is gone
            self.view.say(f"!!! {error.cause}")


def _keep_off_the_cpus_of(targets: Targets) -> None:
    """Run elsewhere, with all children to come, if the targets leave us a CPU of our own."""
    theirs: set[int] = set()
    for task in targets.tasks:
        with contextlib.suppress(OSError):  # it has just ended
            theirs |= os.sched_getaffinity(task.tid)
    if theirs and (others := os.sched_getaffinity(0) - theirs):
        os.sched_setaffinity(0, others)


def _control(description: str, view: WatchView) -> ControlSocket | None:
    """The socket of `latrace trigger`; without it the watch goes on, and says so."""
    try:
        return ControlSocket(description)
    except LatraceError as error:
        view.say(f"!!! `latrace trigger` will not work: {error.cause}")
        return None


@contextlib.contextmanager
def _on_fire_signal(act: Callable[[], None]) -> Iterator[None]:
    """What SIGUSR2 does meanwhile."""
    before = signal.signal(signal.SIGUSR2, lambda *_: act())
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR2, before)


def _document(path: Path) -> dict[str, object]:
    """What spike.json says, and where it is."""
    from latrace.analysis.spike_file import read_spike  # noqa: PLC0415 - only for --json

    spike = read_spike(path)
    return {"path": str(path), **(spike.document if spike is not None else {})}
