/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* Loops that few waits need, as functions of their own: see then_stay in kernel.h. */

/* The group whose quota is used up, for a run queue of a group: its own or the nearest above. */
int lat_throttled(u64 *ctx)
{
#ifdef OFF_TASK_THROTTLED
	struct cpu_clock *k = clock_of(bpf_get_smp_processor_id());
	u64 group = 0, cgroup = 0;
	u32 throttled, depth;

	if (!k)
		return 0;
	k->group = 0;
	if (read_kernel(&group, 8, k->cfs_rq + OFF_CFS_RQ_TG))
		return 0;
	LOOP (depth = 0; depth < 16; depth++) {
		u64 queue = 0;

		if (!group || read_kernel(&queue, 8, group + OFF_TG_CFS_RQ) ||
		    read_kernel(&queue, 8, queue + 8 * (u64)bpf_get_smp_processor_id()) ||
		    read_kernel(&throttled, 4, queue + OFF_CFS_RQ_THROTTLED))
			return 0;
		if (throttled & 1)
			break;
		if (read_kernel(&group, 8, group + OFF_TG_PARENT))
			return 0;
	}
	if (!read_kernel(&cgroup, 8, group + OFF_TG_CGROUP) &&
	    !read_kernel(&cgroup, 8, cgroup + OFF_CGROUP_KN))
		read_kernel(&k->group, 8, cgroup + OFF_KN_ID);
#endif
	return 0;
}

#define STAYS_AFTER_QUOTA 16

/* What this CPU did since the quota came back (walk.from_ns), by cause: from the stays remembered,
 * newest first. */
int lat_after_quota(u64 *ctx)
{
	struct cpu_clock *k = clock_of(bpf_get_smp_processor_id());
	u32 i, tgid = LD32(ARG(ctx, 2), OFF_TASK_TGID);
	u64 newest;

	if (!k)
		return 0;
	newest = k->stays;
	LOOP (i = 0; i < STAYS_AFTER_QUOTA; i++) {
		u32 at = bpf_get_smp_processor_id() * STAYS + --newest % STAYS;
		struct stay *y = (struct stay *)lat_stays.lookup(&at);
		u64 ns, irq, softirq, own;

		if (!y || y->end_ns <= k->walk.from_ns)
			break;
		ns = y->end_ns - max_ns(y->start_ns, k->walk.from_ns);
		irq = min_ns(y->irq_ns, ns);
		softirq = min_ns(y->softirq_ns, ns - irq);
		k->due[CAUSE_IRQ] += irq;
		k->due[CAUSE_SOFTIRQ] += softirq;
		ns -= irq + softirq;
		k->due[y->cause & 7] += ns;
		/* of `other`, what is the thread's own process */
		own = y->cause == CAUSE_OTHER && y->tgid == tgid ? ns : 0;
		k->due[CAUSE_OTHER] -= own;
		k->due[CAUSE_OWN] += own;
	}
	return 0;
}

#define CPUS_LOOKED_AT 128

/* For how long the thread that gets this CPU could have had another one that it may use: of the
 * CPUs idle now, the one longest so. One that was idle earlier and has work now is not seen. */
int lat_elsewhere(u64 *ctx)
{
	struct cpu_clock *k = clock_of(bpf_get_smp_processor_id());

	if (!k)
		return 0;
	k->elsewhere_ns = 0;
#if defined(OFF_TASK_GROUP) && defined(OFF_RQ_CLOCK_IDLE)
	u64 task = ARG(ctx, 2), mask = LD64(task, OFF_TASK_CPUS), allowed = 0;
	u64 now = queue_clock(task);
	u32 cpu, here = bpf_get_smp_processor_id();

	LOOP (cpu = 0; cpu < (NCPU < CPUS_LOOKED_AT ? NCPU : CPUS_LOOKED_AT); cpu++) {
		u64 rq, current = 0, idle = 1, since = 0;

		if (cpu % 64 == 0 && read_kernel(&allowed, 8, mask + cpu / 8))
			return 0;
		if (cpu == here || !(allowed >> cpu % 64 & 1))
			continue;
		rq = run_queue_of(task, cpu);
		if (!rq ||
		    read_kernel(&current, 8, rq + OFF_RQ_CURR) ||
		    read_kernel(&idle, 8, rq + OFF_RQ_IDLE) || current != idle ||
		    read_kernel(&since, 8, rq + OFF_RQ_CLOCK_IDLE) || since >= now)
			continue;
		k->elsewhere_ns = max_ns(k->elsewhere_ns, now - since);
	}
#endif
	return 0;
}

/* Who has the CPU whose queue a waiting thread is taken from: its stay there is not over, and may
 * never be remembered. Without pointers that have a type: it is another CPU's. */
int lat_moved(u64 *ctx)
{
	u64 task = ARG(ctx, 0);
	struct thread_state *s = lat_tasks.task_storage_get((void *)task, 0, 0);
	struct cpu_clock *here = clock_of(bpf_get_smp_processor_id()), *k;
	struct stay *y;

	if (!s || !here)
		return 0;
	y = &s->left;
	y->tid = 0;
	k = clock_of(here->from);
#ifdef OFF_TASK_GROUP
	u64 at = run_queue_of(task, here->from), group = 0;
	u32 flags = 0, value = 0;

	if (!k || !at || read_kernel(&at, 8, at + OFF_RQ_CURR) || read_kernel(&flags, 4, at + OFF_TASK_FLAGS) ||
	    read_kernel(&y->tgid, 4, at + OFF_TASK_TGID) ||
	    read_kernel(y->comm, COMM_BYTES, at + OFF_TASK_COMM) ||
	    read_kernel(&value, 4, at + OFF_TASK_POLICY))
		return 0;
	y->policy = value;
	read_kernel(&value, 4, at + OFF_TASK_PRIO);
	y->prio = value;
	y->cgroup = 0;
	if (!read_kernel(&group, 8, at + OFF_TASK_GROUP) && group &&
	    !read_kernel(&group, 8, group + OFF_TG_CGROUP) && group &&
	    !read_kernel(&group, 8, group + OFF_CGROUP_KN))
		read_kernel(&y->cgroup, 8, group + OFF_KN_ID);
	y->start_ns = k->stay_ns;
	y->end_ns = here->moved_ns;
	y->irq_ns = k->stay_irq_ns;
	y->softirq_ns = k->stay_softirq_ns;
	y->vector = k->stay_vector;
	y->stack_key = y->weight_ns = 0;
	y->cause = flags & PF_KTHREAD ? CAUSE_KTHREAD : CAUSE_OTHER;
	read_kernel(&y->tid, 4, at + OFF_TASK_PID);	/* 0: idle */
#endif
	return 0;
}
