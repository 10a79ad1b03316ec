"""latrace: probes."""
