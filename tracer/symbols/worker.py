"""The unprivileged child that parses ELF files and demangles: `python -m …worker SOCKET_FD`.

It starts with the tracer's rights, because the program may be installed where only root can read,
imports everything it will ever need, and then gives up every right: nobody's uid and gid, no
groups, no capabilities, no new privileges, no new files, processes or core dumps, bounded memory
and CPU time. After that it only answers requests about file descriptors that were opened for it.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import struct
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from latrace.tracer.symbols import wire
from latrace.tracer.symbols.demangle import Demangler
from latrace.tracer.symbols.dwarf import DwarfError, Libdw
from latrace.tracer.symbols.elf import ElfError, FdSource, read_image, read_links
from latrace.tracer.symbols.table import Image, merge
from latrace.tracer.unprivileged import drop_rights, limit_request
from latrace.tracer.unwinding.records import CfiError
from latrace.tracer.unwinding.sections import Place, compile_places, locate, read_places

MEMORY_LIMIT: Final = 2 << 30
"""Address space, in bytes: above what the largest accepted file needs."""
REQUEST_CPU_S: Final = 20
LIFETIME_CPU_S: Final = 3600
NAME_CPU_S: Final = 0.2
"""An honest name of the longest kind takes a hundredth of that."""
MAX_DEBUG_FILE: Final = 1 << 30
"""A debug file without a build id is read whole, for its checksum."""

MAX_FILES: Final = 2
"""That come with one request: DWARF, and what dwz put aside."""

_REHEARSED: Final = 4096
"""Bytes of a section."""

LIMITS: Final = {
    resource.RLIMIT_AS: MEMORY_LIMIT,
    resource.RLIMIT_CPU: LIFETIME_CPU_S,
    resource.RLIMIT_NOFILE: 16,
    resource.RLIMIT_FSIZE: 0,
    resource.RLIMIT_NPROC: 0,
    resource.RLIMIT_CORE: 0,
}


def rehearse(demangler: Demangler) -> None:
    """Do once what requests will ask for, on the interpreter's own file.

    numpy imports some of its parts at their first use, which ones differs between its versions;
    later nobody may be able to read them.
    """
    fd = os.open("/proc/self/exe", os.O_RDONLY)
    try:
        image = read_image(FdSource(fd))
        wire.image_reply(image)
        wire.links_reply(read_links(FdSource(fd)))
        merge(image.symbols, image.symbols)
        places, sections = _sections(fd)
        if places:
            # The first functions do: what the end cuts is left out.
            compile_places(places, sections[:_REHEARSED]).to_bytes()
    except (ElfError, CfiError):
        pass  # a wrapped interpreter; then only the first file is parsed more slowly
    finally:
        os.close(fd)
    wire.names_reply([demangler(b"_Z1fv")])
    wire.chains_reply([[b"f"]])


def _crc(fd: int) -> int:
    size = os.fstat(fd).st_size
    if size > MAX_DEBUG_FILE:
        raise ElfError("a debug file of absurd size")
    crc = offset = 0
    while piece := os.pread(fd, 1 << 20, offset):
        crc = zlib.crc32(piece, crc)
        offset += len(piece)
    return crc


def _belongs(fd: int, image: Image, request: dict[str, Any]) -> bool:
    build_id = bytes.fromhex(request["build_id"])
    return image.build_id == build_id if build_id else _crc(fd) == request["crc"]


def _sections(fd: int) -> tuple[list[Place], bytes]:
    source = FdSource(fd)
    places = locate(source)
    return places, read_places(source, places)


@contextmanager
def _no_new_files() -> Iterator[None]:
    """Let nothing be opened meanwhile: libdw looks for other files by the names that it reads."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _chains(libdw: Libdw, request: dict[str, Any], payload: bytes, fds: list[int]) -> list[bytes]:
    """The functions at addresses, if the file is of the build that is asked about."""
    if not libdw.available:
        return [wire.failure(wire.STATUS_NO_LIBDW)]
    if read_links(FdSource(fds[0])).build_id != bytes.fromhex(request["build_id"]):
        return [wire.failure(wire.STATUS_MISMATCH)]
    addresses = struct.unpack(f"={request['count']}Q", payload)
    alt = fds[1] if len(fds) > 1 else None
    with _no_new_files():
        return wire.chains_reply(libdw.chains(fds[0], addresses, alt=alt))


def _about_file(op: str, fd: int, request: dict[str, Any]) -> list[bytes]:
    if op == "links":
        return wire.links_reply(read_links(FdSource(fd)))
    if op == "section":
        places, sections = _sections(fd)
        fields = json.dumps([place.as_dict() for place in places]).encode() if places else b""
        return wire.blobs_reply(fields, sections)
    image = read_image(FdSource(fd))
    if op == "debug" and not _belongs(fd, image, request):
        return [wire.failure(wire.STATUS_MISMATCH)]
    return wire.image_reply(image)


def _answer(libdw: Libdw, request: dict[str, Any], payload: bytes, fds: list[int]) -> list[bytes]:
    """The reply to a request about a file, or about a section of one."""
    try:
        if request["op"] == "unwind":
            places = [Place.from_dict(fields) for fields in request["places"]]
            return wire.blobs_reply(b"", compile_places(places, payload).to_bytes())
        if request["op"] == "chains":
            return _chains(libdw, request, payload, fds)
        return _about_file(request["op"], fds[0], request)
    except MemoryError:
        return [wire.failure(wire.STATUS_LIMIT)]
    except OSError:
        return [wire.failure(wire.STATUS_IO)]
    except (
        ElfError,
        CfiError,
        DwarfError,
        struct.error,
        ValueError,
        IndexError,
        OverflowError,
        ArithmeticError,
    ):
        return [wire.failure(wire.STATUS_BAD_FILE)]


class _Server:
    def __init__(self, connection: socket.socket, demangler: Demangler, libdw: Libdw) -> None:
        self._connection = connection
        self._demangler = demangler
        self._libdw = libdw

    def _receive(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            piece = self._connection.recv(min(length - len(data), 1 << 20))
            if not piece:
                raise EOFError
            data += piece
        return bytes(data)

    def serve_one(self) -> bool:
        """Answer one request; False at the end of the stream."""
        first, fds, _flags, _address = socket.recv_fds(
            self._connection, wire.REQUEST.size, MAX_FILES
        )
        if not first:
            return False
        header = first + self._receive(wire.REQUEST.size - len(first))
        _magic, json_size, payload_size = wire.REQUEST.unpack(header)
        request = json.loads(self._receive(json_size))
        payload = self._receive(payload_size)
        limit_request(REQUEST_CPU_S)
        if request["op"] == "demangle":
            names = wire.split_names(payload, request["count"])
            reply = wire.names_reply([self._demangler(name) for name in names])
        else:
            reply = _answer(self._libdw, request, payload, fds)
        for fd in fds:
            os.close(fd)
        self._connection.sendall(b"".join(reply))
        return True


def main() -> int:
    """Serve until the tracer hangs up."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    demangler, libdw = Demangler(deadly_after_s=NAME_CPU_S), Libdw()
    rehearse(demangler)
    drop_rights(connection.fileno(), limits=LIMITS)
    server = _Server(connection, demangler, libdw)
    try:
        while server.serve_one():
            pass
    except (EOFError, ConnectionError):
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
