"""Profiles of a Go service, fetched from its net/http/pprof as a trigger fires.

All at once, bounded in time and size: a CPU profile and an execution trace of the next seconds,
the goroutines as they are, and twice the memory statistics, whose ring of the last 256 stops of
the world covers what happened in between. What they cost the service: the statistics and the
goroutines stop its world for well under a millisecond (longer with many thousands of goroutines),
the CPU profile interrupts it a hundred times a second, the trace takes a few percent.

Go takes one CPU profile at a time and refuses a second one; that becomes an error in words.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Self

from latrace.analysis import go_runtime, words
from latrace.tracer.errors import UsageError

from .fetch import Fetch, Fetcher, Url, parse_url

MARGIN_S: Final = 5.0
"""What an answer may take beyond the seconds that it is about."""
WORKERS: Final = 4

CPU: Final = "pprof-cpu.pb.gz"
GOROUTINES: Final = go_runtime.GOROUTINES
TRACE: Final = "pprof-trace.out"
HEAP: Final = go_runtime.HEAP
HEAP_BEFORE: Final = go_runtime.HEAP_BEFORE

_PREFIX: Final = "/debug/pprof"


def _is_cpu(body: bytes) -> bool:
    return body.startswith(b"\x1f\x8b\x08")  # RFC 1952


def _is_goroutines(body: bytes) -> bool:
    return body.startswith(b"goroutine profile: total ")


def _is_trace(body: bytes) -> bool:
    # runtime/trace.go: "go 1.19 trace" and zeros, 16 bytes
    return body.startswith(b"go 1.") and body[:16].rstrip(b"\0").endswith(b" trace")


def _is_heap(body: bytes) -> bool:
    return body.startswith(b"heap profile: ") and b"\n# runtime.MemStats\n" in body


@dataclass(frozen=True, slots=True)
class _Profile:
    """One file to fetch."""

    name: str
    target: str
    is_one: Callable[[bytes], bool]
    what: str
    max_bytes: int
    lasts: bool = False
    """Whether it is about the coming seconds."""


_FIRST: Final = (
    _Profile(HEAP_BEFORE, "heap?debug=1", _is_heap, "memory statistics", 4 << 20),
    _Profile(CPU, "profile?seconds={}", _is_cpu, "CPU profile", 8 << 20, lasts=True),
    _Profile(TRACE, "trace?seconds={}", _is_trace, "execution trace", 32 << 20, lasts=True),
    _Profile(GOROUTINES, "goroutine?debug=1", _is_goroutines, "dump of goroutines", 8 << 20),
)
_LAST: Final = _Profile(HEAP, "heap?debug=1", _is_heap, "memory statistics", 4 << 20)

FILES: Final = (*(each.name for each in _FIRST), HEAP)
MAX_TOTAL: Final = sum(each.max_bytes for each in (*_FIRST, _LAST))
"""Bytes that all files of one trigger can take in memory."""


def parse_pprof_url(text: str, option: str = "--pprof") -> Url:
    """Read where a service has its profiles: `http://127.0.0.1:6060`, or up to `/debug/pprof`.

    Raises UsageError.
    """
    url = parse_url(text, option)
    if "?" in url.target:
        raise UsageError(
            f"{option} {words.fit(text, 100)}: the address goes on with the profiles' own queries",
            hint=f"such as {option} http://127.0.0.1:6060",
        )
    path = url.target.rstrip("/")
    return url.at(path if path.endswith("/pprof") else path + _PREFIX)


class Profiles:
    """Fetches the profiles of process `pid` each time a trigger fires; nothing here waits.

    The child that fetches is there from the beginning: when a spike is on, nobody needs another
    program to start. Raises what `Fetcher` does.
    """

    def __init__(self, url: Url, pid: int) -> None:
        self.url = url
        self._fetcher = Fetcher(pid, workers=WORKERS)
        self._fetcher.start()
        self._under_way: list[tuple[_Profile, Fetch]] = []
        self._last_is_asked = True
        self._files: dict[str, bytes] = {}
        self._errors: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def running(self) -> bool:
        """Whether something is still to come; `take` gives what came when it is not."""
        return bool(self._under_way)

    def fileno(self) -> int:
        """What becomes readable when `poll` has something to do; -1: nothing is under way."""
        return self._fetcher.fileno()

    def start(self, seconds: float) -> bool:
        """Ask for all profiles, of the coming `seconds` (whole ones, for Go); False: it runs."""
        if self.running:
            return False
        whole = max(1, math.ceil(seconds))
        self._files, self._errors, self._last_is_asked = {}, [], False
        self._under_way = [(each, self._ask(each, whole)) for each in _FIRST]
        return True

    def poll(self) -> bool:
        """Take what has come; True once all of it has, for good or ill. Ends on its own."""
        self._fetcher.poll()
        waiting = []
        for profile, fetch in self._under_way:
            if fetch.done:
                self._keep(profile, fetch)
            else:
                waiting.append((profile, fetch))
        self._under_way = waiting
        if not self._last_is_asked and not any(profile.lasts for profile, _ in waiting):
            self._last_is_asked = True
            self._under_way.append((_LAST, self._ask(_LAST, 0)))
        return not self.running

    def take(self) -> tuple[dict[str, bytes], list[str]]:
        """Give the files that came by their names, and in words those that did not.

        What is still to come counts as not; another `start` is possible then only after `poll`.
        """
        files, errors = self._files, self._errors
        self._files, self._errors = {}, []
        return files, errors + [f"{each.name}: is still to come" for each, _ in self._under_way]

    def close(self) -> None:
        """End the child, and with it all that is under way."""
        self._last_is_asked = True
        self._fetcher.close()
        self.poll()

    def _ask(self, profile: _Profile, seconds: int) -> Fetch:
        return self._fetcher.submit(
            self.url.at(f"{self.url.target}/{profile.target.format(seconds)}"),
            timeout_s=MARGIN_S + (seconds if profile.lasts else 0),
            max_bytes=profile.max_bytes,
        )

    def _keep(self, profile: _Profile, fetch: Fetch) -> None:
        if fetch.error is not None:
            error = fetch.error
        elif not profile.is_one(fetch.body):
            error = f"what it answers is no {profile.what} of Go"
        else:
            self._files[profile.name] = fetch.body
            return
        address = words.fit(str(fetch.url), 200)
        self._errors.append(f"{profile.name}: {address} {error}")
