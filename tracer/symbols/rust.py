"""Rust symbol names: the legacy scheme and v0 (RFC 2603), as rustc-demangle's `{:#}` prints them.

Disambiguators and the hash at the end of a legacy name are left out: they change with each build
and would keep two builds' frames apart. Nesting and output are bounded, since back references
let a short name describe an exponentially long one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

OUTPUT_LIMIT: Final = 4096
_DEPTH_LIMIT: Final = 128
_WORK_LIMIT: Final = 1 << 16

# One repetition and no more: a second one takes quadratic time.
_LEGACY = re.compile(r"_ZN(.*17h[0-9a-f]{16})E([.@].*)?")
_LEGACY_ESCAPES: Final = {
    "SP": "@",
    "BP": "*",
    "RF": "&",
    "LT": "<",
    "GT": ">",
    "LP": "(",
    "RP": ")",
    "C": ",",
}
_BASIC_TYPES: Final = {
    "a": "i8",
    "b": "bool",
    "c": "char",
    "d": "f64",
    "e": "str",
    "f": "f32",
    "h": "u8",
    "i": "isize",
    "j": "usize",
    "l": "i32",
    "m": "u32",
    "n": "i128",
    "o": "u128",
    "p": "_",
    "s": "i16",
    "t": "u16",
    "u": "()",
    "v": "...",
    "x": "i64",
    "y": "u64",
    "z": "!",
}
_INTEGERS: Final = frozenset("ahijlmnostxy")
_BASE62: Final = {
    digit: value
    for value, digit in enumerate("0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
}

# The codec is imported on first use; the worker has no files to import from by then.
b"".decode("punycode")


def demangle_rust(name: str) -> str | None:
    """The readable form of a Rust name, None when it is none."""
    if name.startswith("_R"):
        return _v0(name)
    if name.startswith("_ZN"):
        return _legacy(name)
    return None


def _legacy(name: str) -> str | None:
    match = _LEGACY.fullmatch(name)
    if match is None:
        return None
    body, parts, at = match[1], [], 0
    while at < len(body):
        digits = at
        while digits < len(body) and body[digits].isdigit() and digits - at < 5:
            digits += 1
        if digits == at:
            return None
        end = digits + int(body[at:digits])
        if end > len(body):
            return None
        parts.append(body[digits:end])
        at = end
    if len(parts) < 2:
        return None
    return "::".join(_unescape(part) for part in parts[:-1]) + _suffix(match[2])


def _unescape(part: str) -> str:
    if part.startswith("_$"):
        part = part[1:]

    def replace(match: re.Match[str]) -> str:
        word = match[1]
        if word in _LEGACY_ESCAPES:
            return _LEGACY_ESCAPES[word]
        if re.fullmatch("u[0-9a-f]{1,6}", word) and int(word[1:], 16) < 0x110000:
            char = chr(int(word[1:], 16))
            if char.isprintable():
                return char
        return match[0]

    return re.sub(r"\$([A-Za-z0-9]+)\$", replace, part).replace("..", "::")


class _Bad(Exception):
    """Not a v0 name, or one past the limits."""


def _v0(name: str) -> str | None:
    text, dot, suffix = name[2:].partition(".")
    if not text.isascii():
        return None
    printer = _Printer(text)
    try:
        printer.path(value=True)
        if printer.at < len(text) and text[printer.at].isupper():
            printer.silent(lambda: printer.path(value=False))
        if printer.at != len(text):
            return None
    except (_Bad, RecursionError, ValueError, IndexError, OverflowError):
        return None
    return "".join(printer.out) + _suffix(dot + suffix)


def _suffix(text: str | None) -> str:
    """Of what the compiler appended, the part that tells a reader something: `.cold`, `.warm`."""
    if not text or text.startswith(".llvm.") or text[1:].isdigit():
        return ""
    return text


class _Printer:
    """Recursive descent over the grammar of RFC 2603, printing while it reads."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.out: list[str] = []
        self._length = 0
        self._quiet = 0
        self._depth = 0
        self._work = 0
        self._lifetimes = 0

    def emit(self, text: str) -> None:
        if self._quiet:
            return
        self._length += len(text)
        if self._length > OUTPUT_LIMIT:
            raise _Bad
        self.out.append(text)

    def silent(self, action: Callable[[], None]) -> None:
        self._quiet += 1
        action()
        self._quiet -= 1

    def next(self) -> str:
        char = self.text[self.at]
        self.at += 1
        return char

    def eat(self, char: str) -> bool:
        if self.text[self.at : self.at + 1] == char:
            self.at += 1
            return True
        return False

    def base62(self) -> int:
        if self.eat("_"):
            return 0
        value = 0
        while not self.eat("_"):
            value = value * 62 + _BASE62[self.next()] if self.text[self.at] in _BASE62 else -1
            if not 0 <= value < 1 << 64:
                raise _Bad
        return value + 1

    def optional62(self, tag: str) -> int:
        return self.base62() + 1 if self.eat(tag) else 0

    def identifier(self) -> tuple[str, int]:
        disambiguator = self.optional62("s")
        return self.plain_identifier(), disambiguator

    def plain_identifier(self) -> str:
        unicode_name = self.eat("u")
        begin = self.at
        if not self.eat("0"):
            while self.text[self.at : self.at + 1].isdigit():
                self.at += 1
        if begin == self.at or self.at - begin > 5:
            raise _Bad
        length = int(self.text[begin : self.at])
        self.eat("_")
        name = self.text[self.at : self.at + length]
        if len(name) != length:
            raise _Bad
        self.at += length
        if unicode_name:
            basic, _, extended = name.rpartition("_")
            name = f"{basic}-{extended}" if basic else extended
            return name.encode("ascii").decode("punycode")
        return name

    def enter(self) -> None:
        self._depth += 1
        self._work += 1
        if self._depth > _DEPTH_LIMIT or self._work > _WORK_LIMIT:
            raise _Bad

    def leave(self) -> None:
        self._depth -= 1

    def backref(self, action: Callable[[], None]) -> None:
        tag = self.at - 1
        target = self.base62()
        if target >= tag:
            raise _Bad
        if self._quiet:
            # Nothing is printed and the position afterwards is known: no need to follow it.
            return
        back, self.at = self.at, target
        self.enter()
        action()
        self.leave()
        self.at = back

    def path(self, *, value: bool) -> None:
        self.enter()
        tag = self.next()
        if tag == "C":
            self.emit(self.identifier()[0])
        elif tag == "N":
            self._nested(value=value)
        elif tag in "MXY":
            if tag != "Y":
                self.optional62("s")
                self.silent(lambda: self.path(value=False))
            self.emit("<")
            self.type()
            if tag != "M":
                self.emit(" as ")
                self.path(value=False)
            self.emit(">")
        elif tag == "I":
            self.path(value=value)
            self.emit("::<" if value else "<")
            self.list(self.generic_argument)
            self.emit(">")
        elif tag == "B":
            self.backref(lambda: self.path(value=value))
        else:
            raise _Bad
        self.leave()

    def _nested(self, *, value: bool) -> None:
        namespace = self.next()
        if not namespace.isalpha():
            raise _Bad
        self.path(value=value)
        name, disambiguator = self.identifier()
        if namespace.isupper():
            kind = {"C": "closure", "S": "shim"}.get(namespace, namespace)
            inner = f"{kind}:{name}" if name else kind
            self.emit(f"::{{{inner}#{disambiguator}}}")
        elif name:
            self.emit("::" + name)

    def list(self, item: Callable[[], None], separator: str = ", ") -> int:
        count = 0
        while not self.eat("E"):
            if count:
                self.emit(separator)
            item()
            count += 1
        return count

    def generic_argument(self) -> None:
        if self.eat("L"):
            self.lifetime()
        elif self.eat("K"):
            self.const()
        else:
            self.type()

    def lifetime(self) -> None:
        index = self.base62()
        if not index:
            self.emit("'_")
            return
        depth = self._lifetimes - index
        if depth < 0:
            raise _Bad
        self.emit("'" + (chr(ord("a") + depth) if depth < 26 else f"_{depth}"))

    def binder(self, action: Callable[[], None]) -> None:
        bound = self.optional62("G")
        if bound > 64:
            raise _Bad
        if bound:
            self.emit("for<")
            for number in range(bound):
                self._lifetimes += 1
                self.emit(", " if number else "")
                depth = self._lifetimes - 1
                self.emit("'" + (chr(ord("a") + depth) if depth < 26 else f"_{depth}"))
            self.emit("> ")
        action()
        self._lifetimes -= bound

    def type(self) -> None:
        self.enter()
        tag = self.next()
        compound = {
            "R": self._reference,
            "Q": self._reference,
            "P": self._pointer,
            "O": self._pointer,
            "A": self._array,
            "S": self._array,
            "T": self._tuple,
            "D": self._dyn,
        }
        if tag in _BASIC_TYPES:
            self.emit(_BASIC_TYPES[tag])
        elif tag in compound:
            compound[tag](tag)
        elif tag == "F":
            self.binder(self._function)
        elif tag == "B":
            self.backref(self.type)
        else:
            self.at -= 1
            self.path(value=False)
        self.leave()

    def _reference(self, tag: str) -> None:
        self.emit("&")
        # The erased lifetime, index 0, is not written.
        if self.eat("L") and not self.eat("_"):
            self.lifetime()
            self.emit(" ")
        self.emit("mut " if tag == "Q" else "")
        self.type()

    def _pointer(self, tag: str) -> None:
        self.emit("*const " if tag == "P" else "*mut ")
        self.type()

    def _array(self, tag: str) -> None:
        self.emit("[")
        self.type()
        if tag == "A":
            self.emit("; ")
            self.const()
        self.emit("]")

    def _tuple(self, _tag: str) -> None:
        self.emit("(")
        self.emit("," if self.list(self.type) == 1 else "")
        self.emit(")")

    def _dyn(self, _tag: str) -> None:
        self.emit("dyn ")
        self.binder(self._dyn_bounds)
        if not self.eat("L"):
            raise _Bad
        if not self.eat("_"):
            self.emit(" + ")
            self.lifetime()

    def _dyn_bounds(self) -> None:
        self.list(self._dyn_trait, " + ")

    def _function(self) -> None:
        self.emit("unsafe " if self.eat("U") else "")
        if self.eat("K"):
            abi = "C" if self.eat("C") else self.plain_identifier().replace("_", "-")
            self.emit(f'extern "{abi}" ')
        self.emit("fn(")
        self.list(self.type)
        self.emit(")")
        if not self.eat("u"):
            self.emit(" -> ")
            self.type()

    def _dyn_trait(self) -> None:
        is_open = self._open_path()
        while self.eat("p"):
            self.emit(", " if is_open else "<")
            is_open = True
            self.emit(self.plain_identifier() + " = ")
            self.type()
        self.emit(">" if is_open else "")

    def _open_path(self) -> bool:
        """A path whose `<…` is left open, so that associated types can be added."""
        self.enter()
        is_open = False

        def follow() -> None:
            nonlocal is_open
            is_open = self._open_path()

        if self.eat("B"):
            self.backref(follow)
        elif self.eat("I"):
            self.path(value=False)
            self.emit("<")
            self.list(self.generic_argument)
            is_open = True
        else:
            self.path(value=False)
        self.leave()
        return is_open

    def const(self) -> None:
        self.enter()
        tag = self.next()
        if tag == "p":
            self.emit("_")
        elif tag == "B":
            self.backref(self.const)
        elif tag in _INTEGERS:
            self.emit("-" if self.eat("n") else "")
            digits = self._hex()
            self.emit(str(int(digits or "0", 16)) if len(digits) <= 32 else "0x" + digits)
        elif tag == "b":
            self.emit({"": "false", "0": "false", "1": "true"}.get(self._hex().lstrip("0"), "?"))
        elif tag == "c":
            self.emit(repr(chr(int(self._hex() or "0", 16))))
        elif tag == "e":
            raw = bytes.fromhex(self._hex())
            self.emit('*"' + raw.decode("utf-8") + '"')
        elif tag in "RQ":
            if tag == "R" and self.eat("e"):
                self.emit('"' + bytes.fromhex(self._hex()).decode("utf-8") + '"')
            else:
                self.emit("&" if tag == "R" else "&mut ")
                self.const()
        elif tag in "AT":
            self.emit("[" if tag == "A" else "(")
            count = self.list(self.const)
            self.emit("]" if tag == "A" else ",)" if count == 1 else ")")
        elif tag == "V":
            self._const_variant()
        else:
            raise _Bad
        self.leave()

    def _const_variant(self) -> None:
        self.path(value=True)
        shape = self.next()
        if shape == "T":
            self.emit("(")
            self.list(self.const)
            self.emit(")")
        elif shape == "S":
            self.emit(" { ")
            self.list(self._const_field)
            self.emit(" }")
        elif shape != "U":
            raise _Bad

    def _const_field(self) -> None:
        self.emit(self.identifier()[0] + ": ")
        self.const()

    def _hex(self) -> str:
        begin = self.at
        while self.text[self.at] in "0123456789abcdef":
            self.at += 1
        digits = self.text[begin : self.at]
        if not self.eat("_"):
            raise _Bad
        return digits
