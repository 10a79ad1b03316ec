/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* Log-linear histogram slots, the same in the kernel, in C tests on the host and in
 * analysis/histogram.py. 64 sub-buckets an octave: no bucket is wider than 1/64 (1.6 %) of its
 * lower bound, values below 128 ns are exact, and 3,776 slots cover every u64.
 */
#pragma once
#include <linux/types.h>

#define HIST_SUB_BITS 6
#define HIST_SLOTS (((64 - HIST_SUB_BITS) << HIST_SUB_BITS) + (1 << HIST_SUB_BITS))

/* floor(log2(v)) by halving: `__builtin_clzll` as an index makes older clang run out of memory,
 * and BPF has no instruction for it. */
static inline u32 hist_log2(u64 v)
{
	u32 r = 0;

	if (v >> 32) { v >>= 32; r += 32; }
	if (v >> 16) { v >>= 16; r += 16; }
	if (v >> 8) { v >>= 8; r += 8; }
	if (v >> 4) { v >>= 4; r += 4; }
	if (v >> 2) { v >>= 2; r += 2; }
	if (v >> 1) r += 1;
	return r;
}

static inline u32 hist_slot(u64 v)
{
	u32 log2, shift;

	if (v < (2u << HIST_SUB_BITS))
		return v;
	log2 = hist_log2(v);
	shift = log2 - HIST_SUB_BITS;
	return (shift << HIST_SUB_BITS) + (u32)(v >> shift);
}
