"""The stack of a thread that still sleeps when the trace ends, read as it is then.

That sleep was not sampled, yet a long one is what one wants to see. The thread may run meanwhile:
whoever walks the copy doubts it anyway.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .stacks import Copy
from .target_memory import read_pieces

_SP = 19  # word of struct pt_regs
_RED_ZONE = 128  # below the stack pointer, System V ABI, AMD64, 3.2.2
_PAGE, _MAX_BYTES = 4096, 64 << 10


def copy_stack(pid: int, regs: npt.NDArray[np.uint64]) -> Copy | None:
    """The stack from the registers' stack pointer upwards; None where it cannot be read.

    `regs`: shape (21,) in the order of struct pt_regs.
    """
    base = max(0, int(regs[_SP]) - _RED_ZONE)
    # Of a part that begins where nothing is mapped the kernel reads nothing, and ends there.
    pieces = [(base, _PAGE - base % _PAGE)]
    pieces += [(base - base % _PAGE + at, _PAGE) for at in range(_PAGE, _MAX_BYTES, _PAGE)]
    memory = np.frombuffer(read_pieces(pid, pieces), np.uint8)
    return Copy(regs, base, memory) if memory.size else None
