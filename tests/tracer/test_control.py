"""The socket of `latrace trigger`: whoever is at the other end, the watch's loop never waits."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from latrace.tracer.errors import LatraceError, UsageError
from latrace.tracer.watch import control
from latrace.tracer.watch.control import ControlSocket, Request, Watch, list_watches, send

ME = os.geteuid()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "latrace"


@pytest.fixture
def watch(place: Path) -> Iterator[ControlSocket]:
    made = ControlSocket("redis-server (pid 812)", directory=place, owner=ME)
    yield made
    made.close()


@contextlib.contextmanager
def serving(
    watch: ControlSocket, on_request: Callable[[Request], None]
) -> Iterator[list[tuple[str, str]]]:
    """Poll as the loop of a watch does; gives what was asked, and by whom."""
    asked: list[tuple[str, str]] = []
    done = threading.Event()

    def loop() -> None:
        while not done.wait(0.01):
            for request in watch.poll():
                asked.append((request.reason, request.asked_by))
                on_request(request)

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield asked
    finally:
        done.set()
        thread.join()


def ask(place: Path, reason: str = "", **more: object) -> dict[str, object]:
    return send(reason, directory=place, owner=ME, **more)  # type: ignore[arg-type]


def client(watch: ControlSocket, packet: bytes = b"") -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    made.settimeout(10)
    made.connect(str(watch.path))
    if packet:
        made.send(packet)
    return made


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


# --- a request and its answer --------------------------------------------------------------------


def test_a_request_has_its_reason_and_gets_its_answer(watch: ControlSocket, place: Path) -> None:
    with serving(watch, lambda request: request.answer("bundle spike-1")) as asked:
        assert ask(place, "p99 \u20ac", asked_by="alice") == {
            "ok": True,
            "message": "bundle spike-1",
        }
        assert ask(place, pid=os.getpid())["ok"]
    assert asked == [("p99 \u20ac", "alice"), ("", "root")]


def test_a_refusal_is_an_answer(watch: ControlSocket, place: Path) -> None:
    with serving(watch, lambda request: request.answer("cooling down", ok=False)):
        assert ask(place) == {"ok": False, "message": "cooling down"}


@pytest.mark.parametrize("text", ["\udcff\udc80", "\ud800", "\x1b[2J\n", "\0", "x" * 500])
def test_odd_reasons_arrive_as_text(watch: ControlSocket, place: Path, text: str) -> None:
    with serving(watch, lambda request: request.answer(request.reason)) as asked:
        answer = ask(place, text[:100], asked_by=text)
    ((reason, by),) = asked
    assert answer["message"] == reason
    assert reason.encode("utf-8") and by.encode("utf-8")
    assert len(by) <= control.REASON_CHARACTERS


def test_a_reason_that_is_too_long(watch: ControlSocket, place: Path) -> None:
    assert watch
    with pytest.raises(UsageError, match="501 characters") as caught:
        ask(place, "x" * 501)
    assert caught.value.hint


def test_an_answer_is_given_once_and_to_nobody_if_nobody_is_left(
    watch: ControlSocket,
) -> None:
    gone = client(watch, b'{"trigger": ""}')
    (request,) = watch.poll()
    gone.close()
    request.answer("too late")
    request.answer("again")
    assert request.is_answered
    assert watch.poll() == []


def test_the_descriptor_tells_when_there_is_something(watch: ControlSocket) -> None:
    assert select.select([watch], [], [], 0)[0] == []
    with client(watch, b'{"trigger": ""}') as connection:
        assert select.select([watch], [], [], 5)[0] == [watch]
        (request,) = watch.poll()
        # What waits for the loop's own answer does not wake it.
        assert select.select([watch], [], [], 0)[0] == []
        request.answer("done")
        assert json.loads(connection.recv(1000)) == {"ok": True, "message": "done"}


# --- which watch ---------------------------------------------------------------------------------


def test_nobody_runs(place: Path) -> None:
    with pytest.raises(LatraceError, match="no watch is running") as caught:
        ask(place)
    assert caught.value.exit_code == 1 and "latrace watch" in caught.value.hint
    assert not place.exists()
    with pytest.raises(FileNotFoundError):
        control._directory_of_watches(place, ME)
    with pytest.raises(LatraceError, match="no watch runs as process 7"):
        place.mkdir(mode=0o700)
        ask(place, pid=7)


def test_the_one_that_is_named_does_not_run_but_another(watch: ControlSocket, place: Path) -> None:
    with serving(watch, Request.drop), pytest.raises(LatraceError) as caught:
        ask(place, pid=1)
    assert f"{os.getpid()} (redis-server (pid 812))" in caught.value.hint


def test_several_run_and_one_has_to_be_chosen(watch: ControlSocket, place: Path) -> None:
    hostile = {"ok": True, "description": "node \x1b[2J" + "y" * 200}
    other = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    other.bind(str(place / "watch-1.sock"))
    other.listen()

    def answer() -> None:
        connection, _ = other.accept()
        connection.recv(1000)
        connection.send(json.dumps(hostile).encode())
        connection.close()

    thread = threading.Thread(target=answer)
    thread.start()
    with serving(watch, Request.drop), pytest.raises(UsageError) as caught:
        ask(place)
    thread.join()
    other.close()
    assert "2 watches are running" in caught.value.cause
    assert "--watch PID" in caught.value.hint
    assert f"{os.getpid()} (redis-server (pid 812))" in caught.value.hint
    assert "1 (node \\x1b[2Jyyy" in caught.value.hint
    assert "\x1b" not in caught.value.hint and "y" * 60 not in caught.value.hint


def test_one_that_is_stopped_is_listed_and_told(place: Path) -> None:
    place.mkdir(mode=0o700)
    silent = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    silent.bind(str(place / "watch-5.sock"))
    silent.listen()
    with pytest.raises(LatraceError, match="process 5, does not answer") as caught:
        ask(place, pid=5, patience_s=0.1)
    assert "kill -USR2 5" in caught.value.hint
    silent.close()
    assert list_watches(directory=place, owner=ME) == []


@pytest.mark.parametrize("answer", [b"[]", b"{", b"{}", b'{"ok": 1, "message": ""}', b"[" * 8000])
def test_an_answer_that_makes_no_sense(place: Path, answer: bytes) -> None:
    place.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.bind(str(place / "watch-5.sock"))
        server.listen()

        def reply() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.send(answer)

        thread = threading.Thread(target=reply)
        thread.start()
        with pytest.raises(LatraceError, match="makes no sense"):
            ask(place, pid=5)
        thread.join()


# --- clients that are broken ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "packet",
    [
        *(b"{", b"[]", b"null", b"7", b'"x"', b"{}", b"\xff", b"\0", b"[" * 8192, b'{"a":' * 1600),
        *(b'{"trigger": 7}', b'{"trigger": null}', b'{"trigger": "", "by": 3}', b'{"list": 1}'),
        b'{"trigger": "' + b"x" * 9000 + b'"}',
    ],
)
def test_what_is_no_request_is_refused(watch: ControlSocket, packet: bytes) -> None:
    with client(watch, packet) as connection:
        assert watch.poll() == []
        answer = json.loads(connection.recv(1000))
        assert answer == {"ok": False, "message": "the request was not understood"}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(packet=st.binary(min_size=1, max_size=10_000))
def test_no_packet_harms_it(watch: ControlSocket, packet: bytes) -> None:
    with client(watch, packet):
        assert watch.poll() == []


def test_who_is_silent_is_dropped(watch: ControlSocket, monkeypatch: pytest.MonkeyPatch) -> None:
    before = descriptors()
    with client(watch) as connection:
        watch.poll()
        monkeypatch.setattr(control, "_SILENT_S", 0.0)
        watch.poll()
        assert connection.recv(10) == b""
    assert descriptors() == before


def test_who_never_gets_an_answer_is_dropped(
    watch: ControlSocket, monkeypatch: pytest.MonkeyPatch
) -> None:
    with client(watch, b'{"trigger": ""}') as connection:
        (request,) = watch.poll()
        monkeypatch.setattr(control, "_UNANSWERED_S", 0.0)
        watch.poll()
        assert connection.recv(10) == b"" and request.is_answered
    assert watch._requests == []


def test_no_more_than_a_few_are_let_in(watch: ControlSocket, place: Path) -> None:
    before = descriptors()
    with contextlib.ExitStack() as stack:
        crowd = []
        for number in range(30):
            crowd.append(
                stack.enter_context(client(watch, b'{"trigger": ""}' if number % 2 else b""))
            )
            watch.poll()
        assert descriptors() - before - len(crowd) <= control._MOST_CLIENTS
        with pytest.raises(ConnectionResetError):
            crowd[-1].recv(10)
    watch.poll()
    for request in watch._requests:
        request.answer("")
    watch.poll()
    assert descriptors() == before
    with serving(watch, lambda request: request.answer("fine")):
        assert ask(place)["message"] == "fine"


def test_one_that_does_not_take_its_answer_costs_nothing(watch: ControlSocket) -> None:
    """It has filled its own queue with nothing read: the answer is lost, the loop goes on."""
    with client(watch, b'{"trigger": ""}'):
        (request,) = watch.poll()
        request.answer("x" * 10_000_000)
        assert request.is_answered


# --- the directory -------------------------------------------------------------------------------


def test_the_directory_is_for_its_owner_alone(place: Path) -> None:
    old = os.umask(0)
    try:
        made = ControlSocket("x", directory=place, owner=ME)
    finally:
        os.umask(old)
    assert place.stat().st_mode & 0o7777 == 0o700
    made.close()
    place.chmod(0o755)
    ControlSocket("x", directory=place, owner=ME).close()
    assert place.stat().st_mode & 0o7777 == 0o700


@pytest.mark.parametrize("what", ["link", "file", "writable", "owner", "parent"])
def test_a_directory_that_is_not_safe_is_refused(tmp_path: Path, place: Path, what: str) -> None:
    owner = ME
    if what == "link":
        (tmp_path / "real").mkdir(mode=0o700)
        place.symlink_to("real")
    elif what == "file":
        place.touch()
    elif what == "writable":
        place.mkdir()
        place.chmod(0o770)
    elif what == "owner":
        place.mkdir(mode=0o700)
        owner = ME + 1
    else:
        place = tmp_path / "missing" / "latrace"
    before = descriptors()
    with pytest.raises(LatraceError, match="cannot use") as caught:
        ControlSocket("x", directory=place, owner=owner)
    assert caught.value.hint
    if what != "parent":
        with pytest.raises(LatraceError, match="cannot use"):
            send("", directory=place, owner=owner)
    assert descriptors() == before
    if what == "link":
        assert not list((tmp_path / "real").iterdir())


def test_nothing_is_left_and_nothing_of_others_is_taken(place: Path) -> None:
    before = descriptors()
    first = ControlSocket("x", directory=place, owner=ME)
    (place / "notes").touch()
    second = ControlSocket("y", directory=place, owner=ME)  # its name is taken over
    first.close()
    with serving(second, lambda request: request.answer("y")):
        assert list_watches(directory=place, owner=ME) == [Watch(pid=os.getpid(), description="y")]
    second.close()
    second.close()
    assert [entry.name for entry in place.iterdir()] == ["notes"]
    assert descriptors() == before


def test_sockets_of_dead_watches_are_removed(place: Path) -> None:
    place.mkdir(mode=0o700)
    for name in ("watch-4000001.sock", "watch-4000002.sock", ".watch-4000003.tmp"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
            dead.bind(str(place / name))
    alive = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    alive.bind(str(place / "watch-4000004.sock"))
    alive.listen(0)
    crowd = client_of(place / "watch-4000004.sock")  # its queue is full: no sign of death
    for name in ("watch-x.sock", "watch-0.sock", "watch-12.sock.bak", "watch-7.sock"):
        (place / name).touch()
    made = ControlSocket("x", directory=place, owner=ME)
    assert {entry.name for entry in place.iterdir()} == {
        *("watch-4000004.sock", made.path.name),
        *("watch-x.sock", "watch-0.sock", "watch-12.sock.bak"),
    }
    made.close()
    crowd.close()
    alive.close()


def client_of(path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    made.connect(str(path))
    return made
