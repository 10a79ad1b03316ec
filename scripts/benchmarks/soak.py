"""A watch beside a steady load: what it costs by the rate of waits, how soon it fires, its growth.

The load is tests/workloads/steady.c on the last CPU. Cost is of one CPU: the reader's CPU time and
that of its children from /proc, the probes' run time from the capture's manifest.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import latrace

LOADS = {
    0: (1, 10_000_000, 1),
    1_000: (4, 3_900, 10),
    10_000: (16, 1_500, 5),
    100_000: (32, 200, 1),
}
"""Waits a second, about → threads, their period and their work in us."""

_SAID = "said.txt"
_TREE = Path(__file__).resolve().parents[2]
_SETTLE_S = 12.0
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _load(program: Path, rate: int) -> Iterator[int]:
    """A load of so many waits a second; yields its pid."""
    words = [program, (os.cpu_count() or 1) - 1, *LOADS[rate]]
    process = subprocess.Popen(
        [str(word) for word in words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    if process.stdout is None or process.stdout.readline() != "ready\n":
        raise RuntimeError("the load does not start")
    try:
        yield process.pid
    finally:
        process.kill()
        process.communicate()


@dataclass(slots=True)
class _Watch:
    process: subprocess.Popen[bytes]
    folder: Path

    def said(self) -> list[str]:
        """Its lines for people."""
        return (self.folder / _SAID).read_text().splitlines()

    def fire(self) -> None:
        """Ask for a bundle and wait until it is on disk."""
        before = len(self.bundles())
        self.process.send_signal(signal.SIGUSR2)
        deadline = time.monotonic() + 60
        while len(self.bundles()) == before:
            if time.monotonic() > deadline:
                raise RuntimeError("no bundle came")
            time.sleep(0.1)

    def bundles(self) -> list[Path]:
        """Those that are whole."""
        return sorted(path.parent for path in self.folder.glob("spike-*/spike.json"))

    def cpu_s(self) -> float:
        """CPU time of the watch and of the children that it has all the time."""
        return _cpu_s(self.process.pid) + sum(_cpu_s(pid) for pid in _children(self.process.pid))

    def sizes(self) -> dict[str, int]:
        """What could grow."""
        proc = Path(f"/proc/{self.process.pid}")
        status = dict(
            line.split(":", 1) for line in (proc / "status").read_text().splitlines() if ":" in line
        )
        return {
            "rss_kb": int(status["VmRSS"].split()[0]),
            "threads": int(status["Threads"]),
            "files": len(list((proc / "fd").iterdir())),
            "children": len(_children(self.process.pid)),
            "bpf": _bpf_objects(),
            "bundles": len(list(self.folder.glob("spike-*"))),
        }


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _cpu_s(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def _bpf_objects() -> int:
    """Programs, maps and links of the host."""
    return sum(
        len(json.loads(subprocess.check_output(["bpftool", "-j", kind, "list"]) or "[]"))
        for kind in ("prog", "map", "link")
    )


@contextlib.contextmanager
def _watch(pid: int, *arguments: str) -> Iterator[_Watch]:
    with (
        tempfile.TemporaryDirectory(prefix="latrace-soak-") as folder,
        Path(folder, _SAID).open("wb") as said,
    ):
        process = subprocess.Popen(
            [sys.executable, "-m", "latrace", "watch", "--pid", str(pid), "-o", folder, *arguments],
            stdout=subprocess.DEVNULL,
            stderr=said,
        )
        try:
            time.sleep(_SETTLE_S)
            yield _Watch(process, Path(folder))
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(180)


def _cost(program: Path, rate: int, budget: str, seconds: float) -> str:
    """A line of the table: what it costs beside a load."""
    with (
        _load(program, rate) as pid,
        _watch(pid, "--max", "1h", "--after", "1s", "--budget", budget) as watch,
    ):
        began_s, spent_s = time.monotonic(), watch.cpu_s()
        time.sleep(seconds)
        reader = 100 * (watch.cpu_s() - spent_s) / (time.monotonic() - began_s)
        rss = watch.sizes()["rss_kb"] / 1024
        watch.fire()
        (path,) = watch.bundles()
        manifest = latrace.open(path).manifest
        size = sum(file.stat().st_size for file in path.iterdir()) / 1e6
    lasted_s = (manifest["end_ns"] - manifest["start_ns"]) / 1e9
    quality = manifest["quality"]
    probes = manifest["overhead"]["bpf_ns"] / lasted_s / 1e7
    return (
        f"{quality['waits'] / lasted_s:>10,.0f} {budget:>7} {reader:>8.2f} {probes:>8.2f}"
        f" {100 * quality['rows'] / max(1, quality['waits']):>7.1f} {rss:>7.0f} {size:>8.1f}"
    )


def _latency(program: Path, times: int) -> str:
    """How long after its first slow wait a spike fires: `--max`, and `--p99` over 5 s."""
    told = []
    hog = "import time\nend = time.monotonic() + 1\nwhile time.monotonic() < end:\n" + (
        " busy = time.monotonic() + 0.03\n while time.monotonic() < busy: pass\n time.sleep(0.003)"
    )
    cpu = str((os.cpu_count() or 1) - 1)
    for rule, limit_ns in (("--max", 20_000_000), ("--p99", 20_000_000)):
        after_ms, began_ns = [], []
        with (
            _load(program, 1_000) as pid,
            _watch(pid, rule, "20ms", "--after", "2s", "--cooldown", "6s") as watch,
        ):
            for number in range(times):
                began_ns.append(time.monotonic_ns())
                subprocess.run(
                    ["taskset", "-c", cpu, "chrt", "-f", "10", sys.executable, "-Sc", hog],
                    check=True,
                )
                deadline = time.monotonic() + 20
                while len(watch.bundles()) <= number and time.monotonic() < deadline:
                    time.sleep(0.1)
                time.sleep(6)
            for path in watch.bundles():
                waits = latrace.open(path).waits
                fired_ns = json.loads((path / "spike.json").read_text())["fired_ns"]
                hog_ns = max((ns for ns in began_ns if ns < fired_ns), default=fired_ns)
                slow = waits["run_ns"].to_numpy()[waits["wait_ns"].to_numpy() > limit_ns]
                # Those of the spike before may be in it, too.
                slow = slow[(slow > hog_ns) & (slow <= fired_ns)]
                if len(slow):
                    after_ms.append((fired_ns - int(slow.min())) / 1e6)
        low, middle, high = np.percentile(after_ms, [0, 50, 100])
        told.append(
            f"{rule} 20ms: {len(after_ms)} of {times} spikes; fired {middle:.0f} ms"
            f" [{low:.0f}..{high:.0f}] after the first slow wait was over"
        )
    return "\n".join(told)


def _soak(program: Path, minutes: float) -> tuple[str, bool]:
    """Fire again and again for so long; tells the sizes, and whether any of them grew."""
    looks: list[dict[str, int]] = []
    bpf = _bpf_objects()
    with (
        _load(program, 1_000) as pid,
        _watch(
            pid,
            "--p99-ratio",
            "3",
            "--before",
            "4s",
            "--after",
            "1s",
            "--cooldown",
            "0",
            "--keep",
            "3",
        ) as watch,  # fmt: skip
    ):
        end = time.monotonic() + 60 * minutes
        count = 0
        while time.monotonic() < end:
            watch.process.send_signal(signal.SIGUSR2)
            time.sleep(10)
            count += 1
            looks.append(watch.sizes())
            _say(f"  {count} bundles: {looks[-1]}")
        fired = [line for line in watch.said() if " fired: " in line]
        by_itself = [line for line in fired if " by hand" not in line]
    third = max(1, len(looks) // 3)
    first, last = (
        {name: max(look[name] for look in part) for name in looks[0]}
        for part in (looks[third : 2 * third] or looks, looks[-third:])
    )
    grew = [name for name in first if last[name] > first[name] * 1.05 + 2]
    lines = [
        f"{count} bundles by hand in {minutes:g} minutes; at most, in the 2nd third and the last:"
    ]
    lines += [f"  {name:<9} {first[name]:>9,} {last[name]:>9,}" for name in first]
    lines.append(f"  fired by itself, by --p99-ratio 3: {len(by_itself)}")
    lines += by_itself
    left = _bpf_objects() - bpf
    lines.append(f"  left in the kernel afterwards: {left}")
    lines.append(f"  grew: {', '.join(grew) or 'nothing'}")
    return "\n".join(lines), bool(grew) or left > 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 if something grew."""
    parser = argparse.ArgumentParser(
        prog="scripts/soak",
        description="Measure `latrace watch` beside a steady load. Needs root and an idle machine.",
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="of the soak (default: 10)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each cost (default: 20)")
    parser.add_argument("--spikes", type=int, default=10, help="for the latency (default: 10)")
    parser.add_argument(
        "--only", choices=("cost", "latency", "soak"), help="one part (default: all)"
    )
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="latrace-soak-") as folder:
        program = Path(folder, "steady")
        source = _TREE / "tests/workloads/steady.c"
        subprocess.run(["gcc", "-O2", "-pthread", "-o", program, source], check=True)
        failed = False
        if chosen.only in (None, "cost"):
            print(f"{'waits/s':>10} {'budget':>7} {'reader %':>8} {'probes %':>8}", end="")
            print(f" {'rows %':>7} {'RSS MB':>7} {'MB':>8}")
            for rate in LOADS:
                for budget in ("2%", "100%"):
                    print(_cost(program, rate, budget, chosen.seconds), flush=True)
        if chosen.only in (None, "latency"):
            print(_latency(program, chosen.spikes), flush=True)
        if chosen.only in (None, "soak"):
            text, failed = _soak(program, chosen.minutes)
            print(text)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
