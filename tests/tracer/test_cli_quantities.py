"""Durations and sizes as the command line takes them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latrace.tracer.commands.quantities import (
    parse_duration,
    parse_ring_size,
    parse_run_time,
    show_seconds,
)
from latrace.tracer.errors import UsageError


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        ("50us", 50_000),
        ("50µs", 50_000),
        ("1.5ms", 1_500_000),
        ("7ns", 7),
        ("30s", 30_000_000_000),
        ("2 m", 120_000_000_000),
        ("1h", 3_600_000_000_000),
        ("0", 0),
        ("0.1us", 100),
    ],
)
def test_durations(text: str, nanoseconds: int) -> None:
    assert parse_duration(text, option="--min") == nanoseconds


@given(st.integers(0, 10**12), st.sampled_from(["ns", "us", "ms", "s"]))
def test_durations_are_exact(number: int, unit: str) -> None:
    factor = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9}[unit]
    assert parse_duration(f"{number}{unit}", option="--min") == number * factor


def test_a_bare_number_asks_for_its_unit() -> None:
    with pytest.raises(UsageError, match="--slow 100 has no unit") as caught:
        parse_duration("100", option="--slow")
    assert "--slow 100us" in caught.value.hint
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("text", ["", "us", "-5ms", "1e3us", "5 parsecs", "50US", "nan", "٣s"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--min"):
        parse_duration(text, option="--min")


@pytest.mark.parametrize(
    ("text", "seconds"), [("10", 10.0), ("0.5", 0.5), ("250ms", 0.25), ("5m", 300.0)]
)
def test_the_run_time_may_be_bare_seconds(text: str, seconds: float) -> None:
    assert parse_run_time(text) == seconds


@pytest.mark.parametrize("text", ["0", "0s", "31000000", "-1"])
def test_a_run_time_is_more_than_nothing_and_not_for_ever(text: str) -> None:
    with pytest.raises(UsageError, match="--duration"):
        parse_run_time(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [("16M", 16 << 20), ("16MiB", 16 << 20), ("4096", 4096), ("64k", 64 << 10), ("1G", 1 << 30)],
)
def test_ring_sizes(text: str, size: int) -> None:
    assert parse_ring_size(text) == size


def test_a_ring_that_is_no_power_of_two_names_its_neighbours() -> None:
    with pytest.raises(UsageError, match="power of two") as caught:
        parse_ring_size("3M")
    assert caught.value.hint == "take 2M or 4M"
    with pytest.raises(UsageError, match="power of two") as caught:
        parse_ring_size("768M")
    assert caught.value.hint == "take 512M or 1G"
    with pytest.raises(UsageError, match="power of two") as caught:
        parse_ring_size("5000")
    assert caught.value.hint == "take 4K or 8K"


@pytest.mark.parametrize("text", ["", "2K", "2G", "16X", "M", "-1M"])
def test_ring_sizes_that_can_not_be(text: str) -> None:
    with pytest.raises(UsageError, match="--ring-size"):
        parse_ring_size(text)


def test_run_times_for_people() -> None:
    assert [show_seconds(s) for s in (0.25, 5, 90.5, 150, 3600, 3900)] == [
        "250 ms",
        "5 s",
        "90.5 s",
        "2 min",
        "1 h",
        "1 h 5 min",
    ]
