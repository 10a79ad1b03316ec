"""Explain a bundle: `python -I -m latrace.tracer.watch.analysis BUNDLE`.

A process of its own, as the user whom the bundle belongs to: it reads names that a target chose
and draws pictures. Started as root behind sudo it first imports everything it will need, as the
program may be installed where only root can read, then gives root up for good.

It puts the analysis into `spike.json` and writes `report.html`, each of them whole or not at all,
and prints the headline. What keeps it from that is one line on stderr, and exit code 1.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from latrace.analysis.words import visible
from latrace.tracer.caller import become, calling_account
from latrace.tracer.errors import LatraceError
from latrace.tracer.outputs import open_output_file

if TYPE_CHECKING:
    from latrace.analysis.spike_file import Told

PAGE: Final = "report.html"
_MOST_MEMORY: Final = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def analyse_bundle(path: Path) -> dict[str, Any]:
    """Explain the bundle at `path`: its `spike.json` gets the analysis, `report.html` is written.

    Returns the analysis. Raises CaptureError for what is no bundle, or a damaged one, LatraceError
    when something cannot be written.
    """
    # pyarrow takes 0.1 s, and matplotlib, which the page needs, 1 s.
    from latrace.analysis.capture import open_capture  # noqa: PLC0415
    from latrace.analysis.errors import CaptureError  # noqa: PLC0415
    from latrace.analysis.report_html import render_html  # noqa: PLC0415
    from latrace.analysis.spikes import SPIKE_FILE, explain  # noqa: PLC0415
    from latrace.analysis.summary import summarise  # noqa: PLC0415

    capture = open_capture(path)
    told = explain(capture)
    if told is None:
        raise CaptureError(
            f"{path} is not a bundle of latrace watch: it has no {SPIKE_FILE}",
            hint="latrace report reads it all the same",
        )
    # First what takes no time: a page that cannot be drawn must not cost it.
    _write(path / SPIKE_FILE, _json(told))
    _write(path / PAGE, render_html(capture, summarise(capture), spike=told))
    return dict(told.analysis)


def _json(told: Told) -> bytes:
    text = json.dumps(told.document(), indent=1, ensure_ascii=True, allow_nan=False)
    return text.encode("ascii") + b"\n"


def _write(path: Path, data: bytes) -> None:
    with open_output_file(path, force=True) as stream:
        stream.write(data)


def main(args: Sequence[str]) -> int:
    """Explain the bundle that `args` name, and return the exit code."""
    if len(args) != 1:
        return _fail("usage: python -m latrace.tracer.watch.analysis BUNDLE")
    resource.setrlimit(resource.RLIMIT_DATA, (_MOST_MEMORY, _MOST_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _give_up_root()
    from latrace.analysis.errors import CaptureError  # noqa: PLC0415 - see above
    from latrace.analysis.spike_text import headline  # noqa: PLC0415

    try:
        analysis = analyse_bundle(Path(args[0]))
    except (LatraceError, CaptureError) as error:
        return _fail(error.cause)
    except OSError as error:
        return _fail(error.strerror or str(error))
    except (MemoryError, RecursionError) as error:
        return _fail(f"the bundle is too large: {type(error).__name__}")
    sys.stdout.write(headline(analysis) + "\n")
    sys.stdout.flush()
    return 0


def _give_up_root() -> None:
    """Go on as the user who typed sudo; as anybody else: nothing to do."""
    account = calling_account()
    if not account.switched:
        return
    # Modules, and what they load at their first use: later the user may not be able to read them.
    import latrace.analysis.report_html  # noqa: PLC0415
    import latrace.analysis.spikes  # noqa: F401, PLC0415
    from latrace.analysis.report_html.charts import rehearse  # noqa: PLC0415

    rehearse()
    become(account)


def _fail(cause: str) -> int:
    sys.stderr.write(f"latrace: {visible(cause)}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
