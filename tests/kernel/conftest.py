from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cgroups import cpu_groups
from scenes import Stage
from tracing import build


@pytest.fixture(scope="session")
def waits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workload tests/workloads/waits.c, compiled."""
    return build(tmp_path_factory.mktemp("workloads"))


@pytest.fixture(scope="session")
def causes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workload tests/workloads/causes.c, compiled."""
    return build(tmp_path_factory.mktemp("workloads"), "causes")


@pytest.fixture
def stage(causes: Path, tmp_path: Path) -> Iterator[Stage]:
    """Where scenes of that workload are played, in control groups of their own."""
    with cpu_groups() as groups:
        yield Stage(causes, groups, tmp_path / "c")
