"""Profiles from captures: whose time, in which order of frames, and exact to the microsecond."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from flame_samples import MemoryCapture
from hypothesis import given, settings
from hypothesis import strategies as st

from latrace.analysis.capture import open_capture
from latrace.flamegraphs import KINDS, Frame, Kind, Profile, build_profile
from latrace.flamegraphs.folded import to_folded
from latrace.flamegraphs.profile import share_out, whole_microseconds

FRAMES = [
    {"id": 1, "symbol": "schedule", "module": "[kernel]", "offset": 1, "space": "kernel"},
    {"id": 2, "symbol": "do_syscall_64", "module": "[kernel]", "offset": 1, "space": "kernel"},
    {"id": 3, "symbol": "read", "module": "/lib/libc.so.6", "offset": 1, "space": "user"},
    {"id": 4, "symbol": "main", "module": "/bin/app", "offset": 1, "space": "user"},
    {"id": 5, "symbol": None, "module": "/bin/app", "offset": 0x1234, "space": "user"},
    {"id": 6, "symbol": None, "module": None, "offset": None, "space": "user"},
    {"id": 7, "symbol": "~render", "module": "/app/perf-1.map", "offset": 0, "space": "jit"},
    {"id": 20, "symbol": None, "module": "[unknown]", "offset": 0x7F00, "space": "user"},
    {"id": 21, "symbol": None, "module": "[unknown]", "offset": 0x7F08, "space": "user"},
    {
        "id": 30,
        "symbol": "asm_sysvec_apic_timer_interrupt",
        "module": "[kernel]",
        "space": "kernel",
    },
    {"id": 31, "symbol": "__irq_exit_rcu", "module": "[kernel]", "space": "kernel"},
    {"id": 32, "symbol": "el1h_64_irq", "module": "[kernel]", "space": "kernel"},
    {"id": 33, "symbol": "handle_softirqs", "module": "[kernel]", "space": "kernel"},
    {"id": 34, "symbol": "tcp_sendmsg", "module": "[kernel]", "space": "kernel"},
    {"id": 8, "symbol": "wake_up_q", "module": "[kernel]", "offset": 0, "space": "kernel"},
]
STACKS = [
    {"id": 10, "frames": [1, 2, 3, 4], "whole": True, "kernel_frames": 2},
    {"id": 11, "frames": [1, 2, 7], "whole": False, "kernel_frames": 2},
    {"id": 12, "frames": [1], "whole": True, "kernel_frames": 1},
    {"id": 13, "frames": [5, 6], "whole": True, "kernel_frames": 0},
    {"id": 14, "frames": [1, 99, 98], "whole": True, "kernel_frames": 2},
    {"id": 15, "frames": [], "whole": True, "kernel_frames": 0},
    {"id": 16, "frames": [8, 2, 3, 4], "whole": True, "kernel_frames": 2},
    {"id": 18, "frames": [3, 20], "whole": True, "kernel_frames": 0},
    {"id": 19, "frames": [3, 21], "whole": True, "kernel_frames": 0},
    {"id": 20, "frames": [8, 30, 34, 2, 3], "whole": True, "kernel_frames": 4},
    {"id": 21, "frames": [8, 33, 31, 30, 34, 2], "whole": True, "kernel_frames": 6},
    {"id": 22, "frames": [8, 33, 32, 34, 2], "whole": True, "kernel_frames": 5},
    {"id": 23, "frames": [8, 33, 34, 2, 4], "whole": True, "kernel_frames": 4},
    {"id": 17, "frames": [1, 2, 3], "whole": True, "kernel_frames": None},
]
THREADS = [
    {"tid": 101, "tgid": 100, "comm": "worker"},
    {"tid": 100, "tgid": 100, "comm": "app"},
    {"tid": 201, "tgid": 200, "comm": "orphan"},
]


def capture(waits: list[dict[str, Any]] | pa.Table, **more: Any) -> MemoryCapture:
    if isinstance(waits, pa.Table):
        return MemoryCapture(
            **({"stacks": STACKS, "frames": FRAMES, "threads": THREADS, "waits": waits} | more)
        )
    rows = [{"tgid": 100, "stack": -1, "waker_stack": -1} | row for row in waits]
    totals = more.pop("totals", None)
    if totals is None:
        columns = {"wait_ns": "weight_ns", "blocked_ns": "blocked_weight_ns"}
        totals = [
            {"tgid": 100, "waits": len(rows)}
            | {name: sum(row.get(weight) or 0 for row in rows) for name, weight in columns.items()}
        ]
    tables = {
        "stacks": STACKS,
        "frames": FRAMES,
        "threads": THREADS,
        "totals": totals,
        "waits": rows,
    }
    return MemoryCapture(**(tables | more))


def folded(profile: Profile) -> list[str]:
    return to_folded(profile).splitlines()


@pytest.mark.parametrize(
    ("stack", "line"),
    [
        (10, "app;main;read;-;do_syscall_64;schedule"),
        (11, "app;[truncated];~render;-;do_syscall_64;schedule"),
        (12, "app;[no user stack];-;schedule"),
        (13, "app;[unknown];app+0x1234"),
        (14, "app;[unknown];-;[unknown];schedule"),
        (15, "app;[stack lost]"),
        (17, "app;read;-;do_syscall_64;schedule"),
        (77, "app;[stack lost]"),
        (-1, "app;[stack lost]"),
        (None, "app;[stack lost]"),
    ],
)
def test_where_the_thread_left_the_cpu(stack: int | None, line: str) -> None:
    made = capture([{"stack": stack, "weight_ns": 5_000, "blocked_weight_ns": 7_000}])
    assert folded(build_profile(made, kind="wait")) == [f"{line} 5"]
    comm, _, rest = line.partition(";")
    assert folded(build_profile(made, kind="offcpu")) == [
        f"[blocked];{comm};{rest} 7",
        f"[waiting];{comm};{rest} 5",
    ]


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"waker_stack": 16}, "app;--;wake_up_q;do_syscall_64;-;read;main;bash"),
        ({"waker_stack": 11}, "app;--;schedule;do_syscall_64;-;~render;[truncated];bash"),
        ({"waker_stack": 12}, "app;--;schedule;-;[no user stack];bash"),
        ({"waker_stack": 13}, "app;--;app+0x1234;[unknown];bash"),
        ({"waker_stack": -1}, "app;--;[stack lost];bash"),
        ({"waker_stack": None, "waker": None}, "app;--;[stack lost];[unknown]"),
        ({"waker_stack": 16, "waker_ctx": "hardirq"}, "app;--;wake_up_q;do_syscall_64;[hardirq]"),
        ({"waker_stack": -1, "waker_ctx": "softirq", "waker": ""}, "app;--;[stack lost];[softirq]"),
        (
            {"waker_stack": 20, "waker_ctx": "hardirq", "waker": ""},
            "app;--;wake_up_q;asm_sysvec_apic_timer_interrupt;[hardirq]",
        ),
        (
            {"waker_stack": 21, "waker_ctx": "softirq"},
            "app;--;wake_up_q;handle_softirqs;__irq_exit_rcu;[softirq]",
        ),
        (
            {"waker_stack": 22, "waker_ctx": "softirq"},
            "app;--;wake_up_q;handle_softirqs;el1h_64_irq;[softirq]",
        ),
        (
            {"waker_stack": 23, "waker_ctx": "softirq"},
            "app;--;wake_up_q;handle_softirqs;tcp_sendmsg;do_syscall_64;-;main;bash",
        ),
        (
            {"waker_stack": 23, "waker_ctx": "softirq", "waker": ""},
            "app;--;wake_up_q;handle_softirqs;tcp_sendmsg;do_syscall_64;[softirq]",
        ),
        ({"waker_stack": 12, "waker_ctx": "unknown"}, "app;--;schedule;-;[no user stack];bash"),
    ],
)
def test_who_ended_the_blocked_time(row: dict[str, Any], line: str) -> None:
    """The victim's own stack plays no part; an interrupted thread is neither shown nor named."""
    base = {"stack": 10, "blocked_weight_ns": 3_000, "waker": "bash", "waker_ctx": "task"}
    assert folded(build_profile(capture([base | row]), kind="waker")) == [f"{line} 3"]


def test_addresses_that_belong_to_no_file_are_one_frame() -> None:
    rows = [{"stack": stack, "weight_ns": 2_000} for stack in (18, 19)]
    assert folded(build_profile(capture(rows), kind="wait")) == ["app;[unknown];read 4"]


def test_kinds_and_modules_of_frames() -> None:
    made = capture([{"stack": 11, "weight_ns": 1_000}])
    ((stack, _),) = build_profile(made, kind="wait").stacks
    assert stack == (
        Frame("app", "process"),
        Frame("[truncated]", "marker"),
        Frame("~render", "jit", "/app/perf-1.map"),
        Frame("-", "marker"),
        Frame("do_syscall_64", "kernel", "[kernel]"),
        Frame("schedule", "kernel", "[kernel]"),
    )


def test_processes_are_named_by_their_first_thread_or_any_or_their_pid() -> None:
    rows = [{"tgid": tgid, "stack": 12, "weight_ns": 1_000} for tgid in (100, 200, 300)]
    lines = folded(build_profile(capture(rows), kind="wait"))
    assert [line.split(";")[0] for line in lines] == ["[pid 300]", "app", "orphan"]


def test_rows_without_weight_have_no_stack_to_show() -> None:
    rows = [{"stack": 10, "weight_ns": weight} for weight in (0, None, 9_000)]
    assert folded(build_profile(capture(rows), kind="wait"))[0].endswith(" 9")


def test_the_share_without_a_stack_is_visible_at_the_root() -> None:
    totals = [
        {"tgid": 100, "waits": 5, "wait_ns": 7_000_000, "blocked_ns": 20_000_000},
        {"tgid": 200, "waits": 5, "wait_ns": 1_000_000, "blocked_ns": None},
    ]
    made = capture(
        [{"stack": 12, "weight_ns": 2_000_000, "blocked_weight_ns": 500_000}], totals=totals
    )
    waiting, blocked = "[waiting];[not sampled] 6000", "[blocked];[not sampled] 19500"
    expected: dict[Kind, tuple[int, list[str]]] = {
        "wait": (8_000, ["[not sampled] 6000"]),
        "offcpu": (28_000, [blocked, waiting]),
        "waker": (20_000, ["[not sampled] 19500"]),
        "wall": (28_000, [blocked, waiting]),
    }
    for kind, (total, rest) in expected.items():
        profile = build_profile(made, kind=kind)
        assert profile.total_us == total
        assert [line for line in folded(profile) if "[not sampled]" in line] == rest
        assert not profile.warnings
    assert dict(build_profile(made, kind="wait").facts)["sampled"] == "25.00 %"


def test_samples_beyond_the_counters_are_kept_and_said() -> None:
    made = capture([{"stack": 12, "weight_ns": 2_000_000}], totals=[])
    profile = build_profile(made, kind="wait")
    assert profile.total_us == 2_000
    assert any("the root is the sampled time, 2.00 ms" in warning for warning in profile.warnings)


def test_samples_that_stand_for_a_little_more_by_chance_do_not_move_the_root() -> None:
    """One long sleep on a period's mark stands for a whole period more than it took."""
    waits = [{"stack": 12, "blocked_weight_ns": 1_030_000}]
    totals = [{"tgid": 100, "waits": 1, "wait_ns": 0, "blocked_ns": 1_000_000}]
    profile = build_profile(capture(waits, totals=totals), kind="offcpu")
    assert folded(profile) == ["[blocked];app;[no user stack];-;schedule 1000"]
    assert not profile.warnings
    for waits, complete in (
        ([{"stack": 12, "blocked_weight_ns": 1_060_000}], True),
        ([{"stack": 12, "blocked_weight_ns": 1_030_000}], False),
    ):
        made = capture(waits, totals=totals, manifest={"complete": complete})
        profile = build_profile(made, kind="offcpu")
        assert profile.total_us == waits[0]["blocked_weight_ns"] // 1000
        assert any("the root is the sampled time" in warning for warning in profile.warnings)


def test_a_capture_of_nothing() -> None:
    made = MemoryCapture()
    for kind in KINDS:
        profile = build_profile(made, kind=kind)
        assert (profile.total_us, list(profile.stacks)) == (0, [])
        assert dict(profile.facts)["sampled"] == "0 %"


def test_an_unknown_kind_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="wait, offcpu, culprit, waker, wall"):
        build_profile(MemoryCapture(), kind="cpu")  # type: ignore[arg-type]


rows = st.fixed_dictionaries(
    {
        "tgid": st.sampled_from([100, 200, 300]),
        "stack": st.sampled_from([-1, 10, 11, 12, 13, 77]),
        "waker_stack": st.sampled_from([-1, 11, 16]),
        "waker": st.sampled_from(["bash", "swapper/0", None]),
        "waker_ctx": st.sampled_from(["task", "hardirq", "softirq", None]),
        "weight_ns": st.one_of(st.none(), st.integers(0, 5_000), st.integers(0, 10**15)),
        "blocked_weight_ns": st.one_of(st.none(), st.integers(0, 5_000), st.integers(0, 10**15)),
    }
)


@given(
    st.lists(rows, max_size=40),
    st.integers(0, 10**12),
    st.sampled_from(["wait", "offcpu", "waker"]),
)
@settings(deadline=None)
def test_the_root_is_the_exact_total_and_no_stack_is_off_by_a_microsecond(
    waits: list[dict[str, Any]], missing_ns: int, kind: Kind
) -> None:
    columns = {"wait": ["weight_ns"], "offcpu": ["weight_ns", "blocked_weight_ns"]}.get(
        kind, ["blocked_weight_ns"]
    )
    sampled_ns = sum(row[column] or 0 for row in waits for column in columns)
    total_ns = sampled_ns + missing_ns
    half = total_ns // 2 if kind == "offcpu" else 0
    totals = {
        "wait": {"wait_ns": total_ns},
        "waker": {"blocked_ns": total_ns},
        "offcpu": {"wait_ns": half, "blocked_ns": total_ns - half},
    }[kind]
    profile = build_profile(capture(waits, totals=[{"tgid": 100} | totals]), kind=kind)
    assert profile.total_us == round(Fraction(total_ns, 1000))
    not_sampled = sum(us for stack, us in profile.stacks if stack[-1].name == "[not sampled]")
    assert kind == "offcpu" or abs(not_sampled * 1000 - missing_ns) < 1000
    assert all(weight > 0 for _, weight in profile.stacks)
    assert len({stack for stack, _ in profile.stacks}) == len(profile.stacks)


CAUSES = ("throttled", "irq", "softirq", "idle", "kthread", "own", "other", "unknown")


def caused(**parts: int) -> dict[str, int]:
    """A wait, or totals of waits, with these parts (ns)."""
    return {f"{cause}_ns": parts.get(cause, 0) for cause in CAUSES} | {
        "wait_ns": sum(parts.values())
    }


def test_each_cause_is_a_frame_as_wide_as_its_exact_total() -> None:
    """A sampled wait is split by its own parts, at the root: causes are the first thing seen."""
    rows = [
        {"stack": 12, "weight_ns": 8_000} | caused(other=3_000, idle=1_000),
        {"stack": 13, "weight_ns": 4_000} | caused(throttled=4_000),
    ]
    totals = [
        {"tgid": 100, "blocked_ns": 0}
        | caused(other=20_000, idle=2_000, throttled=4_000, irq=3_000)
    ]
    profile = build_profile(capture(rows, totals=totals), kind="wait")
    assert folded(profile) == [
        "[waiting: idle];app;[no user stack];-;schedule 2",
        "[waiting: irq];[not sampled] 3",
        "[waiting: other];app;[no user stack];-;schedule 6",
        "[waiting: other];[not sampled] 14",
        "[waiting: throttled];app;[unknown];app+0x1234 4",
    ]
    assert profile.total_us == 29


def test_samples_that_by_chance_exceed_a_cause_share_what_it_is() -> None:
    """The root stays the exact total: what is too much in one cause is missing in another."""
    rows = [
        {"stack": 12, "weight_ns": 9_000} | caused(other=1_000),
        {"stack": 13, "weight_ns": 3_000} | caused(other=1_000),
    ]
    totals = [{"tgid": 100} | caused(other=8_000, own=6_000)]
    profile = build_profile(capture(rows, totals=totals), kind="wait")
    assert folded(profile) == [
        "[waiting: other];app;[no user stack];-;schedule 6",
        "[waiting: other];app;[unknown];app+0x1234 2",
        "[waiting: own];[not sampled] 6",
    ]
    assert not profile.warnings


def test_what_the_causes_leave_of_the_waits_is_unknown() -> None:
    totals = [{"tgid": 100, "wait_ns": 10_000, "other_ns": 7_000, "unknown_ns": 1_000}]
    rows = [{"stack": 12, "weight_ns": 2_000, "wait_ns": 5}]  # of before causes
    assert folded(build_profile(capture(rows, totals=totals), kind="wait")) == [
        "[waiting: other];[not sampled] 7",
        "[waiting: unknown];app;[no user stack];-;schedule 2",
        "[waiting: unknown];[not sampled] 1",
    ]


causes = st.fixed_dictionaries({cause: st.integers(0, 10**12) for cause in CAUSES})


@given(st.lists(causes, max_size=20), causes, st.sampled_from(["wait", "offcpu", "wall"]))
@settings(deadline=None)
def test_the_root_is_exact_with_causes_too(
    waits: list[dict[str, int]], more: dict[str, int], kind: Kind
) -> None:
    """Whatever is sampled: each cause has its exact width, and the root is their sum."""
    rows = [
        {"stack": 12, "weight_ns": sum(wait.values()), "blocked_weight_ns": 7_000} | caused(**wait)
        for wait in waits
    ]
    total = {cause: sum(wait[cause] for wait in [*waits, more]) for cause in CAUSES}
    blocked_ns = 10_000 * len(rows)
    totals = [{"tgid": 100, "blocked_ns": blocked_ns} | caused(**total)]
    profile = build_profile(capture(rows, totals=totals), kind=kind)
    exact_ns = sum(total.values()) + (blocked_ns if kind != "wait" else 0)
    assert profile.total_us == round(Fraction(exact_ns, 1000))
    for cause in CAUSES if sum(total.values()) else ():
        drawn = [us for stack, us in profile.stacks if stack[0].name == f"[waiting: {cause}]"]
        # Of two stacks, the sampled one and the rest; one that is rounded to nothing is not drawn.
        assert abs(sum(drawn) * 1000 - total[cause]) < 2 * 1000
    assert not profile.warnings


def ran(cause: str, comm: str, tgid: int, dur_ns: int, sampled: tuple[int, int]) -> dict[str, Any]:
    """A slice; `sampled`: its stack and what that stands for (ns)."""
    return {
        "cause": cause,
        "comm": comm,
        "tgid": tgid,
        "dur_ns": dur_ns,
        "stack": sampled[0],
        "weight_ns": sampled[1],
    }


SLICES = [
    ran("other", "indexer", 900, 6_000, (10, 2_000)),
    ran("other", "indexer", 900, 4_000, (-1, 0)),
    ran("other", "indexer", 901, 1_000, (12, 5_000)),
    ran("own", "worker", 100, 3_000, (10, 3_000)),
    ran("kthread", "kworker/0:1", 33, 2_000, (12, 2_000)),
    {"cause": "irq", "tgid": -1, "dur_ns": 1_000, "stack": -1, "weight_ns": 0},
    {"cause": "softirq", "vector": "NET_RX", "tgid": -1, "dur_ns": 2_000, "stack": -1},
]


def test_culprits_are_as_wide_as_the_time_they_ran() -> None:
    """Their stacks share that; what no slice tells of stands beside, by cause, and is exact."""
    parts = {"other": 20_000, "own": 3_000, "kthread": 2_000, "irq": 2_000, "softirq": 2_000}
    totals = [{"tgid": 100} | caused(idle=60_000, throttled=10_000, **parts)]
    profile = build_profile(capture([], slices=SLICES, totals=totals), kind="culprit")
    assert folded(profile) == [
        "[irq] 1",
        "[softirq];NET_RX 2",
        "indexer (900);main;read;-;do_syscall_64;schedule 2",
        "indexer (900);[not sampled] 8",
        "indexer (901);[no user stack];-;schedule 1",
        "kworker/0:1 [kernel thread];schedule 2",
        "worker (100) [own thread];main;read;-;do_syscall_64;schedule 3",
        "[not itemised];[irq] 1",
        "[not itemised];[other] 9",
    ]
    assert profile.total_us * 1000 == sum(parts.values())
    assert dict(profile.facts)["nobody ran"] == "70 µs of that, not in this picture"


def test_a_culprit_is_one_process_whatever_its_threads_are_called() -> None:
    """As the report has it: by its first thread's name, or else the one that ran longest."""
    slices = [
        ran("other", "java", 50, 1_000, (12, 1_000)) | {"tid": 50},
        ran("other", "C2 CompilerThre", 50, 5_000, (12, 5_000)) | {"tid": 51},
        ran("other", "sh", 60, 1_000, (-1, 0)) | {"tid": 60},
        ran("other", "gzip", 60, 3_000, (-1, 0)) | {"tid": 60},
        ran("other", "pool-1", 70, 2_000, (-1, 0)) | {"tid": 71},
        ran("other", "pool-2", 70, 1_000, (-1, 0)) | {"tid": 72},
    ]
    made = capture([], slices=slices, totals=[{"tgid": 100} | caused(other=13_000)])
    assert folded(build_profile(made, kind="culprit")) == [
        "gzip (60);[not sampled] 4",
        "java (50);[no user stack];-;schedule 6",
        "pool-1 (70);[not sampled] 3",
    ]
    assert folded(build_profile(made, kind="culprit", pids=False))[1].startswith("java;")
    by_thread = folded(build_profile(made, kind="culprit", level="thread"))
    assert "C2 CompilerThre/51;[no user stack];-;schedule 5" in by_thread


def test_functions_of_javascript_are_one_whatever_compiled_them() -> None:
    frames = [
        {"id": 90 + i, "symbol": f"JS:{tier}page /srv/a.js:1:2", "module": "", "space": "jit"}
        for i, tier in enumerate("~^*")
    ]
    stacks = [{"id": 90 + i, "frames": [90 + i], "whole": True} for i in range(3)]
    waits = [{"stack": 90 + i, "weight_ns": 1_000} for i in range(3)]
    profile = build_profile(capture(waits, frames=frames, stacks=stacks), kind="wait")
    assert folded(profile) == ["app;page /srv/a.js:1:2 3"]


def test_slices_that_the_counters_do_not_know_yet_are_all_shown() -> None:
    """A capture that was cut off: its last rows are younger than its last counters."""
    made = capture([], slices=SLICES, totals=[], manifest={"complete": False})
    profile = build_profile(made, kind="culprit")
    assert profile.total_us == 19
    assert not [line for line in folded(profile) if "itemised" in line]


def test_all_time_keeps_the_states_apart() -> None:
    """On-CPU time is what the samples say; the rest is counted."""
    made = capture(
        [{"stack": 12, "weight_ns": 2_000, "blocked_weight_ns": 3_000} | caused(other=2_000)],
        totals=[{"tgid": 100, "blocked_ns": 5_000} | caused(other=2_000)],
        samples=[{"tgid": 100, "stack": 13, "weight_ns": 20_000} for _ in range(3)],
    )
    profile = build_profile(made, kind="wall")
    assert folded(profile) == [
        "[blocked];app;[no user stack];-;schedule 3",
        "[blocked];[not sampled] 2",
        "[on CPU];app;[unknown];app+0x1234 60",
        "[waiting: other];app;[no user stack];-;schedule 2",
    ]


@given(st.integers(0, 10**20), st.lists(st.integers(0, 10**15) | st.floats(0, 1e15), min_size=1))
def test_shares_add_up_and_are_in_proportion(total: int, weights: list[float]) -> None:
    whole = sum(map(Fraction, weights))
    if not whole:
        return
    shares = share_out(total, weights)
    assert sum(shares) == total
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - total * Fraction(weight) / whole) <= len(weights)


@given(st.lists(st.integers(0, 10**13), max_size=60))
def test_largest_remainder(weights: list[int]) -> None:
    whole = whole_microseconds(weights)
    exact, rest = divmod(sum(weights), 1000)
    assert sum(whole) == exact + (rest > 500 or (rest == 500 and exact % 2))
    assert all(abs(us * 1000 - ns) < 1000 for us, ns in zip(whole, weights, strict=True))
    up = [ns % 1000 for us, ns in zip(whole, weights, strict=True) if us > ns // 1000]
    down = [ns % 1000 for us, ns in zip(whole, weights, strict=True) if us == ns // 1000]
    assert not up or not down or min(up) >= max(down)


def test_many_small_stacks_do_not_vanish_from_the_sum() -> None:
    assert sum(whole_microseconds([400] * 1000)) == 400
    assert whole_microseconds([400, 400, 400]) == [1, 0, 0]
    assert whole_microseconds([]) == []
    with pytest.raises(ValueError, match="not the sum"):
        whole_microseconds([1000], 5_000)


def test_chunks_with_different_dictionaries_are_one_column() -> None:
    def chunk(comm: str) -> pa.Table:
        row = {"tgid": 100, "waker_stack": 16, "waker": comm, "blocked_weight_ns": 1_000}
        return MemoryCapture(waits=[row]).table("waits")

    waits = pa.concat_tables([chunk("a"), chunk("b"), chunk("a")])
    assert waits["waker"].num_chunks == 3
    profile = build_profile(capture(waits), kind="waker")
    assert [line.rpartition(";")[2] for line in folded(profile)] == ["a 2", "b 1"]


def test_a_million_rows_add_up_exactly_beyond_what_a_float_holds() -> None:
    count = 1_000_000
    weight = 2**53 // 1000 + 1
    template = MemoryCapture().table("waits")
    columns: dict[str, Any] = {
        "tgid": np.full(count, 100, np.int32),
        "stack": np.arange(count, dtype=np.int32) % 5 + 10,
        "weight_ns": np.full(count, weight, np.uint64),
    }
    waits = pa.table(
        {
            field.name: pa.array(columns[field.name])
            if field.name in columns
            else pa.nulls(count, field.type)
            for field in template.schema
        }
    )
    totals = [{"tgid": 100, "waits": count, "wait_ns": count * weight}]
    profile = build_profile(capture(waits, totals=totals), kind="wait")
    assert profile.total_us == round(count * weight / 1000)
    assert len(profile.stacks) == 5
    assert not profile.warnings


MANIFEST = {
    "host": "box",
    "kernel": "6.1.0",
    "cpus": 4,
    "started_realtime_ns": 1_755_691_201 * 10**9,
    "start_ns": 5_000_000_000,
    "end_ns": 15_000_000_000,
    "targets": [{"comm": name, "tgid": i} for i, name in enumerate("abcde")],
    "quality": {
        "lost_events": 1204,
        "lost_stacks": 0,
        "kernel_run_delay_ns": 1000,
        "traced_run_delay_ns": 998,
        "degraded": [
            {"at_ns": 1, "what": "rows from 50 µs", "why": "rate above budget"},
            {"at_ns": 2, "what": "no stacks", "why": "rate above budget"},
        ],
    },
}


def test_facts_of_the_capture() -> None:
    made = capture([{"stack": 12, "weight_ns": 2_000_000}], manifest=MANIFEST)
    profile = build_profile(made, kind="wait")
    assert profile.title == "Waiting to run · a (0) and 4 more"
    assert profile.facts == [
        ("kind", "wait"),
        ("host", "box"),
        ("kernel", "6.1.0"),
        ("CPUs", "4"),
        ("recorded", "2025-08-20 12:00:01 UTC"),
        ("for", "10.0 s"),
        ("waits", "1 for 2.00 ms"),
        ("sampled", "100 %"),
        ("coverage", "99.80 % of the kernel's books"),
        ("lost", "1,204 events, 0 stacks"),
    ]
    assert profile.warnings == [
        "1,204 events were lost: totals hold, some stacks are missing",
        "degraded: rows from 50 µs, rate above budget (and 1 more)",
    ]
    one = {"manifest": MANIFEST | {"quality": {"lost_stacks": 1}}}
    profile = build_profile(capture([], **one), kind="wait")
    assert dict(profile.facts)["lost"] == "0 events, 1 stack"
    assert profile.warnings == ["1 stack was lost: what is under [stack lost] has none"]
    facts = dict(build_profile(made, kind="offcpu").facts)
    assert (facts["kind"], facts["blocked"]) == ("offcpu", "0 µs")


def test_an_unfinished_capture_says_so() -> None:
    made = MemoryCapture({"complete": False}, truncated=["waits"])
    assert build_profile(made, kind="wait").warnings == [
        "the capture was not closed: it ends with its last flush",
        "the last rows are cut off: waits",
    ]


def test_a_capture_on_disk_gives_the_same_profile(tmp_path: Path) -> None:
    waits = [
        {"stack": 10, "weight_ns": 5_000, "blocked_weight_ns": 7_000, "waker_stack": 16}
        | {"waker": "bash", "waker_ctx": "task"},
        {"stack": 11, "weight_ns": 1_000},
    ]
    made = capture(waits, manifest=MANIFEST)
    made.write(tmp_path)
    on_disk = open_capture(tmp_path)
    for kind in KINDS:
        assert build_profile(on_disk, kind=kind) == build_profile(made, kind=kind)


def test_no_bcc_no_tracer_is_imported() -> None:
    code = (
        "import sys; import latrace.flamegraphs; "
        "print([m for m in sys.modules if m == 'bcc' or m.startswith('latrace.tracer')])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
