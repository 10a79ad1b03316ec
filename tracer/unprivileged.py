"""How a child gives up every right, before it looks at what a target wrote.

Only the standard library is imported here, and all of it at once: a child loads no more than it
needs, and once it is nobody, the program's own files may be closed to it.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
import time
from collections.abc import Mapping
from typing import Final

NOBODY: Final = 65534

_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 4, 38
_CAPABILITY_VERSION_3: Final = 0x20080522


def drop_rights(keep: int, *, limits: Mapping[int, int]) -> None:
    """Give up everything but descriptor `keep` and the standard streams.

    `limits`: resource (RLIMIT_…) → the most of it, for good. Raises OSError where that is not
    possible.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.chdir("/")
    os.umask(0o077)
    os.closerange(3, keep)
    os.closerange(keep + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    libc = ctypes.CDLL(None, use_errno=True)
    # With the securebits of some container the change of uid alone would leave them.
    nothing = struct.pack("6I", *[0] * 6)
    if libc.capset(struct.pack("Ii", _CAPABILITY_VERSION_3, 0), nothing):
        raise OSError(ctypes.get_errno(), "capset")
    for option, value in ((_PR_SET_NO_NEW_PRIVS, 1), (_PR_SET_DUMPABLE, 0)):
        if libc.prctl(option, value, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl")
    for which, most in limits.items():
        limit(which, most)


def limit(which: int, most: int) -> None:
    """Let this process have at most so much of a resource, for good; never more than it may."""
    hard = resource.getrlimit(which)[1]
    bound = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(which, (bound, bound))


def limit_request(cpu_s: int) -> None:
    """Let this request use so much CPU time and no more; SIGXCPU ends the child."""
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft = min(int(time.process_time()) + 1 + cpu_s, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))
