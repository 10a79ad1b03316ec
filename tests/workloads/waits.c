/* Threads with a known answer. Usage: waits MODE COUNT
 *
 * Every mode first waits for a byte on standard input, so that a tracer can attach, and prints
 * one line `name value` for each fact that the test holds the trace to.
 *   pipe N       two threads hand a byte to and fro, N times each way
 *   fight MS     two threads compute on one CPU for MS ms
 *   sleepers MS  blocks in sleep_long() three times as long as in sleep_short(), MS ms in all
 *   storm N      N threads, one after the other, that each sleep once
 *   forks N      N children that each sleep once, and one grandchild each
 *   idle MS      one thread that sleeps through it all
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static int to[2], from[2];
static long count;

/* libc's wrapper keeps no frame pointer, so a walk by frame pointers misses this function, its
 * caller; the functions that the tests look for are one further out. */
__attribute__((noinline)) static void sleep_us(long us)
{
	struct timespec t = { us / 1000000, us % 1000000 * 1000 };

	syscall(SYS_nanosleep, &t, NULL);
	asm volatile("");	/* not a tail call: the frame stays */
}

static double now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}

static void *echo(void *unused)
{
	char byte;

	printf("echo %ld\n", (long)syscall(SYS_gettid));
	for (long i = 0; i < count; i++)
		if (read(to[0], &byte, 1) != 1 || write(from[1], &byte, 1) != 1)
			abort();
	return unused;
}

static void pipe_mode(void)
{
	pthread_t thread;
	char byte = 0;

	if (pipe(to) || pipe(from) || pthread_create(&thread, NULL, echo, NULL))
		abort();
	for (long i = 0; i < count; i++)
		if (write(to[1], &byte, 1) != 1 || read(from[0], &byte, 1) != 1)
			abort();
	pthread_join(thread, NULL);
	printf("main %ld\nround_trips %ld\n", (long)syscall(SYS_gettid), count);
}

static void *compute(void *end)
{
	cpu_set_t one;

	CPU_ZERO(&one);
	CPU_SET(0, &one);
	sched_setaffinity(0, sizeof(one), &one);
	while (now_ms() < *(double *)end)
		;
	return NULL;
}

static void fight_mode(void)
{
	double end = now_ms() + count;
	pthread_t threads[2];

	for (int i = 0; i < 2; i++)
		pthread_create(&threads[i], NULL, compute, &end);
	for (int i = 0; i < 2; i++)
		pthread_join(threads[i], NULL);
}

__attribute__((noinline)) static void sleep_short(void)
{
	sleep_us(1000);
	asm volatile("");
}

__attribute__((noinline)) static void sleep_long(void)
{
	sleep_us(3000);
	asm volatile("");
}

static void sleepers_mode(void)
{
	double start = now_ms(), begin, short_ms = 0, long_ms = 0;

	while (now_ms() < start + count) {
		begin = now_ms();
		sleep_short();
		short_ms += now_ms() - begin;
		begin = now_ms();
		sleep_long();
		long_ms += now_ms() - begin;
	}
	printf("short_ms %.3f\nlong_ms %.3f\n", short_ms, long_ms);
}

static void *sleep_once(void *unused)
{
	sleep_us(200);
	return unused;
}

static void storm_mode(void)
{
	pthread_t thread;

	for (long i = 0; i < count; i++) {
		pthread_create(&thread, NULL, sleep_once, NULL);
		pthread_join(thread, NULL);
	}
}

static void forks_mode(void)
{
	for (long i = 0; i < count; i++) {
		if (!fork()) {
			sleep_us(200);
			if (!fork()) {
				sleep_us(200);
				_exit(0);
			}
			wait(NULL);
			_exit(0);
		}
	}
	while (wait(NULL) > 0)
		;
}

int main(int argc, char **argv)
{
	char byte;

	if (argc != 3)
		return 2;
	setvbuf(stdout, NULL, _IOLBF, 0);
	count = atol(argv[2]);
	if (read(0, &byte, 1) < 0)
		return 1;
	if (!strcmp(argv[1], "pipe"))
		pipe_mode();
	else if (!strcmp(argv[1], "fight"))
		fight_mode();
	else if (!strcmp(argv[1], "sleepers"))
		sleepers_mode();
	else if (!strcmp(argv[1], "storm"))
		storm_mode();
	else if (!strcmp(argv[1], "forks"))
		forks_mode();
	else if (!strcmp(argv[1], "idle"))
		sleep_us(count * 1000);
	else
		return 2;
	return 0;
}
