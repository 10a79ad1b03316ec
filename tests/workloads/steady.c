/* A service under steady load, for a watch. Usage: steady CPU THREADS PERIOD_US WORK_US
 *
 * Each thread sleeps, computes, and again; all on one CPU. Commands on standard input:
 *   convoy MS    for so long, all threads but the first want a lock that the first holds while it
 *                sleeps
 *   quit
 * Prints `ready` when its threads run.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static long period_us, work_us;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static volatile long long convoy_until;

static long long now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void sleep_us(long us)
{
	struct timespec t = { us / 1000000, us % 1000000 * 1000 };

	nanosleep(&t, NULL);
}

static void compute(void)
{
	long long end = now_ns() + work_us * 1000;

	while (now_ns() < end)
		;
}

__attribute__((noinline)) static void hold_the_lock(long us)
{
	pthread_mutex_lock(&lock);
	sleep_us(us);
	pthread_mutex_unlock(&lock);
	asm volatile("");
}

static void *serve(void *argument)
{
	long number = (long)argument;

	for (;;) {
		sleep_us(period_us);
		if (now_ns() < convoy_until)
			hold_the_lock(number ? 0 : 50000);
		compute();
	}
	return NULL;
}

int main(int argc, char **argv)
{
	char line[64];
	cpu_set_t set;
	pthread_t thread;

	if (argc != 5)
		return 2;
	CPU_ZERO(&set);
	CPU_SET(atoi(argv[1]), &set);
	sched_setaffinity(0, sizeof(set), &set);
	period_us = atol(argv[3]);
	work_us = atol(argv[4]);
	for (long n = 0; n < atol(argv[2]); n++)
		pthread_create(&thread, NULL, serve, (void *)n);
	puts("ready");
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin)) {
		if (!strncmp(line, "convoy ", 7))
			convoy_until = now_ns() + atol(line + 7) * 1000000LL;
		if (!strncmp(line, "quit", 4))
			break;
	}
	return 0;
}
