"""Name the frames of stacks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from latrace.analysis.capture import Capture

_UNKNOWN = "[unknown]"
# What every thread that leaves the CPU is in: it says nothing of what it did.
_SWITCHING = frozenset(
    {
        "__schedule",
        "schedule",
        "schedule_idle",
        "schedule_timeout",
        "preempt_schedule_common",
        "preempt_schedule_irq",
        "__cond_resched",
        "io_schedule",
        "worker_thread",
        "kthread",
        "ret_from_fork",
        "ret_from_fork_asm",
    }
)


@dataclass(frozen=True, slots=True)
class NamedStack:
    """One stack, the names of its frames leaf first."""

    kernel: tuple[str, ...] = ()
    user: tuple[str, ...] = ()
    whole: bool = False
    leaf: str = ""
    """Its innermost function in user space, or else in the kernel where that tells anything;
    only the file where the function has no name."""


def name_stacks(capture: Capture, numbers: Iterable[int]) -> dict[int, NamedStack]:
    """Look up stacks by `stacks.id`; one that the capture lacks has no frames."""
    found = {number: NamedStack() for number in numbers}
    if not found:
        return found
    wanted = pa.array(sorted(found), pa.int32())
    stacks = capture.table("stacks", columns=["id", "frames", "whole"])
    stacks = stacks.filter(pc.is_in(stacks["id"], wanted)).to_pylist()
    used = {frame for stack in stacks for frame in stack["frames"] or []}
    frames = capture.table("frames", columns=["id", "symbol", "module", "offset", "space"])
    frames = frames.filter(pc.is_in(frames["id"], pa.array(sorted(used), pa.int32())))
    named = {frame["id"]: frame for frame in frames.to_pylist()}
    for stack in stacks:
        lines = [named.get(number, {}) for number in stack["frames"] or []]
        kernel = [line for line in lines if line.get("space") == "kernel"]
        user = [line for line in lines if line.get("space") != "kernel"]
        found[stack["id"]] = NamedStack(
            kernel=tuple(map(_frame_name, kernel)),
            user=tuple(map(_frame_name, user)),
            whole=stack["whole"] is True,
            leaf=_leaf(kernel, user),
        )
    return found


def telling(kernel: Sequence[str]) -> list[str]:
    """Leave out of a kernel stack, leaf first, what every thread that leaves the CPU is in."""
    return [name for name in kernel if name not in _SWITCHING]


def _leaf(kernel: list[Mapping[str, Any]], user: list[Mapping[str, Any]]) -> str:
    if user:
        name = str(user[0].get("symbol") or "") or _module(user[0])
        return "" if name == _UNKNOWN else name
    return next(filter(None, telling([str(line.get("symbol") or "") for line in kernel])), "")


def _frame_name(frame: Mapping[str, Any]) -> str:
    if frame.get("symbol"):
        return str(frame["symbol"])
    module = _module(frame)
    return module if module == _UNKNOWN else f"{module}+{frame.get('offset') or 0:#x}"


def _module(frame: Mapping[str, Any]) -> str:
    return str(frame.get("module") or _UNKNOWN).rsplit("/", 1)[-1]
