"""The walk of one stack with plain numbers, one frame at a time: what the fast one has to equal.

Written from the rules' meaning (DWARF 5, 6.4; System V ABI, AMD64), not from the fast one's code.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from latrace.tracer.unwinding import rules
from latrace.tracer.unwinding.places import End, Otherwise
from latrace.tracer.unwinding.table import UnwindTable
from latrace.tracer.unwinding.walk import MAX_FRAMES, MAX_SWITCHES

_ALL = (1 << 64) - 1
_HIGHEST = (1 << 48) - 1


@dataclass(slots=True)
class Part:
    """A range of a process's memory that holds code: of which module, and how that is unwound."""

    start: int
    end: int
    bias: int
    table: UnwindTable | None
    otherwise: Otherwise = Otherwise.NOTHING


@dataclass(slots=True)
class PlainStack:
    """One stack: 17 registers in DWARF's order, and copies of memory as (address, bytes)."""

    registers: list[int]
    copies: list[tuple[int, bytes]]
    parts: list[Part]
    addresses: list[int] = field(default_factory=list)
    exact: list[bool] = field(default_factory=list)

    def _word(self, address: int) -> int | None:
        for base, data in self.copies:
            at = (address - base) & _ALL
            if at + 8 <= len(data):
                return int.from_bytes(data[at : at + 8], "little")
        return None

    def _rule(  # noqa: PLR0911 - one for each way to end
        self, pc: int
    ) -> tuple[End, dict[str, Any] | None, bool]:
        """How it ends there, or the rule, and whether that is the one of frame pointers."""
        part = next((part for part in self.parts if part.start <= pc < part.end), None)
        if part is None or pc >= _HIGHEST:
            return End.UNMAPPED, None, False
        number, found = rules.NO_RULE, None
        if part.table is not None:
            found = _row(part.table, (pc - part.bias) & _ALL)
            number = found[0]
        if number == rules.NO_RULE:
            if part.otherwise == Otherwise.FRAME_POINTERS:
                return End.GOES_ON, _simple(rules.RBP, {rules.RBP: -16, rules.RETURN: -8}), True
            if part.otherwise == Otherwise.TRAMPOLINE:
                return End.GOES_ON, _simple(rules.RSP, {rules.RETURN: -8}), False
            return (End.NO_TABLE if part.table is None else End.NO_RULE), None, False
        if number == rules.BAD_RULE or found is None:
            return End.UNSUPPORTED, None, False
        rule = _plain(found[1])
        how = rule["kind"][rules.RETURN]
        if how == rules.UNDEFINED:
            return End.WHOLE, None, False
        if how not in (rules.MEMORY, rules.VALUE) or rule["cfa_kind"] in (
            rules.CFA_NONE,
            rules.CFA_UNSUPPORTED,
        ):
            return End.UNSUPPORTED, None, False
        return End.GOES_ON, rule, False

    def walk(self) -> End:  # noqa: PLR0911, PLR0912 - the same
        """Fill in `addresses` and `exact`; how it ended."""
        now = list(self.registers)
        pc, lost, switches, exact = now[rules.RETURN], set(), 0, True
        for depth in range(MAX_FRAMES):
            self.addresses.append(pc)
            self.exact.append(exact)
            end, rule, by_pointers = self._rule((pc - (not exact)) & _ALL)
            if rule is None:
                return end
            base = rule["cfa_base"]
            cfa: int | None = (now[base] + rule["cfa_offset"]) & _ALL
            if base in lost:
                return End.SHORT
            if rule["cfa_kind"] == rules.CFA_DEREF:
                cfa = self._word(cfa)
                if cfa is None:
                    return End.SHORT
                cfa = (cfa + rule["cfa_extra"]) & _ALL
            elif rule["cfa_kind"] == rules.CFA_PLT:
                cfa = (now[rules.RSP] + (16 if pc & 15 >= rule["cfa_extra"] else 8)) & _ALL
            if cfa <= now[rules.RSP]:
                if rule["signal"] and switches < MAX_SWITCHES:
                    switches += 1
                elif depth and by_pointers and now[rules.RBP] == 0:
                    return End.WHOLE
                else:
                    return End.STUCK
            then, gone = list(now), set(lost) - {rules.RSP}
            then[rules.RSP] = cfa
            for column in range(rules.COLUMNS):
                kind, source = rule["kind"][column], rule["base"][column]
                if kind == rules.SAME:
                    continue
                start = cfa if source == rules.CFA else now[source]
                value: int | None = (start + rule["offset"][column]) & _ALL
                if kind == rules.MEMORY:
                    value = self._word(value)
                if source != rules.CFA and source in lost:
                    value = None
                if kind not in (rules.MEMORY, rules.VALUE) or value is None:
                    gone.add(column)
                    # Of a lost stack pointer it is still known that it lies beyond this frame.
                    then[column] = cfa if column == rules.RSP else 0
                else:
                    gone.discard(column)
                    then[column] = value
            if rules.RETURN in gone:
                return End.SHORT
            now, lost, pc, exact = then, gone, then[rules.RETURN], bool(rule["signal"])
            if pc == 0:
                return End.WHOLE
        return End.DEEP


def _row(table: UnwindTable, vaddr: int) -> tuple[int, Any]:
    found = rules.NO_RULE
    relative = (vaddr - table.base) & _ALL
    if relative <= 0xFFFF_FFFF:
        for pc, number in zip(table.pcs.tolist(), table.rule.tolist(), strict=True):
            if pc > relative:
                break
            found = number
    return found, table.rules[found]


def _plain(rule: Any) -> dict[str, Any]:
    return {name: rule[name].tolist() for name in rules.RULE.names or ()}


def _simple(base: int, saved: dict[int, int]) -> dict[str, Any]:
    return _plain(rules.simple_rule(base, 16, saved=saved)[0])
