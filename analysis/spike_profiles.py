"""What a Go service's own profiles, beside the tables of a bundle, say of the spike."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Final

from latrace.analysis.errors import CaptureError
from latrace.analysis.go_runtime import GOROUTINES, HEAP, HEAP_BEFORE, MAX_TEXT, summarise_go
from latrace.analysis.spike_file import Spike, read_file
from latrace.analysis.spike_windows import LEAST_BASELINE_NS, Windows

_FILES: Final = (HEAP_BEFORE, HEAP, GOROUTINES)
_OF_PAUSES: Final = ("pauses", "pause_ns", "max_pause_ns")


def with_profiles(spike: Spike, bundle: Path, windows: Windows) -> Spike:
    """Put into `profiles.gc` what the texts of a bundle say, if there is one that can be read.

    That is what `summarise_go` returns for the spike, with the `seconds` of it, and as `baseline`
    (`seconds`, `pauses`, `pause_ns`, `max_pause_ns`) the time before it, or as much of that as the
    runtime still knew; None: too little.
    """
    listed = spike.profiles.get("files")
    texts: dict[str, str] = {}
    notes = []
    for name in _FILES:
        if not isinstance(listed, list) or name not in listed:
            continue
        try:
            data = read_file(bundle / name, most_bytes=MAX_TEXT)
        except CaptureError as error:
            notes.append(error.cause)
            continue
        if data is not None:
            texts[name] = data.decode("utf-8", "replace")
    if not texts and not notes:
        return spike
    heaps = texts.get(HEAP_BEFORE), texts.get(HEAP)
    told = summarise_go(
        *heaps,
        texts.get(GOROUTINES),
        spike.realtime_ns(windows.spike.start_ns),
        spike.realtime_ns(windows.spike.end_ns),
    )
    told["notes"] = notes + told["notes"]
    told["seconds"] = windows.spike.seconds
    told["baseline"] = _baseline(spike, windows, heaps, told["known_since_realtime_ns"])
    profiles = {**spike.profiles, "gc": told}
    return dataclasses.replace(
        spike, profiles=profiles, document={**spike.document, "profiles": profiles}
    )


def _baseline(
    spike: Spike, windows: Windows, heaps: tuple[str | None, str | None], known_ns: int | None
) -> dict[str, Any] | None:
    if windows.baseline is None or known_ns is None:
        return None
    since = max(spike.realtime_ns(windows.baseline.start_ns), known_ns)
    until = spike.realtime_ns(windows.baseline.end_ns)
    if until - since < LEAST_BASELINE_NS:
        return None
    told = summarise_go(*heaps, None, since, until)
    return {"seconds": (until - since) / 1e9, **{key: told[key] for key in _OF_PAUSES}}
