"""scripts/bench: its statistics and its words; with a kernel, one quick run of everything."""

from __future__ import annotations

import copy
import ctypes
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from latrace.tracer.records import WAIT

TREE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TREE / "scripts"))

from benchmarks import __main__ as command  # noqa: E402
from benchmarks import (  # noqa: E402
    children,
    drain,
    page,
    reader,
    slowdown,
    stacks,
    suite,
    times,
    tools,
    whole,
)
from benchmarks.context import Context  # noqa: E402
from benchmarks.errors import BenchError  # noqa: E402
from benchmarks.estimate import estimate, ratios  # noqa: E402

PIPE_OUTPUT = """# Running 'sched/pipe' benchmark:
# Executed 60000 pipe operations between two threads

     Total time: 0.331 [sec]

       5.523416 usecs/op
         181047 ops/sec
"""
MESSAGING_OUTPUT = """# Running 'sched/messaging' benchmark:
# 20 sender and receiver threads per group
# 4 groups == 160 threads run

     Total time: 0.560 [sec]
"""


def context(folder: Path, *, rounds: int = 3) -> Context:
    return Context(rounds=rounds, quick=True, folder=folder)


# --- statistics -------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(1, 13))
def test_the_interval_holds_the_median_as_often_as_it_says(n: int) -> None:
    # Each value is below or above the true median with the same chance: go through all cases.
    found = estimate([float(value) for value in range(1, n + 1)])
    k = int(found.low)
    assert (found.low, found.high) == (k, n + 1 - k)
    cases = [sum(case) for case in itertools.product((0, 1), repeat=n)]
    holding = sum(k <= below <= n - k for below in cases)
    assert found.coverage == pytest.approx(holding / len(cases))
    if n >= 6:
        assert found.coverage >= 0.95
        narrower = sum(k + 1 <= below <= n - k - 1 for below in cases)
        assert narrower / len(cases) < 0.95


def test_the_median_does_not_mind_order_or_outliers() -> None:
    values = [5.0, 1.0, 3.0, 1e9, 2.0, 4.0, 6.0]
    found = estimate(values)
    assert found.median == statistics.median(values) == 4.0
    assert (found.low, found.high, found.n) == (1.0, 1e9, 7)


def test_ratios_are_taken_round_by_round() -> None:
    # The machine got three times slower from round to round; the tracer costs 10 % in each.
    base = [1.0, 3.0, 9.0, 27.0, 81.0, 243.0]
    found = ratios([value * 1.1 for value in base], base)
    assert (found.low, found.median, found.high) == pytest.approx((1.1, 1.1, 1.1))


def test_rounds_are_interleaved(tmp_path: Path) -> None:
    ran: list[str] = []

    def note(name: str) -> int:
        ran.append(name)
        return len(ran)

    results = context(tmp_path).interleave({name: lambda n=name: note(n) for name in "ABC"})
    assert "".join(ran) == "ABCABCABC"
    assert results == {"A": [1, 4, 7], "B": [2, 5, 8], "C": [3, 6, 9]}
    for most, rounds in ((2, 2), (5, 3)):
        assert len(context(tmp_path).at_most(most).interleave({"A": lambda: 1})["A"]) == rounds


def test_a_contender_that_fails_is_left_out_aloud(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = iter([1, 2])

    def broken() -> int:
        try:
            return next(answers)
        except StopIteration:
            raise BenchError("no more") from None

    where = context(tmp_path)
    results = where.interleave({"good": lambda: 7, "broken": broken})
    assert results == {"good": [7, 7, 7]}
    assert where.skipped == {"broken": "no more"}
    assert "!!! left out: broken: no more" in capsys.readouterr().err


def test_a_stack_costs_what_runs_without_one_do_not() -> None:
    floor = {"ns": 50.0, "used_s": 0.5}
    found = {
        **{"asleep_runs": 10_100.0, "asleep": 100.0, "asleep_ns": 10_000 * 50.0 + 100 * 9_000},
        **{"cpu_runs": 300.0, "cpu": 200.0, "cpu_ns": 100 * 50.0 + 200 * 7_000},
        **{"used_s": 0.6, "stacks": 1000.0},
    }
    assert stacks._per_stack(found, floor) == pytest.approx(
        {"asleep_bpf_ns": 9_000, "cpu_bpf_ns": 7_000, "total_us": 100}
    )


def test_a_process_that_a_tracer_stopped_is_seen_to_stand_still() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    with subprocess.Popen(["sleep", "1000"]) as target:
        try:
            with subprocess.Popen(["sleep", "0.2"]) as other:
                assert stacks._stopped_s(target.pid, other.pid) == 0
            assert libc.ptrace(0x4206, target.pid, None, None) == 0  # PTRACE_SEIZE
            assert libc.ptrace(0x4207, target.pid, None, None) == 0  # PTRACE_INTERRUPT
            os.waitpid(target.pid, 0)
            with subprocess.Popen(["sleep", "0.2"]) as other:
                assert stacks._stopped_s(target.pid, other.pid) > 0.1
        finally:
            target.kill()


# --- children ---------------------------------------------------------------------------------


def test_the_time_that_perf_bench_prints() -> None:
    assert children.reported_s(PIPE_OUTPUT) == pytest.approx(0.33140496)
    assert children.reported_s(MESSAGING_OUTPUT) == 0.56
    with pytest.raises(BenchError, match="no time"):
        children.reported_s("Unable to open perf.data")


def test_a_held_load_keeps_its_id_and_waits_for_the_word(tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    script = f'echo $$ > {seen}; echo "Total time: 2.000 [sec]"'
    with children.held(children.Load(("/bin/sh", "-c", script), "sh", 4)) as load:
        assert not seen.exists()
        load.begin()
        cost = load.finish()
        assert int(seen.read_text()) == load.pid
    assert cost.wall_ns == 0.5e9


def test_a_load_that_fails_says_why() -> None:
    load = children.Load(("/bin/sh", "-c", "echo no such thing; exit 3"), "sh", 1)
    with children.held(load) as process:
        process.begin()
        with pytest.raises(BenchError, match="no such thing"):
            process.finish()


def test_a_held_load_does_not_outlive_its_block() -> None:
    with children.held(children.BYSTANDER) as process:
        assert Path(f"/proc/{process.pid}").exists()
    assert not Path(f"/proc/{process.pid}").exists()


def test_a_tool_that_ends_at_once_says_its_last_words(tmp_path: Path) -> None:
    argv = ["/bin/sh", "-c", "echo cannot attach >&2; exit 1"]
    with (
        pytest.raises(BenchError, match="cannot attach"),
        children.tool(argv, ready_text="never", folder=tmp_path),
    ):
        pytest.fail("it is not ready")


def test_a_tool_is_interrupted_and_waited_for(tmp_path: Path) -> None:
    script = "trap 'echo done > ended; exit 0' INT; echo ready; while :; do sleep 0.05; done"
    with children.tool(["/bin/sh", "-c", script], ready_text="ready", folder=tmp_path) as running:
        assert running.process.poll() is None
    assert (tmp_path / "ended").read_text() == "done\n"


def test_peers_that_are_missing_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "_find", lambda _program: None)
    missing = {peer.name: peer.missing for peer in tools.peers()}
    assert missing["runqlat -p"] == "not installed (Debian: libbpf-tools)"
    assert missing["bpftrace runqlat"] == "not installed (Debian: bpftrace)"
    assert all(missing.values())


def test_a_record_for_ctypes_is_the_record() -> None:
    assert drain.WaitRecord._fields_
    for name, *_ in drain.WaitRecord._fields_:
        field = getattr(drain.WaitRecord, name)
        assert WAIT.fields
        assert (field.offset, field.size) == (WAIT.fields[name][1], WAIT[name].itemsize)
    assert ctypes.sizeof(drain.WaitRecord) <= WAIT.itemsize


# --- words ------------------------------------------------------------------------------------


def flat(value: float) -> dict[str, Any]:
    return estimate([value] * 10).as_dict()


def slower(ratio: float, *, spread: float = 0.01) -> dict[str, Any]:
    values = [ratio + spread * (place - 4.5) / 4.5 for place in range(10)]
    both = {"wall_ratio": estimate(values).as_dict(), "cpu_ratio": estimate(values).as_dict()}
    times = {"wall_ns": flat(ratio * 5000), "cpu_ns": flat(ratio * 5000)}
    return both | times | {"values": [[ratio * 5000, ratio * 5000]] * 10}


def drained(name: str, cpu_ns: float, *, per_s: int | None, ring: int, lost: float = 0) -> Any:
    return {
        "reader": name,
        "ring_bytes": ring,
        "asked_per_s": per_s,
        "per_s": flat(per_s or 5e6),
        "cpu_ns": flat(cpu_ns),
        "lost_share": flat(lost),
        "lost_runs": 10 if lost else 0,
        "runs": 10,
        "values": [cpu_ns] * 10,
    }


def looked(**figures: float) -> dict[str, Any]:
    """What one tool took for the stacks of a program."""
    usual = {"per_s": 400, "total_us": 700, "naming_us": 90, "bytes": 1e3, "memory": 2e8, "lost": 0}
    return {name: flat(value) for name, value in (usual | figures).items()}


def document() -> dict[str, Any]:
    """Results as a good machine would give them, all promises kept."""
    contenders = {
        slowdown.BASELINE: slower(1, spread=0),
        slowdown.AGAIN: slower(1.002),
        tools.DEFAULT.name: slower(1.10),
        tools.ALL_ROWS.name: slower(1.17),
        tools.NEIGHBOUR.name: slower(1.005),
        "bpftrace runqlat, by name": slower(12.3456),
    }
    ring = reader.ALL_ROWS_RING_BYTES
    return {
        "schema": 1,
        "date": "2026-01-01 00:00 UTC",
        "machine": {"processor": "2 x Some Processor" + " with a long name" * 5},
        "load_average": [0.1, 2.0],
        "rounds": 10,
        "quick": False,
        "skipped": {"runqlat-bpfcc -p": "needs kernel headers, " + "of which there are none " * 5},
        "results": {
            "programs": {
                "load": "taskset -c 1 perf bench sched pipe -T -l 200000",
                "call_ns": flat(20.0),
                "programs": {
                    "empty": {"switch": flat(25.0)},
                    tools.ALL_ROWS.name: {"waking": flat(80), "switch": flat(100)},
                    tools.NEIGHBOUR.name: {"waking": flat(30), "switch": flat(31)},
                },
            },
            "pipe": {"load": "pipe", "contenders": contenders},
            "messaging": {"load": "messaging", "contenders": dict(contenders)},
            "stream": {"load": "flow.py stream", "contenders": dict(contenders)},
            "requests": {"load": "flow.py requests", "contenders": dict(contenders)},
            "reader": {
                "ring_bytes": ring,
                "runs": [
                    drained(name, ns, per_s=reader.GOAL_RATE, ring=ring)
                    for name, ns in (
                        ("decode", 50),
                        ("capture", 400),
                        ("callback", 700),
                        ("decoded", 1500),
                    )
                ],
            },
            "loss": {
                "runs": [
                    drained("capture", 400, per_s=reader.LOSS_RATE, ring=ring),
                    drained("capture", 400, per_s=reader.LOSS_RATE, ring=1 << 20, lost=0.08),
                    drained("capture", 400, per_s=None, ring=ring, lost=0.5),
                ]
            },
            "stacks": {
                "seconds": 8.0,
                "samples_hz": 199,
                "programs": {
                    "python3": {
                        stacks.WITH: looked(asleep_bpf_ns=4e3, cpu_bpf_ns=9e3, copy_pages=4),
                        stacks.WITHOUT: looked(asleep_bpf_ns=2e3, cpu_bpf_ns=7e3, copy_pages=4),
                        "perf, sched_switch": looked(lost=12),
                        "py-spy --native": {
                            name: flat(value)
                            for name, value in {
                                "wall_ms": 76.5,
                                "stopped_ms": 54.3,
                                "total_us": 2e3,
                                "stacks": 4,
                            }.items()
                        },
                    }
                },
            },
            "tables": {
                "modules": {
                    "libc": {
                        "rows": flat(28_522),
                        "rules": flat(397),
                        "section_bytes": flat(2e5),
                        "bytes": flat(2.3e5),
                        "cold_s": flat(0.3),
                        "cached_s": flat(0.002),
                    }
                }
            },
            "whole": {
                "seconds": 10,
                "samples_hz": 199,
                "programs": {
                    name: {
                        "asleep": {"stacks": 900, "whole": flat(0.99), "ends": []},
                        "cpu": {
                            "stacks": 800,
                            "whole": flat(0.975),
                            "ends": [(20, "libfoo.so.1", "no unwind table")],
                        },
                    }
                    for name in whole.PROGRAMS
                },
            },
            "times": {
                "load": "pipe",
                "waits": 1_000_000,
                "phases": {
                    "start": {
                        "attached_s": flat(0.4),
                        "first_event_s": flat(0.41),
                        "ended_s": flat(0.2),
                        "rss_bytes": flat(2e8),
                    },
                    "end": {
                        "summary_s": flat(0.6),
                        "rows": flat(1_100_000),
                        "lost": flat(0),
                        "rss_bytes": flat(3e8),
                    },
                },
            },
        },
    }


def change(path: str, value: object) -> dict[str, Any]:
    """Return the good document with one thing changed; `path` is dotted, with list indices."""
    changed = copy.deepcopy(document())
    *way, last = path.split("/")
    at: Any = changed["results"]
    for step in way:
        at = at[int(step)] if isinstance(at, list) else at[step]
    at[last] = value
    return changed


def missed(found: dict[str, Any]) -> list[str]:
    return [goal.what for goal in page.collect_goals(found["results"]) if not goal.kept]


def test_a_good_machine_keeps_all_promises() -> None:
    goals = page.collect_goals(document()["results"])
    assert missed(document()) == []
    assert len(goals) >= 11


@pytest.mark.parametrize(
    ("path", "value", "goal"),
    [
        (f"programs/programs/{tools.NEIGHBOUR.name}/switch", flat(41), "not a target"),
        (f"programs/programs/{tools.ALL_ROWS.name}/waking", flat(91), "target, waking"),
        (f"programs/programs/{tools.ALL_ROWS.name}/switch", flat(111), "target, switch"),
        (f"pipe/contenders/{tools.DEFAULT.name}", slower(1.121), "pipe: default"),
        (f"pipe/contenders/{tools.NEIGHBOUR.name}", slower(1.03), "pipe: untraced"),
        (f"messaging/contenders/{tools.NEIGHBOUR.name}", slower(1.03), "messaging: untraced"),
        ("reader/runs/0/values", [150] * 10, "decode: less CPU than bcc's callback"),
        ("loss/runs/0/lost_runs", 1, "1 M/s, ring of --min 0"),
        ("whole/programs/nginx/asleep/whole", flat(0.979), "nginx: whole asleep"),
        ("whole/programs/Go service/cpu/whole", flat(0.969), "Go service: whole on the CPU"),
        ("times/phases/start/first_event_s", flat(0.51), "command to first event"),
        ("times/phases/end/summary_s", flat(1.01), "summary after 1,000,000 waits"),
    ],
)
def test_a_promise_that_is_missed_is_told(path: str, value: object, goal: str) -> None:
    (what,) = missed(change(path, value))
    assert what.startswith(goal)
    assert "MISSED" in page.text(change(path, value))


def test_an_untraced_neighbour_may_be_as_slow_as_the_noise_is_wide() -> None:
    noisy = change(f"pipe/contenders/{slowdown.AGAIN}", slower(0.98, spread=0.03))
    noisy["results"]["pipe"]["contenders"][tools.NEIGHBOUR.name] = slower(1.04)
    assert missed(noisy) == []
    noisy["results"]["pipe"]["contenders"][tools.NEIGHBOUR.name] = slower(1.07)
    assert len(missed(noisy)) == 1


def test_the_text_fits_a_terminal_and_says_everything() -> None:
    text = page.text(document())
    assert max(map(len, text.splitlines())) <= 80
    assert "Some Processor" in text
    for told in ("+10.0 %", "50.0% (10/10)", "needs kernel headers", "interleaved", "binomial"):
        assert told in text
    for told in ("7,000", "54 ms of which", "20 in libfoo.so.1: no unwind table"):
        assert told in re.sub(r"\s+", " ", text)
    for benchmark in suite.BENCHMARKS.values():
        assert benchmark.title in text


def test_a_quick_run_and_a_busy_machine_are_said_first() -> None:
    doubtful = document() | {"quick": True, "load_average": [3.0, 3.0]}
    first = page.text(doubtful).split("\n\n")[0]
    assert first.startswith("!!! Quick run")
    assert "busy" in first
    assert "**Quick run" in page.markdown(doubtful)
    assert "!!!" not in page.text(document())
    pushed = change(f"pipe/contenders/{slowdown.BASELINE}/values", [[6000, 5000], [4000, 4000]])
    assert page.text(pushed).startswith("!!! Other processes had 10% of the pinned pipe's CPU")


def test_few_rounds_do_not_claim_95_percent() -> None:
    few = change("programs/call_ns", flat(1))
    base = few["results"]["pipe"]["contenders"][slowdown.BASELINE]
    base["wall_ns"] = estimate([1.0, 2.0]).as_dict()
    rendered = slowdown.render(few["results"]["pipe"])
    assert "least - greatest" in "\n".join(rendered)
    assert "95 %" not in "\n".join(rendered)


# --- the command ------------------------------------------------------------------------------


def test_an_unknown_benchmark_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["--only", "pipe,nonsense"])
    assert ended.value.code == 2
    assert "nonsense" in capsys.readouterr().err


def test_without_root_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command.os, "geteuid", lambda: 1000)
    assert command.main(["--quick"]) == 1
    assert "sudo scripts/bench" in capsys.readouterr().err


def test_figures_can_be_shown_again_and_made_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "bench.json"
    kept.write_text(json.dumps(document()))
    assert command.main(["--show", str(kept), "--page", str(tmp_path / "page.md")]) == 0
    assert capsys.readouterr().out == page.text(document())
    assert (tmp_path / "page.md").read_text() == page.markdown(document())


@pytest.mark.kernel
def test_a_ring_that_is_too_small_loses_and_counts(tmp_path: Path) -> None:
    found = reader._drain(context(tmp_path), "capture", 4096, 0)
    assert found["lost"] > 0
    assert found["read"] + found["lost"] == found["made"]


@pytest.mark.kernel
def test_a_quick_run_measures_everything(tmp_path: Path) -> None:
    kept = tmp_path / "bench.json"
    done = subprocess.run(
        [TREE / "scripts" / "bench", "--quick", "--json", kept, "--page", tmp_path / "page.md"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(kept.read_text())
    assert list(found["results"]) == list(suite.BENCHMARKS)
    assert done.stdout == page.text(found)
    ours = {tools.DEFAULT.name, tools.ALL_ROWS.name, tools.NEIGHBOUR.name}
    # A peer may be missing on this machine; nothing of our own may.
    assert not ours & found["skipped"].keys()
    for name in ("pipe", "messaging"):
        assert ours < found["results"][name]["contenders"].keys()
    timed = found["results"]["programs"]["programs"]
    assert {"waking", "wakeup", "switch"} <= timed[tools.DEFAULT.name].keys()
    rows = {
        name: [quality["rows"] for quality in run["quality"]]
        for name, run in found["results"]["pipe"]["contenders"].items()
    }
    # One operation has at least one wait; the neighbour sleeps and has at most a few.
    assert min(rows[tools.ALL_ROWS.name]) >= slowdown.QUICK_PIPE_LOOPS
    assert max(rows[tools.NEIGHBOUR.name]) < 100
    assert found["results"]["times"]["phases"]["end"]["rows"]["median"] >= times.QUICK_WAITS
