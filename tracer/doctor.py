"""What this host can do: each thing that latrace needs, tried, with what to do about it.

`run_checks` is the whole list for `latrace doctor`. `require_tracing` is the cheap part that every
trace begins with, so that a missing right is one clear line and not a failure further in.
"""

from __future__ import annotations

import errno
import importlib
import os
import platform
import resource
import struct
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import latrace
from latrace.tracer.commands.console import command_line, program
from latrace.tracer.compile import TCP_TRACEPOINTS
from latrace.tracer.errors import HostError, LatraceError
from latrace.tracer.processes import in_initial_pid_namespace

State = Literal["ok", "warn", "fail", "skip"]

# include/uapi/linux/capability.h
_CAPABILITIES = {
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_ADMIN": 21,
    "CAP_SYSLOG": 34,
    "CAP_PERFMON": 38,
    "CAP_BPF": 39,
}
_BCC_PACKAGES = {
    "debian": "apt-get install python3-bpfcc",
    "ubuntu": "apt-get install python3-bpfcc",
    "fedora": "dnf install python3-bcc",
    "rhel": "dnf install python3-bcc",
    "suse": "zypper install python3-bcc",
    "opensuse": "zypper install python3-bcc",
    "arch": "pacman -S python-bcc",
}
_LIBDW_PACKAGES = {
    "debian": "apt-get install libdw1",
    "ubuntu": "apt-get install libdw1",
    "fedora": "dnf install elfutils-libs",
    "rhel": "dnf install elfutils-libs",
    "suse": "zypper install libdw1",
    "opensuse": "zypper install libdw1",
    "arch": "pacman -S libelf",
}
_TYPED_TRACEPOINT = "sched_switch"
_USER_STACK_TRACEPOINT = "sched_exit_tp"
_REFUSALS = {errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP}


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was looked at."""

    name: str
    state: State
    """`fail`: tracing can not work; `warn`: it works with less; `skip`: could not be tried."""
    finding: str
    """What was found, one line."""
    meaning: str
    """What it means for tracing."""
    remedy: str = ""
    """The exact next command or step; empty when there is nothing to do."""


@dataclass(frozen=True, slots=True)
class Host:
    """The host's /proc, /sys and /etc, below `root`."""

    root: Path = Path("/")

    def read(self, path: str) -> str | None:
        """The text of a file, its path given without the leading slash; None when unreadable."""
        try:
            return (self.root / path).read_text("utf-8", "replace")
        except OSError:
            return None

    def missing_capabilities(self) -> set[str]:
        """Those capabilities of interest that this process does not have in effect."""
        for line in (self.read("proc/self/status") or "").splitlines():
            if line.startswith("CapEff:"):
                held = int(line.split()[1], 16)
                return {name for name, bit in _CAPABILITIES.items() if not held >> bit & 1}
        return set(_CAPABILITIES)

    def may_trace(self) -> bool:
        """Whether the capabilities suffice to load the probes."""
        missing = self.missing_capabilities()
        return "CAP_SYS_ADMIN" not in missing or not {"CAP_BPF", "CAP_PERFMON"} & missing

    def install_bcc(self) -> str:
        """The command that installs bcc's Python bindings on this distribution."""
        otherwise = "install the Python bindings of iovisor's bcc from your distribution"
        return self._install(_BCC_PACKAGES, otherwise)

    def install_libdw(self) -> str:
        """The command that installs the reader of DWARF on this distribution."""
        return self._install(_LIBDW_PACKAGES, "install libdw (elfutils) from your distribution")

    def _install(self, packages: Mapping[str, str], otherwise: str) -> str:
        release = self.read("etc/os-release") or ""
        fields = dict(line.split("=", 1) for line in release.splitlines() if "=" in line)
        likes = [fields.get("ID", ""), *fields.get("ID_LIKE", "").strip('"').split()]
        for like in likes:
            if like.strip('"') in packages:
                return f"sudo {packages[like.strip(chr(34))]}"
        return otherwise


# --- for commands that are about to trace -------------------------------------------------------


def require_tracing(host: Host | None = None) -> None:
    """Raise `HostError` with cause and remedy when this host or user can not trace, as far as
    that can be told from a few files."""
    host = host or Host()
    for look in (check_privileges, check_namespace, check_lockdown, check_btf):
        check = look(host)
        if check.state == "fail":
            raise HostError(check.finding, hint=check.remedy)


def explain(error: BaseException, *, host: Host | None = None) -> LatraceError | None:
    """What `error`, met while the probes were loaded, says of this host; None: it is a bug."""
    host = host or Host()
    if isinstance(error, ImportError):
        if error.name and error.name.partition(".")[0] == "bcc":
            return HostError(
                f"bcc, which compiles the probes, can not be imported ({error})",
                hint=host.install_bcc(),
            )
        module = f"the Python module {error.name}" if error.name else "a Python module"
        return LatraceError(
            f"{module} is missing or broken ({error})",
            hint="install latrace again: scripts/quickstart",
        )
    if isinstance(error, OSError) and error.errno in _REFUSALS:
        where = f" ({error.filename})" if error.filename else ""
        return HostError(
            f"the kernel refused what tracing needs: {error.strerror}{where}",
            hint=f"{sudo(program())} doctor tells what is missing",
        )
    return None


@contextmanager
def explained(host: Host | None = None) -> Iterator[None]:
    """Turn what `explain` knows into its words; let everything else pass as it is."""
    try:
        yield
    except LatraceError:
        raise
    except (ImportError, OSError) as error:
        told = explain(error, host=host)
        if told is None:
            raise
        raise told from error


def sudo(command: str) -> str:
    """`command` as it must be typed to have root's rights."""
    return command if os.geteuid() == 0 else f"sudo {command}"


# --- the checks ---------------------------------------------------------------------------------


def run_checks(host: Host | None = None) -> list[Check]:
    """All checks, in the order in which a trace would meet what they look at."""
    host = host or Host()
    looks: list[Callable[[Host], Check]] = [
        check_privileges,
        check_namespace,
        check_lockdown,
        check_btf,
        check_bcc,
        check_compiler,
        check_bpf,
        check_books,
        check_user_stacks,
        check_retransmits,
        check_kernel_symbols,
        check_inlined,
        check_memlock,
        check_tracefs,
        check_python,
        check_installation,
    ]
    return [look(host) for look in looks]


def check_privileges(host: Host) -> Check:
    """Root, or the capabilities that loading and reading need."""
    name, meaning = "privileges", "loading probes into the kernel is for root"
    missing = host.missing_capabilities()
    if not host.may_trace():
        if os.geteuid() != 0:
            return Check(
                name=name,
                state="fail",
                finding="tracing needs root, or CAP_BPF and CAP_PERFMON",
                meaning=meaning,
                remedy=f"sudo {command_line()}",
            )
        lacking = sorted({"CAP_BPF", "CAP_PERFMON"} & missing)
        return Check(
            name=name,
            state="fail",
            finding=f"root here lacks {' and '.join(lacking)}",
            meaning="a container or a service manager has taken these capabilities away",
            remedy="run on the host, or grant them: docker run --cap-add BPF --cap-add PERFMON",
        )
    effects = {
        "CAP_SYS_ADMIN": "the cost of the probes is not measured",
        "CAP_SYS_PTRACE": "other users' programs have no symbols",
        "CAP_SYSLOG": "kernel frames may have no names",
    }
    losses = [f"without {cap} {effects[cap]}" for cap in effects if cap in missing]
    if losses:
        return Check(
            name=name,
            state="warn",
            finding=f"may trace, but without {', '.join(c for c in effects if c in missing)}",
            meaning="; ".join(losses),
            remedy="run as root, or grant these too",
        )
    return Check(name=name, state="ok", finding="all capabilities needed", meaning=meaning)


def check_namespace(host: Host) -> Check:
    """Whether our PIDs are the kernel's."""
    name = "PIDs"
    if in_initial_pid_namespace(proc=host.root / "proc"):
        return Check(
            name=name,
            state="ok",
            finding="the host's own",
            meaning="the PIDs that you see are those that the probes see",
        )
    return Check(
        name=name,
        state="fail",
        finding="this is a container with PIDs of its own; the probes see the host's",
        meaning="a PID given here would name another process, or none",
        remedy="run latrace on the host, or start the container with --pid=host",
    )


def check_lockdown(host: Host) -> Check:
    """The kernel's lockdown mode (kernel_lockdown(7))."""
    name, modes = "lockdown", host.read("sys/kernel/security/lockdown")
    mode = next((word.strip("[]") for word in (modes or "").split() if word[0] == "["), "none")
    if mode == "confidentiality":
        return Check(
            name=name,
            state="fail",
            finding="the kernel is locked down (confidentiality): BPF may not read its memory",
            meaning="nobody, root included, may look into this kernel",
            remedy="boot with lockdown=integrity, or without Secure Boot's confidentiality mode",
        )
    known = mode if modes is not None else "none (no lockdown file)"
    return Check(name=name, state="ok", finding=known, meaning="BPF may read kernel memory")


def check_btf(host: Host) -> Check:
    """The kernel's own type information."""
    name, path = "BTF", host.root / "sys/kernel/btf/vmlinux"
    meaning = "the layout of the kernel's structures; no kernel headers are needed"
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            magic = stream.read(2)
    except OSError as error:
        return Check(
            name=name,
            state="fail",
            finding=f"this kernel tells no types: {path}: {error.strerror}",
            meaning=meaning,
            remedy="boot a kernel built with CONFIG_DEBUG_INFO_BTF=y (large distributions' are)",
        )
    if magic not in (struct.pack("<H", 0xEB9F), struct.pack(">H", 0xEB9F)):
        return Check(
            name=name,
            state="fail",
            finding=f"{path} is not BTF",
            meaning=meaning,
            remedy="is something mounted over /sys/kernel/btf?",
        )
    return Check(name=name, state="ok", finding=f"{size / 1e6:.1f} MB", meaning=meaning)


def check_bcc(host: Host) -> Check:
    """bcc's Python bindings, and that they are bcc's."""
    name = "bcc"
    meaning = "it compiles the probes; it must be the distribution's for the system Python"
    try:
        bcc = importlib.import_module("bcc")
    except (ImportError, OSError) as error:
        return Check(
            name=name,
            state="fail",
            finding=f"can not be imported: {error}",
            meaning=meaning,
            remedy=host.install_bcc(),
        )
    if not hasattr(bcc, "BPF"):
        return Check(
            name=name,
            state="fail",
            finding=f"{bcc.__file__} is another project of the same name",
            meaning=meaning,
            remedy=f"pip uninstall bcc && {host.install_bcc()}",
        )
    version = getattr(bcc, "__version__", "of unknown version")
    return Check(name=name, state="ok", finding=f"{version} in {_folder(bcc)}", meaning=meaning)


def check_compiler(host: Host) -> Check:
    """The LLVM that bcc has brought along."""
    name, meaning = "LLVM", "bcc compiles with it, in this process"
    if "bcc" not in sys.modules:
        return _skipped(name, meaning, "bcc is missing")
    mapped = host.read("proc/self/maps") or ""
    files = {Path(line.split()[-1]).name for line in mapped.splitlines() if ".so" in line}
    found = sorted(file for file in files if file.startswith(("libLLVM", "libclang")))
    if found:
        return Check(name=name, state="ok", finding=", ".join(found), meaning=meaning)
    return Check(name=name, state="ok", finding="built into libbcc", meaning=meaning)


def check_bpf(host: Host) -> Check:
    """bpf(2) itself: a map, and a typed tracepoint program that is loaded and attached."""
    name = "bpf(2)"
    meaning = "a tiny map and a typed tracepoint program were loaded, attached and freed again"
    if not host.may_trace():
        return _skipped(name, meaning, "needs root")
    from latrace.tracer import bpf  # noqa: PLC0415 - only here
    from latrace.tracer.btf import Btf, read_btf  # noqa: PLC0415

    return_zero = struct.pack("<QQ", 0xB7, 0x95)  # r0 = 0; exit
    try:
        type_id = Btf(read_btf()).tracepoint(_TYPED_TRACEPOINT)
        if type_id is None:
            return Check(
                name=name,
                state="fail",
                finding=f"this kernel's BTF has no tracepoint {_TYPED_TRACEPOINT}",
                meaning=meaning,
                remedy="boot a kernel with CONFIG_TRACEPOINTS and CONFIG_BPF_EVENTS",
            )
        program_fd = bpf.load_program(
            "lat_doctor", return_zero, attach_type_id=type_id, iterator=False
        )
        try:
            os.close(bpf.attach_tracepoint(program_fd))
        finally:
            os.close(program_fd)
    except HostError as error:
        return Check(
            name=name, state="fail", finding=error.cause, meaning=meaning, remedy=error.hint
        )
    except OSError as error:
        return Check(
            name=name,
            state="fail",
            finding=f"the kernel refused it: {error.strerror}",
            meaning=meaning,
            remedy="a seccomp filter or a security module forbids it: run on the host itself",
        )
    return Check(name=name, state="ok", finding="typed tracepoints load", meaning=meaning)


def check_books(host: Host) -> Check:
    """Whether the scheduler times waits itself (CONFIG_SCHED_INFO)."""
    name = "kernel's books"
    meaning = "the scheduler's own count of waiting time, against which every capture is checked"
    numbers = (host.read("proc/self/schedstat") or "").split()
    if len(numbers) == 3 and any(int(number) for number in numbers[1:]):
        return Check(name=name, state="ok", finding="kept (task->sched_info)", meaning=meaning)
    return Check(
        name=name,
        state="warn",
        finding="this kernel does not time waits itself",
        meaning="captures can not be checked against the kernel: coverage is not known",
        remedy="boot a kernel with CONFIG_SCHED_INFO (CONFIG_SCHEDSTATS or _TASK_DELAY_ACCT)",
    )


def _missing_tracepoints(host: Host, names: Iterable[str]) -> list[str] | None:
    """Which of these the kernel has no type for; None: it has none at all."""
    try:
        raw = (host.root / "sys/kernel/btf/vmlinux").read_bytes()
    except OSError:
        return None
    return [name for name in names if f"\0btf_trace_{name}\0".encode() not in raw]


def check_user_stacks(host: Host) -> Check:
    """The tracepoint that runs in the thread that has just waited."""
    name = "stacks of waits"
    meaning = "a slow wait's own stack is taken when the thread runs again"
    missing = _missing_tracepoints(host, [_USER_STACK_TRACEPOINT])
    if missing is None:
        return _skipped(name, meaning, "there is no BTF")
    if not missing:
        return Check(name=name, state="ok", finding="kernel and user frames", meaning=meaning)
    return Check(
        name=name,
        state="warn",
        finding=f"kernel frames only: this kernel has no {_USER_STACK_TRACEPOINT}",
        meaning="a preempted thread's slow wait shows no frames of the program itself",
        remedy="Linux 6.17 or newer has it",
    )


def check_retransmits(host: Host) -> Check:
    """The tracepoints that tell of lost TCP segments and of whose sockets they are."""
    name = "retransmits"
    meaning = "segments that TCP sent again, with the owner of the socket"
    missing = _missing_tracepoints(host, TCP_TRACEPOINTS.values())
    if missing is None:
        return _skipped(name, meaning, "there is no BTF")
    if not missing:
        return Check(name=name, state="ok", finding="seen, with their owner", meaning=meaning)
    return Check(
        name=name,
        state="warn",
        finding=f"not seen: this kernel has no {missing[0]}",
        meaning="waits that a lost TCP segment lengthened look like any other",
        remedy="Linux 5.19 or newer has it",
    )


def check_kernel_symbols(host: Host) -> Check:
    """Whether /proc/kallsyms shows addresses to us."""
    name, meaning = "kernel symbols", "names for the kernel's frames in stacks"
    if not host.may_trace():
        return _skipped(name, meaning, "needs root")
    try:
        with (host.root / "proc/kallsyms").open("rb") as stream:
            first = stream.read(1 << 16)
    except OSError:
        first = b""
    if any(int(line.split()[0], 16) for line in first.splitlines()[:-1] if line):
        return Check(name=name, state="ok", finding="readable", meaning=meaning)
    setting = (host.read("proc/sys/kernel/kptr_restrict") or "?").strip()
    return Check(
        name=name,
        state="warn",
        finding=f"hidden (kernel.kptr_restrict = {setting})",
        meaning="kernel frames are shown without names",
        remedy=sudo("sysctl kernel.kptr_restrict=1"),
    )


def check_inlined(host: Host) -> Check:
    """Whether libdw is there, which reads DWARF."""
    from latrace.tracer.symbols.dwarf import Libdw  # noqa: PLC0415 - its package takes numpy

    name, meaning = "inlined code", "`latrace flame --inlines` shows them where there is DWARF"
    if Libdw().available:
        return Check(name=name, state="ok", finding="found by libdw", meaning=meaning)
    return Check(
        name=name,
        state="warn",
        finding="not shown: there is no libdw",
        meaning="`latrace flame --inlines` draws the graph without them",
        remedy=host.install_libdw(),
    )


def check_memlock(_host: Host) -> Check:
    """RLIMIT_MEMLOCK, which kernels before memory-cgroup accounting charge for maps."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    shown = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft >> 10} KiB"
    return Check(
        name="locked memory",
        state="ok",
        finding=f"limit {shown}",
        meaning="since Linux 5.11 maps are charged to the memory cgroup instead",
    )


def check_tracefs(host: Host) -> Check:
    """Whether tracefs is mounted: it need not be."""
    mounted = " tracefs " in (host.read("proc/self/mounts") or "")
    return Check(
        name="tracefs",
        state="ok",
        finding="mounted" if mounted else "not mounted",
        meaning="latrace does not need it",
    )


def check_python(_host: Host) -> Check:
    """The interpreter, and whether it sees the distribution's modules."""
    version = platform.python_version()
    meaning = "it must be the system's Python, or a virtual environment of it that sees its modules"
    if sys.prefix == sys.base_prefix:
        return Check(name="Python", state="ok", finding=f"{version}, the system's", meaning=meaning)
    settings = Path(sys.prefix, "pyvenv.cfg").read_text("utf-8", "replace").lower()
    sees = any(
        line.replace(" ", "") == "include-system-site-packages=true"
        for line in settings.splitlines()
    )
    if sees:
        finding = f"{version}, a virtual environment in {sys.prefix}"
        return Check(name="Python", state="ok", finding=finding, meaning=meaning)
    return Check(
        name="Python",
        state="warn",
        finding=f"{version}, a virtual environment that does not see the system's modules",
        meaning=meaning,
        remedy="/usr/bin/python3 -m venv --system-site-packages DIR",
    )


def check_installation(_host: Host) -> Check:
    """Whether others can write the code that root runs."""
    name = "installation"
    folder = Path(__file__).resolve().parent
    meaning = "what sudo runs must not be writable by anybody else"
    loose = _writable_by_others([folder, Path(sys.executable), Path(sysconfig.get_path("purelib"))])
    checkout = next((above for above in folder.parents if (above / ".git").exists()), None)
    if checkout is not None:
        return Check(
            name=name,
            state="warn",
            finding=f"a development checkout at {checkout}",
            meaning=meaning + (f"; {loose} is" if loose else ""),
            remedy="for daily use install it under /opt/latrace: scripts/quickstart",
        )
    if loose:
        return Check(
            name=name,
            state="warn",
            finding=f"{loose} can be written by others than root",
            meaning=meaning,
            remedy="install it under /opt/latrace: scripts/quickstart",
        )
    return Check(
        name=name,
        state="ok",
        finding=f"latrace {latrace.__version__} in {folder}, root's alone",
        meaning=meaning,
    )


def _writable_by_others(places: list[Path]) -> Path | None:
    """The first of `places`, or of the folders above them, that not only root can write."""
    for place in places:
        for path in (place.resolve(), *place.resolve().parents):
            info = path.stat()
            sticky = info.st_mode & 0o1000
            if info.st_uid != 0 or (info.st_mode & 0o022 and not sticky):
                return path
    return None


def _skipped(name: str, meaning: str, why: str) -> Check:
    return Check(name=name, state="skip", finding=f"not tried: {why}", meaning=meaning)


def _folder(module: object) -> str:
    file = getattr(module, "__file__", None)
    return str(Path(file).parent) if file else "?"
