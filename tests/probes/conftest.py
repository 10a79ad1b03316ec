from __future__ import annotations

import ctypes

import pytest
from host_build import library


@pytest.fixture(scope="session")
def probes(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The probes' pure functions, built for this host."""
    return library(tmp_path_factory.mktemp("probes"))
