"""Learning tests: a collapsed router recovers with each balance method, and not without."""

import functools

import pytest
import torch

import moe_ext

H, I, E, K, T = 16, 16, 8, 2, 512
COLLAPSED = E / K  # max/mean load if all tokens choose the same K experts


def make_tokens(generator) -> torch.Tensor:
    """[8, T / 8, H] with a constant feature, by which a router can prefer experts for all."""
    x = torch.randn(8, T // 8, H, generator=generator)
    x[..., 0] = 2
    return x


def max_over_mean(layer) -> float:
    counts = layer.last_stats.tokens_per_expert.double()
    return (counts.max() / counts.mean()).item()


@functools.cache
def train(method: str, seed: int) -> tuple[float, float, float]:
    """Max/mean load in evaluation before and after training from a collapse, the task loss."""
    torch.manual_seed(seed)
    options = {"init_std": 0.1}
    routing = {"bias_update_rate": 0.003} if method.startswith("bias") else {}
    if method == "aux_loss per sequence":
        routing["balance_per"] = "sequence"
    if method == "bias, sigmoid":
        routing["score_function"] = "sigmoid"
    cls = moe_ext.TopKRouter
    if method == "expert choice":
        cls = moe_ext.ExpertChoiceRouter
    router = cls(H, E, K, **routing, **options)
    balance = "bias" if method.startswith("bias") else "none" if method == "none" else "aux_loss"
    layer = moe_ext.MoE(H, I, E, K, router=router, balance=balance, aux_loss_coef=0.1, **options)
    with torch.no_grad():
        layer.router.weight[:, 0] = torch.where(torch.arange(E) < K, 1.5, -1.5)
    teacher = moe_ext.MoE(H, I, E, K, balance="none", init_std=0.3)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(seed)

    def evaluate() -> float:
        layer.eval()
        with torch.no_grad():
            layer(torch.cat([make_tokens(generator) for _ in range(16)]))
        layer.train()
        return max_over_mean(layer)

    before, losses = evaluate(), []
    for _ in range(500):
        x = make_tokens(generator)
        with torch.no_grad():
            target = teacher(x)
        y, aux_loss = layer(x, return_aux_loss=True)
        loss = (y - target).square().mean()
        optimizer.zero_grad()
        (loss + aux_loss).backward()
        optimizer.step()
        if balance == "bias":
            layer.router.update_expert_bias()
        losses.append(loss.item())
    return before, evaluate(), sum(losses[-20:]) / 20


METHODS = {  # bound of max/mean load
    "aux_loss": 1.5,
    "aux_loss per sequence": 1.5,
    "bias": 1.2,
    "bias, sigmoid": 1.2,
    "expert choice": 1.5,
}


@pytest.mark.parametrize("seed", [0, 1])
def test_without_balance_a_collapsed_router_stays_so(seed):
    before, after, _ = train("none", seed)
    assert before == after == COLLAPSED


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("method", METHODS)
def test_recovers(method, seed):
    before, after, loss = train(method, seed)
    assert before == COLLAPSED and after < METHODS[method]
    assert loss < 0.8 * train("none", seed)[2]  # the experts are of use, too
