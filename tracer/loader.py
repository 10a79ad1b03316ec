"""Load the probes through bpf(2) and attach them as BTF-typed tracepoints.

bcc compiles; maps and programs are made here, because bcc cannot load typed tracepoints, which
cost half of its raw ones and give task storage for the wakee, and because what is compiled once
is kept: a second run needs neither the compiler nor the kernel's type information.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import threading
from dataclasses import dataclass, field, replace

from . import bpf, cache
from .btf import Btf, read_btf
from .compile import (
    ITERATORS,
    ON_CPU,
    TCP_TRACEPOINTS,
    compile_probes,
    pid_max,
    possible_cpus,
    sources,
)
from .compiled import Compiled, Map, Program, with_maps
from .errors import HostError
from .options import Options

_COUNT_SENT_AGAIN = ("lat_retransmit", "lat_synack")
SOCKET_PROGRAMS = frozenset({*TCP_TRACEPOINTS, "lat_sent", "lat_iter_sockets", "lat_iter_storage"})

# One for each process, as far as these bytes go; the processes beyond share one.
_COPIES_BYTES = 8 << 20  # a second's stacks, at the usual budget

_HISTOGRAMS, _HISTOGRAM_BYTES, _HISTOGRAMS_BYTES = 63, 30_336, 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """What is fixed when the probes are compiled."""

    ring_bytes: int
    histograms: int
    copies_bytes: int = mmap.PAGESIZE
    """The ring of stack copies."""
    single_threads: bool = False
    cgroups: bool = False
    stacks: bool = True
    without: frozenset[str] = frozenset()
    """Of `options.PARTS`."""
    sockets_only: bool = False
    """Load what sockets run, and none of what runs at each switch of the host."""
    must_see_tcp: bool = False
    user_stacks: bool = True
    """False: kernel stacks alone, as on kernels without the tracepoint that user stacks need."""


def build_for(options: Options) -> Build:
    """What a trace of these targets needs."""
    several = options.children or options.comms or options.cgroups
    affordable = _HISTOGRAMS_BYTES // (possible_cpus() * _HISTOGRAM_BYTES)
    processes = len(options.pids) + len(options.tids)
    return Build(
        ring_bytes=options.ring_bytes,
        copies_bytes=_COPIES_BYTES if options.stacks and options.user_copies else mmap.PAGESIZE,
        histograms=1 + max(1, min(_HISTOGRAMS if several else processes, _HISTOGRAMS, affordable)),
        single_threads=bool(options.tids),
        cgroups=bool(options.cgroups),
        stacks=options.stacks,
        without=options.without,
        sockets_only=options.all_sockets,
        must_see_tcp=options.must_see_tcp or options.all_sockets,
    )


@dataclass(slots=True)
class Probes:
    """The loaded programs and their maps. `attach()` starts them, `close()` frees everything."""

    build: Build
    maps: dict[str, int] = field(default_factory=dict)
    programs: dict[str, int] = field(default_factory=dict)
    links: dict[str, int] = field(default_factory=dict)

    def table(self, name: str) -> list[tuple[int, int]]:
        """A small hash map of u32 to u32, as pairs of key and value."""
        fd = self.maps[name]
        return [
            (int.from_bytes(key, "little"), int.from_bytes(value, "little"))
            for key in bpf.map_keys(fd, key_bytes=4)
            if (value := bpf.map_lookup(fd, key, value_bytes=4)) is not None
        ]

    def map_memory(self, name: str, size: int) -> mmap.mmap:
        """An array map as shared memory; `size` in bytes is rounded up to whole pages."""
        page = mmap.PAGESIZE
        return mmap.mmap(self.maps[name], -(-size // page) * page)

    def attach(self) -> None:
        """Attach every tracepoint program. (The clocks of `lat_on_cpu`: tracer/sampling.py.)"""
        for name in self.programs:
            if name not in ITERATORS and name != ON_CPU:
                self.switch(name, on=True)

    def switch(self, name: str, *, on: bool) -> None:
        """Attach or detach one program that this build has; to the state it is in: nothing."""
        if on and name in self.programs and name not in self.links:
            self.links[name] = bpf.attach_tracepoint(self.programs[name])
        elif not on and name in self.links:
            os.close(self.links.pop(name))

    def detach(self) -> None:
        """Detach them all; maps and counters stay readable. Safe to call twice.

        Those that count what is sent again come last. Where others trace too, the kernel waits for
        a grace period at each: the kernel's own counters must not run on meanwhile.
        """
        for name in sorted(self.links, key=lambda name: name in _COUNT_SENT_AGAIN):
            self.switch(name, on=False)

    def close(self) -> None:
        """Free programs and maps. Safe to call twice."""
        self.detach()
        for fds in (self.programs, self.maps):
            while fds:
                os.close(fds.popitem()[1])


def load(build: Build) -> Probes:
    """Compile the probes, or take them from the cache, and load them without attaching them.

    Raises HostError when this host cannot: with the cause and what to do.
    """
    switches = {
        "USER_STACKS": int(build.stacks and build.user_stacks),
        "PID_MAX": pid_max(),
        "NCPU": possible_cpus(),
        "SINGLE_THREADS": int(build.single_threads),
        "CGROUPS": int(build.cgroups),
        "CAUSES_SEEN": int("causes" not in build.without),
        "CULPRITS_SEEN": int("culprits" not in build.without),
        "INTERRUPTS_SEEN": int(not {"causes", "interrupts"} & build.without),
        "TCP_SEEN": int("tcp" not in build.without),
        "SLEEPS_SEEN": int("sleeps" not in build.without),
    }
    btf = read_btf()
    key = cache.key_of([sources().encode(), repr(switches).encode(), btf])
    if compiled := cache.find(key):
        try:
            return _load(compiled, build)
        except HostError:
            cache.forget(key)  # made by another compiler, say; what follows tells whose fault it is
    compiled = compile_probes(Btf(btf), switches)
    probes = _load(compiled, build)
    cache.keep(key, compiled)
    return probes


def _load(compiled: Compiled, build: Build) -> Probes:
    probes = Probes(build)
    entries = {
        "lat_hist": possible_cpus() * build.histograms,
        "lat_slots": build.histograms,
        "lat_free": build.histograms,
        "lat_ring": build.ring_bytes,
        "lat_copies": build.copies_bytes,
    }
    try:
        for each in compiled.maps:
            sized = replace(each, entries=entries.get(each.name, each.entries))
            if each.name == "lat_sockets":
                sized = replace(sized, flags=sized.flags | bpf.CLONED)
            probes.maps[each.name] = _create(sized)
        for number in range(1, build.histograms):
            bpf.map_update(probes.maps["lat_free"], None, struct.pack("<I", number))
        fds = list(probes.maps.values())
        for program in compiled.programs:
            if build.sockets_only and program.name not in SOCKET_PROGRAMS:
                continue
            try:
                probes.programs[program.name] = _load_program(program, fds)
            except HostError:
                if program.name != ON_CPU:  # waits are worth tracing without it
                    raise
        if build.must_see_tcp and "lat_retransmit" not in probes.programs:
            raise HostError(
                "this kernel does not tell of TCP retransmits: it lacks a tracepoint or a field",
                hint="Linux 5.19 or newer built with CONFIG_INET and BTF has them; waits can be"
                " traced all the same: latrace attach",
            )
    except BaseException:
        probes.close()
        raise
    return probes


def _create(each: Map) -> int:
    try:
        return bpf.create_map(each)
    except OSError as error:
        raise HostError(
            f"the kernel made no BPF map {each.name} of {each.entries:,} entries: {error.strerror}",
            hint="a smaller --ring-size needs less memory; see: latrace doctor",
        ) from error


def _load_program(program: Program, fds: list[int]) -> int:
    try:
        return bpf.load_program(
            program.name.partition(":")[0],
            with_maps(program.instructions, fds),
            attach_type_id=program.attach_type_id,
            iterator=program.iterator,
            program_type=program.program_type,
        )
    except bpf.VerifierError as error:
        raise HostError(
            f"the kernel refused the program {program.name}: {error.strerror}\n{error.log[-1500:]}",
            hint="see: latrace doctor; with this text it is worth a bug report",
        ) from error


def _give_back_memory() -> None:
    """Return what the compiler and the type information took: some 50 MB that nobody uses again."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc
        libc.malloc_trim(0)


class Loading:
    """Loads the probes on a thread: the compiler leaves Python free to import the rest."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="latrace-load")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._probes: Probes = load(build_for(self._options))
            _give_back_memory()
        except BaseException as error:  # told by `result`
            self._error = error

    def result(self) -> Probes:
        """The probes, loaded and not attached. Raises what `load` raises."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._probes
