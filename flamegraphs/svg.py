"""A flame graph as one self-contained SVG: a still picture that a script makes explorable.

The picture stands alone: every text is cut to fit its frame and every frame has a <title>, so it
reads the same with scripts off, in a mail or a terminal's image viewer. `flame.js` adds zoom,
search and the keyboard; it takes names from the drawn text and treats them as text only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Final, Protocol, get_args
from xml.sax.saxutils import escape as xml_escape
from zlib import crc32

from latrace.analysis.names import own_part
from latrace.flamegraphs.layout import Box, Layout, lay_out
from latrace.flamegraphs.meanings import meaning_of
from latrace.flamegraphs.profile import CODE, FrameKind, Profile
from latrace.flamegraphs.text import ELLIPSIS, cells, fit, human_share, human_us, visible

# flame.js lays out anew from these: it reads them off the picture, never from a copy.
WIDTH: Final = 1200
PAD: Final = 10
ROW: Final = 17
CELL: Final = 7.23  # the widest common monospaced font (DejaVu Sans Mono) at 12 px
INSET: Final = 3

MIN_PIXELS: Final = 0.1
SCREEN_ROWS: Final = 40  # of a laptop's screen
MIN_PIXELS_BEYOND: Final = 2  # where it is drawn as a frame and not as a hair
MAX_FRAMES: Final = 12_000  # about 3 MB; a browser lays that many out at once without a stutter
NAME_LIMIT: Final = 400
TINTS: Final = 3

# At import: at the first picture, a command that began as root may not be able to read them.
_STYLE, _SCRIPT = (
    resources.files("latrace.flamegraphs").joinpath(name).read_text(encoding="utf-8")
    for name in ("flame.css", "flame.js")
)

_PROSE: Final = 7.2  # px per character of the widest of the prose fonts at 12 px
_TITLE: Final = 10.2  # the same at 17 px, bold
_LABEL: Final = 6.6  # the mean, for the legend's short words
_LINE: Final = 17
_LEGEND: Final[dict[FrameKind, str]] = {
    "state": "state or cause",
    "process": "process",
    "thread": "thread",
    "user": "program",
    "inlined": "inlined",
    "jit": "JIT code",
    "kernel": "kernel",
    "network": "lost TCP segments",
    "marker": "no function",
}


class Paint(Protocol):
    """Another colouring than by the kind of frame."""

    legend: Sequence[tuple[str, str]]
    """Classes of `flame.css` and their meaning."""

    def of(self, box: Box) -> tuple[str, str]:
        """Return the class of a frame, and what is said of it besides its time and share."""


def to_svg(
    profile: Profile,
    *,
    inverted: bool | None = None,
    max_frames: int = MAX_FRAMES,
    paint: Paint | None = None,
) -> str:
    """Return the profile as an SVG document, root at the bottom or, if `inverted`, at the top.

    By itself it is at the top where the picture is higher than a screen: the answer begins at the
    root, and the page opens at its top. A frame is as wide as its share of the time. Frames below
    0.1 px (2 px beyond a screen's rows), and the narrowest beyond `max_frames`, are not drawn:
    their number and time are said beside the legend.
    """
    room = WIDTH - 2 * PAD
    layout = lay_out(
        profile,
        min_share=MIN_PIXELS / room,
        max_boxes=max_frames,
        screen=SCREEN_ROWS,
        min_share_beyond=MIN_PIXELS_BEYOND / room,
    )
    head, top = _head(profile)
    tall = layout.rows > SCREEN_ROWS
    if tall:  # nobody would find it below
        legend, below = _legend(layout, top, paint)
        head, top = head + legend, below + 10
    bottom = below = top + layout.rows * ROW
    foot: list[str] = []
    if not tall:
        foot, below = _legend(layout, bottom + 10, paint)
    height = below + (PAD if tall else 24)
    if inverted is None:
        inverted = tall
    title = _safe(profile.title)
    facts = "; ".join(f"{key}: {value}" for key, value in profile.facts)
    drawing = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="latrace-flame" width="{WIDTH}" '
        f'height="{height}" viewBox="0 0 {WIDTH} {height}" role="graphics-document" '
        f'aria-roledescription="flame graph" aria-label="{title}">',
        f"<title>{title}</title>",
        f"<desc>{_safe(profile.subtitle)} {_safe(facts)}</desc>",
        f"<style>\n{_STYLE}</style>",
        '<rect class="bg" width="100%" height="100%"/>',
        *head,
        f'<g class="frames" data-rows="{layout.rows}" data-row="{ROW}" '
        f'data-pad="{PAD}" data-hidden="{layout.hidden_us}" data-inverted="{int(inverted)}">',
        *_frames(layout, top=top, inverted=inverted, paint=paint),
        "</g>",
        *foot,
        f"<script><![CDATA[\n{_SCRIPT}]]></script>",
        "</svg>\n",
    ]
    return "\n".join(drawing)


def _frames(layout: Layout, *, top: int, inverted: bool, paint: Paint | None) -> Iterable[str]:
    scale = (WIDTH - 2 * PAD) / max(1, layout.total_us)
    for box in layout.boxes:
        # Both edges are rounded, not the width: a rounded child stays inside its rounded parent.
        left = round(PAD + box.start * scale, 2)
        right = round(PAD + (box.start + box.value) * scale, 2) if layout.total_us else WIDTH - PAD
        row = box.depth if inverted else layout.rows - 1 - box.depth
        yield _frame(
            box, layout.total_us, left=left, width=right - left, y=top + row * ROW, paint=paint
        )


def _frame(
    box: Box, total_us: int, *, left: float, width: float, y: int, paint: Paint | None
) -> str:
    name = visible(box.frame.name, limit=NAME_LIMIT).strip() or "[unknown]"
    if box.depth == 0:
        name += f" · {human_us(total_us)}"
    # The same name has the same tint in every picture.
    colour = f"{box.frame.kind} t{crc32(name.encode()) % TINTS}"
    thin = " thin" if width < 2 else ""
    about = [f"{human_us(box.value)}, {human_share(box.value, total_us)}"]
    if paint is not None:
        colour, told = paint.of(box)
        about.append(told)
    if meaning := meaning_of(box.frame):
        about.append(meaning)
    if box.frame.module:
        about.append(visible(box.frame.module, limit=NAME_LIMIT))
    start, end = own_part(name) if box.frame.kind in CODE else (0, 0)
    label = _label(name, int((width - 2 * INSET) / CELL), start, end)
    # For the script, which cuts the names anew.
    own = f' data-own="{start} {end}"' if start else ""
    text = f'<text x="{left + INSET:.2f}" y="{y + 12}">{xml_escape(label)}</text>' if label else ""
    return (
        f'<g class="{colour}{thin}" data-t="{box.start} {box.value} {box.depth}"{own}>'
        f"<title>{xml_escape(name)}\n{xml_escape(' · '.join(about))}</title>"
        f'<rect x="{left:.2f}" y="{y}" width="{width:.2f}" height="{ROW - 1}" rx="1.5"/>{text}</g>'
    )


def _label(name: str, columns: int, start: int, end: int) -> str:
    """Cut a name whose own part, without its qualifiers, is `name[start:end]`."""
    if cells(name) <= columns or not start or end < columns:
        return fit(name, columns)
    own = fit(name[start:], columns - 1)
    # Of a place in a file what is left of the room is the file's.
    file = name[: columns - 1 - len(own)] if own.startswith("+") and name.isascii() else ""
    return own and file + ELLIPSIS + own


def _head(profile: Profile) -> tuple[list[str], int]:
    """Return title, facts and warnings, and the y below them."""
    out = [f'<text class="h1" x="{PAD}" y="27">{_line(profile.title, 640, _TITLE)}</text>']
    y = 33
    if profile.subtitle:
        y += _LINE
        out.append(f'<text class="h2" x="{PAD}" y="{y}">{_line(profile.subtitle, 1180)}</text>')
    for row in _wrapped(profile.facts):
        y += _LINE
        spans = '<tspan class="key"> · </tspan>'.join(
            f'<tspan class="key">{_safe(key)}</tspan> {_safe(value)}' for key, value in row
        )
        out.append(f'<text class="facts" x="{PAD}" y="{y}">{spans}</text>')
    for warning in profile.warnings:
        y += _LINE
        out.append(f'<text class="warn" x="{PAD}" y="{y}">{_line("!!! " + warning, 1180)}</text>')
    return out, y + 14


def _wrapped(facts: Sequence[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    """Break the facts into lines that fit the picture."""
    columns = int((WIDTH - 2 * PAD) / _PROSE)
    lines: list[list[tuple[str, str]]] = []
    used = columns
    for key, value in facts:
        shown = (fit(visible(key), 30), fit(visible(value, limit=NAME_LIMIT), columns - 40))
        needed = cells(shown[0]) + cells(shown[1]) + 4
        if used + needed > columns:
            lines.append([])
            used = 0
        lines[-1].append(shown)
        used += needed
    return lines


def _legend(layout: Layout, y: int, paint: Paint | None) -> tuple[list[str], int]:
    """Return what the colours mean and what is not drawn, and the y below."""
    legend: Sequence[tuple[str, str]]
    if paint is not None:
        legend = paint.legend
    else:
        kinds = {box.frame.kind for box in layout.boxes}
        legend = [(kind, _LEGEND[kind]) for kind in get_args(FrameKind) if kind in kinds]
    x = float(PAD)
    out = ['<g class="legend">']
    for colour, label in legend:
        out.append(f'<g class="{colour}"><rect x="{x:.1f}" y="{y}" width="11" height="11" rx="2"/>')
        out.append(f'<text x="{x + 16:.1f}" y="{y + 10}">{label}</text></g>')
        x += 16 + len(label) * _LABEL + 16
    note = "left to right is by name, not by time"
    if layout.hidden:
        note += (
            f" · {layout.hidden:,} frames are too narrow to draw: "
            f"stacks worth {human_us(layout.hidden_us)} end in them"
        )
    if x + len(note) * _PROSE > WIDTH - PAD:
        x, y = PAD, y + _LINE
    out.append(f'<text x="{x:.1f}" y="{y + 10}">{note}</text></g>')
    return out, y + 12


def _line(text: str, pixels: float, per_character: float = _PROSE) -> str:
    return xml_escape(fit(visible(text, limit=NAME_LIMIT), int(pixels / per_character)))


def _safe(text: str) -> str:
    return xml_escape(visible(text, limit=NAME_LIMIT), {'"': "&quot;"})
