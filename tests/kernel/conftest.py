from __future__ import annotations

from pathlib import Path

import pytest
from tracing import build


@pytest.fixture(scope="session")
def waits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workload tests/workloads/waits.c, compiled."""
    return build(tmp_path_factory.mktemp("workloads"))
