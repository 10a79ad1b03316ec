/* A shared library with one exported function, one that only .symtab knows, and PLT calls. */
#include <stdio.h>
#include <stdlib.h>

static __attribute__((noinline)) int hidden_in_library(const char *text)
{
	return puts(text);
}

int in_library(const char *text)
{
	return hidden_in_library(text) + atoi(text);
}
