"""Functions that the compiler inlined at an address, from a file's DWARF, by libdw (elfutils).

Runs in the unprivileged worker alone: DWARF is a stranger's, and libdw is written in C. Layouts and
calls are those of elfutils/libdw.h, the same on all 64-bit machines since elfutils 0.171 (2018).
"""

from __future__ import annotations

import ctypes
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from ctypes import POINTER, byref, c_char_p, c_int, c_uint, c_uint8, c_uint16, c_uint64, c_void_p
from typing import Any, Final

LIBRARY: Final = "libdw.so.1"
DEPTH_LIMIT: Final = 200
"""How deep scopes may nest; the deepest that compilers make are some tens."""
RANGES_LIMIT: Final = 1 << 20
"""Address ranges of one unit or function."""
BUDGET_S: Final = 12.0
"""For one file; addresses not looked up by then have no answer."""

NAMELESS: Final = b"[unknown]"
"""A function without a name: what dwz put aside is missing, say."""

Chain = list[bytes]
"""The functions at an address, innermost first: inlined ones, then the one they are all in."""

_TAG_CLASS, _TAG_LEXICAL_BLOCK, _TAG_COMPILE_UNIT, _TAG_STRUCTURE = 0x02, 0x0B, 0x11, 0x13
_TAG_ENUMERATION, _TAG_UNION, _TAG_INLINED, _TAG_MODULE = 0x04, 0x17, 0x1D, 0x1E
_TAG_CATCH, _TAG_SUBPROGRAM, _TAG_TRY, _TAG_NAMESPACE = 0x25, 0x2E, 0x32, 0x39
_SKELETON_UNIT: Final = 0x4A

_AT_NAME, _AT_LANGUAGE, _AT_ABSTRACT_ORIGIN = 0x03, 0x13, 0x31
_AT_SPECIFICATION, _AT_LINKAGE_NAME, _AT_MIPS_LINKAGE_NAME = 0x47, 0x6E, 0x2007
_CXX: Final = frozenset((0x04, 0x1A, 0x21, 0x2B, 0x3A))
"""C++, C++11, C++14, C++17, C++20: DW_LANG_… of DWARF 5 and its list of languages since."""

_BLOCKS: Final = frozenset((_TAG_LEXICAL_BLOCK, _TAG_TRY, _TAG_CATCH))
_SPACES: Final = frozenset((_TAG_NAMESPACE, _TAG_MODULE))
_TYPES: Final = frozenset((_TAG_CLASS, _TAG_STRUCTURE, _TAG_UNION, _TAG_ENUMERATION))
_NAMED_SCOPES: Final = _SPACES | _TYPES | {_TAG_SUBPROGRAM}


class _Die(ctypes.Structure):
    _fields_ = (("addr", c_void_p), ("cu", c_void_p), ("abbrev", c_void_p), ("padding", c_uint64))


class _Attribute(ctypes.Structure):
    _fields_ = (("code", c_uint), ("form", c_uint), ("value", c_void_p), ("cu", c_void_p))


_SIGNATURES: Final[dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "dwarf_begin": (c_void_p, (c_int, c_int)),
    "dwarf_end": (c_int, (c_void_p,)),
    "dwarf_setalt": (None, (c_void_p, c_void_p)),
    "dwarf_get_units": (c_int, (c_void_p,) * 7),
    "dwarf_child": (c_int, (c_void_p, c_void_p)),
    "dwarf_siblingof": (c_int, (c_void_p, c_void_p)),
    "dwarf_tag": (c_int, (c_void_p,)),
    "dwarf_ranges": (ctypes.c_ssize_t, (c_void_p, ctypes.c_ssize_t, c_void_p, c_void_p, c_void_p)),
    "dwarf_attr": (c_void_p, (c_void_p, c_uint, c_void_p)),
    "dwarf_attr_integrate": (c_void_p, (c_void_p, c_uint, c_void_p)),
    "dwarf_formstring": (c_char_p, (c_void_p,)),
    "dwarf_formref_die": (c_void_p, (c_void_p, c_void_p)),
    "dwarf_srclang": (c_int, (c_void_p,)),
    "dwarf_getscopes_die": (c_int, (c_void_p, POINTER(POINTER(_Die)))),
}


class DwarfError(Exception):
    """The file has no DWARF that libdw can read."""


class Libdw:
    """The library; `available` is false where it is not installed, or too old."""

    def __init__(self) -> None:
        self.available = False
        self._calls: dict[str, Callable[..., Any]] = {}
        try:
            library = ctypes.CDLL(LIBRARY)
            for name, (result, arguments) in _SIGNATURES.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
                self._calls[name] = function
        except (OSError, AttributeError):
            return
        self.free = ctypes.CDLL(None).free
        self.free.argtypes, self.free.restype = (c_void_p,), None
        self.available = True

    def __getattr__(self, name: str) -> Callable[..., Any]:
        try:
            return self._calls["dwarf_" + name]
        except KeyError:
            raise AttributeError(name) from None

    def chains(
        self,
        fd: int,
        addresses: Sequence[int],
        *,
        alt: int | None = None,
        budget_s: float = BUDGET_S,
    ) -> list[Chain]:
        """The functions at each ELF virtual address; an empty chain where nothing is known.

        `alt`: the file that `.gnu_debugaltlink` names. Raises DwarfError.
        """
        if not self.available:
            raise DwarfError("no libdw")
        handles = []
        try:
            for number in (fd, *(() if alt is None else (alt,))):
                handle = self.begin(number, 0)
                if not handle:
                    raise DwarfError("no DWARF")
                handles.append(handle)
            if alt is not None:
                self.setalt(*handles)
            return _Walk(self, handles[0], addresses, time.monotonic() + budget_s).run()
        finally:
            for handle in handles:
                self.end(handle)


class _LateError(Exception):
    """The budget is used up."""


class _Walk:
    """One walk over the units that have any of the addresses, each visited once."""

    def __init__(
        self, libdw: Libdw, dwarf: int, addresses: Sequence[int], deadline_s: float
    ) -> None:
        self._libdw = libdw
        self._dwarf = dwarf
        self._wanted = addresses
        self._deadline_s = deadline_s
        self._chains: dict[int, Chain] = {}
        self._attribute = _Attribute()
        self._base, self._start, self._end = c_uint64(), c_uint64(), c_uint64()
        self._bounds = byref(self._base), byref(self._start), byref(self._end)
        # A place for the DIE at each depth: made once, as millions are visited.
        self._dies = [_Die() for _ in range(DEPTH_LIMIT + 1)]
        self._places = [ctypes.addressof(die) for die in self._dies]
        self._qualified: dict[int, bytes] = {}
        self._seen = 0
        self._is_cxx = False
        self._with_types = False

    def run(self) -> list[Chain]:
        distinct = sorted(set(self._wanted))
        try:
            for unit, here in self._units(distinct):
                self._is_cxx = self._libdw.srclang(byref(unit)) in _CXX
                ctypes.memmove(self._places[0], byref(unit), ctypes.sizeof(_Die))
                for with_types in (False, True):
                    # Methods within their types are rare (Rust has some); looking is not cheap.
                    self._with_types = with_types
                    left = [address for address in here if address not in self._chains]
                    if left:
                        self._visit(0, left, ())
        except _LateError:
            pass
        return [self._chains.get(address, []) for address in self._wanted]

    def _units(self, distinct: list[int]) -> Iterator[tuple[_Die, list[int]]]:
        """The units that have some of the addresses, with those."""
        unit, die, kind = c_void_p(), _Die(), c_uint8()
        version = c_uint16()
        while (
            self._libdw.get_units(
                self._dwarf, unit, byref(unit), byref(version), byref(kind), byref(die), None
            )
            == 0
        ):
            self._check_time()
            if kind.value == _SKELETON_UNIT or self._libdw.tag(byref(die)) != _TAG_COMPILE_UNIT:
                continue
            here = self._within(ctypes.addressof(die), distinct)
            if here:
                yield die, here

    def _within(self, die: int, addresses: list[int]) -> list[int] | None:
        """Those of the sorted addresses that a DIE's ranges hold; None: it has no ranges."""
        found: list[int] = []
        offset, number = 0, 0
        while number < RANGES_LIMIT:
            offset = self._libdw.ranges(die, offset, *self._bounds)
            if offset <= 0:
                break
            number += 1
            if number % 1024 == 0:
                self._check_time()
            low = bisect_left(addresses, self._start.value)
            high = bisect_left(addresses, self._end.value, lo=low)
            found += addresses[low:high]
        if not number:
            return None
        return sorted(set(found)) if number > 1 else found

    def _visit(self, depth: int, addresses: list[int], chain: tuple[bytes, ...]) -> None:
        """Note the functions among the children of the DIE at a depth, for these addresses."""
        self._check_time()
        if depth >= DEPTH_LIMIT:
            return
        libdw, place = self._libdw, self._places[depth + 1]
        more = libdw.child(self._places[depth], place)
        while more == 0:
            # Siblings of a damaged file may go round in circles.
            self._seen += 1
            if self._seen % 1024 == 0:
                self._check_time()
            tag = libdw.tag(place)
            if tag in (_TAG_SUBPROGRAM, _TAG_INLINED):
                here = self._within(place, addresses)
                if here:
                    nested = (self._name(place), *chain) if tag == _TAG_INLINED or chain else ()
                    nested = nested or (self._name(place),)
                    for address in here:
                        self._chains[address] = list(nested)
                    self._visit(depth + 1, here, nested)
            elif (
                tag in _BLOCKS
                or (tag in _SPACES and not chain)
                or (tag in _TYPES and self._with_types and not chain)
            ):
                self._visit(depth + 1, addresses, chain)
            more = libdw.siblingof(place, place)

    def _check_time(self) -> None:
        if time.monotonic() > self._deadline_s:
            raise _LateError

    # Names

    def _name(self, die: int) -> bytes:
        for code in (_AT_LINKAGE_NAME, _AT_MIPS_LINKAGE_NAME):
            name = self._string(die, code)
            if name:
                return name
        plain = self._string(die, _AT_NAME) or NAMELESS
        return self._qualify(die, plain) if self._is_cxx else plain

    def _string(self, die: int, code: int) -> bytes:
        found = self._libdw.attr_integrate(die, code, byref(self._attribute))
        text: bytes | None = self._libdw.formstring(found) if found else None
        return text or b""

    def _qualify(self, die: int, plain: bytes) -> bytes:
        """The name with its scopes: what is not exported has no linkage name that tells them."""
        origin = _Die()
        ctypes.memmove(byref(origin), die, ctypes.sizeof(_Die))
        for code in (_AT_ABSTRACT_ORIGIN, _AT_SPECIFICATION):
            found = self._libdw.attr(byref(origin), code, byref(self._attribute))
            if found:
                self._libdw.formref_die(found, byref(origin))
        key = origin.addr or 0
        if key not in self._qualified:
            self._check_time()
            self._qualified[key] = b"::".join((*self._scopes(origin, plain), plain))
        return self._qualified[key]

    def _scopes(self, origin: _Die, plain: bytes) -> list[bytes]:
        """The names of what a DIE is declared in, outermost first."""
        # The class of a lambda has no name.
        unnamed = b"{lambda}" if plain.startswith(b"operator()") else b"{unnamed}"
        scopes = POINTER(_Die)()
        count = self._libdw.getscopes_die(byref(origin), byref(scopes))
        if count <= 0:
            return []
        names: list[bytes] = []
        for index in range(1, min(count, DEPTH_LIMIT)):
            scope = ctypes.addressof(scopes[index])
            tag = self._libdw.tag(scope)
            if tag in _NAMED_SCOPES:
                name = self._string(scope, _AT_NAME)
                names.append(name or (b"(anonymous namespace)" if tag in _SPACES else unnamed))
        self._libdw.free(scopes)
        return names[::-1]
