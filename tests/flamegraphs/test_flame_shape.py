"""Stacks picked, thinned, folded up and turned round: by known answers, and no time lost."""

from __future__ import annotations

import time
from typing import Any

import pytest
from flame_samples import APP, DASH, HOSTILE, HOSTILE_NAMES, SMALL, MemoryCapture, kernel, user
from hypothesis import given
from hypothesis import strategies as st

from latrace.flamegraphs import (
    KINDS,
    BadPatternError,
    Frame,
    Kind,
    Level,
    Profile,
    Shape,
    SlowPatternError,
    build_profile,
    shape,
)
from latrace.flamegraphs.folded import to_folded
from latrace.flamegraphs.profile import NOT_ITEMISED, NOT_SAMPLED

LEVELS: tuple[Level, ...] = ("process", "thread", "none")


def folded(stacks: dict[tuple[Frame, ...], int]) -> list[str]:
    return to_folded(Profile(title="t", stacks=list(stacks.items()))).splitlines()


def small(**options: Any) -> list[str]:
    return folded(Shape(**options).of(dict(SMALL.stacks)))


def test_leaf_first() -> None:
    assert small(reverse=True) == [
        "[stack lost];app 75000",
        "main;app 25000",
        "schedule;do_syscall_64;-;read;main;app 500000",
        "schedule;futex_wait;-;main;lock;main;app 300000",
        "~handle app.js:1;node 60000",
        "[not sampled] 40000",
    ]


def test_only_stacks_that_match_and_the_rest_in_one_frame() -> None:
    assert small(only=["^lo", "handle"]) == [
        "app;main;lock;main;-;futex_wait;schedule 300000",
        "node;~handle app.js:1 60000",
        "[not matched] 600000",
        "[not sampled] 40000",
    ]
    assert small(only=["^LO"])[0] == "[not matched] 960000"
    assert small(only=["^app$"], hide=["a"])[-2:] == ["[not matched] 60000", "[not sampled] 40000"]


def test_hidden_frames_leave_their_time_to_their_callers() -> None:
    assert small(hide=["^(do_|futex|schedule)", "^-$", "^lock$", "^read$"]) == [
        "app;[stack lost] 75000",
        "app;main 525000",
        "app;main;main 300000",
        "node;~handle app.js:1 60000",
        "[not sampled] 40000",
    ]
    assert small(hide=["."]) == ["[hidden] 960000", "[not sampled] 40000"]


def test_names_match_as_they_are_shown() -> None:
    """An escape is text; a name without end is as long as in the picture."""
    names = HOSTILE_NAMES
    stacks = {(Frame(name, "user"),): 1 for name in names}
    assert folded(Shape(only=[r"\\x1b\[31m"]).of(stacks))[-1] == f"[not matched] {len(names) - 1}"
    long = {(Frame("std::" * 10**6 + "end", "user"),): 7}
    assert folded(Shape(only=["^std::.*….*end$"]).of(long))[0].endswith("end 7")


@pytest.mark.parametrize("pattern", ["(", "[a-", "*", "a{9999999999999999999}", "(?P<x", "\\"])
def test_what_is_no_pattern_is_told(pattern: str) -> None:
    with pytest.raises(BadPatternError, match=r"\w{2}"):
        Shape(only=[pattern])
    with pytest.raises(BadPatternError):
        Shape(hide=[pattern])


def test_a_pattern_that_would_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shape, "PATTERN_SECONDS", 0.2)
    stacks = {user("a" * 60 + "b"): 5}
    began = time.monotonic()
    with pytest.raises(SlowPatternError, match=r"\(a\+\)\+\$.* took over 0.2 s") as caught:
        Shape(hide=["x", "(a+)+$"]).of(stacks)
    assert time.monotonic() - began < 5
    assert caught.value.pattern == "(a+)+$"
    assert Shape(only=["x"]).of(stacks)  # and the clock is off again


COLLAPSED = [
    ("f f f", "f"),
    ("f f g g f", "f g f"),
    ("f g f g", "f g"),
    ("a f g f g f g b", "a f g b"),
    ("f g f", "f g f"),
    ("f g h f g h", "f g h f g h"),
    ("f f g f g g", "f g"),
    ("_start __libc_start_main@@GLIBC_2.34 __libc_start_call_main main work", "main work"),
    ("clone3 start_thread worker", "worker"),
    ("main pthread_create clone3", "main pthread_create clone3"),
    ("main clone work", "main clone work"),
    ("start_thread", "start_thread"),
    ("runtime.goexit main.(*S).serve runtime.gopark", "main.(*S).serve runtime.gopark"),
    ("runtime.goexit.abi0 runtime.main main.main main.work", "main.main main.work"),
    (
        "runtime.mcall runtime.park_m runtime.schedule runtime.findRunnable runtime.stopm"
        " runtime.mPark runtime.futex",
        "runtime.findRunnable runtime.stopm runtime.futex",
    ),
    (
        "runtime.clone.abi0 runtime.mstart1 runtime.schedule runtime.startlockedm runtime.stopm"
        " runtime.notesleep runtime.futexsleep runtime.futex.abi0",
        "runtime.stopm runtime.futex.abi0",
    ),
    (
        "Builtins_JSEntry handle Builtins_CEntry_Return1_ArgvOnStack_BuiltinExit"
        " v8::internal::Builtin_HandleApiCall(int,_v8::internal::Isolate*)"
        " v8::internal::FunctionCallbackArguments::Call(v8::internal::CallHandlerInfo)"
        " v8::internal::MicrotaskQueue::RunMicrotasks(v8::internal::Isolate*)"
        " Builtins_RunMicrotasks Builtins_AsyncFunctionAwaitResolveClosure later"
        " Builtins_ArrayPrototypeSort Builtins_CallFunction_ReceiverIsAny compare",
        "handle later Builtins_ArrayPrototypeSort compare",
    ),
    ("runtime.goexit app.f runtime.mallocgc app.g", "app.f runtime.mallocgc app.g"),
    (
        "__libc_start_call_main node::Start(int,_char**) uv_run uv__io_poll uv__stream_io"
        " v8::Function::Call(v8::Local<v8::Context>) v8::internal::Execution::Call(int)"
        " v8::internal::(anonymous_namespace)::Invoke(v8::internal::Isolate*)"
        " Builtins_JSEntry Builtins_JSEntryTrampoline JS:*handle",
        "uv__stream_io JS:*handle",
    ),
    (
        "_start Py_BytesMain pymain_run_python.constprop.0 _PyEval_EvalFrameDefault py::f"
        " _PyEval_EvalFrameDefault.cold _PyFunction_Vectorcall py::f"
        " _PyObject_MakeTpCall time_sleep",
        "py::f time_sleep",
    ),
    ("PyEval_Me my_PyEval_x", "my_PyEval_x"),
]


@pytest.mark.parametrize(("before", "after"), COLLAPSED)
def test_collapse(before: str, after: str) -> None:
    def stack(text: str) -> tuple[Frame, ...]:
        return user(*(name.replace("_namespace", " namespace") for name in text.split()))

    tip = (DASH, *kernel("schedule"))
    assert shape.collapsed((APP, *stack(before), *tip)) == (APP, *stack(after), *tip)
    waker = (*stack(before)[::-1], APP)
    assert shape.collapsed(waker, outermost_last=True) == (*stack(after)[::-1], APP)


SYSCALL = ("entry_SYSCALL_64_after_hwframe", "do_syscall_64")
IN_KERNEL = [
    ((*SYSCALL, "do_epoll_wait", "schedule", "__schedule"), ("do_epoll_wait",)),
    (
        ("asm_sysvec_apic_timer_interrupt", "irqentry_exit_to_user_mode", "schedule", "__schedule"),
        ("irqentry_exit_to_user_mode",),
    ),
    (
        (*SYSCALL, "vfs_read", "asm_common_interrupt", "preempt_schedule_irq", "__schedule"),
        ("vfs_read", "asm_common_interrupt"),
    ),
    (("ret_from_fork", "kthread", "kswapd", "schedule", "__schedule"), ("kswapd",)),
    (("kthread", "worker_thread", "schedule"), ("kthread", "worker_thread", "schedule")),
    (
        (*SYSCALL, "do_futex", "futex_wake", "wake_up_q", "try_to_wake_up"),
        ("do_futex", "futex_wake"),
    ),
    (
        ("sock_def_readable", "__wake_up_sync_key", "__wake_up_common", "ep_poll_callback",
         "__wake_up_sync", "__wake_up_common", "ep_autoremove_wake_function", "try_to_wake_up"),
        ("sock_def_readable", "__wake_up_sync_key", "__wake_up_common", "ep_poll_callback"),
    ),
    (("try_to_wake_up",), ("try_to_wake_up",)),
]  # fmt: skip


@pytest.mark.parametrize(("before", "after"), IN_KERNEL)
def test_collapse_leaves_of_the_kernel_what_it_did(
    before: tuple[str, ...], after: tuple[str, ...]
) -> None:
    """Not how it got into the kernel, to its scheduler, or to the thread that it wakes."""
    stack = (APP, *user("main", "f"), DASH)
    assert shape.collapsed((*stack, *kernel(*before))) == (*stack, *kernel(*after))
    waker = (*kernel(*before[::-1]), DASH, *user("f", "main"), APP)
    expected = (*kernel(*after[::-1]), DASH, *user("f", "main"), APP)
    assert shape.collapsed(waker, outermost_last=True) == expected


def test_collapse_leaves_what_is_no_function_of_the_program() -> None:
    lost = Frame("[stack lost]", "marker")
    twice = (APP, APP, lost, lost, DASH, *kernel("clone3", "runtime.main"))
    assert shape.collapsed(twice) == twice
    assert shape.collapsed(kernel("f", "f")) == kernel("f")
    other = (*user("f"), Frame("f", "user", "/usr/lib/other.so"))
    assert shape.collapsed(other) == other
    assert shape.collapsed(()) == ()


names = st.sampled_from(
    ["a", "b", "c", "main", "_start", "runtime.mcall", "uv_run", "schedule", "do_syscall_64",
     "try_to_wake_up", *HOSTILE_NAMES[:9]]
)  # fmt: skip
some = st.one_of(
    st.builds(Frame, names, st.sampled_from(["user", "jit", "kernel", "state", "marker"])),
    st.sampled_from([NOT_SAMPLED, NOT_ITEMISED, APP, DASH]),
)
stacks = st.dictionaries(st.lists(some, max_size=8).map(tuple), st.integers(0, 10**15), max_size=12)
patterns = st.lists(st.sampled_from(["a", "^b$", ".", "^$", "main|c", r"\[", "not sampled", "é"]))
shapes = st.builds(
    Shape,
    only=patterns, hide=patterns, collapse=st.booleans(), reverse=st.booleans(),
)  # fmt: skip


@given(stacks, shapes)
def test_no_shape_changes_the_whole(given_: dict[tuple[Frame, ...], int], asked: Shape) -> None:
    once = asked.of(given_)
    assert sum(once.values()) == sum(given_.values())
    if not any(asked.hide):
        for marker in (NOT_SAMPLED, NOT_ITEMISED):
            before = sum(weight for stack, weight in given_.items() if marker in stack)
            assert sum(weight for stack, weight in once.items() if marker in stack) == before


@given(st.lists(some, max_size=20).map(tuple))
def test_what_is_collapsed_stays_so(stack: tuple[Frame, ...]) -> None:
    once = shape.collapsed(stack)
    assert shape.collapsed(once) == once
    assert set(once) <= set(stack)
    assert [f for f in once if f.kind in ("state", "marker")] == [
        f for f in stack if f.kind in ("state", "marker")
    ]


def test_hostile_names_go_through_every_shape() -> None:
    shaped = Shape(only=["."], hide=["^zzz"], collapse=True, reverse=True).of(dict(HOSTILE.stacks))
    assert sum(shaped.values()) == HOSTILE.total_us


# --- of captures --------------------------------------------------------------------------------

FRAMES = [
    {"id": 1, "symbol": "schedule", "module": "[kernel]", "space": "kernel"},
    {"id": 3, "symbol": "f", "module": "/bin/app", "space": "user"},
    {"id": 4, "symbol": "main", "module": "/bin/app", "space": "user"},
    {"id": 5, "symbol": "_start", "module": "/bin/app", "space": "user"},
]
STACKS = [
    {"id": 10, "frames": [1, 3, 4, 5], "whole": True, "kernel_frames": 1},
    {"id": 11, "frames": [1, 3, 3, 3, 4, 5], "whole": True, "kernel_frames": 1},
]
THREADS = [
    {"tid": 100, "tgid": 100, "comm": "app"},
    {"tid": 101, "tgid": 100, "comm": "worker"},
    {"tid": 200, "tgid": 200, "comm": "app"},
]


def captured() -> MemoryCapture:
    """Two processes of one name, one with a second thread; not all of it sampled."""
    waits = [
        {
            "tid": tid, "tgid": tgid, "stack": stack, "wait_ns": ns, "weight_ns": ns,
            "blocked_weight_ns": 10 * ns, "other_ns": ns, "waker": "bash", "waker_ctx": "task",
            "waker_stack": 10,
        }
        for tid, tgid, stack, ns in [
            (100, 100, 10, 1_500), (101, 100, 10, 2_500), (200, 200, 11, 4_000),
        ]
    ]  # fmt: skip
    slices = [
        {
            "tid": tid, "tgid": 300, "comm": comm, "cause": cause, "dur_ns": ns,
            "weight_ns": ns, "stack": 11,
        }
        for tid, comm, cause, ns in [
            (300, "hog", "other", 3_000), (301, "hog", "other", 2_000), (302, "hog2", "own", 700),
        ]
    ]  # fmt: skip
    slices += [{"tid": -1, "tgid": -1, "cause": "irq", "dur_ns": 1_000, "stack": -1}]
    slices += [
        {"tid": 301, "tgid": 400, "comm": "hog", "cause": "other", "dur_ns": 1_000, "stack": -1}
    ]
    totals = [
        {
            "tgid": 100, "waits": 3, "wait_ns": 10_000, "blocked_ns": 100_000, "other_ns": 9_000,
            "irq_ns": 1_000,
        }
    ]  # fmt: skip
    samples = [{"tid": 101, "tgid": 100, "stack": 10, "weight_ns": 5_000}]
    return MemoryCapture(
        {"start_ns": 0, "end_ns": 10**9, "started_realtime_ns": 1_700_000_000_123_456_789},
        waits=waits, slices=slices, totals=totals, samples=samples, threads=THREADS,
        stacks=STACKS, frames=FRAMES,
    )  # fmt: skip


def of_capture(kind: Kind, **options: Any) -> list[str]:
    return to_folded(build_profile(captured(), kind=kind, **options)).splitlines()


def test_per_thread_puts_the_thread_before_the_cause() -> None:
    assert of_capture("wait", level="thread") == [
        "[waiting: irq];[not sampled] 1",
        "[waiting: other];[not sampled] 1",
        "app/100;[waiting: other];_start;main;f;-;schedule 2",
        "app/200;[waiting: other];_start;main;f;f;f;-;schedule 4",
        "worker/101;[waiting: other];_start;main;f;-;schedule 2",
    ]
    assert of_capture("wall", level="thread")[-3:] == [
        "worker/101;[blocked];_start;main;f;-;schedule 25",
        "worker/101;[on CPU];_start;main;f;-;schedule 5",
        "worker/101;[waiting: other];_start;main;f;-;schedule 2",
    ]
    assert of_capture("waker", level="thread") == [
        "app/100;--;schedule;-;f;main;_start;bash 15",
        "app/200;--;schedule;-;f;main;_start;bash 40",
        "worker/101;--;schedule;-;f;main;_start;bash 25",
        "[not sampled] 20",
    ]
    assert of_capture("culprit", level="thread") == [
        "[irq] 1",
        "hog/300;_start;main;f;f;f;-;schedule 3",
        "hog/301;_start;main;f;f;f;-;schedule 2",
        "hog/301;[not sampled] 1",
        "hog2/302 [own thread];_start;main;f;f;f;-;schedule 1",
        "[not itemised];[other] 3",
    ]


def test_processes_of_one_name_are_one_and_merged_threads_have_no_level() -> None:
    assert of_capture("wait") == [
        "[waiting: irq];[not sampled] 1",
        "[waiting: other];app;_start;main;f;-;schedule 4",
        "[waiting: other];app;_start;main;f;f;f;-;schedule 4",
        "[waiting: other];[not sampled] 1",
    ]
    assert of_capture("wait", level="none", shape=Shape(collapse=True)) == [
        "[waiting: irq];[not sampled] 1",
        "[waiting: other];main;f;-;schedule 8",
        "[waiting: other];[not sampled] 1",
    ]
    assert of_capture("waker", level="none", shape=Shape(collapse=True)) == [
        "schedule;-;f;main;bash 80",
        "[not sampled] 20",
    ]
    assert [line.split(";")[0] for line in of_capture("culprit", level="none")] == [
        "[irq] 1", "hog", "hog", "hog2 [own thread]", "[not itemised]"
    ]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", LEVELS)
def test_every_option_leaves_the_exact_total(kind: Kind, level: Level) -> None:
    whole = build_profile(captured(), kind=kind)
    assert whole.total_us
    for options in (
        {}, {"reverse": True}, {"collapse": True}, {"only": ["main"]}, {"hide": ["main", "^a"]},
        {"only": ["^app", "hog"], "hide": ["f"], "collapse": True, "reverse": True},
    ):  # fmt: skip
        made = build_profile(captured(), kind=kind, level=level, shape=Shape(**options))  # type: ignore[arg-type]
        assert made.total_us == whole.total_us


def test_the_picture_says_what_was_done() -> None:
    asked = Shape(only=["x"], hide=["y"], collapse=True, reverse=True)
    facts = build_profile(captured(), kind="wait", shape=asked).facts
    assert facts[-3:] == [("only", "x"), ("hidden", "y"), ("stacks", "collapsed, leaf first")]
