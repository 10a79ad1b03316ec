"""latrace: which waits made the P99 spike, who held the CPU meanwhile, and where in the code."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latrace.analysis.capture import Capture

__version__ = "0.1.0"


def open(path: str | os.PathLike[str] = "latrace.data") -> Capture:
    """Open a capture for analysis: no root, no kernel and no bcc needed.

    The tables are `pyarrow.Table`s, with times in nanoseconds. In a notebook:

    >>> import latrace
    >>> capture = latrace.open("latrace.data")            # doctest: +SKIP
    >>> capture.complete, capture.manifest["kernel"]      # doctest: +SKIP
    >>> waits = capture.waits.to_pandas()                 # or polars.from_arrow(capture.waits)
    ...                                                   # doctest: +SKIP
    >>> waits.nlargest(10, "wait_ns")[["tid", "wait_ns", "waker", "syscall"]]  # doctest: +SKIP
    >>> from latrace.analysis.summary import summarise    # doctest: +SKIP
    >>> summarise(capture)["waits"]["p99_ns"]             # doctest: +SKIP

    Raises `latrace.analysis.errors.CaptureError` when there is none or it cannot be read.
    """
    from latrace.analysis.capture import open_capture  # noqa: PLC0415 - pyarrow takes 0.1 s

    return open_capture(path)
