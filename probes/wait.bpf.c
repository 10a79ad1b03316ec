/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* The wait itself: from the first moment a target is runnable until it runs. */

/* Which context wakes: `current` means nothing in an interrupt. On x86 the preempt count is a
 * per-CPU variable that BPF may not name; its distance from the run queue, another per-CPU
 * variable, is in BTF. That read costs as much as all the rest, so the common case is told
 * without: in a system call, on the thread's own stack. An interrupt that comes there moves to a
 * stack of its own; one that comes in user mode does not, but then there is no system call. */
static inline u8 waker_context(void *ctx, u64 task)
{
	u32 count = 0;

#if defined(OFF_TASK_PREEMPT_COUNT)
	count = LD32(task, OFF_TASK_PREEMPT_COUNT);
#elif defined(PREEMPT_COUNT_FROM_RQ)
	u64 here = (u64)ctx, rq;

	asm volatile("" : "+r"(here));
	if (here - LD64(task, OFF_TASK_STACK) < THREAD_SIZE &&
	    !(LD32(task, OFF_TASK_FLAGS) & PF_KTHREAD) &&
	    (s64)LD64(task_pt_regs(task), OFF_REGS_SYSCALL) >= 0)
		return CTX_TASK;
	rq = queue_of(task);
	if (!rq || read_kernel(&count, 4, rq + PREEMPT_COUNT_FROM_RQ))
		return CTX_UNKNOWN;
#else
	return CTX_UNKNOWN;
#endif
	if (count & 0xff0000)		/* include/linux/preempt.h: HARDIRQ_MASK, NMI_MASK */
		return CTX_HARDIRQ;
	return count & 0x100 ? CTX_SOFTIRQ : CTX_TASK;	/* SOFTIRQ_OFFSET: serving one */
}

/* The waker, and one step further where that is a target too: how long it had waited itself, and
 * who had woken it. */
static inline void set_waker(struct thread_state *s, u64 waker)
{
	struct cpu_clock *k = clock_of(bpf_get_smp_processor_id());

	s->waker_tid = LD32(waker, OFF_TASK_PID);
	s->waker_tgid = LD32(waker, OFF_TASK_TGID);
	copy_comm(s->waker, waker);
	if (k && k->here_tid == s->waker_tid) {
		s->waker_wait_ns = k->here_wait_ns;
		s->waker2_tid = k->here_waker_tid;
	}
}

static inline void no_waker(struct thread_state *s)
{
	s->waker_tid = s->waker_tgid = s->waker2_tid = 0;
	s->waker_wait_ns = 0;
	*(u64 *)s->waker = 0;
	*(u64 *)(s->waker + 8) = 0;
}

int lat_waking(u64 *ctx)
{
	u64 task = ARG(ctx, 0), now, waker, blocked;
	struct thread_state *s;
	struct control *o;
	struct cpu_state *c;
	int began;

	s = target_state(task);
	c = this_cpu();
	if (!s || !c)
		return 0;
	now = bpf_ktime_get_ns();
	sleep_waking(s, now);
	began = wait_waking(&s->wait, now);
	if (!began)
		return 0;
	waker = get_current_task_btf();
	s->waker_ctx = waker_context(ctx, waker);
	s->waking_cpu = bpf_get_smp_processor_id();
	no_waker(s);
	if (s->waker_ctx == CTX_TASK)
		set_waker(s, waker);
	if (s->waker_ctx == CTX_HARDIRQ)
		sleep_timerfd(s, task, waker, now);
	s->waker_key = s->blocked_weight_ns = 0;
	if (began == 2)
		return 0;
	blocked = s->wait.blocked_ns;
	o = control();
	if (!o || !blocked)
		return 0;
	s->blocked_weight_ns = sample_weight(&s->blocked_acc_ns, blocked, o->blocked_period_ns,
					     o->slow_blocked_ns, o->tokens > 1);
	if (s->blocked_weight_ns) {
		u64 key = new_key(c);

		take_token(o);		/* the other one is for the thread's own stack */
		if (send_stack(ctx, c, key, waker,
			       s->waker_ctx == CTX_TASK && !(LD32(waker, OFF_TASK_FLAGS) & PF_KTHREAD),
			       s->waker_ctx == CTX_HARDIRQ ? SCRATCH_WAKER_IRQ : SCRATCH_WAKER))
			s->waker_key = key;
		else
			c->lost_stacks++;
	}
	return 0;
}

/* On a run queue: on the waker's CPU in the same call, or on its own after an interrupt. */
int lat_wakeup(u64 *ctx)
{
	u64 task = ARG(ctx, 0), now;
	struct thread_state *s;

	s = target_state(task);
	if (!s)
		return 0;
	now = bpf_ktime_get_ns();
	if (wait_queued(&s->wait, now)) {
		no_waker(s);
		s->waker_ctx = CTX_UNKNOWN;
		s->waker_key = s->blocked_weight_ns = 0;
		s->blocked_acc_ns += s->wait.blocked_ns;
	}
	if (s->wait.place == PLACE_WAITING && !s->queue_cpu) {
		u32 here = bpf_get_smp_processor_id();

		s->queued_clock = queue_clock(task);
		cause_queued(s, task, now, now > s->wait.start_ns ? now - s->wait.start_ns : 0,
			     here == s->waking_cpu && here == LD32(task, OFF_TASK_CPU) ?
				     s->waker_ctx : CTX_TASK);
		cause_throttled(ctx, s, task);
	}
	return 0;
}

/* The first wait of a new thread: its parent is the waker. */
int lat_wakeup_new(u64 *ctx)
{
	u64 task = ARG(ctx, 0), now;
	struct thread_state *s;

	s = target_state(task);
	if (!s)
		return 0;
	now = bpf_ktime_get_ns();
	wait_start(&s->wait, now, WAIT_NEW);
	s->queued_clock = queue_clock(task);
	cause_queued(s, task, now, 0, CTX_TASK);
	cause_throttled(ctx, s, task);
	no_waker(s);
	set_waker(s, get_current_task_btf());
	s->waker_ctx = CTX_TASK;
	s->waker_key = s->blocked_weight_ns = 0;
	return 0;
}

int lat_migrate(u64 *ctx)
{
	u64 task = ARG(ctx, 0);
	struct thread_state *s;

	s = target_state(task);
	if (!s || s->wait.place != PLACE_WAITING)
		return 0;
	if (s->wait.migrations < 0xffff)
		s->wait.migrations++;
	if (s->queue_cpu)	/* else no queue was chosen yet */
		cause_moved(ctx, s, task, ARG(ctx, 1), bpf_ktime_get_ns());
	return 0;
}

static inline s16 syscall_of(u64 task)
{
#ifdef OFF_REGS_SYSCALL
	u64 regs = task_pt_regs(task);

	return LD32(regs, OFF_REGS_SYSCALL);
#else
	return -1;
#endif
}

static inline void leave(void *ctx, u64 task, u64 now, int runnable, int dead)
{
	struct thread_state *s = state_of(task);
	struct cpu_state *c = this_cpu();

	if (!s || !c)
		return;
	look_at_books(c, s, task, s->wait.place == PLACE_ON_CPU || s->wait.place == PLACE_UNKNOWN);
	cause_unqueued(s);	/* where it was not seen to get the CPU */
	sleep_leave(s, task, c, runnable);
	if (dead) {
		s->wait.place = PLACE_ON_CPU;
		send_thread(task, s, THREAD_EXIT, 0);
		return;
	}
	wait_leave(&s->wait, now, runnable);
	if (runnable) {
		s->queued_clock = queue_clock(task);
		cause_queued(s, task, now, 0, CTX_TASK);
		cause_throttled(ctx, s, task);
		no_waker(s);
		s->waker_ctx = CTX_UNKNOWN;
		s->waker_key = s->blocked_weight_ns = 0;
	}
}

/* Have the stack of a thread that is being switched in taken. Its user stack can be read only once
 * it runs (lat_sched_exit); a kernel without that tracepoint gives the kernel stack alone. */
static inline void want_stack(struct cpu_state *c, u64 key, u64 task)
{
#if USER_STACKS
	c->missed_stacks += c->due_tid != 0;
	c->due_key = key;
	c->due_tid = LD32(task, OFF_TASK_PID);
#else
	struct scratch *frames = scratch_at(SCRATCH_VICTIM);

	if (!frames || !send_frames(c, frames, key, task, stack_of_sleeper(frames, task) / 8, 0,
				    1))
		c->lost_stacks++;
#endif
}

/* The row of a wait, if it gets one. */
static inline void send_wait(void *ctx, struct cpu_clock *k, struct thread_state *s, u64 task,
			     u64 now, u64 wait, u64 wakeup, u8 place)
{
	u64 *causes = k->due;
	struct cpu_state *c = this_cpu();
	struct control *o = control();
	struct wait_record *r;
	u64 weight, key = 0;
	u32 i;

	if (!c || !o)
		return;
	weight = sample_weight(&s->wait_acc_ns, wait, o->wait_period_ns, o->slow_ns, o->tokens > 0);
	if (weight | s->blocked_weight_ns) {
		if (s->wait.kind != WAIT_NEW) {
			key = new_key(c);
			take_token(o);
			want_stack(c, key, task);
		}
	} else if (wait < o->min_ns) {
		return;
	}
	k->elsewhere_ns = 0;
	if (wait >= LOOKED_ELSEWHERE_NS)
		then_elsewhere(ctx);
	r = lat_ring.ringbuf_reserve(CELL_BYTES);
	if (!r) {
		c->lost_waits++;
		return;
	}
	c->rows++;
	r->type = RECORD_WAIT;
	r->kind = s->wait.kind;
	r->waker_ctx = s->waker_ctx;
	r->place = place;
	r->cpu = bpf_get_smp_processor_id();
	r->syscall = s->wait.blocked_ns ? syscall_of(task) : -1;
	r->run_ns = now;
	r->wait_ns = wait;
	r->blocked_ns = s->wait.blocked_ns;
	r->tid = LD32(task, OFF_TASK_PID);
	r->tgid = LD32(task, OFF_TASK_TGID);
	r->waker_tid = s->waker_tid;
	r->waker_tgid = s->waker_tgid;
	*(u64 *)r->waker = *(u64 *)s->waker;
	*(u64 *)(r->waker + 8) = *(u64 *)(s->waker + 8);
	r->weight_ns = weight;
	r->blocked_weight_ns = s->blocked_weight_ns;
	r->stack_key = key;
	r->waker_key = s->waker_key;
	r->wakeup_ns = wakeup < ~0u ? wakeup : ~0u;
	r->migrations = s->wait.migrations;
#pragma unroll
	for (i = 0; i < CAUSE_UNKNOWN; i++)
		r->causes[i] = causes[i];
	r->throttled_by = causes[CAUSE_THROTTLED] ? s->throttled_by : 0;
	r->waker_wait_ns = s->waker_wait_ns;
	r->waker2_tid = s->waker2_tid;
	r->idle_elsewhere_us = min_ns(k->elsewhere_ns, wait) / 1000;
	lat_ring.ringbuf_submit(r, BPF_RB_NO_WAKEUP);
	if (CULPRITS_SEEN && wait >= o->slice_ns && o->slice_tokens > 0 && s->queue_cpu == bpf_get_smp_processor_id() + 1)
		k->due_wait_ns = wait;
}

static inline void enter(void *ctx, u64 task, u64 now, struct cpu_clock *k)
{
	struct thread_state *s = state_of(task);
	struct cpu_state *c = this_cpu();
	u64 wait, wakeup, clock;
	int started;
	u8 place;

	if (!s || !c)
		return;
	if (s->wait.place == PLACE_WAITING && s->wait.start_ns > now)
		c->discarded++;
	place = s->wait.place;
	clock = queue_clock(task);
	wait = wait_enter(&s->wait, now, &started);
	if (!started) {
		/* Already waiting when we came, or its wake-up was not seen. The kernel knows
		 * since when: its run-queue clock was read a moment ago, in __schedule(). */
		u64 queued = LD64(task, OFF_LAST_QUEUED);

		if (place == PLACE_UNKNOWN)
			c->open_at_start++;
		else
			c->no_start++;
		if (!queued) {
			cause_unqueued(s);
			return;
		}
		if (clock < queued) {
			cause_unqueued(s);
			return;
		}
		wait = clock - queued;
		s->queued_clock = queued;
		s->wait.kind = WAIT_WAKEUP;
		s->wait.blocked_ns = 0;
		s->wait.queued_ns = 0;
		s->wait.migrations = 0;
		c->recovered++;
		s->blocked_weight_ns = s->waker_key = 0;
		no_waker(s);
		s->waker_ctx = CTX_UNKNOWN;
	}
	wakeup = s->wait.queued_ns ? s->wait.queued_ns - (now - wait) : 0;
	s->last_wait_ns = wait - wakeup + 1;	/* the books begin when it is queued */
	s->last_clock_ns = clock > s->queued_clock ? clock - s->queued_clock : 0;
	/* Preempted between setting its state to sleep and sleeping: runnable, yet the kernel opens
	 * no entry for such a wait (sched_info_depart() asks task_is_running()). */
	c->unbooked += !LD64(task, OFF_LAST_QUEUED);
	causes_of_wait(ctx, k, s, task, now, wait);
	count_wait(s, wait, k->due);
	k->here_wait_ns = wait;
	k->here_tid = LD32(task, OFF_TASK_PID);
	k->here_waker_tid = s->waker_tid;
	sleep_enter(s, now, wait);
	send_wait(ctx, k, s, task, now, wait, wakeup, place);
	cause_unqueued(s);
}

/* The parts of lat_switch; see then_stay in kernel.h. */
int lat_stay(u64 *ctx)
{
	struct cpu_clock *k = clock_of(bpf_get_smp_processor_id());

	if (k)
		remember_stay(ctx, k, ARG(ctx, 1), k->now_ns);
	return 0;
}

int lat_leave(u64 *ctx)
{
	struct cpu_clock *k = clock_of(bpf_get_smp_processor_id());
	u64 prev = ARG(ctx, 1);
#ifdef HAVE_PREV_STATE
	u32 state = ARG(ctx, 3);
#else
	u32 state = LD32(prev, OFF_TASK_STATE);
#endif

	if (k)
		leave(ctx, prev, k->now_ns, (u8)ARG(ctx, 0) || !state, state & TASK_DEAD);
	return 0;
}

int lat_enter(u64 *ctx)
{
	struct cpu_clock *k = clock_of(bpf_get_smp_processor_id());

	if (k)
		enter(ctx, ARG(ctx, 2), k->now_ns, k);
	return 0;
}

int lat_switch(u64 *ctx)
{
	u64 prev = ARG(ctx, 1), next = ARG(ctx, 2), now;
	struct cpu_clock *k = clock_of(bpf_get_smp_processor_id());
	int out = is_target(prev), in = is_target(next);
	u64 gate;

	if (!k)
		return 0;
	gate = k->since_ns;
	if (!out && !in && !gate)
		return 0;
	now = k->now_ns = bpf_ktime_get_ns();
	if (gate) {
		account(k, now, clock_of_thread(prev), prev, 0);
		/* Of one short wait that ends here nobody will ask who made it. */
		if (!in || k->waiting > 1 || now - k->opened_ns >= SLICED_NS)
			then_stay(ctx);
	}
	if (out)
		then_leave(ctx);
	if (in)
		then_enter(ctx);
	next_stay(k, next, now);
	if (k->due_wait_ns)
		then_slices(ctx);
	return 0;
}

/* The end of __schedule(), in the thread that was switched in: only here can its user stack be
 * read, and only now is it known that its wait was worth one. */
int lat_sched_exit(u64 *ctx)
{
	struct cpu_state *c = this_cpu();
	u64 task, key;

	if (!c || !c->due_tid)
		return 0;
	task = get_current_task_btf();
	key = c->due_key;
	if (LD32(task, OFF_TASK_PID) != c->due_tid) {
		c->due_tid = 0;
		c->missed_stacks++;
		return 0;
	}
	c->due_tid = 0;
	if (!send_stack(ctx, c, key, task, 1, SCRATCH_VICTIM))
		c->lost_stacks++;
	sleep_delayed(task);
	return 0;
}
