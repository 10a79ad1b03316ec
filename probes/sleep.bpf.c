/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* What a sleep call asked for and what it got, without the tracepoints of system calls: those tax
 * every process of the host.
 *
 * A call with a timeout arms a timer on its own kernel stack; the call's number and arguments are
 * in its registers then. When a timerfd ends a wait, that timer runs while it wakes the thread. The
 * end is the door to user mode, which `rseq_update` tells of threads that registered restartable
 * sequences (glibc 2.35 does): each time, on their way out, after they were off the CPU. Of others
 * the last time they got the CPU counts. Which one was the last is known only later, when the
 * thread leaves the CPU or arms another timer and has been in user mode meanwhile: the record is
 * closed then.
 *
 * When does a call begin? The kernel computes the end of poll, select, epoll and futex as the
 * first thing it does: the timer's time less the time asked for is that moment. A relative
 * nanosleep, and everything absolute, begins where the timer is armed; either is within a
 * microsecond of the instruction unless a preemption comes between.
 */

/* One per call, of all CPUs: adding is atomic, and sleep calls are few. */
static inline struct overshoot *overshoot_of(u32 call)
{
	return (struct overshoot *)lat_overshoot.lookup(&call);
}

#ifdef SLEEP_CALLS_SEEN
/* Whether it has been in user mode since it last got the CPU. The kernel marks the floating-point
 * registers as not loaded when a thread leaves the CPU, and loads them at the door to user mode.
 * TIF_NEED_FPU_LOAD is 14, and 19 where TIF_NOTIFY_RESUME is generic; the other one is free. */
static inline int was_in_user_mode(u64 task)
{
	return !(LD64(task, OFF_TASK_TI_FLAGS) & (1 << 14 | 1 << 19));
}

static inline void count_sleep(struct sleep_state *s, struct sleep_parts *p)
{
	struct overshoot *o = overshoot_of(s->call);
	u64 slot;

	if (!o)
		return;
	if (p->early) {
		__sync_fetch_and_add(&o->early, 1);
		return;
	}
	__sync_fetch_and_add(&o->count, 1);
	__sync_fetch_and_add(&o->overshoot_ns, p->overshoot_ns);
	__sync_fetch_and_add(&o->entry_ns, p->entry_ns);
	__sync_fetch_and_add(&o->timer_ns, p->timer_ns);
	__sync_fetch_and_add(&o->run_queue_ns, p->run_queue_ns);
	__sync_fetch_and_add(&o->return_ns, p->return_ns);
	slot = hist_slot(p->overshoot_ns);
	asm volatile("" : "+r"(slot));	/* one register for the check and the use */
	if (slot < HIST_SLOTS)
		__sync_fetch_and_add(&o->slots[slot], 1);
}

/* The call is over: count it and send its row. */
static inline void close_sleep(struct sleep_state *s, u64 task, struct cpu_state *c)
{
	struct control *o = control();
	struct sleep_record *r;
	struct sleep_parts p;

	s->phase = SLEEP_NONE;
	sleep_parts(s, &p);
	count_sleep(s, &p);
	if (!o || (p.early ? p.exit_ns - s->woken_ns : p.overshoot_ns) < o->min_ns)
		return;
	r = lat_ring.ringbuf_reserve(CELL_BYTES);
	if (!r) {
		c->lost_sleeps++;
		return;
	}
	c->sleeps++;
	r->type = RECORD_SLEEP;
	r->clock = s->clock;
	r->deadline_from = s->from;
	r->flags = (p.early ? SLEEP_EARLY : 0) | (s->has_ret ? SLEEP_HAS_RET : 0);
	r->syscall = s->syscall;
	r->pad = 0;
	r->tid = LD32(task, OFF_TASK_PID);
	r->tgid = LD32(task, OFF_TASK_TGID);
	r->enter_ns = s->enter_ns;
	r->exit_ns = p.exit_ns;
	r->requested_ns = s->requested_ns;
	r->deadline_ns = s->deadline_ns;
	r->slack_ns = s->slack_ns;
	r->overshoot_ns = p.overshoot_ns;
	r->entry_ns = p.entry_ns;
	r->timer_ns = p.timer_ns;
	r->run_queue_ns = p.run_queue_ns;
	r->return_ns = p.return_ns;
	r->late_ns = p.late_ns;
	r->expirations = p.expirations;
	r->ret = s->ret;
	r->stack_key = 0;		/* it is that of the wait: a stack goes to one row */
	lat_ring.ringbuf_submit(r, BPF_RB_NO_WAKEUP);
}

struct asked {
	s64 ns;			/* -1: not known */
	u8 absolute, clock;
};

static inline s64 user_time(u64 at, u32 unit_ns)
{
	s64 t[2];

	if (!at || read_user(t, sizeof(t), at) || t[0] < 0 || t[0] > 9000000000ll)
		return -1;
	return t[0] * 1000000000 + t[1] * unit_ns;
}

/* What a call asks for, by its arguments. */
static inline void read_asked(struct asked *a, u8 call, u64 regs)
{
	u64 op;

	a->ns = -1;
	a->absolute = 0;
	a->clock = CLOCK_MONOTONIC;
	switch (call) {
	case SLEEP_NANOSLEEP:
		a->ns = user_time(LD64(regs, OFF_REGS_ARG0), 1);
		break;
	case SLEEP_CLOCK_NANOSLEEP:
		a->clock = LD32(regs, OFF_REGS_ARG0);
		a->absolute = LD32(regs, OFF_REGS_ARG1) & 1;	/* TIMER_ABSTIME */
		a->ns = user_time(LD64(regs, OFF_REGS_ARG2), 1);
		break;
	case SLEEP_SELECT:
		a->ns = user_time(LD64(regs, OFF_REGS_ARG4), 1000);
		break;
	case SLEEP_PSELECT6:
		a->ns = user_time(LD64(regs, OFF_REGS_ARG4), 1);
		break;
	case SLEEP_POLL:
		a->ns = (s64)(s32)LD32(regs, OFF_REGS_ARG2) * 1000000;
		break;
	case SLEEP_PPOLL:
		a->ns = user_time(LD64(regs, OFF_REGS_ARG2), 1);
		break;
	case SLEEP_EPOLL_WAIT:
	case SLEEP_EPOLL_PWAIT:
		a->ns = (s64)(s32)LD32(regs, OFF_REGS_ARG3) * 1000000;
		break;
	case SLEEP_EPOLL_PWAIT2:
		a->ns = user_time(LD64(regs, OFF_REGS_ARG3), 1);
		break;
	case SLEEP_FUTEX:
		op = LD32(regs, OFF_REGS_ARG1);
		a->absolute = (op & 127) != 0;			/* all but FUTEX_WAIT */
		if (op & 256 || (op & 127) == 6)		/* FUTEX_LOCK_PI */
			a->clock = CLOCK_REALTIME;
		a->ns = user_time(LD64(regs, OFF_REGS_ARG3), 1);
		break;
	case SLEEP_FUTEX_WAITV:
		a->absolute = 1;
		a->clock = LD32(regs, OFF_REGS_ARG4);
		a->ns = user_time(LD64(regs, OFF_REGS_ARG3), 1);
		break;
	}
}

/* hrtimer_start: most are of interrupts and of other threads. */
int lat_timer_start(u64 *ctx)
{
	u64 task = get_current_task_btf(), timer, regs, sleeper = 0, base, now, fires;
	struct thread_state *t;
	struct sleep_state *s;
	struct cpu_state *c;
	struct asked asked;
	s64 syscall;
	u8 call;

	if (!is_target(task))
		return 0;
	timer = ARG(ctx, 0);
	if (timer - LD64(task, OFF_TASK_STACK) >= THREAD_SIZE ||
	    read_kernel(&sleeper, 8, timer + OFF_SLEEPER_TASK) || sleeper != task)
		return 0;
	regs = task_pt_regs(task);
	syscall = (s32)LD32(regs, OFF_REGS_SYSCALL);
	t = state_of(task);
	c = this_cpu();
	if (!t || !c)
		return 0;
	s = &t->sleep;
	base = LD64(timer, OFF_TIMER_BASE);
	fires = LD64(timer, OFF_TIMER_SOFT) - LD64(base, OFF_BASE_OFFSET);
	if (s->phase == SLEEP_BACK) {
		/* Woken for nothing and off to sleep again; or stopped, and the kernel goes on
		 * with the call after one instruction in user mode. */
		if (!was_in_user_mode(task) || syscall == SYS_RESTART) {
			s->phase = SLEEP_ARMED;
			s->woken_ns = s->run_queue_ns = 0;
			return 0;
		}
		close_sleep(s, task, c);
	} else if (s->phase == SLEEP_ARMED) {
		if (s->fires_ns == fires) {	/* woken before it was off the CPU */
			s->woken_ns = 0;
			return 0;
		}
		c->never_blocked++;
		s->phase = SLEEP_NONE;
	}
	call = sleep_call_of(syscall);
	if (call >= SLEEP_READ)
		return 0;
	read_asked(&asked, call, regs);
	if (asked.ns < 0)
		return 0;
	if (!asked.ns && !asked.absolute) {
		c->zero_timeout++;
		return 0;
	}
	now = bpf_ktime_get_ns();
	s->armed_ns = s->enter_ns = now;
	s->fires_ns = s->deadline_ns = fires;
	s->slack_ns = LD64(timer, OFF_TIMER_EXPIRES) - LD64(timer, OFF_TIMER_SOFT);
	s->clock = asked.clock;
	if (asked.absolute) {
		s->from = FROM_ABSOLUTE;
		s->requested_ns = fires > now ? fires - now : 0;
	} else {
		s->from = FROM_TIMEOUT;
		s->requested_ns = asked.ns;
		if (fires - asked.ns < now)
			s->enter_ns = fires - asked.ns;
	}
	s->interval_ns = s->woken_ns = s->run_queue_ns = s->in_ns = s->back_ns = 0;
	s->has_ret = s->left = 0;
	s->ip = LD64(regs, OFF_REGS_IP);
	s->syscall = syscall;
	s->call = call;
	s->phase = SLEEP_ARMED;
	return 0;
}

/* The timer that runs on this CPU right now; 0: none. */
static inline u64 running_timer(u64 on_this_cpu)
{
	u64 rq = queue_of(on_this_cpu), bases = rq + TIMER_BASES_FROM_RQ, timer = 0;
	u32 clock;

	if (!rq)
		return 0;
#pragma unroll
	for (clock = 0; clock < 4; clock++) {	/* monotonic, real time, boot time, TAI */
		if (read_kernel(&timer, 8, bases + OFF_BASE_RUNNING + clock * TIMER_BASE_SIZE))
			return 0;
		if (timer)
			break;
	}
	return timer;
}

/* A hardware interrupt wakes `task`: when it is a timerfd's, that is the call's deadline. */
static inline void sleep_timerfd(struct thread_state *t, u64 task, u64 waker, u64 now)
{
	struct sleep_state *s = &t->sleep;
	u64 regs = task_pt_regs(task), timer, base = 0, *timerfd, time[2], offset = 0, interval = 0;
	s64 syscall = (s32)LD32(regs, OFF_REGS_SYSCALL);
	u8 call = sleep_call_of(syscall);
	u32 zero = 0, clock = 0;

	if (call < SLEEP_SELECT || call > SLEEP_READ || call == SLEEP_FUTEX ||
	    call == SLEEP_FUTEX_WAITV)
		return;
	timerfd = lat_timerfd.lookup(&zero);
	timer = running_timer(waker);
	if (!timer || !timerfd || !*timerfd ||
	    read_kernel(&base, 8, timer + OFF_TIMER_FUNCTION) || base != *timerfd)
		return;
	if (read_kernel(time, 16, timer + OFF_TIMER_EXPIRES) ||	/* and _softexpires */
	    read_kernel(&base, 8, timer + OFF_TIMER_BASE) ||
	    read_kernel(&offset, 8, base + OFF_BASE_OFFSET) ||
	    read_kernel(&clock, 4, base + OFF_BASE_CLOCK) ||
	    read_kernel(&interval, 8, timer + OFF_TIMERFD_INTERVAL))
		return;
	if (s->phase != SLEEP_ARMED) {
		/* It sleeps for ever, as far as the call goes: it armed no timer. It came into the
		 * call at some time before it went off the CPU. */
		if (t->wait.place != PLACE_WAITING || !t->wait.blocked_ns)
			return;
		s->armed_ns = s->enter_ns = now - t->wait.blocked_ns;
		s->requested_ns = -1;
		s->run_queue_ns = s->in_ns = s->back_ns = 0;
		s->has_ret = 0;
		s->ip = LD64(regs, OFF_REGS_IP);
		s->syscall = syscall;
		s->call = call;
		s->phase = SLEEP_ARMED;
		s->left = 1;
	}
	s->woken_ns = now;
	s->from = FROM_TIMERFD;
	s->clock = clock;
	s->deadline_ns = s->fires_ns = time[1] - offset;
	s->slack_ns = 0;
	s->interval_ns = interval;
}

/* sched_waking */
static inline void sleep_waking(struct thread_state *t, u64 now)
{
	if (t->sleep.phase == SLEEP_ARMED && !t->sleep.woken_ns)
		t->sleep.woken_ns = now;
}

/* It got the CPU at `now`, after `wait` ns on a run queue. */
static inline void sleep_enter(struct thread_state *t, u64 now, u64 wait)
{
	struct sleep_state *s = &t->sleep;

	if (s->phase == SLEEP_NONE)
		return;
	if (s->phase == SLEEP_ARMED) {
		if (!s->woken_ns) {
			/* Preempted on its way to sleep, and on it again. */
			if (t->wait.kind == WAIT_PREEMPTED)
				return;
			s->woken_ns = now - wait;	/* its waking was not seen */
		}
		s->phase = SLEEP_BACK;
	}
	sleep_ran(s, now, wait);
}

/* It leaves the CPU. */
static inline void sleep_leave(struct thread_state *t, u64 task, struct cpu_state *c, int runnable)
{
	struct sleep_state *s = &t->sleep;
	s16 syscall;
	u64 regs;

	if (s->phase == SLEEP_NONE)
		return;
	regs = task_pt_regs(task);
	if (s->phase == SLEEP_ARMED) {
		syscall = LD32(regs, OFF_REGS_SYSCALL);
		if ((syscall == s->syscall || syscall == SYS_RESTART) &&
		    LD64(regs, OFF_REGS_IP) == s->ip) {
			s->left = 1;
		} else {
			c->never_blocked++;
			s->phase = SLEEP_NONE;
		}
	} else if (was_in_user_mode(task) || (s32)LD32(regs, OFF_REGS_SYSCALL) < 0) {
		/* Below zero: interrupted in user mode. */
		close_sleep(s, task, c);
	} else if (!runnable && s->woken_ns < s->deadline_ns && s->call == SLEEP_FUTEX) {
		/* Woken for nothing, and off to sleep again under the same timer. */
		s->phase = SLEEP_ARMED;
		s->woken_ns = s->run_queue_ns = 0;
	} else if (!runnable && s->requested_ns < 0 &&
		   (s64)LD64(regs, OFF_REGS_RET) == -ENOSYS) {
		/* Another thread was faster with what the timerfd had; this call goes on. */
		s->phase = SLEEP_NONE;
	}
}

/* At the door to user mode, and its switches were not seen (count_unseen() in books.h tells of
 * those): what it waited on run queues is in the kernel's books. Returns 0 when it did not leave
 * the CPU, or when its waking was not seen either. */
static inline int sleep_unseen(struct thread_state *t, u64 task, struct cpu_state *c)
{
	u64 seen = t->wait.place == PLACE_ON_CPU && t->last_wait_ns, now = bpf_ktime_get_ns();
	u64 waited = LD64(task, OFF_RUN_DELAY) - t->kernel_ns, ours = seen ? t->last_wait_ns - 1 : 0;

	if (LD64(task, OFF_PCOUNT) - t->kernel_count <= seen)
		return 0;
	if (!t->sleep.woken_ns) {
		c->lost_sleeps++;
		t->sleep.phase = SLEEP_NONE;
		return 0;
	}
	t->sleep.left = 1;
	t->sleep.phase = SLEEP_BACK;
	sleep_ran(&t->sleep, now, waited > ours ? waited - ours : 0);
	return 1;
}

/* Its stack was taken, for some 10 us. Where nothing tells of the door to user mode, that is the
 * last that is seen of the call. */
static inline void sleep_delayed(u64 task)
{
	struct thread_state *t = lat_tasks.task_storage_get((void *)task, 0, 0);

	if (t && t->sleep.phase == SLEEP_BACK)
		t->sleep.back_ns = bpf_ktime_get_ns();
}

/* rseq_update: a thread at the door to user mode. */
int lat_back(u64 *ctx)
{
	u64 task = get_current_task_btf(), regs;
	struct thread_state *t;
	struct cpu_state *c;
	s32 syscall;

	if (!is_target(task))
		return 0;
	c = this_cpu();
	if (!c)
		return 0;
	t = lat_tasks.task_storage_get((void *)task, 0, 0);
	if (!t || t->sleep.phase == SLEEP_NONE)
		return 0;
	if (t->sleep.phase == SLEEP_ARMED && !sleep_unseen(t, task, c))
		return 0;
	regs = task_pt_regs(task);
	syscall = LD32(regs, OFF_REGS_SYSCALL);
	if (syscall < 0)
		return 0;
	/* The door of a later call, to which a switch led that was not seen. */
	if (was_in_user_mode(task) || (syscall != t->sleep.syscall && syscall != SYS_RESTART)) {
		close_sleep(&t->sleep, task, c);
		return 0;
	}
	t->sleep.ret = LD64(regs, OFF_REGS_RET);
	/* Elsewhere: a signal has its handler run first, or the kernel restarts the call. */
	t->sleep.has_ret = LD64(regs, OFF_REGS_IP) == t->sleep.ip;
	t->sleep.back_ns = bpf_ktime_get_ns();
	return 0;
}

/* The trace ends. */
static inline void sleep_end(struct thread_state *t, u64 task, struct cpu_state *c)
{
	if (t->sleep.phase == SLEEP_BACK)
		close_sleep(&t->sleep, task, c);
}
#else
/* The registers of other machines are not known here (tracer/compile.py). */
static inline void sleep_waking(struct thread_state *t, u64 now) {}
static inline void sleep_timerfd(struct thread_state *t, u64 task, u64 waker, u64 now) {}
static inline void sleep_enter(struct thread_state *t, u64 now, u64 wait) {}
static inline void sleep_leave(struct thread_state *t, u64 task, struct cpu_state *c, int runnable) {}
static inline void sleep_delayed(u64 task) {}
static inline void sleep_end(struct thread_state *t, u64 task, struct cpu_state *c) {}
#endif
