"""What a stack at switch-out tells of a thread: what it did, or only where it blocked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sample_capture import write_capture

from latrace.analysis.capture import open_capture
from latrace.analysis.frames import NamedStack, name_stacks

SYSCALL = ["do_syscall_64", "entry_SYSCALL_64_after_hwframe"]
TICK = ["__schedule", "schedule", "irqentry_exit_to_user_mode", "asm_sysvec_apic_timer_interrupt"]


def stack_of(path: Path, kernel: list[str], user: list[str | None]) -> NamedStack:
    names = [*kernel, *user]
    numbers = np.arange(len(names), dtype=np.int32)
    frames = {
        "id": numbers,
        "symbol": names,
        "module": ["/usr/lib/libz.so.1"] * len(names),
        "offset": np.full(len(names), 0x40, np.uint64),
        "space": ["kernel"] * len(kernel) + ["user"] * len(user),
    }
    stacks = {"id": [5], "frames": [numbers.tolist()], "whole": [True]}
    capture = open_capture(write_capture(path / "c", {"frames": frames, "stacks": stacks}))
    return name_stacks(capture, [5])[5]


@pytest.mark.parametrize(
    ("kernel", "user", "told"),
    [
        (TICK, ["compress_block", "main"], ("preempted", "compress_block", 2)),
        (
            ["__schedule", "schedule", "syscall_exit_to_user_mode", *SYSCALL],
            ["write", "main"],
            ("preempted", "write", 2),
        ),
        (
            ["__schedule", "__cond_resched", "bpf_check", "__sys_bpf", *SYSCALL],
            ["syscall"],
            ("preempted", "bpf_check", 5),
        ),
        (
            [
                "__schedule",
                "preempt_schedule_irq",
                "irqentry_exit",
                "asm_sysvec_x",
                "copy",
                *SYSCALL,
            ],
            ["read"],
            ("preempted", "copy", 4),
        ),
        (
            ["__schedule", "schedule", "do_nanosleep", "__x64_sys_clock_nanosleep", *SYSCALL],
            ["clock_nanosleep", "main"],
            ("blocked", "clock_nanosleep", 2),
        ),
        (
            ["__schedule", "schedule", "schedule_timeout", "rcu_gp_fqs_loop", "kthread"],
            [],
            ("blocked", "rcu_gp_fqs_loop", 1),
        ),
        (["__schedule", "schedule", "worker_thread", "kthread"], [], ("blocked", "", 0)),
        (TICK, [None, "main"], ("preempted", "libz.so.1", 2)),
        ([], ["compress_block"], ("", "compress_block", 1)),
        ([], [], ("", "", 0)),
    ],
)
def test_what_a_stack_tells(
    tmp_path: Path, kernel: list[str], user: list[str | None], told: tuple[str, str, int]
) -> None:
    stack = stack_of(tmp_path, kernel, user)
    assert (stack.left, stack.function, len(stack.work)) == told
    assert len(stack.kernel) == len(kernel) and len(stack.user) == len(user)


def test_stacks_that_are_not_there(tmp_path: Path) -> None:
    capture = open_capture(write_capture(tmp_path / "c", {}))
    assert name_stacks(capture, [3]) == {3: NamedStack()}
    assert name_stacks(capture, []) == {}
