"""`latrace watch` of a real Go service by its own metrics, with its own profiles.

What the kernel sees of Go: threads, not goroutines. A goroutine that waits for a lock of Go has no
thread; threads without a goroutine to run wait in futex, as those of a lock would.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from traffic import WORKLOADS, Traffic, build_service
from watching import Watching, said, watching

from latrace.analysis.go_runtime import parse_memstats

# What else a shared machine does can be a spike of its own, or hide one.
pytestmark = pytest.mark.kernel

QUICK = ("--before", "6s", "--after", "2s", "--window", "3s", "--cooldown", "1s")
TOOK = "http_request_duration_seconds"
FILES = [
    "pprof-cpu.pb.gz",
    "pprof-goroutines.txt",
    "pprof-heap-before.txt",
    "pprof-heap.txt",
    "pprof-trace.out",
]
ENDS_S = 60.0


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_service(tmp_path_factory.mktemp("service"))


@dataclass
class Server:
    process: subprocess.Popen[str]
    address: str

    @property
    def pid(self) -> int:
        return self.process.pid

    def by_metrics(self, above: str) -> tuple[object, ...]:
        metrics = ("--metrics", f"http://{self.address}/metrics", "--metric", TOOK)
        return "--pid", self.pid, *metrics, "--quantile", 0.99, "--above", above

    @property
    def pprof(self) -> tuple[str, str]:
        return "--pprof", f"http://{self.address}"


@contextmanager
def serving(*argv: object) -> Iterator[Server]:
    process = subprocess.Popen(list(map(str, argv)), stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        address = process.stdout.readline().strip()
        yield Server(process, address if ":" in address else f"127.0.0.1:{address}")
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def service(program: Path) -> Iterator[Server]:
    with serving(program, "127.0.0.1:0") as server:
        yield server


@contextmanager
def lying(how: str) -> Iterator[str]:
    """A server whose answers to all that is below this address go wrong."""
    with serving(sys.executable, "-I", WORKLOADS / "liar.py") as server:
        yield f"http://{server.address}/{how}"


def explained(watch: Watching, *, count: int = 1) -> dict[str, Any]:
    """What spike.json says once the bundle is explained."""
    watch.wait_for("The service's own", count=count)
    return watch.bundle(count - 1).spike


def whole(watch: Watching, number: int = 0) -> dict[str, Any]:
    """Check that a bundle is whole and explained; returns what spike.json says."""
    bundle = watch.bundle(number)
    capture = bundle.capture
    assert capture.complete and not capture.truncated
    assert capture.waits.num_rows > 0
    assert (bundle.path / "report.html").stat().st_size > 100_000
    spike = bundle.spike
    assert spike["analysis"]["sentences"]
    return spike


def test_a_storm_of_garbage(service: Server, tmp_path: Path) -> None:
    """Requests are slow as the collector has the CPUs: its work is named, its stops are counted."""
    with (
        Traffic(service.address) as traffic,
        watching(
            tmp_path / "s", *service.by_metrics("25ms"), *service.pprof, *QUICK, "--once"
        ) as watch,
    ):
        time.sleep(7)  # as much before it
        traffic.burst("/gc?mb=16&times=5", clients=8, times=6)
        assert watch.ended() == 0
    spike = whole(watch)
    (trigger,) = spike["triggers"]
    assert trigger["kind"] == "metric" and trigger["value"] > trigger["threshold"] == 0.025
    (fired,) = said(watch, "fired: ")
    assert fired.endswith(", over 25.0 ms") and " 0 " not in fired
    profiles = spike["profiles"]
    assert profiles["files"] == FILES and profiles["errors"] == []
    for name in FILES:
        assert (watch.bundles[0] / name).stat().st_size > 0
    gc, analysis = profiles["gc"], spike["analysis"]
    before, after = (
        parse_memstats((watch.bundles[0] / name).read_text())
        for name in ("pprof-heap-before.txt", "pprof-heap.txt")
    )
    assert gc["collections"] == after.num_gc - before.num_gc
    # Each of the requests that made it fire had five collections of its own.
    assert gc["pauses"] >= 5 and gc["at_least"] is False
    assert 0 < gc["max_pause_ns"] < gc["pause_ns"] < gc["seconds"] * 1e9
    assert gc["baseline"] is not None
    assert gc["pauses"] / gc["seconds"] > 2 * gc["baseline"]["pauses"] / gc["baseline"]["seconds"]
    # Where others want the CPUs as well, that its own threads wait for those of the collector
    # weighs more than their work.
    assert analysis["cause"] in {"on_cpu", "own"}, analysis["grew"]
    (work,) = [line for line in analysis["grew"] if line["what"] == "on_cpu"]
    assert work["collector"] > 0.4
    (headline,) = said(watch, "The service's own")
    assert headline.endswith("Go's garbage collector.")
    text = " ".join(analysis["sentences"])
    assert "Go's garbage collector stopped the world" in text


def test_a_convoy_of_goroutines(service: Server, tmp_path: Path) -> None:
    """Nothing of it waits in the kernel but threads without work; the holder's thread computes.

    Who waits, and for whom, is in the dump of goroutines alone.
    """
    with (
        Traffic(service.address) as traffic,
        watching(
            tmp_path / "s", *service.by_metrics("25ms"), *service.pprof, *QUICK, "--once"
        ) as watch,
    ):
        time.sleep(7)
        for _ in range(3):  # so that some are over, and others are not, when it fires
            traffic.burst("/lock?n=40&ms=4", clients=4, times=8)
            time.sleep(0.3)
        assert watch.ended() == 0
    spike = whole(watch)
    analysis, gc = spike["analysis"], spike["profiles"]["gc"]
    # The kernel's part: one goroutine after the other holds the lock, and is busy meanwhile.
    first = analysis["grew"][0]
    assert first["what"] == "on_cpu" and not first["idle"], analysis["grew"]
    assert analysis["cause"] == "on_cpu"
    assert analysis["where"]["function"] == "main.spin"
    for line in analysis["grew"]:
        assert line["what"] != "blocked" or line["idle"], line
    # Go's part.
    largest = gc["largest"][0]
    assert largest["count"] > gc["goroutines"] / 2
    assert "main.holdLock" in largest["stack"]
    assert any(name.startswith("sync.(*Mutex)") for name in largest["stack"])
    told = f"{largest['count']:,} of {gc['goroutines']:,} goroutines waited for a lock in "
    assert analysis["locked"] == f"{told}main.holdLock"
    assert any(line.endswith(f"; {told}main.holdLock.") for line in watch.lines)
    assert analysis["sentences"][1].endswith(f", in main.spin; {told}main.holdLock.")


def test_steady_load_fires_nothing(service: Server, tmp_path: Path) -> None:
    with (
        Traffic(service.address),
        watching(tmp_path / "s", *service.by_metrics("100ms"), *service.pprof, *QUICK) as watch,
    ):
        time.sleep(6)
        assert watch.bundles == []
        watch.process.send_signal(signal.SIGUSR2)  # it was armed, and could have
        watch.wait_for("Asked for")
        assert watch.stop() == 0
    assert len(watch.bundles) == 1
    assert [line for line in said(watch, "!!!") if "fewer" not in line] == []
    spike = whole(watch)
    assert spike["profiles"]["files"] == FILES
    assert spike["profiles"]["gc"]["goroutines"] >= 1


HOW = {
    "silent": "does not end its answer within",
    "drip": "does not end its answer within",
    "junk": "does not speak HTTP there",
    "huge": "answers with more than",
    "failing": "answers 500 Internal Server Error",
}


LIES = {  # tests/workloads/liar.py: EACH
    "pprof-cpu.pb.gz": "silent",
    "pprof-goroutines.txt": "failing",
    "pprof-heap-before.txt": "junk",
    "pprof-heap.txt": "junk",
    "pprof-trace.out": "huge",
}


def test_profiles_that_hang_or_lie(service: Server, tmp_path: Path) -> None:
    """A line for each that is missing; the bundle is whole without, and the watch goes on."""
    with (
        Traffic(service.address) as traffic,
        lying("each") as url,
        watching(tmp_path / "s", *service.by_metrics("25ms"), "--pprof", url, *QUICK) as watch,
    ):
        time.sleep(3)
        for number in (1, 2):
            traffic.burst("/gc?mb=16&times=5", clients=8, times=3)
            spike = explained(watch, count=number)
            assert spike["profiles"]["files"] == []
            time.sleep(2)
        assert watch.stop() == 0
    for number in (0, 1):
        errors = whole(watch, number)["profiles"]["errors"]
        told = {error.partition(":")[0]: error for error in errors}
        assert told.keys() == LIES.keys()
        for name, how in LIES.items():
            assert f" {url}/" in told[name] and HOW[how] in told[name]
            assert watch.lines.count(f"!!! {told[name]}") == 2


def test_metrics_that_hang_or_lie(service: Server, tmp_path: Path) -> None:
    """One line, however long it goes on; whoever fires it otherwise has a whole bundle."""
    with Traffic(service.address), ExitStack() as stack:
        watches = {}
        for how in HOW:
            url = stack.enter_context(lying(how))
            rule = ("--pid", service.pid, "--metrics", url, "--metric", TOOK, "--above", "25ms")
            watches[url] = stack.enter_context(watching(tmp_path / how, *rule, *QUICK))
        for how, (url, watch) in zip(HOW.values(), watches.items(), strict=True):
            watch.wait_for(f"!!! {url} {how}")
        time.sleep(4)
        for watch in watches.values():
            watch.process.send_signal(signal.SIGUSR2)
        for watch in watches.values():
            watch.wait_for("Asked for")
            assert watch.stop() == 0
    for url, watch in watches.items():
        assert len(said(watch, f"!!! {url}")) == 1, watch.lines
        whole(watch)


def test_endpoints_that_die(service: Server, tmp_path: Path) -> None:
    """Both are another process, which is killed: one line for the metrics, one a profile."""
    with (
        serving(service.process.args[0], "127.0.0.1:0") as other,
        Traffic(service.address),
        watching(
            tmp_path / "s", "--pid", service.pid,
            *Server(service.process, other.address).by_metrics("25ms")[2:], *other.pprof, *QUICK,
        ) as watch,
    ):  # fmt: skip
        time.sleep(3)
        watch.process.send_signal(signal.SIGUSR2)
        watch.wait_for("fired: ")
        other.process.kill()  # in the middle of the profiles
        watch.wait_for("Asked for")
        time.sleep(2)
        watch.process.send_signal(signal.SIGUSR2)
        watch.wait_for("Asked for", count=2)
        assert watch.stop() == 0
        first, second = whole(watch, 0)["profiles"], whole(watch, 1)["profiles"]
    assert len(first["files"]) + len(first["errors"]) == len(FILES)
    assert {"pprof-cpu.pb.gz", "pprof-trace.out"}.isdisjoint(first["files"])
    assert second["files"] == []
    gone = "refuses the connection: nobody listens there"
    assert len(second["errors"]) == len(FILES)
    assert all(error.endswith(gone) for error in second["errors"])
    troubles = said(watch, f"!!! http://{other.address}/metrics ")
    assert 1 <= len(troubles) <= 2, troubles  # it hung up, then it refuses
    assert troubles[-1].endswith(gone)
