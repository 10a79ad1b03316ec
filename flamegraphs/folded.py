"""Folded stacks: one line per stack, `root;…;leaf microseconds`.

What flamegraph.pl, inferno and speedscope read. The count is what follows the last space, so
frames may hold spaces; the rest of the grammar has no escapes, so a name gives way to it.
"""

from __future__ import annotations

import re
from typing import Final

from latrace.flamegraphs.profile import Profile, merged
from latrace.flamegraphs.text import visible

# flamegraph.pl and inferno read two numbers at the end of a line as a differential profile: a
# last frame called "worker 3" would lose its name's end and turn the picture red and blue.
_ENDS_LIKE_A_COUNT: Final = re.compile(r" (?=[0-9]+(?:\.[0-9]*)?$)")
_SPACES: Final = re.compile(r"\s+")


def to_folded(profile: Profile) -> str:
    """Return the profile as folded stacks; the counts add up to `profile.total_us`.

    In names, `;` becomes `:`, white space becomes one space, and what is not visible an escape.
    Stacks that weigh nothing are left out; an empty profile is an empty text.
    """
    lines: dict[str, int] = {}
    for stack, weight in merged(profile.stacks):
        if weight:
            line = _ENDS_LIKE_A_COUNT.sub("_", ";".join(_name(frame.name) for frame in stack))
            lines[line] = lines.get(line, 0) + weight
    return "".join(f"{line} {weight}\n" for line, weight in lines.items())


def _name(name: str) -> str:
    return visible(_SPACES.sub(" ", name).strip()).replace(";", ":") or "[unknown]"
