/* A chain of functions without frame pointers, each with something on its stack: one thread sleeps
 * at its end for 1 ms at a time, and computes; another waits there for ever. Prints "ready". */
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#define KEPT __attribute__((noinline, noclone))

static pthread_mutex_t never = PTHREAD_MUTEX_INITIALIZER;
static volatile unsigned sink;

KEPT static void rest(int forever)
{
	struct timespec ms = { 0, 1000000 };

	if (forever) {
		pthread_mutex_lock(&never);
		pthread_mutex_unlock(&never);
	}
	clock_nanosleep(CLOCK_MONOTONIC, 0, &ms, NULL);
	for (unsigned i = 0; i < 2000000; i++)
		sink += i;
}

KEPT static void third(int forever)
{
	char secret[64];

	/* Put together here, so that it is in no file. */
	for (unsigned i = 0; i < sizeof(secret); i++)
		secret[i] = "lksvhz"[i % 6] + 1;
	asm volatile("" : : "r"(secret) : "memory");
	rest(forever);
	asm volatile("" : : "r"(secret) : "memory");
}

KEPT static void second(int forever)
{
	char room[3000];

	memset(room, 7, sizeof(room));
	asm volatile("" : : "r"(room) : "memory");
	third(forever);
	asm volatile("" : : "r"(room) : "memory");
}

KEPT static void first(int forever)
{
	do
		second(forever);
	while (!forever || sink);
}

static void *forever(void *nothing)
{
	first(1);
	return nothing;
}

int main(void)
{
	pthread_t thread;

	pthread_mutex_lock(&never);
	pthread_create(&thread, NULL, forever, NULL);
	puts("ready");
	fflush(stdout);
	first(0);
	return 0;
}
