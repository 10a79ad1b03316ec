"""`latrace doctor`: what this host can do, and the exact next command."""

from __future__ import annotations

import json
import platform
import sys
import textwrap
from dataclasses import asdict
from typing import Annotated

import typer

from latrace import __version__
from latrace.analysis.words import visible
from latrace.tracer.commands.console import program, wants_colour, width_of, write_out
from latrace.tracer.doctor import Check, run_checks, sudo
from latrace.tracer.errors import HostError

_SHOWN = {"ok": "ok", "warn": "warn", "fail": "FAIL", "skip": "-"}
_COLOURS = {"ok": "\x1b[32m", "warn": "\x1b[33m", "fail": "\x1b[1;31m", "skip": "\x1b[2m"}
_NAME_COLUMNS = 17


def doctor(
    *,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the findings as JSON, for machines.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Say of everything what it is for.")
    ] = False,
) -> None:
    """Try what tracing needs, and say what to do where it fails.

    Needs no root to look, but only root can try everything. Changes nothing.
    Exit code 3 when something that tracing needs is missing.

    \b
    sudo latrace doctor
    """
    checks = run_checks()
    if as_json:
        document = {
            "schema": 1,
            "latrace": __version__,
            "kernel": platform.release(),
            "machine": platform.machine(),
            "python": platform.python_version(),
            "ok": not any(check.state == "fail" for check in checks),
            "checks": [asdict(check) for check in checks],
        }
        write_out(json.dumps(document, indent=2) + "\n")
    else:
        write_out(
            render_checks(
                checks,
                verbose=verbose,
                width=width_of(sys.stdout),
                colour=wants_colour(sys.stdout),
            )
        )
    failed = [check for check in checks if check.state == "fail"]
    if failed:
        raise HostError(f"{failed[0].name}: {failed[0].finding}", hint=failed[0].remedy)


def render_checks(checks: list[Check], *, verbose: bool, width: int, colour: bool) -> str:
    """The findings for people: one line each, more where something is to be done."""
    lines = [f"latrace {__version__} on Linux {platform.release()} {platform.machine()}", ""]
    indent = " " * (8 + _NAME_COLUMNS)
    for check in checks:
        mark = f"{_SHOWN[check.state]:<4}"
        if colour:
            mark = f"{_COLOURS[check.state]}{mark}\x1b[0m"
        finding = textwrap.wrap(visible(check.finding), width - len(indent)) or [""]
        lines.append(f"  {mark}  {check.name:<{_NAME_COLUMNS}}{finding[0]}")
        more = finding[1:]
        if verbose or check.state in ("warn", "fail"):
            more += textwrap.wrap(visible(check.meaning), width - len(indent))
        if check.remedy:
            more += textwrap.wrap(
                f"-> {visible(check.remedy)}",
                width - len(indent),
                subsequent_indent="   ",
                break_long_words=False,
                break_on_hyphens=False,
            )
        lines += [indent + line for line in more]
    lines += ["", _verdict(checks), ""]
    return "\n".join(lines)


def _verdict(checks: list[Check]) -> str:
    states = {check.state for check in checks}
    if "fail" in states:
        return "latrace can not trace here until what is marked FAIL is mended."
    if "skip" in states:
        return f"Nothing found missing, but not all was tried. Next: {sudo(program())} doctor"
    return f"This host can trace. Next: {sudo(program())} demo"
