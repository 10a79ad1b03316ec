"""What a resolved address looks like, and how a hostile name becomes a harmless string."""

from __future__ import annotations

import re
from typing import Final, Literal, NamedTuple

NAME_LIMIT: Final = 4096
"""Longest symbol or module name kept, in bytes as found in the file."""

NOT_LOOKED_UP: Final = "[not looked up]"
"""The module of a frame that nobody had the time to look up."""

Space = Literal["kernel", "user", "jit"]

# C0, DEL and C1 controls, line and paragraph separators, and the bidirectional overrides that
# make a terminal or an editor show text in another order than it is stored.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


class Frame(NamedTuple):
    """One resolved address.

    `symbol` is the demangled function, or None when nothing honest can be said.
    `module` is the file's base name, `[kernel]`, a kernel module, `[vdso]`, `[jit]`, ….
    `offset` counts bytes from the start of the symbol. Without a symbol it is the ELF virtual
    address (what `addr2line -e` takes), the file offset where the file could not be parsed, and
    the address itself for kernel, JIT and unmapped code.

    The rest is there for code of a parsed file, so that it can be looked up again: `path` as its
    process saw it, `build_id` in hex where the file has one, `address` the ELF virtual address that
    was looked up: of a return address the byte before it, which belongs to the call.
    """

    symbol: str | None
    module: str
    offset: int
    space: Space
    path: str | None = None
    build_id: str | None = None
    address: int | None = None


def clean(raw: bytes) -> str:
    """Decode a name written by a stranger: at most `NAME_LIMIT` bytes, no control characters.

    Invalid UTF-8 and control characters become backslash escapes, so that neither a terminal nor
    a line-based format can be driven by a name.
    """
    text = raw[:NAME_LIMIT].decode("utf-8", "backslashreplace")
    if text.isascii() and text.isprintable():
        return text
    return _UNSAFE.sub(lambda match: f"\\x{ord(match[0]):02x}", text)
