"""Name the frames of stacks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from latrace.analysis.capture import Capture
from latrace.analysis.names import UNKNOWN, tidy

# Frames that say nothing of what a thread did: those of leaving the CPU, and of kernel threads.
_SWITCHING = frozenset(
    {
        "__schedule",
        "schedule",
        "schedule_idle",
        "schedule_timeout",
        "io_schedule",
        "worker_thread",
        "kthread",
        "ret_from_fork",
        "ret_from_fork_asm",
    }
)
# Of these, those that another thread's turn makes it leave through, in the middle of its work.
_PREEMPTED = frozenset(
    {
        "__cond_resched",
        "preempt_schedule",
        "preempt_schedule_common",
        "preempt_schedule_irq",
        "preempt_schedule_thunk",
    }
)
# The way between the kernel and user space, on x86-64 and arm64.
_BORDER = (
    "asm_",
    "do_notify_resume",
    "do_syscall_64",
    "el0",
    "entry_SYSCALL",
    "exit_to_user_mode",
    "irqentry_exit",
    "raw_irqentry_exit",
    "ret_to_user",
    "syscall_exit_to_user_mode",
)


@dataclass(frozen=True, slots=True)
class NamedStack:
    """One stack, the names of its frames leaf first."""

    kernel: tuple[str, ...] = ()
    user: tuple[str, ...] = ()
    whole: bool = False
    left: str = ""
    """How a thread with this stack left the CPU: `preempted` in the middle of its work, `blocked`
    because it had nothing to do, or "" where the stack does not tell."""

    @property
    def work(self) -> tuple[str, ...]:
        """The frames that tell what it did, leaf first: without the way to the scheduler."""
        kernel = tuple(telling(self.kernel))
        in_user = all(map(is_border, kernel))
        if self.user and (in_user or self.left == "blocked"):
            return self.user
        while kernel and is_border(kernel[0]):
            kernel = kernel[1:]
        return kernel + self.user

    @property
    def function(self) -> str:
        """The innermost function of its work; the file alone where that has no name; else ""."""
        name = self.work[0] if self.work else ""
        return "" if name == UNKNOWN else name.split("+0x", 1)[0]


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
            left=_left([_frame_name(line) for line in kernel], in_user=bool(user)),
        )
    return found


def telling(kernel: Sequence[str]) -> list[str]:
    """Leave out of kernel frames those that say nothing of what the thread did."""
    return [name for name in kernel if name not in _SWITCHING and name not in _PREEMPTED]


def is_border(name: str) -> bool:
    """Whether a kernel function is of the way between the kernel and user space."""
    return name.startswith(_BORDER)


def _left(kernel: Sequence[str], *, in_user: bool) -> str:
    """Tell from its kernel frames, leaf first, how a thread left the CPU."""
    if not kernel:
        return ""
    if any(name in _PREEMPTED for name in kernel):
        return "preempted"
    returning = all(map(is_border, telling(kernel)))
    return "preempted" if in_user and returning else "blocked"


def _frame_name(frame: Mapping[str, Any]) -> str:
    if frame.get("symbol"):
        return tidy(str(frame["symbol"]), jit=frame.get("space") == "jit")
    module = _module(frame)
    return module if module == UNKNOWN else f"{module}+{frame.get('offset') or 0:#x}"


def _module(frame: Mapping[str, Any]) -> str:
    return str(frame.get("module") or UNKNOWN).rsplit("/", 1)[-1]
