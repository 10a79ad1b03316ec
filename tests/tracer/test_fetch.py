"""What a target answers is fetched by a child without rights, which no answer holds up for long."""

from __future__ import annotations

import os
import select
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from latrace.tracer.errors import NoTargetError, UsageError
from latrace.tracer.watch import fetch as fetching
from latrace.tracer.watch.fetch import Fetch, Fetcher, Url, parse_url

LIAR = Path(__file__).resolve().parents[1] / "workloads" / "liar.py"
ROOM = 1 << 20


# --- addresses ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "url", "said"),
    [
        ("http://127.0.0.1:9100/metrics", Url("127.0.0.1", 9100, "/metrics"), None),
        ("http://localhost", Url("localhost", 80, "/"), "http://localhost:80/"),
        ("HTTP://my-host.example.:1/", Url("my-host.example.", 1, "/"), None),
        ("http://[::1]:8080/a?b=%20c&d[]=1", Url("::1", 8080, "/a?b=%20c&d[]=1"), None),
        ("http://host?x=1", Url("host", 80, "/?x=1"), None),
        ("http://host:/x", Url("host", 80, "/x"), None),
    ],
)
def test_an_address_is_taken_apart(text: str, url: Url, said: str | None) -> None:
    assert parse_url(text) == url
    if said:
        assert str(url) == said
    assert parse_url(str(url)) == url


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("https://127.0.0.1/metrics", "https is not spoken here"),
        ("127.0.0.1:9100", "is no address"),
        ("", "is no address"),
        ("file:///etc/shadow", "the scheme file is not known"),
        ("unix:///run/x.sock", "the scheme unix is not known"),
        ("http://user:secret@host/", "user names and passwords"),
        ("http://host@evil/", "user names and passwords"),
        ("http://host/#part", "a fragment"),
        ("http://", "the host is missing"),
        ("http://:80/", "the host is missing"),
        ("http://host:0/", "there is no port 0"),
        ("http://host:65536/", "there is no port 65536"),
        ("http://host:99999999/", "not readable"),
        ("http://host:80:80/", "not readable"),
        ("http://host:+80/", "not readable"),
        ("http://::1/", "not readable"),
        ("http://[::1/", "not readable"),
        ("http://[fe80::1%eth0]/", "is no IPv6 address"),
        ("http://[nonsense]/", "is no IPv6 address"),
        ("http://300.1.1.1/", "is no IPv4 address"),
        ("http://127.1/", "is no IPv4 address"),
        ("http://ho st/", "no blanks"),
        ("http://host/\r\nX-Evil: 1", "no blanks"),
        ("http://hôte/", "only ASCII"),
        ("http://host\\evil/", "is no host name"),
        ("http://a..b/", "is no host name"),
        ("http://host/" + "x" * 3000, "longer than"),
    ],
)
def test_what_is_no_plain_http_address_is_refused(text: str, why: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_url(text, "--pprof")
    assert why in caught.value.cause
    assert caught.value.cause.startswith("--pprof ")
    assert caught.value.cause.isprintable() and len(caught.value.cause) < 250
    assert caught.value.hint


# --- fetches -----------------------------------------------------------------------------------


class Liar:
    """The server that lies, running."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-I", LIAR], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())
        self.paths: list[str] | None = None

    def at(self, path: str) -> Url:
        return Url("127.0.0.1", self.port, path)

    def asked(self) -> list[str]:
        """End it; the paths that were asked for."""
        if self.paths is None:
            self.process.kill()
            self.paths = self.process.communicate()[0].split()
        return self.paths


@pytest.fixture
def liar() -> Iterator[Liar]:
    server = Liar()
    yield server
    server.asked()


@pytest.fixture
def fetcher() -> Iterator[Fetcher]:
    before = descriptors()
    with Fetcher(os.getpid(), workers=4) as made:
        yield made
        last = made.pid
    assert descriptors() == before
    assert last is None or not Path(f"/proc/{last}").exists()


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def finish(fetcher: Fetcher, *fetches: Fetch) -> None:
    """Let them come to their ends, which they must do on their own."""
    while not all(fetch.done for fetch in fetches):
        if fetcher.fileno() >= 0:
            select.select([fetcher], [], [], 0.05)
        fetcher.poll()


def get(fetcher: Fetcher, url: Url, timeout_s: float = 20, max_bytes: int = ROOM) -> Fetch:
    fetch = fetcher.submit(url, timeout_s=timeout_s, max_bytes=max_bytes)
    finish(fetcher, fetch)
    return fetch


@pytest.mark.parametrize("path", ["/good", "/chunked"])
def test_an_answer_comes_back_whole(fetcher: Fetcher, liar: Liar, path: str) -> None:
    fetch = get(fetcher, liar.at(path))
    assert fetch.error is None
    assert fetch.body.startswith(b"# TYPE took_seconds") and fetch.body.endswith(b"count 100\n")
    assert fetch.content_type == ("text/plain; version=0.0.4" if path == "/good" else "")


def test_a_name_is_resolved_by_the_child(fetcher: Fetcher, liar: Liar) -> None:
    assert get(fetcher, parse_url(f"http://localhost:{liar.port}/good")).error is None
    unknown = get(fetcher, parse_url("http://nowhere.invalid/"))
    assert unknown.error is not None
    assert unknown.error.startswith("the host's name is not known here: ")


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("/redirect", r"answers 302 Found, a redirect to /stolen\x1b[2J, which is not followed"),
        (
            "/failing",
            r"answers 500 Internal Server Error: profiling \x1b[31mis in use",
        ),
        ("/absent", "answers 404 Not Found: no"),
        ("/gzip", "answers in gzip, which was not asked for"),
        ("/short", "hung up in the middle of its answer"),
        ("/short-chunk", "hung up in the middle of its answer"),
        ("/bad-chunk", "hung up in the middle of its answer"),
        ("/huge", "answers with more than 1.05 MB"),
        ("/endless", "answers with more than 1.05 MB"),
        ("/endless-chunks", "answers in too small pieces"),
        ("/endless-waits", "answers with more than 1.05 MB"),
        ("/endless-heads", "does not speak HTTP there"),
        ("/junk", "does not speak HTTP there"),
        ("/old", "does not speak HTTP there"),
        ("/long-line", "does not speak HTTP there"),
        ("/nothing", "hung up without an answer"),
    ],
)
def test_what_goes_wrong_is_said_in_a_line(
    fetcher: Fetcher, liar: Liar, path: str, error: str
) -> None:
    fetch = get(fetcher, liar.at(path))
    assert fetch.error == error
    assert fetch.body == b""
    assert fetcher.starts == 1
    assert get(fetcher, liar.at("/good")).error is None
    assert liar.asked() == [path, "/good"]  # no redirect was followed, nothing was tried twice


@pytest.mark.parametrize("path", ["/silent", "/drip", "/drip-head"])
def test_all_of_it_has_one_deadline(fetcher: Fetcher, liar: Liar, path: str) -> None:
    get(fetcher, liar.at("/good"))
    began = time.monotonic()
    fetch = get(fetcher, liar.at(path), timeout_s=0.5)
    took = time.monotonic() - began
    assert fetch.error == "does not end its answer within 0.5 s"
    assert took >= 0.5
    assert fetcher.starts == 1  # the child kept the deadline, nobody had to end it


def test_nobody_listens(fetcher: Fetcher) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unheard:
        port = unheard.getsockname()[1]
    fetch = get(fetcher, Url("127.0.0.1", port, "/"))
    assert fetch.error == "refuses the connection: nobody listens there"


def test_an_answer_may_be_as_large_as_allowed_and_no_larger(fetcher: Fetcher, liar: Liar) -> None:
    size = len(get(fetcher, liar.at("/good")).body)
    assert get(fetcher, liar.at("/good"), max_bytes=size).error is None
    assert get(fetcher, liar.at("/good"), max_bytes=size - 1).error is not None
    assert get(fetcher, liar.at("/chunked"), max_bytes=size - 1).error is not None


def test_several_are_fetched_at_once(fetcher: Fetcher, liar: Liar) -> None:
    slow = [fetcher.submit(liar.at("/drip"), timeout_s=2, max_bytes=ROOM) for _ in range(3)]
    good = fetcher.submit(liar.at("/good"), timeout_s=20, max_bytes=ROOM)
    finish(fetcher, good)
    assert good.error is None
    assert not any(fetch.done for fetch in slow)
    finish(fetcher, *slow)
    assert all(fetch.error for fetch in slow)


def test_proxies_of_the_environment_are_not_asked(
    liar: Liar, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1/")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1/")
    with Fetcher(os.getpid()) as fetcher:
        assert get(fetcher, liar.at("/good")).error is None


class _Keeps(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Keeps connections, but hangs up after the third answer without having said so."""

    daemon_threads = True
    connections = 0


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Keeps
    answers = 0

    def setup(self) -> None:
        super().setup()
        self.server.connections += 1

    def do_GET(self) -> None:
        self.answers += 1
        page = b't_bucket{le="1"} 1\nt_bucket{le="+Inf"} %d\n' % self.answers
        self.send_response(200)
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)
        self.close_connection = self.answers == 3

    def log_message(self, *_: object) -> None:
        pass


def test_a_connection_is_kept_for_what_is_read_again_and_again() -> None:
    with _Keeps(("127.0.0.1", 0), _Handler) as server, Fetcher(os.getpid()) as fetcher:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        url = Url("127.0.0.1", server.server_address[1], "/")
        metric = {"name": "t", "labels": {}, "quantile": 0.5}
        counts = []
        for _ in range(9):
            fetch = fetcher.submit(url, timeout_s=20, max_bytes=ROOM, metric=metric)
            finish(fetcher, fetch)
            assert fetch.error is None and fetch.reading is not None
            counts.append(fetch.reading["counts"][1])
            time.sleep(0.02)  # so that the end of the connection has come
        assert counts == [1, 2, 3] * 3
        assert server.connections == 3
        get(fetcher, url)  # what is fetched once keeps to itself
        assert server.connections == 4
        server.shutdown()
        thread.join()


# --- the child ---------------------------------------------------------------------------------


def test_the_child_has_no_rights(fetcher: Fetcher, liar: Liar) -> None:
    get(fetcher, liar.at("/good"))
    status = dict(
        line.split(":\t", 1)
        for line in Path(f"/proc/{fetcher.pid}/status").read_text().splitlines()
    )
    for which in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(status[which], 16) == 0
    assert status["NoNewPrivs"] == "1"
    if os.geteuid() == 0:
        assert status["Uid"] == status["Gid"] == "\t".join(["65534"] * 4)
        assert status["Groups"].split() == []
        limits = Path(f"/proc/{fetcher.pid}/limits").read_text()
        for name in ("Max processes", "Max file size", "Max core file size"):
            (line,) = [line for line in limits.splitlines() if line.startswith(name)]
            assert line.split()[len(name.split())] == "0", line
        held = [str(fd.readlink()) for fd in Path(f"/proc/{fetcher.pid}/fd").iterdir()]
        assert sorted(name.split(":")[0] for name in held) == ["/dev/null"] * 3 + ["socket"]


def test_many_fetches_leave_nothing_behind(fetcher: Fetcher, liar: Liar) -> None:
    def held() -> tuple[int, int, int]:
        task = Path(f"/proc/{fetcher.pid}/task")
        theirs = Path(f"/proc/{fetcher.pid}/fd")
        # Root's own look at the directory is not theirs.
        fds = len(list(theirs.iterdir())) if os.geteuid() == 0 else 0
        return len(list(task.iterdir())), fds, descriptors()

    get(fetcher, liar.at("/good"))
    before = held()
    for path in ["/good", "/short", "/junk", "/huge", "/redirect"] * 20:
        get(fetcher, liar.at(path))
    assert held() == before
    assert fetcher.starts == 1


def test_a_child_that_dies_is_replaced(fetcher: Fetcher, liar: Liar) -> None:
    get(fetcher, liar.at("/good"))
    assert fetcher.pid is not None
    stuck = fetcher.submit(liar.at("/silent"), timeout_s=60, max_bytes=ROOM)
    os.kill(fetcher.pid, signal.SIGKILL)
    finish(fetcher, stuck)
    assert stuck.error == "not fetched: the process for it died"
    assert get(fetcher, liar.at("/good")).error is None
    assert fetcher.starts == 2


def test_a_child_that_is_stuck_is_ended(
    fetcher: Fetcher, liar: Liar, monkeypatch: pytest.MonkeyPatch
) -> None:
    get(fetcher, liar.at("/good"))
    monkeypatch.setattr(fetching, "GRACE_S", 0.2)
    assert fetcher.pid is not None
    os.kill(fetcher.pid, signal.SIGSTOP)
    fetch = get(fetcher, liar.at("/good"), timeout_s=0.3)
    assert fetch.error == "no answer within 0.3 s"
    assert get(fetcher, liar.at("/good")).error is None


def test_the_child_is_changed_now_and_then(
    fetcher: Fetcher, liar: Liar, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "REQUESTS_PER_CHILD", 5)
    for _ in range(12):
        assert get(fetcher, liar.at("/good")).error is None
    assert fetcher.starts == 3


def test_one_that_does_not_start_is_not_tried_all_the_time(
    liar: Liar, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching.sys, "executable", "/bin/false")
    with Fetcher(os.getpid()) as fetcher:
        for _ in range(50):
            assert get(fetcher, liar.at("/good")).error
        assert fetcher.starts == 1


CHILD_OF_A_CHILD = """
import os, sys, time
from latrace.tracer.watch.fetch import Fetcher, parse_url
fetcher = Fetcher(os.getpid(), workers=int(sys.argv[2]))
good = fetcher.submit(parse_url(sys.argv[1] + "/good"), timeout_s=60, max_bytes=1 << 20)
while not good.done:
    fetcher.poll()
    time.sleep(0.01)
fetcher.submit(parse_url(sys.argv[1] + "/silent"), timeout_s=600, max_bytes=1 << 20)
print(fetcher.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("workers", [1, 4])
def test_the_child_dies_with_the_tracer(liar: Liar, workers: int) -> None:
    tracer = subprocess.Popen(
        [sys.executable, "-c", CHILD_OF_A_CHILD, f"http://127.0.0.1:{liar.port}", str(workers)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert tracer.stdout is not None
    child = int(tracer.stdout.readline())
    assert Path(f"/proc/{child}").exists()
    tracer.kill()
    tracer.communicate()
    deadline = time.monotonic() + 20
    while is_alive(child):
        assert time.monotonic() < deadline, "the child outlives the tracer"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def test_no_such_process() -> None:
    with pytest.raises(NoTargetError, match="there is no process 4194999"):
        Fetcher(4194999)


def test_closing_ends_what_is_under_way(liar: Liar) -> None:
    fetcher = Fetcher(os.getpid())
    fetch = fetcher.submit(liar.at("/silent"), timeout_s=600, max_bytes=ROOM)
    pid = fetcher.pid
    fetcher.close()
    assert fetch.done and fetch.error == "not fetched: the trace ended"
    assert not Path(f"/proc/{pid}").exists()
    fetcher.close()
