"""Servers that nobody here wrote, over a wire that loses: each segment sent once more is theirs."""

from __future__ import annotations

import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from network import Host, two_hosts
from tracing import Traced, tracing

import latrace
from latrace.tracer.options import Options

pytestmark = pytest.mark.kernel

NGINX = """
daemon off; error_log stderr; pid {folder}/pid; worker_processes 2;
events {{}}
http {{ access_log off; client_body_temp_path {folder}/t; proxy_temp_path {folder}/t;
fastcgi_temp_path {folder}/t; uwsgi_temp_path {folder}/t; scgi_temp_path {folder}/t;
server {{ listen 7700; listen [::]:7700; root {folder}; }} }}
"""


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts() as both:
        yield both


# A machine that fires no event for some SYN-ACK: what a connection sent is in its counter in the
# end, but a request that never becomes a connection takes its count with it.
HIDDEN = 2


def with_children(pid: int) -> Options:
    return Options(pids=(pid,), children=True)


def settled(host: Host, lossy: Host) -> int:
    """What the namespace has sent once more, when nothing is lost any more and all is at rest."""
    lossy.heal()
    before, now = -1, host.counter("TcpRetransSegs")
    while before != now:
        time.sleep(1.0)
        before, now = now, host.counter("TcpRetransSegs")
    return now


def check(output: Path, segs: int, comm: str) -> None:
    """`segs`: what the whole namespace sent once more, where nothing else runs."""
    result = Traced(latrace.open(output), {}, 0)
    table = result.capture.table("retransmits")
    assert result.quality["lost_events"] == 0
    assert segs > 20
    assert 0 <= segs - sum(table["segs"].to_pylist()) <= HIDDEN
    # The socket's own count and the rows go together, to the end of each connection.
    last: dict[int, int] = {}
    for row in sorted(table.to_pylist(), key=lambda row: int(row["ts_ns"])):
        if row["kind"] != "synack":
            assert row["total_retrans"] == last.get(row["cookie"], 0) + row["segs"]
        last[row["cookie"]] = row["total_retrans"]
    ends = {
        row["cookie"]: row["end_total_retrans"]
        for row in result.capture.table("connections").to_pylist()
    }
    # A request whose client had given up when its SYN-ACK came again never was a connection.
    for row in table.to_pylist():
        if row["kind"] == "synack" and row["cookie"] not in ends:
            last.pop(row["cookie"], None)
    assert {cookie: ends.get(cookie) for cookie in last} == last
    names = {row["tgid"]: row["comm"] for row in result.capture.threads.to_pylist()}
    assert {names.get(tgid) for tgid in table["tgid"].to_pylist()} == {comm}


def test_iperf3(tmp_path: Path, hosts: tuple[Host, Host]) -> None:
    """It sends to four connections at once."""
    near, far = hosts
    server = near.start("iperf3", "-s", "-p", 7700, stdout=subprocess.DEVNULL)
    near.wait_for_listener(7700)
    far.lose("tcp sport 7700 meta length > 500 numgen inc mod 100 7", chain="input")
    with tracing(with_children(server.pid), tmp_path / "c"):
        far.run("iperf3", "-c", near.v4, "-p", 7700, "-R", "-P", 4, "-t", 2)
        segs = settled(near, far)
    check(tmp_path / "c", segs, "iperf3")


def test_nginx_under_wrk(tmp_path: Path, hosts: tuple[Host, Host]) -> None:
    """Two workers that share a listener; connections come and go."""
    near, far = hosts
    folder = Path(tempfile.mkdtemp(prefix="latrace-nginx-", dir="/var/tmp"))
    try:
        folder.chmod(0o755)
        (folder / "nginx.conf").write_text(NGINX.format(folder=folder))
        (folder / "page").write_bytes(bytes(50_000))
        server = near.start("nginx", "-p", folder, "-c", folder / "nginx.conf")
        near.wait_for_listener(7700)
        rule = "numgen inc mod 30 7"
        far.lose(f"tcp sport 7700 {rule}", chain="input")
        with tracing(with_children(server.pid), tmp_path / "c"):
            for address in (near.v4, f"[{near.v6}]"):
                url = f"http://{address}:7700/page"
                far.run("wrk", "-t1", "-c8", "-d1s", "-H", "Connection: close", url)
                far.run("wrk", "-t1", "-c8", "-d1s", url)
            segs = settled(near, far)
        check(tmp_path / "c", segs, "nginx")
    finally:
        shutil.rmtree(folder)


def test_postgresql_under_pgbench(tmp_path: Path, hosts: tuple[Host, Host]) -> None:
    """A process for each connection, forked by the one that listens."""
    near, far = hosts
    programs = max(Path("/usr/lib/postgresql").glob("*/bin"))
    account = pwd.getpwnam("postgres")
    folder = Path(tempfile.mkdtemp(prefix="latrace-postgres-", dir="/var/tmp"))
    shutil.chown(folder, account.pw_uid, account.pw_gid)
    as_postgres = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
    pgbench = [programs / "pgbench", "-h", near.v4, "-p", 7700, "-U", "postgres"]
    try:
        data = folder / "data"
        initdb = [*as_postgres, programs / "initdb", "-D", data, "-A", "trust", "--no-sync"]
        subprocess.run(initdb, check=True, capture_output=True, cwd="/")
        with (data / "pg_hba.conf").open("a") as rules:
            rules.write("host all all 10.77.0.0/24 trust\n")
        server = near.start(
            *as_postgres, programs / "postgres", "-D", data, "-p", 7700, "-h", "*", "-k", folder,
            "-F", cwd="/", stderr=subprocess.DEVNULL,
        )  # fmt: skip
        near.wait_for_listener(7700)
        far.run(*pgbench, "-i", "-q", "postgres")
        far.lose("tcp sport 7700 numgen inc mod 40 7", chain="input")
        with tracing(with_children(server.pid), tmp_path / "c"):
            before = near.counter("TcpRetransSegs")
            far.run(*pgbench, "-T", 4, "-c", 6, "-C", "-S", "postgres")
            far.run(*pgbench, "-T", 3, "-c", 6, "postgres")
            segs = settled(near, far) - before
        check(tmp_path / "c", segs, "postgres")
    finally:
        for host in hosts:
            host.end()
        shutil.rmtree(folder)
