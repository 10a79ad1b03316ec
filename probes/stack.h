/* Stacks travel in the ring as plain addresses, never through a stack map: a map of hashes loses
 * exactly the hot stacks, on collision (BPF_MAP_TYPE_STACK_TRACE). Few are taken (sample.h), so
 * their size does not matter.
 */

/* Take kernel and user stack of the current task, send them; returns 0 when that failed.
 * `where` picks the scratch space: a waker can be an interrupt that came while another stack was
 * being taken on this CPU. */
static inline int send_stack(void *ctx, struct cpu_state *c, u64 key, u64 task, int user,
			     u32 where)
{
	u32 cpu = bpf_get_smp_processor_id(), slot = cpu * 3 + where, part;
	struct scratch *s = (void *)lat_scratch.lookup(&slot);
	long kernel_bytes, user_bytes = 0;
	u32 n;

	if (!s)
		return 0;
	kernel_bytes = get_stack_of(ctx, s->frames, STACK_KERNEL_FRAMES * 8, 0);
	if (kernel_bytes < 0)
		kernel_bytes = 0;
	if (kernel_bytes > STACK_KERNEL_FRAMES * 8)
		return 0;
	if (user)
		user_bytes = get_stack_of(ctx, (char *)s->frames + (kernel_bytes & 0x1ff),
					  STACK_USER_FRAMES * 8, 1 << 8 /* BPF_F_USER_STACK */);
	if (user_bytes < 0)
		user_bytes = 0;
	n = (kernel_bytes + user_bytes) / 8;
	LOOP (part = 0; part < STACK_FRAMES / STACK_CELL_FRAMES; part++) {
		struct stack_record *r;
		u32 i;

		if (part && part * STACK_CELL_FRAMES >= n)
			break;
		r = lat_ring.ringbuf_reserve(CELL_BYTES);
		if (!r)
			return 0;
		r->type = RECORD_STACK;
		r->part = part;
		r->pad[0] = r->pad[1] = 0;
		r->kernel = kernel_bytes / 8;
		r->user = user_bytes / 8;
		r->key = key;
		r->tid = LD32(task, OFF_TASK_PID);
		r->tgid = LD32(task, OFF_TASK_TGID);
#pragma unroll
		for (i = 0; i < STACK_CELL_FRAMES; i++)
			r->frames[i] = s->frames[part * STACK_CELL_FRAMES + i];
		lat_ring.ringbuf_submit(r, BPF_RB_NO_WAKEUP);
	}
	c->stacks++;
	return 1;
}

static inline u64 new_key(struct cpu_state *c)
{
	return ++c->next_key * NCPU + bpf_get_smp_processor_id() + 1;
}
