"""The few DWARF expressions that call frame information of x86-64 is written with.

Where they come from: linkers (procedure linkage stubs), compilers (functions that realign their
stack), the C library (the frame of a signal), OpenSSL's assembly (`%rsp+56,deref,+8`). Operations
are numbered as in DWARF 5, 7.7.1.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from .leb import sleb_at, uleb_at
from .rules import CFA, CFA_DEREF, CFA_OFFSET, CFA_PLT, CFA_UNSUPPORTED, RSP

_DEREF, _PLUS_UCONST = 0x06, 0x23
_BREG0: Final = 0x70
# rsp + 8 + (((rip & 15) >= k) << 3), the k a literal of one byte
_PLT_HEAD: Final = bytes.fromhex("770880003f1a")
_PLT_TAIL: Final = bytes.fromhex("2a332422")
_LIT0: Final = 0x30


class Expression(NamedTuple):
    """What an expression comes to, in the terms of a rule's CFA."""

    kind: int
    base: int = 0
    offset: int = 0
    extra: int = 0


NOT_UNDERSTOOD: Final = Expression(CFA_UNSUPPORTED)


def understand(text: bytes) -> Expression:
    """The rule that an expression stands for; `NOT_UNDERSTOOD` for one of another shape."""
    head, tail = len(_PLT_HEAD), len(_PLT_TAIL)
    if len(text) == head + 1 + tail and text[:head] == _PLT_HEAD and text[-tail:] == _PLT_TAIL:
        literal = text[head] - _LIT0
        return Expression(CFA_PLT, RSP, 0, literal) if 0 <= literal < 16 else NOT_UNDERSTOOD
    try:
        found = _address(text)
    except IndexError:
        return NOT_UNDERSTOOD
    sane = found is not None and -(1 << 31) <= found.offset < 1 << 31 and found.extra <= 0xFF
    return found if found is not None and sane else NOT_UNDERSTOOD


def _address(text: bytes) -> Expression | None:
    """`breg; [deref; [plus_uconst]]`, None for anything else. Raises IndexError at its end."""
    base = text[0] - _BREG0
    if not 0 <= base < CFA:
        return None
    offset, at = sleb_at(text, 1, len(text))
    if at == len(text):
        return Expression(CFA_OFFSET, base, offset)
    if text[at] != _DEREF:
        return None
    extra, at = 0, at + 1
    if at < len(text) and text[at] == _PLUS_UCONST:
        extra, at = uleb_at(text, at + 1, len(text))
    return Expression(CFA_DEREF, base, offset, extra) if at == len(text) else None
