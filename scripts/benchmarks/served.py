"""Programs that many people run, each with the load that its own people measure it with."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .children import ENVIRONMENT
from .errors import BenchError

_TREE = Path(__file__).resolve().parents[2]
_START_TIMEOUT_S, _POLL_S, _WARM_S = 20.0, 0.05, 1.0
_FOR_EVER_S = "100000"
_NGINX = """\
daemon off;
worker_processes 2;
pid {folder}/nginx.pid;
error_log stderr crit;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder};
    proxy_temp_path {folder};
    fastcgi_temp_path {folder};
    uwsgi_temp_path {folder};
    scgi_temp_path {folder};
    gzip on;
    gzip_types text/plain;
    server {{
        listen 127.0.0.1:{port};
        root {folder};
    }}
}}
"""
_NODE = """
const http = require('http');
function renderPage(n) {
  const rows = [];
  for (let i = 0; i < n; i++) rows.push({ id: i, text: 'row ' + Math.sqrt(i) });
  return JSON.stringify(rows);
}
http.createServer((q, r) => r.end(renderPage(200))).listen(+process.argv[2], '127.0.0.1');
"""
_PYTHON = """
import json, re, threading, time, zlib

def render(rows):
    text = json.dumps([{"id": row, "text": "row %d" % row} for row in rows])
    return zlib.compress(re.sub("[13579]", "-", text).encode())

def nested(depth, rows):
    return nested(depth - 1, rows) if depth else render(rows)

def work():
    while True:
        nested(12, range(200))
        time.sleep(0.001)

for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
work()
"""


@dataclass(frozen=True, slots=True)
class Target:
    """A program under load: the process to trace, and whether its children belong to it."""

    pid: int
    children: bool = False

    def pids(self) -> list[int]:
        """All its processes as of now."""
        if not self.children:
            return [self.pid]
        text = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        return [self.pid, *map(int, text.split())]

    def options(self) -> list[str]:
        """How latrace is told of it."""
        return ["--pid", str(self.pid), *(["--children"] if self.children else [])]


Serve = Callable[[Path], AbstractContextManager[Target]]
"""Runs a program under its load, with its files in a folder, for as long as it is entered. Raises
BenchError."""


@contextlib.contextmanager
def _running(argv: Sequence[str | Path], *, cwd: Path | str) -> Iterator[subprocess.Popen[bytes]]:
    """A child that is asked to end, then made to."""
    process = subprocess.Popen(
        [str(word) for word in argv],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=ENVIRONMENT,
        cwd=cwd,
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _listens(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if not probe.connect_ex(("127.0.0.1", port)):
                return
        time.sleep(_POLL_S)
    raise BenchError("the program under load did not start")


def _program(name: str, package: str) -> str:
    found = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if found is None:
        raise BenchError(f"{name} is not installed (Debian: {package})")
    return found


@contextlib.contextmanager
def redis(folder: Path) -> Iterator[Target]:
    """redis-server under redis-benchmark."""
    port = str(_free_port())
    server = [_program("redis-server", "redis-server"), "--port", port, "--save", ""]
    load = [_program("redis-benchmark", "redis-tools"), "-p", port, "-q", "-c", "20"]
    load += ["-t", "set,get,lpush,lrange_300", "-n", "100000000"]
    with _running([*server, "--bind", "127.0.0.1", "--dir", folder], cwd=folder) as process:
        _listens(process, int(port))
        with _running(load, cwd=folder):
            time.sleep(_WARM_S)
            yield Target(process.pid)


@contextlib.contextmanager
def postgresql(_folder: Path) -> Iterator[Target]:
    """PostgreSQL under pgbench, as the user that it insists on."""
    programs = max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)
    if programs is None or not (programs / "initdb").exists():
        raise BenchError("postgres is not installed (Debian: postgresql)")
    account = pwd.getpwnam("postgres")
    as_postgres = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
    port = str(_free_port())
    with tempfile.TemporaryDirectory(prefix="latrace-postgres-", dir="/var/tmp") as place:
        shutil.chown(place, account.pw_uid, account.pw_gid)
        data = Path(place) / "data"
        subprocess.run(
            [*as_postgres, programs / "initdb", "-D", data, "-A", "trust", "--no-sync"],
            check=True,
            capture_output=True,
            cwd="/",
        )
        server = [*as_postgres, str(programs / "postgres"), "-D", str(data), "-F"]
        server += ["-p", port, "-k", place]
        pgbench = [str(programs / "pgbench"), "-h", "127.0.0.1", "-p", port, "-U", "postgres"]
        with _running(server, cwd="/") as process:
            _listens(process, int(port))
            subprocess.run(
                [*pgbench, "-i", "-q", "-s", "5", "postgres"], check=True, capture_output=True
            )
            with _running([*pgbench, "-c", "4", "-T", _FOR_EVER_S, "postgres"], cwd="/"):
                time.sleep(_WARM_S)
                yield Target(process.pid, children=True)
            process.send_signal(2)  # fast shutdown: it would wait for its clients


@contextlib.contextmanager
def _under_wrk(argv: Sequence[str], port: int, paths: Sequence[str], folder: Path) -> Iterator[int]:
    """A server under wrk; yields its pid."""
    wrk = [_program("wrk", "wrk"), "-t1", "-c8", "-d", f"{_FOR_EVER_S}s", "-H"]
    wrk += ["Accept-Encoding: gzip"]
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(_running(argv, cwd=folder))
        _listens(process, port)
        for path in paths:
            url = f"http://127.0.0.1:{port}{path}"
            stack.enter_context(_running([*wrk, url], cwd=folder))
        time.sleep(_WARM_S)
        yield process.pid


@contextlib.contextmanager
def nginx(folder: Path) -> Iterator[Target]:
    """Nginx, which compresses a page, under wrk."""
    program, port = _program("nginx", "nginx"), _free_port()
    with tempfile.TemporaryDirectory(prefix="latrace-nginx-", dir="/var/tmp") as place:
        Path(place).chmod(0o755)
        (Path(place) / "nginx.conf").write_text(_NGINX.format(folder=place, port=port))
        (Path(place) / "page.txt").write_text("".join(f"line {at}\n" for at in range(5000)))
        argv = [program, "-p", place, "-c", f"{place}/nginx.conf"]
        with _under_wrk(argv, port, ["/page.txt", "/none"], folder) as pid:
            yield Target(pid, children=True)


@contextlib.contextmanager
def python3(folder: Path) -> Iterator[Target]:
    """The distribution's Python with four threads that compute and sleep."""
    program = "/usr/bin/python3" if Path("/usr/bin/python3").exists() else sys.executable
    script = folder / "work.py"
    script.write_text(_PYTHON)
    with _running([program, "-I", script], cwd=folder) as process:
        time.sleep(_WARM_S)
        if process.poll() is not None:
            raise BenchError("the Python program ended")
        yield Target(process.pid)


@contextlib.contextmanager
def node(folder: Path) -> Iterator[Target]:
    """Node under wrk; it tells perf what it compiles."""
    program, port = _program("node", "nodejs"), _free_port()
    script = folder / "service.js"
    script.write_text(_NODE)
    argv = [program, "--perf-basic-prof", str(script), str(port)]
    with _under_wrk(argv, port, ["/"], folder) as pid:
        try:
            yield Target(pid)
        finally:
            Path(f"/tmp/perf-{pid}.map").unlink(missing_ok=True)  # noqa: S108 - where node puts it


@contextlib.contextmanager
def _go(folder: Path, *, linker: str) -> Iterator[Target]:
    """The service of the tests under wrk: short requests, and some that collect garbage."""
    port, program = _free_port(), folder / "service"
    done = subprocess.run(
        [_program("go", "golang-go"), "build", "-ldflags", linker, "-o", str(program), "."],
        cwd=_TREE / "tests/workloads/service",
        env=ENVIRONMENT
        | {"GOFLAGS": "-mod=mod", "GOPROXY": "off", "CGO_ENABLED": "0"}
        | {"GOCACHE": str(folder.parent / "go-cache")},
        capture_output=True,
        check=False,
    )
    if done.returncode:
        raise BenchError(f"go build: {done.stderr.decode(errors='replace').strip()[-200:]}")
    argv = [str(program), f"127.0.0.1:{port}"]
    with _under_wrk(argv, port, ["/fast", "/gc?mb=2&times=1"], folder) as pid:
        yield Target(pid)


go = partial(_go, linker="")
stripped_go = partial(_go, linker="-s -w")
