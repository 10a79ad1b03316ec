"""What the frames that are no functions mean, for who points at one."""

from __future__ import annotations

from typing import Final

from latrace.flamegraphs.profile import Frame

_WAITING: Final = {
    "throttled": "the CPU quota of its group was used up",
    "irq": "its CPU served a hardware interrupt",
    "softirq": "its CPU served soft interrupts",
    "idle": "its CPU was idle, on its way to the thread",
    "kthread": "a kernel thread had its CPU",
    "own": "another thread of its own process had its CPU",
    "other": "a thread of another process had its CPU",
    "unknown": "the cause was not observed",
}
_MEANINGS: Final = {
    "[blocked]": "off the CPU, with nothing to do until it was woken",
    "[on CPU]": "running, as a clock sampled it",
    "[waiting]": "ready to run, but not on a CPU",
    "[irq]": "hardware interrupts",
    "[softirq]": "soft interrupts: the kernel's work that an interrupt put off",
    "[hardirq]": "woken by a hardware interrupt: a timer, a device",
    "[not itemised]": "exact time of which it was not recorded who ran",
    "[not sampled]": "exact time of which no stack was taken",
    "[not matched]": "the time of the stacks that were not asked for",
    "[hidden]": "the time of stacks all of whose frames are hidden",
    "[stack lost]": "its stack could not be kept",
    "[truncated]": "the functions outside of those shown are not known",
    "[no user stack]": "the functions of the program are not known",
    "-": "beyond are functions of the kernel",
    "--": "beyond is who woke it",
} | {f"[waiting: {cause}]": f"ready to run, but {why}" for cause, why in _WAITING.items()}


def meaning_of(frame: Frame) -> str:
    """Say what a frame of ours means; "" for what the traced program named."""
    return _MEANINGS.get(frame.name, "") if frame.kind in ("state", "marker") else ""
