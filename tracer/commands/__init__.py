"""latrace: tracer/commands."""
