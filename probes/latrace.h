/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* The one definition of everything that crosses from the kernel to user space. tracer/records.py
 * has the same layouts as numpy dtypes; tests/probes compile this file and compare the two.
 *
 * Every ring record is one cell of the same size, whatever its type: a batch of the ring is then
 * one numpy array, with no walk from record to record. A stack takes as many cells as it needs.
 */
#pragma once
#include <linux/types.h>
#include "hist.h"

#define CELL_BYTES 184			/* with the ring's 8-byte header: three cache lines */
#define COMM_BYTES 16

enum record_type {
	RECORD_WAIT = 1, RECORD_STACK, RECORD_THREAD, RECORD_SLICE, RECORD_SLEEP, RECORD_SAMPLE,
	RECORD_RETRANSMIT, RECORD_SOCKET, RECORD_CLOSED
};
enum waker_ctx { CTX_TASK, CTX_SOFTIRQ, CTX_HARDIRQ, CTX_UNKNOWN };
enum thread_event { THREAD_SEEN, THREAD_FORK, THREAD_EXEC, THREAD_RENAME, THREAD_EXIT, THREAD_END };

/* Why a thread waited: at each instant exactly one cause holds, the first that applies. */
enum cause {
	CAUSE_THROTTLED, CAUSE_IRQ, CAUSE_SOFTIRQ, CAUSE_IDLE, CAUSE_KTHREAD, CAUSE_OWN, CAUSE_OTHER,
	CAUSE_UNKNOWN, CAUSES
};

struct wait_record {
	u8 type, kind, waker_ctx, place;
	u16 cpu;
	s16 syscall;			/* the call it was blocked in; -1: none */
	u64 run_ns, wait_ns, blocked_ns;
	u32 tid, tgid, waker_tid, waker_tgid;
	char waker[COMM_BYTES];
	u64 weight_ns, blocked_weight_ns;
	u64 stack_key, waker_key;	/* of the RECORD_STACK cells; 0: no stack */
	u32 wakeup_ns;
	u16 migrations, pad;
	u64 causes[CAUSES - 1];		/* ns; unknown is what they leave of wait_ns */
	u64 throttled_by;		/* id of the cgroup whose quota was used up; 0: none */
	u64 waker_wait_ns;		/* the waker's own wait before it ran */
	u32 waker2_tid;			/* who had woken the waker; 0: not known */
	u32 idle_elsewhere_us;		/* another CPU that it may use was idle */
};

/* What ran on a CPU while a target waited there: one for each stay of a thread on the CPU, cut to
 * the wait, with interrupts taken out; these are slices of their own. */
struct slice_record {
	u8 type, cause, vector, policy;	/* vector: of a softirq */
	u16 cpu;
	s16 prio;
	u64 start_ns, dur_ns;
	u32 tid, tgid, victim_tid, pad;
	u64 victim_run_ns;
	char comm[COMM_BYTES];
	u64 cgroup, stack_key, weight_ns;
};

/* A call in which the thread asked to sleep, taken apart: entry + timer + run queue + return is
 * the overshoot. */
enum sleep_flags { SLEEP_EARLY = 1, SLEEP_HAS_RET = 2 };	/* no overshoot; `ret` is known */

struct sleep_record {
	u8 type, clock, deadline_from, flags;
	s16 syscall;
	u16 pad;
	u32 tid, tgid;
	u64 enter_ns, exit_ns;
	s64 requested_ns;		/* -1: for ever */
	u64 deadline_ns, slack_ns;
	s64 overshoot_ns;
	s64 entry_ns, timer_ns, run_queue_ns, return_ns;
	u64 late_ns, expirations;
	s64 ret;
	u64 stack_key;
};

/* A thread of a target, seen on a CPU by the clock. */
struct sample_record {
	u8 type, pad0;
	u16 cpu;
	u32 tid, tgid, pad1;
	u64 ts_ns, weight_ns, stack_key;
};

/* A TCP socket of a target: segments sent once more (RECORD_RETRANSMIT); all that was lost has
 * arrived, or the first thread that received something after a loss (RECORD_SOCKET); it is closed
 * (RECORD_CLOSED). */
enum socket_event { SOCKET_RECOVERED, SOCKET_RECEIVED };
enum retransmit_kind { RETRANS_UNKNOWN, RETRANS_RTO, RETRANS_FAST, RETRANS_TLP, RETRANS_SYNACK };

struct socket_record {
	u8 type, event, kind, state;	/* state: include/net/tcp_states.h */
	u16 family, sport, dport, segs;	/* dport: in network order */
	s32 err;
	u64 ts_ns, cookie;
	u32 tgid, tid;			/* who used the socket last; tid 0: not seen */
	u32 netns, total_retrans, seq, len, srtt_us, rto_jiffies, cwnd, ssthresh, in_flight;
	u32 rttvar_us;			/* this and the next: of a closed one alone */
	u64 bytes_sent, bytes_retrans, bytes_acked, bytes_received;
	u32 segs_out, segs_in, rate_delivered, rate_interval_us, mss, pad;
	u8 saddr[16], daddr[16];
	char comm[COMM_BYTES];
};

/* Written by an iterator: a process that has a socket of a target open. */
struct socket_owner {
	u64 cookie;
	u32 tgid, netns, total_retrans, state;
};

#define STACK_CELL_FRAMES 20
#define STACK_KERNEL_FRAMES 40
#define STACK_USER_FRAMES 120
#define STACK_FRAMES (STACK_KERNEL_FRAMES + STACK_USER_FRAMES)

struct stack_record {
	u8 type, part, has_user, pad;	/* has_user: the thread is in user space as well */
	u16 kernel, user;		/* frames in the whole stack; kernel ones first, leaf first */
	u64 key;
	u32 tid, tgid;
	u64 frames[STACK_CELL_FRAMES];
};

/* What it takes to walk a user stack that has no frame pointers, in a ring of its own: the registers
 * with which the thread left user space, and the stack from there upwards. A page is copied whole or
 * not at all, so it has one page more than was asked for at most. */
#define PAGE 4096
#define RED_ZONE 128			/* below the stack pointer, System V ABI, AMD64, 3.2.2 */
#define PT_REGS 21			/* words, arch/x86/include/asm/ptrace.h */

struct copy_head {
	u64 key;
	u32 tgid, bytes;
	u64 base;			/* the address of the first byte */
	u64 regs[PT_REGS];
};

/* What the kernel knows of a thread, and the exact totals of it: sent when it is first seen,
 * renamed or ended, and for every thread still there when the trace ends. */
struct thread_record {
	u8 type, event, place, frames;	/* THREAD_END: so many kernel addresses (u64) follow, */
	u32 tid, tgid, ppid;
	u64 ts_ns, start_ns;
	char comm[COMM_BYTES];
	u64 open_ns;			/* waiting or blocked for so long when the trace ended */
	u64 waits, wait_ns, max_wait_ns, blocked, blocked_ns;
	u64 user_ip;			/* THREAD_END: not 0, and its struct pt_regs follows these */
	u64 causes[CAUSES];		/* of its waits, ns */
	u64 reserved[2];
};

/* One per histogram slot and CPU: everything here is exact whatever the ring loses. */
struct hist {
	u64 kinds[4];			/* waits by enum wait_kind */
	u64 wait_ns, max_ns, blocked, blocked_ns;
	u64 causes[CAUSES];		/* ns */
	u64 slots[HIST_SLOTS];
};

/* One per sleep call: the overshoot of all targets, exact whatever the ring loses. */
struct overshoot {
	u64 count, early;		/* early: woken before the deadline, and not counted */
	u64 overshoot_ns, entry_ns, timer_ns, run_queue_ns, return_ns;
	u64 slots[HIST_SLOTS];
};

/* One per CPU. The first half is the probes' own, the second counts. */
struct cpu_state {
	u64 due_key;			/* stack to take once the switch is over */
	u32 due_tid, pad0;
	u64 next_key;
	u64 copy_key;			/* the stack that is being copied */

	u64 rows, stacks, slices, sleeps, samples;
	u64 lost_waits, lost_stacks, lost_threads, lost_slices;	/* the ring was full */
	u64 missed_stacks;		/* the thread never came by to have it taken */
	u64 discarded, no_start, missed_switches, recovered, no_storage, open_at_start;
	/* the kernel's books, task->sched_info */
	u64 timed_waits, timed_ns, kernel_ns, kernel_count, blind_waits, blind_ns, unbooked;
	u64 unseen_ns;			/* waits whose events were not fired */
	u64 lost_sleeps, never_blocked, zero_timeout;
	u64 lost_sockets;
	u64 clock_ns;			/* timed_ns by the kernel's clock */
	u64 lost_copies;		/* that ring was full */
	u64 pad1[6];			/* a whole number of cache lines */
};

struct comm_pattern { u64 value[2], mask[2]; };
struct cgroup_id { u64 id, hierarchy; };
#define PATTERNS 8

/* Written by user space while the probes run. */
struct control {
	u64 min_ns;			/* waits below this get no row */
	u64 slow_ns, slow_blocked_ns;	/* intervals above these always get a stack */
	u64 wait_period_ns, blocked_period_ns;
	s64 tokens;			/* stacks that may still be taken in this tick */
	u64 slice_ns;			/* waits below this get no slices */
	s64 slice_tokens;		/* slices that may still be sent in this tick */
	u32 follow_forks, comms, cgroups, self_tgid;
	u32 all_sockets;		/* retransmits of everybody */
	u32 copy_pages;			/* of each user stack: 1, 2, 4 or 8; 0: none */
	struct comm_pattern comm[PATTERNS];
	struct cgroup_id cgroup[PATTERNS];
};
