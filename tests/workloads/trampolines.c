/* Calls through trampolines as CPython makes them (`python3 -X perf`), in memory of no file: outer,
 * trampoline, inner, which sleeps for 1 ms at a time, and computes. With an argument each trampoline
 * begins with endbr64. Prints "ready". */
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define KEPT __attribute__((noinline, noclone))

typedef int evaluator(void);
typedef int trampoline(long, long, long, evaluator *);

static trampoline *trampolines[2];
static volatile unsigned sink;

KEPT static int inner(void)
{
	struct timespec ms = { 0, 1000000 };

	clock_nanosleep(CLOCK_MONOTONIC, 0, &ms, NULL);
	for (unsigned i = 0; i < 500000; i++)
		sink += i;
	return 1;
}

KEPT static int outer(void)
{
	/* What is done with the result keeps it from being a jump. */
	return trampolines[1](0, 0, 0, inner) + (int)sink;
}

int main(int argc, char **argv)
{
	static const unsigned char code[] = {
		0xf3, 0x0f, 0x1e, 0xfa,		/* endbr64 */
		0x48, 0x83, 0xec, 0x08,		/* sub $8,%rsp */
		0xff, 0xd1,			/* call *%rcx */
		0x48, 0x83, 0xc4, 0x08,		/* add $8,%rsp */
		0xc3,				/* ret */
	};
	const unsigned char *first = code + (argc > 1 ? 0 : 4);
	size_t size = sizeof(code) - (first - code);
	char *memory = mmap(NULL, 1 << 16, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	(void)argv;
	if (memory == MAP_FAILED)
		return 1;
	for (size_t at = 0; at + size <= 1 << 16; at += size)
		memcpy(memory + at, first, size);
	mprotect(memory, 1 << 16, PROT_READ | PROT_EXEC);
	trampolines[0] = (trampoline *)memory;
	trampolines[1] = (trampoline *)(memory + size);
	puts("ready");
	fflush(stdout);
	for (;;)
		sink += trampolines[0](0, 0, 0, outer);
}
