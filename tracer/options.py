"""What to trace and how: the options of a tracer, already resolved and checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DEFAULT_SLOW_NS = 100_000
DEFAULT_STACK_BUDGET_PER_S = 500
DEFAULT_RING_BYTES = 16 << 20
ALL_ROWS_RING_BYTES = 64 << 20
"""Where every wait gets a row: room for a third of a second of a million a second, so that a batch
can be written meanwhile (scripts/bench --only loss)."""
DEFAULT_CPU_SAMPLES_HZ = 49
"""Not a divisor of any tick rate: in step with the tick, some code would never be seen."""


PARTS = ("causes", "culprits", "interrupts", "sleeps", "tcp")
"""What can be left out of a trace, to make it cheaper."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Everything the tracer needs to know; made by `latrace.tracer.targets.resolve`.

    All ids are those of the initial PID namespace, which is what the kernel's probes see.
    """

    all_sockets: bool = False
    """Every TCP socket of the host, and nothing but sockets: there are no targets."""
    must_see_tcp: bool = False
    """Refuse where this kernel does not tell of retransmits, instead of going without."""
    pids: tuple[int, ...] = ()
    """Processes (thread-group ids): all their threads, present and future."""
    tids: tuple[int, ...] = ()
    """Single threads."""
    comms: tuple[str, ...] = ()
    """Command names as the kernel has them (15 bytes): exact, or a prefix with a trailing `*`."""
    cgroups: tuple[Path, ...] = ()
    """Absolute cgroup directories."""
    children: bool = False
    """Follow what the targets fork from now on (descendants alive now are in `pids`)."""
    min_ns: int | None = None
    """Shortest wait that gets a row. None: adapts to the rate; 0: every wait, never adapt."""
    slow_ns: int = DEFAULT_SLOW_NS
    """A wait of at least this long gets its stack, within the budget."""
    stacks: bool = True
    user_copies: bool = True
    """Copy the top of the targets' stacks, to walk what was compiled without frame pointers."""
    stack_budget_per_s: int = DEFAULT_STACK_BUDGET_PER_S
    cpu_samples_hz: int = DEFAULT_CPU_SAMPLES_HZ
    """How often each CPU is looked at for what a target does there; 0: never."""
    without: frozenset[str] = frozenset()
    """Which of `PARTS` are left out. Without causes there are no culprits and no interrupts."""
    ring_bytes: int = DEFAULT_RING_BYTES
    """Size of the ring buffer: a power of two, at least one page."""
    duration_s: float | None = None
    """Stop after this long; None: until a signal or the end of all targets."""
