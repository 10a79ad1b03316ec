"""Control groups: whose a process is, what an id is called, and what its CPU quota did."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_PROC = Path("/proc")
_OCTAL = re.compile(r"\\([0-7]{3})")  # how mountinfo writes blanks in paths


def cgroup_of(tgid: int) -> str:
    """The cgroup that limits a process's CPU: the v1 `cpu` one or, else, the v2 one; "" if gone."""
    try:
        lines = Path(f"/proc/{tgid}/cgroup").read_text("utf-8", "backslashreplace").splitlines()
    except OSError:
        return ""
    unified = ""
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "cpu" in controllers.split(","):
            return path
        if not controllers:
            unified = path
    return unified


@dataclass(frozen=True, slots=True)
class Mount:
    """Where a cgroup hierarchy is mounted; `root`: which of its groups is seen there."""

    point: Path
    root: str
    unified: bool
    divides_cpu: bool
    """Whether CPU time is what it divides: v2, or v1's `cpu`."""


def cgroup_mounts(proc: Path = _PROC) -> list[Mount]:
    """All mounted cgroup hierarchies (proc_pid_mountinfo(5)); none when that cannot be read."""
    mounts: list[Mount] = []
    try:
        text = (proc / "self/mountinfo").read_text("utf-8", "surrogateescape")
    except OSError:
        return mounts
    for line in text.splitlines():
        fields, _, kind = line.partition(" - ")
        kind_fields = kind.split()
        if len(kind_fields) < 3 or kind_fields[0] not in ("cgroup", "cgroup2"):
            continue
        root, point = fields.split()[3:5]
        unified = kind_fields[0] == "cgroup2"
        mounts.append(
            Mount(
                Path(_OCTAL.sub(lambda match: chr(int(match[1], 8)), point)),
                root,
                unified,
                divides_cpu=unified or "cpu" in kind_fields[2].split(","),
            )
        )
    return mounts


@cache
def _root() -> Path | None:
    """Where the hierarchy that limits CPUs is mounted whole: v1 `cpu`, or else v2."""
    whole = [mount for mount in cgroup_mounts() if mount.divides_cpu and mount.root == "/"]
    return min(whole, key=lambda mount: mount.unified).point if whole else None


_names: dict[int, str] = {}
"""By id, which is the inode number of the group's directory (kernfs)."""


def cgroup_name(number: int) -> str | None:
    """The path of a control group in its hierarchy, by id; None for 0, its number when unknown."""
    if not number:
        return None
    if number not in _names:
        _find_all()
    return _names.setdefault(int(number), f"cgroup {number}")  # gone, or in no tree we see


def _find_all() -> None:
    root = _root()
    if root is None:
        return
    for folder, folders, _ in os.walk(root):
        try:
            _names[Path(folder).stat().st_ino] = folder.removeprefix(str(root)) or "/"
        except OSError:  # removed while we look
            folders.clear()


def limits() -> dict[str, dict[str, Any]]:
    """All groups with a CPU quota, by path, and what it did so far (cpu.stat).

    `quota_us` and `period_us`; `nr_periods`, `nr_throttled`; `throttled_ns`: of all its CPUs.
    """
    root = _root()
    found: dict[str, dict[str, Any]] = {}
    if root is None:
        return found
    for folder, folders, files in os.walk(root):
        try:
            if limit := _limit(Path(folder), files):
                found[folder.removeprefix(str(root)) or "/"] = limit
        except (OSError, ValueError):  # removed while we look
            folders.clear()
    return found


def _limit(folder: Path, files: list[str]) -> dict[str, Any] | None:
    if "cpu.max" in files:
        quota, period = (folder / "cpu.max").read_text().split()
        if quota == "max":
            return None
    elif "cpu.cfs_quota_us" in files:
        quota = (folder / "cpu.cfs_quota_us").read_text()
        period = (folder / "cpu.cfs_period_us").read_text()
        if int(quota) < 0:
            return None
    else:
        return None
    stat = dict(line.split() for line in (folder / "cpu.stat").read_text().splitlines())
    throttled_us = int(stat.get("throttled_usec", 0))
    return {
        "quota_us": int(quota),
        "period_us": int(period),
        "nr_periods": int(stat["nr_periods"]),
        "nr_throttled": int(stat["nr_throttled"]),
        "throttled_ns": int(stat.get("throttled_time", 1000 * throttled_us)),
    }


def limited_since(before: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups with a quota now, and what it did since `before` was taken by `limits`."""
    changed = []
    for cgroup, now in limits().items():
        then = before.get(cgroup, {})
        counters = {
            name: now[name] - then.get(name, 0)
            for name in ("nr_periods", "nr_throttled", "throttled_ns")
        }
        changed.append({"cgroup": cgroup, **now, **counters})
    return changed
