"""Stacks whose names are not looked up in time still have their rows."""

from __future__ import annotations

import numpy as np

from latrace.tracer.stacks import Naming, RawStack

NO_PROCESS = 2**22 - 1


def test_stacks_that_nobody_had_the_time_to_name_are_addresses() -> None:
    naming = Naming()
    kernel = np.array([0xFFFF_FFFF_8100_0000], np.uint64)
    for number in range(20_000):
        user = np.array([0x1000 + number, 0x2000], np.uint64)
        naming.add(RawStack(number, NO_PROCESS, kernel, user, has_user=True))
    rows = naming.finish(0)
    late = naming.stats()["late"]
    assert late > 0
    assert sorted(number for number, *_ in rows.stacks) == list(range(20_000))
    named = dict(rows.frames)
    for number, ids, whole, kernel_frames in rows.stacks[-late:]:
        in_kernel, leaf, caller = (named[frame] for frame in ids)
        assert (in_kernel.symbol, in_kernel.offset, kernel_frames) == (None, kernel[0], 1)
        assert (leaf.offset, caller.offset) == (0x1000 + number, 0x2000)
        assert leaf.module == "[not looked up]" and not whole
    assert naming.is_idle
