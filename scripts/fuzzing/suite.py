"""All fuzz targets by their names."""

from __future__ import annotations

from typing import Final

from . import elf_files, frames_of_code, names, profiles, replies, texts, walks
from .target import Property, Target

TARGETS: Final[dict[str, Target | Property]] = {
    target.name: target
    for module in (elf_files, frames_of_code, walks, texts, names, replies, profiles)
    for target in module.TARGETS
}
