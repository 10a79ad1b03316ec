/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* Which waits get a stack: sampling by time, not by event. Plain C, also built for the host.
 *
 * Each thread has one accumulator for the time it waited and one for the time it was blocked.
 * Whenever one passes its period, the interval that carried it over the mark is sampled and
 * stands for the whole periods passed: systematic sampling of the time axis, so every
 * nanosecond has the same chance, and a stack's expected weight is its true time. A slow
 * interval is always sampled; it stands for exactly itself and never enters the accumulator.
 *
 * Without room in the budget nothing is sampled and the time stays in the accumulator; the next
 * sample then stands for the whole periods that wait there as well.
 */
#pragma once
#include <linux/types.h>

/* Returns the weight in ns of the sample to take, 0 for none. `may`: the budget has room. */
static inline u64 sample_weight(u64 *acc_ns, u64 ns, u64 period_ns, u64 slow_ns, int may)
{
	u64 itself = ns >= slow_ns && may ? ns : 0, periods = 0;

	*acc_ns += ns - itself;
	if (may && *acc_ns >= period_ns)
		periods = *acc_ns - *acc_ns % period_ns;
	*acc_ns -= periods;
	return itself + periods;
}
