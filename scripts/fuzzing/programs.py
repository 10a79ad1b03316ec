"""Real programs and libraries whose damaged copies are parsed, and small ones made for it."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

import numpy as np

from latrace.tracer.symbols.elf import BytesSource, read_headers

from .damage import FILES, Span
from .target import Missing

TREE: Final = Path(__file__).resolve().parents[2]
_WORKLOADS: Final = TREE / "tests/workloads"
_LIBRARIES: Final = Path("/usr/lib/x86_64-linux-gnu")
_MOST_CODE: Final = 256
"""Bytes at the beginning of a part that is code or data, and as good as any other there."""
_TOLD: Final = (".eh_frame", ".debug_frame", ".gopclntab", ".plt", ".gnu_debug", ".got", ".note")


def _run(*command: str | Path) -> bool:
    try:
        done = subprocess.run([*map(str, command)], capture_output=True, check=False)
    except OSError:
        return False
    return done.returncode == 0


@functools.cache
def small() -> tuple[str, ...]:
    """The names of little programs of ours, of each kind that this machine can build."""
    with tempfile.TemporaryDirectory(prefix="latrace-fuzz-") as folder:
        made = {f"small:{path.name}": path.read_bytes() for path in _build(Path(folder))}
    for name, content in made.items():
        FILES[name] = content
    return tuple(made)


def _build(base: Path) -> list[Path]:
    library = base / "libsample.so"
    made = []
    if _run("gcc", "-O1", "-shared", "-fPIC", "-o", library, _WORKLOADS / "symbols_library.c"):
        made.append(library)
        stripped, packed = base / "stripped.so", base / "minidebug.so"
        if _run("strip", "-o", stripped, library):
            made.append(stripped)
        symbols = base / "symbols"
        if (
            shutil.which("xz")
            and _run("objcopy", "-S", "--keep-symbol=in_library", library, symbols)
            and _run("xz", "-kf", symbols)
        ):
            option = f"--add-section=.gnu_debugdata={symbols}.xz"
            if _run("objcopy", "-S", option, library, packed):
                made.append(packed)
        linked = base / "linked.so"
        if _run("objcopy", f"--add-gnu-debuglink={library}", stripped, linked):
            made.append(linked)
    sample = base / "sample"
    if _run("gcc", "-O1", "-o", sample, _WORKLOADS / "symbols_sample.c"):
        made.append(sample)
    frame = base / "debug_frame"
    options = ("-g", "-fno-asynchronous-unwind-tables", "-nostdlib", "-static", "-gz=zlib")
    source = base / "main.c"
    source.write_text("int main(void) { return 0; }\n")
    if _run("gcc", *options, "-Wl,-e,main", "-o", frame, source):
        made.append(frame)
    return made


def _found(name: str) -> Path | None:
    program = shutil.which(name, path="/usr/sbin:/usr/bin:/usr/local/bin")
    candidates = [Path(program).resolve()] if program else []
    candidates += [Path(name), _LIBRARIES / name, *Path("/usr/lib").glob(f"*/*/bin/{name}")]
    return next((path for path in candidates if path.is_file() and _is_elf(path)), None)


def _is_elf(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(4) == b"\x7fELF"


@functools.cache
def real(*names: str) -> tuple[str, ...]:
    """Those of these programs and libraries that are here."""
    return tuple(str(path) for path in map(_found, names) if path is not None)


@functools.cache
def go() -> tuple[str, ...]:
    """Programs written in Go, the smallest first."""
    tools = [Path(path) for path in Path("/usr/lib").glob("go*/pkg/tool/*/*")]
    found = sorted((path.stat().st_size, str(path)) for path in tools if os.access(path, os.X_OK))
    if not found:
        raise Missing("no program written in Go (golang-go)")
    return tuple(path for _, path in found[:3])


@functools.cache
def spans(path: str) -> tuple[Span, ...]:
    """Where a file says what is where: headers, and the parts that are parsed."""
    source = BytesSource(FILES[path])
    headers = read_headers(source)
    phoff, shoff = (int.from_bytes(FILES[path][at : at + 8], "little") for at in (32, 40))
    sections = headers.sections
    tables = (
        (0, 64),
        (phoff, headers.segments.nbytes),
        (shoff, sections.nbytes),
        (shoff, sections.nbytes),
    )
    found = [(at, length) for at, length in tables if length]
    for section, name in zip(sections, headers.names, strict=True):
        offset, size, kind = (int(section[field]) for field in ("offset", "size", "type"))
        if not size or kind == 8:
            continue
        told = name.decode("ascii", "replace").startswith(_TOLD)
        found.append((offset, size if told or kind != 1 else min(size, _MOST_CODE)))
    return tuple(found)


def addresses(*values: int) -> np.ndarray:
    """As an array of unsigned numbers."""
    return np.array(values, dtype=np.uint64)
