"""Peak memory of one train step beyond its inputs, parameters and gradients, in MiB.

    python benchmarks/peak_memory.py PEER H I E K T

A process of its own for each peer, since the peak is the process's.
"""

import sys

from harness.device import Device
from harness.peers import PEERS, call_of
from harness.work import Inputs, Work


def peak_mib(peer: str, work: Work) -> float:
    # What libraries set up on their first call is not the step's.
    small = Work(work.H, work.I, 2, 1, 8, work.dtype)
    call_of("train", PEERS[peer](small, Inputs.make(small, train=True)))()
    layer = PEERS[peer](work, Inputs.make(work, train=True))
    peak = Device().peak_bytes(call_of("train", layer))
    return (peak - sum(leaf.nbytes for leaf in layer.leaves)) / 2**20


if __name__ == "__main__":
    peer, *sizes = sys.argv[1:]
    print(peak_mib(peer, Work(*map(int, sizes))))
