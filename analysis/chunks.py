"""Read a table in pieces of a good size, and its columns as numpy arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from latrace.analysis.capture import Capture

_ROWS = 1 << 17


def chunks(capture: Capture, name: str, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Yield a table in pieces of some hundred thousand rows, however small it was written.

    A recording of an hour has thousands of batches; what is done for each piece costs more than
    what is done for each row of a small one. Raises CaptureError for a damaged file.
    """
    held: list[pa.Table] = []
    rows = 0
    for batch in capture.batches(name, columns=columns):
        held.append(batch)
        rows += batch.num_rows
        if rows >= _ROWS:
            yield _joined(held)
            held, rows = [], 0
    if held:
        yield _joined(held)


def _joined(tables: list[pa.Table]) -> pa.Table:
    if len(tables) == 1:
        return tables[0]
    return pa.concat_tables(tables).unify_dictionaries().combine_chunks()


def numbers(table: pa.Table, name: str, absent: int = 0) -> npt.NDArray[Any]:
    """Give a column of integers, shape (rows,), with `absent` for null."""
    column = table[name].combine_chunks()
    filled: npt.NDArray[Any] = column.fill_null(absent).to_numpy(zero_copy_only=False)
    return filled


def present(table: pa.Table, name: str) -> npt.NDArray[np.bool_]:
    """Tell, shape (rows,), where a column is not null."""
    valid: npt.NDArray[np.bool_] = table[name].is_valid().to_numpy()
    return valid


def names(table: pa.Table, name: str) -> tuple[npt.NDArray[Any], dict[int, str]]:
    """Take a column of names apart: codes, and what they mean (-1: null, the empty name)."""
    column = table[name].combine_chunks()
    meanings = {code: text or "" for code, text in enumerate(column.dictionary.to_pylist())}
    codes: npt.NDArray[Any] = column.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    return codes, {**meanings, -1: ""}
