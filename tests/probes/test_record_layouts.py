"""probes/latrace.h and tracer/records.py are one definition: compiled, and compared."""

from __future__ import annotations

import re
import subprocess

import numpy as np
import pytest
from host_build import PROBES, compile_c

from latrace.analysis import histogram
from latrace.tracer import records
from latrace.tracer.compile import SOURCES

CONSTANTS = {
    "CELL_BYTES": records.CELL_BYTES,
    "STACK_CELL_FRAMES": records.STACK_CELL_FRAMES,
    "STACK_KERNEL_FRAMES": records.STACK_KERNEL_FRAMES,
    "STACK_USER_FRAMES": records.STACK_USER_FRAMES,
    "HIST_SLOTS": records.HIST_SLOTS,
    "PATTERNS": records.PATTERNS,
    **{f"RECORD_{record.name}": record for record in records.Record},
    **{f"THREAD_{event.name}": event for event in records.ThreadEvent},
    **{f"PLACE_{place.name}": place for place in records.Place},
    **{f"WAIT_{kind.upper()}": number for number, kind in enumerate(records.WAIT_KINDS)},
    **{f"CAUSE_{name.upper()}": number for number, name in enumerate(records.CAUSES)},
    **{f"CTX_{name.upper()}": number for number, name in enumerate(records.WAKER_CONTEXTS)},
}
IN_CELLS = {name for name in records.STRUCTS if name.endswith("_record")}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What the C compiler says of every size, offset and constant."""
    lines = [f'printf("{name} %lld\\n", (long long){name});' for name in CONSTANTS]
    for struct, dtype in records.STRUCTS.items():
        lines.append(f'printf("{struct} %zu\\n", sizeof(struct {struct}));')
        for field in dtype.names or ():
            lines.append(
                f'printf("{struct}.{field} %zu\\n", offsetof(struct {struct}, {field}));'
                f'printf("{struct}.{field}.size %zu\\n", sizeof(((struct {struct} *)0)->{field}));'
            )
    declare = "int printf(const char *, ...);\n#define offsetof __builtin_offsetof\n"
    source = '#include "latrace.h"\n#include "wait.h"\n' + declare
    program = compile_c(
        source + "int main(void) {" + "\n".join(lines) + "}",
        tmp_path_factory.mktemp("layouts") / "layouts",
    )
    printed = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in map(str.split, printed.splitlines())}


@pytest.mark.parametrize("struct", records.STRUCTS)
def test_layout(compiled: dict[str, int], struct: str) -> None:
    dtype = records.STRUCTS[struct]
    assert dtype.fields is not None
    for field, (kind, offset, *_) in dtype.fields.items():
        assert compiled[f"{struct}.{field}"] == offset, field
        assert compiled[f"{struct}.{field}.size"] == np.dtype(kind).itemsize, field
    if struct in IN_CELLS:
        assert compiled[struct] <= dtype.itemsize == records.CELL_BYTES
    else:
        assert compiled[struct] == dtype.itemsize


def test_every_c_struct_that_crosses_is_here() -> None:
    text = (PROBES / "latrace.h").read_text()
    crossing = set(re.findall(r"^struct (\w+) \{", text, re.M)) - {"comm_pattern", "cgroup_id"}
    assert crossing == set(records.STRUCTS)


def test_constants(compiled: dict[str, int]) -> None:
    assert {name: compiled[name] for name in CONSTANTS} == {
        name: int(value) for name, value in CONSTANTS.items()
    }


def test_cells_follow_each_other_without_gaps() -> None:
    """The kernel rounds records up to 8 bytes; that the ring's end splits one does not matter."""
    assert records.CELL_BYTES % 8 == 0


def test_slots_are_those_of_the_analysis() -> None:
    assert records.HIST_SLOTS == histogram.SLOTS


def test_probes_are_shipped() -> None:
    assert all((PROBES / name).is_file() for name in SOURCES)
