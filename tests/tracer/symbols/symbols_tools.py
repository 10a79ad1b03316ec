"""What the symbol tests share: building sample programs, and what readelf says of a file."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from latrace.tracer.symbols.client import Worker

WORKLOADS = Path(__file__).parents[2] / "workloads"
SAMPLE = WORKLOADS / "symbols_sample.c"
LIBRARY = WORKLOADS / "symbols_library.c"

U64 = npt.NDArray[np.uint64]


def addresses(*values: int) -> U64:
    return np.array(values, dtype=np.uint64)


def need(tool: str) -> str:
    """The path of a program; the test is skipped where it is not installed."""
    found = shutil.which(tool)
    if found is None:
        pytest.skip(f"needs {tool}")
    return found


def build(source: Path, target: Path, *options: str, compiler: str = "gcc") -> Path:
    need(compiler)
    command = [compiler, "-O1", "-o", str(target), *options, str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return target


def build_id_of(file: Path) -> str | None:
    """The build id that readelf finds, in hex."""
    command = [need("readelf"), "-n", str(file)]
    notes = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"Build ID: ([0-9a-f]+)", notes)
    return None if found is None else found[1]


@contextmanager
def open_to_all() -> Iterator[Path]:
    """A folder that other users may enter: pytest's own directories are closed to others."""
    with tempfile.TemporaryDirectory(prefix="latrace-symbols-", dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


def build_library(folder: Path, *options: str) -> Path:
    return build(LIBRARY, folder / "libsample.so", "-shared", "-fPIC", *options)


@contextmanager
def running(
    *command: str | Path, user: int | None = None, wrapper: tuple[str, ...] = ()
) -> Iterator[tuple[int, dict[str, int]]]:
    """A sample program that runs: its process id and the addresses it printed."""
    with subprocess.Popen(
        [*wrapper, *map(str, command)],
        stdout=subprocess.PIPE,
        text=True,
        user=user,
        group=user,
        extra_groups=None if user is None else [],
    ) as process:
        try:
            printed: dict[str, int] = {}
            assert process.stdout is not None
            for line in process.stdout:
                name, value = line.split()
                if name == "value":
                    break
                printed[name] = int(value, 16)
            assert printed, "the sample program did not start"
            yield process.pid, printed
        finally:
            process.kill()


@contextmanager
def worker(**options: object) -> Iterator[Worker]:
    """A worker that is ended."""
    result = Worker(**options)  # type: ignore[arg-type]
    try:
        yield result
    finally:
        result.close()


class Functions:
    """The functions of an ELF file by readelf: the oracle, searched by brute force."""

    def __init__(self, *files: Path) -> None:
        found: dict[tuple[int, int], set[str]] = {}
        for file in files:
            out = subprocess.run(
                [need("readelf"), "-sW", str(file)], check=True, capture_output=True
            ).stdout.decode("utf-8", "backslashreplace")
            for line in out.splitlines():
                fields = line.split()
                if len(fields) < 8 or fields[3] not in ("FUNC", "IFUNC"):
                    continue
                if fields[6] in ("UND", "ABS", "COM"):
                    continue
                key = (int(fields[1], 16), int(fields[2], 0))
                found.setdefault(key, set()).add(fields[7].split("@")[0])
        self.starts = np.array([start for start, _ in found], dtype=np.uint64)
        self.sizes = np.array([size for _, size in found], dtype=np.uint64)
        self.names = list(found.values())
        self.unsized = set().union(*(names for (_, size), names in found.items() if not size))

    def __len__(self) -> int:
        return len(self.names)

    def at(self, addr: int) -> set[str]:
        """Every name of the innermost sized function that holds the address."""
        held = np.flatnonzero(
            (self.starts <= np.uint64(addr)) & (np.uint64(addr) < self.starts + self.sizes)
        )
        if not held.size:
            return set()
        innermost = self.starts[held].max()
        return set().union(*(self.names[i] for i in held if self.starts[i] == innermost))

    def start_of(self, name: str) -> int:
        return next(
            int(self.starts[index]) for index, names in enumerate(self.names) if name in names
        )


def libc() -> Path:
    """The C library this process uses."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split(maxsplit=5)[-1]
        if os.path.basename(path).startswith("libc.so"):  # noqa: PTH119 - a string, no path
            return Path(path)
    pytest.skip("no shared C library in this process")
