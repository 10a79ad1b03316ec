"""An application's own percentile, out of what its endpoint counts."""

from __future__ import annotations

import bisect
import math
import os
import random
import re
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Gauge, Histogram, Summary
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics

from latrace.tracer.errors import UsageError
from latrace.tracer.watch.exposition import MAX_LINES, ExpositionError, Reader
from latrace.tracer.watch.fetch import Url
from latrace.tracer.watch.metrics import (
    AppLatency,
    Metrics,
    MetricSpec,
    Reading,
    histogram_quantile,
    parse_metric,
    parse_reading,
)

LIAR = Path(__file__).resolve().parents[1] / "workloads" / "liar.py"
TEXT, OPEN = "text/plain; version=0.0.4", "application/openmetrics-text; version=1.0.0"
INF = math.inf


# --- what is asked for -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("took_seconds", {}),
        ("took_seconds{}", {}),
        ('took_seconds{handler="/x"}', {"handler": "/x"}),
        ('took_seconds{ a="1" , b="2,}" ,}', {"a": "1", "b": "2,}"}),
        (r'took_seconds{a="q\"b\\c\nd"}', {"a": 'q"b\\c\nd'}),
        ('took_seconds{a=""}', {"a": ""}),
    ],
)
def test_a_metric_and_its_labels(text: str, labels: dict[str, str]) -> None:
    spec = parse_metric(text, 0.9)
    assert spec == MetricSpec("took_seconds", labels, 0.9)
    assert parse_metric(str(spec), 0.9) == spec


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is no name"),
        ("2fast", "is no name"),
        ("took seconds", "is no name"),
        ("took{", "is no name"),
        ("took{a}", "labels are compared as a whole"),
        ('took{a=~"x"}', "labels are compared as a whole"),
        ('took{a!="x"}', "labels are compared as a whole"),
        ('took{a="x" b="y"}', "labels are compared as a whole"),
        ('took{a="x}', "labels are compared as a whole"),
        ('took{a="x",a="x"}', "stands there twice"),
        ('took{le="1"}', "not a chosen le"),
        ('took{quantile="0.9"}', "not a chosen quantile"),
        ("took_seconds_bucket", "give the name of the whole: took_seconds"),
        ("a" * 2000, "longer than"),
        ("took\x1b[2J", "is no name"),
    ],
)
def test_what_is_no_metric(text: str, why: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_metric(text)
    assert why in caught.value.cause and caught.value.cause.isprintable()


@pytest.mark.parametrize("quantile", [0, 1, -1, 99, math.nan])
def test_what_is_no_quantile(quantile: float) -> None:
    with pytest.raises(UsageError, match="is not between 0 and 1"):
        parse_metric("took", quantile)


# --- quantiles ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantile", "positive", "negative"), [(0.2, 0.048, -0.2), (0.5, 0.15, -0.15), (0.8, 0.72, 0.3)]
)
def test_quantiles_are_those_of_prometheus(
    quantile: float, positive: float, negative: float
) -> None:
    """The figures of its own promqltest/testdata/histograms.test."""
    assert histogram_quantile(quantile, (0.1, 0.2, 1, INF), (50, 70, 110, 120)) == pytest.approx(
        positive
    )
    assert histogram_quantile(quantile, (-0.2, -0.1, 0.3, INF), (10, 20, 20, 30)) == pytest.approx(
        negative
    )


def test_the_highest_bucket_and_no_values() -> None:
    assert histogram_quantile(0.99, (1, 2, INF), (0, 0, 5)) == 2
    assert histogram_quantile(0.99, (1, 2, INF), (0, 0, 0)) is None
    assert histogram_quantile(0.5, (1, 2, INF), (10, 9, 10)) == 0.5  # as if it were rising


@given(
    st.lists(st.floats(0.001, 100), min_size=1, max_size=60),
    st.lists(st.floats(0.01, 50), min_size=1, max_size=8, unique=True).map(sorted),
    st.floats(0.01, 0.99),
)
def test_a_quantile_lies_in_the_bucket_of_the_value_it_is(
    values: list[float], finite: list[float], quantile: float
) -> None:
    bounds = (*finite, INF)
    counts = [sum(value <= bound for value in values) for bound in bounds]
    found = histogram_quantile(quantile, bounds, counts)
    exact = sorted(values)[math.ceil(quantile * len(values) - 1e-9) - 1]
    bucket = bisect.bisect_left(bounds, exact)
    low, high = (0.0, *bounds)[bucket], bounds[min(bucket, len(finite) - 1)]
    assert found is not None
    assert min(low, high) * (1 - 1e-9) <= found <= high * (1 + 1e-9)


# --- windows -----------------------------------------------------------------------------------

SPEC = MetricSpec("took", {}, 0.5)


def reading(*counts: float, bounds: tuple[float, ...] = (1.0, 2.0, INF)) -> Reading:
    return Reading(bounds=bounds, counts=counts, count=counts[-1])


def test_a_window_slides() -> None:
    latency = AppLatency(SPEC, window_s=5)
    assert latency.quantile() is None
    latency.add(reading(1000, 1000, 1000), 0)  # of the time before, whatever it was
    assert latency.quantile() is None
    fast = 1000
    for second in range(1, 6):
        fast += 10
        latency.add(reading(fast, fast, fast), second)
    assert latency.quantile() == (0.5, 50)
    for second in range(6, 11):
        latency.add(reading(fast, fast + (second - 5) * 10, fast + (second - 5) * 10), second)
        value = latency.quantile()
        assert value is not None and value[1] == 50
        assert latency.covers_s == 5
    assert value == (1.5, 50)


def test_a_restart_begins_anew() -> None:
    latency = AppLatency(SPEC, window_s=5)
    latency.add(reading(100, 100, 100), 0)
    latency.add(reading(150, 150, 150), 1)
    latency.add(reading(0, 3, 3), 2)
    assert latency.quantile() is None
    latency.add(reading(0, 13, 13), 3)
    assert latency.quantile() == (1.5, 10)


def test_one_bucket_that_falls_is_a_restart_too() -> None:
    latency = AppLatency(SPEC, window_s=5)
    latency.add(reading(100, 100, 100), 0)
    latency.add(reading(10, 200, 200), 1)
    assert latency.quantile() is None


def test_other_buckets_begin_anew() -> None:
    latency = AppLatency(SPEC, window_s=5)
    latency.add(reading(100, 100, 100), 0)
    latency.add(reading(200, 200, 200, 200, bounds=(1.0, 2.0, 3.0, INF)), 1)
    assert latency.quantile() is None
    latency.add(reading(200, 200, 210, 210, bounds=(1.0, 2.0, 3.0, INF)), 2)
    assert latency.quantile() == (2.5, 10)


def test_a_gap_longer_than_the_window_begins_anew() -> None:
    latency = AppLatency(SPEC, window_s=5)
    latency.add(reading(0, 0, 0), 0)
    latency.add(reading(0, 1000, 1000), 60)
    assert latency.quantile() is None
    latency.add(reading(10, 1010, 1010), 61)
    assert latency.quantile() == (0.5, 10)


def test_a_window_does_not_grow() -> None:
    latency = AppLatency(SPEC, window_s=5)
    most = 0
    for step in range(20_000):
        latency.add(reading(step, step, step), step / 1000)
        most = max(most, len(latency._readings))
    assert most <= 600
    assert latency.covers_s == pytest.approx(5, rel=0.02)
    assert latency.quantile() == (0.5, pytest.approx(5000, rel=0.02))


def test_a_summary_has_the_last_word_of_the_application() -> None:
    latency = AppLatency(MetricSpec("took", {}, 0.99), window_s=5)
    latency.add(Reading(value=0.25, count=100), 0)
    latency.add(Reading(value=0.75, count=120), 1)
    assert latency.quantile() == (0.75, 20)
    latency.add(Reading(value=None, count=120), 2)
    assert latency.quantile() is None


@pytest.mark.parametrize(
    "told",
    [
        {},
        {"kind": "gauge"},
        {"kind": "histogram"},
        {"kind": "histogram", "bounds": [1], "counts": [1]},
        {"kind": "histogram", "bounds": [1, 2], "counts": [1, 1]},
        {"kind": "histogram", "bounds": [1, INF], "counts": [1]},
        {"kind": "histogram", "bounds": [2, 1, INF], "counts": [1, 1, 1]},
        {"kind": "histogram", "bounds": [1, INF], "counts": [-1, 1]},
        {"kind": "histogram", "bounds": [1, INF], "counts": [1, math.nan]},
        {"kind": "histogram", "bounds": ["1", INF], "counts": [1, 1]},
        {"kind": "histogram", "bounds": list(range(5000)), "counts": [1] * 5000},
        {"kind": "summary", "value": "1", "count": 1},
        {"kind": "summary", "value": 1},
        {"kind": "summary", "value": INF, "count": 1},
    ],
)
def test_a_child_is_not_believed_all(told: dict[str, object]) -> None:
    with pytest.raises((ValueError, KeyError)):
        parse_reading(told)


# --- pages -------------------------------------------------------------------------------------


class Service:
    """What prometheus_client itself writes, in both formats."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.took = Histogram(
            "took_seconds", "Of requests.", ["handler"], registry=self.registry, buckets=(0.1, 1)
        )
        Histogram("took_seconds_too", "Another.", registry=self.registry).observe(5)
        Gauge("took", "A shorter name.", registry=self.registry).set(7)
        self.size = Summary("size_bytes", "Without quantiles.", registry=self.registry)

    def observe(self, handler: str, *values: float) -> None:
        for value in values:
            self.took.labels(handler).observe(value)

    def page(self, kind: str) -> bytes:
        return (generate_openmetrics if kind == OPEN else generate_latest)(self.registry)


@pytest.mark.parametrize("kind", [TEXT, OPEN])
def test_all_series_of_a_histogram_add_up(kind: str) -> None:
    service = Service()
    service.observe("/x", 0.05, 0.5, 5)
    service.observe('/"y"} 1\n', 0.05, 0.05)
    everything = Reader("took_seconds", {}, 0.99)
    only = Reader("took_seconds", {"handler": '/"y"} 1\n'}, 0.99)
    expected = {"kind": "histogram", "bounds": [0.1, 1.0, INF], "counts": [3, 4, 5]}
    assert everything.read(service.page(kind), kind) == expected
    assert only.read(service.page(kind), kind)["counts"] == [2, 2, 2]
    service.observe("/x", 0.5)  # the same lines with other numbers
    assert everything.read(service.page(kind), kind)["counts"] == [3, 5, 6]
    service.observe("/new", 0.5)  # other lines
    assert everything.read(service.page(kind), kind)["counts"] == [3, 6, 7]
    assert only.read(service.page(kind), kind)["counts"] == [2, 2, 2]
    assert Reader("took_seconds_too", {}, 0.99).read(service.page(kind), kind)["counts"][-1] == 1


@pytest.mark.parametrize("kind", [TEXT, OPEN])
def test_a_page_whose_shape_is_known_reads_as_a_new_one_does(kind: str) -> None:
    chance = random.Random(7)  # noqa: S311 - the same at each run
    service, kept = Service(), Reader("took_seconds", {}, 0.99)
    for _ in range(50):
        service.observe(chance.choice(["/a", "/b", "/c"]), chance.expovariate(1))
        page = service.page(kind)
        assert kept.read(page, kind) == Reader("took_seconds", {}, 0.99).read(page, kind)


def test_exemplars_timestamps_and_line_ends() -> None:
    lines = [
        "# TYPE t histogram",
        't_bucket{le="0.1"} 3 1700000000',
        't_bucket{le="+Inf"}\t4 # {trace_id="} 9"} 0.5 1700000000.1',
    ]
    for end in ("\n", "\r\n"):
        page = end.join(lines).encode() if end == "\r\n" else end.join([*lines, ""]).encode()
        if end == "\r\n":
            page = page.replace(b' # {trace_id="} 9"} 0.5 1700000000.1', b"")
        assert Reader("t", {}, 0.5).read(page, TEXT)["counts"] == [3, 4]
    page = b't_bucket{le="0.1"} 3\nt_bucket{le="+Inf"} 4 # {trace_id="} 9"} 0.5 17.1\n# EOF\n'
    page = b"# TYPE t histogram\n" + page
    assert Reader("t", {}, 0.5).read(page, OPEN)["counts"] == [3, 4]


SUMMARY = b"""\
# TYPE t summary
t{h="a",quantile="0.5"} 0.1
t{h="a",quantile="0.99"} 0.5
t_sum{h="a"} 9
t_count{h="a"} 90
t{h="b",quantile="0.5"} 0.2
t{h="b",quantile="0.99"} 0.75
t_count{h="b"} 10
t{h="c",quantile="0.99"} NaN
t_count{h="c"} 0
"""


def test_of_a_summary_the_largest_of_all_series() -> None:
    expected = {"kind": "summary", "value": 0.75, "count": 100}
    assert Reader("t", {}, 0.99).read(SUMMARY, TEXT) == expected
    assert Reader("t", {"h": "a"}, 0.5).read(SUMMARY, TEXT)["value"] == 0.1
    assert Reader("t", {"h": "c"}, 0.99).read(SUMMARY, TEXT)["value"] is None


def test_series_with_different_buckets_add_up_where_they_agree() -> None:
    page = b"""\
t_bucket{h="a",le="1"} 1
t_bucket{h="a",le="2"} 2
t_bucket{h="a",le="+Inf"} 3
t_bucket{h="b",le="2"} 10
t_bucket{h="b",le="4"} 11
t_bucket{h="b",le="+Inf"} 12
"""
    told = Reader("t", {}, 0.5).read(page, TEXT)
    assert (told["bounds"], told["counts"]) == ([2, INF], [12, 15])
    with pytest.raises(ExpositionError, match="with different buckets; choose by label"):
        Reader("t", {}, 0.5).read(page.replace(b'"2"', b'"3"', 1), TEXT)


@pytest.mark.parametrize(
    ("page", "kind", "why"),
    [
        (b"", TEXT, "answers an empty page"),
        (b"<!DOCTYPE html><html>t 1</html>", "text/html; charset=utf-8", "answers a web page"),
        (b"\n <html>", TEXT, "answers a web page"),
        (b'{"t": 1}', "application/json", "answers JSON"),
        (b"[]", "", "answers JSON"),
        (b"\x0a\x05t\x00\x01", TEXT, "answers binary data"),
        (b"u 1\n", "application/vnd.google.protobuf; x", "answers binary data"),
        (b"u_bucket 1\n", TEXT, "has no metric t"),
        (b"not t at all\n", TEXT, "has no metric t"),
        (b"# HELP t t\n# TYPE t histogram\n", TEXT, "has no metric t"),
        (b"# TYPE t gauge\nt 1\n", TEXT, "has t as a gauge with neither buckets nor quantiles"),
        (b"t 1\n", TEXT, "has t with neither buckets nor quantiles"),
        (b"# TYPE t summary\nt_sum 1\nt_count 1\n", TEXT, "has t as a summary with neither"),
        (SUMMARY, TEXT, "has t as a summary without the quantile 0.9, only 0.5, 0.99"),
        (b't_bucket{le="1"} 1\n', TEXT, "without a bucket for \\+Inf"),
        (b't_bucket{le="+Inf"} 1\n', TEXT, "with no bucket but \\+Inf"),
        (b't_bucket{le="x"} 1\n', TEXT, "whose bound is no number"),
        (b't_bucket{le="NaN"} 1\n', TEXT, "whose bound is no number"),
        (b't_bucket{le="1"} -1\nt_bucket{le="+Inf"} 1\n', TEXT, "counts -1 values in a bucket"),
        (b't_bucket{le="1"} 1\nt_bucket{le="+Inf"} Inf\n', TEXT, "counts inf values in a bucket"),
        (b't_bucket{le="1"} 1\nt_bucket{le="+Inf"} NaN\n', TEXT, "counts nan values in a bucket"),
        (b't_bucket{le="1"} 1\nt_bucket{le="1"} 1\n', TEXT, "has the same series of t twice"),
        (b't_bucket{le="1" 1\n', TEXT, "has a line of t that cannot be read"),
        (b't_bucket{le="1"}\n', TEXT, "has a line of t that cannot be read"),
        (b't_bucket{le="1"} one\n', TEXT, "has lines of t that cannot be read"),
        (b't_bucket{le="\xff"} 1\n', TEXT, "has lines of t that cannot be read"),
        (b't_bucket{0="1"} 1\n', TEXT, "has lines of t that cannot be read"),
        (b"t{" + b"x" * 5000 + b"} 1\n", TEXT, "has a line of more than 4096 characters"),
        (b't{a="1"} 1\n' * (MAX_LINES + 1), TEXT, "has more than 5,000 lines of t; choose by"),
        (b't_bucket{le="1"} 1\n', OPEN, "ends too early"),
        (
            b'# TYPE t histogram\nt_bucket{le="2"} 1\nt_bucket{le="1"} 1\n# EOF\n',
            OPEN,
            "has lines of t that cannot be read",
        ),
    ],
)
def test_a_page_that_does_not_have_it(page: bytes, kind: str, why: str) -> None:
    reader = Reader("t", {}, 0.9)
    for _ in range(2):  # nothing is remembered of a page that was refused
        with pytest.raises(ExpositionError, match=why) as caught:
            reader.read(page, kind)
        assert "\n" not in str(caught.value)
    good = b't_bucket{le="1"} 1\nt_bucket{le="+Inf"} 2\n# EOF\n'
    assert reader.read(good, kind)["counts"] == [1, 2]


def test_labels_that_no_series_has() -> None:
    with pytest.raises(ExpositionError, match=re.escape('has no series t{h="z"}')):
        Reader("t", {"h": "z"}, 0.99).read(SUMMARY, TEXT)


@given(st.binary(max_size=300), st.sampled_from([TEXT, OPEN]))
def test_no_page_breaks_the_reader(junk: bytes, kind: str) -> None:
    for page in (junk, b't_bucket{le="' + junk + b'"} 1\n', b"t_bucket{" + junk + b"\n# EOF\n"):
        try:
            told = Reader("t", {}, 0.9).read(page, kind)
        except ExpositionError:
            continue
        parse_reading(told)


def test_a_hostile_line_costs_no_more_than_its_length() -> None:
    """Each of these would take hours if anything were tried again from every place in it."""
    for page in (b't_bucket{h="' * 300_000, b"t_bucket{" + b"x" * 4_000_000, b"t" * 4_000_000):
        with pytest.raises(ExpositionError):
            Reader("t", {}, 0.9).read(page, TEXT)


# --- an endpoint -------------------------------------------------------------------------------


@pytest.fixture
def port() -> Iterator[int]:
    with subprocess.Popen(
        [sys.executable, "-I", LIAR], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline())
        process.kill()


def until_told(metrics: Metrics) -> bool:
    """Step until an answer was taken; whether it was a reading."""
    metrics.trouble = "nothing yet"
    while True:
        if metrics.fileno() >= 0:
            select.select([metrics], [], [], 0.05)
        if metrics.step():
            return True
        if metrics.trouble != "nothing yet":
            return False


@pytest.mark.parametrize(
    ("path", "trouble"),
    [
        ("/absent", "answers 404 Not Found: no"),
        ("/html", "answers a web page, not metrics"),
        ("/json", "answers JSON, not metrics"),
        ("/binary", "answers binary data, not metrics as text"),
        ("/empty", "answers an empty page"),
        ("/endless", "answers with more than 16.8 MB"),
        ("/huge", "answers with more than 16.8 MB"),
        ("/redirect", r"answers 302 Found, a redirect to /stolen\x1b[2J, which is not followed"),
        ("/junk", "does not speak HTTP there"),
    ],
)
def test_trouble_is_one_line(port: int, path: str, trouble: str) -> None:
    url = Url("127.0.0.1", port, path)
    spec = parse_metric("took_seconds")
    with Metrics(url, spec, os.getpid(), window_s=5, every_s=0.01) as metrics:
        assert not until_told(metrics)
        assert metrics.trouble == f"http://127.0.0.1:{port}{path} {trouble}"
        assert metrics.latency.quantile() is None


def test_trouble_ends_when_it_answers_again(port: int) -> None:
    url = Url("127.0.0.1", port, "/good")
    with Metrics(url, parse_metric("took"), os.getpid(), window_s=5, every_s=0.01) as metrics:
        assert not until_told(metrics)
        assert metrics.trouble is not None
        assert metrics.trouble.endswith("has no metric took")
    spec = parse_metric("took_seconds", 0.5)
    with Metrics(url, spec, os.getpid(), window_s=5, every_s=0.01) as metrics:
        for _ in range(3):
            assert until_told(metrics)
            assert metrics.trouble is None
        assert metrics.scrapes == 3
        metrics.url = Url("127.0.0.1", port, "/silent")
        metrics.step(metrics.due_s)
        metrics.close()  # with a scrape under way


def test_other_buckets_are_told_once(port: int) -> None:
    url, spec = Url("127.0.0.1", port, "/changing"), parse_metric("took_seconds")
    with Metrics(url, spec, os.getpid(), window_s=5, every_s=0.01) as metrics:
        assert until_told(metrics)
        assert metrics.trouble is None
        assert until_told(metrics)
        assert (
            metrics.trouble == f"{url} has other buckets of took_seconds now: counting begins anew"
        )
        metrics.url = Url("127.0.0.1", port, "/good")
        while metrics.trouble is not None:
            metrics.step()
        assert metrics.latency.quantile() is None


def test_a_slow_endpoint_is_trouble_at_its_deadline(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latrace.tracer.watch.metrics.TIMEOUT_S", 0.3)
    url = Url("127.0.0.1", port, "/drip")
    with Metrics(url, parse_metric("took"), os.getpid(), window_s=5, every_s=0.01) as metrics:
        assert not until_told(metrics)
        assert metrics.trouble is not None
        assert metrics.trouble.endswith("does not end its answer within 0.3 s")
        metrics.url = Url("127.0.0.1", port, "/good")
        metrics.spec = parse_metric("took_seconds")
        assert until_told(metrics)  # none was under way: it is left alone for a while
        assert metrics.trouble is None


def test_an_endpoint_in_trouble_is_asked_less_often(port: int) -> None:
    url = Url("127.0.0.1", port, "/absent")
    with Metrics(url, parse_metric("took"), os.getpid(), window_s=5, every_s=0.01) as metrics:
        pauses = []
        for _ in range(5):
            until_told(metrics)
            pauses.append(metrics._pause_s)
        assert pauses == sorted(pauses) and pauses[-1] > 10 * 0.01
