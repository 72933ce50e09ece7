"""No operator reads memory that nothing wrote: filling it with NaN changes no bit."""

import pytest
import torch
from conftest import ROUTINGS, leaf, make_experts, make_ids

import moe_ext

ops = torch.ops.moe_ext
T, H, I, E, K = 37, 16, 12, 6, 2


@pytest.fixture
def poison(monkeypatch):
    """Turns the filling of new memory on."""

    def turn_on():
        monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
        torch.use_deterministic_algorithms(True, warn_only=True)
        assert torch.empty(3).isnan().all()

    yield turn_on
    torch.use_deterministic_algorithms(False)


def run(routing: str, device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Results and gradients of every operator."""
    torch.manual_seed(0)
    ids = make_ids(routing, T, K, E, device)
    logits = leaf(torch.randn(T, E, device=device))
    tokens = leaf(torch.randn(T, H, device=device).to(dtype))
    results, leaves = [], [logits, tokens]

    weights, chosen, probs = moe_ext.topk_router(logits, K)
    results += [weights, chosen, probs]
    results += [
        moe_ext.load_balancing_loss(probs, ids),
        moe_ext.router_z_loss(logits),
        ops._router_entropy(probs),
        ops._tokens_per_expert(ids, E),
    ]
    router_weight = leaf(torch.randn(E, H, device=device).to(dtype))
    leaves.append(router_weight)
    results.append(ops._router_logits(tokens, router_weight))

    permuted, row_map, offsets = moe_ext.permute(tokens, ids, E)
    results += [permuted, row_map, offsets, moe_ext.unpermute(permuted, row_map, weights)]
    factor = torch.tensor(0.8, dtype=torch.float64, device=device)
    noise = torch.rand(E, dtype=torch.float64, device=device)
    for policy in ("probs", "position"):
        results.append(ops._apply_capacity(weights, ids, factor, E, drop_policy=policy))
    pair_lists = [ops._expert_choice(probs, None, K)]
    if routing != "duplicates" and routing != "one_expert" and routing != "idle":  # distinct ids
        for rounding in ("nearest", "up", "down", "stochastic", "balanced"):
            *pairs, kept = ops._round_tokens(
                probs,
                weights,
                ids,
                tile_size=4,
                rounding=rounding,
                noise=noise if rounding == "stochastic" else None,
            )
            results.append(kept)
            pair_lists.append(pairs)
    for gated in (True, False):
        experts = make_experts(E, H, I, gated=gated, bias=True, dtype=dtype, device=device)
        leaves += experts.values()
        for recompute in ("activation", "hidden"):
            options = {"gated": gated, "recompute": recompute}
            results.append(moe_ext.moe_ffn(tokens, weights, ids, **experts, **options))
            results.append(moe_ext.expert_ffn(permuted, offsets, **experts, **options))
            for pair_tokens, pair_experts, *slots in pair_lists:
                pair_weights = ops._pair_weights(
                    weights, probs, pair_tokens, pair_experts, slots[0] if slots else None, E, 1.0
                )
                results += [pair_tokens, pair_experts, *slots, pair_weights]
                results.append(
                    ops._moe_ffn_pairs(
                        tokens, pair_weights, pair_experts, pair_tokens, **experts, **options
                    )
                )
        results.append(ops._grouped_linear(permuted, offsets, experts["gate_up_proj"]))

    differentiable = [result for result in results if result.requires_grad]
    grads = [torch.randn_like(result) for result in differentiable]
    return [*results, *torch.autograd.grad(differentiable, leaves, grads)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_operator(device, routing, dtype, poison):
    expected = run(routing, device, dtype)
    poison()
    for i, (actual, other) in enumerate(zip(run(routing, device, dtype), expected, strict=True)):
        assert torch.equal(actual, other), i
