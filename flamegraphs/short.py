"""Short names of functions of C++, Rust and Go: what they are called, not what they are made from.

The names are those of demanglers, of DWARF and of Go's symbol table. They are a stranger's:
whatever they are, the time is linear in their length, and what is not understood stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Final

_REMEMBERED: Final = 1 << 16
_NESTED: Final = 8  # function pointers to functions that return some, and the like

_WORTH_A_LOOK: Final = re.compile(r"[(<\[/{ ]")

# What stands before the name of a thing that the compiler made of a function.
_ABOUT: Final = re.compile(
    r"((?:non-virtual|virtual|covariant return) thunk to |(?:guard variable|transaction clone|"
    r"vtable|typeinfo(?: name)?|TLS (?:init|wrapper) function|reference temporary #\d+) for )"
)
_CLONES: Final = re.compile(r"( \[clone [^\]]*\]| \(\.[\w.]+\))+$")

# In a flattened name one character stands for each pair of brackets: parameters, and what is kept.
_KEPT, _FOLDED = 0xF0000, 0x100000
_PRIVATE: Final = re.compile("[\U000f0000-\U0010ffff]")
_PARAMETERS: Final = "[\U00100000-\U0010ffff]"
_BEHIND: Final = r"(?: const\b| volatile\b| noexcept\b| ?&&?)*"
_ENCLOSING: Final = re.compile(rf"{_PARAMETERS}{_BEHIND}(?=::)")
_LAST: Final = re.compile(rf"({_PARAMETERS}){_BEHIND}(?: requires .*)?$")

_UNNAMED: Final = re.compile(r"(anonymous|unnamed)\b[^()]*")
_DECLARATOR: Final = re.compile(r"[\w:]*::\*|[*&]")
_OPERATOR: Final = "operator"
_SYMBOLS: Final = (
    "<=>", "<<=", ">>=", "->*", "<<", ">>", "<=", ">=", "==", "!=", "&&", "||", "++", "--", "+=",
    "-=", "*=", "/=", "%=", "^=", "&=", "|=", "->", "()", "[]", "<", ">", "+", "-", "*", "/", "%",
    "^", "&", "|", "~", "!", "=", ",", "?",
)  # fmt: skip
_WORDS: Final = re.compile(r' (?:new|delete)(?:\[\])?| co_await|"" ?\w+')
_CLOSES: Final = {"<": ">", "(": ")", "[": "]", "{": "}"}
_OPENS: Final = {")": "(", "]": "[", "}": "{"}

# The Go linker writes a dot in the last element of a path as %2e, and others alike.
_ESCAPED: Final = re.compile(r"%([0-9a-fA-F]{2})")
_GO_PACKAGE: Final = re.compile(r"((?:type[:.]\.(?:eq|hash)\.)?)([^\s()<>\[\]{}:*]*/)([^/]*)")
_GO_VERSION: Final = re.compile(r"v[0-9]+")
_GO_METHOD: Final = re.compile(r"[\w%~·.-]+\.(\(\*?\w|\w*\[)")


@lru_cache(_REMEMBERED)
def short_name(name: str) -> str:
    """Return the name without parameters, return type, template and generic arguments.

    Also without Rust's `<impl …>` and traits and the folders of Go's packages. Never empty.
    """
    if not _WORTH_A_LOOK.search(name):
        return name
    short = _go(name)
    if short is None:
        stem, plt = (name[:-4], "@plt") if name.endswith("@plt") else (name, "")
        about = _ABOUT.match(stem)
        begin = about.end() if about else 0
        short = stem[:begin] + _function(stem[begin:], _NESTED) + plt
    return short if short.strip() else name


# --- Go -----------------------------------------------------------------------------------------


def _go(name: str) -> str | None:
    """Shorten a name of Go; None for others."""
    found = _GO_PACKAGE.match(name)
    if found is not None and not found[2].endswith("operator/"):
        what, folders, rest = found.groups()
        parts = folders.split("/")[:-1]
        package = rest.split(".", 1)[0]
        # `…/chi/v5.(*Mux).ServeHTTP`: the package is called chi.
        if _GO_VERSION.fullmatch(package) and "." in rest:
            rest = parts[-1] + rest[len(package) :]
        return what + _ESCAPED.sub(_unescaped, _without_brackets(rest + name[found.end() :]))
    return _without_brackets(name) if _GO_METHOD.match(name) else None


def _unescaped(found: re.Match[str]) -> str:
    char = chr(int(found[1], 16))
    return char if char.isascii() and char.isprintable() else found[0]


def _without_brackets(name: str) -> str:
    """Write type arguments as Go's own tables do: `[...]`."""
    begin = name.find("[")
    if begin < 0 or not name[begin - 1 : begin].isidentifier():
        return name
    end = _pairs(name).get(begin, -1)
    return name if end < 0 else f"{name[:begin]}[...]{name[end:]}"


# --- C++ and Rust -------------------------------------------------------------------------------


def _function(name: str, depth: int) -> str:
    """Return what a function is called; the name itself where it is not understood."""
    if _PRIVATE.search(name) or not depth:
        return name
    flat = _Flat(_CLONES.sub("", name), depth)
    text = flat.text
    if found := _LAST.search(text):
        text = text[: found.start()]
        if text and (inner := flat.declared_in(text[-1])):
            # It returns a pointer to a function: `void (*f(int))(char)`.
            return _function(inner, depth - 1)
        # What comes before the last space is the type that it returns.
        text = _ENCLOSING.sub("", text)
        text = text.rpartition(" ")[2] or text
    else:
        text = _ENCLOSING.sub("", text)
    return flat.restored(text).strip().removeprefix("::") or name


class _Flat:
    """A name with its brackets folded away; `text` has a character for each that may matter."""

    def __init__(self, name: str, depth: int) -> None:
        self._name = name
        self._pairs = _pairs(name)
        self._depth = depth
        self._pieces: list[str] = []
        self._out: list[str] = []
        at = 0
        while at < len(name):
            at = self._step(at)
        self.text = "".join(self._out)

    def restored(self, text: str) -> str:
        """Put what was kept back into a part of `text`."""
        return _PRIVATE.sub(self._piece, text)

    def declared_in(self, char: str) -> str:
        """What `(*f(int))` declares, if the character stands for the like; else ""."""
        if ord(char) < _FOLDED:
            return ""
        inner = self._pieces[ord(char) - _FOLDED]
        found = _DECLARATOR.match(inner)
        return inner[found.end() :].strip(" *&") if found else ""

    def _piece(self, found: re.Match[str]) -> str:
        code = ord(found[0])
        if code < _FOLDED:
            return self._pieces[code - _KEPT]
        return f"({self._pieces[code - _FOLDED]})"

    def _put(self, text: str, kind: int = _KEPT) -> None:
        self._out.append(chr(kind + len(self._pieces)))
        self._pieces.append(text)

    def _step(self, at: int) -> int:
        """Take in what stands at an index; returns the one behind it."""
        name, char = self._name, self._name[at]
        if char == "o" and _is_operator(name, at):
            end = _operator_end(name, at, self._pairs)
            # A type that it converts to has arguments of its own.
            self._put(
                _without_arguments(name[at:end]) if name[at + 8 : at + 9] == " " else name[at:end]
            )
            # `operator<< <char>`.
            return end + 1 if name.startswith(" <", end) else end
        if char not in _CLOSES:
            self._out.append(char)
            return at + 1
        end = self._pairs.get(at, -1)
        if end < 0:
            self._out.append(char)
            return at + 1
        inner = name[at + 1 : end - 1]
        if char == "<":
            self._angle(inner, end)
        elif char == "(":
            if _UNNAMED.fullmatch(inner):
                self._put(f"({inner})")
            else:
                self._put(inner, _FOLDED)
        elif char == "{":
            self._put("{" + _without_parameters(inner) + "}")
        elif not inner.startswith("abi:"):
            self._put(f"[{inner}]")
        return end

    def _angle(self, inner: str, end: int) -> None:
        """Take in `<…>`: arguments, which go, or a component of a path that is written so."""
        before = self._out[-1] if self._out else ":"
        first = not self._out
        if before != ":":
            return  # arguments of a template or of a type
        if inner.startswith("lambda("):
            self._put("{lambda}")
        elif inner.startswith("impl "):
            _, _, whose = inner.partition(" for ")
            if whose:
                self._out.clear()  # it is a path of its own
                self._put(_type(whose, self._depth - 1))
            else:
                self._drop_colons()
        elif self._name.startswith("::", end) and first:
            self._put(_type(_before_as(inner), self._depth - 1))
        elif first:
            self._put(f"<{inner}>")
        else:
            self._drop_colons()  # arguments after a `::`, as Rust writes them

    def _drop_colons(self) -> None:
        while self._out and self._out[-1] == ":":
            self._out.pop()


def _type(name: str, depth: int) -> str:
    """A type of Rust without its arguments, and without what points at it."""
    stem = re.sub(r"^(&|\*)?('\w+ )?(mut |const )?", "", name)
    if stem.startswith("<"):
        return _function(stem, depth)
    return _without_arguments(stem) or name


def _before_as(inner: str) -> str:
    """`A<X as Y>` of `A<X as Y> as Z`."""
    pairs, at = _pairs(inner), 0
    while at < len(inner):
        if inner.startswith(" as ", at):
            return inner[:at]
        at = pairs.get(at, at + 1)
    return inner


def _without_arguments(text: str) -> str:
    """Without what stands in angle brackets after a name."""
    pairs, at = _pairs(text), 0
    out: list[str] = []
    while at < len(text):
        if text[at] == "<" and out and at in pairs:
            at = pairs[at]
        else:
            out.append(text[at])
            at += 1
    return "".join(out)


def _without_parameters(inner: str) -> str:
    """`lambda#1` of `lambda(int)#1` and `lambda<typename $T>($T)#1`; others as they are."""
    if not inner.startswith("lambda"):
        return inner
    pairs, at = _pairs(inner), len("lambda")
    while at in pairs:
        at = pairs[at]
    return "lambda" + inner[at:]


# --- brackets and operators -----------------------------------------------------------------------


def _is_operator(name: str, at: int) -> bool:
    """Whether the keyword stands there, not a name that it is a part of."""
    if not name.startswith(_OPERATOR, at):
        return False
    behind = name[at + 8 : at + 9]
    return not (_in_name(name[at - 1 : at]) and at) and not _in_name(behind) and behind != ":"


def _in_name(char: str) -> bool:
    return char.isalnum() or char in ("_", "$")


def _operator_end(name: str, at: int, pairs: Mapping[int, int]) -> int:
    """The index behind an operator's name, `operator<<` or `operator char const*`."""
    behind = at + len(_OPERATOR)
    for symbol in _SYMBOLS:
        if name.startswith(symbol, behind):
            return behind + len(symbol)
    if found := _WORDS.match(name, behind):
        return found.end()
    while behind < len(name):
        end = pairs.get(behind, behind + 1)
        if name[behind] == "(":
            inner = name[behind + 1 : end - 1]
            if _DECLARATOR.match(inner):
                # A pointer to a function: `void (*)(int)`.
                end = pairs.get(end, end) if name[end : end + 1] == "(" else end
            elif not _UNNAMED.fullmatch(inner):
                return behind
        behind = end
    return behind


def _pairs(name: str) -> dict[int, int]:
    """Where brackets open, and the index behind the one that closes each; in one pass."""
    pairs: dict[int, int] = {}
    stack: list[int] = []
    at = 0
    while at < len(name):
        char = name[at]
        if char == "o" and _is_operator(name, at):
            at += len(_OPERATOR)
            at += len(next((one for one in _SYMBOLS if name.startswith(one, at)), ""))
            continue
        if char in _CLOSES:
            # `(a)<(b)` compares.
            compares = char == "<" and name[at - 1 : at + 2] == ")<(" and bool(stack)
            if not compares:
                stack.append(at)
        elif char == ">":
            # `->` closes nothing, and in parentheses it compares.
            if stack and name[stack[-1]] == "<" and name[at - 1] not in "-=":
                pairs[stack.pop()] = at + 1
        elif char in _OPENS:
            # What looked like a `<` of arguments was none.
            while stack and name[stack[-1]] == "<":
                stack.pop()
            if stack and name[stack[-1]] == _OPENS[char]:
                pairs[stack.pop()] = at + 1
        at += 1
    return pairs
