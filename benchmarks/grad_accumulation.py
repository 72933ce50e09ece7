"""One accumulation step of an experts' layer, whose .grad exists: the plain way against
fuse_grad_accumulation, in turns. Peak memory of the step beyond parameters and gradients, in MiB,
and its time (best and median), in ms.

    python benchmarks/grad_accumulation.py H I E K T [SECONDS] [bf16]
"""

import statistics
import sys
import time

import torch
from harness.device import Device
from harness.work import Inputs, Work

import moe_ext


def make_step(x: Inputs, fuse: bool):
    def step() -> None:
        out = moe_ext.moe_ffn(
            x.tokens, x.weights, x.ids, x.gate_up, x.down, fuse_grad_accumulation=fuse
        )
        out.backward(x.grad)

    return step


def main(work: Work, seconds: float) -> None:
    x = Inputs.make(work, train=True)
    steps = {"plain": make_step(x, False), "fused": make_step(x, True)}
    for step in steps.values():
        step()
    device = Device()
    peaks = {name: device.peak_bytes(step) / 2**20 for name, step in steps.items()}
    times = {name: [] for name in steps}
    stop = time.time() + seconds
    while time.time() < stop:
        for name, step in steps.items():
            times[name].append(1e3 * device.seconds(step))
    weights = (x.gate_up.nbytes + x.down.nbytes) / 2**20
    print(f"{work}: weights' gradient {weights:.0f} MiB")
    for name in steps:
        best, median = min(times[name]), statistics.median(times[name])
        print(f"  {name}: peak {peaks[name]:.0f} MiB, best {best:.1f} ms, median {median:.1f} ms")


if __name__ == "__main__":
    numbers = [argument for argument in sys.argv[1:] if argument not in ("bf16", "fp32")]
    dtype = torch.bfloat16 if "bf16" in sys.argv else torch.float32
    main(Work(*map(int, numbers[:5]), dtype), float(numbers[5]) if len(numbers) > 5 else 10.0)
