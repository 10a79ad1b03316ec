"""All benchmarks, by name, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import module_tables, programs, reader, slowdown, stacks, times, whole
from .context import Context
from .goals import Goal


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One thing to measure, and how to tell of it."""

    title: str
    run: Callable[[Context], dict[str, Any]]
    render: Callable[[dict[str, Any]], list[str]]
    goals: Callable[[dict[str, Any]], list[Goal]]


BENCHMARKS = {
    "programs": Benchmark(
        "Run time of the BPF programs", programs.run, programs.render, programs.goals
    ),
    "pipe": Benchmark(
        "Slowdown of the worst case: two threads that only wake each other, on one CPU",
        slowdown.run_pipe,
        slowdown.render,
        slowdown.pipe_goals,
    ),
    "messaging": Benchmark(
        "Slowdown of many threads on all CPUs",
        slowdown.run_messaging,
        slowdown.render,
        slowdown.messaging_goals,
    ),
    "stream": Benchmark(
        "Slowdown of a TCP stream that loses nothing, 64 KiB an operation",
        slowdown.run_stream,
        slowdown.render,
        slowdown.stream_goals,
    ),
    "requests": Benchmark(
        "Slowdown of TCP requests of one byte, nothing lost",
        slowdown.run_requests,
        slowdown.render,
        lambda _result: [],
    ),
    "reader": Benchmark(
        "The reader's CPU time per event",
        reader.run_readers,
        reader.render_readers,
        reader.reader_goals,
    ),
    "loss": Benchmark(
        "Events lost, by rate and ring", reader.run_loss, reader.render_loss, reader.loss_goals
    ),
    "stacks": Benchmark(
        "What a stack costs, beside perf and py-spy",
        stacks.run,
        stacks.render,
        lambda _result: [],
    ),
    "tables": Benchmark(
        "Unwinding tables of modules",
        module_tables.run,
        module_tables.render,
        lambda _result: [],
    ),
    "whole": Benchmark("Whole stacks, by program", whole.run, whole.render, whole.goals),
    "times": Benchmark("Time to wait, and memory", times.run, times.render, times.goals),
}
