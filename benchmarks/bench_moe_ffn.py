"""moe_ffn, forward and with backward, beside the reference and a dense FFN of equal FLOPs."""

import dataclasses

import pytest
import torch
from harness.peers import PEERS, UNLIKE
from harness.timing import Agreement
from harness.work import Inputs, Work

import moe_ext

SHAPES = {
    "demo": Work(192, 192, 8, 2, 1024, torch.float32),
    "wide": Work(512, 1024, 8, 2, 1024, torch.float32),
    "many": Work(512, 256, 64, 8, 512, torch.float32),
}
NAMES = ["moe_ext", "reference", "dense"]


def make_call(name: str, work: Work, train: bool):
    """A forward, or a forward and a backward that adds to its own gradients."""
    x = Inputs.make(work, train)
    weights, ids, _ = moe_ext.topk_router(torch.randn(work.T, work.E), work.K)
    layer = PEERS[name](work, dataclasses.replace(x, weights=weights, ids=ids))

    def step():
        layer.run().backward(layer.grad)
        return [leaf.grad for leaf in layer.leaves if leaf.requires_grad]

    return step if train else layer.run


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "train"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", list(SHAPES))
def test_moe_ffn(take_turns, shape, name, backward):
    work = SHAPES[shape]
    calls = {n: make_call(n, work, backward) for n in NAMES}
    flops = work.flops("train" if backward else "forward")
    take_turns(calls, name, flops=flops, agreement=Agreement(work.dtype, UNLIKE))
