/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* Reading the kernel's structures without its headers. Offsets (OFF_*) come from the running
 * kernel's BTF as -D constants; the verifier checks each load against the pointer's BTF type.
 * A plain `p->field` would be rewritten by bcc into a probe read, at several times the cost.
 * A 32-bit field is kept in a u64: BPF zero-extends the load, and clang then compares and uses
 * the same register, which is what the verifier tracks.
 */
#pragma once

#define ARG(ctx, n) LD64(ctx, 8 * (n))
#define LD64(p, off) \
	({ u64 v_; asm volatile("%0 = *(u64 *)(%1 + %2)" : "=r"(v_) : "r"(p), "i"(off)); v_; })
#define LD32(p, off) \
	({ u64 v_; asm volatile("%0 = *(u32 *)(%1 + %2)" : "=r"(v_) : "r"(p), "i"(off)); v_; })
#define LD16(p, off) \
	({ u64 v_; asm volatile("%0 = *(u16 *)(%1 + %2)" : "=r"(v_) : "r"(p), "i"(off)); v_; })
#define LD8(p, off) \
	({ u64 v_; asm volatile("%0 = *(u8 *)(%1 + %2)" : "=r"(v_) : "r"(p), "i"(off)); v_; })

/* All ones where a signed number is below 0, else 0; and the smaller and the larger of two times
 * below 2^63. Without a jump: the verifier follows each way of each jump, to the end. */
static inline u64 negative(u64 v)
{
	asm volatile("%0 s>>= 63" : "+r"(v));
	return v;
}

static inline u64 min_ns(u64 a, u64 b)
{
	return b + ((a - b) & negative(a - b));
}

static inline u64 max_ns(u64 a, u64 b)
{
	return a - ((a - b) & negative(a - b));
}

/* Bounded loops stay loops: unrolled, they take clang longer than all the rest. */
#define LOOP _Pragma("clang loop unroll(disable)") for

/* Helpers that bcc 0.26's header does not know, by number (include/uapi/linux/bpf.h). */
static u64 (*get_current_task_btf)(void) = (void *)158;
static u64 (*task_pt_regs)(u64 task) = (void *)175;
static long (*seq_write)(u64 seq, const void *data, u32 len) = (void *)127;
static long (*get_task_stack)(u64 task, void *buf, u32 size, u64 flags) = (void *)141;
static long (*read_kernel)(void *dst, u32 size, u64 addr) = (void *)113;
static long (*read_user)(void *dst, u32 size, u64 addr) = (void *)112;
static long (*get_stack_of)(void *ctx, void *buf, u32 size, u64 flags) = (void *)67;

/* Not helpers: parts of programs as functions of their own, which are put behind them when all are
 * compiled (tracer/compiled.py); bcc itself makes one function of everything. So the verifier
 * follows each part for itself, not for every way through those before it. They find what they
 * need in the maps. */
static int (*then_stay)(void *ctx) = (void *)0x7fffff00;
static int (*then_leave)(void *ctx) = (void *)0x7fffff01;
static int (*then_enter)(void *ctx) = (void *)0x7fffff02;
static int (*then_slices)(void *ctx) = (void *)0x7fffff03;
static int (*then_throttled)(void *ctx) = (void *)0x7fffff04;
static int (*then_after_quota)(void *ctx) = (void *)0x7fffff05;
static int (*then_elsewhere)(void *ctx) = (void *)0x7fffff06;
static int (*then_moved)(void *ctx) = (void *)0x7fffff07;
static int (*then_copy)(void *ctx) = (void *)0x7fffff08;

#define TASK_DEAD 0x80		/* include/linux/sched.h */
#define PF_KTHREAD 0x00200000
#define THREAD_SIZE 16384	/* the least that x86-64 has */
#define CLOCK_REALTIME 0
#define CLOCK_MONOTONIC 1
#define ENOSYS 38		/* what a system call's result is while it lasts */
#define SYS_RESTART 219

/* A thread's time on a CPU where a target waited. */
struct stay {
	u64 start_ns, end_ns, irq_ns, softirq_ns;
	u32 tid, tgid;
	u64 cgroup, stack_key, weight_ns;
	char comm[COMM_BYTES];
	s16 prio;
	u8 policy, cause, vector, pad[3];	/* cause: CAUSE_OTHER for all of user threads */
};

#define CLOCKS 6
struct clocks { u64 ns[CLOCKS]; };	/* by enum clock */

struct thread_state {
	struct wait_state wait;
	u64 wait_acc_ns, blocked_acc_ns;	/* see sample.h */
	u64 blocked_weight_ns, waker_key;	/* sampled when it was woken */
	u64 waits, wait_ns, max_wait_ns, blocked, blocked_ns;
	u64 causes[CAUSES];
	u64 kernel_ns, kernel_count;		/* sched_info at the last look */
	u64 last_wait_ns;			/* + 1; not yet compared with it */
	u64 queued_clock, last_clock_ns;	/* the same wait by the clock that the books are kept in */
	u32 waker_tid, waker_tgid;
	char waker[COMM_BYTES];
	u32 slot;
	u8 waker_ctx;
	/* causes.h */
	u8 clocks_known, throttled, moves;
	u32 queue_cpu;				/* on this CPU's queue, + 1; 0: on none */
	u32 moved_from;
	u64 here_ns, moved_from_ns;		/* since when it is, and was, on that queue */
	struct clocks clocks;			/* what they showed when this wait was at 0 */
	struct stay left;			/* who had the CPU that it moved away from */
	u32 waking_cpu;
	u64 throttled_clock, throttled_by;
	u64 waker_wait_ns;			/* what its waker had waited itself */
	u32 waker2_tid;
	struct sleep_state sleep;
};

#define TARGET_PROCESS 1
#define TARGET_THREAD 2
#define TARGETS_IN_PART 32768
#define TARGET_PARTS ((PID_MAX + TARGETS_IN_PART - 1) / TARGETS_IN_PART)
struct targets { char on[TARGETS_IN_PART]; };	/* by process and by thread id; two bits */
/* Where stacks are gathered before they are sent. A waker can be an interrupt that came while
 * another stack was being taken on this CPU, so each place has its own. */
enum scratch_place {
	SCRATCH_WAKER, SCRATCH_WAKER_IRQ, SCRATCH_VICTIM, SCRATCH_CULPRIT, SCRATCH_SAMPLE,
	SCRATCH_PLACES
};
struct scratch { u64 frames[STACK_FRAMES]; };

/* bcc compiles code to print every field of every map, which takes longer than all the rest:
 * it is shown bytes. */
#define BYTES_OF(type) \
	enum { type##_size = sizeof(struct type) }; \
	struct type##_bytes { char bytes[type##_size]; }
BYTES_OF(control);
BYTES_OF(cpu_state);
BYTES_OF(hist);
BYTES_OF(overshoot);
BYTES_OF(scratch);
BYTES_OF(thread_state);

/* Sized when the maps are made (tracer/loader.py). */
#define SIZED_LATER 1

#define MMAPABLE (1 << 10)
BPF_F_TABLE("array", u32, struct targets, lat_targets, TARGET_PARTS, MMAPABLE);
BPF_F_TABLE("array", u32, struct control_bytes, lat_control, 1, MMAPABLE);
BPF_F_TABLE("array", u32, struct cpu_state_bytes, lat_cpus, NCPU, MMAPABLE);
BPF_F_TABLE("array", u32, struct hist_bytes, lat_hist, SIZED_LATER, MMAPABLE);
BPF_F_TABLE("array", u32, struct overshoot_bytes, lat_overshoot, SLEEP_CALLS, MMAPABLE);
BPF_TABLE("array", u32, u64, lat_timerfd, 1);	/* where the kernel has timerfd_tmrproc() */
BPF_TABLE("array", u32, struct scratch_bytes, lat_scratch, SCRATCH_PLACES * NCPU);
BPF_TABLE("hash", u32, u32, lat_slots, SIZED_LATER);
BPF_QUEUE(lat_free, u32, SIZED_LATER);
BPF_TASK_STORAGE(lat_tasks, struct thread_state_bytes);
BPF_RINGBUF_OUTPUT(lat_ring, SIZED_LATER);
BPF_RINGBUF_OUTPUT(lat_copies, SIZED_LATER);

static inline char *target_byte(u64 id)
{
	u32 part = id / TARGETS_IN_PART;
	struct targets *t = lat_targets.lookup(&part);

	return t ? &t->on[id % TARGETS_IN_PART] : 0;
}

static inline int is_target(u64 task)
{
	char *on = target_byte(LD32(task, OFF_TASK_TGID));

	if (on && *on & TARGET_PROCESS)
		return 1;
#if SINGLE_THREADS
	on = target_byte(LD32(task, OFF_TASK_PID));
	if (on && *on & TARGET_THREAD)
		return 1;
#endif
	return 0;
}

static inline struct cpu_state *this_cpu(void)
{
	u32 cpu = bpf_get_smp_processor_id();

	return (struct cpu_state *)lat_cpus.lookup(&cpu);
}

static inline struct control *control(void)
{
	u32 zero = 0;

	return (struct control *)lat_control.lookup(&zero);
}

static inline void take_token(struct control *o)
{
	__sync_fetch_and_add(&o->tokens, -1);
}

static inline void copy_comm(char *to, u64 task)
{
	*(u64 *)to = LD64(task, OFF_TASK_COMM);
	*(u64 *)(to + 8) = LD64(task, OFF_TASK_COMM + 8);
}

/* The run queue that a thread is on or was on last. (Read through a null pointer, all is 0.) */
static inline u64 queue_of(u64 task)
{
	return LD64(LD64(task, OFF_SE_CFS_RQ), OFF_CFS_RQ_RQ);
}

/* That queue's clock; 0: not known. It is set at most once for each time that the queue is locked,
 * and stands where a wake-up preempts. */
static inline u64 queue_clock(u64 task)
{
	return LD64(queue_of(task), OFF_RQ_CLOCK);
}

/* The number its wait histogram has. The first processes get one each; all later ones
 * share slot 0, so the sum over slots is exact in any case. */
static inline u32 slot_of(u32 tgid)
{
	u32 *have = lat_slots.lookup(&tgid), slot = 0;

	if (have)
		return *have;
	if (lat_free.pop(&slot))
		return 0;
	if (!lat_slots.insert(&tgid, &slot))
		return slot;
	lat_free.push(&slot, 0);	/* another CPU was first */
	have = lat_slots.lookup(&tgid);
	return have ? *have : 0;
}

/* The state of a thread, made on first sight. Only ever 0 when the kernel has no memory. */
static inline struct thread_state *state_of(u64 task)
{
	struct thread_state *s = lat_tasks.task_storage_get((void *)task, 0, 0);

	if (s)
		return s;
	s = lat_tasks.task_storage_get((void *)task, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
	if (s) {
		s->slot = slot_of(LD32(task, OFF_TASK_TGID));
		s->kernel_ns = LD64(task, OFF_RUN_DELAY);
		s->kernel_count = LD64(task, OFF_PCOUNT);
	} else {
		struct cpu_state *c = this_cpu();

		if (c)
			c->no_storage++;
	}
	return s;
}

/* 0 where the task is not one we trace: there this costs one look at a byte. */
static inline struct thread_state *target_state(u64 task)
{
	return is_target(task) ? state_of(task) : 0;
}

static inline void fill_thread(struct thread_record *r, u64 task, struct thread_state *s, u8 event)
{
	u64 parent = LD64(task, OFF_TASK_REAL_PARENT);

	r->type = RECORD_THREAD;
	r->event = event;
	r->place = s->wait.place;
	r->frames = 0;
	r->tid = LD32(task, OFF_TASK_PID);
	r->tgid = LD32(task, OFF_TASK_TGID);
	r->ppid = LD32(parent, OFF_TASK_TGID);
	r->ts_ns = bpf_ktime_get_ns();
	r->start_ns = LD64(task, OFF_TASK_START_TIME);
	copy_comm(r->comm, task);
	r->open_ns = 0;
	r->waits = s->waits;
	r->wait_ns = s->wait_ns;
	r->max_wait_ns = s->max_wait_ns;
	r->blocked = s->blocked;
	r->blocked_ns = s->blocked_ns;
	r->user_ip = 0;
#pragma unroll
	for (int i = 0; i < CAUSES; i++)
		r->causes[i] = s->causes[i];
}

/* `comm`: the name it is about to have; 0: the one it has. */
static inline void send_thread(u64 task, struct thread_state *s, u8 event, u64 *comm)
{
	struct thread_record *r = lat_ring.ringbuf_reserve(CELL_BYTES);
	struct cpu_state *c;

	if (r) {
		fill_thread(r, task, s, event);
		if (comm) {
			*(u64 *)r->comm = comm[0];
			*(u64 *)(r->comm + 8) = comm[1];
		}
		lat_ring.ringbuf_submit(r, BPF_RB_NO_WAKEUP);
	} else if ((c = this_cpu())) {
		c->lost_threads++;
	}
}
