"""Runs inside gdb: stop a program where it asks for it, and write down what there is to see.

One JSON line for each thread and stop, with registers, where the copies of its stacks begin in
`memory`, and the frames that gdb finds. $SAMPLES names the folder.
"""

import json
import os
from pathlib import Path

import gdb

COPY = 16384
FRAMES = 300
REGISTERS = ["rax", "rdx", "rcx", "rbx", "rsi", "rdi", "rbp", "rsp"]
REGISTERS += [f"r{number}" for number in range(8, 16)] + ["rip"]
FOLDER = Path(os.environ["SAMPLES"])
WORD = (1 << 64) - 1


class Samples:
    def __init__(self):
        self.lines = (FOLDER / "samples").open("w")
        self.memory = (FOLDER / "memory").open("wb")
        self.inferior = gdb.selected_inferior()
        self.maps = []

    def copy(self, address):
        """Where in the file a copy of the stack from there on begins, and how long it is."""
        for begin, end in self.maps:
            if begin <= address < end:
                size = min(COPY, end - address)
                data = self.inferior.read_memory(address, size).tobytes()
                at = self.memory.tell()
                self.memory.write(data)
                return [address, at, size]
        return [address, 0, 0]

    def look(self):
        """The selected thread."""
        frame = gdb.newest_frame()
        values = [int(frame.read_register(name)) & WORD for name in REGISTERS]
        pcs, sp = [], values[7]
        copies = [self.copy(sp - 128)]
        while frame is not None and len(pcs) < FRAMES:
            # The others are known from debug information alone: they have no place on the stack.
            if frame.type() not in (gdb.INLINE_FRAME, gdb.TAILCALL_FRAME):
                pcs.append(frame.pc())
            above = int(frame.read_register("rsp")) & WORD
            # A signal came from another stack: have that one as well.
            if len(copies) == 1 and not sp <= above < sp + (1 << 23):
                copies.append(self.copy(above - 128))
            why = frame.unwind_stop_reason()
            frame = frame.older()
        self.lines.write(json.dumps([values, copies, pcs, why]) + "\n")

    def look_at_all(self):
        for thread in self.inferior.threads():
            thread.switch()
            self.look()

    def read_maps(self):
        text = Path(f"/proc/{self.inferior.pid}/maps").read_text()
        self.maps = [
            tuple(int(part, 16) for part in line.split()[0].split("-"))
            for line in text.splitlines()
            if line.split()[1].startswith("rw")
        ]
        (FOLDER / "maps").write_text(text)
        for line in text.splitlines():
            if line.endswith("[vdso]"):
                begin, end = (int(part, 16) for part in line.split()[0].split("-"))
                data = self.inferior.read_memory(begin, end - begin).tobytes()
                (FOLDER / "vdso").write_bytes(data)


for command in (
    "set pagination off",
    "set confirm off",
    "set backtrace past-main on",
    "set backtrace past-entry on",
    "handle SIGUSR1 SIGUSR2 SIGILL nostop noprint pass",
    "run",
):
    gdb.execute(command, to_string=True)
gdb.execute("set scheduler-locking step")  # can't be said before
samples = Samples()
while samples.inferior.pid:
    steps = int(gdb.newest_frame().read_register("rdi"))
    asked = gdb.selected_thread()
    samples.read_maps()
    samples.look_at_all()
    asked.switch()
    for _ in range(steps):
        gdb.execute("stepi", to_string=True)
        samples.look()
    gdb.execute("continue", to_string=True)
samples.lines.close()
samples.memory.close()
