"""Which functions begin a thread, by their names."""

from __future__ import annotations

import pytest

from latrace.analysis.start_up import is_start_up


@pytest.mark.parametrize(
    "name",
    [
        "_start",
        "_start_c",
        "__libc_start_main",
        "__libc_start_main_impl",
        "__libc_start_main@@GLIBC_2.34",
        "__libc_start_call_main",
        "start_thread",
        "clone",
        "__clone",
        "clone3",
        "__clone3",
    ],
)
def test_these_begin_a_thread(name: str) -> None:
    assert is_start_up(name)


@pytest.mark.parametrize("name", ["", "main", "_started", "cloned", "clone3x", "restart_thread"])
def test_others_do_not(name: str) -> None:
    assert not is_start_up(name)
