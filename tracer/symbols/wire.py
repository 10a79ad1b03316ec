"""What the tracer and its unprivileged worker say to each other, over one stream socket.

Request: `REQUEST` header, a small JSON object, a payload; a file descriptor may come with the
first byte. Reply: `REPLY` header and raw arrays in the host's byte order. The tracer believes
nothing in a reply: `read_image` and `read_names` check every length, order and bound.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from latrace.tracer.symbols.elf import Links
from latrace.tracer.symbols.frames import NAME_LIMIT
from latrace.tracer.symbols.table import SEGMENT_COLUMNS, U32, U64, Image, SymbolTable, cut

REQUEST: Final = struct.Struct("=4sII")
"""magic, bytes of JSON, bytes of payload."""
REPLY: Final = struct.Struct("=4sIIIQIIII")
"""magic, status, segments, symbols, bytes of names, build id, debug link, symtab, crc."""
MAGIC: Final = b"lsy1"

STATUS_OK, STATUS_BAD_FILE, STATUS_LIMIT, STATUS_IO, STATUS_MISMATCH, STATUS_NO_LIBDW = range(6)
STATUS_WORDS: Final = {
    STATUS_BAD_FILE: "not a sound ELF file",
    STATUS_LIMIT: "too large to parse",
    STATUS_IO: "unreadable",
    STATUS_MISMATCH: "debug file of another build",
    STATUS_NO_LIBDW: "libdw is not there",
}

MAX_JSON: Final = 4096
MAX_PAYLOAD: Final = 64 << 20
MAX_SEGMENTS: Final = 1 << 12
MAX_SYMBOLS: Final = 10 << 20
MAX_NAMES: Final = 256 << 20
MAX_ID: Final = 64
MAX_LINK: Final = NAME_LIMIT
MAX_ADDRESSES: Final = 1 << 20
MAX_CHAIN: Final = 256
"""Functions at one address."""

Read = Callable[[int], bytes]


class WireError(Exception):
    """The worker said something that cannot be."""


def failure(status: int) -> bytes:
    """A reply that carries nothing but why."""
    return REPLY.pack(MAGIC, status, 0, 0, 0, 0, 0, 0, 0)


def image_reply(image: Image) -> list[bytes]:
    """The reply to a parsed file, in pieces."""
    table = image.symbols
    header = REPLY.pack(
        MAGIC,
        STATUS_OK,
        len(image.segments),
        len(table),
        len(table.names),
        len(image.build_id),
        len(image.debuglink),
        int(image.symtab),
        image.debuglink_crc,
    )
    arrays = (image.segments, table.starts, table.ends, table.name_ends)
    return [
        header,
        *(array.tobytes() for array in arrays),
        table.names,
        image.build_id,
        image.debuglink,
    ]


def _header(read: Read) -> tuple[int, ...]:
    magic, *rest = REPLY.unpack(read(REPLY.size))
    if magic != MAGIC:
        raise WireError("no reply header")
    return tuple(rest)


def _u64(read: Read, count: int) -> U64:
    return np.frombuffer(read(count * 8), dtype=np.uint64)


def _ends(read: Read, count: int, total: int) -> U32:
    ends = np.frombuffer(read(count * 4), dtype=np.uint32)
    lengths = np.diff(ends.astype(np.int64), prepend=0)
    if (count and (int(ends[-1]) != total or int(np.min(lengths)) < 0)) or (not count and total):
        raise WireError("names out of bounds")
    if count and int(np.max(lengths)) > NAME_LIMIT + 8:
        raise WireError("a name past the limit")
    return ends


def read_image(read: Read) -> Image | int:
    """A reply to a file; an int is the status of a refused one. Raises WireError."""
    status, segments, symbols, names, build_id, link, symtab, crc = _header(read)
    if status != STATUS_OK:
        if status not in STATUS_WORDS or any((segments, symbols, names, build_id, link)):
            raise WireError("unknown status")
        return status
    bounds = ((segments, MAX_SEGMENTS), (symbols, MAX_SYMBOLS), (names, MAX_NAMES))
    if any(size > limit for size, limit in (*bounds, (build_id, MAX_ID), (link, MAX_LINK))):
        raise WireError("a size past the limit")
    table_segments = _u64(read, segments * SEGMENT_COLUMNS).reshape(-1, SEGMENT_COLUMNS)
    starts, ends = _u64(read, symbols), _u64(read, symbols)
    if symbols and (bool((starts[1:] <= starts[:-1]).any()) or bool((ends <= starts).any())):
        raise WireError("symbols out of order")
    name_ends = _ends(read, symbols, names)
    table = SymbolTable(starts, ends, name_ends, read(names))
    identity, target = read(build_id), read(link)
    if b"/" in target or b"\0" in target or target in (b".", b".."):
        raise WireError("a debug link that is a path")
    return Image(table_segments, table, bool(symtab), identity, target, crc)


def names_payload(names: list[bytes]) -> bytes:
    """Names as a payload: their running ends, then their bytes."""
    ends = np.cumsum([len(name) for name in names], dtype=np.uint64).astype(np.uint32)
    return ends.tobytes() + b"".join(names)


def split_names(payload: bytes, count: int) -> list[bytes]:
    """The worker's side of `names_payload`."""
    ends = np.frombuffer(payload, dtype=np.uint32, count=count).tolist()
    return cut(payload[count * 4 :], ends)


def names_reply(names: list[bytes]) -> list[bytes]:
    """The reply to a request to demangle."""
    total = sum(map(len, names))
    return [
        REPLY.pack(MAGIC, STATUS_OK, 0, len(names), total, 0, 0, 0, 0),
        names_payload(names),
    ]


def read_names(read: Read, count: int) -> list[bytes]:
    """A reply of exactly `count` names. Raises WireError."""
    status, segments, symbols, total, build_id, link, _symtab, _crc = _header(read)
    if status != STATUS_OK or symbols != count or any((segments, build_id, link)):
        raise WireError("not the names that were asked for")
    if total > MAX_NAMES:
        raise WireError("a size past the limit")
    ends = _ends(read, count, total).tolist()
    return cut(read(total), ends)


def blobs_reply(head: bytes, body: bytes) -> list[bytes]:
    """The reply to a request about call frame information: what a section is, or its bytes."""
    return [REPLY.pack(MAGIC, STATUS_OK, 0, len(head), len(body), 0, 0, 0, 0), head, body]


def read_blobs(read: Read) -> tuple[bytes, bytes] | int:
    """A reply of two pieces of bytes; an int is the status of a refusal. Raises WireError."""
    status, segments, head, body, build_id, link, _symtab, _crc = _header(read)
    if any((segments, build_id, link)):
        raise WireError("not the bytes that were asked for")
    if status != STATUS_OK:
        if status not in STATUS_WORDS or head or body:
            raise WireError("unknown status")
        return status
    if head > MAX_JSON or body > MAX_PAYLOAD:
        raise WireError("a size past the limit")
    return read(head), read(body)


def links_reply(links: Links) -> list[bytes]:
    """The reply to a request for what a file says of others."""
    names = {"build_id": links.build_id.hex(), "alt_build_id": links.alt_build_id.hex()}
    head = json.dumps({"dwarf": links.dwarf, **names}).encode()
    return blobs_reply(head, links.debuglink + b"\0" + links.altlink)


def read_links(read: Read) -> Links | int:
    """A reply about a file's links; an int is the status of a refusal. Raises WireError."""
    answer = read_blobs(read)
    if isinstance(answer, int):
        return answer
    head, names = answer
    try:
        told = json.loads(head)
        build_id, alt = bytes.fromhex(told["build_id"]), bytes.fromhex(told["alt_build_id"])
        dwarf = told["dwarf"] is True
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise WireError("no links") from error
    debuglink, _, altlink = names.partition(b"\0")
    if max(len(build_id), len(alt)) > MAX_ID or max(len(debuglink), len(altlink)) > MAX_LINK:
        raise WireError("a size past the limit")
    if b"/" in debuglink or debuglink in (b".", b".."):
        raise WireError("a debug link that is a path")
    return Links(build_id, dwarf, debuglink, altlink, alt)


def chains_reply(chains: Sequence[Sequence[bytes]]) -> list[bytes]:
    """The reply to a request for the functions at addresses: names once, chains as their places."""
    names: dict[bytes, int] = {}
    places = [
        names.setdefault(name[:NAME_LIMIT], len(names))
        for chain in chains
        for name in chain[-MAX_CHAIN:]
    ]
    counts = np.array([min(len(chain), MAX_CHAIN) for chain in chains], dtype=np.uint32)
    total = sum(map(len, names))
    return [
        REPLY.pack(MAGIC, STATUS_OK, len(chains), len(names), total, len(places), 0, 0, 0),
        counts.tobytes(),
        np.array(places, dtype=np.uint32).tobytes(),
        names_payload(list(names)),
    ]


def read_chains(read: Read, count: int) -> tuple[list[list[int]], list[bytes]] | int:
    """A reply of exactly `count` chains: their places in the names, and the names.

    An int is the status of a refusal. Raises WireError.
    """
    status, chains, symbols, total, places, link, _symtab, _crc = _header(read)
    if status != STATUS_OK:
        if status not in STATUS_WORDS or any((chains, symbols, total, places)):
            raise WireError("unknown status")
        return status
    if chains != count or link or places > count * MAX_CHAIN or symbols > places:
        raise WireError("not the chains that were asked for")
    if total > MAX_NAMES or places > MAX_SYMBOLS:
        raise WireError("a size past the limit")
    counts = np.frombuffer(read(chains * 4), dtype=np.uint32)
    indices = np.frombuffer(read(places * 4), dtype=np.uint32)
    if int(counts.sum(dtype=np.uint64)) != places or bool((indices >= symbols).any()):
        raise WireError("chains out of bounds")
    name_ends = _ends(read, symbols, total).tolist()
    stops = np.cumsum(counts, dtype=np.int64)[:-1]
    split = [part.tolist() for part in np.split(indices, stops)] if count else []
    return split, cut(read(total), name_ends)
