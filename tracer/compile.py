"""Compile the probes with bcc: from C, and the running kernel's own type information.

Kernel headers are not needed: bcc is pointed at the few that ship with the probes, and every
structure offset comes from the kernel's BTF as a -D constant.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import latrace.probes

from . import bpf
from .btf import Btf
from .compiled import Compiled, Program, with_maps, with_parts
from .errors import HostError

PROBES = Path(latrace.probes.__path__[0])

# In the order they are joined: bcc rewrites map accesses in the main file only.
SOURCES = (
    "latrace.h",
    "wait.h",
    "sample.h",
    "sleep.h",
    "kernel.h",
    "books.h",
    "stack.h",
    "causes.h",
    "sleep.bpf.c",
    "wait.bpf.c",
    "slices.bpf.c",
    "parts.bpf.c",
    "irq.bpf.c",
    "identity.bpf.c",
    "oncpu.bpf.c",
    "tasks.bpf.c",
    "tcp.bpf.c",
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
    "OFF_TASK_CPU": ("task_struct", "thread_info.cpu"),
    "OFF_TASK_POLICY": ("task_struct", "policy"),
    "OFF_TASK_PRIO": ("task_struct", "prio"),
    "OFF_TASK_ON_RQ": ("task_struct", "on_rq"),
    "OFF_RUN_DELAY": ("task_struct", "sched_info.run_delay"),
    "OFF_PCOUNT": ("task_struct", "sched_info.pcount"),
    "OFF_LAST_QUEUED": ("task_struct", "sched_info.last_queued"),
    "OFF_SE_CFS_RQ": ("task_struct", "se.cfs_rq"),
    "OFF_CFS_RQ_RQ": ("cfs_rq", "rq"),
    "OFF_RQ_CLOCK": ("rq", "clock"),
    "OFF_RQ_CURR": ("rq", "curr"),
    "OFF_CGROUP_KN": ("cgroup", "kn"),
    "OFF_CGROUP_ROOT": ("cgroup", "root"),
    "OFF_CGROUP_PARENT": ("cgroup", "self.parent"),
    "OFF_CSS_CGROUP": ("cgroup_subsys_state", "cgroup"),
    "OFF_KN_ID": ("kernfs_node", "id"),
    "OFF_ROOT_HIERARCHY": ("cgroup_root", "hierarchy_id"),
    "OFF_SAMPLE_PERIOD": ("bpf_perf_event_data", "sample_period"),
}
# Present on some kernels or machines only; the probes do without.
_OPTIONAL_OFFSETS = {
    "OFF_TASK_STATE": ("task_struct", "__state"),  # `state` before 2f064a59a11f (5.14)
    "OFF_TASK_PREEMPT_COUNT": ("task_struct", "thread_info.preempt_count"),  # arm64
    "OFF_TASK_CPUS": ("task_struct", "cpus_ptr"),
    "OFF_RQ_IDLE": ("rq", "idle"),
    "OFF_RQ_CLOCK_IDLE": ("rq", "clock_idle"),  # since 5.19
    "OFF_TASK_GROUP": ("task_struct", "sched_task_group"),  # CONFIG_CGROUP_SCHED
    "OFF_TG_CGROUP": ("task_group", "css.cgroup"),
    "OFF_TG_PARENT": ("task_group", "parent"),
    "OFF_TG_CFS_RQ": ("task_group", "cfs_rq"),
    "OFF_CFS_RQ_TG": ("cfs_rq", "tg"),
    "OFF_CFS_RQ_THROTTLED": ("cfs_rq", "throttled"),  # CONFIG_CFS_BANDWIDTH
    "OFF_CFS_RQ_THROTTLED_SELF": ("cfs_rq", "throttled_clock_self"),
    "OFF_CFS_RQ_THROTTLED_SELF_TIME": ("cfs_rq", "throttled_clock_self_time"),
    "OFF_TASK_THROTTLED": ("task_struct", "throttled"),  # quota by task (6.18)
    "OFF_REGS_SYSCALL": ("pt_regs", "orig_ax"),  # x86, as the next one
    "OFF_REGS_IP": ("pt_regs", "ip"),
}

# What sleep calls are told by: all of them, or sleep calls are not taken apart.
_SLEEP_OFFSETS = {
    "OFF_TASK_TI_FLAGS": ("task_struct", "thread_info.flags"),
    "OFF_TIMER_EXPIRES": ("hrtimer", "node.expires"),
    "OFF_TIMER_SOFT": ("hrtimer", "_softexpires"),
    "OFF_TIMER_FUNCTION": ("hrtimer", "function"),
    "OFF_TIMER_BASE": ("hrtimer", "base"),
    "OFF_SLEEPER_TASK": ("hrtimer_sleeper", "task"),
    "OFF_BASE_OFFSET": ("hrtimer_clock_base", "offset"),
    "OFF_BASE_CLOCK": ("hrtimer_clock_base", "clockid"),
    "OFF_TIMERFD_INTERVAL": ("timerfd_ctx", "tintv"),
    "OFF_REGS_SYSCALL": ("pt_regs", "orig_ax"),
    "OFF_REGS_IP": ("pt_regs", "ip"),
    "OFF_REGS_RET": ("pt_regs", "ax"),
    "OFF_REGS_ARG0": ("pt_regs", "di"),
    "OFF_REGS_ARG1": ("pt_regs", "si"),
    "OFF_REGS_ARG2": ("pt_regs", "dx"),
    "OFF_REGS_ARG3": ("pt_regs", "r10"),
    "OFF_REGS_ARG4": ("pt_regs", "r8"),
}

# What retransmits are told by: all of them, or they are not traced.
_TCP_OFFSETS = {
    "OFF_SK_FAMILY": ("sock", "__sk_common.skc_family"),
    "OFF_SK_STATE": ("sock", "__sk_common.skc_state"),
    "OFF_SK_NUM": ("sock", "__sk_common.skc_num"),
    "OFF_SK_DPORT": ("sock", "__sk_common.skc_dport"),
    "OFF_SK_SADDR": ("sock", "__sk_common.skc_rcv_saddr"),
    "OFF_SK_DADDR": ("sock", "__sk_common.skc_daddr"),
    "OFF_SK_SADDR6": ("sock", "__sk_common.skc_v6_rcv_saddr"),
    "OFF_SK_DADDR6": ("sock", "__sk_common.skc_v6_daddr"),
    "OFF_SK_NET": ("sock", "__sk_common.skc_net"),
    "OFF_SK_PROTOCOL": ("sock", "sk_protocol"),
    "OFF_SK_OWNED": ("sock", "sk_lock.owned"),
    "OFF_NET_INUM": ("net", "ns.inum"),
    "OFF_INET_SPORT": ("inet_sock", "inet_sport"),
    "OFF_REQ_RETRANS": ("request_sock", "num_retrans"),
    "OFF_SOCKET_SK": ("socket", "sk"),
    "OFF_SKB_CB": ("sk_buff", "cb"),
    "OFF_CB_SEQ": ("tcp_skb_cb", "seq"),
    "OFF_CB_END_SEQ": ("tcp_skb_cb", "end_seq"),
    "OFF_CA_STATE": ("inet_connection_sock", "icsk_ca_state"),
    "OFF_PENDING": ("inet_connection_sock", "icsk_pending"),
    "OFF_RTO": ("inet_connection_sock", "icsk_rto"),
    "OFF_TOTAL_RETRANS": ("tcp_sock", "total_retrans"),
    "OFF_SRTT_US": ("tcp_sock", "srtt_us"),
    "OFF_CWND": ("tcp_sock", "snd_cwnd"),
    "OFF_SSTHRESH": ("tcp_sock", "snd_ssthresh"),
    "OFF_PACKETS_OUT": ("tcp_sock", "packets_out"),
    "OFF_SACKED_OUT": ("tcp_sock", "sacked_out"),
    "OFF_LOST_OUT": ("tcp_sock", "lost_out"),
    "OFF_RETRANS_OUT": ("tcp_sock", "retrans_out"),
    "OFF_RTTVAR": ("tcp_sock", "mdev_us"),
    "OFF_BYTES_SENT": ("tcp_sock", "bytes_sent"),
    "OFF_BYTES_RETRANS": ("tcp_sock", "bytes_retrans"),
    "OFF_BYTES_ACKED": ("tcp_sock", "bytes_acked"),
    "OFF_BYTES_RECEIVED": ("tcp_sock", "bytes_received"),
    "OFF_SEGS_OUT": ("tcp_sock", "segs_out"),
    "OFF_SEGS_IN": ("tcp_sock", "segs_in"),
    "OFF_RATE_DELIVERED": ("tcp_sock", "rate_delivered"),
    "OFF_RATE_INTERVAL": ("tcp_sock", "rate_interval_us"),
    "OFF_MSS": ("tcp_sock", "mss_cache"),
}
TCP_TRACEPOINTS = {
    "lat_retransmit": "tcp_retransmit_skb",
    "lat_synack": "tcp_retransmit_synack",
    "lat_socket_state": "inet_sock_set_state",
    "lat_received": "tcp_rcv_space_adjust",
    "lat_recovered": "tcp_cong_state_set",  # c6dbb7d0ddd7 (5.19)
}

# The first one that is there; where none is, who receives is the owner. Both tell of TCP, the
# first of nothing else. Since 6.16 and 6.3.
_SENDING = ("tcp_sendmsg_locked", "sock_send_length")

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
# Interrupts: entry and exit each, where this kernel (and architecture) has them.
_INTERRUPTS = (
    "irq_handler",
    "local_timer",
    "reschedule",
    "call_function",
    "call_function_single",
    "irq_work",
)
# The parts of programs, by the number that stands for each (then_stay in probes/kernel.h).
_PARTS = {
    0x7FFFFF00: "lat_stay",
    0x7FFFFF01: "lat_leave",
    0x7FFFFF02: "lat_enter",
    0x7FFFFF03: "lat_slices",
    0x7FFFFF04: "lat_throttled",
    0x7FFFFF05: "lat_after_quota",
    0x7FFFFF06: "lat_elsewhere",
    0x7FFFFF07: "lat_moved",
    0x7FFFFF08: "lat_copy",
}
ITERATORS = {
    "lat_iter_seed": "bpf_iter_task",
    "lat_iter_end": "bpf_iter_task",
    "lat_iter_sockets": "bpf_iter_task_file",
    "lat_iter_storage": "bpf_iter_bpf_sk_storage_map",
}
ON_CPU = "lat_on_cpu"
"""Runs at the tick of a clock: see tracer/sampling.py."""
MAPS = (
    "lat_targets",
    "lat_control",
    "lat_cpus",
    "lat_clocks",
    "lat_own",
    "lat_stays",
    "lat_hist",
    "lat_overshoot",
    "lat_timerfd",
    "lat_scratch",
    "lat_slots",
    "lat_free",
    "lat_tasks",
    "lat_ring",
    "lat_copies",
)


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


def _offsets(btf: Btf, fields: Mapping[str, tuple[str, str]]) -> dict[str, int]:
    """The offsets of all these fields; empty where this kernel lacks one."""
    found = {name: btf.offset(*field) for name, field in fields.items()}
    constants = {name: offset for name, offset in found.items() if offset is not None}
    return constants if len(constants) == len(found) else {}


def _sleep_constants(btf: Btf) -> dict[str, int]:
    """What the probes need to take sleep calls apart; empty where this kernel lacks a part."""
    constants = _offsets(btf, _SLEEP_OFFSETS)
    bases, queue = btf.per_cpu_offset("hrtimer_bases"), btf.per_cpu_offset("runqueues")
    array = btf.offset("hrtimer_cpu_base", "clock_base")
    running = btf.offset("hrtimer_clock_base", "running")
    size = btf.size("hrtimer_clock_base")
    if bases is None or queue is None or array is None or running is None or size is None:
        return {}
    if not constants:
        return {}
    return constants | {
        "TIMER_BASES_FROM_RQ": bases - queue,
        "OFF_BASE_RUNNING": array + running,
        "TIMER_BASE_SIZE": size,
        "SLEEP_CALLS_SEEN": 1,
    }


def _tcp_constants(btf: Btf) -> dict[str, int]:
    """What the probes need to tell of retransmits; empty where this kernel lacks a part."""
    constants = _offsets(btf, _TCP_OFFSETS)
    if not constants or not all(map(btf.tracepoint, TCP_TRACEPOINTS.values())):
        return {}
    # ad892e912b84 (6.17) added what became of it.
    if btf.tracepoint_arguments("tcp_retransmit_skb") >= 3:
        constants["RETRANSMIT_HAS_ERR"] = 1
    return constants | {"TCP_TRACED": 1}


def pid_max() -> int:
    """One more than the largest process id of this kernel."""
    return int(Path("/proc/sys/kernel/pid_max").read_text())


def possible_cpus() -> int:
    """How many CPUs the kernel may ever number."""
    text = Path("/sys/devices/system/cpu/possible").read_text().strip()
    return int(re.split(r"[-,]", text)[-1]) + 1


def import_bcc() -> Any:
    """The BPF Compiler Collection.

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
    return bcc


def sources() -> str:
    """The text of the probes, as one file: bcc rewrites map accesses in the main file only."""
    return "".join(f'#line 1 "{name}"\n{(PROBES / name).read_text()}' for name in SOURCES)


def compile_probes(btf: Btf, switches: dict[str, int]) -> Compiled:
    """Compile the probes for this kernel; `switches`: more -D constants.

    Raises HostError when this host cannot: with the cause and what to do.
    """
    bcc = import_bcc()
    # Added by 0bf1af1b8e0d (6.17).
    user_stacks = switches["USER_STACKS"] and btf.tracepoint("sched_exit_tp") is not None
    constants = kernel_constants(btf) | switches
    if switches["SLEEPS_SEEN"]:
        constants |= _sleep_constants(btf)
    if switches["TCP_SEEN"]:
        constants |= _tcp_constants(btf)
    constants["USER_STACKS"] = int(user_stacks)
    constants["ORDERED_LOADS"] = int(platform.machine() in {"x86_64", "s390x"})
    flags = [f"-D{name}={value}" for name, value in constants.items()]
    try:
        module = bcc.BPF(
            text=sources().encode(), cflags=[*flags, f"-I{PROBES}", "-Wno-unused-function"]
        )
    except Exception as error:
        raise HostError(
            f"bcc could not compile the probes or make their maps: {error}",
            hint="bcc printed the reason above; see: latrace doctor",
        ) from error
    wanted = dict(_TRACEPOINTS)
    if switches["CGROUPS"]:
        wanted["lat_cgroup_attach"] = "cgroup_attach_task"
    if user_stacks:
        wanted["lat_sched_exit"] = "sched_exit_tp"
    if switches["INTERRUPTS_SEEN"]:
        wanted |= _interrupt_programs(btf)
    if "SLEEP_CALLS_SEEN" in constants:
        wanted["lat_timer_start"] = "hrtimer_start"
        if btf.tracepoint("rseq_update") is not None:  # needs CONFIG_RSEQ
            wanted["lat_back"] = "rseq_update"
    maps, iterators = list(MAPS), dict(ITERATORS)
    if "TCP_TRACED" in constants:
        wanted |= TCP_TRACEPOINTS
        if sending := [name for name in _SENDING if btf.tracepoint(name) is not None]:
            wanted["lat_sent"] = sending[0]
        maps += ["lat_sockets", "lat_requests"]
    else:
        del iterators["lat_iter_sockets"], iterators["lat_iter_storage"]
    attach = {name: btf.tracepoint(tracepoint) for name, tracepoint in wanted.items()}
    attach |= {name: btf.function(walk) for name, walk in iterators.items()} | {ON_CPU: None}

    try:
        parts = {number: module.dump_func(part.encode()) for number, part in _PARTS.items()}
        fds = {name: bcc.lib.bpf_table_fd(module.module, name.encode()) for name in maps}
        numbers = {fd: number for number, fd in enumerate(fds.values())}
        return Compiled(
            tuple(bpf.shape_of(name, fd) for name, fd in fds.items()),
            tuple(
                Program(
                    name,
                    with_maps(
                        with_parts(module.dump_func(name.partition(":")[0].encode()), parts),
                        numbers,
                    ),
                    0 if name == ON_CPU else _known(name, type_id),
                    name in ITERATORS,
                    bpf.TYPE_PERF_EVENT if name == ON_CPU else bpf.TYPE_TRACING,
                )
                for name, type_id in attach.items()
            ),
        )
    finally:
        module.cleanup()


def _interrupt_programs(btf: Btf) -> dict[str, str]:
    """Program → tracepoint; one function at several is `function:interrupt`."""
    programs = {"lat_softirq_entry": "softirq_entry", "lat_softirq_exit": "softirq_exit"}
    for interrupt in _INTERRUPTS:
        if btf.tracepoint(f"{interrupt}_entry") and btf.tracepoint(f"{interrupt}_exit"):
            for end in ("entry", "exit"):
                programs[f"lat_irq_{end}:{interrupt}"] = f"{interrupt}_{end}"
    return programs


def _known(name: str, type_id: int | None) -> int:
    if type_id is None:
        raise HostError(
            f"this kernel lacks the tracepoint or iterator that {name} attaches to",
            hint="latrace needs Linux 5.11 or newer with CONFIG_BPF_EVENTS; see: latrace doctor",
        )
    return type_id
