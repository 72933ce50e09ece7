"""torch.utils.flop_counter counts the products of our operators."""

import pytest
import torch
from conftest import leaf, make_experts, make_ids
from torch.utils.flop_counter import FlopCounterMode

import moe_ext

T, H, I, E, K = 10, 8, 4, 3, 2
N = T * K


def count(fn) -> int:
    with FlopCounterMode(display=False) as counter:
        fn()
    return counter.get_total_flops()


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("recompute", ["activation", "hidden"])
def test_experts(gated, fused, recompute):
    up, down = 2 * N * H * I * (2 if gated else 1), 2 * N * I * H
    experts = make_experts(E, H, I, gated=gated)
    ids = make_ids("random", T, K, E)
    weights, tokens = leaf(torch.rand(T, K)), leaf(torch.randn(T, H))
    rows, _, offsets = moe_ext.permute(tokens.detach(), ids, E)
    rows.requires_grad_()

    def run():
        options = {"gated": gated, "recompute": recompute}
        if fused:
            return moe_ext.moe_ffn(tokens, weights, ids, **experts, **options)
        return moe_ext.expert_ffn(rows, offsets, **experts, **options)

    assert count(run) == up + down
    with torch.inference_mode():
        assert count(run) == up + down
    out = run().sum()
    again = up if recompute == "hidden" else 0
    assert count(lambda: out.backward(retain_graph=True)) == 2 * (up + down) + again
    # Frozen experts: G = dO W2 and dX = dH W1 remain.
    for weight in experts.values():
        weight.requires_grad_(False)
    out = run().sum()
    assert count(out.backward) == up + down + again


def test_pairs():
    experts = make_experts(E, H, I)
    P = 17
    tokens, ids = torch.arange(P) % T, torch.arange(P) % E
    x, weights = leaf(torch.randn(T, H)), leaf(torch.rand(P))
    op = torch.ops.moe_ext._moe_ffn_pairs
    products = 2 * P * 3 * H * I
    assert count(lambda: op(x, weights, ids, tokens, *experts.values())) == products
    out = op(x, weights, ids, tokens, *experts.values()).sum()
    assert count(out.backward) == 2 * products


def test_linears():
    rows = leaf(torch.randn(N, H))
    weight = leaf(torch.randn(E, I, H))
    offsets = torch.tensor([0, 5, 9, 20], dtype=torch.int32)
    op = torch.ops.moe_ext._grouped_linear
    assert count(lambda: op(rows, offsets, weight)) == 2 * N * H * I
    out = op(rows, offsets, weight).sum()
    assert count(out.backward) == 4 * N * H * I
    router = leaf(torch.randn(E, H))
    logits = torch.ops.moe_ext._router_logits(rows, router)
    assert count(lambda: torch.ops.moe_ext._router_logits(rows, router)) == 2 * N * H * E
    assert count(logits.sum().backward) == 4 * N * H * E
