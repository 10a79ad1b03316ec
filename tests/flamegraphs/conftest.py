"""What the flame graph tests share: the browser and the golden files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import flame_webdriver
import pytest

GOLDEN = Path(__file__).parent / "golden"
REFUSED = "LATRACE_BLESS=1 in CI: a golden file is blessed by a person who looked at it"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a browser test that can't run here, or fail it where it has to run."""
    if item.get_closest_marker("browser") is None:
        return
    reason = flame_webdriver.missing()
    if reason is None:
        return
    if os.environ.get("LATRACE_REQUIRE_BROWSER") == "1":
        pytest.fail(f"LATRACE_REQUIRE_BROWSER=1, but this test {reason}", pytrace=False)
    pytest.skip(reason)


@pytest.fixture
def golden() -> Callable[[str, str], None]:
    """Compare a text with a golden file; LATRACE_BLESS=1 writes it instead, never in CI."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / name
        if os.environ.get("LATRACE_BLESS") == "1":
            if os.environ.get("CI"):
                pytest.fail(REFUSED, pytrace=False)
            path.write_text(text, encoding="utf-8", newline="\n")
        assert text == path.read_text(encoding="utf-8")

    return compare
