/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* The exact counters of waits, and their check against the scheduler's own.
 *
 * task->sched_info has `pcount`, how often a thread got a CPU after queueing for one, and
 * `run_delay`, for how long it queued. It times nothing where its run-queue clock did not move
 * between enqueue and arrival (kernel/sched/stats.h): a wake-up on an idle CPU, or one that
 * preempts at once.
 *
 * That clock stands still for part of some waits: it is read when the queue is locked, and not
 * even then once a wake-up has decided to preempt (RQCF_REQ_SKIP in kernel/sched/sched.h), though
 * the interrupt that woke may go on for long. So each wait is also measured with that clock, read
 * at our own events: these sums must be equal, and the difference to ours is how it stood.
 */
#pragma once

/* A wait into the exact counters: of the thread, and of its process on this CPU. */
static inline void count_wait(struct thread_state *s, u64 wait, u64 *causes)
{
	u32 cause, i = s->slot * NCPU + bpf_get_smp_processor_id();
	struct hist *h = (void *)lat_hist.lookup(&i);
	u64 slot;

	s->waits++;
	s->wait_ns += wait;
	if (wait > s->max_wait_ns)
		s->max_wait_ns = wait;
	if (!h)
		return;
#pragma unroll
	for (cause = 0; cause < CAUSES; cause++) {
		s->causes[cause] += causes[cause];
		h->causes[cause] += causes[cause];
	}
	h->kinds[s->wait.kind & 3]++;
	h->wait_ns += wait;
	if (wait > h->max_ns)
		h->max_ns = wait;
	if (s->wait.blocked_ns) {
		s->blocked++;
		s->blocked_ns += s->wait.blocked_ns;
		h->blocked++;
		h->blocked_ns += s->wait.blocked_ns;
	}
	slot = hist_slot(wait);
	asm volatile("" : "+r"(slot));	/* check and use the same register */
	if (slot < HIST_SLOTS)
		h->slots[slot]++;
}

/* Waits that the books have and whose events were not fired: counted, without details, and left
 * out of the comparison with these books. */
static inline void count_unseen(struct thread_state *s, struct cpu_state *c, u64 waits, u64 ns)
{
	u64 causes[CAUSES] = {};

	causes[CAUSE_UNKNOWN] = ns;
	c->missed_switches += waits;
	c->unseen_ns += ns;
	c->recovered++;
	s->wait.kind = WAIT_WAKEUP;
	s->wait.blocked_ns = 0;
	count_wait(s, ns, causes);
}

/* What the books gained since the last look is their entry for the last wait counted here. To be
 * called while the thread is on the CPU that the wait led to, as it leaves it: a wait that moves
 * between run queues enters the books in pieces, the last one after the tracepoint. `entered`:
 * whether the thread was seen to enter this CPU. */
static inline void look_at_books(struct cpu_state *c, struct thread_state *s, u64 task, int entered)
{
	u64 ns = LD64(task, OFF_RUN_DELAY), count = LD64(task, OFF_PCOUNT);
	u64 gained = ns - s->kernel_ns, waits = count - s->kernel_count;
	u64 ours = s->last_wait_ns - 1;
	u64 seen = entered && s->last_wait_ns;

	c->kernel_count += waits;
	if (waits > seen) {
		if (seen)
			gained = gained > ours ? gained - ours : 0;
		count_unseen(s, c, waits - seen, gained);
	} else if (seen) {
		c->kernel_ns += gained;
		if (gained) {
			c->timed_waits++;
			c->timed_ns += ours;
			c->clock_ns += s->last_clock_ns;
		} else {
			c->blind_waits++;
			c->blind_ns += ours;
		}
	}
	s->last_wait_ns = 0;
	s->kernel_ns = ns;
	s->kernel_count = count;
}
