"""latrace: tracer."""
