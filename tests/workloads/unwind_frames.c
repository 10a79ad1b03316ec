/* Frames of every kind, for a debugger: `int3` with a number in rdi asks it to look at all threads,
 * then after each of so many single steps. */
#define _GNU_SOURCE
#include <alloca.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#define APART __attribute__((noinline, noclone))
#define THREADS 40

static volatile int sink;
static sem_t ready;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t never = PTHREAD_COND_INITIALIZER;

static inline void look(long steps)
{
	__asm__ volatile("int3" : : "D"(steps) : "memory");
}

/* --- ways to wait */

static APART void wait_somewhere(int how)
{
	struct timespec long_time = {.tv_sec = 1000};
	uint64_t value;

	sem_post(&ready);
	switch (how % 5) {
	case 0:
		nanosleep(&long_time, NULL);
		break;
	case 1:
		poll(NULL, 0, 1000000);
		break;
	case 2:
		sink = read(eventfd(0, 0), &value, sizeof(value));
		break;
	case 3:
		pthread_mutex_lock(&mutex);
		pthread_cond_wait(&never, &mutex);
		break;
	case 4:
		usleep(1000000000);
		break;
	}
}

static APART int deep(int depth, int how)
{
	char room[24 + depth % 5 * 16];

	memset(room, depth, sizeof(room));
	if (depth)
		sink = deep(depth - 1, how) + room[depth % 8];
	else
		wait_somewhere(how);
	return sink + room[1];
}

static void *thread(void *argument)
{
	int number = (int)(intptr_t)argument;

	sink = deep(number % 17, number);
	return NULL;
}

/* --- frames whose size is not known when compiled, or whose stack is realigned */

static APART int varied(int size)
{
	char *room = alloca(size);
	int more[size / 4 + 1];

	memset(room, size, size);
	memset(more, 0, sizeof(more));
	look(24);
	return room[size - 1] + more[size / 4];
}

struct wide {
	float numbers[16];
} __attribute__((aligned(64)));

static APART void fill(struct wide *wide, int by)
{
	for (int at = 0; at < 16; at++)
		wide->numbers[at] += at * by;
	look(12);
}

static APART float realigned(int by)
{
	struct wide wide = {.numbers = {by}};
	float sum = 0;

	fill(&wide, by);
	for (int at = 0; at < 16; at++)
		sum += wide.numbers[at] * wide.numbers[15 - at];
	return sum + varied(by);
}

/* Arguments on the stack as well: the realigned frame needs a register for where they are. */
static APART int realigned_far(int a, int b, int c, int d, int e, int f, int g, int h, ...)
{
	struct wide wide = {.numbers = {a, b, c, d, e, f, g, h}};
	char *room = alloca(a + 16);

	memset(room, h, a + 16);
	fill(&wide, g);
	look(20);
	return (int)wide.numbers[b & 15] + room[a];
}

static APART int tail_end(int value)
{
	look(8);
	return sink + value;
}

static APART int tail(int value)
{
	sink = value;
	return tail_end(value + 1);
}

/* --- the C library in between, and signals */

static int compare(const void *one, const void *other)
{
	static int count;

	if (++count == 7)
		look(10);
	return *(const int *)one - *(const int *)other;
}

static void handler(int number)
{
	sink = number;
	look(30); /* out through the C library's return from a signal */
}

static APART void raise_inside(int number)
{
	sink = number;
	raise(number);
	sink++;
}

static APART void fault(void)
{
	__asm__ volatile("ud2" : : : "memory");
}

static void skip(int number, siginfo_t *info, void *context)
{
	(void)info;
	sink = number;
	look(3);
	((ucontext_t *)context)->uc_mcontext.gregs[REG_RIP] += 2;
}

int main(void)
{
	static char other_stack[65536];
	stack_t stack = {.ss_sp = other_stack, .ss_size = sizeof(other_stack)};
	struct sigaction action = {.sa_handler = handler};
	int numbers[] = {5, 2, 8, 1, 9, 3, 7, 4, 6};
	pthread_t threads[THREADS];
	struct timespec moment = {.tv_nsec = 20000000};

	sem_init(&ready, 0, 0);
	for (int number = 0; number < THREADS; number++)
		pthread_create(&threads[number], NULL, thread, (void *)(intptr_t)number);
	for (int number = 0; number < THREADS; number++)
		sem_wait(&ready);
	nanosleep(&moment, NULL);
	look(0);

	sink = realigned(40) + varied(600) + tail(3);
	look(30);
	sink += realigned_far(1, 2, 3, 4, 5, 6, 7, 8, 9, 10);
	qsort(numbers, 9, sizeof(numbers[0]), compare);
	sigaction(SIGUSR1, &action, NULL);
	raise_inside(SIGUSR1);
	sigaltstack(&stack, NULL);
	action.sa_flags = SA_ONSTACK;
	sigaction(SIGUSR2, &action, NULL);
	raise_inside(SIGUSR2);
	action.sa_flags = SA_SIGINFO;
	action.sa_sigaction = skip;
	sigaction(SIGILL, &action, NULL);
	fault();
	/* Through the stub of a function that was not called before, and the loader that finds it. */
	look(180);
	sink += (int)strtol(getenv("HOME") ? "1" : "2", NULL, 10) + abs((int)labs(random()));
	return 0;
}
