/* Threads that wait for a known cause, and the neighbours that make them.
 * Usage: causes MODE CPU NICE MS [ARG...]
 *
 * Pins itself to CPU, waits for a byte on standard input (so that a tracer can attach, or the test
 * can move it), does its work for MS ms (0: until a SIGTERM) and prints one line `name value` for
 * each fact that the test holds the trace to. Times are the program's own, in ns.
 *   spin             computes from `start_ns` to `end_ns`; `cpu_ns` of that it ran
 *   batch SLEEP_US   SCHED_BATCH: sleeps, computes 200 us; `late_ns` over what it asked for
 *   own N            N threads compute; `thread<I>` their tids, `cpu<I>_ns` what each ran
 *   burnt SLEEP_US   a thread computes at nice 19, the first thread sleeps; `late_ns`
 *   ping SLEEP_US    a thread on another CPU wakes the first one again and again
 *   hog NAME         computes under that name
 *   burst NAME POLICY PRIORITY ON_US OFF_US
 *                    computes in bursts of ON_US on the CPU, under fifo, rr, other or deadline;
 *                    `bursts`
 *   flood TARGET N PAUSE_US
 *                    sends N datagrams at a time over a loopback of its own, received on CPU TARGET
 *   threads N US     N threads, one after the other, that compute US us, each named t<TID>
 *   processes N US   the same with processes, named p<PID>
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <net/if.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static volatile sig_atomic_t stopped;
static long cpu, ms;
static int64_t end_ns;

static void stop(int number)
{
	(void)number;
	stopped = 1;
}

static void must(int ok, const char *what)
{
	if (ok)
		return;
	perror(what);
	exit(1);
}

static int64_t clock_ns(clockid_t clock)
{
	struct timespec t;

	clock_gettime(clock, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static int64_t now_ns(void)
{
	return clock_ns(CLOCK_MONOTONIC);
}

static long gettid_now(void)
{
	return syscall(SYS_gettid);
}

static int over(void)
{
	return stopped || now_ns() >= end_ns;
}

/* A few us of arithmetic: where a hog is, nearly always. It has a frame though it calls nobody: a
 * walk by frame pointers misses the caller of a function without one. */
__attribute__((noinline)) static void crunch(void)
{
	asm volatile("" : : "r"(__builtin_frame_address(0)));
	for (int i = 0; i < 10000; i++)
		asm volatile("");
}

__attribute__((noinline)) static void burn(int64_t until)
{
	while (!stopped && now_ns() < until)
		crunch();
	asm volatile("");
}

static int64_t sleep_us(long us)
{
	struct timespec t = { us / 1000000, us % 1000000 * 1000 };
	int64_t start = now_ns();

	nanosleep(&t, NULL);
	return now_ns() - start - us * 1000;
}

static void pin(long to)
{
	cpu_set_t one;

	CPU_ZERO(&one);
	CPU_SET(to, &one);
	must(!sched_setaffinity(0, sizeof(one), &one), "sched_setaffinity");
}

/* Fills its process name and waits for the test. */
static void ready(const char *name)
{
	char byte;

	if (name)
		prctl(PR_SET_NAME, name);
	if (read(0, &byte, 1) < 0)
		exit(1);
	end_ns = ms ? now_ns() + ms * 1000000 : INT64_MAX;
}

/* Both clocks at one moment: read again where the thread was off the CPU between the two. */
static void read_clocks(int64_t *wall, int64_t *ran)
{
	do {
		*wall = now_ns();
		*ran = clock_ns(CLOCK_THREAD_CPUTIME_ID);
	} while (now_ns() - *wall > 100000);
}

static void spin_mode(void)
{
	int64_t start, ran_before, end, ran;

	read_clocks(&start, &ran_before);
	burn(end_ns);
	read_clocks(&end, &ran);
	printf("start_ns %lld\nend_ns %lld\n", (long long)start, (long long)end);
	printf("cpu_ns %lld\n", (long long)(ran - ran_before));
}

static void sleepy(long us, int64_t work_ns)
{
	int64_t late = 0;
	long count = 0;

	for (; !over(); count++) {
		late += sleep_us(us);
		if (work_ns)
			burn(now_ns() + work_ns);
	}
	printf("late_ns %lld\nsleeps %ld\ntid %ld\n", (long long)late, count, gettid_now());
}

static void batch_mode(long us)
{
	struct sched_param none = { 0 };

	must(!sched_setscheduler(0, SCHED_BATCH, &none), "SCHED_BATCH");
	sleepy(us, 200000);
}

struct worker { pthread_t thread; long tid; int64_t ran; };

static void *work(void *arg)
{
	struct worker *w = arg;

	w->tid = gettid_now();
	burn(end_ns);
	w->ran = clock_ns(CLOCK_THREAD_CPUTIME_ID);
	return NULL;
}

static void own_mode(int threads)
{
	struct worker w[16];

	for (int i = 0; i < threads; i++)
		must(!pthread_create(&w[i].thread, NULL, work, &w[i]), "pthread_create");
	for (int i = 0; i < threads; i++) {
		pthread_join(w[i].thread, NULL);
		printf("thread%d %ld\ncpu%d_ns %lld\n", i, w[i].tid, i, (long long)w[i].ran);
	}
}

static void *work_nicely(void *arg)
{
	setpriority(PRIO_PROCESS, gettid_now(), 19);
	return work(arg);
}

static void burnt_mode(long us)
{
	struct worker w;

	must(!pthread_create(&w.thread, NULL, work_nicely, &w), "pthread_create");
	sleepy(us, 0);
	pthread_join(w.thread, NULL);
	printf("burner %ld\nburner_ns %lld\n", w.tid, (long long)w.ran);
}

static int wake[2];
static long wake_us;

static void *wake_it(void *arg)
{
	pin(cpu ? 0 : 1);
	while (!over()) {
		sleep_us(wake_us);
		must(write(wake[1], "", 1) == 1, "write");
	}
	close(wake[1]);
	return arg;
}

static void ping_mode(long us)
{
	pthread_t thread;
	long count = 0;
	char byte;

	wake_us = us;
	must(!pipe(wake) && !pthread_create(&thread, NULL, wake_it, NULL), "pipe");
	while (read(wake[0], &byte, 1) == 1)
		count++;
	pthread_join(thread, NULL);
	printf("woken %ld\ntid %ld\n", count, gettid_now());
}

struct attr { uint32_t size, policy; uint64_t flags; int32_t nice; uint32_t priority;
	      uint64_t runtime, deadline, period; };

static void burst_mode(const char *policy, int priority, long on_us, long off_us)
{
	struct attr a = { .size = sizeof(a), .priority = priority };
	cpu_set_t all;
	long count = 0;

	if (!strcmp(policy, "fifo")) {
		a.policy = SCHED_FIFO;
	} else if (!strcmp(policy, "rr")) {
		a.policy = SCHED_RR;
	} else if (!strcmp(policy, "deadline")) {
		/* May not be bound to a CPU; one that was keeps its place. */
		memset(&all, 0xff, sizeof(all));
		must(!sched_setaffinity(0, sizeof(all), &all), "sched_setaffinity");
		a.policy = SCHED_DEADLINE;
		a.runtime = 2 * on_us * 1000;
		a.deadline = a.period = (on_us + off_us) * 1000;
	}
	must(!syscall(SYS_sched_setattr, 0, &a, 0), "sched_setattr");
	for (; !over(); count++) {
		int64_t enough = clock_ns(CLOCK_THREAD_CPUTIME_ID) + on_us * 1000;

		while (!stopped && clock_ns(CLOCK_THREAD_CPUTIME_ID) < enough)
			crunch();
		sleep_us(off_us);
	}
	printf("bursts %ld\n", count);
}

static void write_file(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY);

	must(fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text), path);
	close(fd);
}

static void flood_mode(long target, int burst, long pause_us)
{
	struct sockaddr_in to = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	struct ifreq up = { .ifr_name = "lo", .ifr_flags = IFF_UP };
	socklen_t size = sizeof(to);
	char mask[32], data[1024] = "";
	int in, out;
	long sent = 0;

	snprintf(mask, sizeof(mask), "%lx", 1UL << target);
	must(!mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL), "private mounts");
	must(!mount("none", "/sys", "sysfs", 0, NULL), "sysfs");
	write_file("/sys/class/net/lo/queues/rx-0/rps_cpus", mask);
	in = socket(AF_INET, SOCK_DGRAM, 0);
	out = socket(AF_INET, SOCK_DGRAM, 0);
	must(!ioctl(in, SIOCSIFFLAGS, &up), "lo up");
	must(!bind(in, (void *)&to, size) && !getsockname(in, (void *)&to, &size), "bind");
	while (!over()) {
		for (int i = 0; i < burst; i++)
			sent += sendto(out, data, sizeof(data), 0, (void *)&to, size) > 0;
		burn(now_ns() + pause_us * 1000);
	}
	printf("sent %ld\n", sent);
}

static long life_us;

static void short_life(char kind)
{
	char name[16];

	snprintf(name, sizeof(name), "%c%ld", kind, gettid_now());
	prctl(PR_SET_NAME, name);
	burn(now_ns() + life_us * 1000);
}

static void *short_thread(void *arg)
{
	short_life('t');
	return arg;
}

static void crowd_mode(int processes, long count, long us)
{
	pthread_t thread;
	long made = 0;

	life_us = us;
	for (; made < count && !stopped; made++) {
		if (!processes) {
			must(!pthread_create(&thread, NULL, short_thread, NULL), "pthread_create");
			pthread_join(thread, NULL);
			continue;
		}
		pid_t child = fork();
		must(child >= 0, "fork");
		if (!child) {
			short_life('p');
			_exit(0);
		}
		waitpid(child, NULL, 0);
	}
	printf("made %ld\n", made);
}

int main(int argc, char **argv)
{
	struct sigaction end = { .sa_handler = stop };
	const char *mode = argv[1];
	char **arg = argv + 5;

	if (argc < 5)
		return 2;
	cpu = atol(argv[2]);
	ms = atol(argv[4]);
	setvbuf(stdout, NULL, _IOLBF, 0);
	sigaction(SIGTERM, &end, NULL);
	pin(cpu);
	must(!setpriority(PRIO_PROCESS, 0, atoi(argv[3])), "setpriority");
	if (!strcmp(mode, "flood"))	/* before any thread, while still root of everything */
		must(!unshare(CLONE_NEWNET | CLONE_NEWNS), "unshare");
	ready(!strcmp(mode, "hog") || !strcmp(mode, "burst") ? arg[0] : NULL);
	if (!strcmp(mode, "spin"))
		spin_mode();
	else if (!strcmp(mode, "batch"))
		batch_mode(atol(arg[0]));
	else if (!strcmp(mode, "own"))
		own_mode(atoi(arg[0]));
	else if (!strcmp(mode, "burnt"))
		burnt_mode(atol(arg[0]));
	else if (!strcmp(mode, "ping"))
		ping_mode(atol(arg[0]));
	else if (!strcmp(mode, "hog"))
		spin_mode();
	else if (!strcmp(mode, "burst"))
		burst_mode(arg[1], atoi(arg[2]), atol(arg[3]), atol(arg[4]));
	else if (!strcmp(mode, "flood"))
		flood_mode(atol(arg[0]), atoi(arg[1]), atol(arg[2]));
	else if (!strcmp(mode, "threads") || !strcmp(mode, "processes"))
		crowd_mode(*mode == 'p', atol(arg[0]), atol(arg[1]));
	else
		return 2;
	return 0;
}
