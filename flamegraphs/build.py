"""From a capture's tables to a profile: whose time, in which stack, and how sure we are.

Rows are grouped by stack id in Arrow before any Python sees them: a capture may have ten million
waits, but only as many stacks as were sampled.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain
from types import MappingProxyType
from typing import Any, Final, Literal, Protocol, TypeAlias, get_args

import pyarrow as pa
import pyarrow.compute as pc

from latrace.analysis.causes import CAUSES
from latrace.analysis.names import tidy
from latrace.analysis.retransmits import read_retransmits
from latrace.analysis.words import plural
from latrace.flamegraphs.profile import (
    NOT_ITEMISED,
    NOT_SAMPLED,
    Frame,
    FrameKind,
    Profile,
    share_out,
    whole_microseconds,
)
from latrace.flamegraphs.shape import Shape
from latrace.flamegraphs.short import short_name
from latrace.flamegraphs.text import human_share, human_us

Kind: TypeAlias = Literal["wait", "offcpu", "culprit", "waker", "wall"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)

Level: TypeAlias = Literal["process", "thread", "none"]
"""Whose frame stands before a thread's stacks: its process', by name, its own, or nobody's."""

CULPRITS: Final = ("irq", "softirq", "kthread", "own", "other")
"""The causes in which somebody ran."""

BLOCKED: Final = Frame("[blocked]", "state")
ON_CPU: Final = Frame("[on CPU]", "state")
WAITING: Final = Frame("[waiting]", "state")
STACK_LOST: Final = Frame("[stack lost]", "marker")
TRUNCATED: Final = Frame("[truncated]", "marker")
NO_USER_STACK: Final = Frame("[no user stack]", "marker")
TO_KERNEL: Final = Frame("-", "marker")
TO_WAKER: Final = Frame("--", "marker")

# Where an interrupt begins, by the names of x86, arm64, s390, ppc64 and riscv; softirqs that an
# interrupt leaves behind run under irq_exit everywhere.
_INTERRUPT: Final = re.compile(
    r"_*irq_exit(_rcu)?|(asm_)?(sysvec_\w+|common_interrupt)|el[01]\w*_irq|call_on_irq_stack"
    r"|(do_)?(ext|io)_(int_handler|irq)|\w+_common_virt|do_irq"
)

_TITLES: Final[dict[Kind, str]] = {
    "wait": "Waiting to run",
    "offcpu": "Off the CPU",
    "culprit": "Who ran while it waited",
    "waker": "Blocked time by waker",
    "wall": "All time",
}
_SUBTITLES: Final[dict[Kind, str]] = {
    "wait": "Width is time spent waiting for a CPU: exact for each cause, sampled above. A stack "
    "shows where the thread left the CPU.",
    "offcpu": "Width is time off the CPU: [blocked] until woken, then [waiting] for a CPU to run "
    "on. A stack shows where the thread left it.",
    "culprit": "Width is time others ran on the CPU that a thread waited for, in the recorded "
    "waits; stacks share it as sampled. [not itemised]: the exact rest.",
    "waker": "Width is time spent blocked. Above -- stands what ended it: the waker's stack, "
    "innermost frame first, and at the tip its name.",
    "wall": "Width is time of all threads: [on CPU] as the clock sampled it; [waiting] and "
    "[blocked] exact, with stacks of where the thread left the CPU.",
}

# By so much the samples of a capture that was closed may stand for more than there was.
_CHANCE: Final = 0.05
_CAUSE_NS: Final = tuple(f"{cause}_ns" for cause in CAUSES)

AS_RECORDED: Final = Shape()
NOTHING_INLINED: Final[Mapping[int, Sequence[str]]] = MappingProxyType({})

_Stack: TypeAlias = tuple[Frame, ...]


class CaptureTables(Protocol):
    """The part of `latrace.analysis.capture.Capture` that a profile is made from.

    `table` returns every column asked for, with nulls where the capture does not have it.
    `complete` is false when the tracer did not close the capture; `truncated` names the tables
    that end in the middle of a record batch.
    """

    manifest: dict[str, Any]

    @property
    def complete(self) -> bool: ...  # noqa: D102
    @property
    def truncated(self) -> list[str]: ...  # noqa: D102
    def table(self, name: str, *, columns: Sequence[str]) -> pa.Table: ...  # noqa: D102
    def batches(self, name: str, *, columns: Sequence[str]) -> Iterator[pa.Table]: ...  # noqa: D102


@dataclass(slots=True)
class _Part:
    """A part of the picture: what stands at its root, its time, and how stacks share that.

    `exact_ns` None: only the samples know.
    """

    root: _Stack
    exact_ns: int | None
    stacks: dict[_Stack, int] = field(default_factory=dict)

    def add(self, stack: _Stack, weight_ns: int) -> None:
        self.stacks[stack] = self.stacks.get(stack, 0) + weight_ns

    @property
    def sampled_ns(self) -> int:
        return sum(self.stacks.values())

    @property
    def total_ns(self) -> int:
        return self.sampled_ns if self.exact_ns is None else self.exact_ns

    def weights(self) -> Iterator[tuple[_Stack, int]]:
        """Its stacks, from the root of the picture; their weights add up to `total_ns`.

        Samples that stand for more than there was, by chance, share what there was; what they
        leave is `[not sampled]`.
        """
        weights = list(self.stacks.values())
        if self.sampled_ns > self.total_ns:
            weights = share_out(self.total_ns, weights)
        for stack, weight in zip(self.stacks, weights, strict=True):
            yield (*self.root, *stack), weight
        if self.total_ns > self.sampled_ns:
            yield (*self.root, NOT_SAMPLED), self.total_ns - self.sampled_ns


def build_profile(
    capture: CaptureTables,
    *,
    kind: Kind,
    pids: bool = True,
    level: Level = "process",
    shape: Shape = AS_RECORDED,
    inlined: Mapping[int, Sequence[str]] = NOTHING_INLINED,
    short_names: bool = False,
) -> Profile:
    """Return the capture's time by stack.

    wait: `[waiting: cause]` → process → user frames → `-` → kernel frames, by the time then spent
    waiting to run. The width of each cause is its exact total; a sampled wait is split by its own
    parts. A capture without causes has no such frame.
    offcpu: the same, and `[blocked]` beside, with its exact total. At the tip of a blocked stack
    `[tcp rto PEER]` stands for the part of its time that overlaps lost segments of the socket.
    culprit: who ran on the CPU meanwhile → its stack when it left. Another process is one, whatever
    its threads are called. The width of a culprit is its time in the recorded waits (`slices`); its
    stacks share that. What the exact totals have beyond (waits without a row, or too short to be
    itemised) stands under `[not itemised]` by cause. Time in which nobody ran (throttled, idle,
    unknown) is not in this picture.
    waker: process → `--` → the waker's frames, innermost first → the waker's name, or
    `[hardirq]`, `[softirq]`, by the time spent blocked.
    wall: `[on CPU]`, by samples alone, beside what offcpu shows.

    Weights are added per stack in nanoseconds and rounded to microseconds together, so that the
    root is the exact total of the in-kernel counters; what was not sampled stands under
    `[not sampled]`. Should the samples exceed the counters by more than chance (a capture that was
    cut off), their sum is the root, and a warning says so. Without `pids` culprits of one name are
    one, as two captures need it that are compared.

    By `level` "thread" a thread's frame, `comm/tid`, comes before all else of its stacks (a
    culprit's is the culprit's); what was not sampled is nobody's. By "none" there is no frame of a
    process, and culprits of one name are one. `shape` then changes the stacks; the root stays.

    `inlined`: by frame id, the functions that the frame's function has inlined there, innermost
    first; each becomes a frame. `short_names`: without parameters, template arguments and the like,
    so that functions that only differ in these are one.

    Raises ValueError for an unknown kind, SlowPatternError for a pattern that never ends.
    """
    if kind not in KINDS:
        raise ValueError(f"no flame graph kind {kind!r}: it is one of {', '.join(KINDS)}")
    totals = _totals(capture)
    known = _Stacks(capture, inlined, short_names=short_names)
    parts = _parts(capture, kind, totals, known, level=level, pids=pids and level != "none")
    warnings = _warnings(capture)
    counted = [part for part in parts if part.exact_ns is not None]
    counted_ns = sum(part.total_ns for part in counted)
    sampled_ns = sum(part.sampled_ns for part in counted)
    chance = _CHANCE if capture.complete else 0
    if kind != "culprit" and sampled_ns > counted_ns * (1 + chance):
        warnings.append(
            "the exact totals are older than the samples or missing: the root is the sampled time, "
            f"{human_us(sampled_ns // 1000)}, not the counted {human_us(counted_ns // 1000)}"
        )
        for part in counted:
            part.exact_ns = None

    sums: dict[_Stack, int] = {}
    for part in parts:
        for stack, weight_ns in part.weights():
            whose = _thread_first(stack)
            sums[whose] = sums.get(whose, 0) + weight_ns
    total_ns = sum(sums.values())
    covered_ns = sum(min(part.sampled_ns, part.total_ns) for part in parts)
    ordered = sorted(shape.of(sums, outermost_last=kind == "waker").items())
    rounded = whole_microseconds([weight for _, weight in ordered], total_ns)
    return Profile(
        title=" · ".join(filter(None, (_TITLES[kind], _targets(capture.manifest)))),
        subtitle=_SUBTITLES[kind],
        stacks=[(stack, us) for (stack, _), us in zip(ordered, rounded, strict=True) if us],
        facts=[
            *_facts(capture.manifest, kind, totals, sampled=human_share(covered_ns, total_ns)),
            *([("causes", "of each thread as sampled")] if _by_thread(kind, level) else []),
            *shape.facts(),
        ],
        warnings=warnings,
        exact=ordered,
        kind=kind,
        started_ns=capture.manifest.get("started_realtime_ns") or 0,
        duration_ns=_duration_ns(capture.manifest),
        period_ns=_period_ns(capture.manifest, kind),
        innermost_first=(kind == "waker") != shape.reverse,
    )


# --- stacks and weights -------------------------------------------------------------------------


def _parts(
    capture: CaptureTables,
    kind: Kind,
    totals: Mapping[str, int],
    known: _Stacks,
    *,
    level: Level,
    pids: bool,
) -> list[_Part]:
    if kind == "culprit":
        return _culprits(capture, known, totals, pids=pids, tids=level == "thread")
    whose = _Whose(capture, level)
    if kind == "waker":
        part = _Part((), totals["blocked_ns"])
        groups = _grouped(capture, "waits", (whose.by, "waker_stack", "waker", "waker_ctx"))
        known.load(group[1] for *group, _ in groups)
        for owner, stack, waker, context, weight in groups:
            victim = whose.frames(owner)
            apart = (TO_WAKER,) if victim else ()
            part.add((*victim, *apart, *known.waker(stack, waker, context)), weight)
        return [part]

    parts = _waiting(capture, known, whose, totals, apart=kind != "wait")
    if kind != "wait":
        blocked = _Part((BLOCKED,), totals["blocked_ns"])
        groups = _grouped(capture, "waits", whose.where, "blocked_weight_ns")
        known.load(stack for _, stack, _ in groups)
        lossy = _lossy(capture, whose.where)
        for owner, stack, weight_ns in groups:
            frames = (*whose.frames(owner), *known.left_at(stack))
            of_losses = lossy.get((owner, stack), {})
            for loss, lossy_ns in of_losses.items():
                blocked.add((*frames, loss), lossy_ns)
            rest = weight_ns - sum(of_losses.values())
            if rest:
                blocked.add(frames, rest)
        parts.append(blocked)
    if kind == "wall":
        on_cpu = _Part((ON_CPU,), None)
        _add_stacks(on_cpu, _grouped(capture, "samples", whose.where, "weight_ns"), known, whose)
        parts.append(on_cpu)
    return parts


class _Whose:
    """The frame of whose time it is."""

    def __init__(self, capture: CaptureTables, level: Level) -> None:
        self.by = "tid" if level == "thread" else "tgid"
        self.where = (self.by, "stack")
        self._level = level
        threads = capture.table("threads", columns=("tid", "tgid", "comm"))
        if level == "thread":
            columns = (threads[name].to_pylist() for name in ("tid", "comm"))
            self._names = {tid: comm for tid, comm in zip(*columns, strict=True) if comm}
        else:
            self._names = _process_names(threads)

    def frames(self, owner: int | None) -> _Stack:
        name = self._names.get(-1 if owner is None else owner)
        if self._level == "thread":
            return (_thread(name, owner),)
        return (Frame(name or f"[pid {owner}]", "process"),) if self._level == "process" else ()


def _thread(comm: str | None, tid: int | None, what: str = "") -> Frame:
    return Frame(f"{comm or '[unknown]'}/{'?' if tid is None else tid}{what}", "thread")


def _thread_first(stack: _Stack) -> _Stack:
    """Put whose time it is before what it was."""
    if len(stack) > 1 and stack[1].kind == "thread" and stack[0].kind == "state":
        return (stack[1], stack[0], *stack[2:])
    return stack


def _add_stacks(part: _Part, groups: list[tuple[Any, ...]], known: _Stacks, whose: _Whose) -> None:
    """Add (owner, stack, weight) to a part."""
    known.load(stack for _, stack, _ in groups)
    for owner, stack, weight_ns in groups:
        part.add((*whose.frames(owner), *known.left_at(stack)), weight_ns)


def _lossy(
    capture: CaptureTables, where: tuple[str, str]
) -> dict[tuple[int, int | None], dict[Frame, int]]:
    """Return, by owner and stack, how much of the sampled blocked time (ns) overlaps lost segments.

    Never more than a stack has.
    """
    found = read_retransmits(capture)
    good = found.waits.counts & (found.waits.blocked_ns > 0)
    rows = found.waits.row[good]
    if not len(rows):
        return {}
    waits = capture.table("waits", columns=(*where, "blocked_weight_ns")).take(pa.array(rows))
    columns = (waits[name].to_pylist() for name in (*where, "blocked_weight_ns"))
    parts = zip(
        found.waits.loss[good].tolist(),
        found.waits.overlap_ns[good].tolist(),
        found.waits.blocked_ns[good].tolist(),
        *columns,
        strict=True,
    )
    sums: dict[tuple[int, int | None], dict[Frame, int]] = {}
    for loss, overlap_ns, blocked_ns, owner, stack, weight_ns in parts:
        lossy_ns = (weight_ns or 0) * overlap_ns // blocked_ns
        if lossy_ns:
            kinds = "+".join(kind for kind, _ in found.losses.kinds[loss])
            frame = Frame(f"[tcp {kinds} {found.losses.peer[loss]}]", "network")
            of_stack = sums.setdefault((owner, stack), {})
            of_stack[frame] = of_stack.get(frame, 0) + lossy_ns
    return sums


def _waiting(
    capture: CaptureTables,
    known: _Stacks,
    whose: _Whose,
    totals: Mapping[str, int],
    *,
    apart: bool,
) -> list[_Part]:
    """Return the waiting time: a part for each cause, or one where the capture tells none."""
    if not any(totals[cause] for cause in CAUSES):
        part = _Part((WAITING,) if apart else (), totals["wait_ns"])
        _add_stacks(part, _grouped(capture, "waits", whose.where, "weight_ns"), known, whose)
        return [part]
    by_cause = {
        cause: _Part((Frame(f"[waiting: {cause}]", "state"),), totals[cause]) for cause in CAUSES
    }
    rows = capture.table("waits", columns=(*whose.where, "weight_ns", "wait_ns", *_CAUSE_NS))
    rows = rows.filter(pc.greater(pc.fill_null(rows["weight_ns"], 0), 0))
    scale = pc.divide(_float(rows["weight_ns"]), pc.max_element_wise(_float(rows["wait_ns"]), 1.0))
    for column in _CAUSE_NS:
        share = pc.multiply(scale, _float(rows[column]))
        rows = rows.set_column(rows.schema.get_field_index(column), column, share)
    sums = rows.group_by(list(whose.where)).aggregate(
        [("weight_ns", "sum"), *((column, "sum") for column in _CAUSE_NS)]
    )
    names = (*whose.where, "weight_ns_sum", *(f"{column}_sum" for column in _CAUSE_NS))
    groups = list(zip(*(sums[name].to_pylist() for name in names), strict=True))
    known.load(stack for _, stack, *_ in groups)
    for owner, stack, weight_ns, *shares in groups:
        if not sum(shares):  # rows of before causes were recorded
            shares[-1] = 1.0
        frames = (*whose.frames(owner), *known.left_at(stack))
        for cause, part_ns in zip(CAUSES, share_out(weight_ns, shares), strict=True):
            if part_ns:
                by_cause[cause].add(frames, part_ns)
    return list(by_cause.values())


def _culprits(
    capture: CaptureTables, known: _Stacks, totals: Mapping[str, int], *, pids: bool, tids: bool
) -> list[_Part]:
    """Return a part for each culprit, and one for each cause's time that no slice tells of."""
    by = ("cause", "comm", "tid" if tids else "tgid", "vector")
    shown = dict.fromkeys(CULPRITS, 0)
    parts: dict[_Stack, _Part] = {}
    processes = {} if tids else _culprit_processes(capture)

    def part_of(cause: str, comm: str | None, id_: int, vector: str | None) -> _Part:
        if cause == "other":
            comm = processes.get(id_, comm)
        root = _culprit(cause, comm, id_ if pids else None, vector, thread=tids)
        return parts.setdefault(root, _Part(root, 0))

    for cause, comm, id_, vector, dur_ns in _grouped(capture, "slices", by, "dur_ns"):
        if cause in shown:
            shown[cause] += dur_ns
            part = part_of(cause, comm, id_, vector)
            part.exact_ns = part.total_ns + dur_ns
            if id_ < 0:  # an interrupt has no stack
                part.add((), dur_ns)
    groups = _grouped(capture, "slices", (*by, "stack"), "weight_ns")
    known.load(group[4] for group in groups)
    for cause, comm, id_, vector, stack, weight_ns in groups:
        if cause in shown:
            frames = known.left_at(stack, kernel_only=cause == "kthread")
            part_of(cause, comm, id_, vector).add(frames, weight_ns)
    rest = [
        _Part((), None, {(NOT_ITEMISED, Frame(f"[{cause}]", "marker")): totals[cause] - told})
        for cause, told in shown.items()
        if totals[cause] > told
    ]
    return [*parts.values(), *rest]


def _culprit_processes(capture: CaptureTables) -> dict[int, str]:
    """Return the names of other processes: as the first thread, or else the one that ran longest.

    A process whose threads have names of their own, or that became another program, is one.
    """
    named: dict[int, tuple[bool, int, str]] = {}
    for cause, tgid, tid, comm, dur_ns in _grouped(
        capture, "slices", ("cause", "tgid", "tid", "comm"), "dur_ns"
    ):
        if cause == "other" and comm:
            named[tgid] = max(named.get(tgid, (False, 0, "")), (tid == tgid, dur_ns, comm))
    return {tgid: comm for tgid, (_, _, comm) in named.items()}


def _culprit(
    cause: str, comm: str | None, id_: int | None, vector: str | None, *, thread: bool
) -> _Stack:
    """Return the frames at the root of who ran: a name, and what it was to the thread waiting."""
    if cause == "irq":
        return (Frame("[irq]", "state"),)
    if cause == "softirq":
        return (Frame("[softirq]", "state"), Frame(vector or "[unknown]", "kernel"))
    if thread:
        what = {"kthread": " [kernel thread]", "own": " [own thread]"}.get(cause, "")
        return (_thread(comm, id_, what),)
    name = comm or "[unknown]"
    if cause == "kthread":
        return (Frame(f"{name} [kernel thread]", "thread"),)
    if id_ is not None:
        name += f" ({id_})"
    if cause == "own":
        return (Frame(f"{name} [own thread]", "thread"),)
    return (Frame(name, "process"),)


def _float(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.fill_null(pc.cast(column, pa.float64(), safe=False), 0.0)


def _grouped(
    capture: CaptureTables, table: str, by: tuple[str, ...], weight: str = "blocked_weight_ns"
) -> list[tuple[Any, ...]]:
    """Return (*by, sum of the weight) for each distinct `by` among the rows that weigh anything.

    Sums are exact; a null weight is nothing.
    """
    rows = capture.table(table, columns=(*by, weight))
    # One dictionary for all chunks: Arrow groups by the codes of a dictionary column.
    rows = rows.filter(pc.greater(pc.fill_null(rows[weight], 0), 0)).unify_dictionaries()
    sums = rows.group_by(list(by)).aggregate([(weight, "sum")])
    columns = (sums[name].to_pylist() for name in (*by, f"{weight}_sum"))
    return list(zip(*columns, strict=True))


class _Stacks:
    """The stacks of a capture as frames, made on demand: only those that weigh something."""

    def __init__(
        self,
        capture: CaptureTables,
        inlined: Mapping[int, Sequence[str]],
        *,
        short_names: bool,
    ) -> None:
        self._capture = capture
        self._inlined = inlined
        self._short = short_names
        self._parts: dict[int, tuple[_Stack, _Stack, bool]] = {}

    def load(self, ids: Iterable[int | None]) -> None:
        """Read these stacks; one that the capture does not hold is lost."""
        wanted = {stack for stack in ids if stack is not None and stack >= 0}
        wanted.difference_update(self._parts)
        rows = self._rows("stacks", wanted, ("frames", "whole", "kernel_frames"))
        frames = self._frames(set(pc.unique(pc.list_flatten(rows["frames"])).to_pylist()))
        columns = (rows[name].to_pylist() for name in ("id", "frames", "whole", "kernel_frames"))
        for stack, leaf_first, whole, split in zip(*columns, strict=True):
            found = [frames.get(frame) for frame in leaf_first or ()]
            if split is None:
                split = sum(1 for part in found if part and part[-1].kind == "kernel")  # noqa: PLW2901
            kernel = [part or (Frame("[unknown]", "kernel"),) for part in found[:split]]
            user = [part or (Frame("[unknown]", "user"),) for part in found[split:]]
            self._parts[stack] = (_flat(kernel), _flat(user), bool(whole))

    def _frames(self, wanted: set[int]) -> dict[int, _Stack]:
        """What each frame of the capture is drawn as, innermost first: inlined ones, and itself."""
        rows = self._rows("frames", wanted, ("symbol", "module", "offset", "space"))
        columns = (rows[name].to_pylist() for name in ("id", "symbol", "module", "offset", "space"))
        return {
            id_: (
                *(Frame(self._name(name), "inlined", module or "") for name in self._inside(id_)),
                _frame(symbol and self._name(symbol, space), module or "", offset, space),
            )
            for id_, symbol, module, offset, space in zip(*columns, strict=True)
        }

    def _inside(self, id_: int) -> Sequence[str]:
        return self._inlined.get(id_, ())

    def _name(self, symbol: str, space: str | None = "user") -> str:
        # Names of JIT compilers follow rules of their own.
        return short_name(symbol) if self._short and space == "user" else symbol

    def _rows(self, table: str, wanted: set[int], columns: tuple[str, ...]) -> pa.Table:
        rows = self._capture.table(table, columns=("id", *columns))
        ids = pa.array(sorted(wanted), type=rows.schema.field("id").type)
        return rows.filter(pc.is_in(rows["id"], value_set=ids))

    def left_at(self, stack: int | None, *, kernel_only: bool = False) -> _Stack:
        """Return where a thread left the CPU, root first; a kernel thread has no user stack."""
        kernel, user, whole = self._parts.get(-1 if stack is None else stack, ((), (), False))
        if kernel_only and kernel:
            return tuple(reversed(kernel))
        if not user:
            return (NO_USER_STACK, TO_KERNEL, *reversed(kernel)) if kernel else (STACK_LOST,)
        cut = () if whole else (TRUNCATED,)
        return (*cut, *reversed(user), *((TO_KERNEL, *reversed(kernel)) if kernel else ()))

    def waker(self, stack: int | None, comm: str | None, context: str | None) -> _Stack:
        """Return who ended the blocked time, innermost frame first, the name last.

        What stands below an interrupt is a bystander: neither its code nor its name woke. A
        softirq that a thread ran itself (it sent to a local socket, say) is that thread's doing.
        """
        kernel, user, whole = self._parts.get(-1 if stack is None else stack, ((), (), False))
        if context in ("hardirq", "softirq"):
            depths = (i for i, frame in enumerate(kernel, 1) if _INTERRUPT.fullmatch(frame.name))
            entry = next(depths, None)
            if entry or context == "hardirq" or not comm:
                return (*(kernel[:entry] or (STACK_LOST,)), Frame(f"[{context}]", "marker"))
        name = Frame(comm or "[unknown]", "thread")
        if not user:
            return (*kernel, TO_KERNEL, NO_USER_STACK, name) if kernel else (STACK_LOST, name)
        cut = () if whole else (TRUNCATED,)
        return (*kernel, *((TO_KERNEL,) if kernel else ()), *user, *cut, name)


def _flat(parts: Iterable[_Stack]) -> _Stack:
    return tuple(chain.from_iterable(parts))


def _frame(symbol: str | None, module: str, offset: int | None, space: str | None) -> Frame:
    kinds: dict[str | None, FrameKind] = {"kernel": "kernel", "jit": "jit"}
    base = posixpath.basename(module)
    if symbol:
        name = tidy(symbol, jit=space == "jit")
    elif not base or base.startswith("["):
        # No file: the offset is a bare address, another one in every run.
        return Frame(base or "[unknown]", kinds.get(space, "user"))
    else:
        name = f"{base}+{offset or 0:#x}"
    return Frame(name, kinds.get(space, "user"), module)


def _process_names(threads: pa.Table) -> dict[int, str]:
    """Return each process's name: its first thread's, or any thread's if that one is not known."""
    names: dict[int, str] = {}
    leaders: dict[int, str] = {}
    columns = (threads[name].to_pylist() for name in ("tid", "tgid", "comm"))
    for tid, tgid, comm in zip(*columns, strict=True):
        if comm:
            names[tgid] = comm
            if tid == tgid:
                leaders[tgid] = comm
    return names | leaders


def _totals(capture: CaptureTables) -> dict[str, int]:
    """Return the in-kernel counters, added up over the processes; causes by their names.

    What the causes leave of the waiting time is unknown, if the capture has causes at all.
    """
    columns = ("waits", "wait_ns", "blocked_ns")
    table = capture.table("totals", columns=(*columns, *_CAUSE_NS))
    sums = {name: pc.sum(table[name]).as_py() or 0 for name in table.column_names}
    totals = {column: sums[column] for column in columns}
    totals |= {cause: sums[f"{cause}_ns"] for cause in CAUSES}
    if any(totals[cause] for cause in CAUSES):
        told = sum(totals[cause] for cause in CAUSES)
        totals["unknown"] += max(0, totals["wait_ns"] - told)
    return totals


# --- facts for the reader -----------------------------------------------------------------------


def _targets(manifest: Mapping[str, Any], *, shown: int = 3) -> str:
    targets = manifest.get("targets") or []
    named = [f"{target.get('comm', '?')} ({target.get('tgid', '?')})" for target in targets]
    if len(named) > shown:
        return f"{named[0]} and {len(named) - 1:,} more"
    return ", ".join(named)


def _by_thread(kind: Kind, level: Level) -> bool:
    """Whether what the subtitle calls exact is split by what was sampled."""
    return level == "thread" and kind not in ("culprit", "waker")


def _duration_ns(manifest: Mapping[str, Any]) -> int:
    start_ns, end_ns = manifest.get("start_ns"), manifest.get("end_ns")
    return 0 if start_ns is None or end_ns is None else max(0, end_ns - start_ns)


def _period_ns(manifest: Mapping[str, Any], kind: Kind) -> int:
    """What a sample stands for; waiting and blocked time are measured, to the nanosecond."""
    hz = (manifest.get("options") or {}).get("cpu_samples_hz")
    return 10**9 // hz if kind == "wall" and hz else 1


def _facts(
    manifest: Mapping[str, Any], kind: Kind, totals: Mapping[str, int], *, sampled: str
) -> list[tuple[str, str]]:
    quality = manifest.get("quality") or {}
    facts: list[tuple[str, str]] = [("kind", kind)]
    for key in ("host", "kernel"):
        if manifest.get(key):
            facts.append((key, str(manifest[key])))
    if manifest.get("cpus"):
        facts.append(("CPUs", str(manifest["cpus"])))
    if manifest.get("started_realtime_ns"):
        at = datetime.fromtimestamp(manifest["started_realtime_ns"] // 10**9, tz=UTC)
        facts.append(("recorded", f"{at:%Y-%m-%d %H:%M:%S} UTC"))
    if manifest.get("start_ns") is not None and manifest.get("end_ns") is not None:
        facts.append(("for", human_us(_duration_ns(manifest) // 1000)))
    facts.append(("waits", f"{totals['waits']:,} for {human_us(totals['wait_ns'] // 1000)}"))
    if kind == "culprit":
        nobody_ns = sum(totals[cause] for cause in CAUSES if cause not in CULPRITS)
        facts.append(("nobody ran", f"{human_us(nobody_ns // 1000)} of that, not in this picture"))
    elif kind != "wait":
        facts.append(("blocked", human_us(totals["blocked_ns"] // 1000)))
    facts.append(("sampled", sampled))
    books_ns = quality.get("kernel_run_delay_ns")
    if books_ns:
        traced_ns = quality.get("traced_run_delay_ns") or 0
        facts.append(("coverage", f"{100 * traced_ns / books_ns:.2f} % of the kernel's books"))
    lost = [quality.get(key) or 0 for key in ("lost_events", "lost_stacks")]
    counted = f"{plural(lost[0], 'event')}, {plural(lost[1], 'stack')}"
    facts.append(("lost", counted if any(lost) else "nothing"))
    return facts


def _warnings(capture: CaptureTables) -> list[str]:
    quality = capture.manifest.get("quality") or {}
    warnings = []
    if not capture.complete:
        warnings.append("the capture was not closed: it ends with its last flush")
    if capture.truncated:
        warnings.append(f"the last rows are cut off: {', '.join(capture.truncated)}")
    for key, what in (
        ("lost_events", "lost: totals hold, some stacks are missing"),
        ("lost_stacks", "lost: what is under [stack lost] has none"),
    ):
        if quality.get(key):
            count = plural(quality[key], key.removeprefix("lost_").removesuffix("s"))
            warnings.append(f"{count} {'was' if quality[key] == 1 else 'were'} {what}")
    degraded = quality.get("degraded") or []
    if degraded:
        first = degraded[0]
        more = f" (and {len(degraded) - 1} more)" if len(degraded) > 1 else ""
        warnings.append(f"degraded: {first.get('what', '?')}, {first.get('why', '?')}{more}")
    return warnings
