"""The service tests/workloads/service, and clients of it."""

from __future__ import annotations

import http.client
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

WORKLOADS = Path(__file__).resolve().parents[1] / "workloads"


def build_service(folder: Path, *, linker_flags: Sequence[str] = ()) -> Path:
    """Compile it with the distribution's Go; a test that has none is skipped."""
    if shutil.which("go") is None:
        if os.environ.get("LATRACE_REQUIRE_KERNEL") == "1":
            pytest.fail("needs the distribution's golang-go", pytrace=False)
        pytest.skip("needs the distribution's golang-go")
    env = os.environ | {
        "GOFLAGS": "-mod=mod",
        "GOPROXY": "off",
        "GOCACHE": str(folder / "cache"),
        "CGO_ENABLED": "0",
    }
    flags = " ".join(linker_flags)
    command = ["go", "build", "-ldflags", flags, "-o", folder / "service", "."]
    subprocess.run(command, cwd=WORKLOADS / "service", env=env, check=True)
    return folder / "service"


class Traffic:
    """Clients that ask for `/fast` at a steady pace, and for more when they are told to."""

    def __init__(self, address: str, *, clients: int = 4, period_s: float = 0.01) -> None:
        self._address = address
        self._period_s = period_s
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._steadily) for _ in range(clients)]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _steadily(self) -> None:
        connection = http.client.HTTPConnection(self._address, timeout=60)
        due_s = time.monotonic()
        while not self._stop.wait(max(0.0, due_s - time.monotonic())):
            due_s = max(due_s + self._period_s, time.monotonic() - 1)  # catch up, but not for ever
            self._ask(connection, "/fast")
        connection.close()

    @staticmethod
    def _ask(connection: http.client.HTTPConnection, target: str) -> None:
        try:
            connection.request("GET", target)
            connection.getresponse().read()
        except (OSError, http.client.HTTPException):  # the service may be killed by a test
            connection.close()
            time.sleep(0.05)

    def burst(self, target: str, *, clients: int, times: int = 1) -> None:
        """Ask for something with so many clients at once, each so often; return at once."""

        def ask() -> None:
            connection = http.client.HTTPConnection(self._address, timeout=60)
            for _ in range(times):
                if not self._stop.is_set():
                    self._ask(connection, target)
            connection.close()

        some = [threading.Thread(target=ask) for _ in range(clients)]
        self._threads += some
        for thread in some:
            thread.start()
