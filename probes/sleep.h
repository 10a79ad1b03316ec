/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* A sleep call taken apart: plain C, no kernel call, also built for the host.
 *
 *   enter ─► armed ─► deadline ─► may fire ─► woken ─► runs ─ ... ─► runs ─► back in user mode
 *                        └─ entry ──┴─ timer ──┴ run queue and return ───────┘
 *
 * The deadline is what the application asked for; the overshoot is counted from it or, where it
 * was past already, from the call. A thread can wait on a run queue several times on its way out:
 * for its wake-up, for preemption in the kernel, for its group's quota. All that is run queue.
 */
#pragma once
#include <linux/types.h>

/* In the order of tracer/sleeps.py. */
enum sleep_call {
	SLEEP_NANOSLEEP, SLEEP_CLOCK_NANOSLEEP, SLEEP_SELECT, SLEEP_PSELECT6, SLEEP_POLL,
	SLEEP_PPOLL, SLEEP_EPOLL_WAIT, SLEEP_EPOLL_PWAIT, SLEEP_EPOLL_PWAIT2, SLEEP_FUTEX,
	SLEEP_FUTEX_WAITV, SLEEP_READ, SLEEP_CALLS, SLEEP_OTHER = SLEEP_CALLS
};
enum deadline_from { FROM_TIMEOUT, FROM_ABSOLUTE, FROM_TIMERFD };
enum sleep_phase {
	SLEEP_NONE,		/* in no sleep call that we know of */
	SLEEP_ARMED,		/* its timer runs: about to leave the CPU, or off it */
	SLEEP_BACK		/* was woken and runs: on its way out, or out */
};

struct sleep_state {
	u64 enter_ns, armed_ns;
	u64 deadline_ns;	/* as asked, CLOCK_MONOTONIC */
	u64 fires_ns;		/* the timer's own earliest time */
	u64 slack_ns;
	s64 requested_ns;	/* -1: for ever */
	u64 interval_ns;	/* of a periodic timerfd */
	u64 woken_ns;		/* 0: not yet */
	u64 run_queue_ns;	/* since then */
	u64 in_ns;		/* it last got the CPU */
	u64 back_ns;		/* seen at the door to user mode; 0: not */
	u64 ip;			/* of the call, in user mode */
	s64 ret;
	s16 syscall;
	u8 call, clock, from;
	u8 phase;
	u8 left;		/* it left the CPU in this call */
	u8 has_ret;
};

struct sleep_parts {
	u64 exit_ns, late_ns, expirations;
	s64 overshoot_ns, entry_ns, timer_ns, run_queue_ns, return_ns;
	int early;		/* woken before the deadline: the parts are 0 */
};

/* x86-64, arch/x86/entry/syscalls/syscall_64.tbl */
static inline u8 sleep_call_of(s64 syscall)
{
	switch (syscall) {
	case 0:   return SLEEP_READ;
	case 7:   return SLEEP_POLL;
	case 23:  return SLEEP_SELECT;
	case 35:  return SLEEP_NANOSLEEP;
	case 202: return SLEEP_FUTEX;
	case 230: return SLEEP_CLOCK_NANOSLEEP;
	case 232: return SLEEP_EPOLL_WAIT;
	case 270: return SLEEP_PSELECT6;
	case 271: return SLEEP_PPOLL;
	case 281: return SLEEP_EPOLL_PWAIT;
	case 441: return SLEEP_EPOLL_PWAIT2;
	case 449: return SLEEP_FUTEX_WAITV;
	}
	return SLEEP_OTHER;
}

/* It left a run queue at `now` after `wait_ns`. What it waited before it was woken (preempted on
 * its way to sleep) is no part of the overshoot. */
static inline void sleep_ran(struct sleep_state *s, u64 now, u64 wait_ns)
{
	u64 since = now > s->woken_ns ? now - s->woken_ns : 0;

	s->run_queue_ns += wait_ns < since ? wait_ns : since;
	s->in_ns = now;
	s->back_ns = 0;
	s->has_ret = 0;
}

static inline u64 later_of(u64 a, u64 b)
{
	return a > b ? a : b;
}

/* The parts of a call that is over. They are never negative, and add up to the overshoot. */
static inline void sleep_parts(const struct sleep_state *s, struct sleep_parts *p)
{
	u64 deadline = later_of(s->deadline_ns, s->enter_ns), armed;

	p->exit_ns = later_of(s->in_ns, s->back_ns);
	p->late_ns = deadline - s->deadline_ns;
	p->expirations = s->from == FROM_TIMERFD;
	if (s->interval_ns && p->exit_ns > s->deadline_ns)
		p->expirations += (p->exit_ns - s->deadline_ns) / s->interval_ns;
	p->early = s->woken_ns < deadline;
	p->overshoot_ns = p->entry_ns = p->timer_ns = p->run_queue_ns = p->return_ns = 0;
	if (p->early)
		return;
	/* Woken between the deadline and the timer's time: by something else. */
	armed = later_of(later_of(s->fires_ns, s->armed_ns), deadline);
	if (armed > s->woken_ns)
		armed = s->woken_ns;
	p->overshoot_ns = p->exit_ns - deadline;
	p->entry_ns = armed - deadline;
	p->timer_ns = s->woken_ns - armed;
	p->run_queue_ns = s->run_queue_ns;
	p->return_ns = p->exit_ns - s->woken_ns - s->run_queue_ns;
}
