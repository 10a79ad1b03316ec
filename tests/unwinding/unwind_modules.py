"""Sections with call frame information, found with pyelftools, and what it decodes them to."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from elftools.dwarf.callframe import FDE, CallFrameInfo, RegisterRule
from elftools.dwarf.constants import DW_CFA
from elftools.dwarf.structs import DWARFStructs
from elftools.elf.elffile import ELFFile

from latrace.tracer.unwinding.expressions import understand
from latrace.tracer.unwinding.records import Section
from latrace.tracer.unwinding.rules import (
    CFA,
    CFA_OFFSET,
    MEMORY,
    SAME,
    UNDEFINED,
    UNSUPPORTED,
    VALUE,
    Rules,
)

LIBRARIES = Path("/usr/lib/x86_64-linux-gnu")


def module(name: str) -> Path:
    """A program or library of this machine; the test is skipped where it is not installed."""
    found = shutil.which(name, path="/usr/sbin:/usr/bin")
    candidates = [Path(found).resolve()] if found else []
    candidates += [Path(name), LIBRARIES / name, *Path("/usr/lib").glob(f"*/*/bin/{name}")]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    pytest.skip(f"needs {name}")


def section_of(path: Path, name: str = ".eh_frame", most: int = 1 << 30) -> Section:
    """That section, or as many of its records as fit into `most` bytes."""
    with path.open("rb") as stream:
        elf = ELFFile(stream)
        found, got = elf.get_section_by_name(name), elf.get_section_by_name(".got")
        if found is None:
            pytest.skip(f"{path} has no {name}")
        code = [
            (segment["p_vaddr"], segment["p_vaddr"] + segment["p_memsz"])
            for segment in elf.iter_segments("PT_LOAD")
            if segment["p_flags"] & 1
        ]
        data, address = found.data(), found["sh_addr"]
    end = 0
    while end + 4 <= min(len(data), most):
        end += 4 + int.from_bytes(data[end : end + 4], "little")
    return Section(
        data[: min(end, len(data))],
        name == ".eh_frame",
        address,
        got["sh_addr"] if got else 0,
        min(low for low, _ in code),
        max(high for _, high in code),
    )


def decoded(section: Section) -> Iterator[tuple[int, int, bool, list[dict[Any, Any]]]]:
    """For each function: begin, end, whether it is a signal frame, pyelftools' rows."""
    structs = DWARFStructs(little_endian=True, dwarf_format=32, address_size=8)
    info = CallFrameInfo(
        io.BytesIO(section.data), len(section.data), section.address, structs, section.eh
    )
    for entry in info.get_entries():
        if isinstance(entry, FDE):
            # It does not know this one, which says nothing about the frame.
            entry.instructions = [
                each for each in entry.instructions if each.opcode != DW_CFA.GNU_args_size
            ]
            begin = entry.header["initial_location"]
            signal = b"S" in entry.cie.header["augmentation"]
            rows = entry.get_decoded().table
            yield begin, begin + entry.header["address_range"], signal, rows


def cfa_of(rule: Rules) -> tuple[int, ...]:
    """The CFA's rule, in the terms of `expected_cfa`."""
    return tuple(int(rule[name]) for name in ("cfa_kind", "cfa_base", "cfa_offset", "cfa_extra"))


def expected_cfa(row: dict[Any, Any]) -> tuple[int, ...]:
    """What pyelftools says about the CFA, in our terms."""
    cfa = row["cfa"]
    if cfa.expr is not None:
        return tuple(understand(bytes(cfa.expr)))
    return (CFA_OFFSET, cfa.reg, cfa.offset, 0)


def expected_register(row: dict[Any, Any], column: int) -> tuple[int, int, int]:
    """What pyelftools says about a register: kind, base, offset."""
    rule = row.get(column)
    if rule is None:
        return (SAME, 0, 0)
    if rule.type in (RegisterRule.EXPRESSION, RegisterRule.VAL_EXPRESSION):
        expression = understand(bytes(rule.arg))
        if expression.kind != CFA_OFFSET:
            return (UNSUPPORTED, 0, 0)
        kind = MEMORY if rule.type == RegisterRule.EXPRESSION else VALUE
        return (kind, expression.base, expression.offset)
    return {
        RegisterRule.SAME_VALUE: (SAME, 0, 0),
        RegisterRule.UNDEFINED: (UNDEFINED, 0, 0),
        RegisterRule.REGISTER: (VALUE, rule.arg, 0),
        RegisterRule.OFFSET: (MEMORY, CFA, rule.arg),
        RegisterRule.VAL_OFFSET: (VALUE, CFA, rule.arg),
    }[rule.type]
