/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* Why a thread waits: what its CPU does meanwhile, in parts that add up.
 *
 * Each CPU has clocks of how long it was in hard interrupts, in softirqs, idle, in kernel threads
 * and in user threads. A wait notes the clocks when it begins and subtracts them when it ends; a
 * waiting thread that moves takes what it has to the clocks of the next CPU. A process has a
 * clock of its own threads beside them: `own` is its part, `other` the rest of the user threads'.
 *
 * The clocks run only while a target waits on that CPU: elsewhere a switch or an interrupt costs
 * one look. Whoever begins the first wait, maybe on another CPU, starts them by setting
 * `since_ns`; the first event on the CPU itself then tells what it was doing since: a switch tells
 * the thread that leaves, the end of an interrupt an interrupt. So the parts sum to the wait to
 * the nanosecond. Where another CPU's clocks kept changing while they were read, the wait's
 * parts are unknown.
 */

enum clock { CLOCK_IRQ, CLOCK_SOFTIRQ, CLOCK_IDLE, CLOCK_KTHREAD, CLOCK_USER, CLOCK_OWN };

/* Waits shorter than this have parts, and no slices: two cells more for each of many. */
#define SLICED_NS 10000		/* control.slice_ns is never less */
#define LOOKED_ELSEWHERE_NS 100000	/* a look at each other CPU takes some 0.1 us */

#define STAYS 64		/* remembered on each CPU */
#define OWN_CLOCKS 1024		/* processes by hash, on each CPU */

/* Keys of culprits' stacks: where no wait that has slices includes the stay, nobody asks for it. */
#define CULPRIT_KEYS (1ULL << 62)

struct cpu_clock {
	u64 begun, done;		/* changes: one is under way while they differ */
	u64 since_ns;			/* accounted up to here; 0: the clocks stand */
	s64 waiting;			/* targets on this CPU's queue */
	u64 ns[CLOCK_OWN];
	u64 doing, doing_tgid;		/* the clock that runs now, as far as is known */
	u64 vector;			/* of the softirq under way, + 1 */
	u64 stay_ns;			/* the thread on the CPU is known to be there since */
	u64 stay_irq_ns, stay_softirq_ns;
	u64 stay_vector, stay_vector_ns;	/* of its longest softirq */
	u64 opened_ns;			/* the clocks run since */
	u64 stays;			/* remembered so far */
	u64 culprit_acc_ns;		/* see sample.h */
	u64 now_ns;			/* of the switch under way, or the last one looked at */
	u64 cfs_rq, group;		/* of then_throttled() */
	u64 from, moved_ns;		/* the CPU of then_moved(), and when */
	u64 elsewhere_ns;		/* of then_elsewhere() */
	u64 due_wait_ns, due[CAUSES];	/* the wait that ended just now, for lat_slices */
	u64 here_wait_ns;		/* the target that got this CPU last: what it waited, */
	u32 here_tid, here_waker_tid;	/* and who had woken it */
	/* What programs on this CPU work with, interrupts off: on the stack of a program the verifier
	 * would follow every value. */
	struct clocks had;
	struct walk {
		u64 run_ns, start_ns, from_ns, until_ns;
		u64 irq_ns, softirq_ns, vector, vector_ns, moved;
	} walk;
	u64 pad[3];			/* no two CPUs share a cache line */
};

/* One process on one CPU: how long its threads ran there. Of those that share a hash, the one
 * that waited there last has it. */
struct own_clock { u64 tgid, ns; };

BYTES_OF(cpu_clock);
BYTES_OF(own_clock);
BYTES_OF(stay);
BPF_TABLE("array", u32, struct cpu_clock_bytes, lat_clocks, NCPU);
BPF_TABLE("array", u32, struct own_clock_bytes, lat_own, NCPU * OWN_CLOCKS);
BPF_TABLE("array", u32, struct stay_bytes, lat_stays, NCPU * STAYS);

static inline struct cpu_clock *clock_of(u32 cpu)
{
	return (struct cpu_clock *)lat_clocks.lookup(&cpu);
}

static inline struct own_clock *own_clock_of(u32 cpu, u32 tgid)
{
	u32 i = cpu * OWN_CLOCKS + tgid % OWN_CLOCKS;

	return (struct own_clock *)lat_own.lookup(&i);
}

static inline u64 clock_of_thread(u64 task)
{
	if (!LD32(task, OFF_TASK_PID))
		return CLOCK_IDLE;
	return LD32(task, OFF_TASK_FLAGS) & PF_KTHREAD ? CLOCK_KTHREAD : CLOCK_USER;
}

/* An event on this CPU: up to `now` it did `clock`, in `task`. With interrupts on, as at the edges of
 * a softirq, another event can come in the middle of this one: a stretch of time is then taken by
 * exchange, once. */
static inline void account(struct cpu_clock *k, u64 now, u64 clock, u64 task, int interruptible)
{
	u64 since = k->since_ns, tgid = LD32(task, OFF_TASK_TGID), ns = now > since ? now - since : 0;
	struct own_clock *own;

	if (interruptible)
		__sync_fetch_and_add(&k->begun, 1);
	else
		k->begun++;
	if (!interruptible)
		k->since_ns = now;
	else if (__sync_val_compare_and_swap(&k->since_ns, since, now) != since)
		ns = 0;
	if (clock < CLOCK_OWN)
		__sync_fetch_and_add(&k->ns[clock], ns);
	if (clock == CLOCK_USER) {
		own = own_clock_of(bpf_get_smp_processor_id(), tgid);
		if (own && own->tgid == tgid)
			__sync_fetch_and_add(&own->ns, ns);
	} else if (clock == CLOCK_IRQ) {
		k->stay_irq_ns += ns;
	} else if (clock == CLOCK_SOFTIRQ) {
		k->stay_softirq_ns += ns;
	}
	if (interruptible)
		__sync_fetch_and_add(&k->done, 1);
	else
		k->done++;
}

/* Loads in the order they are written in: x86 and s390x never reorder them. */
#if ORDERED_LOADS
#define LOAD(p) (*(volatile u64 *)(p))
#else
#define LOAD(p) __sync_fetch_and_add(p, 0)
#endif

/* The clocks of a CPU as of now, from any CPU. Returns 0 when they kept changing. */
static inline int read_clocks(struct cpu_clock *k, struct own_clock *own, u64 tgid, u64 now,
			      struct clocks *to)
{
	u32 try;

	LOOP (try = 0; try < 4; try++) {
		u64 done = LOAD(&k->done), since = LOAD(&k->since_ns), doing = LOAD(&k->doing);
		u64 ns = since && now > since ? now - since : 0;

		to->ns[CLOCK_IRQ] = LOAD(&k->ns[CLOCK_IRQ]);
		to->ns[CLOCK_SOFTIRQ] = LOAD(&k->ns[CLOCK_SOFTIRQ]);
		to->ns[CLOCK_IDLE] = LOAD(&k->ns[CLOCK_IDLE]);
		to->ns[CLOCK_KTHREAD] = LOAD(&k->ns[CLOCK_KTHREAD]);
		to->ns[CLOCK_USER] = LOAD(&k->ns[CLOCK_USER]);
		to->ns[CLOCK_OWN] = LOAD(&own->ns);
		if (doing < CLOCK_OWN)
			to->ns[doing] += ns;
		if (doing == CLOCK_USER && k->doing_tgid == tgid)
			to->ns[CLOCK_OWN] += ns;
		if (LOAD(&k->begun) == done)
			return 1;
	}
	return 0;
}

/* Note the clocks of the CPU on whose queue the thread is from `now` on. `had`: what the wait has
 * of each so far. Starts the clocks where they stand; the thread on that CPU is then taken to have
 * been there for `before_ns`, in which the CPU did `before`. */
static inline void note_clocks(struct thread_state *s, u64 task, u32 cpu, u64 now, u64 before_ns,
			       u64 before, u64 doing, u64 doing_tgid, struct clocks *had)
{
	u64 tgid = LD32(task, OFF_TASK_TGID);
	struct own_clock *own = own_clock_of(cpu, tgid);
	struct cpu_clock *k = clock_of(cpu);
	u32 i;

	if (!k || !own)
		return;
	own->tgid = tgid;
	s->queue_cpu = cpu + 1;
	s->here_ns = now - before_ns;
	__sync_fetch_and_add(&k->waiting, 1);
	if (!__sync_val_compare_and_swap(&k->since_ns, 0, now)) {
		k->doing = doing;
		k->doing_tgid = doing_tgid;
		k->vector = 0;
		k->opened_ns = now - before_ns;
		k->stay_ns = max_ns(now - before_ns, k->now_ns);
		k->stay_irq_ns = before == CLOCK_IRQ ? before_ns : 0;
		k->stay_softirq_ns = before == CLOCK_SOFTIRQ ? before_ns : 0;
		k->stay_vector_ns = 0;
	}
	s->clocks_known = read_clocks(k, own, tgid, now, &s->clocks);
#pragma unroll
	for (i = 0; i < CLOCKS; i++)
		s->clocks.ns[i] -= had->ns[i];
}

static inline struct clocks *no_clocks(void)
{
	struct cpu_clock *k = clock_of(bpf_get_smp_processor_id());
	u32 i;

	if (!k)
		return 0;
#pragma unroll
	for (i = 0; i < CLOCKS; i++)
		k->had.ns[i] = 0;
	return &k->had;
}

/* It is on a queue since now; for `before_ns` it was on its way there: sched_waking comes before a
 * CPU is chosen, and where an interrupt brings it to another one, that takes a while. What this CPU
 * does while it wakes the thread for itself is known: `context`. Of another one, what its thread
 * is counts for that time: the interrupt that brings it comes at the end. */
static inline void cause_queued(struct thread_state *s, u64 task, u64 now, u64 before_ns, u8 context)
{
#if CAUSES_SEEN
	u64 current = LD64(queue_of(task), OFF_RQ_CURR);
	u64 clock = clock_of_thread(current), before = clock;
	struct clocks *had = no_clocks();

	if (!had)
		return;
	if (context == CTX_HARDIRQ)
		before = CLOCK_IRQ;
	else if (context == CTX_SOFTIRQ)
		before = CLOCK_SOFTIRQ;
	if (before < CLOCK_OWN)
		had->ns[before] = before_ns;
	if (before == CLOCK_USER && LD32(current, OFF_TASK_TGID) == LD32(task, OFF_TASK_TGID))
		had->ns[CLOCK_OWN] = before_ns;
	s->moves = 0;
	note_clocks(s, task, LD32(task, OFF_TASK_CPU), now, before_ns, before, clock,
		    LD32(current, OFF_TASK_TGID), had);
#endif
}

/* What the wait has of each clock up to now, in this CPU's `had`. 0: that is not known. */
static inline struct clocks *clocks_had(struct thread_state *s, u64 task, u64 now)
{
	struct clocks *had = no_clocks();
	u64 tgid = LD32(task, OFF_TASK_TGID);
	u32 cpu = s->queue_cpu - 1, i;
	struct own_clock *own = own_clock_of(cpu, tgid);
	struct cpu_clock *k = clock_of(cpu);

	if (!had || !k || !own || own->tgid != tgid || !s->clocks_known)
		return 0;
	if (!read_clocks(k, own, tgid, now, had))
		return 0;
#pragma unroll
	for (i = 0; i < CLOCKS; i++)
		had->ns[i] -= s->clocks.ns[i];
	return had;
}

/* It leaves the queue it was on, to run or for another one. */
static inline void cause_unqueued(struct thread_state *s)
{
	struct cpu_clock *k;

	if (!s->queue_cpu)
		return;
	k = clock_of(s->queue_cpu - 1);
	s->queue_cpu = 0;
	if (k)
		__sync_fetch_and_add(&k->waiting, -1);
}

#ifdef OFF_TASK_GROUP
/* The run queue of another CPU, to which no pointer with a type leads: by way of the queues of the
 * task's group. 0: it could not be read. */
static inline u64 run_queue_of(u64 task, u64 cpu)
{
	u64 at = LD64(LD64(task, OFF_TASK_GROUP), OFF_TG_CFS_RQ) + 8 * cpu;

	if (read_kernel(&at, 8, at) || read_kernel(&at, 8, at + OFF_CFS_RQ_RQ))
		return 0;
	return at;
}
#endif

/* What runs on another CPU. */
static inline u64 running_on(u64 task, u32 cpu, u64 *tgid)
{
	u64 clock = CLOCK_OWN;	/* none */
#ifdef OFF_TASK_GROUP
	u64 at = run_queue_of(task, cpu);
	u32 pid = 0, flags = 0, process = 0;

	if (!at || read_kernel(&at, 8, at + OFF_RQ_CURR) ||
	    read_kernel(&pid, 4, at + OFF_TASK_PID) ||
	    read_kernel(&process, 4, at + OFF_TASK_TGID) ||
	    read_kernel(&flags, 4, at + OFF_TASK_FLAGS))
		return clock;
	*tgid = process;
	clock = !pid ? CLOCK_IDLE : flags & PF_KTHREAD ? CLOCK_KTHREAD : CLOCK_USER;
#endif
	return clock;
}

/* It goes on waiting on another CPU's queue. */
static inline void cause_moved(void *ctx, struct thread_state *s, u64 task, u32 cpu, u64 now)
{
	struct cpu_clock *here = clock_of(bpf_get_smp_processor_id());
	struct clocks *had = clocks_had(s, task, now);
	u64 here_ns = s->here_ns, known = had != 0, clock = CLOCK_OWN, tgid = 0;
	struct cpu_clock *k = clock_of(cpu);
	u32 from = s->queue_cpu - 1;

	if (!had)
		had = no_clocks();
	if (!had || !k || !here)
		return;
	here->from = from;
	here->moved_ns = now;
	then_moved(ctx);
	cause_unqueued(s);
	if (!k->since_ns)
		clock = running_on(task, cpu, &tgid);
	note_clocks(s, task, cpu, now, 0, clock, clock, tgid, had);
	s->clocks_known &= known;
	s->moved_from = from;
	s->moved_from_ns = here_ns;
	s->moves++;
}

#ifdef OFF_TASK_THROTTLED
/* How long this group's threads could not run on their CPU for want of quota, so far, by the
 * run queue's clock (kernel/sched/fair.c: tg_throttle_down(), tg_unthrottle_up()). */
static inline u64 throttled_clock(u64 cfs_rq)
{
	u64 since = LD64(cfs_rq, OFF_CFS_RQ_THROTTLED_SELF);
	u64 total = LD64(cfs_rq, OFF_CFS_RQ_THROTTLED_SELF_TIME);
	u64 clock = LD64(LD64(cfs_rq, OFF_CFS_RQ_RQ), OFF_RQ_CLOCK);

	return total + (since && clock > since ? clock - since : 0);
}
#endif

/* Its group has used up its quota: since 6.18 the kernel then takes each thread off the queue
 * (throttle_cfs_rq_work(), enqueue_throttled_task()), and `throttled` says so. */
static inline void cause_throttled(void *ctx, struct thread_state *s, u64 task)
{
	s->throttled = 0;
#if CAUSES_SEEN && defined(OFF_TASK_THROTTLED)
	s->throttled = LD8(task, OFF_TASK_THROTTLED);
	if (s->throttled) {
		struct cpu_clock *k = clock_of(bpf_get_smp_processor_id());
		u64 cfs_rq = LD64(task, OFF_SE_CFS_RQ);

		s->throttled_clock = throttled_clock(cfs_rq);
		if (!k)
			return;
		k->cfs_rq = cfs_rq;
		then_throttled(ctx);
		s->throttled_by = k->group;
	}
#endif
}

/* The wait that ends now, taken apart: causes[] in ns, summing to `wait`. */
static inline void causes_of_wait(void *ctx, struct cpu_clock *k, struct thread_state *s, u64 task,
				  u64 now, u64 wait)
{
	struct clocks *had = 0;
	u64 *causes = k->due, sum, below, total;
	u32 i;

#pragma unroll
	for (i = 0; i < CAUSES; i++)
		causes[i] = 0;
	if (s->queue_cpu)
		had = clocks_had(s, task, now);
	if (!had) {
		causes[CAUSE_UNKNOWN] = wait;
		return;
	}
#ifdef OFF_TASK_THROTTLED
	if (s->throttled) {
		u64 ns = throttled_clock(LD64(task, OFF_SE_CFS_RQ)) - s->throttled_clock;

		ns = min_ns(ns, wait);
		causes[CAUSE_THROTTLED] = ns;
		k->walk.from_ns = now - (wait - ns);
		then_after_quota(ctx);
	} else
#endif
	{
		causes[CAUSE_IRQ] = had->ns[CLOCK_IRQ];
		causes[CAUSE_SOFTIRQ] = had->ns[CLOCK_SOFTIRQ];
		causes[CAUSE_IDLE] = had->ns[CLOCK_IDLE];
		causes[CAUSE_KTHREAD] = had->ns[CLOCK_KTHREAD];
		causes[CAUSE_OWN] = had->ns[CLOCK_OWN];
		causes[CAUSE_OTHER] = had->ns[CLOCK_USER] - had->ns[CLOCK_OWN];
	}
	/* What another CPU was seen to do was a guess until its next event: a part may be some ns
	 * below nothing then, and another as much too large. */
	sum = below = 0;
#pragma unroll
	for (i = 0; i < CAUSE_UNKNOWN; i++) {
		below -= causes[i] & negative(causes[i]);
		causes[i] &= ~negative(causes[i]);
		sum += causes[i];
	}
	total = min_ns(max_ns(sum - below, 0), wait);
	causes[CAUSE_UNKNOWN] = wait - total;
	sum -= total;
#pragma unroll
	for (i = 0; i < CAUSE_UNKNOWN; i++) {
		u64 cut = min_ns(causes[i], sum);

		causes[i] -= cut;
		sum -= cut;
	}
}

/* The thread that leaves this CPU, where a target waits, into the stays; sometimes with a stack. */
static inline void remember_stay(void *ctx, struct cpu_clock *k, u64 task, u64 now)
{
	u32 cpu = bpf_get_smp_processor_id(), at = cpu * STAYS + k->stays % STAYS;
	struct stay *y = (struct stay *)lat_stays.lookup(&at);
	struct cpu_state *c = this_cpu();
	struct control *o = control();
	u64 group, clock;

	if (!y || !c || !o)
		return;
	y->start_ns = k->stay_ns < now ? k->stay_ns : now;
	y->end_ns = now;
	y->irq_ns = k->stay_irq_ns;
	y->softirq_ns = k->stay_softirq_ns;
	y->vector = k->stay_vector;
	y->tid = LD32(task, OFF_TASK_PID);
	y->tgid = LD32(task, OFF_TASK_TGID);
	clock = clock_of_thread(task);
	y->cause = clock == CLOCK_IDLE	  ? CAUSE_IDLE :
		   clock == CLOCK_KTHREAD ? CAUSE_KTHREAD :
					    CAUSE_OTHER;
	y->stack_key = y->weight_ns = 0;
	k->stays++;
	if (clock == CLOCK_IDLE)
		return;
	copy_comm(y->comm, task);
	y->policy = LD32(task, OFF_TASK_POLICY);
	y->prio = LD32(task, OFF_TASK_PRIO);
	y->cgroup = 0;
#ifdef OFF_TASK_GROUP
	group = LD64(LD64(task, OFF_TASK_GROUP), OFF_TG_CGROUP);
	if (group)
		y->cgroup = LD64(LD64(group, OFF_CGROUP_KN), OFF_KN_ID);
#endif
	if (CULPRITS_SEEN)
		y->weight_ns = sample_weight(&k->culprit_acc_ns, now - y->start_ns,
					     o->wait_period_ns, o->slow_ns, o->tokens > 0);
	if (y->weight_ns) {
		u64 key = CULPRIT_KEYS | new_key(c);

		take_token(o);
		if (send_stack(ctx, c, key, task, clock == CLOCK_USER, SCRATCH_CULPRIT))
			y->stack_key = key;
		else
			c->lost_stacks++;
	}
}

/* `next` has this CPU from now on. The clocks stand when nobody waits for it; one who came at this
 * very moment, from another CPU, starts them again. */
static inline void next_stay(struct cpu_clock *k, u64 next, u64 now)
{
	if (!k->since_ns)
		return;
	k->doing = clock_of_thread(next);
	k->doing_tgid = LD32(next, OFF_TASK_TGID);
	k->vector = 0;
	k->stay_ns = now;
	k->stay_irq_ns = k->stay_softirq_ns = k->stay_vector_ns = 0;
	if (k->waiting <= 0) {
		k->since_ns = 0;
		if (__sync_fetch_and_add(&k->waiting, 0) > 0)
			k->since_ns = now;
	}
}
