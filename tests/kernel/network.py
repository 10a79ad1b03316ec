"""Two hosts joined by a wire that loses what it is told to, in network namespaces of their own.

The namespaces, and the link with them, are gone when the block ends, whatever happens in it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pyroute2 import IPRoute, netns

_NFT = "/usr/sbin/nft"


@dataclass(frozen=True)
class Host:
    """One end of the wire."""

    namespace: str
    v4: str
    v6: str
    device: str = "wire"
    running: list[subprocess.Popen[Any]] = field(default_factory=list)

    def command(self, *argv: object) -> list[str]:
        """The command that runs `argv` here; the process it starts becomes it."""
        where = f"--net=/var/run/netns/{self.namespace}"
        return ["nsenter", where, *map(str, argv)]

    def run(self, *argv: object, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; its output is text."""
        return subprocess.run(
            self.command(*argv), check=True, text=True, capture_output=True, **options
        )

    def start(self, *argv: object, **options: Any) -> subprocess.Popen[Any]:
        """Start a command that ends with the network at the latest."""
        process = subprocess.Popen(self.command(*argv), **options)
        self.running.append(process)
        return process

    def wait_for_listener(self, port: int) -> None:
        """Wait until somebody listens there."""
        deadline = time.monotonic() + 10
        while f":{port} " not in self.run("ss", "-Hltn").stdout:
            assert time.monotonic() < deadline, f"nobody listens on port {port}"
            time.sleep(0.02)

    def end(self) -> None:
        """End all that was started here, and what that has started."""
        told = subprocess.run(
            ["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=False
        )
        for pid in told.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        while self.running:
            process = self.running.pop()
            process.kill()
            process.wait()

    def lose(self, *matches: str, chain: str = "output") -> None:
        """Drop what matches, from now on; `chain`: on its way out, or `input`.

        `numgen inc mod 100 0` takes one packet of a hundred, the first one first.
        """
        self.heal()
        rules = "\n".join(f"    {match} counter drop" for match in matches)
        script = (
            f"table inet loss {{\n  chain lossy {{\n    type filter hook {chain} priority 0;\n"
            f"{rules}\n  }}\n}}\n"
        )
        self.run(_NFT, "-f", "-", input=script)

    def heal(self) -> None:
        """Lose nothing any more."""
        subprocess.run(
            self.command(_NFT, "delete", "table", "inet", "loss"), capture_output=True, check=False
        )

    def lost(self) -> int:
        """How many packets the rules of `lose` have dropped."""
        text = self.run(_NFT, "list", "table", "inet", "loss").stdout
        return sum(
            int(line.split("packets")[1].split()[0])
            for line in text.splitlines()
            if "packets" in line
        )

    def counter(self, name: str) -> int:
        """One of the kernel's counters of this namespace, as `nstat` calls it: TcpRetransSegs."""
        for file in ("snmp", "netstat"):
            lines = self.run("cat", f"/proc/net/{file}").stdout.splitlines()
            for heads, values in zip(lines[::2], lines[1::2], strict=True):
                prefix = heads.split(":")[0]
                for head, value in zip(heads.split()[1:], values.split()[1:], strict=True):
                    if prefix + head == name:
                        return int(value)
        raise KeyError(name)


@contextlib.contextmanager
def two_hosts(*, offload: bool = True) -> Iterator[tuple[Host, Host]]:
    """Make them: 10.77.0.1 and fd77::1, 10.77.0.2 and fd77::2.

    `offload`: segments go through the stack joined.
    """
    unique = uuid.uuid4().hex[:8]
    hosts = tuple(Host(f"latrace-{unique}-{n}", f"10.77.0.{n}", f"fd77::{n}") for n in (1, 2))
    with contextlib.ExitStack() as undo, IPRoute() as route:
        for host in hosts:
            netns.create(host.namespace)
            undo.callback(netns.remove, host.namespace)
            undo.callback(host.end)
        first = f"lt{unique}"
        descriptors = []
        for host in hosts:
            fd = os.open(f"/var/run/netns/{host.namespace}", os.O_RDONLY)
            undo.callback(os.close, fd)
            descriptors.append(fd)
        route.link("add", ifname=first, kind="veth", peer={"ifname": f"{first}p"})
        for name, fd in zip((first, f"{first}p"), descriptors, strict=True):
            route.link("set", index=route.link_lookup(ifname=name)[0], net_ns_fd=fd)
        for host, name in zip(hosts, (first, f"{first}p"), strict=True):
            for argv in (
                ("ip", "link", "set", name, "name", host.device),
                ("ip", "addr", "add", f"{host.v4}/24", "dev", host.device),
                ("ip", "addr", "add", f"{host.v6}/64", "dev", host.device, "nodad"),
                ("ip", "link", "set", host.device, "up"),
                ("ip", "link", "set", "lo", "up"),
            ):
                host.run(*argv)
            if not offload:
                host.run("ethtool", "-K", host.device, "gso", "off", "tso", "off", "gro", "off")
        yield hosts[0], hosts[1]
