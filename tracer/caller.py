"""The account of the user who typed the command: whose programs we start, and as whom we end."""

from __future__ import annotations

import os
import pwd
from collections.abc import Mapping
from dataclasses import dataclass

from latrace.tracer.outputs import calling_user


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """A user of this host, as the user database has it."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    name: str
    home: str
    shell: str
    switched: bool
    """Whether this is somebody else than who the process runs as (the user behind sudo)."""


def calling_account() -> Account:
    """The account of the user who typed sudo, else of this process's own user."""
    behind_sudo = calling_user()
    if behind_sudo is None:
        uid, gid, groups = os.geteuid(), os.getegid(), tuple(os.getgroups())
    else:
        uid, gid, groups = behind_sudo.uid, behind_sudo.gid, behind_sudo.groups
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:  # such a user may exist all the same, e.g. in a container
        name, home, shell = str(uid), "/", "/bin/sh"
    else:
        name, home, shell = entry.pw_name, entry.pw_dir, entry.pw_shell or "/bin/sh"
    return Account(
        uid=uid,
        gid=gid,
        groups=groups,
        name=name,
        home=home,
        shell=shell,
        switched=behind_sudo is not None,
    )


def become(account: Account) -> None:
    """Give up root for good and be `account`; does nothing if we already are."""
    if not account.switched:
        return
    os.setgroups(account.groups)
    os.setresgid(account.gid, account.gid, account.gid)
    os.setresuid(account.uid, account.uid, account.uid)


def environment_of(account: Account, environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment for a program started as `account`: sudo's own marks taken out.

    PATH stays as sudo set it: what it was before is not known any more.
    """
    env = dict(os.environ if environ is None else environ)
    if account.switched:
        for name in ("SUDO_UID", "SUDO_GID", "SUDO_USER", "SUDO_COMMAND", "SUDO_HOME", "MAIL"):
            env.pop(name, None)
        env.update(HOME=account.home, USER=account.name, LOGNAME=account.name, SHELL=account.shell)
    return env
