/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* Who held up the wait that ended just now: everything that ran on its CPU meanwhile, as slices.
 * A part of lat_switch, for waits that have a row and are long enough.
 */

static inline struct slice_record *new_slice(struct cpu_state *c, u64 task, u64 run_ns, u32 cpu,
					     u8 cause)
{
	struct slice_record *r = lat_ring.ringbuf_reserve(CELL_BYTES);

	if (!r) {
		c->lost_slices++;
		return 0;
	}
	c->slices++;
	r->type = RECORD_SLICE;
	r->cause = cause;
	r->vector = r->policy = 0;
	r->cpu = cpu;
	r->prio = 0;
	r->tid = r->tgid = 0;
	r->victim_tid = LD32(task, OFF_TASK_PID);
	r->victim_run_ns = run_ns;
	*(u64 *)r->comm = *(u64 *)(r->comm + 8) = 0;
	r->cgroup = r->stack_key = r->weight_ns = 0;
	return r;
}

static inline void send_interrupts(struct cpu_state *c, u64 task, u64 run_ns, u8 cause, u64 start,
				   u64 ns, u8 vector)
{
	struct slice_record *r;

	if (!ns)
		return;
	r = new_slice(c, task, run_ns, bpf_get_smp_processor_id(), cause);
	if (!r)
		return;
	r->start_ns = start;
	r->dur_ns = ns;
	r->vector = vector;
	lat_ring.ringbuf_submit(r, BPF_RB_NO_WAKEUP);
}

/* One stay as a slice of the wait that `w` describes; returns 0 when the ring is full. Interrupts are
 * taken off as far as the wait had them: a stay that began before the wait has others as well. */
static inline int send_stay(struct cpu_state *c, struct walk *w, struct stay *y, u64 task, u32 cpu)
{
	u64 first = max_ns(y->start_ns, w->from_ns), ns = min_ns(y->end_ns, w->until_ns) - first;
	u64 cut, softirq, tgid = LD32(task, OFF_TASK_TGID);
	struct slice_record *r;

	if ((s64)ns <= 0)
		return 1;
	cut = min_ns(y->irq_ns, w->irq_ns);
	softirq = min_ns(y->softirq_ns, w->softirq_ns);
	w->irq_ns -= cut;
	w->softirq_ns -= softirq;
	if (softirq > w->vector_ns) {
		w->vector = y->vector;
		w->vector_ns = softirq;
	}
	cut += softirq;
	if (y->cause == CAUSE_IDLE || ns <= cut)
		return 1;
	r = new_slice(c, task, w->run_ns, cpu, y->cause);
	if (!r)
		return 0;
	r->cause -= y->cause == CAUSE_OTHER && y->tgid == tgid;	/* CAUSE_OWN */
	r->start_ns = first;
	r->dur_ns = ns - cut;
	r->tid = y->tid;
	r->tgid = y->tgid;
	*(u64 *)r->comm = *(u64 *)y->comm;
	*(u64 *)(r->comm + 8) = *(u64 *)(y->comm + 8);
	r->policy = y->policy;
	r->prio = y->prio;
	r->cgroup = y->cgroup;
	r->stack_key = y->stack_key;
	r->weight_ns = y->weight_ns;
	/* The first wait that asks has the stack: it stands for that stay once. */
	y->stack_key = y->weight_ns = 0;
	lat_ring.ringbuf_submit(r, BPF_RB_NO_WAKEUP);
	return 1;
}

/* The stays of the wait, newest first: on this CPU since the thread came to its queue, then on the
 * one that it came from. What it works with lies in the maps, for the verifier. */
int lat_slices(u64 *ctx)
{
	u32 cpu = bpf_get_smp_processor_id(), i;
	u64 task = ARG(ctx, 2), newest;
	struct cpu_clock *k = clock_of(cpu), *here = k;
	struct cpu_state *c = this_cpu();
	struct control *o = control();
	struct thread_state *s;
	struct walk *w;
	u64 sent;

	s = lat_tasks.task_storage_get((void *)task, 0, 0);
	if (!s || !k || !c || !o)
		return 0;
	sent = c->slices;
	w = &here->walk;
	w->start_ns = k->stay_ns - k->due_wait_ns + k->due[CAUSE_THROTTLED];
	k->due_wait_ns = 0;
	w->run_ns = w->until_ns = k->stay_ns;
	w->irq_ns = k->due[CAUSE_IRQ];
	w->softirq_ns = k->due[CAUSE_SOFTIRQ];
	w->vector = w->vector_ns = 0;
	w->from_ns = max_ns(s->here_ns, w->start_ns);
	w->moved = s->moves && s->here_ns > w->start_ns;
	newest = k->stays;
	LOOP (i = 0; i < STAYS; i++) {
		u32 at = cpu * STAYS + --newest % STAYS;
		struct stay *y = (struct stay *)lat_stays.lookup(&at);

		if (!y)
			break;
		if (y->end_ns <= w->from_ns) {
			if (!w->moved)
				break;
			w->moved = 0;
			w->until_ns = s->here_ns;
			w->from_ns = max_ns(s->moved_from_ns, w->start_ns);
			cpu = s->moved_from;
			k = clock_of(cpu);
			if (!k)
				break;
			newest = k->stays;
			/* Its stay went on: whatever is remembered of it is not all of it. */
			if (s->left.tid && !send_stay(c, w, &s->left, task, cpu))
				break;
			w->until_ns = min_ns(s->left.start_ns, w->until_ns);
			continue;
		}
		if (!send_stay(c, w, y, task, cpu))
			break;
	}
	send_interrupts(c, task, w->run_ns, CAUSE_IRQ, w->start_ns, here->due[CAUSE_IRQ], 0);
	send_interrupts(c, task, w->run_ns, CAUSE_SOFTIRQ, w->start_ns, here->due[CAUSE_SOFTIRQ],
			w->vector);
	__sync_fetch_and_add(&o->slice_tokens, sent - c->slices);
	return 0;
}
