"""What every test shares: when kernel tests run, and that none of them leaves anything behind.

A test marked `kernel` needs root, BTF and the distribution's bcc. Without them it is skipped with
the reason; with `LATRACE_REQUIRE_KERNEL=1` (CI) it fails instead, so that green means that it ran.
"""

from __future__ import annotations

import ctypes
import errno
import importlib.util
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Every program and map of ours is named with this prefix, so that they can be told from those of
# the host's service manager and of other tools.
OUR_PREFIX = "lat_"

# The kernel frees programs and maps some time after the last descriptor is closed.
FREED_WITHIN_S = 5.0

# Tests that are about sudo say so themselves: else files would be made as who typed `sudo
# scripts/test`, whom pytest's folders are closed to.
for variable in ("SUDO_UID", "SUDO_GID", "SUDO_USER", "SUDO_COMMAND", "SUDO_HOME"):
    os.environ.pop(variable, None)

# In the environment of everything that the tests start.
MARK = f"LATRACE_TESTS={os.getpid()}"
os.environ.update([MARK.split("=")])

SETTINGS = (
    "kernel/bpf_stats_enabled",
    "kernel/kptr_restrict",
    "kernel/perf_event_max_stack",
    "kernel/perf_event_paranoid",
    "kernel/sched_schedstats",
    "kernel/task_delayacct",
    "net/core/bpf_jit_enable",
)


CLONE_NEWNS = 0x00020000
MS_REC_PRIVATE = 0x4000 | 0x40000


def pytest_configure() -> None:
    """Give the tests a mount table of their own: what others mount meanwhile is not ours."""
    libc = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() == 0 and libc.unshare(CLONE_NEWNS) == 0:
        libc.mount(None, b"/", None, ctypes.c_ulong(MS_REC_PRIVATE), None)


def missing_for_kernel_tests() -> str | None:
    """Why kernel tests can't run here, or None when they can."""
    if os.geteuid() != 0:
        return "needs root: sudo scripts/test"
    if not Path("/sys/kernel/btf/vmlinux").exists():
        return "needs a kernel with BTF (/sys/kernel/btf/vmlinux)"
    if importlib.util.find_spec("bcc") is None:
        return "needs the distribution's python3-bpfcc"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Try tests on the live kernel again, and say so at the end (`-r R` in pyproject.toml).

    Their machine is a virtual one that others share: now and then a host takes its CPU for long
    enough, or a sandbox hides enough events (docs/limits.md), that an answer known in advance does
    not come out. What is wrong in latrace fails each time.
    """
    for item in items:
        if item.get_closest_marker("kernel") is not None:
            item.add_marker(pytest.mark.flaky(reruns=2))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a kernel test that can't run here, or fail it where it has to run."""
    if item.get_closest_marker("kernel") is None:
        return
    reason = missing_for_kernel_tests()
    if reason is None:
        return
    if os.environ.get("LATRACE_REQUIRE_KERNEL") == "1":
        pytest.fail(f"LATRACE_REQUIRE_KERNEL=1, but this test {reason}", pytrace=False)
    pytest.skip(reason)


# --- what is loaded in the kernel, asked of bpf(2) itself -------------------------------------

NR_BPF = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "ppc64le": 361, "s390x": 351}
OBJ_GET_INFO_BY_FD = 15
# kind: (BPF_*_GET_NEXT_ID, BPF_*_GET_FD_BY_ID, offset of the name in struct bpf_{prog,map}_info)
KINDS = {"prog": (11, 13, 64), "map": (12, 14, 24)}
NAME_LENGTH = 16
FDINFO_KEYS = {"prog_id:": "prog", "map_id:": "map"}


class _Id(ctypes.Structure):
    _fields_ = (("id", ctypes.c_uint32), ("next_id", ctypes.c_uint32), ("flags", ctypes.c_uint32))


class _Info(ctypes.Structure):
    _fields_ = (("fd", ctypes.c_uint32), ("length", ctypes.c_uint32), ("info", ctypes.c_uint64))


def _bpf(command: int, attr: ctypes.Structure) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.syscall(
        NR_BPF[platform.machine()], command, ctypes.byref(attr), ctypes.sizeof(attr)
    )
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(result)


def our_bpf_objects() -> set[tuple[str, int, str]]:
    """List the BPF programs and maps of ours in the kernel as (kind, id, name)."""
    found: set[tuple[str, int, str]] = set()
    for kind, (next_id, fd_by_id, name_offset) in KINDS.items():
        request = _Id()
        while True:
            try:
                _bpf(next_id, request)
            except OSError as error:
                if error.errno == errno.ENOENT:
                    break
                raise
            request.id = request.next_id
            try:
                fd = _bpf(fd_by_id, _Id(id=request.id))
            except OSError as error:
                if error.errno == errno.ENOENT:  # freed since it was listed
                    continue
                raise
            try:
                raw = ctypes.create_string_buffer(name_offset + NAME_LENGTH)
                _bpf(OBJ_GET_INFO_BY_FD, _Info(fd, len(raw), ctypes.addressof(raw)))
            finally:
                os.close(fd)
            name = raw.raw[name_offset:].split(b"\0")[0].decode("ascii", "replace")
            if name.startswith(OUR_PREFIX):
                found.add((kind, request.id, name))
    return found


def held_by_others() -> set[tuple[str, int]]:
    """(kind, id) of what processes hold that none of these tests started.

    Somebody may be tracing on this machine while the tests run. Ours are those below this
    process, and those that inherited its mark, however far they strayed.
    """
    parents: dict[int, int] = {}
    held: dict[int, set[tuple[str, int]]] = {}
    marked = {os.getpid()}
    for process in Path("/proc").glob("[0-9]*"):
        pid = int(process.name)
        try:
            parents[pid] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            if f"{MARK}\0".encode() in (process / "environ").read_bytes():
                marked.add(pid)
            for fdinfo in (process / "fdinfo").iterdir():
                for line in fdinfo.read_text().splitlines():
                    key, _, value = line.partition("\t")
                    if key in FDINFO_KEYS:
                        held.setdefault(pid, set()).add((FDINFO_KEYS[key], int(value)))
        except OSError:  # ended meanwhile
            continue

    def is_ours(pid: int) -> bool:
        while pid > 1:
            if pid in marked:
                return True
            pid = parents.get(pid, 0)
        return False

    return {item for pid, items in held.items() if not is_ours(pid) for item in items}


def read_settings() -> dict[str, str]:
    """Read the kernel settings that a tracer may be tempted to touch, and the mounts."""
    settings = {"mounts": Path("/proc/self/mounts").read_text()}
    for name in SETTINGS:
        path = Path("/proc/sys") / name
        if path.exists():
            settings[name] = path.read_text()
    return settings


@pytest.fixture
def bpf_objects() -> Callable[[], set[tuple[str, int, str]]]:
    """Give the function that lists the programs and maps that these tests have in the kernel."""

    def of_these_tests() -> set[tuple[str, int, str]]:
        objects = our_bpf_objects()
        others = held_by_others()
        return {item for item in objects if item[:2] not in others}

    return of_these_tests


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a kernel test after which a program, a map or a changed setting of ours stays."""
    if request.node.get_closest_marker("kernel") is None:
        yield
        return
    objects, settings = our_bpf_objects(), read_settings()
    yield
    left = our_bpf_objects() - objects
    deadline = time.monotonic() + FREED_WITHIN_S
    while left:
        others = held_by_others()
        # What came after the test is somebody else's.
        left = {item for item in left & our_bpf_objects() if item[:2] not in others}
        if left and time.monotonic() > deadline:
            pytest.fail(f"left in the kernel: {sorted(left)}", pytrace=False)
        time.sleep(0.05)
    assert read_settings() == settings
