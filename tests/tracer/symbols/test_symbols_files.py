"""Files of targets: which debug files are read for them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latrace.tracer.symbols.client import Worker
from latrace.tracer.symbols.files import FileTable
from latrace.tracer.symbols.procfs import Fd, open_beneath
from latrace.tracer.symbols.table import Image, empty_table

BUILD_ID = bytes.fromhex("1234567890abcdef")
DEBUG = "usr/lib/debug/.build-id/12/34567890abcdef.debug"


class Telling(Worker):
    """Says of every file that it is stripped, and counts the debug files it is given."""

    given = 0

    def elf(self, _fd: int) -> Image | int:
        return Image(np.zeros((0, 4), np.uint64), empty_table(), False, BUILD_ID, b"", 0)

    def debug(self, fd: int, **_: Any) -> Image | int:
        self.given += 1
        return self.elf(fd)


@pytest.mark.parametrize(
    ("mode", "owns", "read"),
    [
        (0o644, False, True),
        (0o600, True, True),
        (0o600, False, False),
        (0o640, False, False),
    ],
)
@pytest.mark.parametrize("linked", [False, True])
def test_a_debug_file_is_read_if_the_target_could(
    tmp_path: Path, mode: int, owns: bool, read: bool, linked: bool
) -> None:
    program, place = tmp_path / "program", tmp_path / DEBUG
    program.write_bytes(b"")
    place.parent.mkdir(parents=True)
    file = tmp_path / "elsewhere" if linked else place
    file.write_bytes(b"")
    file.chmod(mode)
    if linked:
        place.symlink_to("/elsewhere")
    root = Fd(os.open(tmp_path, os.O_PATH))
    worker = Telling()
    table = FileTable(worker)
    uid = os.getuid() if owns else os.getuid() + 1
    found = table.add(open_beneath(root.number, "/program"), path=b"/program", root=root, uid=uid)
    assert table.image(found) is not None
    assert worker.given == read
    refused = {} if read else {"debug file: not readable by the target": 1}
    assert table.failed == refused
