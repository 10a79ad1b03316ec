"""Words and numbers for a page. Names come from the traced programs and are hostile."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Final

from latrace.analysis.words import duration, fit, share, visible

NBSP: Final = "\N{NO-BREAK SPACE}"
_LONGEST = 240  # columns of a name

CAUSES: Final = {
    "throttled": "its group's CPU quota was used up",
    "irq": "a hardware interrupt was served",
    "softirq": "soft interrupts were served",
    "idle": "the CPU was idle, on its way to the thread: interrupt, idle exit, hypervisor",
    "kthread": "a kernel thread had the CPU",
    "own": "another thread of the same process had the CPU",
    "other": "a thread of another process had the CPU",
    "unknown": "not observed",
}
"""What held a thread back."""

PARTS: Final = {
    "entry": "from the call to the timer being set",
    "timer": "the timer's slack and lateness",
    "run_queue": "ready, waiting for a CPU",
    "return": "on the CPU, until back in the program",
}
"""What the overshoot of a sleep call is made of."""

_POLICIES = frozenset({"fifo", "rr", "deadline"})


def time(ns: float) -> str:
    """Say a time: `12.3 µs`, the unit on the same line as the number."""
    return duration(ns).replace(" us", " µs").replace(" ", NBSP)


def percent(part: float, whole: float) -> str:
    """Say a share on one line."""
    return share(part, whole).replace(" ", NBSP)


def prose(text: object) -> str:
    """Make words of the report in a terminal part of a page: units in full, never apart."""
    spaced = re.sub(r"(?<=\d) (?=(ns|us|ms|s|min|h|%)(?!\w))", NBSP, str(text))
    return escape(spaced.replace(f"{NBSP}us", f"{NBSP}µs"), quote=True)


def safe(text: object) -> str:
    """Make any text part of a page: visible, of bounded length, and nothing but text."""
    return escape(fit(visible(str(text)), _LONGEST), quote=True)


def name(text: object) -> str:
    """Make a name part of a page; it cannot turn the direction of what stands beside it."""
    return f"<bdi class=name>{safe(text)}</bdi>"


def who(line: Mapping[str, Any]) -> str:
    """Name a culprit: a process or a thread with its id, or a kind of interrupt."""
    cause = line.get("cause")
    if cause == "irq":
        return "hardware interrupts"
    if cause == "softirq":
        vector = line.get("vector")
        return f"soft interrupts{f' {name(vector)}' if vector else ''}"
    if cause == "kthread":
        comm = name(line.get("comm") or "a kernel thread")
        return f"{comm} <span class=soft>(tid{NBSP}{safe(line.get('tid'))})</span>"
    label = name(line.get("comm") or "(name not recorded)")
    tid, tgid = line.get("tid"), line.get("tgid")
    if line.get("threads", 1) != 1 or tid == tgid:
        number = f"pid{NBSP}{safe(tgid)}"
    else:
        number = f"pid{NBSP}{safe(tgid)}, tid{NBSP}{safe(tid)}"
    return f"{label} <span class=soft>({number})</span>"


def scheduling(line: Mapping[str, Any]) -> str:
    """Say under which policy a culprit ran, if that is why it came first."""
    policy, prio = line.get("policy"), line.get("prio")
    if policy not in _POLICIES:
        return ""
    if policy != "deadline" and isinstance(prio, int) and 0 <= prio < 99:
        return f"SCHED_{str(policy).upper()} {99 - prio}"
    return f"SCHED_{str(policy).upper()}"


def frames(stack: Sequence[object], *, shown: int = 5) -> str:
    """Write the frames of a stack nearest to its leaf, the leaf first."""
    listed = [name(frame) for frame in stack[:shown]]
    if len(stack) > shown:
        listed.append(f"{len(stack) - shown:,} more")
    return " <span class=soft>←</span> ".join(listed)
