"""From a capture's tables to a profile: whose time, in which stack, and how sure we are.

Rows are grouped by stack id in Arrow before any Python sees them: a capture may have ten million
waits, but only as many stacks as were sampled.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, Literal, Protocol, TypeAlias, get_args

import pyarrow as pa
import pyarrow.compute as pc

from latrace.flamegraphs.profile import (
    NOT_SAMPLED,
    Frame,
    FrameKind,
    Profile,
    whole_microseconds,
)
from latrace.flamegraphs.text import human_share, human_us

Kind: TypeAlias = Literal["wait", "offcpu", "waker"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)

BLOCKED: Final = Frame("[blocked]", "marker")
WAITING: Final = Frame("[waiting]", "marker")
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
    "waker": "Blocked time by waker",
}
_SUBTITLES: Final[dict[Kind, str]] = {
    "wait": "Width is time spent waiting for a CPU. A stack shows where the thread left the CPU.",
    "offcpu": "Width is time off the CPU: [blocked] until woken, then [waiting] for a CPU to run "
    "on. A stack shows where the thread left it.",
    "waker": "Width is time spent blocked. Above -- stands what ended it: the waker's stack, "
    "innermost frame first, and at the tip its name.",
}

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


def build_profile(capture: CaptureTables, *, kind: Kind) -> Profile:
    """Return the capture's time by stack.

    wait: process → user frames → `-` → kernel frames, by the time then spent waiting to run.
    offcpu: the same, with `[blocked]` and `[waiting]` apart under the process.
    waker: process → `--` → the waker's frames, innermost first → the waker's name, or
    `[hardirq]`, `[softirq]`, by the time spent blocked.

    Weights are added per stack in nanoseconds and rounded to microseconds together, so that the
    root is the exact total of the in-kernel counters; what was not sampled stands under
    `[not sampled]`. Should the samples exceed the counters (a capture that was cut off), their
    sum is the root, and a warning says so. Raises ValueError for an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"no flame graph kind {kind!r}: it is one of {', '.join(KINDS)}")
    parts: dict[Kind, tuple[str, ...]] = {
        "wait": ("wait_ns",),
        "offcpu": ("wait_ns", "blocked_ns"),
        "waker": ("blocked_ns",),
    }
    totals = _totals(capture)
    counted_ns = sum(totals[column] for column in parts[kind])

    sums: dict[_Stack, int] = {}
    for stack, weight_ns in _weighted_stacks(capture, kind):
        sums[stack] = sums.get(stack, 0) + weight_ns
    sampled_ns = sum(sums.values())
    total_ns = max(counted_ns, sampled_ns)
    warnings = _warnings(capture)
    if sampled_ns > counted_ns:
        warnings.append(
            "the exact totals are older than the samples or missing: the root is the sampled time, "
            f"{human_us(sampled_ns // 1000)}, not the counted {human_us(counted_ns // 1000)}"
        )
    elif sampled_ns < counted_ns:
        sums[(NOT_SAMPLED,)] = total_ns - sampled_ns

    ordered = sorted(sums.items())
    rounded = whole_microseconds([weight for _, weight in ordered], total_ns)
    return Profile(
        title=" · ".join(filter(None, (_TITLES[kind], _targets(capture.manifest)))),
        subtitle=_SUBTITLES[kind],
        stacks=[(stack, us) for (stack, _), us in zip(ordered, rounded, strict=True) if us],
        facts=_facts(capture.manifest, kind, totals, sampled=human_share(sampled_ns, total_ns)),
        warnings=warnings,
    )


# --- stacks and weights -------------------------------------------------------------------------


def _weighted_stacks(capture: CaptureTables, kind: Kind) -> Iterator[tuple[_Stack, int]]:
    comms = _process_names(capture.table("threads", columns=("tid", "tgid", "comm")))
    known = _Stacks(capture)

    def process(tgid: int) -> Frame:
        return Frame(comms.get(tgid) or f"[pid {tgid}]", "process")

    if kind == "waker":
        by = ("tgid", "waker_stack", "waker", "waker_ctx")
        groups = _grouped(capture, by, "blocked_weight_ns")
        known.load(group[1] for *group, _ in groups)
        for tgid, stack, waker, context, weight in groups:
            yield (process(tgid), TO_WAKER, *known.waker(stack, waker, context)), weight
        return
    reasons = [("weight_ns", WAITING)]
    if kind == "offcpu":
        reasons.append(("blocked_weight_ns", BLOCKED))
    for column, reason in reasons:
        groups = _grouped(capture, ("tgid", "stack"), column)
        known.load(stack for _, stack, _ in groups)
        apart = (reason,) if kind == "offcpu" else ()
        for tgid, stack, weight in groups:
            yield (process(tgid), *apart, *known.left_at(stack)), weight


def _grouped(capture: CaptureTables, by: tuple[str, ...], weight: str) -> list[tuple[Any, ...]]:
    """Return (*by, sum of the weight) for each distinct `by` among the waits that weigh anything.

    Sums are exact; a null weight is nothing.
    """
    rows = capture.table("waits", columns=(*by, weight))
    # One dictionary for all chunks: Arrow groups by the codes of a dictionary column.
    rows = rows.filter(pc.greater(pc.fill_null(rows[weight], 0), 0)).unify_dictionaries()
    sums = rows.group_by(list(by)).aggregate([(weight, "sum")])
    columns = (sums[name].to_pylist() for name in (*by, f"{weight}_sum"))
    return list(zip(*columns, strict=True))


class _Stacks:
    """The stacks of a capture as frames, made on demand: only those that weigh something."""

    def __init__(self, capture: CaptureTables) -> None:
        self._capture = capture
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
                split = sum(1 for frame in found if frame and frame.kind == "kernel")  # noqa: PLW2901
            kernel = [frame or Frame("[unknown]", "kernel") for frame in found[:split]]
            user = [frame or Frame("[unknown]", "user") for frame in found[split:]]
            self._parts[stack] = (tuple(kernel), tuple(user), bool(whole))

    def _frames(self, wanted: set[int]) -> dict[int, Frame]:
        rows = self._rows("frames", wanted, ("symbol", "module", "offset", "space"))
        columns = (rows[name].to_pylist() for name in ("id", "symbol", "module", "offset", "space"))
        return {
            id_: _frame(symbol, module or "", offset, space)
            for id_, symbol, module, offset, space in zip(*columns, strict=True)
        }

    def _rows(self, table: str, wanted: set[int], columns: tuple[str, ...]) -> pa.Table:
        rows = self._capture.table(table, columns=("id", *columns))
        ids = pa.array(sorted(wanted), type=rows.schema.field("id").type)
        return rows.filter(pc.is_in(rows["id"], value_set=ids))

    def left_at(self, stack: int | None) -> _Stack:
        """Return where a thread left the CPU, root first."""
        kernel, user, whole = self._parts.get(-1 if stack is None else stack, ((), (), False))
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


def _frame(symbol: str | None, module: str, offset: int | None, space: str | None) -> Frame:
    kinds: dict[str | None, FrameKind] = {"kernel": "kernel", "jit": "jit"}
    base = posixpath.basename(module)
    if symbol:
        name = symbol
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
    """Return the in-kernel counters, added up over the processes."""
    columns = ("waits", "wait_ns", "blocked_ns")
    totals = capture.table("totals", columns=columns)
    return {column: pc.sum(totals[column]).as_py() or 0 for column in columns}


# --- facts for the reader -----------------------------------------------------------------------


def _targets(manifest: Mapping[str, Any], *, shown: int = 3) -> str:
    targets = manifest.get("targets") or []
    named = [f"{target.get('comm', '?')} ({target.get('tgid', '?')})" for target in targets]
    more = [f"{len(named) - shown} more"] if len(named) > shown else []
    return ", ".join(named[:shown] + more)


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
        duration_us = max(0, manifest["end_ns"] - manifest["start_ns"]) // 1000
        facts.append(("for", human_us(duration_us)))
    facts.append(("waits", f"{totals['waits']:,} for {human_us(totals['wait_ns'] // 1000)}"))
    if kind != "wait":
        facts.append(("blocked", human_us(totals["blocked_ns"] // 1000)))
    facts.append(("sampled", sampled))
    books_ns = quality.get("kernel_run_delay_ns")
    if books_ns:
        traced_ns = quality.get("traced_run_delay_ns") or 0
        facts.append(("coverage", f"{100 * traced_ns / books_ns:.2f} % of the kernel's books"))
    lost = [quality.get(key) or 0 for key in ("lost_events", "lost_stacks")]
    facts.append(("lost", f"{lost[0]:,} events, {lost[1]:,} stacks" if any(lost) else "nothing"))
    return facts


def _warnings(capture: CaptureTables) -> list[str]:
    quality = capture.manifest.get("quality") or {}
    warnings = []
    if not capture.complete:
        warnings.append("the capture was not closed: it ends with its last flush")
    if capture.truncated:
        warnings.append(f"the last rows are cut off: {', '.join(capture.truncated)}")
    for key, what in (
        ("lost_events", "events were lost: totals hold, some stacks are missing"),
        ("lost_stacks", "stacks were lost: their time stands under [stack lost]"),
    ):
        if quality.get(key):
            warnings.append(f"{quality[key]:,} {what}")
    degraded = quality.get("degraded") or []
    if degraded:
        first = degraded[0]
        more = f" (and {len(degraded) - 1} more)" if len(degraded) > 1 else ""
        warnings.append(f"degraded: {first.get('what', '?')}, {first.get('why', '?')}{more}")
    return warnings
