"""latrace: which waits made the P99 spike, who held the CPU meanwhile, and where in the code."""

from __future__ import annotations

__version__ = "0.1.0"
