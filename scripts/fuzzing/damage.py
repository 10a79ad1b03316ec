"""Damage: changed bytes, at places where it hurts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Final

Span = tuple[int, int]
"""Where it begins, and how many bytes."""

_WIDE: Final = (
    *(0, 1, 2, 3, 4, 7, 8, 0x10, 0x18, 0x40, 0x7F, 0x80, 0xFF, 0x100, 0xFFF, 0x1000, 0xFF00),
    *(0xFFFF, 1 << 20, 1 << 24, 1 << 28, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40),
    *(1 << 47, (1 << 48) - 1, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 8, (1 << 64) - 1),
)


def patch(random: Random, old: bytes, size: int) -> bytes:
    """What to write instead of `old`, in a file of so many bytes."""
    width = random.choice((1, 2, 4, 8))
    number = {
        "interesting": random.choice(_WIDE),
        "near what was there": int.from_bytes(old[:width], "little") + random.randint(-16, 16),
        "near the end": max(size + random.randint(-64, 64), 0),
        "one bit": int.from_bytes(old[:width], "little") ^ 1 << random.randrange(8 * width),
    }
    kind = random.choice((*number, "one value", "anything"))
    if kind == "one value":
        return bytes([random.choice((0, 0xFF, 0x80, 0x7F))]) * random.randrange(1, 64)
    if kind == "anything":
        return random.randbytes(random.randrange(1, 24))
    return (number[kind] & (1 << 8 * width) - 1).to_bytes(width, "little")


def damaged(random: Random, data: bytes, *, most: int = 8) -> bytes:
    """A copy with some changes; now and then shorter, longer, or with a piece of itself moved."""
    changed = bytearray(data)
    for _ in range(random.randint(1, most)):
        at = random.randrange(len(changed)) if changed else 0
        kind = random.randrange(12)
        if kind == 0:
            del changed[at:]
        elif kind == 1:
            del changed[at : at + random.randrange(1, 17)]
        elif kind == 2:
            changed[at:at] = random.randbytes(random.randrange(1, 17))
        elif kind == 3:
            begin = random.randrange(len(changed) + 1)
            changed[at:at] = changed[begin : begin + random.randrange(1, 65)]
        else:
            new = patch(random, bytes(changed[at : at + 8]), len(data))
            changed[at : at + len(new)] = new[: max(len(changed) - at, 0)]
    return bytes(changed)


# --- files that are too large to be copied for each case ------------------------------------------


class Files:
    """Files by their paths, read once, and those that were made by their names."""

    def __init__(self) -> None:
        self._content: dict[str, bytes] = {}

    def __setitem__(self, name: str, content: bytes) -> None:
        self._content[name] = content

    def __getitem__(self, path: str) -> bytes:
        content = self._content.get(path)
        if content is None:
            content = self._content[path] = Path(path).read_bytes()
        return content


FILES: Final = Files()


def damage_file(random: Random, path: str, spans: Sequence[Span], *, most: int = 8) -> bytes:
    """A case: a file, what is written where, and perhaps where it is cut."""
    content = FILES[path]
    patches = []
    for _ in range(random.randint(1, most)):
        begin, length = random.choice(spans)
        # The beginning of a part tells how to read the rest.
        near = min(length, random.choice((64, 256, length)))
        at = min(begin + random.randrange(max(near, 1)), max(len(content) - 1, 0))
        new = patch(random, content[at : at + 8], len(content))
        patches.append((at, new.hex()))
    cut = random.randrange(len(content)) if random.random() < 0.03 else len(content)
    return json.dumps({"file": path, "patches": patches, "cut": cut}).encode()


def apply(case: bytes) -> bytes:
    """The bytes of the damaged file."""
    fields = json.loads(case)
    changed = bytearray(FILES[fields["file"]])
    for at, text in fields["patches"]:
        new = bytes.fromhex(text)
        changed[at : at + len(new)] = new[: len(changed) - at]
    return bytes(changed[: fields["cut"]])
