"""Profiles: ours written and read back, and what a Go service says of itself."""

from __future__ import annotations

from random import Random
from typing import Any, Final

from test_flame_formats import profiles
from test_flame_pprof import read

from latrace.analysis.go_runtime import GoTextError, parse_goroutines, parse_memstats
from latrace.flamegraphs import Profile, to_pprof

from .damage import damaged
from .target import Property, Target, hold


def _profiles() -> Any:
    return profiles


def _check_profile(profile: Profile) -> None:
    data = to_pprof(profile)
    found = read(data)
    hold(sum(found.samples.values()) == profile.total_ns, "another total is read back")
    hold(all(text.isprintable() for text in found.texts), "a text that drives a terminal")
    hold(to_pprof(profile) == data, "other bytes the second time")


_MEMSTATS: Final = (
    b"heap profile: 1: 2 [3: 4] @ heap/1048576\n\n# runtime.MemStats\n# Alloc = 1\n"
    b"# HeapAlloc = 12345\n# NextGC = 4194304\n# NumGC = 3\n# NumForcedGC = 0\n"
    b"# GCCPUFraction = 1.5e-05\n# PauseNs = [10 20 30 0 0]\n# PauseEnd = [5 6 7 0 0]\n"
)
_GOROUTINES: Final = (
    b"goroutine profile: total 12\n8 @ 0x43e0b6 0x40ab12 0x40a8b8\n"
    b"#\t0x4a1\tmain.work+0x21\t/src/main.go:10\n#\t0x4b2\tmain.main+0x2\t/src/main.go:3\n\n"
    b'4 @ 0x43e0b6\n# labels: {"a":"b"}\n#\t0x4c3\tnet.(*conn).Read+0x45\t/net/net.go:183\n\n'
)


def _make_go(random: Random) -> bytes:
    return damaged(random, random.choice((_MEMSTATS, _GOROUTINES)), most=6)


def _check_go(case: bytes) -> None:
    text = case.decode("utf-8", "replace")
    for parse in (parse_memstats, parse_goroutines):
        try:
            parse(text)
        except GoTextError:
            continue


TARGETS = (
    Property("pprof", "profiles written and read back", _profiles, _check_profile),
    Target("go-texts", "damaged profiles of a Go service", _make_go, _check_go),
)
