/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* Stacks travel in the ring as plain addresses, never through a stack map: a map of hashes loses
 * exactly the hot stacks, on collision (BPF_MAP_TYPE_STACK_TRACE). Few are taken (sample.h), so
 * their size does not matter.
 */

static inline struct scratch *scratch_at(u32 place)
{
	u32 slot = bpf_get_smp_processor_id() * SCRATCH_PLACES + place;

	return (struct scratch *)lat_scratch.lookup(&slot);
}

#define REGS_SP 19		/* of struct pt_regs, in words */

/* Registers and stack of the current thread in user space; `pages`: a constant. */
static inline void fill_copy(struct copy_head *h, u64 key, u64 task, u32 pages)
{
	char *to = (char *)(h + 1);
	u64 base, bytes, i;

	h->key = key;
	h->tgid = LD32(task, OFF_TASK_TGID);
	h->bytes = 0;
	if (read_kernel(h->regs, sizeof(h->regs), task_pt_regs(task)))
		return;
	base = h->regs[REGS_SP] - RED_ZONE;
	bytes = PAGE - (base & (PAGE - 1));
	if (read_user(to, bytes, base)) {
		base += RED_ZONE;	/* a stack that begins here */
		bytes = PAGE - (base & (PAGE - 1));
		if (read_user(to, bytes, base))
			return;
	}
#pragma unroll
	for (i = 0; i < pages; i++) {
		if (read_user(to + bytes, PAGE, base + bytes))
			break;
		bytes += PAGE;
	}
	h->base = base;
	h->bytes = bytes;
}

#define COPY_BYTES(pages) (sizeof(struct copy_head) + ((pages) + 1) * PAGE)

/* A part (kernel.h): copy the stack that this CPU's `copy_key` is for. */
int lat_copy(u64 *ctx)
{
#ifdef OFF_REGS_SYSCALL
	u64 task = get_current_task_btf(), pages;
	struct cpu_state *c = this_cpu();
	struct control *o = control();
	struct copy_head *h;

	if (!c || !o)
		return 0;
	pages = o->copy_pages;
	if (pages == 1) {
		h = lat_copies.ringbuf_reserve(COPY_BYTES(1));
		if (h)
			fill_copy(h, c->copy_key, task, 1);
	} else if (pages == 2) {
		h = lat_copies.ringbuf_reserve(COPY_BYTES(2));
		if (h)
			fill_copy(h, c->copy_key, task, 2);
	} else if (pages == 4) {
		h = lat_copies.ringbuf_reserve(COPY_BYTES(4));
		if (h)
			fill_copy(h, c->copy_key, task, 4);
	} else {
		h = lat_copies.ringbuf_reserve(COPY_BYTES(8));
		if (h)
			fill_copy(h, c->copy_key, task, 8);
	}
	if (h)
		lat_copies.ringbuf_submit(h, BPF_RB_NO_WAKEUP);
	else
		c->lost_copies++;
#endif
	return 0;
}

/* Send a copy of the current thread's user stack, before its frames. An interrupt that takes a stack
 * meanwhile leaves `copy_key` as it was. */
static inline void send_copy(void *ctx, struct cpu_state *c, u64 key)
{
	struct control *o = control();
	u64 before = c->copy_key;

	if (!o || !o->copy_pages)
		return;
	c->copy_key = key;
	then_copy(ctx);
	c->copy_key = before;
}

/* Send the first `kernel + user` frames of `s`; returns 0 when the ring was full. */
static inline int send_frames(struct cpu_state *c, struct scratch *s, u64 key, u64 task,
			      u32 kernel, u32 user, int has_user)
{
	u32 part, i;

	LOOP (part = 0; part < STACK_FRAMES / STACK_CELL_FRAMES; part++) {
		struct stack_record *r;

		if (part && part * STACK_CELL_FRAMES >= kernel + user)
			break;
		r = lat_ring.ringbuf_reserve(CELL_BYTES);
		if (!r)
			return 0;
		r->type = RECORD_STACK;
		r->part = part;
		r->has_user = has_user;
		r->pad = 0;
		r->kernel = kernel;
		r->user = user;
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

/* Take and send the kernel stack and, if `user`, the user stack of the current task. */
static inline int send_stack(void *ctx, struct cpu_state *c, u64 key, u64 task, int user,
			     u32 place)
{
	struct scratch *s = scratch_at(place);
	long kernel_bytes, user_bytes = 0;

	if (!s)
		return 0;
	if (user)
		send_copy(ctx, c, key);
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
	return send_frames(c, s, key, task, (u64)kernel_bytes / 8, (u64)user_bytes / 8, user);
}

/* The kernel stack of a task that does not run: all that can be had of it. Returns bytes. */
static inline u64 stack_of_sleeper(struct scratch *s, u64 task)
{
	long bytes = get_task_stack(task, s->frames, STACK_KERNEL_FRAMES * 8, 0);

	return bytes < 0 || bytes > STACK_KERNEL_FRAMES * 8 ? 0 : bytes;
}

static inline u64 new_key(struct cpu_state *c)
{
	return ++c->next_key * NCPU + bpf_get_smp_processor_id() + 1;
}
