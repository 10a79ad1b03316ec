"""Inlined functions and short names in a flame graph: frames of their own, in every format."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from flame_samples import MemoryCapture, drawn
from test_flame_pprof import fields, numbers, pprof

from latrace.flamegraphs import KINDS, Profile, Shape, build_profile, render, to_pprof
from latrace.flamegraphs.folded import to_folded

APP, LIBC = "/bin/app", "/lib/libc.so.6"
FRAMES = [
    {"id": 1, "symbol": "schedule", "module": "[kernel]", "space": "kernel"},
    {"id": 2, "symbol": "nanosleep", "module": LIBC, "space": "user"},
    {"id": 3, "symbol": "void work<int>(int)", "module": APP, "space": "user"},
    {"id": 4, "symbol": "void work<long>(long)", "module": APP, "space": "user"},
    {"id": 5, "symbol": "main", "module": APP, "space": "user"},
    {"id": 6, "symbol": "~f <anonymous> (x)", "module": "[jit]", "space": "jit"},
]
STACKS = [
    {"id": 10, "frames": [1, 2, 3, 5], "whole": True, "kernel_frames": 1},
    {"id": 11, "frames": [1, 2, 4, 5], "whole": True, "kernel_frames": 1},
    {"id": 12, "frames": [1, 6, 5], "whole": True, "kernel_frames": 1},
]
INLINED = {3: ("nap(long)", "step<int>(int)"), 5: ("run()",)}
"""Frame id → innermost first."""


def capture() -> MemoryCapture:
    waits = [
        {
            "tid": 100, "tgid": 100, "stack": stack, "wait_ns": ns, "weight_ns": ns,
            "blocked_weight_ns": ns, "other_ns": ns, "waker": "bash", "waker_ctx": "task",
            "waker_stack": stack,
        }
        for stack, ns in [(10, 4_000), (11, 2_000), (12, 1_000)]
    ]  # fmt: skip
    totals = [
        {"tgid": 100, "waits": 3, "wait_ns": 7_000, "blocked_ns": 7_000, "other_ns": 7_000}
    ]  # fmt: skip
    return MemoryCapture(
        waits=waits, totals=totals, stacks=STACKS, frames=FRAMES,
        threads=[{"tid": 100, "tgid": 100, "comm": "app"}],
    )  # fmt: skip


def profile(kind: Any = "wait", **options: Any) -> Profile:
    return build_profile(capture(), kind=kind, **options)


def folded(made: Profile) -> list[str]:
    return to_folded(made).splitlines()


def test_inlined_functions_stand_between_their_caller_and_their_callee() -> None:
    assert folded(profile(inlined=INLINED)) == [
        "[waiting: other];app;main;run();void work<int>(int);step<int>(int);nap(long);nanosleep;-;"
        "schedule 4",
        "[waiting: other];app;main;run();void work<long>(long);nanosleep;-;schedule 2",
        "[waiting: other];app;main;run();~f <anonymous> (x);-;schedule 1",
    ]
    line = (
        "app;--;schedule;-;nanosleep;nap(long);step<int>(int);void work<int>(int);run();main;bash"
    )
    assert f"{line} 4" in folded(profile("waker", inlined=INLINED))
    assert folded(profile(inlined=INLINED, shape=Shape(reverse=True)))[0] == (
        "schedule;-;nanosleep;nap(long);step<int>(int);void work<int>(int);run();main;app;"
        "[waiting: other] 4"
    )


def test_short_names_make_functions_one_but_leave_jit_code_alone() -> None:
    assert folded(profile(inlined=INLINED, short_names=True)) == [
        "[waiting: other];app;main;run;work;nanosleep;-;schedule 2",
        "[waiting: other];app;main;run;work;step;nap;nanosleep;-;schedule 4",
        "[waiting: other];app;main;run;~f <anonymous> (x);-;schedule 1",
    ]
    assert folded(profile(short_names=True)) == [
        "[waiting: other];app;main;work;nanosleep;-;schedule 6",
        "[waiting: other];app;main;~f <anonymous> (x);-;schedule 1",
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_is_the_same(kind: Any) -> None:
    bare = profile(kind)
    for options in ({"inlined": INLINED}, {"short_names": True, "inlined": INLINED}):
        assert profile(kind, **options).total_ns == bare.total_ns


def test_options_know_them_as_functions() -> None:
    line = folded(profile(inlined=INLINED, shape=Shape(hide=["^work", "void"], only=["nap"])))
    assert line[0].startswith("[waiting: other];app;main;run();step<int>(int);nap(long);nanosleep")
    assert line[1] == "[not matched] 3"
    start = {3: ("f", "f", "void work<int>(int)")}
    collapsed = folded(profile(inlined=start, shape=Shape(collapse=True)))
    assert "void work<int>(int);void work<int>(int);f;nanosleep" in collapsed[0]


def test_a_picture_tells_them_apart() -> None:
    svg = render(profile(inlined=INLINED), ".svg").decode()
    kinds = {box.name: box.kind for box in drawn(svg)}
    assert kinds["nap(long)"] == kinds["run()"] == "inlined"
    assert kinds["main"] == "user"
    assert ">inlined</text>" in svg and ".latrace-flame .inlined rect" in svg
    assert ">inlined</text>" not in render(profile(), ".svg").decode()


def locations(data: bytes) -> list[list[list[str]]]:
    """Each sample, leaf first: the functions of each location, innermost first."""
    parts = list(fields(gzip.decompress(data)))
    texts = [value.decode() for number, value in parts if number == 6]
    functions = {f[1]: texts[f[2]] for f in (dict(fields(v)) for n, v in parts if n == 5)}
    lines = {
        dict(fields(value))[1]: [
            functions[dict(fields(line))[1]] for field, line in fields(value) if field == 4
        ]
        for number, value in parts
        if number == 4
    }
    return [
        [lines[id_] for id_ in numbers(dict(fields(value))[1])]
        for number, value in parts
        if number == 2
    ]


def test_pprof_has_them_as_lines_of_one_location() -> None:
    inside = [["schedule"], ["-"]]
    outside = [["run()", "main"], ["app"], ["[waiting: other]"]]
    assert locations(to_pprof(profile(inlined=INLINED))) == [
        [*inside, ["nanosleep"], ["nap(long)", "step<int>(int)", "void work<int>(int)"], *outside],
        [*inside, ["nanosleep"], ["void work<long>(long)"], *outside],
        [*inside, ["~f <anonymous> (x)"], *outside],
    ]


@pytest.mark.parametrize(
    "options", [{"shape": Shape(reverse=True)}, {"kind": "waker"}, {"shape": Shape(hide=["void"])}]
)
def test_in_other_orders_they_are_no_part_of_what_they_are_not_in(options: dict[str, Any]) -> None:
    data = to_pprof(profile(inlined=INLINED, **options))
    places = {tuple(place) for sample in locations(data) for place in sample}
    assert ("step<int>(int)",) in places or (
        "nap(long)",
        "step<int>(int)",
        "run()",
        "main",
    ) in places
    assert not any("nanosleep" in place for place in places if len(place) > 1)


def test_go_reads_them(tmp_path: Path) -> None:
    text = pprof(to_pprof(profile(inlined=INLINED)), tmp_path, "-top", "-nodefraction=0")
    assert "nap(long) (inline)" in text and "step<int>(int) (inline)" in text
    assert "main (inline)" not in text


def test_speedscope_has_their_names() -> None:
    document = json.loads(render(profile(inlined=INLINED), ".speedscope.json"))
    assert {"name": "nap(long)", "file": APP} in document["shared"]["frames"]
