"""Profiles are taken at once, and what is none is left out with a line."""

from __future__ import annotations

import gzip
import os
import select
import socketserver
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from latrace.tracer.errors import UsageError
from latrace.tracer.watch import pprof
from latrace.tracer.watch.fetch import Url
from latrace.tracer.watch.pprof import FILES, Profiles, parse_pprof_url

HEAP = b"heap profile: 1: 2 [3: 4] @ heap/1048576\n\n# runtime.MemStats\n# NumGC = 0\n"
GOOD = {
    "profile": gzip.compress(b"samples", mtime=0),
    "trace": b"go 1.19 trace\0\0\0events",
    "goroutine": b"goroutine profile: total 3\n",
    "heap": HEAP,
}


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("http://127.0.0.1:6060", "/debug/pprof"),
        ("http://127.0.0.1:6060/", "/debug/pprof"),
        ("http://127.0.0.1:6060/debug/pprof/", "/debug/pprof"),
        ("http://127.0.0.1:6060/internal", "/internal/debug/pprof"),
        ("http://127.0.0.1:6060/internal/pprof", "/internal/pprof"),
    ],
)
def test_the_address_may_be_short_or_long(text: str, target: str) -> None:
    assert parse_pprof_url(text) == Url("127.0.0.1", 6060, target)


@pytest.mark.parametrize("text", ["http://127.0.0.1:6060/debug/pprof/heap?debug=1", "https://x"])
def test_what_is_no_such_address(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--pprof "):
        parse_pprof_url(text)


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Answers what `answers` has, by the last part of the path; None: nothing, for a while."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: dict[str, bytes | None] = dict(GOOD)
        self.asked: list[str] = []
        self.together = threading.Barrier(4)
        self.ending = threading.Event()


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        answer = self.server.answers[self.path.split("?")[0].rpartition("/")[2]]
        if len(self.server.asked) <= 4:
            self.server.together.wait(60)  # only if all four are here at the same time
        if answer is None:
            self.server.ending.wait(60)
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def service() -> Iterator[_Server]:
    with _Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.ending.set()
        server.together.abort()
        server.shutdown()
        thread.join()


@pytest.fixture
def profiles(service: _Server) -> Iterator[Profiles]:
    port = service.server_address[1]
    with Profiles(parse_pprof_url(f"http://127.0.0.1:{port}"), os.getpid()) as made:
        yield made


def finish(profiles: Profiles) -> None:
    while not profiles.poll():
        if profiles.fileno() >= 0:
            select.select([profiles], [], [], 0.05)


def test_all_are_fetched_at_once_and_the_heap_once_more(
    profiles: Profiles, service: _Server
) -> None:
    assert not profiles.running and profiles.poll() and profiles.take() == ({}, [])
    assert profiles.start(1.2)
    assert not profiles.start(1)
    finish(profiles)
    files, errors = profiles.take()
    assert errors == []
    assert tuple(sorted(files)) == tuple(sorted(FILES))
    assert files[pprof.CPU] == GOOD["profile"] and files[pprof.TRACE] == GOOD["trace"]
    assert sorted(service.asked[:4]) == [
        f"/debug/pprof/{query}"
        for query in ("goroutine?debug=1", "heap?debug=1", "profile?seconds=2", "trace?seconds=2")
    ]
    assert service.asked[4:] == ["/debug/pprof/heap?debug=1"]
    assert profiles.take() == ({}, [])
    assert profiles.start(1)  # and again
    finish(profiles)
    assert len(profiles.take()[0]) == 5


@pytest.mark.parametrize(
    ("kind", "answer", "error"),
    [
        ("profile", b"<html>login</html>", "what it answers is no CPU profile of Go"),
        ("trace", gzip.compress(b"", mtime=0), "what it answers is no execution trace of Go"),
        ("trace", b"go 1.x", "what it answers is no execution trace of Go"),
        ("goroutine", b"", "what it answers is no dump of goroutines of Go"),
        ("heap", b"heap profile: ", "what it answers is no memory statistics of Go"),
        ("profile", b"\x1f\x8b\x08" * (4 << 20), "answers with more than 8.39 MB"),
    ],
)
def test_a_lying_endpoint_is_told_and_its_file_kept_out(
    profiles: Profiles, service: _Server, kind: str, answer: bytes, error: str
) -> None:
    service.answers[kind] = answer
    profiles.start(1)
    finish(profiles)
    files, errors = profiles.take()
    without = {name for name in FILES if kind in name.replace(pprof.CPU, "profile")}
    assert len(without) == (2 if kind == "heap" else 1)
    assert set(files) == set(FILES) - without
    for name, line in zip(sorted(without, reverse=True), sorted(errors, reverse=True), strict=True):
        assert line.startswith(f"{name}: http://127.0.0.1:") and line.endswith(" " + error)
        assert line.isprintable()


def test_a_hanging_one_does_not_hold_up_for_longer_than_its_time(
    profiles: Profiles, service: _Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pprof, "MARGIN_S", 2.0)
    service.answers["trace"] = None
    profiles.start(1)
    finish(profiles)
    files, errors = profiles.take()
    assert sorted(files) == sorted(set(FILES) - {pprof.TRACE})
    assert [line.split("seconds=1 ")[1] for line in errors] == [
        "does not end its answer within 3 s"
    ]


def test_what_is_under_way_is_not_waited_for(profiles: Profiles, service: _Server) -> None:
    service.answers["profile"] = None
    profiles.start(1)
    while len(service.asked) < 4:
        profiles.poll()
    _, errors = profiles.take()
    assert f"{pprof.CPU}: is still to come" in errors
    child = profiles._fetcher.pid
    profiles.close()
    assert not profiles.running
    assert not Path(f"/proc/{child}").exists()
    assert profiles._fetcher.pid is None


def test_nobody_there() -> None:
    with Profiles(parse_pprof_url("http://127.0.0.1:1"), os.getpid()) as profiles:
        profiles.start(1)
        finish(profiles)
        files, errors = profiles.take()
    assert files == {}
    assert len(errors) == 5
    assert all(line.endswith(" refuses the connection: nobody listens there") for line in errors)
