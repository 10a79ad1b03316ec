"""The seam to matplotlib: imported late, told nothing by the host, its SVG made part of a page.

Colours are drawn as marks that become CSS variables, so that one picture serves light and dark.
"""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final
from xml.sax.saxutils import escape

from latrace.analysis.causes import CAUSES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_VARIABLES: Final = (
    "ink", "soft", "faint", "surface", "accent", "wash", "alarm",
    *(f"c-{cause}" for cause in CAUSES),
    *(f"s-{number}" for number in range(6)),
)  # fmt: skip
INK: Final = {name: f"#0a1b{number:02x}" for number, name in enumerate(_VARIABLES)}
"""The colour to draw with, by the name of the CSS variable it becomes."""

FONT: Final = 12  # px, when the picture is as wide as it was drawn


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Import matplotlib without what it reads and writes on the way.

    It looks for settings in the working directory, and keeps a list of fonts in a folder of the
    user's: root takes nothing from the one and leaves nothing in the other.
    """
    if os.geteuid() != 0:
        yield
        return
    here = os.open(".", os.O_PATH | os.O_DIRECTORY)
    before = os.environ.get("MPLCONFIGDIR")
    try:
        with tempfile.TemporaryDirectory(prefix="latrace.", ignore_cleanup_errors=True) as folder:
            os.environ["MPLCONFIGDIR"] = folder
            os.chdir("/")
            yield
    finally:
        os.fchdir(here)
        os.close(here)
        if before is None:
            os.environ.pop("MPLCONFIGDIR", None)
        else:
            os.environ["MPLCONFIGDIR"] = before


def load() -> None:
    """Import matplotlib: takes about a second, so it is done only when something is drawn."""
    if "matplotlib.backends.backend_svg" in sys.modules:
        return
    log = logging.getLogger("matplotlib")
    level = log.level
    log.setLevel(logging.ERROR)  # that it collects the names of fonts is of no interest
    try:
        with _undisturbed():
            import matplotlib.backends.backend_svg  # noqa: F401, PLC0415
    finally:
        log.setLevel(level)


def draw(paint: Callable[[Figure], None], *, key: str, label: str, width: int, height: int) -> str:
    """Draw a picture of some px and return it as an `svg` element of an HTML page.

    `key` keeps its ids apart from those of other pictures in the page; `label` says in words
    what it shows.
    """
    load()
    import matplotlib as mpl  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    stream = io.StringIO()
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": key,
                "text.parse_math": False,  # a dollar in a name is a dollar
                "font.size": FONT,
                "text.color": INK["ink"],
                "axes.labelcolor": INK["soft"],
                "axes.edgecolor": INK["faint"],
                "axes.linewidth": 1,
                "axes.unicode_minus": False,
                "xtick.color": INK["faint"],
                "ytick.color": INK["faint"],
                "xtick.labelcolor": INK["soft"],
                "ytick.labelcolor": INK["soft"],
                "xtick.labelsize": FONT,
                "ytick.labelsize": FONT,
                "grid.color": INK["faint"],
                "grid.linewidth": 0.6,
            }
        )
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        paint(figure)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    return _for_page(stream.getvalue(), key=key, label=label, width=width, height=height)


def axes(figure: Figure, *, left: int, right: int, top: int, bottom: int) -> Axes:
    """Make axes with margins in px, a bare frame and a quiet grid."""
    width, height = (72 * inches for inches in figure.get_size_inches())
    made = figure.add_axes(
        (
            left / width,
            bottom / height,
            (width - left - right) / width,
            (height - top - bottom) / height,
        )
    )
    for side in ("top", "right"):
        made.spines[side].set_visible(False)
    made.tick_params(which="both", length=3)
    made.tick_params(which="minor", length=0)
    return made


_COLOURS = {colour: f"var(--{name})" for name, colour in INK.items()}


def _for_page(svg: str, *, key: str, label: str, width: int, height: int) -> str:
    body = svg[svg.index("<svg") :]
    body = body[body.index(">") + 1 :]
    # Rules of the picture's own would hold for the whole page.
    body = re.sub(r"\s*<defs>\s*<style.*?</style>\s*</defs>", "", body, count=1, flags=re.DOTALL)
    body = re.sub(r"\s*<metadata>.*?</metadata>", "", body, count=1, flags=re.DOTALL)
    body = body.replace("xlink:href=", "href=")
    body = re.sub(r'\bid="(?!heat-)', f'id="{key}-', body)
    body = re.sub(r'href="#', f'href="#{key}-', body)
    body = re.sub(r"url\(#", f"url(#{key}-", body)
    body = re.sub(r'\bid="heat-(\w+)"', r'class="heat-\1"', body)
    body = re.sub(r" ?font-family: [^;\"]*;?", "", body)  # the page's
    body = re.sub(r' transform="rotate\(-?0 [^"]*\)"', "", body)
    body = re.sub(r"(?<=: )#[0-9a-f]{6}", lambda found: _COLOURS.get(found[0], found[0]), body)
    body = re.sub(r'\b(d|x|y)="[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), body)
    body = re.sub(r"\n\s*", "\n", body)
    title = escape(label, {'"': "&quot;"})
    return (
        f'<svg viewBox="0 0 {width} {height}" style="aspect-ratio:{width}/{height}" role="img" '
        f'aria-label="{title}">{body}'
    )
