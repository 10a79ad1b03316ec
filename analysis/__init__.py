"""latrace: analysis."""
