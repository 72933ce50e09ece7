"""topk_router and the balance loss beside the reference."""

import pytest
import torch

import moe_ext
from moe_ext import reference

IMPLEMENTATIONS = {"moe_ext": moe_ext, "reference": reference}


@pytest.mark.parametrize("name", list(IMPLEMENTATIONS))
@pytest.mark.parametrize("T,E,K", [(1024, 8, 2), (4096, 128, 8)])
def test_router(take_turns, name, T, E, K):
    logits = torch.randn(T, E, requires_grad=True)

    def step(module):
        weights, ids, probs = module.topk_router(logits, K)
        loss = weights.square().sum() + module.load_balancing_loss(probs, ids)
        loss.backward()
        return loss

    calls = {n: (lambda m=module: step(m)) for n, module in IMPLEMENTATIONS.items()}
    # Logits and probabilities, and their gradients.
    take_turns(calls, name, bytes_moved=4 * T * E * 4)
