"""Sections with call frame information, made byte by byte."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from latrace.tracer.unwinding.records import Section

LOW, HIGH = 0x1000, 0x100000
ADDRESS = 0x200000
GOT = 0x300000
START = b"\x0c\x07\x08\x90\x01"
"""What every function begins with: CFA = rsp + 8, return address at CFA - 8."""


def uleb(value: int) -> bytes:
    text = bytearray()
    while True:
        value, low = value >> 7, value & 0x7F
        text.append(low | (0x80 if value else 0))
        if not value:
            return bytes(text)


def sleb(value: int) -> bytes:
    text = bytearray()
    while True:
        value, low = value >> 7, value & 0x7F
        last = value == (-1 if low & 0x40 else 0)
        text.append(low | (0 if last else 0x80))
        if last:
            return bytes(text)


def block(text: bytes) -> bytes:
    return uleb(len(text)) + text


def record(body: bytes) -> bytes:
    body += bytes(-len(body) % 4)
    return struct.pack("<I", len(body)) + body


def cie(
    *,
    eh: bool = True,
    version: int = 1,
    augmentation: bytes = b"zR",
    data: bytes = b"\x00",
    start: bytes = START,
    column: int = 16,
    code_align: int = 1,
) -> bytes:
    body = struct.pack("<IB", 0 if eh else 0xFFFFFFFF, version) + augmentation + b"\0"
    body += b"\x08\x00" if version == 4 else b""
    body += uleb(code_align) + sleb(-8) + uleb(column)
    return record(body + (block(data) if augmentation[:1] == b"z" else b"") + start)


def section_of_functions(
    functions: Sequence[tuple[int, int, bytes]], head: bytes | None = None
) -> Section:
    """Functions (begin, size, instructions) that share one CIE with absolute pointers."""
    data = cie() if head is None else head
    for begin, size, program in functions:
        body = struct.pack("<IQQ", len(data) + 4, begin, size) + block(b"") + program
        data += record(body)
    return Section(data, True, ADDRESS, GOT, LOW, HIGH)


def of_bytes(data: bytes, *, eh: bool = True) -> Section:
    return Section(data, eh, ADDRESS, GOT, LOW, HIGH)
