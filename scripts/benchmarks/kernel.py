"""What bpf(2) and /proc tell of programs that others loaded, and how to run one by hand.

Layouts are `union bpf_attr` and `struct bpf_prog_info` of include/uapi/linux/bpf.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import struct
from collections.abc import Iterator
from pathlib import Path

_NR_BPF = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "s390x": 351, "ppc64le": 361}
_TEST_RUN, _PROG_GET_FD_BY_ID = 10, 13
_TYPE_PERF_EVENT = 7

_libc = ctypes.CDLL(None, use_errno=True)
_packet = ctypes.create_string_buffer(64)


def _bpf(command: int, attributes: bytearray) -> int:
    buffer = (ctypes.c_char * len(attributes)).from_buffer(attributes)
    result: int = _libc.syscall(_NR_BPF[platform.machine()], command, buffer, len(attributes))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def run_program(program: int, times: int) -> None:
    """Run a program `times` times in one call."""
    attributes = bytearray(80)
    struct.pack_into("<IIII", attributes, 0, program, 0, len(_packet), 0)
    struct.pack_into("<QQI", attributes, 16, ctypes.addressof(_packet), 0, times)
    _bpf(_TEST_RUN, attributes)


def attached_programs(pid: int) -> dict[str, int]:
    """The programs that a process has attached to tracepoints, by tracepoint.

    The descriptors are ours: they keep the programs when the process ends. Programs attached the
    older way, through perf events, do not tell where they are and are not among them.
    """
    found: dict[str, int] = {}
    for text in _fdinfo(pid):
        where = re.search(r"^tp_name:\s*(\w+)", text, re.MULTILINE)
        which = re.search(r"^prog_id:\s*(\d+)", text, re.MULTILINE)
        if where and which and where[1] not in found:
            found[where[1]] = _program(int(which[1]))
    return found


def clock_program(pid: int) -> int | None:
    """The program that a process has for perf events, None when it has none. Ours, as above."""
    for text in _fdinfo(pid):
        which = re.search(r"^prog_id:\s*(\d+)", text, re.MULTILINE)
        if which and re.search(rf"^prog_type:\s*{_TYPE_PERF_EVENT}$", text, re.MULTILINE):
            return _program(int(which[1]))
    return None


def _fdinfo(pid: int) -> Iterator[str]:
    """What /proc tells of each descriptor of a process."""
    for entry in Path(f"/proc/{pid}/fdinfo").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            yield entry.read_text()


def _program(number: int) -> int:
    return _bpf(_PROG_GET_FD_BY_ID, bytearray(struct.pack("<III", number, 0, 0)))
