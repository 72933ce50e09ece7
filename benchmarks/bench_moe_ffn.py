"""moe_ffn, forward and with backward, beside the reference and a dense FFN of equal FLOPs."""

import pytest
import torch
import torch.nn.functional as F

import moe_ext
from moe_ext import reference

SHAPES = {  # T, H, I, E, K
    "demo": (1024, 192, 192, 8, 2),
    "wide": (1024, 512, 1024, 8, 2),
    "many": (512, 512, 256, 64, 8),
}


def dense_ffn(tokens, gate_up, down):
    gate, up = F.linear(tokens, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "train"])
@pytest.mark.parametrize("name", ["moe_ext", "reference", "dense"])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_moe_ffn(run, shape, name, backward):
    T, H, I, E, K = SHAPES[shape]
    tokens = torch.randn(T, H, requires_grad=backward)
    weights, ids, _ = moe_ext.topk_router(torch.randn(T, E), K)
    gate_up = torch.randn(E, 2 * I, H, requires_grad=backward)
    down = torch.randn(E, H, I, requires_grad=backward)
    if name == "dense":  # K experts' width, for every token
        wide = (torch.randn(2 * K * I, H), torch.randn(H, K * I))
        wide = [weight.requires_grad_(backward) for weight in wide]
        forward = lambda: dense_ffn(tokens, *wide)  # noqa: E731
    else:
        moe_ffn = {"moe_ext": moe_ext, "reference": reference}[name].moe_ffn
        forward = lambda: moe_ffn(tokens, weights, ids, gate_up, down)  # noqa: E731
    grad = torch.randn(T, H)
    work = 6 * T * K * H * I * (3 if backward else 1)
    run((lambda: forward().backward(grad)) if backward else forward, flops=work)
