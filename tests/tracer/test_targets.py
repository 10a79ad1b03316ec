"""From what the user names to ids and patterns, on a /proc made by hand and on the real one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from latrace.tracer.errors import HostError, NoTargetError, UsageError
from latrace.tracer.processes import descendants, processes, read_task
from latrace.tracer.records import PATTERNS
from latrace.tracer.targets import (
    Request,
    comm_matches,
    parse_ids,
    parse_names,
    resolve,
)

PF_KTHREAD = 0x0020_0000
OWN_PID = 4000

AddTask = Callable[..., None]


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """A /proc in the initial PID namespace, with cgroup mounts below it, and us in it."""
    root = tmp_path / "proc"
    (root / str(OWN_PID) / "ns").mkdir(parents=True)
    (root / "self").symlink_to(str(OWN_PID))
    (root / "self/ns/pid").symlink_to("pid:[4026531836]")
    lines = []
    for number, (kind, options) in enumerate(
        (("cgroup2", "rw"), ("cgroup", "rw,cpu,cpuacct"), ("cgroup", "rw,memory"))
    ):
        mount = tmp_path / "cg roups" / f"{number}"
        (mount / "shop/db").mkdir(parents=True)
        escaped = str(mount).replace(" ", "\\040")
        lines.append(f"3{number} 30 0:2{number} / {escaped} rw,relatime - {kind} {kind} {options}")
    (root / "self/mountinfo").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def add(proc: Path) -> AddTask:
    """Add a thread to the /proc of the test."""

    def add_task(
        tid: int,
        comm: str,
        *,
        tgid: int | None = None,
        ppid: int = 1,
        state: str = "S",
        kernel: bool = False,
        inner: tuple[int, ...] = (),
    ) -> None:
        leader = tgid is None or tgid == tid
        owner = tid if tgid is None else tgid
        flags = PF_KTHREAD if kernel else 0x400000
        stat = f"{tid} ({comm}) {state} {ppid} 1 1 0 -1 {flags} 0 0 0\n"
        ids = "\t".join(str(number) for number in (tid, *inner))
        status = f"Name:\t{comm!r}\nTgid:\t{owner}\nPid:\t{tid}\nNSpid:\t{ids}\n"
        # As in the kernel's /proc, a thread is found by its id too, though not listed.
        places = [proc / str(owner) / "task" / str(tid)]
        if leader:
            places.append(proc / str(tid))
        for place in places:
            place.mkdir(parents=True, exist_ok=True)
            (place / "stat").write_text(stat)
            (place / "status").write_text(status)

    add_task(OWN_PID, "latrace")
    return add_task


def test_a_process_becomes_its_pid_and_words(proc: Path, add: AddTask) -> None:
    add(812, "redis-server")
    for tid in (813, 814, 815):
        add(tid, "io", tgid=812)
    targets = resolve(Request(pids=(812,)), proc=proc)
    assert targets.pids == (812,)
    assert targets.description == "redis-server (pid 812, 4 threads)"
    assert targets.notes == ()


def test_several_targets_are_listed_once_each(proc: Path, add: AddTask) -> None:
    add(812, "redis-server")
    add(900, "node")
    targets = resolve(Request(pids=(812, 900), comms=("node",)), proc=proc)
    assert targets.pids == (812, 900)
    assert targets.comms == ("node",)
    assert targets.description == "2 processes (redis-server 812, node 900)"


def test_no_such_process_is_exit_4(proc: Path, add: AddTask) -> None:
    add(812, "redis-server")
    with pytest.raises(NoTargetError, match="no process 5") as caught:
        resolve(Request(pids=(5,)), proc=proc)
    assert caught.value.exit_code == 4
    assert "pgrep" in caught.value.hint


def test_a_zombie_has_ended(proc: Path, add: AddTask) -> None:
    add(812, "gone", state="Z")
    with pytest.raises(NoTargetError, match="has ended already"):
        resolve(Request(pids=(812,)), proc=proc)


def test_a_kernel_thread_is_refused_by_name(proc: Path, add: AddTask) -> None:
    add(14, "rcu_sched", kernel=True)
    with pytest.raises(UsageError, match="14 is the kernel thread rcu_sched"):
        resolve(Request(pids=(14,)), proc=proc)
    with pytest.raises(UsageError, match="kernel thread"):
        resolve(Request(tids=(14,)), proc=proc)


def test_latrace_never_traces_itself(proc: Path, add: AddTask) -> None:
    with pytest.raises(UsageError, match="latrace itself"):
        resolve(Request(pids=(OWN_PID,)), proc=proc)
    add(812, "latrace")  # another run of it may be traced
    assert [t.tid for t in resolve(Request(comms=("latrace",)), proc=proc).tasks] == [812]


def test_a_thread_given_as_a_process_tells_both_ways_out() -> None:
    script = (
        "import threading, sys\n"
        "t = threading.Thread(target=sys.stdin.read); t.start()\n"
        "print(t.native_id, flush=True); t.join()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        tid = int(child.stdout.readline())
        with pytest.raises(UsageError, match=f"{tid} is not a process but a thread of") as caught:
            resolve(Request(pids=(tid,)))
        assert f"--tid {tid}" in caught.value.hint
        assert f"--pid {child.pid}" in caught.value.hint
        targets = resolve(Request(tids=(tid,)))
        assert targets.tids == (tid,)
        assert f"(tid {tid} of pid {child.pid})" in targets.description
        child.communicate()


def test_a_containers_pid_is_found_when_the_host_has_none(proc: Path, add: AddTask) -> None:
    add(812, "redis-server", inner=(7,))
    targets = resolve(Request(pids=(7,)), proc=proc)
    assert targets.pids == (812,)
    assert "PID 7 does not exist on this host" in targets.notes[0]
    assert "PID 812 here" in targets.notes[0]


def test_the_hosts_own_pid_wins_over_a_containers(proc: Path, add: AddTask) -> None:
    add(7, "cron")
    add(812, "redis-server", inner=(7,))
    targets = resolve(Request(pids=(7,)), proc=proc)
    assert targets.pids == (7,)
    assert targets.notes == ()


def test_a_containers_pid_wins_over_a_kernel_thread_that_can_not_be_meant(
    proc: Path, add: AddTask
) -> None:
    add(7, "kworker/0:0", kernel=True)
    add(812, "redis-server", inner=(7,))
    targets = resolve(Request(pids=(7,)), proc=proc)
    assert targets.pids == (812,)
    assert "PID 7 is a kernel thread on this host" in targets.notes[0]


def test_an_ambiguous_containers_pid_lists_the_hosts_ids(proc: Path, add: AddTask) -> None:
    add(812, "redis-server", inner=(7,))
    add(900, "node", inner=(3, 7))
    with pytest.raises(UsageError, match=r"812 \(redis-server\), 900 \(node\)") as caught:
        resolve(Request(pids=(7,)), proc=proc)
    assert "--pid 812" in caught.value.hint


def test_a_containers_thread_is_found_by_its_inner_id(proc: Path, add: AddTask) -> None:
    add(812, "node", inner=(7,))
    add(815, "worker", tgid=812, inner=(9,))
    targets = resolve(Request(tids=(9,)), proc=proc)
    assert targets.tids == (815,)


def test_inside_a_container_with_its_own_pids_it_refuses(proc: Path, add: AddTask) -> None:
    add(812, "redis-server")
    (proc / "self/ns/pid").unlink()
    (proc / "self/ns/pid").symlink_to("pid:[4026532201]")
    with pytest.raises(HostError, match="inside a container") as caught:
        resolve(Request(pids=(812,)), proc=proc)
    assert caught.value.exit_code == 3
    assert "--pid=host" in caught.value.hint


def test_names_match_exactly_or_by_prefix(proc: Path, add: AddTask) -> None:
    add(812, "node")
    add(813, "nodemon")
    add(14, "node", kernel=True)
    exact = resolve(Request(comms=("node",)), proc=proc)
    assert [task.tid for task in exact.tasks] == [812]
    prefix = resolve(Request(comms=("node*",)), proc=proc)
    assert [task.tid for task in prefix.tasks] == [812, 813]
    assert prefix.comms == ("node*",)
    assert prefix.pids == ()


def test_a_name_nobody_has_is_exit_4(proc: Path, add: AddTask) -> None:
    add(812, "node")
    with pytest.raises(NoTargetError, match="no process is named redis"):
        resolve(Request(comms=("node", "redis")), proc=proc)


def test_a_name_longer_than_the_kernel_keeps_is_cut_and_said(proc: Path, add: AddTask) -> None:
    add(812, "a-very-long-pro")
    targets = resolve(Request(comms=("a-very-long-program-name",)), proc=proc)
    assert targets.comms == ("a-very-long-pro",)
    assert "15 bytes" in targets.notes[0]


@pytest.mark.parametrize("pattern", ["*node", "no?de", "[n]ode"])
def test_other_wildcards_are_refused(proc: Path, add: AddTask, pattern: str) -> None:
    add(812, "node")
    with pytest.raises(UsageError, match="only a trailing"):
        resolve(Request(comms=(pattern,)), proc=proc)


def test_children_are_all_descendants(proc: Path, add: AddTask) -> None:
    add(10, "init", ppid=0)
    add(20, "server", ppid=10)
    add(30, "worker", ppid=20)
    add(31, "ended", ppid=20, state="Z")
    add(40, "helper", ppid=30)
    add(50, "other", ppid=10)
    targets = resolve(Request(pids=(20,), children=True), proc=proc)
    assert targets.pids == (20, 30, 40)
    assert targets.children
    assert [task.tid for task in descendants({20}, proc=proc)] == [30, 40]


def test_children_never_include_ourselves(proc: Path, add: AddTask) -> None:
    add(20, "bash", ppid=1)
    add(OWN_PID, "latrace", ppid=20)
    add(30, "editor", ppid=20)
    assert resolve(Request(pids=(20,), children=True), proc=proc).pids == (20, 30)


def test_children_of_named_processes_are_taken_by_pid(proc: Path, add: AddTask) -> None:
    add(20, "make", ppid=1)
    add(30, "cc1", ppid=20)
    targets = resolve(Request(comms=("make",), children=True), proc=proc)
    assert targets.comms == ("make",)
    assert targets.pids == (30,)


def test_children_of_single_threads_make_no_sense(proc: Path, add: AddTask) -> None:
    add(812, "node")
    with pytest.raises(UsageError, match="--children"):
        resolve(Request(tids=(812,), children=True), proc=proc)


def test_nothing_to_trace_names_the_options(proc: Path) -> None:
    with pytest.raises(UsageError, match="nothing to trace") as caught:
        resolve(Request(), proc=proc)
    assert "--pid" in caught.value.hint


@pytest.mark.parametrize("name", ["shop", "/shop", "shop/"])
def test_a_cgroup_is_found_in_its_hierarchy(
    tmp_path: Path, proc: Path, add: AddTask, name: str
) -> None:
    add(812, "db")
    cpu = tmp_path / "cg roups/1/shop"
    (cpu / "db/cgroup.procs").write_text("812\n")
    targets = resolve(Request(cgroups=(name,)), proc=proc)
    assert targets.cgroups == (cpu,)  # the one with a process in it, or below it
    assert [task.tid for task in targets.tasks] == [812]
    assert targets.description == f"cgroup {cpu}: db (pid 812, 1 thread)"


def test_a_cgroup_directory_may_be_given(tmp_path: Path, proc: Path) -> None:
    unified = tmp_path / "cg roups/0/shop"
    targets = resolve(Request(cgroups=(str(unified),)), proc=proc)
    assert targets.cgroups == (unified,)
    assert f"no process is in cgroup {unified} yet" in targets.notes[0]


def test_a_cgroup_of_another_controller_is_refused(tmp_path: Path, proc: Path) -> None:
    with pytest.raises(UsageError, match="another controller"):
        resolve(Request(cgroups=(str(tmp_path / "cg roups/2/shop"),)), proc=proc)


@pytest.mark.parametrize("name", ["nope", "/nope", "../../proc", "/etc"])
def test_no_such_cgroup_is_exit_4(proc: Path, name: str) -> None:
    with pytest.raises(NoTargetError, match="no cgroup"):
        resolve(Request(cgroups=(name,)), proc=proc)


def test_hostile_names_can_not_steer_the_terminal(proc: Path, add: AddTask) -> None:
    add(812, "\x1b[2Jx) S (\n")
    task = read_task(812, proc=proc)
    assert task is not None
    assert task.comm == "\x1b[2Jx) S (\n"
    assert task.ppid == 1
    description = resolve(Request(pids=(812,)), proc=proc).description
    assert description.startswith(r"\x1b[2Jx) S (\n (pid 812")


@pytest.mark.parametrize("field", ["comms", "cgroups"])
def test_more_patterns_than_the_probes_compare_are_refused(proc: Path, field: str) -> None:
    names = tuple(f"name{number}" for number in range(PATTERNS + 1))
    request = Request(comms=names) if field == "comms" else Request(cgroups=names)
    with pytest.raises(UsageError, match=f"compare {PATTERNS} at most"):
        resolve(request, proc=proc)


def test_our_own_process_is_read_from_the_real_proc() -> None:
    task = read_task(os.getpid())
    assert task is not None
    assert (task.tgid, task.ppid) == (os.getpid(), os.getppid())
    assert not task.is_kernel
    assert task.inner_ids
    assert os.getpid() in {process.tid for process in processes()}


@pytest.mark.parametrize(
    ("text", "ids"), [("812", (812,)), ("812,813", (812, 813)), (" 812 , 812", (812,))]
)
def test_comma_lists_of_ids(text: str, ids: tuple[int, ...]) -> None:
    assert parse_ids(text, option="--pid") == ids


@pytest.mark.parametrize("text", ["", "0", "-1", "x", "1,,2", "1,", "99999999999", "²", "0x10"])
def test_what_is_no_id_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--pid"):
        parse_ids(text, option="--pid")


def test_comma_lists_of_names() -> None:
    assert parse_names("redis-server, node*", option="--comm") == ("redis-server", "node*")
    with pytest.raises(UsageError, match="--comm"):
        parse_names("a,,b", option="--comm")


def test_comm_matches() -> None:
    assert comm_matches("node", "node")
    assert not comm_matches("nodemon", "node")
    assert comm_matches("nodemon", "node*")
    assert comm_matches("anything", "*")
