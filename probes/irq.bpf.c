/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* Interrupts on a CPU where a target waits. Hard interrupts do not nest; they come within softirqs,
 * and both within the current thread. A switch starts afresh (next_stay()), so that an end that
 * was not seen does no lasting harm. */

static inline struct cpu_clock *running_clock(void)
{
	struct cpu_clock *k = clock_of(bpf_get_smp_processor_id());

	return k && k->since_ns ? k : 0;
}

static inline u64 clock_below(struct cpu_clock *k, u64 task)
{
	return k->vector ? CLOCK_SOFTIRQ : clock_of_thread(task);
}

int lat_irq_entry(u64 *ctx)
{
	struct cpu_clock *k = running_clock();
	u64 task;

	if (!k)
		return 0;
	task = get_current_task_btf();
	account(k, bpf_ktime_get_ns(), clock_below(k, task), task, 0);
	k->doing = CLOCK_IRQ;
	return 0;
}

int lat_irq_exit(u64 *ctx)
{
	struct cpu_clock *k = running_clock();
	u64 task;

	if (!k)
		return 0;
	task = get_current_task_btf();
	account(k, bpf_ktime_get_ns(), CLOCK_IRQ, task, 0);
	k->doing = clock_below(k, task);
	return 0;
}

int lat_softirq_entry(u64 *ctx)
{
	struct cpu_clock *k = running_clock();
	u64 task;

	if (!k)
		return 0;
	task = get_current_task_btf();
	account(k, bpf_ktime_get_ns(), clock_of_thread(task), task, 1);
	k->vector = (u32)ARG(ctx, 0) + 1;
	k->doing = CLOCK_SOFTIRQ;
	return 0;
}

int lat_softirq_exit(u64 *ctx)
{
	struct cpu_clock *k = running_clock();
	u64 task, now, ns;

	if (!k)
		return 0;
	task = get_current_task_btf();
	now = bpf_ktime_get_ns();
	ns = now - k->since_ns;
	account(k, now, CLOCK_SOFTIRQ, task, 1);
	k->vector = 0;
	k->doing = clock_of_thread(task);
	if (ns >= k->stay_vector_ns) {
		k->stay_vector = (u32)ARG(ctx, 0);
		k->stay_vector_ns = ns;
	}
	return 0;
}
