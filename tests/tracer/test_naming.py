"""Stacks whose names are not looked up in time still have their rows."""

from __future__ import annotations

import numpy as np

from latrace.tracer.naming import Naming
from latrace.tracer.stacks import RawStack

NO_PROCESS = 2**22 - 1


def test_stacks_that_nobody_had_the_time_to_name_are_addresses() -> None:
    naming = Naming()
    kernel = np.array([0xFFFF_FFFF_8100_0000], np.uint64)
    for key in range(1, 20_001):
        user = np.array([0x1000 + key, 0x2000], np.uint64)
        naming.add([RawStack(key, NO_PROCESS, kernel, user, has_user=True)])
    assert naming.added == 20_000
    rows = naming.finish(0)
    late = naming.stats()["late"]
    assert late > 0
    assert sorted(key for key, _ in rows.numbers) == list(range(1, 20_001))
    numbers = {number: key for key, number in rows.numbers}
    named = dict(rows.frames)
    assert len(numbers) == len(rows.stacks) == 20_000
    for number, ids, end, kernel_frames in rows.stacks[-late:]:
        in_kernel, leaf, caller = (named[frame] for frame in ids)
        assert (in_kernel.symbol, in_kernel.offset, kernel_frames) == (None, kernel[0], 1)
        assert (leaf.offset, caller.offset) == (0x1000 + numbers[number], 0x2000)
        assert leaf.module == "[not looked up]" and end == "not looked up"
    assert naming.has_named(20_000)


def test_equal_stacks_have_one_row_and_a_number_of_ones_own_is_kept() -> None:
    naming = Naming()
    kernel, user = np.array([1], np.uint64), np.array([2, 3], np.uint64)
    own = naming.number(RawStack(0, NO_PROCESS, kernel, user, has_user=True))
    for key in (11, 12):
        naming.add([RawStack(key, NO_PROCESS, kernel, user, has_user=True)])
    naming.add([RawStack(13, NO_PROCESS, kernel, user[:1], has_user=True)])
    naming.begin_epoch()
    naming.add([RawStack(14, NO_PROCESS, kernel, user, has_user=True)])
    rows = naming.finish(30)
    numbers = dict(rows.numbers)
    assert numbers.keys() == {11, 12, 13, 14}
    assert numbers[11] == numbers[12] != numbers[13]
    assert numbers[14] not in {numbers[11], own}  # nothing before the epoch is referred to
    assert {number for number, *_ in rows.stacks} == {own, *numbers.values()}
    assert [frame.offset for _, frame in rows.frames].count(2) == 2
    assert naming.stats()["late"] == 0
    naming.close()
