/*
 * Prints `name address` for functions whose names are known, then waits to be killed.
 *
 *   symbols_sample [LIBRARY]    also loads LIBRARY and prints its function `in_library`
 *   symbols_sample --jit        also maps anonymous executable memory and prints it as `jit`
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

__attribute__((noinline)) int first_function(int x)
{
	return x * 3 + getpid();
}

static __attribute__((noinline)) int static_function(int x)
{
	return first_function(x) - 7;
}

/* A function without a size, a hole behind it, and one function inside another. */
__asm__(".text\n"
	".globl unsized_function\n"
	".type unsized_function, @function\n"
	"unsized_function:\n"
	".skip 8, 0x90\n"
	"ret\n"
	".globl outer_function\n"
	".type outer_function, @function\n"
	"outer_function:\n"
	".skip 32, 0x90\n"
	".type inner_function, @function\n"
	"inner_function:\n"
	".skip 16, 0x90\n"
	".size inner_function, . - inner_function\n"
	".skip 32, 0x90\n"
	"ret\n"
	".size outer_function, . - outer_function\n"
	".skip 64, 0x90\n");
extern char unsized_function[], outer_function[];

int main(int argc, char **argv)
{
	printf("first_function %p\n", (void *)first_function);
	printf("static_function %p\n", (void *)static_function);
	printf("unsized_function %p\n", (void *)unsized_function);
	printf("outer_function %p\n", (void *)outer_function);
	printf("main %p\n", (void *)main);
	if (argc > 1 && !strcmp(argv[1], "--jit")) {
		void *code = mmap(NULL, 65536, PROT_READ | PROT_WRITE | PROT_EXEC,
				  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		printf("jit %p\n", code);
	}
#ifndef WITHOUT_DLOPEN
	else if (argc > 1) {
		void *library = dlopen(argv[1], RTLD_NOW);
		if (!library)
			return 1;
		printf("in_library %p\n", dlsym(library, "in_library"));
	}
#endif
	printf("value %d\n", static_function(argc));
	fflush(stdout);
	for (;;)
		pause();
}
