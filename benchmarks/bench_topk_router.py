"""topk_router and the balance loss beside the reference."""

import pytest
import torch
from harness.peers import MODULES


@pytest.mark.parametrize("name", list(MODULES))
@pytest.mark.parametrize("T,E,K", [(1024, 8, 2), (4096, 128, 8)])
def test_router(take_turns, name, T, E, K):
    logits = torch.randn(T, E)

    def make_step(module):
        leaf = logits.clone().requires_grad_()

        def step():
            weights, ids, probs = module.topk_router(leaf, K)
            loss = weights.square().sum() + module.load_balancing_loss(probs, ids)
            loss.backward()
            return ids, loss, leaf.grad

        return step

    calls = {n: make_step(module) for n, module in MODULES.items()}
    # Logits and probabilities, and their gradients.
    take_turns(calls, name, bytes_moved=4 * T * E * 4)
