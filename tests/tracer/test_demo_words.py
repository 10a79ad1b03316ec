"""What the demonstration says of the answers that its client timed."""

from __future__ import annotations

import pytest

from latrace.tracer.commands.demo import _explanation
from latrace.tracer.demo import Answers, answers_of

SUMMARY = {"waits": {"count": 717, "total_ns": 1_020_000_000, "p99_ns": 4_460_000}}


def answers(p50_ms: float, p99_ms: float) -> Answers:
    return Answers(
        count=200, p50_ns=int(p50_ms * 1e6), p99_ns=int(p99_ms * 1e6), max_ns=int(p99_ms * 2e6)
    )


@pytest.mark.parametrize(
    ("alone", "beside", "told"),
    [
        ((3.1, 3.3), (6.4, 9.2), "yet their P99 went from 3.30 ms to 9.20 ms."),
        # A stray answer before: the P99 hardly grew, the median did.
        ((3.4, 9.3), (6.4, 10.0), "yet their median went from 3.40 ms to 6.40 ms."),
        ((3.4, 9.3), (6.4, 8.0), "yet their median went from 3.40 ms to 6.40 ms."),
        ((6.4, 9.3), (6.3, 8.0), "This machine was so busy before that demo-hog made no"),
    ],
)
def test_it_tells_the_figure_that_grew_most(
    alone: tuple[float, float], beside: tuple[float, float], told: str
) -> None:
    text = " ".join(_explanation(answers(*alone), answers(*beside), SUMMARY).split())
    assert told in text
    assert "each of the 717 waits of demo-service in the kernel: 1.02 s in" in text


def test_it_claims_nothing_without_answers() -> None:
    text = _explanation(answers_of([]), answers(6.4, 9.2), SUMMARY)
    assert "went from" not in text
    assert "waits" not in text
