"""Second derivatives raise, whichever way they are asked for, and never come back as zeros."""

import pytest
import torch
from conftest import leaf, make_experts

import moe_ext
from moe_ext import reference

T, H, I, E, K = 5, 6, 4, 4, 2

ops = torch.ops.moe_ext


def ids():
    return torch.rand(T, E).argsort(1)[:, :K]


def offsets():
    return torch.tensor([0, 3, 3, 7, T * K], dtype=torch.int32)


def functions() -> dict:
    """Of one tensor, not linear in it, by the operator that it goes through."""
    experts, topk_ids, weights = make_experts(E, H, I), ids(), torch.rand(T, K)
    row_map = torch.randperm(T * K).int().view(T, K)
    pair_tokens, pair_experts = torch.arange(T), torch.arange(T) % E
    return {
        "moe_ffn": ((T, H), lambda x: moe_ext.moe_ffn(x, weights, topk_ids, **experts)),
        "moe_ffn pairs": (
            (T, H),
            lambda x: ops._moe_ffn_pairs(x, torch.ones(T), pair_experts, pair_tokens, **experts),
        ),
        "expert_ffn": ((T * K, H), lambda x: moe_ext.expert_ffn(x, offsets(), **experts)),
        "grouped_linear": (
            (T * K, H),
            lambda x: ops._grouped_linear(x, offsets(), experts["gate_up_proj"]),
        ),
        "router_logits": ((T, H), lambda x: ops._router_logits(x, torch.ones(E, H))),
        "topk_router": ((T, E), lambda x: moe_ext.topk_router(x, K)[0]),
        "router_weights": (
            (T, E),
            lambda x: ops._router_weights(
                x, topk_ids, score_function="sigmoid", renormalize=True, scaling_factor=1.0
            )[0],
        ),
        "router_z_loss": ((T, E), lambda x: moe_ext.router_z_loss(x)),
        "unpermute": ((T * K, H), lambda x: moe_ext.unpermute(x, row_map, weights)),
        "permute": ((T, H), lambda x: moe_ext.permute(x, topk_ids, E)[0]),
    }


@pytest.fixture(params=list(functions()))
def case(request):
    shape, function = functions()[request.param]
    return request.param.split()[0], leaf(torch.randn(shape)), function


def raises(operator):
    return pytest.raises(NotImplementedError, match=f"^{operator}: second derivatives are not")


def test_backward(case):
    operator, x, function = case
    (grad,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    with raises(operator):
        grad.sum().backward()


@pytest.mark.parametrize("allow_unused", [False, True])
def test_grad(case, allow_unused):
    operator, x, function = case
    (grad,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    with raises(operator):
        torch.autograd.grad(grad.sum(), x, allow_unused=allow_unused)


def test_hessian(case):
    operator, x, function = case
    with raises(operator):
        torch.autograd.functional.hessian(lambda t: function(t).square().sum(), x.detach())


def test_gradient_penalty(case):
    operator, x, function = case
    y = function(x).square().sum()
    (grad,) = torch.autograd.grad(y, x, create_graph=True)
    with raises(operator):
        (y + grad.square().sum()).backward()


def test_layer():
    layer = moe_ext.MoE(H, I, E, K)
    x = torch.randn(T, H)
    with raises("moe_ffn|router_logits"):
        torch.autograd.functional.hessian(lambda t: layer(t).square().sum(), x)
    x = leaf(x)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with raises("moe_ffn|router_logits"):
        torch.autograd.grad(grad.sum(), layer.router.weight, allow_unused=True)


def test_the_reference_has_them():
    experts, topk_ids, weights = make_experts(E, H, I), ids(), torch.rand(T, K)
    hessian = torch.autograd.functional.hessian(
        lambda t: reference.moe_ffn(t, weights, topk_ids, **experts).square().sum(),
        torch.randn(T, H),
    )
    assert hessian.abs().max() > 1


def test_create_graph_without_a_second_derivative():
    """The gradient itself is right, and of what does not need one nothing is said."""
    layer = moe_ext.MoE(H, I, E, K)
    x = leaf(torch.randn(T, H))
    (plain,) = torch.autograd.grad(layer(x).square().sum(), x)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    assert torch.equal(grad, plain) and grad.requires_grad
    other = leaf(torch.ones(()))
    (grad * other).sum().detach()
    (of_other,) = torch.autograd.grad((grad.detach() * other).sum(), other)
    assert of_other == plain.sum()


def test_a_linear_operators_second_derivative_is_zero_by_right():
    """load_balancing_loss is linear in the probabilities; what is before it is differentiated."""
    logits, topk_ids = leaf(torch.randn(T, E)), ids()
    ours = torch.autograd.functional.hessian(
        lambda t: moe_ext.load_balancing_loss(t.softmax(-1), topk_ids), logits.detach()
    )
    expected = torch.autograd.functional.hessian(
        lambda t: reference.load_balancing_loss(t.softmax(-1), topk_ids), logits.detach()
    )
    assert (ours - expected).abs().max() < 1e-6 * expected.abs().max()
