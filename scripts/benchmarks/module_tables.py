"""What it takes to make the unwinding table of a module, and to take it from the cache."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from latrace.tracer.symbols.client import Worker
from latrace.tracer.unwinding.cache import TableCache
from latrace.tracer.unwinding.modules import ModuleTables
from latrace.tracer.unwinding.table import UnwindTable

from .context import Context
from .errors import BenchError
from .estimate import estimate
from .tables import interval_heading, paragraph, table


def run(context: Context) -> dict[str, Any]:
    """Each module with an empty cache, then with what that left there."""
    modules = dict(list(_modules().items())[:1]) if context.quick else _modules()
    found = context.interleave(
        {name: partial(_made, context, path) for name, path in modules.items()}
    )
    if not found:
        raise BenchError("no table could be made")
    return {
        "modules": {
            name: {key: estimate([one[key] for one in rounds]).as_dict() for key in rounds[0]}
            for name, rounds in found.items()
        }
    }


def _modules() -> dict[str, Path]:
    """The C library that we run with, and large programs that are here."""
    maps = Path("/proc/self/maps").read_text()
    libc = re.search(r"(/\S+/libc\.so\.6)$", maps, re.MULTILINE)
    found = {"libc": Path(libc[1])} if libc else {}
    postgres = max(Path("/usr/lib/postgresql").glob("*/bin/postgres"), default=None)
    node = shutil.which("node")
    others = {
        "postgres": postgres,
        "python3": Path(sys.executable),
        "node": None if node is None else Path(node),
    }
    return found | {name: path.resolve() for name, path in others.items() if path is not None}


def _made(context: Context, path: Path) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=context.folder) as folder:
        worker = Worker()
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if isinstance(ready := worker.section(fd), int):  # starts it, and reads the file once
                raise BenchError(f"{path.name} is refused: {ready}")
            cold_s, made = _timed(worker, folder, fd)
            cached_s, kept = _timed(worker, folder, fd)
            if kept.to_bytes() != made.to_bytes():
                raise BenchError("what was kept is another table")
        finally:
            os.close(fd)
            worker.close()
    return {
        "cold_s": cold_s,
        "cached_s": cached_s,
        "rows": len(made),
        "rules": len(made.rules),
        "bytes": made.nbytes,
        "section_bytes": len(ready[1]),
    }


def _timed(worker: Worker, folder: str, fd: int) -> tuple[float, UnwindTable]:
    cache = TableCache(Path(folder) / "cache")
    began_s = time.monotonic()
    found = ModuleTables(worker, cache=cache).table(fd)
    took_s = time.monotonic() - began_s
    if isinstance(found, str):
        raise BenchError(found)
    return took_s, found


def render(result: dict[str, Any]) -> list[str]:
    """Times and sizes."""
    rows = [
        (
            name,
            f"{found['rows']['median']:,.0f}",
            f"{found['rules']['median']:,.0f}",
            f"{found['section_bytes']['median'] / 1e6:.1f}",
            f"{found['bytes']['median'] / 1e6:.1f}",
            f"{found['cold_s']['median'] * 1e3:,.0f}",
            f"{found['cold_s']['low'] * 1e3:,.0f}-{found['cold_s']['high'] * 1e3:,.0f}",
            f"{found['cached_s']['median'] * 1e3:,.1f}",
        )
        for name, found in result["modules"].items()
    ]
    interval = interval_heading(next(iter(result["modules"].values()))["cold_s"])
    heads = ("module", "rows", "rules", "section MB", "MB", "made ms", interval, "kept ms")
    return [
        *table(heads, rows),
        "",
        *paragraph(
            "Made: by an unprivileged process that is started for this one table; kept: from the"
            " cache, with the digest of the section under which it is there."
        ),
    ]
