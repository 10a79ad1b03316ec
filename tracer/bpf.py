"""The calls of bpf(2) that latrace needs: maps, typed tracepoints, task iterators, statistics.

Layouts are `union bpf_attr` of include/uapi/linux/bpf.h. Every object is a file descriptor, none is
pinned: when this process ends, however it ends, the kernel frees them all.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .compiled import Map

_NR_BPF = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "s390x": 351, "ppc64le": 361}
_MAP_CREATE, _MAP_LOOKUP, _MAP_UPDATE, _MAP_NEXT_KEY = 0, 1, 2, 4
_PROG_LOAD, _OBJ_GET_INFO, _RAW_TRACEPOINT_OPEN, _BTF_LOAD = 5, 15, 17, 18
_LINK_CREATE, _ENABLE_STATS, _ITER_CREATE = 28, 32, 33
TYPE_PERF_EVENT, TYPE_TRACING = 7, 26
_MAP_SOCKET_STORAGE, _MAP_TASK_STORAGE = 24, 29
_ATTACH_RAW_TRACEPOINT, _ATTACH_ITER = 23, 28
CLONED = 1 << 9
"""BPF_F_CLONE: an accepted socket begins with what is stored with the one that listened."""

_libc = ctypes.CDLL(None, use_errno=True)


def _bpf(command: int, attributes: bytearray) -> int:
    buffer = (ctypes.c_char * len(attributes)).from_buffer(attributes)
    result: int = _libc.syscall(_NR_BPF[platform.machine()], command, buffer, len(attributes))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def shape_of(name: str, fd: int) -> Map:
    """What a map was made as."""
    kind, _, key_bytes, value_bytes, entries, flags = struct.unpack_from("<6I", _info(fd, 88))
    return Map(name, kind, key_bytes, value_bytes, entries, flags)


def create_map(shape: Map) -> int:
    """Make a map; returns its file descriptor. Raises OSError."""
    attributes = bytearray(72)
    struct.pack_into(
        "<5I8x16s",
        attributes,
        0,
        shape.kind,
        shape.key_bytes,
        shape.value_bytes,
        shape.entries,
        shape.flags,
        shape.name.encode()[:15],
    )
    if shape.kind not in {_MAP_TASK_STORAGE, _MAP_SOCKET_STORAGE}:
        return _bpf(_MAP_CREATE, attributes)
    blob = _key_and_value_types(shape.value_bytes)
    buffer = ctypes.create_string_buffer(blob, len(blob))
    types = _bpf(
        _BTF_LOAD, bytearray(struct.pack("<QQIII4x", ctypes.addressof(buffer), 0, len(blob), 0, 0))
    )
    try:
        struct.pack_into("<3I", attributes, 48, types, 1, 2)
        return _bpf(_MAP_CREATE, attributes)
    finally:
        os.close(types)


def _key_and_value_types(value_bytes: int) -> bytes:
    """BTF of what storage with a task or a socket asks for (Documentation/bpf/btf.rst): type 1, the
    key, an int; type 2, the value, a struct of so many bytes."""
    strings = b"\0int\0value\0"
    types = struct.pack("<4I", 1, 1 << 24, 4, 1 << 24 | 32) + struct.pack(
        "<3I", 5, 4 << 24, value_bytes
    )
    return (
        struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(strings))
        + types
        + strings
    )


def map_update(fd: int, key: bytes | None, value: bytes) -> None:
    """Set an element, or push one onto a queue (`key` None)."""
    key_buffer = ctypes.create_string_buffer(key, len(key)) if key is not None else None
    value_buffer = ctypes.create_string_buffer(value, len(value))
    _element(_MAP_UPDATE, fd, key_buffer, value_buffer)


def map_lookup(fd: int, key: bytes, *, value_bytes: int) -> bytes | None:
    """The value of a key, None when there is none."""
    value = ctypes.create_string_buffer(value_bytes)
    try:
        _element(_MAP_LOOKUP, fd, ctypes.create_string_buffer(key, len(key)), value)
    except FileNotFoundError:
        return None
    return value.raw


def map_keys(fd: int, *, key_bytes: int) -> Iterator[bytes]:
    """The keys of a hash map."""
    key, following = None, ctypes.create_string_buffer(key_bytes)
    while True:
        try:
            _element(_MAP_NEXT_KEY, fd, key, following)
        except FileNotFoundError:
            return
        yield following.raw
        key = ctypes.create_string_buffer(following.raw, key_bytes)


def _element(command: int, fd: int, key: Any, value: Any) -> None:
    addresses = (ctypes.addressof(each) if each is not None else 0 for each in (key, value))
    _bpf(command, bytearray(struct.pack("<I4xQQQ", fd, *addresses, 0)))


class VerifierError(OSError):
    """The kernel refused a program; `log` is what its verifier said."""

    def __init__(self, error: OSError, log: str) -> None:
        super().__init__(error.errno, error.strerror)
        self.log = log


def load_program(
    name: str,
    instructions: bytes,
    *,
    attach_type_id: int,
    iterator: bool,
    program_type: int = TYPE_TRACING,
) -> int:
    """Load a BTF-typed tracepoint program or task iterator, or one for perf events.

    `attach_type_id` is 0 for the latter. Returns its file descriptor.

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
            program_type,
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
            _attach_type(program_type, iterator=iterator),
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


def _attach_type(program_type: int, *, iterator: bool) -> int:
    if program_type != TYPE_TRACING:
        return 0
    return _ATTACH_ITER if iterator else _ATTACH_RAW_TRACEPOINT


def attach_tracepoint(program: int) -> int:
    """Attach a typed tracepoint program; closing the returned descriptor detaches it."""
    return _bpf(_RAW_TRACEPOINT_OPEN, bytearray(struct.pack("<QII", 0, program, 0)))


def read_iterator(program: int, over_map: int | None = None) -> bytes:
    """Run an iterator to its end, over tasks or the like or a map; return everything it wrote."""
    attributes = bytearray(struct.pack("<IIII16x", program, 0, _ATTACH_ITER, 0))
    # union bpf_iter_link_info
    which = ctypes.create_string_buffer(struct.pack("<I4x", over_map or 0), 8)
    if over_map is not None:
        struct.pack_into("<QI", attributes, 16, ctypes.addressof(which), len(which))
    link = _bpf(_LINK_CREATE, attributes)
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
    run_ns, runs, misses = struct.unpack_from("<QQQ", _info(program, 232), 192)
    return ProgramStatistics(run_ns, runs, misses)


def _info(fd: int, size: int) -> bytearray:
    """The first `size` bytes of struct bpf_prog_info or bpf_map_info."""
    info = bytearray(size)
    buffer = (ctypes.c_char * size).from_buffer(info)
    _bpf(_OBJ_GET_INFO, bytearray(struct.pack("<IIQ", fd, size, ctypes.addressof(buffer))))
    return info
