"""One metric out of a Prometheus or OpenMetrics page, as the few numbers that are needed.

This runs in the unprivileged child: the page is hostile. The page's lines of that one metric are
read by prometheus_client; as long as the next page has the same lines but for their numbers,
which is so for nearly all of them, only the numbers are read. (The library goes through a page
character by character in Python: 30 us a line, against 1 us.)
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from prometheus_client.openmetrics.parser import (
    text_fd_to_metric_families as openmetrics_families,
)
from prometheus_client.parser import text_fd_to_metric_families as text_families

ACCEPT: Final = "text/plain;version=0.0.4, application/openmetrics-text;version=1.0.0;q=0.5"
"""Plain text first: it has no exemplars, which nobody here needs."""

MAX_LINES: Final = 5000
"""Of the one metric; other lines are passed over."""
MAX_LINE: Final = 4096
"""Characters of one such line: the library's time grows with the square."""
MAX_TEXT: Final = 1 << 20
"""Of all such lines together, for the library."""
MAX_BOUNDS: Final = 500

_BINARY: Final = ("application/vnd.google.protobuf", "application/octet-stream")


class ExpositionError(Exception):
    """The page does not have what is asked for, in words that go behind its address."""


@dataclass(frozen=True, slots=True)
class _Line:
    """What to do with a line's number."""

    role: str
    """`bucket`, `quantile`, `count`, or nothing."""
    bound: float = math.nan
    series: tuple[tuple[str, str], ...] = ()


class Reader:
    """Reads page after page for one metric: `name` with all of `labels`, a summary's `quantile`.

    A label that a series does not have is as good as an empty one, as everywhere in Prometheus.
    """

    def __init__(self, name: str, labels: Mapping[str, str], quantile: float) -> None:
        self._name, self._labels, self._quantile = name, dict(labels), quantile
        word = re.escape(name.encode())
        # The name first: that is searched for at the speed of memory. Nothing is tried twice
        # (`*+`), so that no line can cost more than its length.
        self._lines = re.compile(
            rb"(?P<head>" + word + rb"(?:_bucket|_count|_sum|_created)?+)(?=[ \t{])"
            rb"(?:(?P<labels>[ \t]*+\{(?:[^\"}\n]++|\"(?:[^\"\\\n]++|\\.)*+\")*+\})?+"
            rb"[ \t]+(?P<number>[-+.0-9A-Za-z]++)(?=[\s])(?P<rest>[^\n]*+))?+"
        )
        self._type = re.compile(rb"^#[ \t]+TYPE[ \t]+" + word + rb"[ \t]+(\w+)", re.MULTILINE)
        self._heads: list[bytes] = []
        self._plan: list[_Line] = []
        self._kind = ""
        self._has_parts = False

    def read(self, page: bytes, content_type: str) -> dict[str, Any]:
        """Read one page.

        Returns {"kind": "histogram", "bounds": [...], "counts": [...]}: upper bounds, ascending,
        the last one infinite, and how many values are at most so large, of all series together;
        or {"kind": "summary", "value": the largest of all series or None, "count": values or 0}.

        Raises ExpositionError.
        """
        openmetrics = "openmetrics" in content_type
        if openmetrics and not page.rstrip(b"\n").endswith(b"# EOF"):
            raise ExpositionError("ends too early: an OpenMetrics page closes with # EOF")
        if not page.endswith(b"\n"):
            page += b"\n"
        heads, numbers, texts = self._scan(page)
        if not heads:
            raise ExpositionError(self._why_nothing(page, content_type))
        if heads != self._heads:
            self._heads = []
            self._plan = self._learn(page, texts, openmetrics)
            self._kind = self._kind_of(page)
            self._heads = heads
        try:
            values = [float(number) for number in numbers]
        except ValueError as error:
            raise ExpositionError(f"has a value of {self._name} that is no number") from error
        return self._histogram(values) if self._kind == "histogram" else self._summary(values)

    def _scan(self, page: bytes) -> tuple[list[bytes], list[bytes], list[tuple[int, int]]]:
        """Of each line of the metric: all before its number, the number, where it is."""
        heads: list[bytes] = []
        numbers: list[bytes] = []
        places: list[tuple[int, int]] = []
        for match in self._lines.finditer(page):
            start = match.start()
            if start and page[start - 1] != 10:  # inside a comment, a label, a longer name
                continue
            if match["number"] is None:
                raise ExpositionError(f"has a line of {self._name} that cannot be read")
            if match.end() - start > MAX_LINE:
                raise ExpositionError(f"has a line of more than {MAX_LINE} characters")
            if len(heads) >= MAX_LINES:
                raise ExpositionError(
                    f"has more than {MAX_LINES:,} lines of {self._name}; choose by label:"
                    f" --metric '{self._name}{{label=\"value\"}}'"
                )
            heads.append(page[start : match.start("number")])
            numbers.append(match["number"])
            places.append((start, match.end()))
        return heads, numbers, places

    # --- a page of a new shape ---

    def _learn(
        self, page: bytes, places: Iterable[tuple[int, int]], openmetrics: bool
    ) -> list[_Line]:
        """Have the library read the lines of the metric; what each is for, in their order."""
        lines = [page[start:end].rstrip(b"\r") for start, end in places]
        kind = self._type.search(page)
        text = b"# TYPE %s %s\n" % (self._name.encode(), kind[1]) if kind else b""
        if sum(map(len, lines)) > MAX_TEXT:
            raise ExpositionError(f"has more than {MAX_TEXT / 1e6:.3g} MB of {self._name}")
        text += b"\n".join(lines) + (b"\n# EOF\n" if openmetrics else b"\n")
        families = openmetrics_families if openmetrics else text_families
        try:
            read = families(io.StringIO(text.decode()))
            samples = [sample for family in read for sample in family.samples]
        except Exception as error:  # whatever the library trips over; the text is hostile
            raise ExpositionError(f"has lines of {self._name} that cannot be read") from error
        if len(samples) != len(lines):
            raise ExpositionError(f"has the same series of {self._name} twice")
        self._has_parts = any({"le", "quantile"} & sample.labels.keys() for sample in samples)
        plan = [self._line(sample.name, sample.labels) for sample in samples]
        known = [(each.role, each.bound, each.series) for each in plan if each.role]
        if len(set(known)) != len(known):
            raise ExpositionError(f"has the same series of {self._name} twice")
        return plan

    def _line(self, name: str, labels: Mapping[str, str]) -> _Line:
        if any(labels.get(key, "") != value for key, value in self._labels.items()):
            return _Line("")
        suffix = name[len(self._name) :]
        own = tuple(sorted((k, v) for k, v in labels.items() if k not in ("le", "quantile")))
        if suffix == "_bucket" and "le" in labels:
            return _Line("bucket", _bound(labels["le"]), own)
        if suffix == "" and "quantile" in labels:
            return _Line("quantile", _bound(labels["quantile"]), own)
        return _Line("count" if suffix == "_count" else "", 0.0, own)

    def _kind_of(self, page: bytes) -> str:
        """Tell whether it is a histogram or a summary. Raises ExpositionError if neither."""
        roles = {line.role for line in self._plan}
        if "bucket" in roles:
            return "histogram"
        if "quantile" in roles:
            has = sorted({line.bound for line in self._plan if line.role == "quantile"})
            if self._quantile in has:
                return "summary"
            raise ExpositionError(
                f"has {self._name} as a summary without the quantile {self._quantile:g},"
                f" only {', '.join(f'{each:g}' for each in has[:8])}"
            )
        if self._labels and self._has_parts:
            chosen = ",".join(f'{key}="{value}"' for key, value in self._labels.items())
            raise ExpositionError(f"has no series {self._name}{{{chosen}}}")
        kind = self._type.search(page)
        told = f" as a {kind[1].decode('ascii', 'replace')[:20]}" if kind else ""
        raise ExpositionError(
            f"has {self._name}{told} with neither buckets nor quantiles:"
            " a classic histogram or a summary is needed"
        )

    # --- its numbers ---

    def _histogram(self, values: Sequence[float]) -> dict[str, Any]:
        series: dict[tuple[tuple[str, str], ...], dict[float, float]] = {}
        for line, value in zip(self._plan, values, strict=True):
            if line.role == "bucket":
                if not 0 <= value < math.inf:
                    raise ExpositionError(f"counts {value:g} values in a bucket of {self._name}")
                series.setdefault(line.series, {})[line.bound] = value
        # Counts are of all values up to a bound, so that those of different buckets add up where
        # they have a bound in common.
        bounds = sorted(set.intersection(*(set(counts) for counts in series.values())))
        if not bounds or bounds[-1] != math.inf:
            raise ExpositionError(f"has {self._name} without a bucket for +Inf")
        if len(bounds) < 2:
            raise ExpositionError(
                f"has series of {self._name} with different buckets; choose by label:"
                f" --metric '{self._name}{{label=\"value\"}}'"
                if len(series) > 1
                else f"has {self._name} with no bucket but +Inf"
            )
        if len(bounds) > MAX_BOUNDS:
            raise ExpositionError(f"has more than {MAX_BOUNDS} buckets of {self._name}")
        counts = [sum(each[bound] for each in series.values()) for bound in bounds]
        return {"kind": "histogram", "bounds": bounds, "counts": counts}

    def _summary(self, values: Sequence[float]) -> dict[str, Any]:
        largest: float | None = None
        count = 0.0
        for line, value in zip(self._plan, values, strict=True):
            if line.role == "quantile" and line.bound == self._quantile and math.isfinite(value):
                largest = value if largest is None else max(largest, value)
            elif line.role == "count" and 0 <= value < math.inf:
                count += value
        return {"kind": "summary", "value": largest, "count": count}

    # --- no page of metrics ---

    def _why_nothing(self, page: bytes, content_type: str) -> str:
        """Words for a page without the metric."""
        begin = page[:1024].lstrip().lower()
        kind = content_type.partition(";")[0].strip().lower()
        if not begin:
            return "answers an empty page"
        if "html" in kind or begin.startswith(b"<"):
            return "answers a web page, not metrics"
        if "json" in kind or begin[:1] in (b"{", b"["):
            return "answers JSON, not metrics"
        if kind in _BINARY or b"\0" in begin:
            return "answers binary data, not metrics as text"
        return f"has no metric {self._name}"


def _bound(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise ExpositionError("has a bucket or quantile whose bound is no number")
    return value
