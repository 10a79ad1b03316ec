"""Where the C library begins a program or a thread: functions that have no caller of interest."""

from __future__ import annotations

import re
from typing import Final

# Of glibc and musl; a name may carry its version.
_FIRST: Final = re.compile(
    r"(_start(_c)?|__libc_start_main(_impl)?|__libc_start_call_main|libc_start_main_stage2"
    r"|_dl_start_user|start_thread|(__)?clone3?)([@.].*)?"
)


def is_start_up(name: str) -> bool:
    """Whether a function of that name is among the first of a thread.

    Only at the outer end of a stack: further in, it is what the program called.
    """
    return _FIRST.fullmatch(name) is not None
