/* Which waits get a stack: sampling by time, not by event. Plain C, also built for the host.
 *
 * Each thread has one accumulator for the time it waited and one for the time it was blocked.
 * Whenever one passes its period, the interval that carried it over the mark is sampled and
 * stands for the whole periods passed: systematic sampling of the time axis, so every
 * nanosecond has the same chance, and a stack's expected weight is its true time. A slow
 * interval is always sampled; it stands for exactly itself and never enters the accumulator.
 */
#pragma once
#include <linux/types.h>

/* Returns the weight in ns of the sample to take, 0 for none. `may`: the budget has room; where
 * it has none, the time stays in the accumulator and is carried by the next sample. */
static inline u64 sample_weight(u64 *acc_ns, u64 ns, u64 period_ns, u64 slow_ns, int may)
{
	u64 weight;

	if (ns >= slow_ns && may)
		return ns;
	*acc_ns += ns;
	if (*acc_ns < period_ns || !may)
		return 0;
	weight = *acc_ns - *acc_ns % period_ns;
	*acc_ns -= weight;
	return weight;
}
