"""The machine that figures belong to, in words that another can compare with his own."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

_TREE = Path(__file__).resolve().parents[2]
# Mitigations that make calls, returns or system calls slower.
_COSTLY = ("spectre_v2", "spec_rstack_overflow", "retbleed", "meltdown")
_PACKAGES = ("linux-perf", "python3-bpfcc", "libbpf-tools", "bpftrace")


def describe() -> dict[str, str]:
    """Name and value, in the order to be read."""
    cpuinfo = _read("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    flags = re.search(r"^flags\s*:.*$", cpuinfo, re.MULTILINE)
    virtual = " (in a virtual machine)" if flags and " hypervisor" in flags[0] else ""
    return {
        "processor": f"{os.cpu_count()} x {model[1] if model else platform.machine()}{virtual}",
        "memory": _memory(),
        "kernel": f"{platform.release()} {platform.machine()}",
        "clock": _read("/sys/devices/system/clocksource/clocksource0/current_clocksource").strip(),
        "mitigations": _mitigations(),
        "system": _system(),
        "tools": ", ".join(_versions()),
        "python": ", ".join(
            [
                f"Python {platform.python_version()}",
                *(f"{name} {metadata.version(name)}" for name in ("numpy", "pyarrow")),
            ]
        ),
        "latrace": f"{metadata.version('latrace')}, {_commit()}",
    }


def load_average() -> float:
    """Of the last minute."""
    return os.getloadavg()[0]


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _memory() -> str:
    total = re.search(r"MemTotal:\s+(\d+) kB", _read("/proc/meminfo"))
    return f"{int(total[1]) / (1 << 20):.1f} GiB" if total else "?"


def _system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except OSError:
        return "?"


def _mitigations() -> str:
    """Those that the figures depend on, in short."""
    folder = Path("/sys/devices/system/cpu/vulnerabilities")
    found = {name: _read(str(folder / name)).strip() for name in _COSTLY}
    return "; ".join(
        f"{name}: {state.split(';')[0].removeprefix('Mitigation: ')}"
        for name, state in found.items()
        if state and state != "Not affected"
    )


def _versions() -> list[str]:
    if shutil.which("dpkg-query") is None:
        return ["?"]
    found = []
    for package in _PACKAGES:
        done = subprocess.run(
            ["dpkg-query", "--show", "--showformat", "${Version}", package],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == 0 and done.stdout:
            found.append(f"{package} {done.stdout}")
    return found


def _commit() -> str:
    git = ["git", "-c", f"safe.directory={_TREE}", "-C", str(_TREE)]
    commit = subprocess.run(
        [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    changes = subprocess.run(
        [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False
    )
    if commit.returncode:
        return "no commit known"
    return f"commit {commit.stdout.strip()}{' with changes' if changes.stdout.strip() else ''}"
