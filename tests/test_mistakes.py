# ruff: noqa: E501  a table: a mistake and its sentence in one line each
"""A hundred plausible mistakes, and the sentence that each one gets: who, which argument, what it
must be, what it got. No C++ schema, no private name, nothing of torch's insides."""

import re

import pytest
import torch
from conftest import EMULATED
from torch import nn

import moe_ext
from moe_ext import (
    ExpertChoiceRouter,
    GivenIdsRouter,
    GroupedExperts,
    HierarchicalRouter,
    MoE,
    NoisyTopKRouter,
    RouterOutput,
    TopKRouter,
    hash_ids,
    load_balancing_loss,
    moe_ffn,
    permute,
    router_z_loss,
    topk_router,
    unpermute,
)

T, H, I, E, K = 6, 8, 4, 4, 2


class Tuple(nn.Module):
    """A router that returns a plain tuple."""

    def forward(self, tokens, topk_ids=None):
        logits = tokens[:, :E]
        return (*topk_router(logits, K), logits)


class Wrong(nn.Module):
    """A router with a field of its output changed."""

    def __init__(self, **fields):
        super().__init__()
        self.fields = fields

    def forward(self, tokens, topk_ids=None):
        logits = tokens[:, :E]
        return RouterOutput(*topk_router(logits, K), logits)._replace(**self.fields)


def layer(*arguments, **options) -> MoE:
    arguments = (H, I, E, K)[: 4 - len(options.keys() & {"top_k", "num_experts"})] or arguments
    return MoE(*arguments, **options)


def x(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(*(shape or (T, H)), dtype=dtype, device=device)


def ids(*shape):
    return torch.zeros(*(shape or (T, K)), dtype=torch.int64)


def experts(**changes):
    named = {"gate_up_proj": x(E, 2 * I, H), "down_proj": x(E, H, I), **changes}
    return {"tokens": x(), "topk_weights": x(T, K), "topk_ids": ids(), **named}


def second_derivative():
    tokens = torch.randn(T, H, requires_grad=True)
    (grad,) = torch.autograd.grad(layer()(tokens).square().sum(), tokens, create_graph=True)
    grad.sum().backward()


R, V, TE, N = RuntimeError, ValueError, TypeError, NotImplementedError
# fmt: off
MISTAKES = [
    # --- sizes and options of the layer
    (lambda: MoE(0, I, E, K), V, "MoE: hidden_size must be >= 1, got 0"),
    (lambda: MoE(H, -1, E, K), V, "MoE: intermediate_size must be >= 1, got -1"),
    (lambda: MoE(H, I, 0, K), V, "MoE: num_experts must be >= 1, got 0"),
    (lambda: MoE(H, I, E, 0), V, "MoE: top_k must be >= 1, got 0"),
    (lambda: MoE(H, I, E, 5), V, "MoE: top_k must be in [1, num_experts=4], got 5"),
    (lambda: MoE(H, I, E, 2.0), V, "MoE: top_k must be an integer, got 2.0"),
    (lambda: MoE(8.0, I, E, K), V, "MoE: hidden_size must be an integer, got 8.0"),
    (lambda: MoE(H, "4", E, K), V, "MoE: intermediate_size must be an integer, got '4'"),
    (lambda: MoE(H, I, True, 1), V, "MoE: num_experts must be an integer, got True"),
    (lambda: MoE(H, I, None, K), V, "MoE: num_experts must be an integer, got None"),
    (lambda: layer(activation=nn.SiLU()), V, "GroupedExperts: activation must be a name, \"silu\" say, got SiLU()"),
    (lambda: layer(activation=torch.nn.functional.silu), V, "GroupedExperts: activation must be a name, \"silu\" say, got <function silu"),
    (lambda: layer(activation="swish"), V, "moe_ffn: activation must be silu, gelu, gelu_tanh, relu, relu2, identity or swiglu_clamped, got swish"),
    (lambda: layer(activation="SiLU"), V, "moe_ffn: activation must be silu, gelu, gelu_tanh, relu, relu2, identity or swiglu_clamped, got SiLU"),
    (lambda: layer(activation="swiglu_clamped", gated=False), V, "moe_ffn: activation must be gated for swiglu_clamped, got gated=False"),
    (lambda: layer(gated="yes"), V, "GroupedExperts: gated must be True or False, got 'yes'"),
    (lambda: layer(bias=1), V, "GroupedExperts: bias must be True or False, got 1"),
    (lambda: layer(recompute=True), V, "GroupedExperts: recompute must be activation or hidden, got True"),
    (lambda: layer(recompute="all"), V, "GroupedExperts: recompute must be activation or hidden, got 'all'"),
    (lambda: layer(init_std=-0.1), V, "TopKRouter: init_std must be >= 0, got -0.1"),
    (lambda: layer(balance="luck"), V, "MoE: balance must be aux_loss, bias or none, got 'luck'"),
    (lambda: layer(balance=None), V, "MoE: balance must be aux_loss, bias or none, got None"),
    (lambda: layer(aux_loss_coef=-1), V, "MoE: aux_loss_coef must be >= 0, got -1"),
    (lambda: layer(aux_loss_coef=None), V, "MoE: aux_loss_coef must be a finite number, got None"),
    (lambda: layer(z_loss_coef=float("nan")), V, "MoE: z_loss_coef must be a finite number, got nan"),
    (lambda: layer(bias_update_rate="fast", balance="bias"), V, "TopKRouter: bias_update_rate must be a finite number, got 'fast'"),
    (lambda: layer(inject_aux_loss="yes"), V, "MoE: inject_aux_loss must be True or False, got 'yes'"),
    (lambda: layer(shared_intermediate_size=-1), V, "MoE: shared_intermediate_size must be >= 0, got -1"),
    (lambda: layer(shared_intermediate_size=1.5), V, "MoE: shared_intermediate_size must be an integer, got 1.5"),
    (lambda: layer(score_function="tanh"), V, "TopKRouter: score_function must be softmax or sigmoid, got 'tanh'"),
    (lambda: layer(score_function=torch.sigmoid), V, "TopKRouter: score_function must be softmax or sigmoid, got <built-in method sigmoid"),
    (lambda: layer(temperature=0), V, "TopKRouter: temperature must be > 0, got 0"),
    (lambda: layer(jitter=1.0), V, "TopKRouter: jitter must be in [0, 1), got 1.0"),
    (lambda: layer(scaling_factor="2"), V, "TopKRouter: scaling_factor must be a finite number, got '2'"),
    (lambda: layer(num_groups=3), V, "topk_router: num_groups must divide E=4, got 3"),
    (lambda: layer(num_groups=0), V, "TopKRouter: num_groups must be >= 1, got 0"),
    (lambda: layer(num_groups=2, topk_groups=3), V, "topk_router: topk_groups must be in [1, num_groups=2], got 3"),
    (lambda: layer(num_groups=4, topk_groups=1), V, "topk_router: top_k must be at most topk_groups * E / num_groups = 1, got 2"),
    (lambda: layer(capacity_factor=0), V, "TopKRouter: capacity_factor must be > 0, got 0"),
    (lambda: layer(capacity_factor="1.25"), V, "TopKRouter: capacity_factor must be a finite number, got '1.25'"),
    (lambda: layer(eval_capacity_factor=-1.0), V, "TopKRouter: eval_capacity_factor must be > 0, got -1.0"),
    (lambda: layer(capacity_factor=1.0, min_capacity=1.5), V, "TopKRouter: min_capacity must be an integer, got 1.5"),
    (lambda: layer(min_capacity=0), V, "TopKRouter: min_capacity must be >= 1, got 0"),
    (lambda: layer(drop_policy="random"), V, "TopKRouter: drop_policy must be probs or position, got 'random'"),
    (lambda: layer(capacity_bounds=(1, 2)), V, "TopKRouter: capacity_factor must be given with capacity_bounds, got None"),
    (lambda: layer(capacity_factor=1.0, capacity_bounds=2.0), V, "TopKRouter: capacity_bounds must be (least, most) with 0 < least <= most, got 2.0"),
    (lambda: layer(capacity_factor=1.0, capacity_bounds=(2, 1)), V, "TopKRouter: capacity_bounds must be (least, most) with 0 < least <= most, got (2, 1)"),
    (lambda: layer(tile_size=1.5), V, "TopKRouter: tile_size must be an integer, got 1.5"),
    (lambda: layer(tile_size=0), V, "TopKRouter: tile_size must be >= 1, got 0"),
    (lambda: layer(rounding="floor"), V, "TopKRouter: rounding must be nearest, up, down, stochastic or balanced, got 'floor'"),
    (lambda: layer(balance_per="token"), V, "TopKRouter: balance_per must be batch or sequence, got 'token'"),
    (lambda: layer(normalize_by_topk=None), V, "TopKRouter: normalize_by_topk must be True or False, got None"),
    (lambda: layer(renormalize="sum"), V, "TopKRouter: renormalize must be True or False, got 'sum'"),
    # --- routers
    (lambda: layer(router="noisy"), V, "MoE: router must be a module, moe_ext.TopKRouter(...) say, that returns a moe_ext.RouterOutput, got 'noisy'"),
    (lambda: layer(router=TopKRouter), V, "MoE: router must be a module, moe_ext.TopKRouter(...) say, that returns a moe_ext.RouterOutput, got <class"),
    (lambda: layer(router=nn.Linear), V, "MoE: router must be a module, moe_ext.TopKRouter(...) say, that returns a moe_ext.RouterOutput, got <class"),
    (lambda: layer(router=nn.Linear(H, E)), V, "MoE: router must be one with forward(tokens, topk_ids=None), got Linear("),
    (lambda: layer(router=TopKRouter(H, 16, K)), V, "MoE: router.num_experts must be the layer's 4, got 16"),
    (lambda: layer(router=TopKRouter(H, 2, K)), V, "MoE: router.num_experts must be the layer's 4, got 2"),
    (lambda: layer(router=TopKRouter(H, E, 1)), V, "MoE: router.top_k must be the layer's 2, got 1"),
    (lambda: layer(router=TopKRouter(H + 1, E, K)), V, "MoE: router.hidden_size must be the layer's 8, got 9"),
    (lambda: layer(router=ExpertChoiceRouter(H, E, 1)), V, "MoE: router.top_k must be the layer's 2, got 1"),
    (lambda: layer(router=TopKRouter(H, E, K), tile_size=64), V, "MoE: tile_size must be left to the router where one is given, got 64"),
    (lambda: layer(router=TopKRouter(H, E, K), balance_per="sequence"), V, "MoE: balance_per must be left to the router where one is given, got 'sequence'"),
    (lambda: layer(router=TopKRouter(H, E, K), balance="bias"), V, "MoE: router must be one with bias_update_rate, got TopKRouter("),
    (lambda: layer(router=Tuple())(x()), TE, "MoE: router must return a moe_ext.RouterOutput, got tuple"),
    (lambda: layer(router=Wrong(topk_ids=ids(T, 1)))(x()), R, "MoE: router must return topk_ids [6, 2] (E=4, K=2), got [6, 1]"),
    (lambda: layer(router=Wrong(topk_weights=x(T)))(x()), R, "MoE: router must return topk_weights [6, 2] (E=4, K=2), got [6]"),
    (lambda: layer(router=Wrong(router_probs=x(T, 9)))(x()), R, "MoE: router must return router_probs [6, 4] (E=4, K=2), got [6, 9]"),
    (lambda: layer(router=Wrong(router_logits=None))(x()), TE, "MoE: router must return router_logits as a tensor, got NoneType"),
    (lambda: layer(router=Wrong(topk_ids=x(T, K)))(x()), R, "moe_ffn: topk_ids must be int64 or int32, got Float"),
    (lambda: TopKRouter(0, E, K), V, "TopKRouter: hidden_size must be >= 1, got 0"),
    (lambda: TopKRouter(H, E, 5), V, "TopKRouter: top_k must be in [1, num_experts=4], got 5"),
    (lambda: NoisyTopKRouter(H, E, 2.0), V, "NoisyTopKRouter: top_k must be an integer, got 2.0"),
    (lambda: HierarchicalRouter(H, E, K, num_groups=3), V, "HierarchicalRouter: num_groups must be a divisor of num_experts=4, got 3"),
    (lambda: HierarchicalRouter(H, E, K, num_groups=2, score_function="sigmoid"), V, "HierarchicalRouter: score_function must be left out, got 'sigmoid'"),
    (lambda: TopKRouter(H, E, K)(x(2, 3, H)), R, "TopKRouter: tokens must be [T, H=8], got [2, 3, 8]"),
    (lambda: TopKRouter(H, E, K)(ids(T, H)), R, "TopKRouter: tokens must be floating point, got torch.int64"),
    (lambda: TopKRouter(H, E, K)(x(device="meta")), R, "TopKRouter: tokens must be on cpu like its weight, got meta"),
    (lambda: GivenIdsRouter(H, E, K)(x()), R, "GivenIdsRouter: topk_ids must be given, to forward or before it by give(), got None"),
    (lambda: GivenIdsRouter(H, E, K)(x(), ids(T, 3)), R, "GivenIdsRouter: topk_ids must be [T=6, K=2], got [6, 3]"),
    (lambda: TopKRouter(H, E, K).update_expert_bias(), R, "TopKRouter.update_expert_bias: bias_update_rate must be given (or MoE(balance='bias')), got None"),
    (lambda: moe_ext.update_expert_bias(layer()), R, "update_expert_bias: model must have a router with bias_update_rate (or MoE(balance='bias')), got none"),
    (lambda: hash_ids(x(3), E, K), TE, "hash_ids: token_ids must be a tensor of integers, got torch.float32"),
    (lambda: hash_ids([1, 2], E, K), TE, "hash_ids: token_ids must be a tensor of integers, got list"),
    (lambda: hash_ids(ids(3), E, 9), V, "hash_ids: top_k must be in [1, num_experts=4], got 9"),
    # --- calls of the layer
    (lambda: layer()(x(T, H + 1)), R, "MoE: x must be [..., H=8], got [6, 9]"),
    (lambda: layer()(x()[0, 0]), R, "MoE: x must be [..., H=8], got []"),
    (lambda: layer()([1.0] * H), TE, "MoE: x must be a tensor, got list"),
    (lambda: layer()(ids(T, H)), R, "TopKRouter: tokens must be floating point, got torch.int64"),
    (lambda: layer()(x(dtype=torch.bfloat16)), R, "GroupedExperts: tokens (the layer's x) must be torch.float32 like its weights, got torch.bfloat16: convert one of them with .to(), or run it under torch.autocast"),
    (lambda: layer(dtype=torch.bfloat16)(x()), R, "GroupedExperts: tokens (the layer's x) must be torch.bfloat16 like its weights, got torch.float32"),
    (lambda: layer()(x(device="meta")), R, "TopKRouter: tokens must be on cpu like its weight, got meta"),
    (lambda: layer()(x(), token_mask=torch.ones(4).bool()), R, "MoE: token_mask must be [6], got [4]"),
    (lambda: layer()(x(), token_mask=torch.ones(T)), R, "MoE: token_mask must be torch.bool, got torch.float32"),
    (lambda: layer()(x(), topk_ids=ids(T, 3)), R, "MoE: topk_ids must be [6, 2] (K=2), got [6, 3]"),
    (lambda: layer()(x(), topk_ids=ids(T)), R, "MoE: topk_ids must be [6, 2] (K=2), got [6]"),
    (lambda: torch.vmap(layer())(x(3, T, H)), N, "router_logits: torch.vmap is not supported; give it the whole batch as tokens (MoE takes [..., H])"),
    (second_derivative, N, "router_logits: second derivatives are not supported; moe_ext.reference has the same operators in plain PyTorch, which has them"),
    # --- operators
    (lambda: topk_router(x(T, E), 2.0), TE, "topk_router: top_k must be an integer, got float"),
    (lambda: topk_router(x(T, E), K, score_function=None), TE, "topk_router: score_function must be a string, got NoneType"),
    (lambda: topk_router([[1.0]], 1), TE, "topk_router: router_logits must be a tensor, got list"),
    (lambda: topk_router(x(T, E), 5), V, "topk_router: top_k must be in [1, E=4], got 5"),
    (lambda: moe_ffn(**experts(), activation=nn.SiLU()), TE, "moe_ffn: activation must be a string, got SiLU"),
    (lambda: moe_ffn(**experts(), recompute=True), TE, "moe_ffn: recompute must be a string, got bool"),
    (lambda: topk_router(x(T, E), K, scaling_factor="2"), TE, "topk_router: scaling_factor must be a number, got str"),
    (lambda: moe_ffn(**experts(), gate_up_bias=0.0), TE, "moe_ffn: gate_up_bias must be a tensor or None, got float"),
    (lambda: moe_ffn(**experts(down_proj=x(E, I, H))), R, "moe_ffn: down_proj must be [E=4, H=8, I=4], got [4, 4, 8]"),
    (lambda: moe_ffn(**experts(gate_up_proj=x(E, H, 6))), R, "moe_ffn: gate_up_proj must be [E, 2I, H=8], got [4, 8, 6]"),
    (lambda: moe_ffn(**experts(down_proj=x(E, H, I).half())), R, "moe_ffn: down_proj must be Float like tokens, got Half (cast one of them with .to(), or use torch.autocast)"),
    (lambda: moe_ffn(**{**experts(), "topk_ids": x(T, K)}), R, "moe_ffn: topk_ids must be int64 or int32, got Float"),
    (lambda: moe_ffn(**{**experts(), "tokens": x(2, 3, H)}), R, "moe_ffn: tokens must be [T, H], got [2, 3, 8]"),
    (lambda: permute(x(), ids(), 4.0), TE, "permute: num_experts must be an integer, got float"),
    (lambda: permute(x(), ids(), 0), R, "permute: num_experts must be >= 1, got 0"),
    (lambda: unpermute(x(T * K, H), ids()), R, "unpermute: row_map must be Int, got Long"),
    (lambda: load_balancing_loss(x(T, E), ids(), num_sequences=4), R, "load_balancing_loss: num_sequences must divide T=6, got 4"),
    (lambda: router_z_loss(None), TE, "router_z_loss: router_logits must be a tensor, got None"),
    (lambda: moe_ffn(**{**experts(), "topk_weights": None}), TE, "moe_ffn: topk_weights must be a tensor, got None"),
    (lambda: moe_ext.set_cpu_isa(None), V, "set_cpu_isa: name must be generic, avx2, avx512 or avx512_bf16, and this machine must have it, got None"),
    (lambda: moe_ext.set_cpu_isa("sse"), V, "set_cpu_isa: name must be generic, avx2, avx512 or avx512_bf16, and this machine must have it, got 'sse'"),
    (lambda: moe_ext.set_batch_invariant(1), TE, "set_batch_invariant: enabled must be a bool, got int"),
    (lambda: moe_ext.param_groups(layer(), lr=None, weight_decay=0.1), V, "param_groups: lr must be a finite number, got None"),
    (lambda: moe_ext.param_groups(layer(), lr=1e-3, weight_decay=-1), V, "param_groups: weight_decay must be >= 0, got -1"),
    (lambda: GroupedExperts(E, H, 0), V, "GroupedExperts: intermediate_size must be >= 1, got 0"),
    (lambda: GroupedExperts(2.0, H, I), V, "GroupedExperts: num_experts must be an integer, got 2.0"),
]
# fmt: on


@pytest.mark.parametrize("index", range(len(MISTAKES)))
def test_mistake(index):
    mistake, error, sentence = MISTAKES[index]
    with pytest.raises(error) as caught:
        mistake()
    text = str(caught.value)
    assert text.startswith(sentence), text
    assert type(caught.value) is error
    assert not re.search(r"Declaration|moe_ext::|\b_[a-z]+_[a-z]+|csrc/|\.h:\d", text), text


def test_there_are_a_hundred():
    assert len(MISTAKES) >= 100 and not EMULATED
