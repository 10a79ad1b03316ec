"""Which sleep call a wait lay in."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_Numbers = npt.NDArray[np.integer[Any]]


def sleep_of_waits(
    wait_tid: _Numbers,
    run_ns: _Numbers,
    sleep_tid: _Numbers,
    enter_ns: _Numbers,
    exit_ns: _Numbers,
) -> npt.NDArray[np.int64]:
    """Tell the row in `sleeps` of the call that each wait lay in, -1: none. Shape (waits,).

    Takes columns of `waits` and of `sleeps`, in any order of rows. A wait lies in a call of its
    thread when it ended in it, the moment of return included: its last one ends there where the
    return itself was not seen. The calls of a thread do not overlap, so there is one at most.
    """
    found = np.full(len(wait_tid), -1, np.int64)
    if not len(sleep_tid):
        return found
    order = np.lexsort((exit_ns, sleep_tid))
    tid, exits = sleep_tid[order], exit_ns[order]
    # One number that sorts as the pair (thread, time) does: the first call that ends no earlier.
    threads, ranks = np.unique(tid, return_inverse=True)
    rank = np.searchsorted(threads, wait_tid)
    known = rank < len(threads)
    known[known] = threads[rank[known]] == wait_tid[known]
    begin = np.searchsorted(ranks, np.arange(len(threads)))
    end = np.searchsorted(ranks, np.arange(len(threads)), side="right")
    both = np.concatenate([exits.astype(np.int64), run_ns.astype(np.int64)])
    times, places = np.unique(both, return_inverse=True)
    span = len(times)
    keys = ranks.astype(np.int64) * span + places[: len(exits)]
    wanted = rank.astype(np.int64) * span + places[len(exits) :]
    at = np.searchsorted(keys, wanted)
    thread = np.minimum(rank, len(threads) - 1)
    known &= (at >= begin[thread]) & (at < end[thread])
    row = order[np.minimum(at, len(order) - 1)]
    known &= enter_ns[row] < run_ns
    found[known] = row[known]
    return found
