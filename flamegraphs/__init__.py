"""Flame graphs: pure functions from a capture's stacks and weights to pictures and formats.

    profile = build_profile(latrace.open("latrace.data"), kind="wait")
    Path("out.svg").write_bytes(render(profile, "out.svg"))

Nothing here needs a kernel, root or bcc.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePath
from typing import Final

from latrace.flamegraphs.build import KINDS, CaptureTables, Kind, Level, build_profile
from latrace.flamegraphs.diff import to_diff_svg
from latrace.flamegraphs.folded import to_folded
from latrace.flamegraphs.pprof import to_pprof
from latrace.flamegraphs.profile import Frame, FrameKind, Profile
from latrace.flamegraphs.shape import BadPatternError, Shape, SlowPatternError
from latrace.flamegraphs.speedscope import to_speedscope
from latrace.flamegraphs.svg import to_svg

__all__ = [
    "FORMATS",
    "KINDS",
    "BadPatternError",
    "CaptureTables",
    "Frame",
    "FrameKind",
    "Kind",
    "Level",
    "Profile",
    "Shape",
    "SlowPatternError",
    "build_profile",
    "format_of",
    "render",
    "to_diff_svg",
    "to_folded",
    "to_pprof",
    "to_speedscope",
    "to_svg",
]


def _utf8(write: Callable[[Profile], str]) -> Callable[[Profile], bytes]:
    # A lone surrogate cannot reach this point: every writer escapes it first.
    return lambda profile: write(profile).encode("utf-8")


FORMATS: Final[dict[str, Callable[[Profile], bytes]]] = {
    ".svg": _utf8(to_svg),
    ".folded": _utf8(to_folded),
    ".speedscope.json": _utf8(to_speedscope),
    ".pb.gz": to_pprof,
}


def format_of(name: str | PurePath) -> str:
    """Return the key of `FORMATS` that a file name's extension chooses.

    A bare extension (".svg") counts as a name. Raises ValueError, with the known extensions in
    its message, for any other; call it before the work starts.
    """
    lower = PurePath(name).name.lower()
    for extension in FORMATS:
        if lower.endswith(extension):
            return extension
    raise ValueError(
        f"no flame graph format for {PurePath(name).name!r}: "
        f"the name must end in one of {', '.join(FORMATS)}"
    )


def render(profile: Profile, name: str | PurePath) -> bytes:
    """Return `profile` as the contents of a file called `name` (see `format_of`)."""
    return FORMATS[format_of(name)](profile)
