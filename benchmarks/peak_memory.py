"""Peak memory of one train step beyond its inputs, parameters and gradients, in MiB.

    python benchmarks/peak_memory.py PEER H I E K T

A process of its own for each peer, since the peak is the process's.
"""

import sys
from pathlib import Path

import torch
from moe_peers import Inputs, Work, train_step


def status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def peak_mib(peer: str, work: Work) -> float:
    # What libraries set up on their first call is not the step's.
    small = Work(work.H, work.I, 2, 1, 8, work.dtype)
    train_step(peer, small, Inputs.make(small, train=True))()
    x = Inputs.make(work, train=True)
    step = train_step(peer, work, x)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
    grads = step()
    return (status("VmHWM") - before - sum(g.nbytes for g in grads)) / 2**20


if __name__ == "__main__":
    peer, *sizes = sys.argv[1:]
    print(peak_mib(peer, Work(*map(int, sizes), torch.bfloat16)))
