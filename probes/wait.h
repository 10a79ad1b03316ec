/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* The wait state machine of one thread: plain C, no kernel call, also built for the host and
 * tested there against a model in Python (tests/probes/).
 *
 *            waking                 queued                 switch in
 *   BLOCKED ────────► WAITING ─────────────► WAITING ────────────────► ON_CPU
 *      ▲                 ▲                                               │
 *      │ switch out, sleeping          switch out, still runnable        │
 *      └─────────────────┴───────────────────────────────────────────────┘
 *
 * A wait starts at the FIRST moment the thread is runnable. `sched_waking` fires on the waker's
 * CPU without the thread's run-queue lock, so it can come while the thread is still on its way
 * out: it is then kept in `pending_ns` and starts the wait at switch-out.
 */
#pragma once
#include <linux/types.h>

enum wait_kind { WAIT_WAKEUP, WAIT_NEW, WAIT_PREEMPTED, WAIT_KINDS };
enum wait_place { PLACE_UNKNOWN, PLACE_ON_CPU, PLACE_BLOCKED, PLACE_WAITING };

struct wait_state {
	u64 start_ns;		/* runnable since; 0: not waiting */
	u64 queued_ns;		/* on a run queue since, where that is later than start_ns */
	u64 off_ns;		/* blocked since; 0: not known */
	u64 pending_ns;		/* woken while still on the CPU */
	u64 blocked_ns;		/* how long it was blocked before this wait */
	u8 place;		/* enum wait_place */
	u8 kind;		/* enum wait_kind of the wait under way */
	u16 migrations;		/* moves between CPUs since start_ns */
};

static inline void wait_start(struct wait_state *s, u64 now, u8 kind)
{
	s->start_ns = now;
	s->queued_ns = 0;
	s->migrations = 0;
	s->kind = kind;
	s->place = PLACE_WAITING;
	s->blocked_ns = s->off_ns && now > s->off_ns ? now - s->off_ns : 0;
	s->off_ns = 0;
}

/* sched_waking. Returns 1 when this begins a wait, so that its waker is the one to remember;
 * 2 when the thread is still on a CPU (the waker is remembered, too). */
static inline int wait_waking(struct wait_state *s, u64 now)
{
	if (s->place == PLACE_WAITING)
		return 0;
	if (s->place == PLACE_ON_CPU) {
		s->pending_ns = now;
		return 2;
	}
	wait_start(s, now, WAIT_WAKEUP);
	return 1;
}

/* sched_wakeup: the thread is on a run queue. Returns 1 when no waking was seen before it. */
static inline int wait_queued(struct wait_state *s, u64 now)
{
	if (s->place == PLACE_ON_CPU) {		/* woken before it slept: it never left */
		s->pending_ns = 0;
		return 0;
	}
	if (s->place == PLACE_WAITING) {
		/* A preempted thread never left its queue: this only sets its state. */
		if (!s->queued_ns && now > s->start_ns && s->kind != WAIT_PREEMPTED)
			s->queued_ns = now;
		return 0;
	}
	/* A waking that raced with the switch-out is still pending. */
	wait_start(s, s->pending_ns > s->off_ns ? s->pending_ns : now, WAIT_WAKEUP);
	if (now > s->start_ns)
		s->queued_ns = now;
	s->pending_ns = 0;
	return 1;
}

/* sched_switch, the thread leaves the CPU. */
static inline void wait_leave(struct wait_state *s, u64 now, int runnable)
{
	s->off_ns = 0;
	if (runnable) {
		s->pending_ns = 0;
		wait_start(s, now, WAIT_PREEMPTED);
		return;
	}
	s->off_ns = now;
	if (s->pending_ns) {
		s->pending_ns = 0;
		wait_start(s, now, WAIT_WAKEUP);
		return;
	}
	s->start_ns = 0;
	s->place = PLACE_BLOCKED;
}

/* sched_switch, the thread gets the CPU. Returns how long it waited; 0 with `started` 0 when no
 * start was seen. Clocks of two CPUs may disagree by some ns: such a wait is 0, not huge. */
static inline u64 wait_enter(struct wait_state *s, u64 now, int *started)
{
	u64 wait = 0;

	*started = s->place == PLACE_WAITING && s->start_ns;
	if (*started && now > s->start_ns)
		wait = now - s->start_ns;
	s->place = PLACE_ON_CPU;
	s->start_ns = 0;
	s->pending_ns = 0;
	s->off_ns = 0;
	return wait;
}
