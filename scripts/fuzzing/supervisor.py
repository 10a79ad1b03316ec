"""Runs a target's cases in a child: whatever ends the child, the case that did it is known."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import resource
import select
import signal
import struct
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Final

import hypothesis
from hypothesis.database import DirectoryBasedExampleDatabase

from .target import Missing, Property, Target

MEMORY_BYTES: Final = 3 << 29
"""Address space that a target may take beyond what there is when it begins."""
_HANGS_S: Final = 60.0
"""Wall time of one case after which the child is ended; its CPU time has a limit of its own."""
_MOST_CASE: Final = 4 << 20
_HEAD: Final = struct.Struct("=QQQ")
"""cases, bytes of the case at hand, 1 while there is one."""
_EXAMPLES: Final = 100
"""Of a property that are drawn before the clock is looked at."""


class _TooSlow(BaseException):
    """The case used up its CPU time. Nothing that catches exceptions may catch this one."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """cases: how many ran. finding: what is wrong, empty for nothing; case: with which bytes."""

    cases: int
    finding: str = ""
    case: bytes = b""
    missing: str = ""


class _Shared:
    """What the child tells of the case at hand, in memory that outlives it."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _HEAD.size + _MOST_CASE)

    def begin(self, case: bytes) -> None:
        """A case begins."""
        cases, _, _ = _HEAD.unpack_from(self._memory)
        kept = case[:_MOST_CASE]
        self._memory[_HEAD.size : _HEAD.size + len(kept)] = kept
        _HEAD.pack_into(self._memory, 0, cases + 1, len(kept), 1)

    def end(self) -> None:
        """It is over."""
        cases, length, _ = _HEAD.unpack_from(self._memory)
        _HEAD.pack_into(self._memory, 0, cases, length, 0)

    @property
    def cases(self) -> int:
        """So far."""
        return int(_HEAD.unpack_from(self._memory)[0])

    @property
    def case(self) -> bytes:
        """The last one."""
        length = int(_HEAD.unpack_from(self._memory)[1])
        return self._memory[_HEAD.size : _HEAD.size + length]

    @property
    def under_way(self) -> bool:
        """Whether there is one at hand."""
        return bool(_HEAD.unpack_from(self._memory)[2])


@contextlib.contextmanager
def _limited(limit_s: float) -> Iterator[None]:
    def too_slow(*_: object) -> None:
        raise _TooSlow(f"more than {limit_s:g} s of CPU time")

    signal.signal(signal.SIGPROF, too_slow)
    signal.setitimer(signal.ITIMER_PROF, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def check_here(target: Target, case: bytes) -> None:
    """Check one case in this process. Raises what it finds."""
    with warnings.catch_warnings():
        # numpy warns of what wraps around by mistake.
        warnings.simplefilter("error")
        with _limited(target.limit_s):
            target.check(case)


def _mutations(target: Target, shared: _Shared, random: Random, until: float) -> None:
    while time.monotonic() < until:
        case = target.make(random)
        shared.begin(case)
        check_here(target, case)
        shared.end()


def _property(target: Property, shared: _Shared, random: Random, until: float, base: Path) -> None:
    def checked(value: Any) -> None:
        shared.begin(repr(value).encode("utf-8", "backslashreplace"))
        with _limited(target.limit_s):
            target.check(value)
        shared.end()

    # What examples are kept under, from one run to the next.
    checked.__qualname__ = checked.__name__ = target.name.replace("-", "_")
    examples = hypothesis.settings(
        max_examples=_EXAMPLES,
        deadline=None,
        database=DirectoryBasedExampleDatabase(base / "examples"),
        suppress_health_check=list(hypothesis.HealthCheck),
        print_blob=True,
    )
    while time.monotonic() < until:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            drawn = hypothesis.given(target.strategy())(checked)
            hypothesis.seed(random.getrandbits(64))(examples(drawn))()


def _child(
    target: Target | Property, shared: _Shared, *, seed: str, seconds: float, base: Path, pipe: int
) -> int:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_BYTES, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    until, random = time.monotonic() + seconds, Random(seed)  # noqa: S311 - not a secret
    try:
        if isinstance(target, Property):
            _property(target, shared, random, until, base)
        else:
            _mutations(target, shared, random, until)
    except Missing as error:
        os.write(pipe, b"missing: " + str(error).encode()[:1000])
    except BaseException:  # each of them is a finding
        text = traceback.format_exc()
        os.write(pipe, text[-30000:].encode("utf-8", "backslashreplace"))
        return 1
    return 0


def run(target: Target | Property, *, seed: str, seconds: float, base: Path) -> Outcome:
    """Run cases for so many seconds, drawn from a seed; ends at the first finding.

    `base`: a folder for what is kept between runs.
    """
    shared = _Shared()
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(reader)
            code = _child(target, shared, seed=seed, seconds=seconds, base=base, pipe=writer)
        finally:
            os._exit(code)
    os.close(writer)
    hung = _wait(pid, shared)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with os.fdopen(reader, "rb") as stream:
        said = stream.read().decode("utf-8", "replace")
    if said.startswith("missing: ") and status == 0:
        return Outcome(shared.cases, missing=said.removeprefix("missing: "))
    if status == 0:
        return Outcome(shared.cases)
    if hung:
        said = f"a case took longer than {_HANGS_S:g} s"
    elif status < 0:
        said += f"\nended by {signal.Signals(-status).name}"
    return Outcome(shared.cases, said or f"ended with code {status}", shared.case)


def _wait(pid: int, shared: _Shared) -> bool:
    """Wait until the child has ended; true when it had to be ended because it hung."""
    pidfd = os.pidfd_open(pid)
    try:
        cases, since = -1, time.monotonic()
        while not select.select([pidfd], [], [], 0.5)[0]:
            now = shared.cases if shared.under_way else -1
            if now < 0 or now != cases:
                cases, since = now, time.monotonic()
            elif time.monotonic() - since > _HANGS_S:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                return True
    finally:
        os.close(pidfd)
    return False


def keep(target: Target | Property, outcome: Outcome, base: Path) -> Path:
    """Write a finding down; where its case is."""
    base.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(outcome.case).hexdigest()[:12]
    path = base / f"{target.name}-{digest}.case"
    path.write_bytes(outcome.case)
    path.with_suffix(".txt").write_text(outcome.finding + "\n")
    return path
