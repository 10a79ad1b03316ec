/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* Walks over all tasks (iter/task): who is a target when we begin, and how each one stands when
 * we end. What they print is read from the iterator's file, so none of it can be lost. */

static inline u64 iterated(u64 *ctx)
{
	return LD64(ctx, 8);		/* struct bpf_iter__task { meta, task } */
}

/* For how long it has been waiting, or blocked. */
static inline u64 open_for(struct thread_state *s, u64 now)
{
	if (s->wait.place == PLACE_WAITING)
		return now - s->wait.start_ns;
	if (s->wait.place == PLACE_BLOCKED)
		return now - s->wait.off_ns;
	return 0;
}

/* Threads that sleep now are blocked since now, as far as this trace can tell; threads that
 * wait keep PLACE_UNKNOWN, and the kernel's `last_queued` tells how long when they run. */
int lat_iter_seed(u64 *ctx)
{
	u64 task = iterated(ctx), seq = LD64(LD64(ctx, 0), 0);
	struct thread_record r = {};
	struct thread_state *s;

	if (!task)
		return 0;
	if (!is_target(task))
		return 0;
	s = state_of(task);
	if (!s)
		return 0;
	if (s->wait.place == PLACE_UNKNOWN) {
		if (LD32(task, OFF_TASK_ON_CPU)) {
			s->wait.place = PLACE_ON_CPU;
		} else if (!LD32(task, OFF_TASK_ON_RQ) || LD64(task, OFF_LAST_QUEUED) == 0) {
			s->wait.off_ns = bpf_ktime_get_ns();
			s->wait.place = PLACE_BLOCKED;
		}
	}
	fill_thread(&r, task, s, THREAD_SEEN);
	r.open_ns = open_for(s, r.ts_ns);
	seq_write(seq, &r, sizeof(r));
	return 0;
}

int lat_iter_end(u64 *ctx)
{
	u64 task = iterated(ctx), seq = LD64(LD64(ctx, 0), 0);
	struct thread_record r = {};
	struct thread_state *s;
	struct cpu_state *c = this_cpu();
	struct scratch *frames = scratch_at(SCRATCH_VICTIM);
	u64 bytes = 0;	/* BPF divides unsigned numbers only */
	u64 regs[PT_REGS];

	if (!task || !c || !frames)
		return 0;
	s = lat_tasks.task_storage_get((void *)task, 0, 0);
	if (!s)
		return 0;
	/* Still in the stay on a CPU that its last wait led to: the books have that wait, and not yet
	 * one that came after we detached. */
	if (s->last_wait_ns && LD64(task, OFF_PCOUNT) - s->kernel_count <= 1)
		look_at_books(c, s, task, 1);
	else if (s->last_wait_ns)
		c->kernel_count++;	/* which entry is whose cannot be told any more */
	sleep_end(s, task, c);
	fill_thread(&r, task, s, THREAD_END);
	r.open_ns = open_for(s, r.ts_ns);
	if (s->wait.place == PLACE_BLOCKED) {
		bytes = stack_of_sleeper(frames, task);
		r.frames = bytes / 8;
#ifdef OFF_REGS_IP
		if (!(LD32(task, OFF_TASK_FLAGS) & PF_KTHREAD) &&
		    !read_kernel(regs, sizeof(regs), task_pt_regs(task)))
			r.user_ip = regs[OFF_REGS_IP / 8];
#endif
	}
	seq_write(seq, &r, sizeof(r));
	if (bytes)
		seq_write(seq, frames->frames, bytes);
	if (r.user_ip)
		seq_write(seq, regs, sizeof(regs));
	return 0;
}
