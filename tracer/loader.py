"""Compile the probes with bcc, load them through bpf(2), attach them as BTF-typed tracepoints.

bcc compiles and owns the maps; the programs themselves are loaded here, because bcc cannot load
typed tracepoints, which cost half of its raw ones and give task storage for the wakee. Kernel
headers are not needed: bcc is pointed at the few that ship with the probes, and every structure
offset comes from the running kernel's BTF as a -D constant.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import latrace.probes

from . import bpf
from .btf import Btf
from .errors import HostError
from .options import Options

PROBES = Path(latrace.probes.__path__[0])

# In the order they are joined: bcc rewrites map accesses in the main file only.
SOURCES = (
    "latrace.h",
    "wait.h",
    "sample.h",
    "kernel.h",
    "books.h",
    "stack.h",
    "wait.bpf.c",
    "identity.bpf.c",
    "tasks.bpf.c",
)

# Constants of the probes ← fields of the running kernel. All must exist.
_OFFSETS = {
    "OFF_TASK_PID": ("task_struct", "pid"),
    "OFF_TASK_TGID": ("task_struct", "tgid"),
    "OFF_TASK_COMM": ("task_struct", "comm"),
    "OFF_TASK_REAL_PARENT": ("task_struct", "real_parent"),
    "OFF_TASK_START_TIME": ("task_struct", "start_time"),
    "OFF_TASK_STACK": ("task_struct", "stack"),
    "OFF_TASK_FLAGS": ("task_struct", "flags"),
    "OFF_TASK_ON_CPU": ("task_struct", "on_cpu"),
    "OFF_TASK_ON_RQ": ("task_struct", "on_rq"),
    "OFF_RUN_DELAY": ("task_struct", "sched_info.run_delay"),
    "OFF_PCOUNT": ("task_struct", "sched_info.pcount"),
    "OFF_LAST_QUEUED": ("task_struct", "sched_info.last_queued"),
    "OFF_SE_CFS_RQ": ("task_struct", "se.cfs_rq"),
    "OFF_CFS_RQ_RQ": ("cfs_rq", "rq"),
    "OFF_RQ_CLOCK": ("rq", "clock"),
    "OFF_CGROUP_KN": ("cgroup", "kn"),
    "OFF_CGROUP_ROOT": ("cgroup", "root"),
    "OFF_CGROUP_PARENT": ("cgroup", "self.parent"),
    "OFF_CSS_CGROUP": ("cgroup_subsys_state", "cgroup"),
    "OFF_KN_ID": ("kernfs_node", "id"),
    "OFF_ROOT_HIERARCHY": ("cgroup_root", "hierarchy_id"),
}
# Present on some kernels or machines only; the probes do without.
_OPTIONAL_OFFSETS = {
    "OFF_TASK_STATE": ("task_struct", "__state"),  # `state` before 2f064a59a11f (5.14)
    "OFF_TASK_PREEMPT_COUNT": ("task_struct", "thread_info.preempt_count"),  # arm64
    "OFF_REGS_SYSCALL": ("pt_regs", "orig_ax"),  # x86, as the next two
    "OFF_REGS_IP": ("pt_regs", "ip"),
    "OFF_REGS_FP": ("pt_regs", "bp"),
}

_TRACEPOINTS = {
    "lat_waking": "sched_waking",
    "lat_wakeup": "sched_wakeup",
    "lat_wakeup_new": "sched_wakeup_new",
    "lat_switch": "sched_switch",
    "lat_migrate": "sched_migrate_task",
    "lat_fork": "sched_process_fork",
    "lat_exec": "sched_process_exec",
    "lat_rename": "task_rename",
}
_ITERATORS = ("lat_iter_seed", "lat_iter_end")


def kernel_constants(btf: Btf) -> dict[str, int]:
    """The -D constants that describe the running kernel.

    Raises HostError naming the field when the kernel lacks one that the probes need.
    """
    constants: dict[str, int] = {}
    for name, (struct, field_name) in _OFFSETS.items():
        offset = btf.offset(struct, field_name)
        if offset is None:
            raise HostError(
                f"this kernel has no {struct}.{field_name}",
                hint="it was built without a scheduler option; see: latrace doctor",
            )
        constants[name] = offset
    for name, (struct, field_name) in _OPTIONAL_OFFSETS.items():
        if (offset := btf.offset(struct, field_name)) is not None:
            constants[name] = offset
    # fa2c3254d7cf (5.18) added prev_state, the state as the scheduler judged it.
    if btf.tracepoint_arguments("sched_switch") >= 4:
        constants["HAVE_PREV_STATE"] = 1
    count, queue = btf.per_cpu_offset("__preempt_count"), btf.per_cpu_offset("runqueues")
    if count is not None and queue is not None:
        constants["PREEMPT_COUNT_FROM_RQ"] = count - queue
    return constants


# One for each process, as far as these bytes go; the processes beyond share one.
_HISTOGRAMS, _HISTOGRAM_BYTES, _HISTOGRAMS_BYTES = 63, 30_272, 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """What is fixed when the probes are compiled."""

    ring_bytes: int
    histograms: int
    single_threads: bool = False
    cgroups: bool = False
    stacks: bool = True
    user_stacks: bool = True
    """False: kernel stacks alone, as on kernels without the tracepoint that user stacks need."""


def build_for(options: Options) -> Build:
    """What a trace of these targets needs."""
    several = options.children or options.comms or options.cgroups
    affordable = _HISTOGRAMS_BYTES // (possible_cpus() * _HISTOGRAM_BYTES)
    processes = len(options.pids) + len(options.tids)
    return Build(
        ring_bytes=options.ring_bytes,
        histograms=1 + max(1, min(_HISTOGRAMS if several else processes, _HISTOGRAMS, affordable)),
        single_threads=bool(options.tids),
        cgroups=bool(options.cgroups),
        stacks=options.stacks,
    )


def pid_max() -> int:
    """One more than the largest process id of this kernel."""
    return int(Path("/proc/sys/kernel/pid_max").read_text())


def possible_cpus() -> int:
    """How many CPUs the kernel may ever number."""
    text = Path("/sys/devices/system/cpu/possible").read_text().strip()
    return int(re.split(r"[-,]", text)[-1]) + 1


def import_bcc() -> Any:
    """bcc's BPF class.

    Raises HostError when bcc is missing, or is the unrelated package of the same name.
    """
    os.environ["BCC_KERNEL_SOURCE"] = str(PROBES)  # read when it compiles
    hint = "apt-get install python3-bpfcc (never `pip install bcc`: another project)"
    try:
        import bcc  # noqa: PLC0415 - it reads the variable, and may be missing
    except ImportError as error:
        raise HostError(
            f"bcc, which compiles the probes, is not installed ({error})", hint=hint
        ) from error
    if not hasattr(bcc, "BPF"):
        raise HostError(
            f"the `bcc` at {bcc.__file__} is not the BPF Compiler Collection", hint=hint
        )
    return bcc.BPF


@dataclass(slots=True)
class Probes:
    """The loaded programs and their maps. `attach()` starts them, `close()` frees everything."""

    module: Any
    build: Build
    programs: dict[str, int] = field(default_factory=dict)
    links: dict[str, int] = field(default_factory=dict)

    def map_fd(self, name: str) -> int:
        """File descriptor of one of the probes' maps."""
        fd: int = self.module[name.encode()].map_fd
        return fd

    def table(self, name: str) -> list[tuple[int, int]]:
        """A small map of integers, as pairs of key and value."""
        return [(key.value, value.value) for key, value in self.module[name.encode()].items()]

    def map_memory(self, name: str, size: int) -> mmap.mmap:
        """An array map as shared memory; `size` in bytes is rounded up to whole pages."""
        page = mmap.PAGESIZE
        return mmap.mmap(self.map_fd(name), -(-size // page) * page)

    def attach(self) -> None:
        """Attach every tracepoint program."""
        for name in self.programs:
            if name not in _ITERATORS:
                self.switch(name, on=True)

    def switch(self, name: str, *, on: bool) -> None:
        """Attach or detach one program that this build has; to the state it is in: nothing."""
        if on and name in self.programs and name not in self.links:
            self.links[name] = bpf.attach_tracepoint(self.programs[name])
        elif not on and name in self.links:
            os.close(self.links.pop(name))

    def detach(self) -> None:
        """Detach them all; maps and counters stay readable. Safe to call twice."""
        for name in list(self.links):
            self.switch(name, on=False)

    def close(self) -> None:
        """Free programs and maps. Safe to call twice."""
        self.detach()
        for program in self.programs.values():
            os.close(program)
        self.programs.clear()
        self.module.cleanup()


def load(btf: Btf, build: Build) -> Probes:
    """Compile and load the probes, without attaching them.

    Raises HostError when this host cannot: with the cause and what to do.
    """
    # Added by 0bf1af1b8e0d (6.17).
    user_stacks = build.stacks and build.user_stacks and btf.tracepoint("sched_exit_tp") is not None
    constants = kernel_constants(btf) | {
        "USER_STACKS": int(user_stacks),
        "PID_MAX": pid_max(),
        "NCPU": possible_cpus(),
        "NSLOT": build.histograms,
        "RING_PAGES": build.ring_bytes // mmap.PAGESIZE,
        "SINGLE_THREADS": int(build.single_threads),
        "CGROUPS": int(build.cgroups),
        "SELF_TGID": os.getpid(),
    }
    BPF = import_bcc()
    text = "".join(f'#line 1 "{name}"\n{(PROBES / name).read_text()}' for name in SOURCES)
    flags = [f"-D{name}={value}" for name, value in constants.items()]
    try:
        module = BPF(text=text.encode(), cflags=[*flags, f"-I{PROBES}", "-Wno-unused-function"])
    except Exception as error:
        raise HostError(
            f"bcc could not compile the probes or make their maps: {error}",
            hint="bcc printed the reason above; see: latrace doctor",
        ) from error
    probes = Probes(module, build)
    free = module[b"lat_free"]
    for number in range(1, build.histograms):
        free.push(free.Leaf(number))
    try:
        wanted = dict(_TRACEPOINTS)
        if build.cgroups:
            wanted["lat_cgroup_attach"] = "cgroup_attach_task"
        if user_stacks:
            wanted["lat_sched_exit"] = "sched_exit_tp"
        for name, tracepoint in wanted.items():
            _load_one(probes, name, btf.tracepoint(tracepoint), iterator=False)
        for name in _ITERATORS:
            _load_one(probes, name, btf.function("bpf_iter_task"), iterator=True)
    except BaseException:
        probes.close()
        raise
    return probes


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
            self._probes: Probes = load(Btf(), build_for(self._options))
            _give_back_memory()
        except BaseException as error:  # told by `result`
            self._error = error

    def result(self) -> Probes:
        """The probes, loaded and not attached. Raises what `load` raises."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._probes


def _load_one(probes: Probes, name: str, type_id: int | None, *, iterator: bool) -> None:
    if type_id is None:
        raise HostError(
            f"this kernel lacks the tracepoint or iterator that {name} attaches to",
            hint="latrace needs Linux 5.11 or newer with CONFIG_BPF_EVENTS; see: latrace doctor",
        )
    try:
        probes.programs[name] = bpf.load_program(
            name, probes.module.dump_func(name.encode()), attach_type_id=type_id, iterator=iterator
        )
    except bpf.VerifierError as error:
        raise HostError(
            f"the kernel refused the program {name}: {error.strerror}\n{error.log[-1500:]}",
            hint="see: latrace doctor; with this text it is worth a bug report",
        ) from error
