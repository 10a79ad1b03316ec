"""Functions of a Go program from `.gopclntab`, which stripping leaves: the runtime needs it itself.

Layouts of Go 1.16, 1.18 and 1.20: runtime/symtab.go (`pcHeader`, `_func`) and
debug/gosym/pclntab.go of the Go distribution.
"""

from __future__ import annotations

import struct
from typing import Final

import numpy as np

from latrace.tracer.symbols.strings import Strings
from latrace.tracer.symbols.table import I64, U64, SymbolTable, build_table

SECTIONS: Final = (b".gopclntab", b".data.rel.ro.gopclntab")
MAX_BYTES: Final = 512 << 20
MAX_FUNCTIONS: Final = 4 << 20
MAX_NAMES: Final = 192 << 20
NAME, MOVES = 0, 3
"""Numbers of a function's record."""

_GO_1_16: Final = 0xFFFF_FFFA
_SINCE_1_18: Final = (0xFFFF_FFF0, 0xFFFF_FFF1)
_HEADER_BYTES: Final = 8


class PclntabError(Exception):
    """The bytes are no such table, or of another version of Go."""


class FunctionTable:
    """The functions of a table, and a record of numbers about each of them.

    starts: (n + 1,) uint64 addresses in ascending order, the end of the last one behind. names_at,
    moves_at: where in the data the names are, and how functions move the stack pointer. quantum:
    the least size of an instruction. pointer: bytes of an address.
    """

    def __init__(self, data: bytes, order: str, text: int) -> None:
        """Raises PclntabError.

        `order`: `<` or `>`. `text`: the address of the code, where the table leaves it to the
        loader.
        """
        if len(data) < _HEADER_BYTES:
            raise PclntabError("too short")
        magic, _, _, self.quantum, self.pointer = struct.unpack_from(order + "IBBBB", data)
        if self.pointer not in (4, 8) or magic not in (_GO_1_16, *_SINCE_1_18):
            raise PclntabError("of another version of Go")
        word = np.dtype(f"{order}u{self.pointer}")
        fields = 8 if magic in _SINCE_1_18 else 7
        if len(data) < _HEADER_BYTES + fields * self.pointer:
            raise PclntabError("too short")
        header = np.frombuffer(data, word, fields, _HEADER_BYTES).tolist()
        count, table_at = header[0], header[fields - 1]
        self.names_at, self.moves_at = header[fields - 5], header[fields - 2]
        # Before 1.18 the table has addresses, since then distances from the code's beginning.
        if magic == _GO_1_16:
            base, entry = 0, word
        else:
            base, entry = header[2] or text, np.dtype(f"{order}u4")
        if not 0 < count <= MAX_FUNCTIONS:
            raise PclntabError("an absurd number of functions")
        cells = 2 * count + 1
        if table_at + cells * entry.itemsize > len(data):
            raise PclntabError("it points outside of itself")
        table = np.frombuffer(data, entry, cells, table_at).astype(np.uint64)
        self.starts: U64 = table[0::2] + np.uint64(base)
        if (self.starts[1:] < self.starts[:-1]).any():
            raise PclntabError("functions out of order")
        self._data, self._order = data, order
        # A function's record begins with its address.
        self._numbers = table[1::2] + np.uint64(table_at + entry.itemsize)

    def numbers(self, index: int) -> I64:
        """Of each function the number of 32 bits at that place behind the address, (n,).

        `NAME` is where its name is, `MOVES` where its moves are. Raises PclntabError.
        """
        place = self._numbers + np.uint64(4 * index)
        if (place > len(self._data) - 4).any():
            raise PclntabError("a function's record outside of it")
        # One element for each byte: nobody promised that addresses are aligned.
        words = np.ndarray((len(self._data) - 3,), f"{self._order}u4", self._data, strides=(1,))
        return words[place.astype(np.int64)].astype(np.int64)


def read_functions(data: bytes, order: str, text: int) -> SymbolTable:
    """The functions in the section's bytes; raises PclntabError. Arguments: see `FunctionTable`."""
    table = FunctionTable(data, order, text)
    if table.names_at >= len(data):
        raise PclntabError("it points outside of itself")
    begins = table.numbers(NAME) + table.names_at
    if (begins >= len(data)).any():
        raise PclntabError("a name outside of it")
    ends = Strings(data, table.names_at).ends(begins)
    starts = table.starts
    keep = (starts[1:] > starts[:-1]) & (ends > begins)
    if int((ends - begins)[keep].sum()) > MAX_NAMES:
        raise PclntabError("longer names than any real file has")
    spans = zip(begins[keep].tolist(), ends[keep].tolist(), strict=True)
    names = [data[begin:end] for begin, end in spans]
    return build_table(starts[:-1][keep], starts[1:][keep], names)
