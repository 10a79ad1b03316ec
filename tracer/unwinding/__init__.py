"""Stacks of user code from copies of registers and memory, by the call frame information of ELF.

`cfi` compiles a section into a `table`, `cache` keeps it, `walk` unwinds a batch of stacks with it.
"""
