"""What a Go service says of itself is read, however odd, and set against a span of time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latrace.analysis.go_runtime import (
    LARGEST,
    TOP,
    GoTextError,
    parse_goroutines,
    parse_memstats,
    summarise_go,
)

S = 1_000_000_000
T = 1_795_263_160 * S

# As Go 1.19 writes them, cut down.
HEAP = """\
heap profile: 1: 112 [2: 1024] @ heap/1048576
1: 112 [1: 112] @ 0x41ab89 0x43adbd 0x46b1c1
#	0x41ab88	runtime.gcenable+0x28	/usr/lib/go-1.19/src/runtime/mgc.go:177


# runtime.MemStats
# Alloc = 33752704
# HeapAlloc = 33752704
# Stack = 360448 / 360448
# NextGC = 67706288
# LastGC = {last}
# PauseNs = [{pauses}]
# PauseEnd = [{ends}]
# NumGC = {count}
# NumForcedGC = 3
# GCCPUFraction = 0.00010334108193562225
# DebugGC = false
# MaxRSS = 43433984
"""
GOROUTINES = """\
goroutine profile: total 61
1 @ 0x430856 0x4656e5
#	0x4656e4	runtime/pprof.runtime_goroutineProfileWithLabels+0x24	/usr/lib/go/mprof.go:846
#	0x66f064	net/http/pprof.handler.ServeHTTP+0x4a4	/usr/lib/go/pprof.go:253

49 @ 0x43b256 0x44bd2c 0x44bd06 0x466ce5
#	0x466ce4	sync.runtime_SemacquireMutex+0x24	/usr/lib/go-1.19/src/runtime/sema.go:77
#	0x46f0f5	sync.(*Mutex).lockSlow+0x165		/usr/lib/go-1.19/src/sync/mutex.go:171
#	0x6a1b24	main.holdLock+0x84			/srv/main.go:118

11 @
# labels: {"a":"b"}
#	0x6a1c24	main.park+0x4	/srv/main.go:137
"""


def heap(*collections: tuple[int, int]) -> str:
    """Statistics after these collections, each (end, pause), since the process began."""
    pauses, ends = [0] * 256, [0] * 256
    for index, (end, pause) in enumerate(collections):
        pauses[index % 256], ends[index % 256] = pause, end
    return HEAP.format(
        last=collections[-1][0] if collections else 0,
        pauses=" ".join(map(str, pauses)),
        ends=" ".join(map(str, ends)),
        count=len(collections),
    )


def test_memory_statistics() -> None:
    stats = parse_memstats(heap((T, 10_000), (T + S, 20_000)))
    assert stats.num_gc == 2
    assert stats.pauses == ((T, 10_000), (T + S, 20_000))
    assert stats.gc_cpu_fraction == 0.00010334108193562225
    assert (stats.heap_bytes, stats.next_gc_bytes, stats.forced) == (33752704, 67706288, 3)
    assert parse_memstats(heap()).pauses == ()


def test_the_ring_goes_round() -> None:
    every = [(T + n * S, n) for n in range(1, 301)]
    stats = parse_memstats(heap(*every))
    assert stats.num_gc == 300
    assert list(stats.pauses) == every[-256:]


def test_goroutines_by_size() -> None:
    crowd = parse_goroutines(GOROUTINES)
    assert crowd.total == 61
    assert [group.count for group in crowd.largest] == [49, 11]  # and the one that told it
    assert crowd.largest[0].stack == (
        "sync.runtime_SemacquireMutex",
        "sync.(*Mutex).lockSlow",
        "main.holdLock",
    )
    assert crowd.largest[1].stack == ("main.park",)


def test_only_so_much_is_told_of_many() -> None:
    frame = "#\t0x1\tmain.f+0x2\t/f.go:1\n"
    text = "goroutine profile: total 5050\n" + "".join(
        f"{count} @ 0x1\n{frame * 50}\n" for count in range(1, 101)
    )
    crowd = parse_goroutines(text)
    assert [group.count for group in crowd.largest] == [100, 99, 98, 97, 96]
    assert len(crowd.largest) == LARGEST
    assert all(group.stack == ("main.f",) * TOP for group in crowd.largest)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "heap profile: 0: 0 [0: 0] @ heap/1\n",
        "\n# runtime.MemStats\n",
        heap((T, 1)).replace("NumGC = 1", "NumGC = many"),
        heap((T, 1)).replace("NumGC = 1", f"NumGC = {'9' * 30}"),
        heap((T, 1)).replace("PauseEnd", "PauseStart"),
        heap((T, 1)).replace("PauseNs = [", "PauseNs = [-"),
        heap((T, 1)).replace("PauseNs = [", "PauseNs = [1 "),
        heap((T, 1)).replace("0]", "0"),
        heap((T, 1)).replace("PauseNs = [1 0", "PauseNs = [1"),
    ],
)
def test_no_memory_statistics(text: str) -> None:
    with pytest.raises(GoTextError):
        parse_memstats(text)


@pytest.mark.parametrize("text", ["", "goroutine profile: total \n", "goroutine profile: total 5"])
def test_no_goroutines(text: str) -> None:
    with pytest.raises(GoTextError):
        parse_goroutines(text)


def test_pauses_within_a_spike() -> None:
    before = heap((T, 5), (T + 1 * S, 7))
    after = heap((T, 5), (T + 1 * S, 7), (T + 2 * S, 11), (T + 3 * S, 13), (T + 9 * S, 17))
    told = summarise_go(before, after, GOROUTINES, T + S, T + 3 * S)
    assert (told["pauses"], told["pause_ns"], told["max_pause_ns"]) == (3, 7 + 11 + 13, 13)
    assert told["longest"][0] == {"end_realtime_ns": T + 3 * S, "pause_ns": 13}
    assert (told["collections"], told["missed"]) == (3, 0)
    assert told["goroutines"] == 61
    assert told["largest"][1] == {"count": 11, "stack": ["main.park"]}
    assert told["heap_bytes"] == 33752704
    assert told["notes"] == []


def test_a_pause_counts_if_any_of_it_lies_within() -> None:
    text = heap((T + S, 100))
    for since, until, count in (
        (T + S, T + 2 * S, 1),
        (T + S + 1, T + 2 * S, 0),
        (T, T + S - 100, 1),
        (T, T + S - 101, 0),
    ):
        assert summarise_go(None, text, None, since, until)["pauses"] == count


def test_more_collections_than_the_ring_holds_are_told() -> None:
    every = [(T + n * S, n) for n in range(1, 601)]
    told = summarise_go(heap(*every[:100]), heap(*every), None, T, T + 1000 * S)
    assert (told["pauses"], told["collections"], told["missed"]) == (356, 500, 244)
    assert told["notes"] == [
        "244 of 500 collections are not in the statistics: Go keeps the last 256"
    ]


def test_a_restart_in_between_leaves_the_difference_out() -> None:
    told = summarise_go(heap((T, 5), (T + S, 7)), heap((T + 2 * S, 11)), None, T, T + 9 * S)
    assert told["collections"] is None
    assert told["pauses"] == 3


def test_what_is_not_there_is_none() -> None:
    told = summarise_go(None, None, None, 0, 1)
    assert told["pauses"] is told["goroutines"] is told["heap_bytes"] is None
    assert told["notes"] == []
    told = summarise_go("x", heap((T, 5)), "y", T, T + S)
    assert told["pauses"] == 1 and told["goroutines"] is None
    assert told["notes"] == [
        "the memory statistics before: no runtime.MemStats",
        "the dump of goroutines: no goroutine profile",
    ]


@given(st.text(max_size=200), st.integers(0, 4000))
def test_nothing_raises(junk: str, at: int) -> None:
    text = heap((T, 5), (T + S, 7))
    crowd = GOROUTINES[:at] + junk + GOROUTINES[at:]
    told = summarise_go(junk, text[:at] + junk + text[at + len(junk) :], crowd, T, T + S)
    assert set(told) == set(summarise_go(None, None, None, 0, 1))


def test_hostile_texts_cost_no_more_than_their_length() -> None:
    """Each of these would take hours if anything were tried again from every place in it."""
    head = "goroutine profile: total 1\n"
    for text in ("1 @" + " 0x1" * 1_000_000, "1 @ 0x1\n" * 1_000_000, "#\t0x1\t" * 1_000_000):
        assert parse_goroutines(head + text).total == 1
    for text in (
        "# PauseNs = [" * 300_000,
        "# NumGC = 1\n" * 300_000,
        "# NumGC = " + "1" * 4_000_000,
    ):
        with pytest.raises(GoTextError):
            parse_memstats("\n# runtime.MemStats\n" + text)
