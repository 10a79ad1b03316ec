"""Walks of stacks: random tables, memory and registers, against a walk with plain numbers."""

from __future__ import annotations

from random import Random
from typing import Any, Final

import numpy as np

from latrace.tracer.unwinding import rules
from latrace.tracer.unwinding.places import End, Otherwise, Places
from latrace.tracer.unwinding.rules import RULE
from latrace.tracer.unwinding.table import UnwindTable
from latrace.tracer.unwinding.walk import MAX_FRAMES, Stacks, unwind

from .plain_walk import Part, PlainStack
from .target import Target, hold

_CODE: Final = (0x1000, 0x5555_0000_0000, 0x7FFF_FFFF_0000, (1 << 48) - 0x8000)
_STACK: Final = (0x7FFF_0000_0000, 0x7FFE_0000_0000, 0x2000, (1 << 64) - 0x400)
_SAVED: Final = (3, 12, 13, 5, rules.RBP, rules.RSP, rules.RETURN)
"""Registers that rules are about: few, so that one rule uses what another one saved."""
_STACKS: Final = 12
_WORDS: Final = 48


def _rules(random: np.random.Generator, count: int) -> Any:
    """Rules: mostly such as compilers make, some that say anything."""
    made = np.zeros(count, dtype=RULE)
    made[:2] = rules.fixed_rules()
    bases = [rules.RSP, rules.RSP, rules.RSP, rules.RBP, rules.RBP, 3, 12]
    kinds = [rules.CFA_OFFSET] * 8 + [rules.CFA_DEREF, rules.CFA_PLT, rules.CFA_UNSUPPORTED, 0]
    for rule in made[2:]:
        rule["cfa_kind"], rule["cfa_base"] = random.choice(kinds), random.choice(bases)
        rule["cfa_offset"] = 8 * random.integers(-2, 12)
        rule["cfa_extra"] = random.choice([0, 8, 11, 255])
        rule["signal"] = random.random() < 0.15
        if rule["cfa_kind"] == rules.CFA_PLT:
            rule["cfa_base"], rule["cfa_offset"] = rules.RSP, 0
        rule["kind"][rules.RETURN] = rules.MEMORY
        rule["base"][rules.RETURN], rule["offset"][rules.RETURN] = rules.CFA, -8
        for column in random.choice(_SAVED, size=random.integers(0, 6), replace=False):
            usual = random.random() < 0.6 or column == rules.RETURN
            rule["kind"][column] = rules.MEMORY if usual else random.integers(0, rules.KINDS)
            rule["base"][column] = rules.CFA if usual else random.choice(_SAVED)
            rule["offset"][column] = 8 * random.integers(-8, 3)
    if random.random() < 0.1:
        for rule in made[2:]:
            for name, limit in (("cfa_kind", 5), ("cfa_base", 16), ("kind", 5), ("base", 17)):
                rule[name] = random.integers(0, limit, size=rule[name].shape)
            for name in ("cfa_offset", "offset"):
                rule[name] = random.integers(-(1 << 31), 1 << 31, size=rule[name].shape)
            if rule["cfa_kind"] == rules.CFA_PLT:
                rule["cfa_base"], rule["cfa_offset"] = rules.RSP, 0
    return made


def _table(random: np.random.Generator) -> UnwindTable:
    made = _rules(random, int(random.integers(3, 12)))
    rows = int(random.integers(0, 16))
    pcs = np.unique(random.integers(0, 0x400, size=rows)).astype(np.uint32)
    which = random.integers(0, len(made), size=pcs.size).astype(np.uint16)
    base = int(random.choice(np.array([0, 0x100, 0x1000, (1 << 64) - 0x100], dtype=np.uint64)))
    table = UnwindTable(base, pcs, which, made)
    return UnwindTable.from_bytes(table.to_bytes())


def _parts(random: np.random.Generator) -> list[Part]:
    """Memory with code, sorted and without overlaps."""
    found = []
    for start in sorted(_CODE):
        at = start
        for _ in range(random.integers(0, 3)):
            table = None if random.random() < 0.2 else _table(random)
            end = at + int(random.integers(1, 0x600))
            bias = (at - (table.base if table else 0) + int(random.integers(-4, 8))) % (1 << 64)
            otherwise = random.choice([Otherwise.NOTHING] * 3 + [Otherwise.FRAME_POINTERS] * 2)
            found.append(Part(at, end, bias, table, Otherwise(otherwise)))
            at = end + int(random.choice([0, 0, 8]))
    return found


def _words(random: np.random.Generator, parts: list[Part], size: Any) -> Any:
    code = [part.start + at for part in parts for at in (-1, 0, 1, 8, 0x80, 0x200)]
    code += [part.end + at for part in parts for at in (-1, 0)]
    stack = [base + 8 * at for base in _STACK for at in range(-2, _WORDS + 2)]
    odd = [0, 0, 0, 1, (1 << 48) - 1, 1 << 48, 1 << 63, (1 << 64) - 1, 0x1234]
    among = np.array([each % (1 << 64) for each in code * 3 + stack + odd * 2], dtype=np.uint64)
    return random.choice(among, size=size)


def _make(random: Random) -> bytes:
    return random.randbytes(8)


def _check(case: bytes) -> None:
    random = np.random.default_rng(int.from_bytes(case, "little"))
    places = Places()
    spaces, parts_of = [], []
    for _ in range(int(random.integers(1, 4))):
        parts = _parts(random)
        modules = [places.add_module(part.table, otherwise=part.otherwise) for part in parts]

        def column(values: list[int]) -> Any:
            return np.array(values, dtype=np.uint64)

        spaces.append(
            places.add_space(
                column([part.start for part in parts]),
                column([part.end for part in parts]),
                column([part.bias for part in parts]),
                np.array(modules, dtype=np.int64),
            )
        )
        parts_of.append(parts)
    which = random.integers(0, len(spaces), size=_STACKS)
    copies = int(random.integers(1, 4))
    every = [part for parts in parts_of for part in parts]
    memory = _words(random, every, (_STACKS, copies, _WORDS)).view(np.uint8).reshape(-1)
    # Copies may be of the same memory, and begin anywhere.
    bases = random.choice(np.array(_STACK, dtype=np.uint64), size=(_STACKS, copies))
    bases += random.choice(np.array([0, 0, 8, 64, 3], dtype=np.uint64), size=bases.shape)
    slots = np.arange(_STACKS * copies).reshape(_STACKS, copies) * (_WORDS * 8)
    starts = slots + random.choice([0, 0, 0, 1, 8], size=slots.shape)
    lengths = random.choice([_WORDS * 8 - 8, 64, 9, 8, 7, 0, 200], size=slots.shape)
    registers = _words(random, every, (_STACKS, rules.COLUMNS))
    near = random.random((_STACKS, rules.COLUMNS)) < 0.7
    near[:, rules.RETURN] = False
    offsets = 8 * random.integers(0, 24, size=registers.shape).astype(np.uint64)
    registers = np.where(near, bases[:, :1] + offsets, registers)
    registers[:, rules.RSP] = bases[:, 0] + offsets[:, rules.RSP] % np.uint64(64)
    found = unwind(
        Stacks(registers, memory, starts, lengths, bases, np.array(spaces)[which]), places
    )
    hold(((found.counts >= 1) & (found.counts <= MAX_FRAMES)).all(), "too few or many frames")
    hold(found.addresses.size == found.exact.size == found.counts.sum(), "not all frames")
    behind = np.cumsum(found.counts).tolist()
    for number in range(_STACKS):
        plain = PlainStack(
            registers[number].tolist(),
            [
                (int(bases[number, copy]), memory[begin : begin + length].tobytes())
                for copy, begin, length in zip(
                    range(copies), starts[number].tolist(), lengths[number].tolist(), strict=True
                )
            ],
            parts_of[int(which[number])],
        )
        end = plain.walk()
        part = slice(behind[number] - int(found.counts[number]), behind[number])
        ours = found.addresses[part].tolist()
        hold(ours == plain.addresses, f"stack {number}: {ours} and plainly {plain.addresses}")
        hold(found.exact[part].tolist() == plain.exact, f"stack {number}: other exact ones")
        ended = End(found.ends[number])
        # Whether a larger copy would have had it is more than the plain walk knows.
        told = End.SHORT if ended.name == "ELSEWHERE" else ended
        hold(told == end, f"stack {number} ends {ended!r}, plainly {end!r}")


TARGETS = (
    Target("walk", "walks of any stack by any table, against a plain one", _make, _check, share=3),
)
