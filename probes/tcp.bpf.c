/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* TCP segments sent once more, and whose they are.
 *
 * A retransmit happens in a timer or in a softirq: `current` has nothing to do with it. Whose a
 * socket is, is kept with the socket, by what happens to it in process context: it is connected or
 * made to listen, sent to or received from. An accepted socket begins with the owner of the one
 * that listened (BPF_F_CLONE), until somebody uses it.
 *
 * The tracepoint fires once for a buffer of several segments, and since ad892e912b84 (6.17) for
 * some that were not sent at all. What counts is what the socket's own counter gained: `segs`.
 * Where no event was fired (docs/limits.md), the next row has those segments as well, and after the
 * last one a row of an unknown kind, when the socket is closed.
 */

#ifdef TCP_TRACED

enum tcp_state {
	TCP_ESTABLISHED = 1, TCP_SYN_SENT, TCP_SYN_RECV, TCP_CLOSE = 7, TCP_LISTEN = 10
};
enum ca_state { CA_OPEN, CA_DISORDER, CA_CWR, CA_RECOVERY, CA_LOSS };
#define ICSK_TIME_LOSS_PROBE 5	/* include/net/inet_connection_sock.h */
#define IPPROTO_TCP 6
#define AF_INET 2
#define AF_INET6 10

static u64 (*skc_to_tcp_sock)(u64 sk) = (void *)137;
static u64 (*get_socket_cookie)(u64 sk) = (void *)46;
static u64 (*sock_from_file)(u64 file) = (void *)162;

struct socket_state {
	u32 tgid, tid;			/* who used it last */
	u32 total_retrans;		/* segments, at the last look */
	u8 lossy;			/* it retransmitted, and nobody has received since */
	u8 recovering, pad[2];
	char comm[COMM_BYTES];
};

BYTES_OF(socket_state);
BPF_SK_STORAGE(lat_sockets, struct socket_state_bytes);

/* Of requests for a connection, by cookie: how often a SYN-ACK was seen to be sent once more. */
BPF_TABLE("lru_hash", u64, u32, lat_requests, 4096);

static inline struct socket_state *socket_of(u64 sk)
{
	return lat_sockets.sk_storage_get((void *)sk, 0, 0);
}

static inline int is_tcp(u64 sk)
{
	u64 family = LD16(sk, OFF_SK_FAMILY);

	return LD16(sk, OFF_SK_PROTOCOL) == IPPROTO_TCP && (family == AF_INET || family == AF_INET6);
}

static inline int is_wanted(u32 tgid, u32 tid)
{
	struct control *o = control();
	char *process = target_byte(tgid), *thread = target_byte(tid);

	return (o && o->all_sockets) || (process && *process & TARGET_PROCESS) ||
	       (thread && *thread & TARGET_THREAD);
}

/* A record of a socket, or of the request for one: they begin alike (struct sock_common). */
static inline void fill_socket(struct socket_record *r, u64 sk, u8 type, struct socket_state *s)
{
	u64 net = 0;

	r->type = type;
	r->event = 0;
	r->ts_ns = bpf_ktime_get_ns();
	r->tgid = s->tgid;
	r->tid = s->tid;
	*(u64 *)r->comm = *(u64 *)s->comm;
	*(u64 *)(r->comm + 8) = *(u64 *)(s->comm + 8);
	read_kernel(&r->family, 2, sk + OFF_SK_FAMILY);
	read_kernel(&r->state, 1, sk + OFF_SK_STATE);
	read_kernel(&r->sport, 2, sk + OFF_SK_NUM);
	read_kernel(&r->dport, 2, sk + OFF_SK_DPORT);	/* in network order, unlike the other one */
	if (r->family == AF_INET6) {
		read_kernel(r->saddr, 16, sk + OFF_SK_SADDR6);
		read_kernel(r->daddr, 16, sk + OFF_SK_DADDR6);
	} else {
		read_kernel(r->saddr, 4, sk + OFF_SK_SADDR);	/* the rest is not looked at */
		read_kernel(r->daddr, 4, sk + OFF_SK_DADDR);
	}
	r->netns = 0;
	if (!read_kernel(&net, 8, sk + OFF_SK_NET))
		read_kernel(&r->netns, 4, net + OFF_NET_INUM);
	r->cookie = get_socket_cookie(sk);	/* makes one where there is none */
	r->kind = RETRANS_UNKNOWN;
	r->err = r->segs = 0;
	r->seq = r->len = 0;
	r->total_retrans = r->srtt_us = r->rto_jiffies = r->cwnd = r->ssthresh = r->in_flight = 0;
	r->pad = 0;
}

static inline struct socket_record *begin_record(u64 sk, u8 type, struct socket_state *s)
{
	struct socket_record *r = lat_ring.ringbuf_reserve(CELL_BYTES);
	struct cpu_state *c;

	if (r)
		fill_socket(r, sk, type, s);
	else if ((c = this_cpu()))
		c->lost_sockets++;
	return r;
}

static inline void send_event(u64 sk, u8 event, struct socket_state *s)
{
	struct socket_record *r = begin_record(sk, RECORD_SOCKET, s);

	if (!r)
		return;
	r->event = event;
	lat_ring.ringbuf_submit(r, BPF_RB_NO_WAKEUP);
}

static inline void fill_tcp(struct socket_record *r, u64 tp)
{
	r->total_retrans = LD32(tp, OFF_TOTAL_RETRANS);
	r->srtt_us = LD32(tp, OFF_SRTT_US) >> 3;
	r->rto_jiffies = LD32(tp, OFF_RTO);
	r->cwnd = LD32(tp, OFF_CWND);
	r->ssthresh = LD32(tp, OFF_SSTHRESH);
	r->in_flight = LD32(tp, OFF_PACKETS_OUT) - LD32(tp, OFF_SACKED_OUT) -
		       LD32(tp, OFF_LOST_OUT) + LD32(tp, OFF_RETRANS_OUT);
}

/* Why it was sent again. After a timeout everything is, until all that was lost is through
 * (CA_Loss); a loss probe goes out before the socket has seen anything amiss. */
static inline u8 kind_of(u64 tp)
{
	u8 state = LD8(tp, OFF_CA_STATE) & 31, pending = LD8(tp, OFF_PENDING);

	if (state == CA_LOSS)
		return RETRANS_RTO;
	if (state >= CA_CWR)
		return RETRANS_FAST;
	return pending == ICSK_TIME_LOSS_PROBE ? RETRANS_TLP : RETRANS_UNKNOWN;
}

int lat_retransmit(u64 *ctx)
{
	u64 sk = ARG(ctx, 0), skb = ARG(ctx, 1), tp;
	struct socket_state *s = socket_of(sk);
	struct socket_record *r;
	u32 total, segs, end = 0;

	if (!s || !is_wanted(s->tgid, s->tid))
		return 0;
	tp = skc_to_tcp_sock(sk);
	if (!tp)
		return 0;
	total = LD32(tp, OFF_TOTAL_RETRANS);
	segs = total - s->total_retrans;
	if (!segs)
		return 0;	/* it never left: the device still had the first one, say */
	s->total_retrans = total;
	s->lossy = s->recovering = 1;
	r = begin_record(sk, RECORD_RETRANSMIT, s);
	if (!r)
		return 0;
	fill_tcp(r, tp);
	r->kind = kind_of(tp);
#ifdef RETRANSMIT_HAS_ERR
	r->err = (s32)ARG(ctx, 2);
#endif
	r->segs = segs;
	read_kernel(&r->seq, 4, skb + OFF_SKB_CB + OFF_CB_SEQ);
	read_kernel(&end, 4, skb + OFF_SKB_CB + OFF_CB_END_SEQ);
	r->len = end - r->seq;
	lat_ring.ringbuf_submit(r, BPF_RB_NO_WAKEUP);
	return 0;
}

/* Of a connection that is not yet one: it is the listener's. */
int lat_synack(u64 *ctx)
{
	u64 sk = ARG(ctx, 0);
	struct socket_state *s = socket_of(sk);
	u64 request = ARG(ctx, 1), cookie;
	struct socket_record *r;
	u32 total, *seen;

	if (!s || !is_wanted(s->tgid, s->tid))
		return 0;
	total = LD8(request, OFF_REQ_RETRANS) + 1;	/* it is counted after this */
	cookie = get_socket_cookie(request);
	seen = lat_requests.lookup(&cookie);
	r = begin_record(request, RECORD_RETRANSMIT, s);
	if (r) {
		r->kind = RETRANS_SYNACK;
		r->segs = total - (seen ? *seen : 0);
		r->total_retrans = total;
		lat_ring.ringbuf_submit(r, BPF_RB_NO_WAKEUP);
	}
	lat_requests.update(&cookie, &total);
	return 0;
}

/* All that was lost has arrived. */
int lat_recovered(u64 *ctx)
{
	u64 sk = ARG(ctx, 0);
	struct socket_state *s;

	if ((u8)ARG(ctx, 1) != CA_OPEN)
		return 0;
	s = socket_of(sk);
	if (!s || !s->recovering || !is_wanted(s->tgid, s->tid))
		return 0;
	s->recovering = 0;
	send_event(sk, SOCKET_RECOVERED, s);
	return 0;
}

/* A socket is used in process context: by whom. Of those that no target has had, nothing is kept.
 * `tid` 0: it is only known that the process has it. */
static inline struct socket_state *use_socket(u64 sk, u64 task, u32 tid)
{
	struct socket_state *s = socket_of(sk), first = {};
	u32 tgid = LD32(task, OFF_TASK_TGID);
	struct cpu_state *c;
	u64 tp;

	if (!s) {
		if (!is_wanted(tgid, tid))
			return 0;
		tp = skc_to_tcp_sock(sk);
		if (!tp)
			return 0;
		first.total_retrans = LD32(tp, OFF_TOTAL_RETRANS);
		s = lat_sockets.sk_storage_get((void *)sk, &first, BPF_LOCAL_STORAGE_GET_F_CREATE);
	}
	if (s) {
		s->tgid = tgid;
		s->tid = tid;
		copy_comm(s->comm, task);
	} else if ((c = this_cpu())) {
		c->no_storage++;
	}
	return s;
}

static inline struct socket_state *use_socket_here(u64 sk)
{
	u64 task = get_current_task_btf();

	if (LD32(task, OFF_TASK_FLAGS) & PF_KTHREAD)
		return 0;	/* it works for somebody else */
	return use_socket(sk, task, LD32(task, OFF_TASK_PID));
}

int lat_sent(u64 *ctx)
{
	u64 sk = ARG(ctx, 0);

	if (is_tcp(sk))
		use_socket_here(sk);
	return 0;
}

/* Data has been copied to who receives. */
int lat_received(u64 *ctx)
{
	u64 sk = ARG(ctx, 0);
	struct socket_state *s;

	if (!is_tcp(sk) || !LD32(sk, OFF_SK_OWNED))
		return 0;	/* in a softirq: for a process that is not here */
	s = use_socket_here(sk);
	if (!s || !s->lossy)
		return 0;
	s->lossy = 0;	/* the first one after a retransmit: who had waited for it */
	if (is_wanted(s->tgid, s->tid))
		send_event(sk, SOCKET_RECEIVED, s);
	return 0;
}

static inline void fill_totals(struct socket_record *r, u64 tp)
{
	r->rttvar_us = LD32(tp, OFF_RTTVAR) >> 2;
	r->bytes_sent = LD64(tp, OFF_BYTES_SENT);
	r->bytes_retrans = LD64(tp, OFF_BYTES_RETRANS);
	r->bytes_acked = LD64(tp, OFF_BYTES_ACKED);
	r->bytes_received = LD64(tp, OFF_BYTES_RECEIVED);
	r->segs_out = LD32(tp, OFF_SEGS_OUT);
	r->segs_in = LD32(tp, OFF_SEGS_IN);
	r->rate_delivered = LD32(tp, OFF_RATE_DELIVERED);
	r->rate_interval_us = LD32(tp, OFF_RATE_INTERVAL);
	r->mss = LD32(tp, OFF_MSS);
}

/* Segments that were sent once more, unseen. */
static inline void send_unseen(u64 sk, u64 tp, struct socket_state *s, u8 kind, u32 segs)
{
	struct socket_record *r = begin_record(sk, RECORD_RETRANSMIT, s);

	if (!r)
		return;
	fill_tcp(r, tp);
	r->kind = kind;
	r->segs = segs;
	lat_ring.ringbuf_submit(r, BPF_RB_NO_WAKEUP);
}

static inline void send_closed(u64 sk, struct socket_state *s)
{
	struct socket_record *r;
	u64 tp = skc_to_tcp_sock(sk), sport;
	u32 total;

	if (!tp)
		return;
	total = LD32(tp, OFF_TOTAL_RETRANS);
	if (total != s->total_retrans)
		send_unseen(sk, tp, s, RETRANS_UNKNOWN, total - s->total_retrans);
	s->total_retrans = total;
	r = begin_record(sk, RECORD_CLOSED, s);
	if (!r)
		return;
	/* It has given its port back, but has it written down. */
	sport = LD16(tp, OFF_INET_SPORT);
	r->sport = sport >> 8 | sport << 8;
	fill_tcp(r, tp);
	fill_totals(r, tp);
	lat_ring.ringbuf_submit(r, BPF_RB_NO_WAKEUP);
}

static inline void accept_socket(u64 sk, u64 tp, struct socket_state *s)
{
	u32 total = LD32(tp, OFF_TOTAL_RETRANS), *seen;
	u64 cookie;

	s->total_retrans = total;
	if (total && is_wanted(s->tgid, s->tid)) {
		cookie = get_socket_cookie(sk);		/* the request's */
		seen = lat_requests.lookup(&cookie);
		if (seen)
			total -= *seen;
		if (total)
			send_unseen(sk, tp, s, RETRANS_SYNACK, total);
		lat_requests.delete(&cookie);
	}
	s->tid = 0;	/* nobody has used it yet */
}

int lat_socket_state(u64 *ctx)
{
	u64 sk = ARG(ctx, 0), old = (u32)ARG(ctx, 1), now = (u32)ARG(ctx, 2), tp;
	struct socket_state *s;

	if (!is_tcp(sk))
		return 0;
	if (now == TCP_SYN_SENT || now == TCP_LISTEN) {
		use_socket_here(sk);
		return 0;
	}
	s = socket_of(sk);
	if (!s)
		return 0;
	if (old == TCP_SYN_RECV && now == TCP_ESTABLISHED) {
		/* All that it has so far is of the one that listened. */
		tp = skc_to_tcp_sock(sk);
		if (tp)
			accept_socket(sk, tp, s);
	} else if (now == TCP_CLOSE && old != TCP_LISTEN && is_wanted(s->tgid, s->tid)) {
		send_closed(sk, s);
	}
	return 0;
}

/* iter/task_file: the sockets that are there, and who has them open. */
int lat_iter_sockets(u64 *ctx)
{
	u64 seq = LD64(LD64(ctx, 0), 0), task = LD64(ctx, 8), file = LD64(ctx, 24), socket, sk, net;
	struct socket_owner r = {};
	struct socket_state *s;

	if (!task || !file)
		return 0;
	socket = sock_from_file(file);
	if (!socket)
		return 0;
	sk = LD64(socket, OFF_SOCKET_SK);
	if (!sk || !is_tcp(sk))
		return 0;
	r.tgid = LD32(task, OFF_TASK_TGID);
	s = socket_of(sk);
	if (!s && is_wanted(r.tgid, 0))
		s = use_socket(sk, task, 0);
	if (!s || !is_wanted(s->tgid, s->tid))
		return 0;
	r.cookie = get_socket_cookie(sk);
	net = LD64(sk, OFF_SK_NET);
	r.netns = LD32(net, OFF_NET_INUM);
	r.total_retrans = s->total_retrans;
	r.state = LD8(sk, OFF_SK_STATE);
	seq_write(seq, &r, sizeof(r));
	return 0;
}

/* iter/bpf_sk_storage_map: every socket of a target; some are still there after their last
 * owner closed them. */
int lat_iter_storage(u64 *ctx)
{
	u64 seq = LD64(LD64(ctx, 0), 0), sk = LD64(ctx, 16), tp;
	struct socket_state *s = (void *)LD64(ctx, 24);
	u64 cell[CELL_BYTES / 8] = {};
	struct socket_record *r = (void *)cell;

	if (!sk || !s || !is_wanted(s->tgid, s->tid))
		return 0;
	tp = skc_to_tcp_sock(sk);
	if (!tp)
		return 0;
	fill_socket(r, sk, RECORD_CLOSED, s);
	fill_tcp(r, tp);
	fill_totals(r, tp);
	r->segs = r->total_retrans - s->total_retrans;	/* unseen */
	seq_write(seq, cell, sizeof(cell));
	return 0;
}
#endif
