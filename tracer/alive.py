"""Know when processes end, without asking for each of them again and again."""

from __future__ import annotations

import contextlib
import os
import resource
import select


class Alive:
    """Watches processes for their end, by pidfd: half as many as we may open files at most."""

    def __init__(self) -> None:
        self._most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2
        self._epoll = select.epoll()
        self._tgids: dict[int, int] = {}
        self._fds: set[int] = set()

    def __contains__(self, tgid: int) -> bool:
        return tgid in self._fds

    def __len__(self) -> int:
        return len(self._tgids)

    def add(self, tgid: int) -> None:
        """Watch a process; one that is gone already, or one too many, is not watched."""
        if len(self) >= self._most:
            return
        with contextlib.suppress(OSError):
            pidfd = os.pidfd_open(tgid)
            self._tgids[pidfd] = tgid
            self._fds.add(tgid)
            self._epoll.register(pidfd, select.EPOLLIN)

    def wait(self, seconds: float) -> list[int]:
        """Sleep until a watched process ends, at most `seconds`; returns those that have."""
        ended = []
        for pidfd, _ in self._epoll.poll(seconds):
            os.close(pidfd)
            ended.append(self._tgids.pop(pidfd))
            self._fds.discard(ended[-1])
        return ended

    def close(self) -> None:
        """Watch no more."""
        for pidfd in self._tgids:
            os.close(pidfd)
        self._tgids.clear()
        self._epoll.close()
