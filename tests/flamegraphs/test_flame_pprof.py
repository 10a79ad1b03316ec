"""pprof profiles: read back by `go tool pprof`, and by a decoder of our own where Go is not."""

from __future__ import annotations

import gzip
import os
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from flame_samples import APP, DASH, HOSTILE, SMALL, kernel, user
from hypothesis import given
from hypothesis import strategies as st
from test_flame_formats import profiles
from test_flame_shape import captured

from latrace.flamegraphs import KINDS, Frame, Kind, Profile, Shape, build_profile, render, to_pprof
from latrace.flamegraphs.pprof import _varint

WORKER = Frame("worker/101", "thread")
CAUSE = Frame("[waiting: other]", "state")
LIBC = Frame("read", "user", "/usr/lib/libc.so.6")
EXACT = [
    ((WORKER, CAUSE, *user("main"), LIBC, DASH, *kernel("schedule")), 1_234_567_891),
    ((WORKER, CAUSE, *user("main", "work")), 700),
    ((CAUSE, Frame("[not sampled]", "marker")), 64_000_000_009),
]
KNOWN = Profile(
    title="Waiting to run · app (42)",
    stacks=[(stack, ns // 1000) for stack, ns in EXACT],
    exact=EXACT,
    kind="wait",
    started_ns=1_700_000_000_123_456_789,
    duration_ns=5_500_000_000,
    period_ns=1,
    facts=[("host", "box")],
    warnings=["7 events were lost"],
)


# --- as the format's own tool reads it ----------------------------------------------------------


def pprof(data: bytes, folder: Path, *options: str) -> str:
    if shutil.which("go") is None:
        pytest.skip("needs the distribution's golang-go")
    path = folder / "p.pb.gz"
    path.write_bytes(data)
    command = ["go", "tool", "pprof", *options, str(path)]
    home = {**os.environ, "HOME": str(folder), "TZ": "UTC"}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=home).stdout


def test_go_reads_samples_functions_files_and_times(tmp_path: Path) -> None:
    raw = pprof(to_pprof(KNOWN), tmp_path, "-raw")
    head, _, rest = raw.partition("Samples:\n")
    samples, _, rest = rest.partition("Locations\n")
    locations, _, mappings = rest.partition("Mappings\n")
    assert head.splitlines() == [
        "Comment: Waiting to run · app (42)",
        "Comment: host: box",
        "Comment: !!! 7 events were lost",
        "PeriodType: wait nanoseconds",
        "Period: 1",
        "Time: 2023-11-14 22:13:20.123456789 +0000 UTC",
        "Duration: 5.5s",
    ]
    names = {
        match[1]: (match[3], match[4], match[2])
        for match in re.finditer(r"(\d+): 0x0 (?:M=(\d+) )?(.+) (\S*):0 s=0\(\)", locations)
    }
    assert samples.splitlines()[0] == "wait/nanoseconds[dflt]"
    found = re.findall(r" *(\d+): ([\d ]+) \n +(.*)", samples)
    told = {
        int(value): ([names[id_] for id_ in ids.split()], labels) for value, ids, labels in found
    }
    tip, main = ("schedule", "[kernel]", "2"), ("main", "/usr/bin/app", "1")
    thread, cause = ("worker/101", "", None), ("[waiting: other]", "", None)
    both = "cause:[other] state:[waiting: other] thread:[worker/101]"
    assert told == {
        1_234_567_891: (
            [tip, ("-", "", None), ("read", "/usr/lib/libc.so.6", "3"), main, cause, thread],
            both,
        ),
        700: ([("work", "/usr/bin/app", "1"), main, cause, thread], both),
        64_000_000_009: (
            [("[not sampled]", "", None), cause],
            "cause:[other] state:[waiting: other]",
        ),
    }
    assert mappings.splitlines() == [
        "1: 0x0/0x0/0x0 /usr/bin/app  [FN]",
        "2: 0x0/0x0/0x0 [kernel]  [FN]",
        "3: 0x0/0x0/0x0 /usr/lib/libc.so.6  [FN]",
    ]


def top(data: bytes, folder: Path, *options: str) -> dict[str, tuple[int, int]]:
    """Return (flat, cumulative) nanoseconds by function."""
    text = pprof(data, folder, "-top", "-unit=ns", "-nodefraction=0", *options)
    rows = re.findall(r"^ *(\d+)(?:ns)? +\S+ +\S+ +(\d+)(?:ns)? +\S+ +(.+)$", text, re.MULTILINE)
    return {name: (int(flat), int(cumulative)) for flat, cumulative, name in rows}


def test_go_adds_it_up_to_the_nanosecond(tmp_path: Path) -> None:
    data = to_pprof(KNOWN)
    assert "Total samples = 65.23s" in pprof(data, tmp_path, "-top")
    found = top(data, tmp_path)
    assert found["schedule"] == (1_234_567_891, 1_234_567_891)
    assert found["work"] == (700, 700)
    assert found["main"] == (0, 1_234_568_591)
    assert found["[waiting: other]"] == (0, 65_234_568_600) == (0, KNOWN.total_ns)
    assert sum(flat for flat, _ in found.values()) == KNOWN.total_ns
    assert top(data, tmp_path, "-tagfocus=thread=worker/101")["main"] == (0, 1_234_568_591)


def test_go_reads_hostile_names_and_nothing_at_all(tmp_path: Path) -> None:
    text = pprof(to_pprof(HOSTILE), tmp_path, "-top", "-nodefraction=0", "-nodecount=1000")
    assert "\x1b" not in text and "\u202e" not in text and "\0" not in text
    assert r"nul\x00bell\x07esc\x1b[31m" in text
    assert "Samples:\nwait/nanoseconds[dflt]\nLocations" in pprof(
        to_pprof(Profile(title="", stacks=[], kind="wait")), tmp_path, "-raw"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_go_reads_every_kind_of_a_capture(kind: Kind, tmp_path: Path) -> None:
    made = build_profile(captured(), kind=kind, level="thread", shape=Shape(reverse=True))
    data = to_pprof(made)
    assert f"\n{kind}/nanoseconds[dflt]\n" in pprof(data, tmp_path, "-raw")
    assert sum(flat for flat, _ in top(data, tmp_path).values()) == made.total_ns


# --- field by field -----------------------------------------------------------------------------


def fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (number, integer or bytes) of a message."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        tag = varint()
        if tag & 7 == 0:
            yield tag >> 3, varint()
        else:
            assert tag & 7 == 2
            size = varint()
            yield tag >> 3, data[at : at + size]
            at += size
    assert at == len(data)


def numbers(packed: bytes) -> list[int]:
    out, value, shift = [], 0, 0
    for byte in packed:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            out.append(value)
            value = shift = 0
    return out


@dataclass
class Read:
    """A decoded profile: its texts, and its samples as (root first names and files) → ns."""

    texts: list[str]
    samples: dict[tuple[tuple[str, str], ...], int]


def read(data: bytes) -> Read:
    of: dict[int, list[Any]] = defaultdict(list)
    for number, value in fields(gzip.decompress(data)):
        of[number].append(value)
    texts = [text.decode("utf-8") for text in of[6]]
    assert texts[0] == "" and len(set(texts)) == len(texts)
    functions = {f[1]: (texts[f[2]], texts[f.get(4, 0)]) for f in map(dict, map(fields, of[5]))}
    mappings = {m[1]: texts[m[5]] for m in map(dict, map(fields, of[3]))}
    locations = {}
    for location in map(dict, map(fields, of[4])):
        locations[location[1]] = functions[dict(fields(location[4]))[1]]
        if location.get(2):
            assert mappings[location[2]] == locations[location[1]][1]
    assert set(functions) == set(locations) and 0 not in functions and 0 not in mappings
    samples: dict[tuple[tuple[str, str], ...], int] = defaultdict(int)
    for sample in of[2]:
        of_sample = dict(field for field in fields(sample) if field[0] < 3)
        ids = numbers(of_sample.get(1, b""))
        (value,) = numbers(of_sample[2])
        samples[tuple(locations[id_] for id_ in reversed(ids))] += value
    return Read(texts, samples)


@given(profiles)
def test_any_profile_reads_back_with_its_total(profile: Profile) -> None:
    found = read(to_pprof(profile))
    assert sum(found.samples.values()) == profile.total_ns == 1000 * profile.total_us
    assert all(text.isprintable() for text in found.texts)


def test_the_same_stacks_as_in_any_format() -> None:
    assert read(to_pprof(SMALL)).samples == {
        tuple((frame.name, frame.module) for frame in stack): us * 1000
        for stack, us in SMALL.stacks
    }


def test_the_same_bytes_each_time() -> None:
    assert render(KNOWN, "x.pb.gz") == to_pprof(KNOWN) == to_pprof(KNOWN)
    assert to_pprof(KNOWN)[:8] == b"\x1f\x8b\x08\x00\x00\x00\x00\x00"  # no name, no time


@given(st.integers(-(2**63), 2**64 - 1))
def test_numbers_of_any_size(number: int) -> None:
    assert numbers(_varint(number)) == [number % 2**64]


def test_weights_of_a_capture_are_not_rounded() -> None:
    made = build_profile(captured(), kind="wait", level="thread")
    assert sorted(ns for _, ns in made.stacks_ns) == [1_000, 1_000, 1_500, 2_500, 4_000]
    assert made.total_ns == 10_000
    assert (made.started_ns, made.duration_ns, made.period_ns) == (
        1_700_000_000_123_456_789, 10**9, 1,
    )  # fmt: skip
    names = {name for stack in read(to_pprof(made)).samples for name, _ in stack}
    assert {APP.name} & names == set() and "app/100" in names


def test_the_period_of_samples_on_the_cpu_is_the_clock_s() -> None:
    made = captured()
    made.manifest["options"] = {"cpu_samples_hz": 49}
    assert build_profile(made, kind="wall").period_ns == 20_408_163
    assert build_profile(made, kind="offcpu").period_ns == 1
