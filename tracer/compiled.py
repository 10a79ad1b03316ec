"""The probes as bcc compiled them, before they are in the kernel: maps and finished instructions.

An instruction that names a map holds the number of the map's place in `maps`, so what is compiled
once can be loaded by another process.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

# include/uapi/linux/bpf.h
_LOAD_IMMEDIATE_64, _PSEUDO_MAP_FD = 0x18, 1
_CALL, _PSEUDO_CALL = 0x85, 1


@dataclass(frozen=True, slots=True)
class Map:
    """What BPF_MAP_CREATE needs."""

    name: str
    kind: int
    key_bytes: int
    value_bytes: int
    entries: int
    flags: int


@dataclass(frozen=True, slots=True)
class Program:
    """One function, and the type id in the kernel's BTF of what it attaches to; 0: to nothing
    that has a type."""

    name: str
    instructions: bytes
    attach_type_id: int
    iterator: bool
    program_type: int = 26
    """BPF_PROG_TYPE_TRACING, or another of include/uapi/linux/bpf.h."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """All maps and programs."""

    maps: tuple[Map, ...]
    programs: tuple[Program, ...]

    def to_bytes(self) -> bytes:
        """As JSON."""
        programs = [
            asdict(program) | {"instructions": base64.b64encode(program.instructions).decode()}
            for program in self.programs
        ]
        return json.dumps(
            {"maps": [asdict(each) for each in self.maps], "programs": programs}
        ).encode()

    @classmethod
    def from_bytes(cls, text: bytes) -> Compiled:
        """Undo `to_bytes`. Raises ValueError, KeyError or TypeError for other text."""
        parts = json.loads(text)
        return cls(
            tuple(Map(**each) for each in parts["maps"]),
            tuple(
                Program(**(each | {"instructions": base64.b64decode(each["instructions"])}))
                for each in parts["programs"]
            ),
        )


def with_maps(instructions: bytes, numbers: dict[int, int] | list[int]) -> bytes:
    """Replace the map that each instruction names: old number → new one.

    Layout of an instruction (Documentation/bpf/standardization/instruction-set.rst): opcode u8,
    registers u8 (source in the high half), offset s16, immediate s32.
    """
    code = bytearray(instructions)
    for at in range(0, len(code), 8):
        if code[at] == _LOAD_IMMEDIATE_64 and code[at + 1] >> 4 == _PSEUDO_MAP_FD:
            number = int.from_bytes(code[at + 4 : at + 8], "little")
            code[at + 4 : at + 8] = numbers[number].to_bytes(4, "little")
    return bytes(code)


def with_parts(function: bytes, parts: Mapping[int, bytes]) -> bytes:
    """Put the functions that a function calls behind it, and those that they call.

    `parts`: by the helper number that stands for each. The immediate of a call within a program is
    the distance from the next instruction.
    """
    code, starts = bytearray(function), dict[int, int]()
    at = 0
    while at < len(code):
        number = int.from_bytes(code[at + 4 : at + 8], "little")
        if code[at] == _CALL and not code[at + 1] and number in parts:
            if number not in starts:
                starts[number] = len(code)
                code += parts[number]
            code[at + 1] = _PSEUDO_CALL << 4
            code[at + 4 : at + 8] = ((starts[number] - at) // 8 - 1).to_bytes(4, "little")
        at += 8
    return bytes(code)
