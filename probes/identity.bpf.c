/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* Who is a target: threads and processes that come, change and join while we trace. */

static inline int comm_matches(struct control *o, u64 *comm)
{
	u32 i;

	LOOP (i = 0; i < PATTERNS; i++) {
		if (i >= o->comms)
			break;
		if ((comm[0] & o->comm[i].mask[0]) == o->comm[i].value[0] &&
		    (comm[1] & o->comm[i].mask[1]) == o->comm[i].value[1])
			return 1;
	}
	return 0;
}

static inline void set_target(struct control *o, u64 task, u8 on)
{
	u64 tgid = LD32(task, OFF_TASK_TGID);
	char *byte = target_byte(tgid);

	if (byte && tgid != o->self_tgid)
		*byte = (*byte & TARGET_THREAD) | on;
}

int lat_fork(u64 *ctx)
{
	u64 parent = ARG(ctx, 0), child = ARG(ctx, 1), comm[2];
	struct control *o = control();
	struct thread_state *s;

	if (!o)
		return 0;
	if (LD32(parent, OFF_TASK_TGID) != LD32(child, OFF_TASK_TGID)) {
		copy_comm((char *)comm, child);
		if ((o->follow_forks && is_target(parent)) || comm_matches(o, comm))
			set_target(o, child, TARGET_PROCESS);
	}
	s = target_state(child);
	if (s)
		send_thread(child, s, THREAD_FORK, 0);
	return 0;
}

static inline int named(u64 task, u8 event, u64 *comm)
{
	struct control *o = control();
	struct thread_state *s;

	if (o && LD32(task, OFF_TASK_PID) == LD32(task, OFF_TASK_TGID) && comm_matches(o, comm))
		set_target(o, task, TARGET_PROCESS);
	s = target_state(task);
	if (s)
		send_thread(task, s, event, comm);
	return 0;
}

int lat_exec(u64 *ctx)
{
	u64 task = ARG(ctx, 0), comm[2];

	copy_comm((char *)comm, task);
	return named(task, THREAD_EXEC, comm);
}

/* Fires before the new name is in place. */
int lat_rename(u64 *ctx)
{
	u64 comm[2] = {};

	bpf_probe_read_kernel_str(comm, sizeof(comm), (void *)ARG(ctx, 1));
	return named(ARG(ctx, 0), THREAD_RENAME, comm);
}

#if CGROUPS
/* A process moved into one of the control groups we trace, or a descendant of one, or out. */
int lat_cgroup_attach(u64 *ctx)
{
	u64 group = ARG(ctx, 0), task = ARG(ctx, 2), parent;
	struct control *o = control();
	u32 hierarchy, depth, i;

	if (!o || !o->cgroups)
		return 0;
	hierarchy = LD32(LD64(group, OFF_CGROUP_ROOT), OFF_ROOT_HIERARCHY);
	if (hierarchy != o->cgroup[0].hierarchy)
		return 0;
	LOOP (depth = 0; depth < 32; depth++) {
		u64 id = LD64(LD64(group, OFF_CGROUP_KN), OFF_KN_ID);

		LOOP (i = 0; i < PATTERNS; i++) {
			if (i < o->cgroups && id == o->cgroup[i].id) {
				set_target(o, task, TARGET_PROCESS);
				return 0;
			}
		}
		parent = LD64(group, OFF_CGROUP_PARENT);
		if (!parent)
			break;
		group = LD64(parent, OFF_CSS_CGROUP);
	}
	set_target(o, task, 0);
	return 0;
}
#endif
