"""C++ names by the C++ runtime's own `__cxa_demangle`, Rust names by `rust`.

The C++ runtime is on every host that has bcc (LLVM is written in C++), and it is the best kept
demangler there is; it runs in the worker, where a crash in it costs a name and nothing else.
"""

from __future__ import annotations

import ctypes
import signal
from typing import Final

from latrace.tracer.symbols.frames import NAME_LIMIT
from latrace.tracer.symbols.rust import demangle_rust

PREFIXES: Final = (b"_Z", b"_R")
"""How the names begin that are worth a request."""

_PLT = b"@plt"


class Demangler:
    """Turns mangled names into readable ones; loads the C++ runtime when made."""

    def __init__(self, *, deadly_after_s: float = 0.0) -> None:
        """`deadly_after_s`: CPU seconds after which a name ends the process (SIGPROF).

        A short C++ name can describe an endless one, and the C++ runtime can't be interrupted.
        """
        self._deadly_after_s = deadly_after_s
        self._demangle = None
        for library in ("libstdc++.so.6", "libc++abi.so.1"):
            try:
                # Not as an attribute: Python would mangle the name itself.
                function = ctypes.CDLL(library)["__cxa_demangle"]
            except (OSError, AttributeError):
                continue
            function.restype = ctypes.c_void_p
            function.argtypes = [
                ctypes.c_char_p,
                ctypes.c_void_p,
                ctypes.c_void_p,
                ctypes.POINTER(ctypes.c_int),
            ]
            self._demangle = function
            break
        self._free = ctypes.CDLL(None).free
        self._free.argtypes = [ctypes.c_void_p]
        self._free.restype = None

    def __call__(self, name: bytes) -> bytes:
        """The readable form, at most `NAME_LIMIT` bytes; the name itself when there is none."""
        if not self._deadly_after_s:
            return self._readable(name)
        signal.setitimer(signal.ITIMER_PROF, self._deadly_after_s)
        try:
            return self._readable(name)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)

    def _readable(self, name: bytes) -> bytes:
        stem, suffix = (name[: -len(_PLT)], _PLT) if name.endswith(_PLT) else (name, b"")
        rust = demangle_rust(stem.decode("ascii", "replace"))
        readable = rust.encode("utf-8", "replace") if rust is not None else self._cxx(stem)
        return name if readable is None else readable[:NAME_LIMIT] + suffix

    def _cxx(self, name: bytes) -> bytes | None:
        if self._demangle is None or not name.startswith(b"_Z"):
            return None
        status = ctypes.c_int()
        result = self._demangle(name, None, None, ctypes.byref(status))
        if not result:
            return None
        try:
            return ctypes.string_at(result)
        finally:
            self._free(result)
