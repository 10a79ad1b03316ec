"""Names made visible, times made human."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latrace.flamegraphs.text import cells, fit, human_share, human_us, visible

anything = st.text(st.characters(exclude_categories=()))


@given(anything)
def test_visible_is_printable_and_idempotent(text: str) -> None:
    shown = visible(text)
    assert shown.isprintable()
    shown.encode("utf-8")
    assert visible(shown) == shown


@given(st.text(st.characters(categories=["L", "N", "P", "S"])))
def test_plain_text_is_left_alone(text: str) -> None:
    assert visible(text) == "".join(c if c.isprintable() else visible(c) for c in text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mb", r"a\x1b[31mb"),
        ("\u202eevil", r"\u202eevil"),
        ("\U000e0041", r"\U000e0041"),
        ("a\nb", r"a\x0ab"),
        ("\udcff", r"\udcff"),
        ("nbsp\xa0", r"nbsp\xa0"),
        ("naïve 漢字", "naïve 漢字"),
    ],
)
def test_escapes(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_marks_do_not_pile_up() -> None:
    shown = visible("e" + "\u0301" * 9)
    assert sum(unicodedata.category(char) == "Mn" for char in shown) == 2


@given(anything, st.integers(0, 40))
def test_fit_fits(text: str, columns: int) -> None:
    shown = fit(text, columns)
    assert cells(shown) <= columns
    assert shown in (text, "") or (shown[-1] == "…" and text.startswith(shown[:-1]))


@pytest.mark.parametrize(
    ("us", "shown"),
    [
        (0, "0 µs"), (812, "812 µs"), (999, "999 µs"), (1000, "1.00 ms"), (12_345, "12.3 ms"),
        (123_456, "123 ms"), (1_200_000, "1.20 s"), (59_900_000, "59.9 s"),
        (60_000_000, "1 min 00 s"), (3_599_000_000, "59 min 59 s"), (3_660_000_000, "1 h 01 min"),
    ],
)  # fmt: skip
def test_human_times(us: int, shown: str) -> None:
    assert human_us(us) == shown


@pytest.mark.parametrize(
    ("part", "whole", "shown"),
    [
        (0, 0, "0 %"), (0, 9, "0 %"), (9, 9, "100 %"), (1, 10**9, "< 0.01 %"),
        (1, 8, "12.50 %"), (10**9 - 1, 10**9, "99.99 %"),
    ],
)  # fmt: skip
def test_human_shares(part: int, whole: int, shown: str) -> None:
    assert human_share(part, whole) == shown
