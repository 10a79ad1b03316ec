"""What a fuzz target is: a maker of cases and a check of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

CPU_LIMIT_S = 5.0


@dataclass(frozen=True, slots=True)
class Target:
    """Cases are bytes: `make` draws one, `check` raises for a finding and returns else.

    limit_s: CPU seconds that one check may take. share: of the time, beside the others.
    """

    name: str
    what: str
    make: Callable[[Random], bytes]
    check: Callable[[bytes], None]
    limit_s: float = CPU_LIMIT_S
    share: int = 1


@dataclass(frozen=True, slots=True)
class Property:
    """Values are drawn by a hypothesis strategy, which makes failing ones small."""

    name: str
    what: str
    strategy: Callable[[], Any]
    check: Callable[[Any], None]
    limit_s: float = CPU_LIMIT_S
    share: int = 1


class Missing(Exception):
    """This machine has not what the target is about; the text says what."""


def hold(condition: object, what: str) -> None:
    """Raise AssertionError, also where Python drops `assert`."""
    if not condition:
        raise AssertionError(what)
