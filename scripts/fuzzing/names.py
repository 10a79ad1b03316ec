"""Names of functions as compilers mangle them, and as nobody does."""

from __future__ import annotations

import functools
from random import Random
from typing import Final

from latrace.tracer.symbols.demangle import Demangler
from latrace.tracer.symbols.elf import BytesSource, read_image
from latrace.tracer.symbols.frames import NAME_LIMIT, clean
from latrace.tracer.symbols.rust import OUTPUT_LIMIT, demangle_rust

from . import programs
from .damage import FILES, damaged
from .target import Missing, Target, hold

_RUST: Final = (
    "_RNvCs1234_7mycrate4main _RINvNtC3std3mem8align_ofjE _RNvXs_C3foom3bar _RNCNvC1a1b0B3_ "
    "_RINvC1a1fKj2a_KRe616263_E _RINvC1a1fDNtB4_1TEL_E _RNvMC1aINtB2_1SpE1f _RYhNtC1a1T1f "
    "_ZN4core3fmt9Formatter3pad17h0123456789abcdefE _RINvC1a1fFUKCEuE _RNvC1au5aaa_b.llvm.1 "
    "_ZN4_$LT$T$u20$as$u20$U$GT$1f17h0123456789abcdefE _RINvC1a1fGL0_FhEhE _RC1a.cold"
)
_ALPHABET: Final = "_RNvCIMXYTBKLEsuGDFASPQO0123456789abcdefhijklmnoptxyz.$"
_CXX: Final = "_ZN1234567890SIJEKSTBLDFPRCVXabcdefgijlmstvwyzUn@."


@functools.cache
def _mangled() -> tuple[bytes, ...]:
    """Real names."""
    found: list[bytes] = []
    for path in programs.real("libstdc++.so.6", "node"):
        names = read_image(BytesSource(FILES[path])).symbols.all_names()
        found += [name for name in names if name.startswith((b"_Z", b"_R"))][:4000]
    if not found:
        raise Missing("no program with mangled names")
    return tuple(found)


def _grown(random: Random) -> bytes:
    """A name by the grammar of Rust's newer scheme, with mistakes in it."""

    def number() -> str:
        return random.choice(("_", "0_", "1_", "a_", "Zz_", "zzzzzzzzzzzz_"))

    def name() -> str:
        text = random.choice(("a", "foo", "", "x" * 20, "f_1", "gdel_pzb"))
        unicode_mark = "u" if random.random() < 0.1 else ""
        blank = "_" if text[:1].isdigit() or text[:1] == "_" else ""
        return f"{random.choice(('', 's' + number()))}{unicode_mark}{len(text)}{blank}{text}"

    def many(make: object, depth: int) -> str:
        return "".join(make(depth - 1) for _ in range(random.randrange(4))) + "E"  # type: ignore[operator]

    def path(depth: int) -> str:
        kind = random.randrange(7) if depth > 0 else 0
        return (
            lambda: "C" + name(),
            lambda: "N" + random.choice("vtCS") + path(depth - 1) + name(),
            lambda: "M" + path(depth - 1) + one_type(depth - 1),
            lambda: "X" + path(depth - 1) + one_type(depth - 1) + path(depth - 1),
            lambda: "Y" + one_type(depth - 1) + path(depth - 1),
            lambda: "I" + path(depth - 1) + many(argument, depth),
            lambda: "B" + number(),
        )[kind]()

    def argument(depth: int) -> str:
        return random.choice((one_type, one_type, lambda _: "L" + number(), constant))(depth)

    def constant(_depth: int) -> str:
        return "K" + random.choice(
            ("j2a_", "an1_", "b1_", "c61_", "p", "Re6162_", "TE", "ATEE", "cd800_", "j" + "f" * 40)
        )

    def one_type(depth: int) -> str:
        if depth <= 0:
            return random.choice("abcdefhijlmnopstuvxyz")
        kind = random.randrange(8)
        return (
            lambda: random.choice("abhjmy"),
            lambda: random.choice("RQPOS") + one_type(depth - 1),
            lambda: "RL" + number() + one_type(depth - 1),
            lambda: "A" + one_type(depth - 1) + "j4_",
            lambda: "T" + many(one_type, depth),
            lambda: "F" + random.choice(("", "U", "KC", "G_")) + many(one_type, depth) + "u",
            lambda: "D" + many(path, depth) + "L" + number(),
            lambda: path(depth - 1),
        )[kind]()

    return ("_R" + path(random.randrange(1, 8))).encode()


def _letters(random: Random) -> bytes:
    length = random.randrange(random.choice((20, 100, NAME_LIMIT)))
    return ("_R" + "".join(random.choices(_ALPHABET, k=length))).encode()


def _cxx_letters(random: Random) -> bytes:
    return ("_Z" + "".join(random.choices(_CXX, k=random.randrange(60)))).encode()


def _repeated(random: Random) -> bytes:
    """The same thing over and over."""
    piece = "".join(random.choices(_ALPHABET, k=random.randrange(1, 4)))
    head = random.choice(("_R", "_RNvC1a", "_RM", "_ZN", "_RIC1a"))
    return (head + piece * NAME_LIMIT)[: random.randrange(2, NAME_LIMIT)].encode()


def _any(random: Random) -> bytes:
    return random.choice((b"_Z", b"_R", b"")) + random.randbytes(random.randrange(80))


def _damaged(random: Random) -> bytes:
    known = random.choice((random.choice(_RUST.split()).encode(), random.choice(_mangled())))
    return damaged(random, known[:NAME_LIMIT], most=3)


def _grown_and_damaged(random: Random) -> bytes:
    return damaged(random, _grown(random), most=2)


_MAKERS: Final = (_letters, _cxx_letters, _repeated, _any, _damaged, _grown, _grown_and_damaged)


def _make(random: Random) -> bytes:
    return random.choice(_MAKERS)(random)


@functools.cache
def _demangler() -> Demangler:
    return Demangler()


def _check(case: bytes) -> None:
    # As from a file: no zero byte, and no longer.
    name = case.split(b"\0", 1)[0][: NAME_LIMIT + 4]
    readable = _demangler()(name)
    hold(len(readable) <= max(NAME_LIMIT + 4, len(name)), "a name past the limit")
    hold("\x1b" not in clean(readable), "a name that drives a terminal")
    rust = demangle_rust(name.decode("ascii", "replace"))
    hold(rust is None or len(rust) <= max(OUTPUT_LIMIT, NAME_LIMIT) + 64 + len(name), "too long")


TARGETS = (Target("names", "mangled names, Rust's and C++'s", _make, _check, limit_s=1.0),)
