"""The elements that the page is made of. What is given to them is safe already."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from latrace.analysis.report_html.wording import percent, time


def bar(
    parts: Mapping[str, int], about: Mapping[str, str], prefix: str, *, thin: bool = False
) -> str:
    """Draw parts of a whole as one bar."""
    total = sum(max(0, ns) for ns in parts.values())
    if not total:
        return ""
    told = ", ".join(
        f"{part.replace('_', ' ')} {percent(parts.get(part, 0), total)}"
        for part in about
        if parts.get(part, 0) > 0
    )
    pieces = "".join(
        f'<i style="flex-grow:{max(parts[part], 0) / total:.5f};background:var(--{prefix}-{part})" '
        f'title="{part.replace("_", " ")} {percent(parts[part], total)}, {time(parts[part])}"></i>'
        for part in about
        if parts.get(part, 0) > 0
    )
    kind = "bar thin" if thin else "bar"
    return f'<div class="{kind}" role="img" aria-label="{told}">{pieces}</div>'


def swatch(variable: str) -> str:
    """Show the colour of a CSS variable."""
    return f'<i class=swatch style="background:var(--{variable})"></i>'


def figure(title: str, picture: str, note: str) -> str:
    """Put a picture between its title and a note."""
    return f"<figure><h3>{title}</h3>{picture}<figcaption>{note}</figcaption></figure>"


def facts(facts: Iterable[tuple[str, str]]) -> str:
    """List facts by key; those without a value are left out."""
    lines = "".join(f"<dt>{key}</dt><dd>{value}</dd>" for key, value in facts if value)
    return f"<dl class=facts>{lines}</dl>"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table: the first column is words, the others are numbers."""
    head = "".join(f"<th>{title}</th>" for title in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f'<div class=scroll><table style="--n:{len(heads) - 1}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
