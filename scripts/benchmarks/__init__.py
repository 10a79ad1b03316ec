"""What latrace costs, measured beside its peers. Run by scripts/bench.

Each benchmark is one module: `run` measures and returns plain data, `render` turns that data into
lines of text, `goals` compares it with what latrace promises. The last two need no kernel.
"""
