"""The retransmits of connections in words, for a terminal.

A pure function from their summary (`latrace.analysis.connections`) to text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from latrace.analysis.losses import KINDS
from latrace.analysis.page import BOLD, DIM, NUMBER, Page, comm
from latrace.analysis.words import cells, duration, endpoint, pad, plural, share, size, visible

Summary = Mapping[str, Any]

_LISTED_OWNERS = 3
_LISTED_NAMESPACES = 5
_HEADS = ("sent again", "of", "share", "bytes")


def render_connections(summary: Summary, *, width: int = 80, colour: bool = False) -> str:
    """Write the report; no line is wider than `width` columns (at least 60). Ends in a newline."""
    page = Page(max(width, 60), colour=colour)
    for piece in _headline(summary):
        page.prose(piece, indent="", style=BOLD)
    _warnings(page, summary)
    if summary["connections"]:
        _connections(page, summary)
    _checks(page, summary)
    return page.text()


def _headline(summary: Summary) -> list[str]:
    total, watched = summary["retransmits"], summary["watched"]
    seconds = duration(summary["capture"]["duration_s"] * 1e9)
    of_all = (
        f"{plural(watched['segs_out'], 'segment')} of "
        f"{plural(watched['connections'], 'TCP connection')}"
    )
    if not total["segs"]:
        return [f"Nothing was sent again in {seconds}: {of_all} watched."]
    lossy = len(summary["connections"]) + summary["rest"]["connections"]
    by_kind = ", ".join(
        f"{total['by_kind'][kind]:,} {kind}" for kind in KINDS if total["by_kind"][kind]
    )
    return [
        f"{plural(total['segs'], 'segment')} sent again in {seconds} ({by_kind}), by "
        f"{plural(lossy, 'connection')}; watched: {of_all}."
    ]


def _warnings(page: Page, summary: Summary) -> None:
    quality = summary["quality"]
    if not summary["capture"]["complete"]:
        page.warn("This capture was not closed: its last moments are missing.")
    if quality["lost_sockets"]:
        page.warn(
            f"{plural(quality['lost_sockets'], 'record')} of sockets lost: the ring was full. "
            "The figures below are too low; those of the kernel are not."
        )
    if quality["tcp_info_refused"]:
        page.warn(
            f"TCP_INFO could not be read everywhere ({visible(str(quality['tcp_info_refused']))}): "
            "what was sent in all is not known of some connections."
        )


# --- the table ---------------------------------------------------------------------------------


def _connections(page: Page, summary: Summary) -> None:
    page.line()
    _row(page, "Peer and connection", _HEADS, style=BOLD)
    peers = {peer["daddr"]: peer for peer in summary["peers"]}
    order = {peer: place for place, peer in enumerate(peers)}
    listed = sorted(summary["connections"], key=lambda each: order.get(each["daddr"], len(order)))
    for daddr, group in groupby(listed, key=lambda each: each["daddr"]):
        theirs = list(group)
        peer = peers.get(daddr)
        if peer is not None:
            more = f" ({peer['connections']:,} connections)" if peer["connections"] > 1 else ""
            _row(page, visible(daddr) + more, _figures(peer))
        for each in theirs:
            name = f"  {endpoint(visible(each['saddr']), each['sport'])} > :{each['dport']}"
            _row(page, name, _figures(each))
            page.prose(_what(each), indent="      ")
            if state := _state(each):
                page.prose(state, indent="      ")
    rest = summary["rest"]
    if rest["connections"]:
        _row(page, f"{plural(rest['connections'], 'more connection')}", _figures(rest), style=DIM)
    _row(page, "in all", _figures(summary["retransmits"]), style=BOLD)


def _row(page: Page, name: str, numbers: Sequence[str], *, style: str = "") -> None:
    """Write a line of the table; a name that is too long stands on one of its own."""
    room = page.width - NUMBER * len(numbers)
    if cells(name) >= room:
        page.line(name, style=style)
        name = ""
    page.line(pad(name, room) + "".join(number.rjust(NUMBER) for number in numbers), style=style)


def _figures(sums: Mapping[str, Any]) -> list[str]:
    return [
        f"{sums['segs']:,}",
        f"{sums['segs_out']:,}" if sums["segs_out"] else "-",
        "-" if sums["rate"] is None else share(sums["rate"], 1),
        size(sums["bytes"]),
    ]


def _what(each: Mapping[str, Any]) -> str:
    """Say why a connection sent again, and whose it is."""
    kinds = ", ".join(
        f"{kind} {each['by_kind'][kind]:,}" for kind in KINDS if each["by_kind"][kind]
    )
    failed = f" ({each['failed']:,} of them never left this host)" if each["failed"] else ""
    owners = [
        f"{comm(owner['comm']) or '(name not seen)'} (pid {owner['tgid']})"
        for owner in each["owners"][:_LISTED_OWNERS]
    ]
    if len(each["owners"]) > _LISTED_OWNERS:
        owners.append(f"{len(each['owners']) - _LISTED_OWNERS:,} more")
    return f"{', '.join(owners)}: {kinds}{failed}"


def _state(each: Mapping[str, Any]) -> str:
    """Say how the connection stood when it was seen last."""
    state = "closed" if each["closed"] else each["state"]
    parts = [visible(str(state))] if state else []
    if each["rtt_us"]:
        jitter = f" ± {duration(each['rttvar_us'] * 1000)}" if each["rttvar_us"] else ""
        parts.append(f"rtt {duration(each['rtt_us'] * 1000)}{jitter}")
    if each["cwnd"]:
        parts.append(f"cwnd {each['cwnd']:,}")
    if each["delivery_rate"]:
        parts.append(f"{size(each['delivery_rate'])}/s")
    if each["congestion"]:
        parts.append(visible(each["congestion"]))
    return ", ".join(parts)


# --- whether to believe it ---------------------------------------------------------------------


def _checks(page: Page, summary: Summary) -> None:
    checks = summary["checks"]
    rows = [
        ("these connections (TCP_INFO)", summary["retransmits"]["segs"], checks["total_retrans"])
    ]
    told = [each for each in checks["netns"] if each["segs"] or each["retrans_segs"]]
    quiet = sum(each["retrans_segs"] == 0 and not each["segs"] for each in checks["netns"])
    unlisted = told[_LISTED_NAMESPACES:]
    for each in told[:_LISTED_NAMESPACES]:
        name = f"network namespace {each['inum']}, all sockets"
        rows.append((name, each["segs"], each["retrans_segs"]))
    if unlisted:
        name = f"{plural(len(unlisted), 'other network namespace')}, all sockets"
        ours = sum(each["segs"] for each in unlisted)
        read = [each["retrans_segs"] for each in unlisted if each["retrans_segs"] is not None]
        rows.append((name, ours, sum(read) if len(read) == len(unlisted) else None))
    if quiet:
        other = "other " if told else ""
        rows.append((f"{plural(quiet, f'{other}network namespace')}, all sockets", 0, 0))
    page.table(
        "Held against the kernel's counters",
        ("here", "kernel", "differ by"),
        ((name, _pair(ours, kernels)) for name, ours, kernels in rows),
    )
    if len(rows) > 1:
        page.prose(
            "A network namespace's counter (Tcp: RetransSegs) is of all its sockets, whoever has "
            "them."
        )
    if any(kernels not in {ours, None} for _, ours, kernels in rows):
        page.prose(
            "What is sent again in the milliseconds in which tracing begins or ends may be in the "
            "kernel's figure alone."
        )
    if any(kernels is None for _, _, kernels in rows):
        page.prose("-: when the trace ended, nobody lived there any more to read it by.")


def _pair(ours: int, kernels: int | None) -> list[str]:
    if kernels is None:
        return [f"{ours:,}", "-", "-"]
    return [f"{ours:,}", f"{kernels:,}", f"{kernels - ours:+,}" if kernels != ours else "0"]
