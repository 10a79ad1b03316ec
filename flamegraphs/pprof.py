"""Profiles as pprof reads them: a gzipped protocol buffer, for `go tool pprof` and its relatives.

The format: https://github.com/google/pprof/blob/main/proto/profile.proto. Few of its fields are
needed, and their encoding is a few lines, so it is written by hand.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterable
from itertools import chain
from typing import Final, TypeAlias

from latrace.flamegraphs.profile import CODE, Frame, Profile, merged
from latrace.flamegraphs.text import visible

_VARINT: Final = 0
_BYTES: Final = 2

_Location: TypeAlias = tuple[Frame, ...]
"""The functions at one place in the code, innermost first: what is inlined, then what holds it."""


def to_pprof(profile: Profile) -> bytes:
    """Return the profile as a gzipped `perftools.profiles.Profile`, the same bytes each time.

    One sample for each stack, leaf first, in nanoseconds; they add up to `profile.total_ns`. Every
    frame is a function, a module its file and its mapping. Inlined functions share the location of
    the one that they are in. Labels name the process, the thread, the
    state and the cause of a stack. Facts and warnings are comments.
    """
    strings = _Strings()
    kind = profile.kind or "time"
    value_type = _ints(1, strings[kind]) + _ints(2, strings["nanoseconds"])
    mappings: dict[str, int] = {}
    functions: dict[Frame, int] = {}
    locations: dict[_Location, int] = {}
    out = [_message(1, value_type)]
    for stack, weight_ns in merged(profile.stacks_ns):
        if weight_ns:
            places = _places(stack, alone=profile.innermost_first)
            ids = [locations.setdefault(place, len(locations) + 1) for place in reversed(places)]
            sample = [_packed(1, ids), _packed(2, [weight_ns])]
            for key, value in _labels(stack):
                sample.append(_message(3, _ints(1, strings[key]) + _ints(2, strings[value])))
            out.append(_message(2, b"".join(sample)))
    # The first is taken for the program itself: no library, and not the kernel.
    for frame in chain.from_iterable(locations):
        functions.setdefault(frame, len(functions) + 1)
    modules = dict.fromkeys(frame.module for frame in functions if frame.module)
    for module in sorted(modules, key=lambda name: (name.startswith("["), ".so" in name)):
        id_ = mappings[module] = len(mappings) + 1
        # It has its functions (7): nobody need look for the file to find them.
        mapping = _ints(1, id_) + _ints(5, strings[visible(module)]) + _ints(7, 1)
        out.append(_message(3, mapping))
    for place, id_ in locations.items():
        lines = b"".join(_message(4, _ints(1, functions[frame])) for frame in place)
        out.append(_message(4, _ints(1, id_) + _ints(2, mappings.get(place[-1].module, 0)) + lines))
    for frame, id_ in functions.items():
        # Without a system_name (3), pprof takes the name as it is.
        name, file = visible(frame.name) or "[unknown]", visible(frame.module)
        out.append(_message(5, _ints(1, id_) + _ints(2, strings[name]) + _ints(4, strings[file])))
    comments = [profile.title, *(f"{key}: {value}" for key, value in profile.facts)]
    comments += [f"!!! {warning}" for warning in profile.warnings]
    told = [strings[visible(comment)] for comment in comments]
    out += [
        _ints(9, profile.started_ns),
        _ints(10, profile.duration_ns),
        _message(11, value_type),
        _ints(12, profile.period_ns),
        _packed(13, told),
        _ints(14, strings[kind]),
    ]
    # Last, when all are known; the order of fields is free.
    out += [_message(6, text.encode()) for text in strings]
    packed = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=packed, mtime=0) as stream:
        stream.write(b"".join(out))
    return packed.getvalue()


def _places(stack: _Location, *, alone: bool) -> list[_Location]:
    """Divide a stack, root first, into locations: a function and what it has inlined, that first.

    `alone`: in a stack that stands on its head each function has its own.
    """
    places: list[_Location] = []
    for frame in stack:
        if not alone and places and frame.kind == "inlined" and _has_room(places[-1][-1], frame):
            places[-1] = (frame, *places[-1])
        else:
            places.append((frame,))
    return places


def _has_room(outer: Frame, inlined: Frame) -> bool:
    return outer.kind in CODE and outer.module == inlined.module


def _labels(stack: tuple[Frame, ...]) -> Iterable[tuple[str, str]]:
    """Whose time it is and what it was, as (key, value); of two of a kind the first."""
    labels: dict[str, str] = {}
    for frame in stack:
        name = visible(frame.name) or "[unknown]"
        if frame.kind == "state":
            state = name.strip("[]")
            labels.setdefault("state", state)
            if state.startswith("waiting: "):
                labels.setdefault("cause", state.removeprefix("waiting: "))
        elif frame.kind in ("process", "thread"):
            labels.setdefault(frame.kind, name)
    return sorted(labels.items())


class _Strings(dict[str, int]):
    """The string table: the place of each text, the empty one first."""

    def __init__(self) -> None:
        super().__init__({"": 0})

    def __missing__(self, text: str) -> int:
        self[text] = len(self)
        return self[text]


# --- the wire format: https://protobuf.dev/programming-guides/encoding/ -------------------------


def _varint(value: int) -> bytes:
    out = bytearray()
    value &= (1 << 64) - 1  # a negative number has all of its bits
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _ints(number: int, value: int) -> bytes:
    """Return a field of a number; nothing for 0, which is what a reader takes it for."""
    return _varint(number << 3 | _VARINT) + _varint(value) if value else b""


def _message(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | _BYTES) + _varint(len(content)) + content


def _packed(number: int, values: Iterable[int]) -> bytes:
    content = b"".join(map(_varint, values))
    return _message(number, content) if content else b""
