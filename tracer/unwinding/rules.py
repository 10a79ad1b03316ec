"""How one frame's caller is found: the rules that call frame information comes down to.

Registers are numbered as DWARF does (System V ABI, AMD64 supplement, figure 3.36). A rule says how
the canonical frame address (CFA: the stack pointer before the call) is had, and for each register
how the caller's value is had. Sections 6.4.1 and 6.4.2 of DWARF 5 have the terms.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

Rules = npt.NDArray[Any]

RBP: Final = 6
RSP: Final = 7
RETURN: Final = 16
"""DWARF's column of the return address."""
COLUMNS: Final = 17
CFA: Final = 16
"""As a base: the CFA. No register has that number as one."""

CFA_NONE, CFA_OFFSET, CFA_DEREF, CFA_PLT, CFA_UNSUPPORTED = range(5)
"""No rule; base + offset; what memory at base + offset holds, + extra; rsp + 8, and 8 more once the
low four bits of the pc are at least `extra`; an expression of another shape."""
CFA_KINDS: Final = 5

SAME, MEMORY, VALUE, UNDEFINED, UNSUPPORTED = range(5)
"""A register: kept; what memory at base + offset holds; base + offset; lost; an expression of
another shape."""
KINDS: Final = 5

RULE: Final = np.dtype(
    [
        ("cfa_kind", "u1"),
        ("cfa_base", "u1"),
        ("signal", "u1"),  # 1: the caller was interrupted, so its pc is no return address
        ("cfa_extra", "u1"),
        ("cfa_offset", "<i4"),
        ("offset", "<i4", (COLUMNS,)),
        ("kind", "u1", (COLUMNS,)),
        ("base", "u1", (COLUMNS,)),
    ]
)

NO_RULE: Final = 0
"""The first rule of every table: nothing is known about these addresses."""
BAD_RULE: Final = 1
"""The second one: what is said about these addresses is not understood."""


def fixed_rules() -> Rules:
    """The two rules that every table begins with. (2,) RULE."""
    rules = np.zeros(2, dtype=RULE)
    rules["cfa_kind"] = (CFA_NONE, CFA_UNSUPPORTED)
    return rules


def simple_rule(base: int, offset: int, *, saved: dict[int, int]) -> Rules:
    """CFA = base + offset, with registers saved at CFA + …. (1,) RULE."""
    rule = np.zeros(1, dtype=RULE)
    rule["cfa_kind"], rule["cfa_base"], rule["cfa_offset"] = CFA_OFFSET, base, offset
    for column, where in saved.items():
        rule["kind"][0, column] = MEMORY
        rule["base"][0, column] = CFA
        rule["offset"][0, column] = where
    return rule


def sound(rules: Rules) -> bool:
    """Whether every field of these rules is one that can be."""
    return bool(
        (rules["cfa_kind"] < CFA_KINDS).all()
        and (rules["cfa_base"] < CFA).all()
        and (rules["signal"] < 2).all()
        and (rules["kind"] < KINDS).all()
        and (rules["base"] <= CFA).all()
    )
