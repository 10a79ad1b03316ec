/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* Who held up the wait that ended just now: everything that ran on its CPU meanwhile, as slices.
 * lat_switch calls this for waits that have a row and are long enough. It is a function of its own
 * (see then_slices): as a part of lat_switch the verifier would follow it once for each way there.
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

/* What ran on a CPU in a stretch of a wait, newest first. `irq` and `softirq`: how much of each
 * there was; a stay that began before the stretch has the rest of it. */
static inline void send_stays(struct cpu_state *c, u64 task, u64 run_ns, u32 cpu, u64 from, u64 until,
			      u64 *irq, u64 *softirq, u8 *vector)
{
	struct cpu_clock *k = clock_of(cpu);
	u64 tgid = LD32(task, OFF_TASK_TGID);
	u32 i;

	if (!k)
		return;
	LOOP (i = 1; i <= STAYS; i++) {
		u32 at = cpu * STAYS + (k->stays - i) % STAYS;
		struct stay *y = (struct stay *)lat_stays.lookup(&at);
		struct slice_record *r;
		u64 start, end, cut, other;
		u8 cause;

		if (!y || i > k->stays || y->end_ns <= from)
			break;
		if (y->start_ns >= until)
			continue;
		start = y->start_ns > from ? y->start_ns : from;
		end = y->end_ns < until ? y->end_ns : until;
		cut = y->irq_ns < *irq ? y->irq_ns : *irq;
		other = y->softirq_ns < *softirq ? y->softirq_ns : *softirq;
		*irq -= cut;
		*softirq -= other;
		if (other)
			*vector = y->vector;
		cut += other;
		if (y->clock == CLOCK_IDLE || end - start <= cut)
			continue;
		cause = y->clock == CLOCK_KTHREAD ? CAUSE_KTHREAD :
			y->tgid == tgid		  ? CAUSE_OWN :
						    CAUSE_OTHER;
		r = new_slice(c, task, run_ns, cpu, cause);
		if (!r)
			break;
		r->start_ns = start;
		r->dur_ns = end - start - cut;
		r->tid = y->tid;
		r->tgid = y->tgid;
		*(u64 *)r->comm = *(u64 *)y->comm;
		*(u64 *)(r->comm + 8) = *(u64 *)(y->comm + 8);
		r->policy = y->policy;
		r->prio = y->prio;
		r->cgroup = y->cgroup;
		r->stack_key = y->stack_key;
		r->weight_ns = y->weight_ns;
		/* A stack is given to the first wait that asks: it stands for that stay once. */
		y->stack_key = y->weight_ns = 0;
		lat_ring.ringbuf_submit(r, BPF_RB_NO_WAKEUP);
	}
}

int lat_slices(u64 *ctx)
{
	u32 cpu = bpf_get_smp_processor_id();
	u64 task = ARG(ctx, 2), run_ns, start, irq, softirq;
	struct cpu_clock *k = clock_of(cpu);
	struct cpu_state *c = this_cpu();
	struct thread_state *s;
	struct slice_record *r;
	u8 vector = 0;

	s = lat_tasks.task_storage_get((void *)task, 0, 0);
	if (!s || !k || !c)
		return 0;
	run_ns = k->stay_ns;
	irq = k->due[CAUSE_IRQ];
	softirq = k->due[CAUSE_SOFTIRQ];
	start = run_ns - k->due_wait_ns + k->due[CAUSE_THROTTLED];
	k->due_wait_ns = 0;
	send_stays(c, task, run_ns, cpu, s->here_ns > start ? s->here_ns : start, run_ns, &irq,
		   &softirq, &vector);
	if (s->moves == 1)
		send_stays(c, task, run_ns, s->moved_from, start, s->here_ns, &irq, &softirq,
			   &vector);
	if (k->due[CAUSE_IRQ] && (r = new_slice(c, task, run_ns, cpu, CAUSE_IRQ))) {
		r->start_ns = start;
		r->dur_ns = k->due[CAUSE_IRQ];
		lat_ring.ringbuf_submit(r, BPF_RB_NO_WAKEUP);
	}
	if (k->due[CAUSE_SOFTIRQ] && (r = new_slice(c, task, run_ns, cpu, CAUSE_SOFTIRQ))) {
		r->start_ns = start;
		r->dur_ns = k->due[CAUSE_SOFTIRQ];
		r->vector = vector;
		lat_ring.ringbuf_submit(r, BPF_RB_NO_WAKEUP);
	}
	return 0;
}
