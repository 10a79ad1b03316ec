"""A spike in words: the answer first, no line too wide, and names that stay names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sample_capture import START_NS
from spike_samples import MS, Rows, S, document, hog, neighbour, trigger, write_bundle

from latrace.analysis.capture import open_capture
from latrace.analysis.spike_file import Trigger
from latrace.analysis.spike_text import (
    cause_words,
    clock,
    compared,
    fired,
    headline,
    quantity,
    render_spike,
)
from latrace.analysis.spikes import Spike, analyse, read_spike
from latrace.analysis.words import cells

HOSTILE = "\x1b[2J\u202e\ufb01\n'\"<b>" + "x" * 300


def told(path: Path, rows: Rows, *triggers: dict[str, Any], **more: Any) -> tuple[Any, Spike]:
    write_bundle(path, rows, document(*triggers, **more))
    spike = read_spike(path)
    assert spike is not None
    return analyse(open_capture(path), spike), spike


def hostile(rows: Rows) -> Rows:
    for slice_ in rows.slices:
        slice_["comm"] = HOSTILE
    return rows


def test_the_answer_comes_first(tmp_path: Path) -> None:
    analysis, spike = told(tmp_path / "b", neighbour(), trigger(baseline=1_200_000))
    first, second, third = analysis["sentences"]
    assert first == (
        "The P99 of waits for a CPU rose to 12.0 ms (limit 10.0 ms, usual 1.20 ms) at "
        "11:32:04 UTC for 300 ms."
    )
    assert second == (
        "The 25 waits over 10.0 ms took 300 ms: for all of it batch-indexer (pid 998) had the "
        "CPU, mostly in compress_block."
    )
    assert third.startswith("In the 8.00 s before it the P99 of waits was 20.0 us")
    assert headline(analysis) == f"{first} 100 % other processes: batch-indexer (pid 998)."
    text = render_spike(analysis, spike)
    assert text.startswith("Spike spike-20261121-113205: --p99 10ms\n")
    assert text.endswith("\n")


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize("kind", ["wait", "sleep", "max", "retransmits", "metric", "manual"])
def test_hostile_names_are_harmless_and_no_line_is_too_wide(
    tmp_path: Path, kind: str, width: int
) -> None:
    rows = hostile(neighbour())
    for row in rows.waits[::3]:
        row["syscall"] = HOSTILE
    rows.sleep(8 * S, 20 * MS, call=HOSTILE)
    rule = trigger(kind=kind, rule=HOSTILE, reason=HOSTILE, unit="s" if kind == "metric" else "ns")
    host = {"top_cpu": [{"pid": 5, "comm": HOSTILE, "cpu_percent": 50}],
            "throttled": [{"cgroup": HOSTILE, "throttled_ns": 5}]}  # fmt: skip
    analysis, spike = told(
        tmp_path / "b", rows, rule, rule, notes=[HOSTILE], name=HOSTILE, host=host
    )
    text = render_spike(analysis, spike, width=width)
    lines = text.splitlines()
    assert all(cells(line) <= width for line in lines)
    for said in (*lines, headline(analysis), cause_words(analysis), *analysis["sentences"]):
        assert said.isprintable()
        assert "\u202e" not in said
    assert render_spike(analysis, spike, width=width, colour=True).count("\x1b[0m") > 2


def test_what_goes_on_is_told(tmp_path: Path) -> None:
    rows = Rows()
    rows.steady(0, 8 * S)
    hog(rows, 8 * S, 15 * S)
    analysis, _ = told(tmp_path / "b", rows)
    assert "was not over when the recording ended" in analysis["sentences"][0]


def test_no_baseline_is_told(tmp_path: Path) -> None:
    rows = Rows()
    hog(rows, 0, 9 * S)
    analysis, spike = told(tmp_path / "b", rows)
    assert "There is nothing to compare with" in " ".join(analysis["sentences"])
    assert "time before it" not in render_spike(analysis, spike)
    assert {then for _, _, then in compared(analysis["parts"]["spike"], None)} == {"-"}


def test_other_bursts_and_triggers_are_told(tmp_path: Path) -> None:
    rows = Rows()
    rows.steady(0, 15 * S)
    hog(rows, 5 * S, 5 * S + 96 * MS)
    hog(rows, 8 * S, 8 * S + 480 * MS)
    other = trigger(rule="--retransmits 3", kind="retransmits", value=7, threshold=3,
                    unit="segments")  # fmt: skip
    analysis, _ = told(tmp_path / "b", rows, trigger(), other, complete=False)
    text = " ".join(analysis["sentences"])
    assert "2 bursts over the limit; this is of the one that made it fire" in text
    assert "Fired as well: --retransmits 3: 7 segments (limit 3 segments)." in text
    assert "was cut off" in text


def test_what_is_compared(tmp_path: Path) -> None:
    analysis, _ = told(tmp_path / "b", neighbour())
    parts = analysis["parts"]
    rows = {name: (now, then) for name, now, then in compared(parts["spike"], parts["baseline"])}
    assert rows["P99"] == ("12.0 ms", "20.0 us")
    assert rows["waits per second"] == ("83", "1,000")
    assert rows["  other processes had it"] == ("1.00 s", "0 ns")


@pytest.mark.parametrize(
    ("value", "unit", "said"),
    [
        (23_400_000, "ns", "23.4 ms"),
        (0.18, "s", "180 ms"),
        (12, "segments", "12 segments"),
        (1234.5, "", "1,234"),
        (3, "\x1b[m", "3 \\x1b[m"),
    ],
)
def test_quantities(value: float, unit: str, said: str) -> None:
    assert quantity(value, unit) == said


def test_a_rule_without_values() -> None:
    rule = Trigger(rule="SIGUSR2", kind="manual", value=None, threshold=None, unit="", count=0,
                   baseline=None, since_ns=START_NS, until_ns=START_NS, reason="")  # fmt: skip
    assert fired(rule, None) == ""


def test_a_time_that_cannot_be() -> None:
    assert clock(0) == "00:00:00 UTC"
    assert clock(2**63) == clock(2**63)
    assert clock(10**30) == "an unknown time"
