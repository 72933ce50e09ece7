"""Peak memory of a balance loss beyond the router's logits and probabilities, in MiB.

    python benchmarks/loss_memory.py LOSS PEER T E        LOSS: balance or z

Forward and backward; a gradient [T, E] is part of it. A process of its own for each, since the peak
is the process's.
"""

import sys

import torch
from harness.device import Device
from harness.peers import MODULES

import moe_ext

PEERS = {"balance": ("moe_ext", "reference", "transformers"), "z": ("moe_ext", "reference")}
K = 8


def make_loss(loss: str, peer: str, logits: torch.Tensor):
    """The loss as a function of nothing, and what it is differentiated by."""
    if peer == "transformers":
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

        # It takes the logits, and chooses again.
        return lambda: load_balancing_loss_func((logits,), logits.shape[1], K), logits
    module = MODULES[peer]
    if loss == "z":
        return lambda: module.router_z_loss(logits), logits
    _, ids, probs = moe_ext.topk_router(logits.detach(), K)
    probs.requires_grad_()
    return lambda: module.load_balancing_loss(probs, ids), probs


def peak_mib(loss: str, peer: str, T: int, E: int) -> float:
    function, leaf = make_loss(loss, peer, torch.randn(64, E, requires_grad=True))
    torch.autograd.grad(function(), leaf)  # what libraries set up on their first call
    function, leaf = make_loss(loss, peer, torch.randn(T, E, requires_grad=True))
    return Device().peak_bytes(lambda: torch.autograd.grad(function(), leaf)) / 2**20


if __name__ == "__main__":
    loss, peer, T, E = sys.argv[1:]
    print(peak_mib(loss, peer, int(T), int(E)))
