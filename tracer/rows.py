"""Ring cells to the rows of the capture's tables, in bulk: no Python call per event."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .cgroups import cgroup_name
from .records import CAUSES, WAIT_KINDS, WAKER_CONTEXTS, Record
from .syscalls import syscall_name

if TYPE_CHECKING:
    import pyarrow as pa

_NO_STACK = np.int32(-1)


def split(cells: npt.NDArray[np.void]) -> dict[Record, npt.NDArray[np.void]]:
    """Cells by their type, each in ring order. The type is the first byte of every record."""
    types = cells.view("u1").reshape(len(cells), -1)[:, 0]
    if (types == Record.WAIT).all():
        return {Record.WAIT: cells}
    return {record: cells[types == record] for record in Record}


def _coded(codes: npt.NDArray[np.integer[Any]], names: tuple[str, ...]) -> pa.DictionaryArray:
    import pyarrow as pa  # noqa: PLC0415 - heavy, and after the probes are attached

    return pa.DictionaryArray.from_arrays(
        pa.array(codes.astype(np.int32)), pa.array(names, pa.utf8())
    )


def _context(code: int) -> str | None:
    """None: nobody woke it, it was preempted; or its wake-up was not seen."""
    name = WAKER_CONTEXTS[code]
    return None if name == "unknown" else name


def wait_columns(
    waits: npt.NDArray[np.void],
    stacks: npt.NDArray[np.int32],
    waker_stacks: npt.NDArray[np.int32],
) -> dict[str, Any]:
    """Columns of the table `waits`.

    `waits`: shape (n,) of dtype WAIT; the stack ids: shape (n,), -1 where there is none.
    """
    from .writer import names_from_bytes, names_from_codes  # noqa: PLC0415 - as above

    woken_by_task = waits["waker_tgid"] != 0

    def id_or_none(name: str) -> npt.NDArray[np.int32]:
        return np.where(woken_by_task, waits[name].astype(np.int32), np.int32(-1))

    return {
        "run_ns": waits["run_ns"],
        "wait_ns": waits["wait_ns"],
        "tid": waits["tid"],
        "tgid": waits["tgid"],
        "cpu": waits["cpu"],
        "kind": _coded(waits["kind"], WAIT_KINDS),
        "waker_tid": id_or_none("waker_tid"),
        "waker_tgid": id_or_none("waker_tgid"),
        "waker": names_from_bytes(waits["waker"]),
        "waker_ctx": names_from_codes(waits["waker_ctx"], _context),
        "blocked_ns": waits["blocked_ns"],
        "syscall": names_from_codes(waits["syscall"], syscall_name),
        "stack": stacks,
        "weight_ns": waits["weight_ns"],
        "blocked_weight_ns": waits["blocked_weight_ns"],
        "waker_stack": waker_stacks,
        "wakeup_ns": waits["wakeup_ns"].astype(np.uint64),
        "migrations": waits["migrations"].astype(np.uint32),
        "waker_wait_ns": waits["waker_wait_ns"],
        "idle_elsewhere_ns": waits["idle_elsewhere_us"].astype(np.uint64) * np.uint64(1000),
        "waker2_tid": id_or_none("waker2_tid"),
        "throttled_by": names_from_codes(waits["throttled_by"], cgroup_name),
        **cause_columns(waits["causes"], waits["wait_ns"]),
    }


def cause_columns(
    causes: npt.NDArray[np.uint64], wait_ns: npt.NDArray[np.uint64]
) -> dict[str, npt.NDArray[np.uint64]]:
    """The parts of waits: `causes` of shape (n, 7) in ns; what they leave is unknown."""
    known = {f"{name}_ns": causes[:, index] for index, name in enumerate(CAUSES[:-1])}
    return known | {"unknown_ns": wait_ns - causes.sum(axis=1, dtype=np.uint64)}


# include/uapi/linux/sched.h, and enum softirq_action's order in include/linux/interrupt.h.
_POLICIES = ("other", "fifo", "rr", "batch", None, "idle", "deadline", "ext")
_VECTORS = (
    "HI",
    "TIMER",
    "NET_TX",
    "NET_RX",
    "BLOCK",
    "IRQ_POLL",
    "TASKLET",
    "SCHED",
    "HRTIMER",
    "RCU",
)


def slice_columns(slices: npt.NDArray[np.void], stacks: npt.NDArray[np.int32]) -> dict[str, Any]:
    """Columns of the table `slices`; `slices`: shape (n,) of dtype SLICE."""
    import pyarrow.compute as pc  # noqa: PLC0415 - as above

    from .writer import names_from_bytes, names_from_codes  # noqa: PLC0415 - as above

    thread = slices["tid"] != 0  # else an interrupt
    softirq = slices["cause"] == CAUSES.index("softirq")

    def of_thread(name: str, codes: int) -> npt.NDArray[np.int32]:
        return np.where(thread, slices[name].astype(np.int32), np.int32(codes))

    return {
        "start_ns": slices["start_ns"],
        "dur_ns": slices["dur_ns"],
        "cpu": slices["cpu"],
        "tid": of_thread("tid", -1),
        "tgid": of_thread("tgid", -1),
        "comm": pc.if_else(thread, names_from_bytes(slices["comm"]).cast("string"), None),
        "cgroup": names_from_codes(slices["cgroup"], cgroup_name),
        "policy": names_from_codes(
            of_thread("policy", -1), lambda code: _POLICIES[code] if 0 <= code < 8 else None
        ),
        "prio": slices["prio"].astype(np.int32),
        "cause": _coded(slices["cause"], CAUSES),
        "vector": names_from_codes(
            np.where(softirq, slices["vector"].astype(np.int32), -1),
            lambda code: _VECTORS[code] if 0 <= code < len(_VECTORS) else None,
        ),
        "stack": stacks,
        "weight_ns": slices["weight_ns"],
        "victim_tid": slices["victim_tid"],
        "victim_run_ns": slices["victim_run_ns"],
    }


def sample_columns(samples: npt.NDArray[np.void], stacks: npt.NDArray[np.int32]) -> dict[str, Any]:
    """Columns of the table `samples`; `samples`: shape (n,) of dtype SAMPLE."""
    return {name: samples[name] for name in ("ts_ns", "tid", "tgid", "cpu", "weight_ns")} | {
        "stack": stacks
    }
