// Functions inlined into one another: through loops, twice in one line, split into a cold part.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define INLINE static inline __attribute__((always_inline))

INLINE void nap(long ns)
{
    struct timespec time = {0, ns};
    nanosleep(&time, NULL);
}

INLINE long step(long i)
{
    nap(1000000 + i % 7);
    return i * 3;
}

INLINE void spin(long n)
{
    volatile long sum = 0;
    for (long i = 0; i < n; i++)
        sum += i;
}

INLINE unsigned mix(unsigned a, unsigned b) { return (a ^ b) * 2654435761u; }

INLINE unsigned digest(const char *text)
{
    unsigned sum = 0;
    for (; *text; text++)
        sum = mix(sum, (unsigned char)*text);
    return sum;
}

__attribute__((noinline)) unsigned both(const char *one, const char *two)
{
    return digest(one) + mix(digest(two), 1);
}

__attribute__((noinline)) long work(long n)
{
    long sum = 0;
    for (long i = 0; i < n; i++) {
        sum += step(i);
        spin(200000);
        if (__builtin_expect(sum < 0, 0)) {
            fprintf(stderr, "%u\n", digest("never"));
            abort();
        }
    }
    return sum;
}

int main(int argc, char **argv)
{
    long n = argc > 1 ? strtol(argv[1], NULL, 10) : 1;
    char byte;
    if (argc > 2 && fread(&byte, 1, 1, stdin) != 1)
        return 1;
    printf("sum %ld\n", work(n) + (both(argv[0], "two") & 1));
    return 0;
}
