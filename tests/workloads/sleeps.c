/* Every call in which a program can ask to sleep, measured by the program itself.
 *
 * Usage: sleeps COUNT MODE [CALL...]
 * COUNT: how often each call is made with each duration. MODE, letters: `b` runs as SCHED_BATCH,
 * `p` pins to CPU 0, `q` computes for 2 ms before each call, so that a quota is used up,
 * `s` sets the timer slack to 1 ms. CALLs: only those; default: all.
 *
 * Waits for a byte on standard input, so that a tracer can attach. Then prints a line for each
 * call: name, kernel's name of the call, requested ns, before, after, deadline and what its result
 * was, all times CLOCK_MONOTONIC; the calls are made one after the other.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/select.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#ifndef SYS_epoll_pwait2
#define SYS_epoll_pwait2 441
#endif
#ifndef SYS_futex_waitv
#define SYS_futex_waitv 449
#endif

typedef long long ns;

static int timer_fd, epoll_fd, empty_epoll;
static unsigned int word;

static ns clock_ns(int clock)
{
	struct timespec t;

	clock_gettime(clock, &t);
	return t.tv_sec * 1000000000ll + t.tv_nsec;
}

static ns kernels_clock_ns(int clock)
{
	struct timespec t;

	syscall(SYS_clock_gettime, clock, &t);
	return t.tv_sec * 1000000000ll + t.tv_nsec;
}

/* The moment of return. Where the CPU has idled for 10 ms, the first reading of the clock takes
 * 1 to 3 us, in which its code and data are fetched. A look at the cycle counter takes none: how
 * long ago it was is known by the next reading. */
static double cycles_per_ns;

static inline unsigned long long cycles(void)
{
#ifdef __x86_64__
	return __builtin_ia32_rdtsc();
#else
	return 0;
#endif
}

static ns clock_at(unsigned long long then)
{
	ns now;

	if (!cycles_per_ns)
		return clock_ns(CLOCK_MONOTONIC);
	clock_ns(CLOCK_MONOTONIC);
	now = clock_ns(CLOCK_MONOTONIC);
	return now - (ns)((cycles() - then) / cycles_per_ns);
}

static void measure_cycles(void)
{
	unsigned long long from = cycles();
	ns start = clock_ns(CLOCK_MONOTONIC);

	while (clock_ns(CLOCK_MONOTONIC) < start + 50000000)
		;
	cycles_per_ns = (double)(cycles() - from) / (clock_ns(CLOCK_MONOTONIC) - start);
}

static struct timespec spec(ns t)
{
	struct timespec s = { t / 1000000000, t % 1000000000 };

	return s;
}

/* Each makes one call that is to take `want` ns. An absolute one gets `at`, the same time on
 * `clock`. */
struct how {
	ns want, at;
};

static long do_nanosleep(struct how h)
{
	struct timespec t = spec(h.want);

	return syscall(SYS_nanosleep, &t, NULL);
}

static long do_clock_relative(struct how h)
{
	struct timespec t = spec(h.want);

	return syscall(SYS_clock_nanosleep, CLOCK_MONOTONIC, 0, &t, NULL);
}

static long do_clock_absolute(struct how h)
{
	struct timespec t = spec(h.at);

	return syscall(SYS_clock_nanosleep, CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL);
}

static long do_clock_realtime(struct how h)
{
	struct timespec t = spec(h.at);

	return syscall(SYS_clock_nanosleep, CLOCK_REALTIME, TIMER_ABSTIME, &t, NULL);
}

static long do_select(struct how h)
{
	struct timeval t = { 0, h.want / 1000 };

	return syscall(SYS_select, 0, NULL, NULL, NULL, &t);
}

static long do_pselect(struct how h)
{
	struct timespec t = spec(h.want);

	return syscall(SYS_pselect6, 0, NULL, NULL, NULL, &t, NULL);
}

static long do_poll(struct how h)
{
	return syscall(SYS_poll, NULL, 0, (int)(h.want / 1000000));
}

static long do_ppoll(struct how h)
{
	struct timespec t = spec(h.want);

	return syscall(SYS_ppoll, NULL, 0, &t, NULL, 8);
}

static long do_epoll(struct how h)
{
	struct epoll_event e;

	return syscall(SYS_epoll_wait, empty_epoll, &e, 1, (int)(h.want / 1000000));
}

static long do_epoll_pwait(struct how h)
{
	struct epoll_event e;

	return syscall(SYS_epoll_pwait, empty_epoll, &e, 1, (int)(h.want / 1000000), NULL, 8);
}

static long do_epoll_pwait2(struct how h)
{
	struct epoll_event e;
	struct timespec t = spec(h.want);

	return syscall(SYS_epoll_pwait2, empty_epoll, &e, 1, &t, NULL, 8);
}

static long do_futex(struct how h)
{
	struct timespec t = spec(h.want);

	return syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, &t, NULL, 0);
}

static long do_futex_bitset(struct how h)
{
	struct timespec t = spec(h.at);

	return syscall(SYS_futex, &word, FUTEX_WAIT_BITSET_PRIVATE, 0, &t, NULL, 1);
}

static long do_futex_waitv(struct how h)
{
	struct timespec t = spec(h.at);
	struct { unsigned long long val, uaddr; unsigned int flags, reserved; } waiter = {
		0, (unsigned long)&word, 2 | 128 /* FUTEX2_SIZE_U32 | PRIVATE */, 0
	};

	return syscall(SYS_futex_waitv, &waiter, 1, 0, &t, CLOCK_MONOTONIC);
}

static pthread_mutex_t pi_mutex;

/* The mutex belongs to another thread for ever. */
static long do_futex_pi(struct how h)
{
	struct timespec t = spec(h.at);

	return pthread_mutex_timedlock(&pi_mutex, &t);
}

static void set_timer(ns at)
{
	struct itimerspec t = { spec(0), spec(at) };

	timerfd_settime(timer_fd, TFD_TIMER_ABSTIME, &t, NULL);
}

static long do_timerfd_read(struct how h)
{
	unsigned long long expirations = 0;

	return read(timer_fd, &expirations, 8) == 8 ? (long)expirations : -1;
}

static long do_timerfd_poll(struct how h)
{
	struct pollfd p = { timer_fd, POLLIN, 0 };

	return syscall(SYS_poll, &p, 1, 1000);
}

static long do_timerfd_select(struct how h)
{
	fd_set set;

	FD_ZERO(&set);
	FD_SET(timer_fd, &set);
	return syscall(SYS_pselect6, timer_fd + 1, &set, NULL, NULL, NULL, NULL);
}

static long do_timerfd_epoll(struct how h)
{
	struct epoll_event e;

	return syscall(SYS_epoll_wait, epoll_fd, &e, 1, -1);
}

enum { RELATIVE, ABSOLUTE = 1, REALTIME = 2, MILLISECONDS = 4, TIMERFD = 8 };
static const struct {
	const char *name, *call;
	int flags;
	long (*run)(struct how);
} CALLS[] = {
	{ "nanosleep", "nanosleep", RELATIVE, do_nanosleep },
	{ "clock_relative", "clock_nanosleep", RELATIVE, do_clock_relative },
	{ "clock_absolute", "clock_nanosleep", ABSOLUTE, do_clock_absolute },
	{ "clock_realtime", "clock_nanosleep", REALTIME, do_clock_realtime },
	{ "select", "select", RELATIVE, do_select },
	{ "pselect", "pselect6", RELATIVE, do_pselect },
	{ "poll", "poll", MILLISECONDS, do_poll },
	{ "ppoll", "ppoll", RELATIVE, do_ppoll },
	{ "epoll", "epoll_wait", MILLISECONDS, do_epoll },
	{ "epoll_pwait", "epoll_pwait", MILLISECONDS, do_epoll_pwait },
	{ "epoll_pwait2", "epoll_pwait2", RELATIVE, do_epoll_pwait2 },
	{ "futex", "futex", RELATIVE, do_futex },
	{ "futex_bitset", "futex", ABSOLUTE, do_futex_bitset },
	{ "futex_waitv", "futex_waitv", ABSOLUTE, do_futex_waitv },
	{ "futex_pi", "futex", REALTIME, do_futex_pi },
	{ "timerfd_read", "read", TIMERFD, do_timerfd_read },
	{ "timerfd_poll", "poll", TIMERFD, do_timerfd_poll },
	{ "timerfd_select", "pselect6", TIMERFD, do_timerfd_select },
	{ "timerfd_epoll", "epoll_wait", TIMERFD, do_timerfd_epoll },
};
#define KINDS (sizeof(CALLS) / sizeof(CALLS[0]))

static const ns WANT[] = { 50000, 1000000, 10000000 };

static void *hold(void *held)
{
	pthread_mutex_lock(&pi_mutex);
	pthread_barrier_wait(held);
	for (;;)
		pause();
	return NULL;
}

static void take_mutex(void)
{
	static pthread_barrier_t held;
	pthread_mutexattr_t a;
	pthread_t thread;

	pthread_mutexattr_init(&a);
	pthread_mutexattr_setprotocol(&a, PTHREAD_PRIO_INHERIT);
	pthread_mutex_init(&pi_mutex, &a);
	pthread_barrier_init(&held, NULL, 2);
	pthread_create(&thread, NULL, hold, &held);
	pthread_barrier_wait(&held);
}

static void one(unsigned int kind, ns want, int burn)
{
	int flags = CALLS[kind].flags, clock = flags & REALTIME ? CLOCK_REALTIME : CLOCK_MONOTONIC;
	ns before, after, deadline;
	struct how how = { want, 0 };
	unsigned long long drained, returned;
	long result;

	for (before = clock_ns(CLOCK_MONOTONIC); burn && clock_ns(CLOCK_MONOTONIC) < before + 2000000;)
		;
	/* By way of the kernel: its door is as warm then as a busy program has it. */
	how.at = kernels_clock_ns(clock) + want;
	if (flags & TIMERFD)
		set_timer(how.at);
	before = clock_ns(CLOCK_MONOTONIC);
	result = CALLS[kind].run(how);
	returned = cycles();
	after = clock_at(returned);
	deadline = before + want;
	if (flags & (ABSOLUTE | REALTIME))
		deadline = how.at - (clock_ns(clock) - clock_ns(CLOCK_MONOTONIC));
	if (flags & (ABSOLUTE | TIMERFD))
		deadline = how.at;
	if (flags & TIMERFD && CALLS[kind].run != do_timerfd_read &&
	    read(timer_fd, &drained, 8) != 8)
		abort();
	printf("%s %s %lld %lld %lld %lld %ld\n", CALLS[kind].name, CALLS[kind].call, want, before,
	       after, deadline, result);
}

int main(int argc, char **argv)
{
	struct epoll_event e = { EPOLLIN, { 0 } };
	static char buffer[1 << 22];
	struct sched_param priority = { 0 };
	cpu_set_t cpu;
	char byte;
	int chosen;

	if (argc < 3)
		return 2;
	setvbuf(stdout, buffer, _IOFBF, sizeof(buffer));	/* no call in between */
	timer_fd = timerfd_create(CLOCK_MONOTONIC, 0);
	epoll_fd = epoll_create1(0);
	empty_epoll = epoll_create1(0);
	epoll_ctl(epoll_fd, EPOLL_CTL_ADD, timer_fd, &e);
	if (strchr(argv[2], 'p')) {
		CPU_ZERO(&cpu);
		CPU_SET(0, &cpu);
		sched_setaffinity(0, sizeof(cpu), &cpu);
	}
	if (strchr(argv[2], 'b'))
		sched_setscheduler(0, SCHED_BATCH, &priority);
	if (strchr(argv[2], 's'))
		prctl(PR_SET_TIMERSLACK, 1000000);
	measure_cycles();
	take_mutex();
	if (read(0, &byte, 1) < 0)
		return 1;
	for (int n = 0; n < atoi(argv[1]); n++) {
		for (unsigned int kind = 0; kind < KINDS; kind++) {
			chosen = argc == 3;
			for (int i = 3; i < argc; i++)
				chosen |= !strcmp(argv[i], CALLS[kind].name);
			for (unsigned int i = 0; chosen && i < sizeof(WANT) / sizeof(WANT[0]); i++)
				if (!(CALLS[kind].flags & MILLISECONDS) || WANT[i] >= 1000000)
					one(kind, WANT[i], !!strchr(argv[2], 'q'));
		}
	}
	return 0;
}
