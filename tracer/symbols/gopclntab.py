"""Functions of a Go program from `.gopclntab`, which stripping leaves: the runtime needs it itself.

Layouts of Go 1.16, 1.18 and 1.20: runtime/symtab.go (`pcHeader`, `_func`) and
debug/gosym/pclntab.go of the Go distribution.
"""

from __future__ import annotations

import struct
from typing import Final

import numpy as np

from latrace.tracer.symbols.strings import Strings
from latrace.tracer.symbols.table import SymbolTable, build_table

SECTIONS: Final = (b".gopclntab", b".data.rel.ro.gopclntab")
MAX_BYTES: Final = 512 << 20
MAX_FUNCTIONS: Final = 4 << 20
MAX_NAMES: Final = 192 << 20

_GO_1_16: Final = 0xFFFF_FFFA
_SINCE_1_18: Final = (0xFFFF_FFF0, 0xFFFF_FFF1)
_HEADER_BYTES: Final = 8


class PclntabError(Exception):
    """The bytes are no such table, or of another version of Go."""


def read_functions(data: bytes, order: str, text: int) -> SymbolTable:
    """The functions in the section's bytes; raises PclntabError.

    `order`: `<` or `>`. `text`: the address of the code, where the table leaves it to the loader.
    """
    if len(data) < _HEADER_BYTES:
        raise PclntabError("too short")
    magic, _, _, _, pointer = struct.unpack_from(order + "IBBBB", data)
    if pointer not in (4, 8) or magic not in (_GO_1_16, *_SINCE_1_18):
        raise PclntabError("of another version of Go")
    word = np.dtype(f"{order}u{pointer}")
    fields = 8 if magic in _SINCE_1_18 else 7
    if len(data) < _HEADER_BYTES + fields * pointer:
        raise PclntabError("too short")
    header = np.frombuffer(data, word, fields, _HEADER_BYTES).tolist()
    count, names_at, table_at = header[0], header[fields - 5], header[fields - 1]
    # Before 1.18 the table has addresses, since then distances from the code's beginning.
    if magic == _GO_1_16:
        base, entry = 0, word
    else:
        base, entry = header[2] or text, np.dtype(f"{order}u4")
    if not 0 < count <= MAX_FUNCTIONS:
        raise PclntabError("an absurd number of functions")
    cells = 2 * count + 1
    if table_at + cells * entry.itemsize > len(data) or names_at >= len(data):
        raise PclntabError("it points outside of itself")
    table = np.frombuffer(data, entry, cells, table_at).astype(np.uint64)
    starts = table[0::2] + np.uint64(base)
    # A function's record begins with its address; the name's place follows.
    place = table[1::2] + np.uint64(table_at + entry.itemsize)
    if (starts[1:] < starts[:-1]).any() or (place > len(data) - 4).any():
        raise PclntabError("functions out of order, or outside of it")
    # One element for each byte: nobody promised that addresses are aligned.
    words = np.ndarray((len(data) - 3,), f"{order}u4", data, strides=(1,))
    begins = words[place.astype(np.int64)].astype(np.int64) + names_at
    if (begins >= len(data)).any():
        raise PclntabError("a name outside of it")
    ends = Strings(data, names_at).ends(begins)
    keep = (starts[1:] > starts[:-1]) & (ends > begins)
    if int((ends - begins)[keep].sum()) > MAX_NAMES:
        raise PclntabError("longer names than any real file has")
    spans = zip(begins[keep].tolist(), ends[keep].tolist(), strict=True)
    names = [data[begin:end] for begin, end in spans]
    return build_table(starts[:-1][keep], starts[1:][keep], names)
