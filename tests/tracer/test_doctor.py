"""What the doctor finds on hosts made by hand, and what it says to a user without rights."""

from __future__ import annotations

import errno
import importlib
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from latrace.tracer import doctor
from latrace.tracer.commands.doctor import render_checks
from latrace.tracer.compile import TCP_TRACEPOINTS
from latrace.tracer.doctor import Check, Host, explain, explained, require_tracing, run_checks
from latrace.tracer.errors import HostError, LatraceError
from latrace.tracer.symbols import dwarf

ALL_CAPABILITIES = (1 << 41) - 1
LATRACE = (
    *(sys.executable, "-c"),
    "import sys; from latrace.tracer.cli import main; sys.exit(main())",
)
WHOLE_BTF = b"\x9f\xeb" + b"".join(
    f"\0btf_trace_{name}\0".encode() for name in ("sched_exit_tp", *TCP_TRACEPOINTS.values())
)
BPF_AND_PERFMON = 1 << 39 | 1 << 38


def make_host(
    root: Path,
    *,
    capabilities: int = ALL_CAPABILITIES,
    btf: bytes | None = WHOLE_BTF,
    lockdown: str | None = "[none] integrity confidentiality\n",
    schedstat: str | None = "100 200 3\n",
    kallsyms: str = "ffffffff81000000 T _text\nffffffff81000010 T next\n",
    pid_namespace: str = "pid:[4026531836]",
    os_release: str = 'ID=debian\nPRETTY_NAME="Debian GNU/Linux 12"\n',
) -> Host:
    """A host with everything, unless told otherwise."""
    files: dict[str, str | bytes | None] = {
        "proc/self/status": f"Name:\tpython3\nCapEff:\t{capabilities:016x}\n",
        "proc/self/schedstat": schedstat,
        "proc/self/maps": "7f0 r-xp 0 0:0 0 /usr/lib/libLLVM-14.so.1\n",
        "proc/self/mounts": "tracefs /sys/kernel/tracing tracefs rw 0 0\n",
        "proc/sys/kernel/kptr_restrict": "1\n",
        "proc/kallsyms": kallsyms,
        "sys/kernel/btf/vmlinux": btf,
        "sys/kernel/security/lockdown": lockdown,
        "etc/os-release": os_release,
    }
    for name, content in files.items():
        if content is not None:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
    (root / "proc/self/ns").mkdir()
    (root / "proc/self/ns/pid").symlink_to(pid_namespace)
    return Host(root)


def test_a_host_with_everything_may_trace(tmp_path: Path) -> None:
    host = make_host(tmp_path)
    require_tracing(host)
    looks = (
        doctor.check_privileges,
        doctor.check_namespace,
        doctor.check_lockdown,
        doctor.check_btf,
        doctor.check_books,
        doctor.check_user_stacks,
        doctor.check_retransmits,
        doctor.check_kernel_symbols,
    )
    assert {look(host).state for look in looks} == {"ok"}


def test_capabilities_count_not_the_user(tmp_path: Path) -> None:
    require_tracing(make_host(tmp_path, capabilities=BPF_AND_PERFMON))
    check = doctor.check_privileges(Host(tmp_path))
    assert check.state == "warn"
    assert "without CAP_SYS_ADMIN the cost of the probes is not measured" in check.meaning


def test_a_user_without_rights_is_told_the_exact_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(sys, "argv", ["/opt/nowhere/latrace", "attach", "--comm", "a b"])
    with pytest.raises(HostError, match="needs root") as caught:
        require_tracing(make_host(tmp_path, capabilities=0))
    assert caught.value.hint == "sudo /opt/nowhere/latrace attach --comm 'a b'"
    assert caught.value.exit_code == 3


def test_root_without_the_capability_is_told_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(HostError, match="root here lacks CAP_BPF") as caught:
        require_tracing(make_host(tmp_path, capabilities=1 << 38))
    assert "--cap-add BPF" in caught.value.hint


def test_lockdown_stops_tracing_only_when_confidential(tmp_path: Path) -> None:
    host = make_host(tmp_path, lockdown="none [integrity] confidentiality\n")
    require_tracing(host)
    assert doctor.check_lockdown(host).finding == "integrity"
    (tmp_path / "sys/kernel/security/lockdown").write_text("none integrity [confidentiality]\n")
    with pytest.raises(HostError, match="locked down") as caught:
        require_tracing(host)
    assert "lockdown=integrity" in caught.value.hint


def test_without_btf_the_kernel_option_is_named(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="No such file") as caught:
        require_tracing(make_host(tmp_path, btf=None))
    assert "CONFIG_DEBUG_INFO_BTF=y" in caught.value.hint
    assert doctor.check_user_stacks(Host(tmp_path)).state == "skip"
    assert doctor.check_retransmits(Host(tmp_path)).state == "skip"


def test_without_libdw_the_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dwarf, "LIBRARY", "libdw.so.none")
    check = doctor.check_inlined(make_host(tmp_path, os_release="ID=fedora\n"))
    assert (check.state, check.remedy) == ("warn", "sudo dnf install elfutils-libs")


def test_something_else_in_btfs_place_is_seen(tmp_path: Path) -> None:
    assert doctor.check_btf(make_host(tmp_path, btf=b"")).state == "fail"


def test_a_container_with_its_own_pids_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="PIDs of its own") as caught:
        require_tracing(make_host(tmp_path, pid_namespace="pid:[4026532500]"))
    assert "--pid=host" in caught.value.hint


@pytest.mark.parametrize("schedstat", [None, "0 0 0\n", ""])
def test_a_kernel_without_books_is_a_warning(tmp_path: Path, schedstat: str | None) -> None:
    check = doctor.check_books(make_host(tmp_path, schedstat=schedstat))
    assert check.state == "warn"
    assert "CONFIG_SCHED_INFO" in check.remedy


def test_hidden_kernel_symbols_are_a_warning(tmp_path: Path) -> None:
    zeros = "0000000000000000 T _text\n0000000000000000 T next\n"
    check = doctor.check_kernel_symbols(make_host(tmp_path, kallsyms=zeros))
    assert (check.state, check.finding) == ("warn", "hidden (kernel.kptr_restrict = 1)")


def test_a_kernel_without_the_tracepoint_of_slow_waits(tmp_path: Path) -> None:
    check = doctor.check_user_stacks(make_host(tmp_path, btf=b"\x9f\xeb\0other\0"))
    assert check.state == "warn"


def test_kernel_without_what_tells_whose_a_socket_is(tmp_path: Path) -> None:
    names = b"btf_trace_tcp_retransmit_skb\0btf_trace_tcp_retransmit_synack\0"
    check = doctor.check_retransmits(make_host(tmp_path, btf=b"\x9f\xeb\0" + names))
    assert (check.state, check.remedy) == ("warn", "Linux 5.19 or newer has it")
    assert check.finding == "not seen: this kernel has no inet_sock_set_state"


@pytest.mark.parametrize(
    ("os_release", "command"),
    [
        ("ID=debian\n", "sudo apt-get install python3-bpfcc"),
        ('ID="linuxmint"\nID_LIKE="ubuntu debian"\n', "sudo apt-get install python3-bpfcc"),
        ('ID="rocky"\nID_LIKE="rhel centos fedora"\n', "sudo dnf install python3-bcc"),
        ("ID=arch\n", "sudo pacman -S python-bcc"),
        ("ID=plan9\n", "install the Python bindings of iovisor's bcc from your distribution"),
    ],
)
def test_the_command_that_installs_bcc(tmp_path: Path, os_release: str, command: str) -> None:
    assert make_host(tmp_path, os_release=os_release).install_bcc() == command


def test_no_bcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bcc", None)  # import raises ModuleNotFoundError
    check = doctor.check_bcc(make_host(tmp_path))
    assert check.state == "fail"
    assert check.remedy == "sudo apt-get install python3-bpfcc"
    with pytest.raises(HostError, match="bcc"), explained(Host(tmp_path)):
        importlib.import_module("bcc")


def test_the_wrong_bcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    impostor = types.ModuleType("bcc")
    impostor.__file__ = "/home/u/.local/lib/bcc/__init__.py"
    monkeypatch.setitem(sys.modules, "bcc", impostor)
    check = doctor.check_bcc(make_host(tmp_path))
    assert check.state == "fail"
    assert "another project of the same name" in check.finding
    assert check.remedy.startswith("pip uninstall bcc && sudo apt-get")


def test_the_kernels_refusal_is_explained_and_a_bug_is_not(tmp_path: Path) -> None:
    host = make_host(tmp_path)
    refused = explain(OSError(errno.EPERM, "Operation not permitted"), host=host)
    assert isinstance(refused, HostError)
    assert "doctor" in refused.hint
    broken = explain(ImportError("no numpy", name="numpy"), host=host)
    assert isinstance(broken, LatraceError)
    assert broken.exit_code == 1
    assert "module numpy is missing" in broken.cause
    unnamed = explain(ImportError("numpy was built for another Python"), host=host)
    assert isinstance(unnamed, LatraceError)
    assert "None" not in unnamed.cause
    assert explain(OSError(errno.EINVAL, "Invalid argument"), host=host) is None
    with pytest.raises(OSError, match="Invalid argument"), explained(host):
        raise OSError(errno.EINVAL, "Invalid argument")


def test_code_that_others_can_write_is_found(tmp_path: Path) -> None:
    loose = tmp_path / "loose"
    loose.mkdir()
    loose.chmod(0o777)
    (loose / "inner").mkdir()
    assert doctor._writable_by_others([loose / "inner"]) in (loose, loose / "inner")
    assert doctor._writable_by_others([Path("/usr/bin")]) is None


def test_every_finding_says_what_to_do_and_fits_the_page() -> None:
    checks = run_checks()
    for check in checks:
        assert check.finding
        assert check.meaning
        assert bool(check.remedy) == (check.state in ("warn", "fail"))
    for verbose in (False, True):
        text = render_checks(checks, verbose=verbose, width=80, colour=False)
        assert max(len(line) for line in text.splitlines()) <= 80


def test_a_failure_ends_in_the_verdict() -> None:
    bad = Check(name="BTF", state="fail", finding="none\x1b[2J", meaning="types", remedy="boot")
    text = render_checks([bad], verbose=False, width=80, colour=False)
    assert "FAIL  BTF" in text
    assert "-> boot" in text
    assert "can not trace here" in text
    assert "\x1b" not in text


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give up root: sudo scripts/test")
@pytest.mark.parametrize("command", ["doctor", "attach", "run", "demo"])
def test_a_real_user_without_rights_gets_exit_3(command: str, tmp_path: Path) -> None:
    setpriv = shutil.which("setpriv")
    assert setpriv
    arguments = {"attach": ["--pid", "1"], "run": ["--", "true"]}.get(command, [])
    result = subprocess.run(
        [
            *(setpriv, "--reuid=65534", "--regid=65534", "--clear-groups"),
            # The one right that is kept is to read our code, wherever the checkout is.
            *("--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"),
            *(*LATRACE, command, *arguments),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert result.returncode == 3, result.stderr
    assert "needs root" in result.stderr
    assert "hint: sudo " in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give up a capability")
def test_a_real_root_without_the_capability_gets_exit_3() -> None:
    setpriv = shutil.which("setpriv")
    assert setpriv
    result = subprocess.run(
        [
            *(setpriv, "--bounding-set=-bpf,-sys_admin", "--inh-caps=-bpf,-sys_admin"),
            *(*LATRACE, "attach", "--pid", str(os.getppid())),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 3, result.stderr
    assert "root here lacks CAP_BPF" in result.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make a PID namespace")
def test_a_real_pid_namespace_gets_exit_3() -> None:
    unshare = shutil.which("unshare")
    assert unshare
    result = subprocess.run(
        [unshare, "--pid", "--fork", "--mount-proc", *LATRACE, "doctor", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 3, result.stderr
    document = json.loads(result.stdout)
    assert document["ok"] is False
    states = {check["name"]: check["state"] for check in document["checks"]}
    assert states["PIDs"] == "fail"
