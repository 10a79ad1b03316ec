"""Structure offsets and type ids of the running kernel, from /sys/kernel/btf/vmlinux.

The format is Documentation/bpf/btf.rst in the kernel tree. Only what the probes ask for is decoded;
the walk over all type headers takes most of the time, so it does as little as it can.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from pathlib import Path

from .errors import HostError

VMLINUX = Path("/sys/kernel/btf/vmlinux")

_STRUCT, _UNION, _TYPEDEF, _FUNC, _VAR, _DATASEC = 4, 5, 8, 12, 14, 15
_POINTER = 2
_MODIFIERS = (8, 9, 10, 11)  # typedef, volatile, const, restrict
# Words of a type after its three header words: a fixed part by kind, and one for each member.
_FIXED = {1: 1, 3: 3, 14: 1, 17: 1}
_PER_MEMBER = {4: 3, 5: 3, 6: 2, 13: 2, 15: 3, 19: 3}


def read_btf(path: Path = VMLINUX) -> bytes:
    """The kernel's type information, raw.

    Raises HostError when the kernel has none (CONFIG_DEBUG_INFO_BTF) or it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise HostError(
            f"the kernel's type information cannot be read: {path}: {error.strerror}",
            hint="the kernel must be built with CONFIG_DEBUG_INFO_BTF=y; see: latrace doctor",
        ) from error


class Btf:
    """The kernel's type information, decoded. Raises HostError when it is not BTF."""

    def __init__(self, raw: bytes) -> None:
        magic, _, _, header, type_off, type_len, str_off, str_len = struct.unpack_from(
            "<HBBIIIII", raw
        )
        if magic != 0xEB9F:
            raise HostError(f"{VMLINUX} is not little-endian BTF", hint="see: latrace doctor")
        self._strings = raw[header + str_off : header + str_off + str_len]
        words = array("I", raw[header + type_off : header + type_off + type_len])
        self._words = words
        self._starts, self._ids = self._walk(words)

    @staticmethod
    def _walk(words: array[int]) -> tuple[list[int], dict[tuple[int, int], int]]:
        """Where each type starts (in words, by type id), and ids by (kind, name offset)."""
        fixed = [3 + _FIXED.get(kind, 0) for kind in range(32)]
        per_member = [_PER_MEMBER.get(kind, 0) for kind in range(32)]
        listed = words.tolist()
        starts = [0]
        ids: dict[tuple[int, int], int] = {}
        at, end = 0, len(listed)
        append = starts.append
        named = {_STRUCT, _UNION, _TYPEDEF, _FUNC, _VAR, _DATASEC}
        while at < end:
            info = listed[at + 1]
            kind = info >> 24 & 31
            if kind in named:
                ids.setdefault((kind, listed[at]), len(starts))
            append(at)
            at += fixed[kind] + per_member[kind] * (info & 0xFFFF)
        return starts, ids

    def _find(self, kind: int, name: str) -> int | None:
        at = self._strings.find(b"\0" + name.encode() + b"\0")
        return None if at < 0 else self._ids.get((kind, at + 1))

    def _kind(self, type_id: int) -> int:
        return self._words[self._starts[type_id] + 1] >> 24 & 31

    def _target(self, type_id: int) -> int:
        return self._words[self._starts[type_id] + 2]

    def _resolve(self, type_id: int) -> int:
        while self._kind(type_id) in _MODIFIERS:
            type_id = self._target(type_id)
        return type_id

    def _members(self, type_id: int) -> Iterator[tuple[str, int, int]]:
        """Name, type id and bit offset of each member of a struct or union."""
        start = self._starts[type_id]
        info = self._words[start + 1]
        bitfields = info >> 31
        for at in range(start + 3, start + 3 + 3 * (info & 0xFFFF), 3):
            name, member_type, bits = self._words[at : at + 3]
            text = self._strings[name : self._strings.index(b"\0", name)].decode()
            yield text, member_type, bits & 0xFFFFFF if bitfields else bits

    def _member(self, type_id: int, name: str) -> tuple[int, int] | None:
        for member, member_type, bits in self._members(type_id):
            if member == name:
                return member_type, bits
            if not member:
                inner = self._member(self._resolve(member_type), name)
                if inner:
                    return inner[0], bits + inner[1]
        return None

    def offset(self, struct_name: str, field: str) -> int | None:
        """Byte offset of a field (dotted, through anonymous members too), None when absent."""
        type_id = self._find(_STRUCT, struct_name)
        bits = 0
        for part in field.split("."):
            found = self._member(type_id, part) if type_id else None
            if not found:
                return None
            type_id = self._resolve(found[0])
            bits += found[1]
        return bits // 8

    def size(self, struct_name: str) -> int | None:
        """Size of a struct in bytes, None when absent."""
        type_id = self._find(_STRUCT, struct_name)
        return None if type_id is None else self._target(type_id)

    def tracepoint(self, name: str) -> int | None:
        """Type id of the typedef that a BTF-typed tracepoint program attaches to."""
        return self._find(_TYPEDEF, f"btf_trace_{name}")

    def tracepoint_arguments(self, name: str) -> int:
        """How many arguments the tracepoint passes, its private data pointer not counted."""
        type_id = self.tracepoint(name)
        if type_id is None:
            return 0
        prototype = self._target(self._target(type_id))
        return (self._words[self._starts[prototype] + 1] & 0xFFFF) - 1

    def function(self, name: str) -> int | None:
        """Type id of a kernel function."""
        return self._find(_FUNC, name)

    def per_cpu_offset(self, variable: str) -> int | None:
        """Offset of a per-CPU variable in the per-CPU section."""
        section, wanted = self._find(_DATASEC, ".data..percpu"), self._find(_VAR, variable)
        if section is None or wanted is None:
            return None
        start = self._starts[section]
        count = self._words[start + 1] & 0xFFFF
        for at in range(start + 3, start + 3 + 3 * count, 3):
            if self._words[at] == wanted:
                return self._words[at + 1]
        return None
