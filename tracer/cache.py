"""Compiled probes kept between runs: compiling takes longer than everything else at the start.

The directory and its files belong to root and nobody else can write them: what they hold is loaded
into the kernel. The key covers all that the instructions depend on, so nothing in here grows
stale; a file that is damaged, or whose keeper is another user, counts as missing.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable
from pathlib import Path

from .compiled import Compiled
from .kept import KeptFiles

DIRECTORY = Path("/var/cache/latrace")
_KEEP = 16  # files: one for each kind of target and kernel
_LARGEST = 1 << 20


def key_of(parts: Iterable[bytes]) -> str:
    """The name under which something made of these parts is kept."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return f"probes-{digest.hexdigest()}"


def _files() -> KeptFiles:
    return KeptFiles(DIRECTORY, most_files=_KEEP, most_bytes=sys.maxsize, largest=_LARGEST)


def find(key: str) -> Compiled | None:
    """What was kept under this key, None when nothing (whole) was."""
    text = _files().find(key)
    if text is None:
        return None
    try:
        return Compiled.from_bytes(text)
    except (ValueError, KeyError, TypeError):
        return None


def keep(key: str, compiled: Compiled) -> None:
    """Keep it, and drop the oldest beyond the newest few. Where that fails, nothing is kept."""
    _files().keep(key, compiled.to_bytes())


def forget(key: str) -> None:
    """Drop it."""
    _files().forget(key)
