/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* What the targets do on the CPU: one look at each CPU in every period of its clock. Systematic
 * sampling in time: a stack stands for as many periods as it was seen.
 *
 * Runs in the clock's interrupt, which may come while another program takes a stack on this CPU:
 * what it writes is its own. The kernel hands it the registers of what was interrupted, so a walk
 * begins there and not in the interrupt.
 */
#define SAMPLE_KEYS (1ULL << 63)	/* new_key() does not come so far */

int lat_on_cpu(u64 *ctx)
{
	u64 task = get_current_task_btf(), key, now;
	struct sample_record *r;
	struct cpu_state *c;
	u32 cpu;

	if (!is_target(task))
		return 0;
	c = this_cpu();
	if (!c)
		return 0;
	now = bpf_ktime_get_ns();
	cpu = bpf_get_smp_processor_id();
	/* Not new_key(): its counter may be half-way through an increment just now. */
	key = SAMPLE_KEYS | (++c->samples * NCPU + cpu);
	if (!send_stack(ctx, c, key, task, !(LD32(task, OFF_TASK_FLAGS) & PF_KTHREAD),
			SCRATCH_SAMPLE)) {
		c->lost_stacks++;
		key = 0;
	}
	r = lat_ring.ringbuf_reserve(CELL_BYTES);
	if (!r)		/* its stack finds no row, and is counted as lost then */
		return 0;
	r->type = RECORD_SAMPLE;
	r->pad0 = 0;
	r->cpu = cpu;
	r->tid = LD32(task, OFF_TASK_PID);
	r->tgid = LD32(task, OFF_TASK_TGID);
	r->pad1 = 0;
	r->ts_ns = now;
	r->weight_ns = LD64(ctx, OFF_SAMPLE_PERIOD);
	r->stack_key = key;
	lat_ring.ringbuf_submit(r, BPF_RB_NO_WAKEUP);
	return 0;
}
