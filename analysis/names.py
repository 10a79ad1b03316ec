"""Names of functions, as compilers and runtimes write them, for people.

They come from the traced program and are hostile: whatever they are, each costs one look at each of
its characters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from latrace.analysis.words import cells, fit

ANONYMOUS: Final = "(anonymous)"
UNKNOWN: Final = "[unknown]"
"""A function that nothing is known of, not even its file."""

# V8 says what kind of code it is and by which of its compilers: `JS:*render /srv/page.js:12:7`. One
# function has several of these in its life, and its time belongs together.
_OF_V8: Final = re.compile(r"(JS|LazyCompile|Function|Script|Eval):(o?[*+]|[~^'])?(?=.)")

_OFFSET: Final = re.compile(r"\+0x[0-9a-f]+\Z")
_SCRIPT_LINE: Final = re.compile(r" \S+:\d+\Z")
# What compilers add to a name of C; `.abi0` is Go's.
_ADDED: Final = re.compile(r"(part|cold|isra|constprop|lto|llvm|clone|abi0|abiinternal|\d)\b")
# By which ways Go's runtime comes to the one call that a thread sleeps in.
_TO_SLEEP: Final = re.compile(r"runtime\.(futexsleep|notesleep|notetsleep(_internal|g)?|mPark)")
_OPEN, _CLOSE = "([{<", ")]}>"


def tidy(symbol: str, *, jit: bool) -> str:
    """Return a function's name without what a JIT compiler says of its own work."""
    found = _OF_V8.match(symbol) if jit else None
    if found is None:
        return symbol
    name = symbol[found.end() :]
    return ANONYMOUS + name if name.startswith(" ") else name


def callers(names: Sequence[str]) -> list[str]:
    """Return a stack, leaf first, for a line of few functions: without the runtime's own ways."""
    return [*names[:1], *(name for name in names[1:] if not _TO_SLEEP.fullmatch(name))]


def own_part(name: str) -> tuple[int, int]:
    """Return where in a qualified name the part is that is the function's own, as a slice.

    `(*conn).serve` of `net/http.(*conn).serve`, `Call` of `void v8::Function::Call<int>(char*)`,
    `+0x1f` of `libz.so+0x1f`, and all that stands before its file of a function of JavaScript.
    """
    if found := _OFFSET.search(name):
        return found.start(), len(name)
    if found := _SCRIPT_LINE.search(name):
        return 0, found.start()
    length = name.find(" [") if " [" in name else len(name)  # `f() [clone .cold]`
    start = before = at = 0
    end = -1  # of the part that begins at `start`, once that is known
    dotted = False
    while at < length:
        char = name[at]
        if char in _OPEN:
            closed = _skip(name, at, length)
            follows = name[closed : closed + 2]
            if at > start:
                end = at if end < 0 else end
                if char == "(" and follows != "::":
                    break
            at = closed
            continue
        if char in " /" or name.startswith("::", at):
            before, start, end, dotted = start, at + (2 if char == ":" else 1), -1, False
            at = start
            continue
        if char == "." and not dotted and not _ADDED.match(name, at + 1):
            before, start, end, dotted = start, at + 1, -1, True
        at += 1
    end = length if end < 0 else end
    if start >= length or name[start] in "{<":  # a closure is known by what it is in
        start = before
    return (start, end) if start < end else (0, len(name))


def fit_name(name: str, columns: int) -> str:
    """Cut a visible name to some columns: the qualifiers go before the function's own part."""
    if cells(name) <= columns:
        return name
    start, end = own_part(name)
    if not start or end <= columns - 2:
        return fit(name, columns)
    own = fit(name[start:], columns - 2)
    # Of a place in a file what is left of the room is the file's.
    file = name[: columns - 2 - cells(own)] if own.startswith("+") and name.isascii() else ""
    return f"{file}..{own}"


def _skip(name: str, at: int, length: int) -> int:
    """Return the index behind the bracket that closes the one at `at`, or the end."""
    depth = 0
    for index in range(at, length):
        if name[index] in _OPEN:
            depth += 1
        elif name[index] in _CLOSE and name[index - 1] not in "-=":  # `->` closes nothing
            depth -= 1
            if not depth:
                return index + 1
    return length
