/*
 * A program whose stack is a trap, for tests of what walks it: it sleeps and works in turn where the
 * frames go around in circles. `hostile KIND` prints "ready" and does not end by itself:
 *
 * plain      nothing wrong
 * pointers   no call frame information; a frame pointer that points at itself
 * back       the information says that the caller's frame lies below
 * up         each frame's caller is the same function, to the end of the stack
 * signal     a signal frame that interrupted itself
 * jit        code in anonymous memory; its address is printed before "ready"
 * file PATH  code in that file, from its second page on; its caller is its own second byte
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

/*
 * Sleeps for what r12 points at, works for a while, again and again; touches neither rsp nor rbp, and
 * runs at any address.
 */
#define FOREVER                                                                                   \
	"1:	mov $35, %eax\n"          /* nanosleep */                                          \
	"	mov %r12, %rdi\n"                                                                  \
	"	xor %esi, %esi\n"                                                                  \
	"	syscall\n"                                                                         \
	"	mov $100000, %ecx\n"                                                               \
	"2:	dec %ecx\n"                                                                        \
	"	jnz 2b\n"                                                                          \
	"	jmp 1b\n"

asm(".globl trap_pointers\n"
    ".type trap_pointers, @function\n"
    "trap_pointers:\n" FOREVER ".size trap_pointers, .-trap_pointers\n"

    ".globl trap_back\n"
    ".type trap_back, @function\n"
    "trap_back: .cfi_startproc\n"
    "	.cfi_def_cfa rsp, -64\n"
    "	.cfi_offset rip, 64\n" FOREVER ".cfi_endproc\n"
    ".size trap_back, .-trap_back\n"

    ".globl trap_up\n"
    ".type trap_up, @function\n"
    "trap_up: .cfi_startproc\n" FOREVER ".cfi_endproc\n"
    ".size trap_up, .-trap_up\n"

    /* CFA: what is at rsp; the return address: what is at rsp + 8 */
    ".globl trap_signal\n"
    ".type trap_signal, @function\n"
    "trap_signal: .cfi_startproc\n"
    "	.cfi_signal_frame\n"
    "	.cfi_escape 0x0f, 3, 0x77, 0, 0x06\n"
    "	.cfi_escape 0x10, 16, 2, 0x77, 8\n" FOREVER ".cfi_endproc\n"
    ".size trap_signal, .-trap_signal\n");

extern char _start[], trap_pointers[], trap_back[], trap_up[], trap_signal[];

#define WORDS 65536
static uint64_t fake[WORDS];
static const struct timespec pause_time = {0, 200000};

/* Go there with a stack of our making, and nowhere to return to. */
static void enter(const char *where, uint64_t *stack)
{
	asm volatile("mov %2, %%r12\n\tmov %1, %%rsp\n\tmov %1, %%rbp\n\tjmp *%0"
		     :
		     : "a"(where), "c"(stack), "d"(&pause_time)
		     : "memory");
	__builtin_unreachable();
}

static void __attribute__((noinline)) plain(void)
{
	for (;;) {
		nanosleep(&pause_time, NULL);
		for (volatile int i = 0; i < 50000; i++)
			;
	}
}

int main(int argc, char **argv)
{
	const char *kind = argc > 1 ? argv[1] : "plain";
	const char *where = trap_up;

	if (!strcmp(kind, "pointers"))
		where = trap_pointers;
	else if (!strcmp(kind, "back"))
		where = trap_back;
	else if (!strcmp(kind, "signal"))
		where = trap_signal;
	for (int i = 0; i < WORDS; i++)
		fake[i] = (uint64_t)where + 1;
	if (where == trap_pointers || where == trap_signal)
		fake[0] = (uint64_t)fake;
	if (!strcmp(kind, "jit")) {
		void *code = mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC,
				  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		memcpy(code, trap_pointers, trap_back - trap_pointers);
		printf("%lx\n", (unsigned long)code);
		memset(fake, 0, sizeof(fake));
		where = code;
	}
	if (!strcmp(kind, "file") && argc > 2) {
		int fd = open(argv[2], O_RDWR);
		void *code = MAP_FAILED;

		if (pwrite(fd, trap_pointers, trap_back - trap_pointers, 4096) > 0)
			code = mmap(NULL, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE, fd, 4096);
		if (code == MAP_FAILED)
			return 1;
		where = code;
		/* By frame pointers: to the byte behind it, and from there to the program's start. */
		memset(fake, 0, sizeof(fake));
		fake[0] = (uint64_t)(fake + 2);
		fake[1] = (uint64_t)where + 1;
		fake[3] = (uint64_t)_start + 8;
	}
	puts("ready");
	fflush(stdout);
	if (!strcmp(kind, "plain"))
		plain();
	enter(where, fake);
}
