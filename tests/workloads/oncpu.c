/* CPU work with a known answer. Usage: oncpu MS
 *
 * Waits for a byte on standard input, then computes for MS ms of its own CPU time, three times as
 * long in spin_long() as in spin_short(), while another thread sleeps. Prints `name value` lines.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static double cpu_ms(clockid_t clock)
{
	struct timespec t;

	clock_gettime(clock, &t);
	return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}

/* No call inside: a walk by frame pointers that begins in another function's first instruction
 * misses its caller. The two differ, or the compiler would make one of them. */
#define SPIN(name, step) \
	__attribute__((noinline)) static void name(long turns) \
	{ \
		for (volatile long i = 0; i < turns * (step); i += (step)) \
			; \
	}
SPIN(spin_long, 1)
SPIN(spin_short, 2)

static void *sleeper(void *unused)
{
	printf("sleeper %ld\n", (long)syscall(SYS_gettid));
	for (;;)
		usleep(5000);
	return unused;
}

int main(int argc, char **argv)
{
	double end, used[2] = { 0, 0 };
	pthread_t thread;

	if (argc != 2 || getchar() == EOF || pthread_create(&thread, NULL, sleeper, NULL))
		return 2;
	end = cpu_ms(CLOCK_THREAD_CPUTIME_ID) + atof(argv[1]);
	while (cpu_ms(CLOCK_THREAD_CPUTIME_ID) < end) {
		/* Whoever is behind its share is next: the ratio holds whatever a turn costs. */
		int which = used[0] > 3 * used[1];
		double began = cpu_ms(CLOCK_THREAD_CPUTIME_ID);

		(which ? spin_short : spin_long)(200000);
		used[which] += cpu_ms(CLOCK_THREAD_CPUTIME_ID) - began;
	}
	printf("long_ms %f\nshort_ms %f\n", used[0], used[1]);
	return 0;
}
