"""A real Go service, here and in a network of its own: its answers, its percentiles, its profiles.

And servers that lie, at the same places: whatever they do ends in a line, and leaves nothing.
"""

from __future__ import annotations

import gzip
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from network import Host, two_hosts
from traffic import WORKLOADS, build_service

from latrace.analysis.go_runtime import parse_memstats, summarise_go
from latrace.tracer.watch import metrics as metrics_module
from latrace.tracer.watch import pprof
from latrace.tracer.watch.fetch import Fetch, Fetcher, Url
from latrace.tracer.watch.metrics import Metrics, parse_metric
from latrace.tracer.watch.pprof import FILES, Profiles, parse_pprof_url

pytestmark = pytest.mark.kernel

TOOK = "http_request_duration_seconds"


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workload tests/workloads/service, compiled by the distribution's Go."""
    return build_service(tmp_path_factory.mktemp("service"))


@dataclass
class Place:
    """A network namespace to start things in: our own where there is no host."""

    host: Host | None

    def start(self, *argv: object) -> subprocess.Popen[str]:
        command = list(map(str, argv))
        if self.host is None:
            return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        return self.host.start(*command, stdout=subprocess.PIPE, text=True)


@pytest.fixture(params=["here", "in a network of its own"])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    if request.param == "here":
        yield Place(None)
        return
    with two_hosts() as (host, _):
        yield Place(host)


@dataclass
class Server:
    """What serves, by its process and its port."""

    process: subprocess.Popen[str]
    port: int

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    @property
    def pid(self) -> int:
        return self.process.pid

    def at(self, target: str) -> Url:
        return Url("127.0.0.1", self.port, target)


def serve(place: Place, *argv: object) -> Server:
    """Start a server that prints where it listens."""
    process = place.start(*argv)
    assert process.stdout is not None
    return Server(process, int(process.stdout.readline().rpartition(":")[2]))


def lie(place: Place) -> Server:
    return serve(place, sys.executable, "-I", WORKLOADS / "liar.py")


def ours() -> tuple[int, set[str]]:
    """Descriptors of this process, and its children."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return len(list(Path("/proc/self/fd").iterdir())), set(children)


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """Fail a test after which a descriptor or a child is left."""
    before = ours()
    yield
    assert ours() == before


@pytest.fixture
def service(place: Place, program: Path) -> Iterator[Server]:
    with serve(place, program, ":0") as server:
        yield server


@pytest.fixture
def liar(place: Place) -> Iterator[Server]:
    with lie(place) as server:
        yield server


def finish(fetcher: Fetcher, *fetches: Fetch) -> None:
    while not all(fetch.done for fetch in fetches):
        if fetcher.fileno() >= 0:
            select.select([fetcher], [], [], 0.05)
        fetcher.poll()


class Load:
    """Asks the service for something, from the service's own network."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._fetcher = Fetcher(server.pid, workers=8)

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: object) -> None:
        self._fetcher.close()

    def ask(self, target: str, times: int = 1) -> list[Fetch]:
        return [
            self._fetcher.submit(self._server.at(target), timeout_s=60, max_bytes=1 << 20)
            for _ in range(times)
        ]

    def poll(self) -> None:
        self._fetcher.poll()

    def run(self, target: str, times: int = 1) -> str:
        for _ in range(times):
            (fetch,) = self.ask(target)
            finish(self._fetcher, fetch)
            assert fetch.error is None, fetch.error
        return fetch.body.decode()


def scrape(metrics: Metrics) -> bool:
    """Step until an answer was taken; whether it was a reading."""
    scrapes, metrics.trouble = metrics.scrapes, "nothing yet"
    while metrics.trouble == "nothing yet":
        if metrics.fileno() >= 0:
            select.select([metrics], [], [], 0.05)
        metrics.step()
    return metrics.scrapes > scrapes


def collect(profiles: Profiles) -> tuple[dict[str, bytes], list[str]]:
    while not profiles.poll():
        if profiles.fileno() >= 0:
            select.select([profiles], [], [], 0.05)
    return profiles.take()


# --- its answers -------------------------------------------------------------------------------


def test_answers_come_from_the_targets_own_network(service: Server) -> None:
    with Fetcher(service.pid) as fetcher:
        for host in ("127.0.0.1", "::1", "localhost"):
            url = Url(host, service.port, "/fast")
            fetch = fetcher.submit(url, timeout_s=20, max_bytes=100)
            finish(fetcher, fetch)
            assert (fetch.error, fetch.body) == (None, b"done\n")
        namespaces = [
            Path(f"/proc/{pid}/ns/net").readlink() for pid in (fetcher.pid, service.pid, "self")
        ]
        assert namespaces[0] == namespaces[1]
        status = Path(f"/proc/{fetcher.pid}/status").read_text()
        assert "CapEff:\t0000000000000000\n" in status and "Uid:\t65534\t" in status
    if namespaces[1] == namespaces[2]:
        return
    with Fetcher(os.getpid()) as fetcher:  # not from where we are ourselves
        fetch = fetcher.submit(service.at("/fast"), timeout_s=20, max_bytes=100)
        finish(fetcher, fetch)
        assert fetch.error == "refuses the connection: nobody listens there"


# --- its percentiles ---------------------------------------------------------------------------


def test_the_percentile_is_of_the_requests_since(service: Server) -> None:
    """60 ms lie between the bounds 50 ms and 100 ms, and the count is exact."""
    spec = parse_metric(TOOK + '{handler="/spin"}', 0.5)
    url = service.at("/metrics")
    with (
        Load(service) as load,
        Metrics(url, spec, service.pid, window_s=600, every_s=0.01) as of_spin,
        Metrics(url, parse_metric(TOOK, 0.01), service.pid, window_s=600, every_s=0.01) as of_all,
    ):
        load.run("/spin?ms=1", 20)  # before our time
        for metrics in (of_spin, of_all):
            assert scrape(metrics)
            assert metrics.latency.quantile() is None
        load.run("/spin?ms=60", 10)
        load.run("/fast", 200)
        for metrics in (of_spin, of_all):
            while True:  # until one that was asked for after all these
                asked_s = time.monotonic()
                assert scrape(metrics)
                if metrics._asked_s >= asked_s:
                    break
        spin, everything = of_spin.latency.quantile(), of_all.latency.quantile()
        assert spin is not None and spin[1] == 10
        assert spin[0] > 0.05
        assert everything is not None and everything[1] == 210
        assert everything[0] < spin[0]


def test_a_service_that_is_gone_and_comes_back(place: Place, program: Path) -> None:
    spec = parse_metric(TOOK + '{handler="/fast"}', 0.5)
    with serve(place, program, "127.0.0.1:0") as first:
        metrics = Metrics(first.at("/metrics"), spec, first.pid, window_s=600, every_s=0.01)
        with metrics, Load(first) as load:
            load.run("/fast", 50)
            assert scrape(metrics)
            first.process.kill()
            first.process.wait()
            while scrape(metrics):  # one may have been under way
                pass
            assert metrics.trouble is not None and metrics.trouble.startswith(
                f"http://127.0.0.1:{first.port}/metrics "
            )
            while "refuses the connection" not in metrics.trouble:
                assert not scrape(metrics)
            with serve(place, program, f"127.0.0.1:{first.port}"):
                while not scrape(metrics):
                    pass
                assert metrics.trouble is None
                assert metrics.latency.quantile() is None  # counted from nothing again
                load.run("/fast", 7)
                while metrics.latency.quantile() is None or metrics.latency.quantile()[1] < 7:
                    assert scrape(metrics)
                told = metrics.latency.quantile()
                assert told is not None and told[1] == 7


# --- its profiles ------------------------------------------------------------------------------


def text_of(*command: object) -> str:
    return subprocess.run(
        list(map(str, command)), check=True, capture_output=True, text=True
    ).stdout


def test_profiles_while_it_collects_garbage(service: Server, tmp_path: Path) -> None:
    with Load(service) as load, Profiles(parse_pprof_url(str(service.at("/"))), service.pid) as got:
        before = parse_memstats(load.run("/debug/pprof/heap?debug=1"))
        since_ns = time.time_ns()
        assert got.start(1)
        load.run("/gc?mb=16&times=20")
        files, errors = collect(got)
        until_ns = time.time_ns()
    assert errors == []
    assert sorted(files) == sorted(FILES)
    texts = {name: body.decode() for name, body in files.items() if name.endswith(".txt")}
    told = summarise_go(
        texts[pprof.HEAP_BEFORE], texts[pprof.HEAP], texts[pprof.GOROUTINES], since_ns, until_ns
    )
    after = parse_memstats(texts[pprof.HEAP])
    assert after.forced is not None and before.forced is not None
    assert after.forced - before.forced == 20
    # Every collection since has a pause in the span, and none from before it has.
    assert told["pauses"] == after.num_gc - before.num_gc >= 20
    assert 0 < told["max_pause_ns"] < told["pause_ns"] < until_ns - since_ns
    assert told["notes"] == [] and told["missed"] == 0
    assert told["goroutines"] >= 1

    # Go's own tools read what was fetched.
    for name, body in files.items():
        (tmp_path / name).write_bytes(body)
    assert "samples/count" in text_of("go", "tool", "pprof", "-raw", tmp_path / pprof.CPU)
    scheduled = subprocess.run(
        ["go", "tool", "trace", "-pprof=sched", tmp_path / pprof.TRACE],
        check=True,
        capture_output=True,
    ).stdout
    assert gzip.decompress(scheduled)


def test_the_cpu_profile_has_the_function_that_computes(service: Server, tmp_path: Path) -> None:
    with Load(service) as load, Profiles(parse_pprof_url(str(service.at("/"))), service.pid) as got:
        assert got.start(2)
        spinning = load.ask("/spin?ms=2500")
        files, errors = collect(got)
        finish(load._fetcher, *spinning)
    assert errors == []
    (tmp_path / pprof.CPU).write_bytes(files[pprof.CPU])
    top = text_of("go", "tool", "pprof", "-top", "-cum", tmp_path / pprof.CPU)
    assert "main.spin" in top


def test_goroutines_of_a_lock_convoy(service: Server) -> None:
    with Load(service) as load, Profiles(parse_pprof_url(str(service.at("/"))), service.pid) as got:
        load.run("/park?n=30")
        convoy = load.ask("/lock?n=120&ms=40")
        while int(load.run("/metrics").split("\ngo_goroutines ")[1].split()[0]) < 150:
            load.poll()
        got.start(1)
        files, errors = collect(got)
        assert errors == []
        told = summarise_go(None, None, files[pprof.GOROUTINES].decode(), 0, 1)
        finish(load._fetcher, *convoy)
    waiting, parked = told["largest"][:2]
    assert waiting["count"] > 30 == parked["count"]
    assert "main.holdLock" in waiting["stack"]
    assert any("sync.(*Mutex)" in name for name in waiting["stack"])
    assert parked["stack"] == ["main.park"]
    assert told["goroutines"] >= waiting["count"] + parked["count"]


def test_a_second_cpu_profile_is_refused_in_words(service: Server) -> None:
    url = parse_pprof_url(str(service.at("/")))
    with Load(service) as load:
        first = load.ask("/debug/pprof/profile?seconds=4")
        while not (answers := load.run("/debug/pprof/goroutine?debug=1")).count("pprof.Profile+"):
            assert answers
        with Profiles(url, service.pid) as profiles:
            profiles.start(1)
            files, errors = collect(profiles)
        finish(load._fetcher, *first)
    assert sorted(files) == sorted(set(FILES) - {pprof.CPU})
    assert errors == [
        f"{pprof.CPU}: {url}/profile?seconds=1 answers 500 Internal Server Error: "
        "Could not enable CPU profiling: cpu profiling already in use"
    ]


# --- servers that lie --------------------------------------------------------------------------

LIES = {
    "/absent": "answers 404 Not Found: no",
    "/redirect": r"answers 302 Found, a redirect to /stolen\x1b[2J, which is not followed",
    "/junk": "does not speak HTTP there",
    "/nothing": "hung up without an answer",
    "/short": "hung up in the middle of its answer",
    "/endless-heads": "does not speak HTTP there",
    "/silent": "does not end its answer within",
    "/drip": "does not end its answer within",
    "/drip-head": "does not end its answer within",
    "/huge": "answers with more than",
    "/endless": "answers with more than",
    "/endless-chunks": "answers in too small pieces",
}


@pytest.mark.parametrize("path", LIES)
def test_metrics_that_lie(liar: Server, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_module, "TIMEOUT_S", 1.0 if "within" in LIES[path] else 60.0)
    spec = parse_metric("took_seconds")
    with Metrics(liar.at(path), spec, liar.pid, window_s=5, every_s=0.01) as metrics:
        assert not scrape(metrics)
        assert metrics.trouble is not None
        assert metrics.trouble.startswith(f"http://127.0.0.1:{liar.port}{path} {LIES[path]}")
        assert metrics.trouble.isprintable()
        assert metrics._fetcher.starts == 1


@pytest.mark.parametrize("path", [*LIES, "/html", "/good"])
def test_profiles_that_lie(liar: Server, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pprof, "MARGIN_S", 1.0 if "within" in LIES.get(path, "") else 60.0)
    url = parse_pprof_url(f"http://127.0.0.1:{liar.port}{path}/pprof")
    with Profiles(url, liar.pid) as profiles:
        profiles.start(1)
        files, errors = collect(profiles)
        assert files == {}
        assert len(errors) == len(FILES)
        for line in errors:
            assert LIES.get(path, "what it answers is no ") in line
            assert line.isprintable()
        assert profiles._fetcher.starts == 1


def test_a_target_that_is_killed_meanwhile(service: Server) -> None:
    with Profiles(parse_pprof_url(str(service.at("/"))), service.pid) as profiles:
        profiles.start(30)
        finish(profiles._fetcher, profiles._under_way[0][1])  # the heap is here
        service.process.kill()
        service.process.wait()
        files, errors = collect(profiles)
    assert set(files) <= {pprof.HEAP_BEFORE, pprof.GOROUTINES}
    assert len(files) + len(errors) == len(FILES)
    assert errors[-1].endswith("refuses the connection: nobody listens there")
