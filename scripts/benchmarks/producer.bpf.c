/* Fills a ring with waits as fast as user space asks: each run of the program writes one cell.
 * It is run by BPF_PROG_TEST_RUN, so the rate is exact and nothing has to be slowed down for it. */
#include "latrace.h"
#include "wait.h"

BPF_RINGBUF_OUTPUT(lat_ring, RING_PAGES);
BPF_ARRAY(lat_counts, u64, 2);		/* written, lost */

int lat_produce(void *ctx)
{
	u32 written = 0, lost = 1, random = bpf_get_prandom_u32();
	struct wait_record *r = lat_ring.ringbuf_reserve(CELL_BYTES);
	u64 *count = lat_counts.lookup(r ? &written : &lost);

	if (count)
		(*count)++;
	if (!r)
		return 0;
	r->type = RECORD_WAIT;
	r->kind = random & 1 ? WAIT_WAKEUP : WAIT_PREEMPTED;
	r->waker_ctx = CTX_TASK;
	r->place = PLACE_WAITING;
	r->cpu = random & 7;
	r->syscall = random & 1 ? 0 : -1;
	r->run_ns = bpf_ktime_get_ns();
	r->wait_ns = 2000 + (random & 0xfff);
	r->blocked_ns = random >> 8;
	r->tid = 1000 + (random & 15);
	r->tgid = 1000;
	r->waker_tid = 1000 + (random >> 4 & 15);
	r->waker_tgid = 1000;
	*(u64 *)r->waker = 0x737265646972;	/* "riders" */
	*(u64 *)(r->waker + 8) = 0;
	r->weight_ns = r->blocked_weight_ns = 0;
	r->stack_key = r->waker_key = 0;
	r->wakeup_ns = random & 0x3ff;
	r->migrations = 0;
	lat_ring.ringbuf_submit(r, SUBMIT_FLAGS);
	return 0;
}
