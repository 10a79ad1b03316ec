"""`python -m latrace`: the same as the `latrace` command."""

from __future__ import annotations

import sys

from latrace.tracer.cli import main

if __name__ == "__main__":
    sys.exit(main())
