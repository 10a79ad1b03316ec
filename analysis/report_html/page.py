"""The page: what was found in words first, then the plots, then whether to believe it."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from typing import Any, Final

from latrace.analysis.report_html import answer, details, losses, trust
from latrace.analysis.report_html.spike import spike_head
from latrace.analysis.report_html.wording import safe
from latrace.analysis.spike_file import Told

Summary = Mapping[str, Any]

# At import: later, a command that began as root may not be able to read it.
_STYLE: Final = (
    resources.files("latrace.analysis.report_html")
    .joinpath("report.css")
    .read_text(encoding="utf-8")
)
_SCRIPT: Final = re.compile(r"<script><!\[CDATA\[(.*?)\]\]></script>", re.DOTALL)
_VIEW_BOX: Final = re.compile(r'viewBox="0 0 (\d+) (\d+)"')


@dataclass(frozen=True, slots=True, kw_only=True)
class Flame:
    """A flame graph to embed."""

    title: str
    about: str
    svg: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """The plots as `svg` elements; "" for one that has nothing to show."""

    heat: str = ""
    causes: str = ""
    tail: str = ""
    sleeps: str = ""
    calls: Sequence[str] = ()
    """The calls in `sleeps`, in the order of their colours."""
    losses: str = ""
    """Marks for when TCP segments were sent again, on the axis of the plots over time."""
    heat_note: str = ""
    """Which waits the plots over time do not have."""
    flames: Sequence[Flame] = ()


def write_page(
    summary: Summary, manifest: Mapping[str, Any], pictures: Pictures, *, spike: Told | None = None
) -> str:
    """Put the page together: one HTML document that asks nothing of the network.

    With `spike`, that comes first.
    """
    parts: list[tuple[str, Callable[[], str]]] = [
        ("The whole recording", lambda: answer.overview(summary) if spike else ""),
        ("Why", lambda: answer.why(summary)),
        ("Over time", lambda: details.over_time(summary, pictures)),
        ("Distribution", lambda: details.distribution(summary, pictures)),
        ("Sleep calls", lambda: details.sleeps(summary, pictures)),
        ("Lost TCP segments", lambda: losses.tables(summary)),
        ("Threads", lambda: details.threads(summary)),
        ("Woken by, blocked in", lambda: details.around(summary)),
        ("Flame graphs", lambda: _flames(pictures)),
        ("How far to trust this", lambda: trust.quality(summary, manifest)),
        ("The capture", lambda: trust.capture(summary, manifest)),
        ("The same in words", lambda: trust.words(summary)),
    ]
    head = spike_head(spike, summary) if spike else answer.head(summary)
    sections = [
        f'<section id="{_anchor(title)}"><h2>{title}</h2>\n{body}</section>'
        for title, write in parts
        if (body := write())
    ]
    links = "".join(
        f'<a href="#{_anchor(title)}">{title}</a>'
        for title, _ in parts
        if any(section.startswith(f'<section id="{_anchor(title)}"') for section in sections)
    )
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_policy(pictures.flames)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            '<meta name="referrer" content="no-referrer">',
            f"<title>latrace: {answer.plain_targets(summary)}</title>",
            f"<style>\n{_STYLE}</style></head>",
            f"<body><main>{head}<nav>{links}</nav>",
            *sections,
            "</main></body></html>\n",
        ]
    )


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z]+", "-", title.lower())


def _policy(flames: Sequence[Flame]) -> str:
    """Allow the flame graphs' own script, by its hash, and no other; nothing from anywhere."""
    hashes = set()
    for flame in flames:
        for script in _SCRIPT.findall(flame.svg):
            digest = hashlib.sha256(script.encode("utf-8")).digest()
            hashes.add(f"'sha256-{base64.b64encode(digest).decode('ascii')}'")
    scripts = " ".join(sorted(hashes)) or "'none'"
    return (
        f"default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _flames(pictures: Pictures) -> str:
    if not pictures.flames:
        return ""
    out = [
        "<p>Width is time. In a picture, a click zooms, <kbd>/</kbd> searches, "
        "<kbd>Esc</kbd> goes back.</p>"
    ]
    for number, flame in enumerate(pictures.flames):
        found = _VIEW_BOX.search(flame.svg)
        width, height = (int(side) for side in found.groups()) if found else (1200, 600)
        # The picture's tools stand above it.
        document = escape(
            '<!DOCTYPE html><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
            f"<style>html,body{{margin:0}}</style><title>{safe(flame.title)}</title>{flame.svg}",
            quote=True,
        )
        out.append(
            f"<details{' open' if number == 0 else ''}><summary><b>{safe(flame.title)}</b> "
            f"<span class=soft>{safe(flame.about)}</span></summary>"
            f'<div class=scroll><iframe sandbox="allow-scripts" title="{safe(flame.title)}" '
            f'style="aspect-ratio:{width}/{height}" srcdoc="{document}"></iframe></div></details>'
        )
    return "".join(out)
