"""The few calls of bpf(2) that bcc lacks: typed tracepoints, task iterators, run statistics.

Layouts are `union bpf_attr` of include/uapi/linux/bpf.h. Every object is a file descriptor, none is
pinned: when this process ends, however it ends, the kernel frees them all.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from dataclasses import dataclass

_NR_BPF = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "s390x": 351, "ppc64le": 361}
_PROG_LOAD, _OBJ_GET_INFO, _RAW_TRACEPOINT_OPEN = 5, 15, 17
_LINK_CREATE, _ENABLE_STATS, _ITER_CREATE = 28, 32, 33
_TYPE_TRACING = 26
_ATTACH_RAW_TRACEPOINT, _ATTACH_ITER = 23, 28

_libc = ctypes.CDLL(None, use_errno=True)


def _bpf(command: int, attributes: bytearray) -> int:
    buffer = (ctypes.c_char * len(attributes)).from_buffer(attributes)
    result: int = _libc.syscall(_NR_BPF[platform.machine()], command, buffer, len(attributes))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


class VerifierError(OSError):
    """The kernel refused a program; `log` is what its verifier said."""

    def __init__(self, error: OSError, log: str) -> None:
        super().__init__(error.errno, error.strerror)
        self.log = log


def load_program(name: str, instructions: bytes, *, attach_type_id: int, iterator: bool) -> int:
    """Load a BTF-typed tracepoint program or task iterator; returns its file descriptor.

    Raises VerifierError with the verifier's words, OSError for anything else.
    """
    code = ctypes.create_string_buffer(instructions, len(instructions))
    licence = ctypes.create_string_buffer(b"Dual MIT/GPL")
    log = ctypes.create_string_buffer(1 << 20)

    def load(log_level: int) -> int:
        attributes = bytearray(152)
        struct.pack_into(
            "<IIQQIIQII16sII",
            attributes,
            0,
            _TYPE_TRACING,
            len(instructions) // 8,
            ctypes.addressof(code),
            ctypes.addressof(licence),
            log_level,
            len(log) if log_level else 0,
            ctypes.addressof(log) if log_level else 0,
            0,
            0,
            name.encode()[:15],
            0,
            _ATTACH_ITER if iterator else _ATTACH_RAW_TRACEPOINT,
        )
        struct.pack_into("<I", attributes, 108, attach_type_id)
        return _bpf(_PROG_LOAD, attributes)

    try:
        return load(0)
    except OSError as error:
        try:
            return load(1)  # once more, for the verifier's words
        except OSError:
            raise VerifierError(error, log.value.decode(errors="replace")) from None


def attach_tracepoint(program: int) -> int:
    """Attach a typed tracepoint program; closing the returned descriptor detaches it."""
    return _bpf(_RAW_TRACEPOINT_OPEN, bytearray(struct.pack("<QII", 0, program, 0)))


def read_iterator(program: int) -> bytes:
    """Run a task iterator over all tasks and return everything it wrote."""
    link = _bpf(_LINK_CREATE, bytearray(struct.pack("<IIII16x", program, 0, _ATTACH_ITER, 0)))
    try:
        stream = _bpf(_ITER_CREATE, bytearray(struct.pack("<II", link, 0)))
    finally:
        os.close(link)
    with os.fdopen(stream, "rb", buffering=0) as file:
        parts = []
        while part := file.read(1 << 20):
            parts.append(part)
        return b"".join(parts)


def enable_statistics() -> int:
    """Have the kernel time every BPF program until the returned descriptor is closed."""
    return _bpf(_ENABLE_STATS, bytearray(struct.pack("<I4x", 0)))


@dataclass(frozen=True, slots=True)
class ProgramStatistics:
    """What the kernel counted for one program while statistics were on."""

    run_ns: int
    runs: int
    recursion_misses: int


def program_statistics(program: int) -> ProgramStatistics:
    """Run time and run count (while statistics are on) and runs skipped for recursion (always)."""
    info = bytearray(232)
    buffer = (ctypes.c_char * len(info)).from_buffer(info)
    _bpf(
        _OBJ_GET_INFO,
        bytearray(struct.pack("<IIQ", program, len(info), ctypes.addressof(buffer))),
    )
    run_ns, runs, misses = struct.unpack_from("<QQQ", info, 192)
    return ProgramStatistics(run_ns, runs, misses)
