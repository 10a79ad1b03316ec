"""Profiles and captures for the flame graph tests, and an SVG read back."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from latrace.analysis import schema
from latrace.flamegraphs import Frame, Profile
from latrace.flamegraphs.profile import NOT_SAMPLED

SVG = "{http://www.w3.org/2000/svg}"


def user(*names: str) -> tuple[Frame, ...]:
    return tuple(Frame(name, "user", "/usr/bin/app") for name in names)


def kernel(*names: str) -> tuple[Frame, ...]:
    return tuple(Frame(name, "kernel", "[kernel]") for name in names)


APP = Frame("app", "process")
DASH = Frame("-", "marker")

SMALL = Profile(
    title="Waiting to run · app (42)",
    subtitle="Width is time.",
    stacks=[
        ((APP, *user("main", "read"), DASH, *kernel("do_syscall_64", "schedule")), 500_000),
        ((APP, *user("main", "lock", "main"), DASH, *kernel("futex_wait", "schedule")), 300_000),
        ((APP, *user("main")), 25_000),
        ((APP, Frame("[stack lost]", "marker")), 75_000),
        ((Frame("node", "process"), Frame("~handle app.js:1", "jit")), 60_000),
        ((NOT_SAMPLED,), 40_000),
    ],
    facts=[("kind", "wait"), ("host", "box"), ("waits", "1,000 for 1.00 s")],
    warnings=["7 events were lost"],
)

HOSTILE_NAMES = [
    "</title></g></svg><script>window.pwned=1</script>",
    "<img src=x onerror=window.pwned=1>",
    "]]><script>window.pwned=1</script><![CDATA[",
    "--><!DOCTYPE svg [<!ENTITY x SYSTEM 'file:///etc/passwd'>]>&x;",
    '" onload="window.pwned=1" x=\'',
    "&lt;b&gt; &#0; &amp",
    "javascript:window.pwned=1",
    "nul\0bell\7esc\x1b[31m del\x7f c1\x9b31m",
    "two\nlines\r\nand\u2028more\u2029",
    "rtl\u202egnp.exe\u2066isolate\u2069\u200fmark\ufeff",
    "zero\u200bwidth\u00ad",
    "lone\ud800surrogate\udcff",
    "not\ufffe\uffffchars\U0001ffff",
    "zalgo" + "\u0301" * 50,
    "漢字" * 40,
    "🔥👩‍💻",
    "std::map<std::string, std::vector<int>>::" * 3000,
    "a;b;c 12",
    "worker 3",
    "-",
    "",
    " \t ",
]
HOSTILE = Profile(
    title=HOSTILE_NAMES[0] + HOSTILE_NAMES[9],
    subtitle=HOSTILE_NAMES[4],
    stacks=[
        ((Frame(name, "process", name), Frame(name, "user", name)), 100 + i)
        for i, name in enumerate(HOSTILE_NAMES)
    ],
    facts=[(name, name) for name in HOSTILE_NAMES],
    warnings=HOSTILE_NAMES,
)


@dataclass(frozen=True)
class Drawn:
    """A frame as drawn: pixels from the rectangle, microseconds from what the script reads."""

    kind: str
    name: str
    about: str
    label: str
    x: float
    y: float
    width: float
    height: float
    start: int
    value: int
    depth: int

    @property
    def right(self) -> float:
        return self.x + self.width

    @property
    def end(self) -> int:
        return self.start + self.value


def drawn(svg: str) -> list[Drawn]:
    """Read the frames back from an SVG, in document order."""
    root = ET.fromstring(svg)  # noqa: S314
    (area,) = [group for group in root.iter(f"{SVG}g") if group.get("class") == "frames"]
    return [_drawn(group) for group in area]


def _drawn(group: ET.Element) -> Drawn:
    title, rect = group.find(f"{SVG}title"), group.find(f"{SVG}rect")
    assert title is not None and title.text is not None and rect is not None
    name, about = title.text.split("\n")
    start, value, depth = map(int, group.attrib["data-t"].split())
    x, y, width, height = (float(rect.attrib[key]) for key in ("x", "y", "width", "height"))
    label = group.findtext(f"{SVG}text", "")
    kind = group.attrib["class"].split()[0]
    return Drawn(kind, name, about, label, x, y, width, height, start, value, depth)


class MemoryCapture:
    """A capture made of rows: the tables' other columns are null, as the real reader fills them."""

    def __init__(
        self,
        manifest: dict[str, Any] | None = None,
        *,
        truncated: Sequence[str] = (),
        **tables: Any,
    ) -> None:
        self.manifest = {"complete": True} | (manifest or {})
        self.truncated = list(truncated)
        self._tables = {
            name: tables[name]
            if isinstance(tables.get(name), pa.Table)
            else pa.Table.from_pylist(tables.get(name, []), schema=columns)
            for name, columns in schema.TABLES.items()
        }
        assert not tables.keys() - schema.TABLES.keys()

    @property
    def complete(self) -> bool:
        return bool(self.manifest["complete"])

    def table(self, name: str, *, columns: Sequence[str] | None = None) -> pa.Table:
        table = self._tables[name]
        return table if columns is None else table.select(list(columns))

    def batches(self, name: str, *, columns: Sequence[str]) -> Iterator[pa.Table]:
        yield self.table(name, columns=columns)

    def write(self, folder: Path) -> None:
        """Lay it down as the tracer does."""
        manifest = {"schema": schema.SCHEMA_VERSION, **self.manifest}
        (folder / schema.MANIFEST).write_text(json.dumps(manifest))
        for name in schema.TABLES:
            table = self.table(name)
            if name in schema.SNAPSHOTS:
                at = table.schema.get_field_index("snapshot")
                numbers = pa.array([1] * table.num_rows, pa.uint32())
                table = table.set_column(at, table.schema.field(at), numbers)
            path = str(folder / f"{name}{schema.SUFFIX}")
            with pa.OSFile(path, "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
                stream.write_table(table)
