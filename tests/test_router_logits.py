import pytest
import torch
from conftest import DTYPES, assert_close, leaf

from moe_ext import reference

op = torch.ops.moe_ext._router_logits


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_reference(device, dtype, weight_dtype):
    tokens = leaf(torch.randn(30, 17, device=device).to(dtype))
    weight = leaf((torch.randn(5, 17, device=device) / 4).to(weight_dtype))
    wide = leaf(tokens.double()), leaf(weight.double())
    logits, expected = op(tokens, weight), reference.router_logits(*wide)
    compute = torch.promote_types(torch.promote_types(dtype, weight_dtype), torch.float32)
    assert logits.dtype == compute
    assert_close(logits, expected, compute)
    grad = torch.randn_like(logits)
    logits.backward(grad)
    expected.backward(grad.double())
    assert (tokens.grad.dtype, weight.grad.dtype) == (dtype, weight_dtype)
    assert_close(tokens.grad, wide[0].grad, dtype, scale=2)
    assert_close(weight.grad, wide[1].grad, weight_dtype, scale=2)


def test_gradcheck_and_opcheck(device):
    tokens = leaf(torch.randn(6, 4, dtype=torch.float64, device=device))
    weight = leaf(torch.randn(3, 4, dtype=torch.float64, device=device))
    torch.autograd.gradcheck(op, (tokens, weight))
    torch.library.opcheck(op.default, (tokens, weight))
    grad = op(tokens, weight).detach()
    for mask in ([True, True], [True, False], [False, True]):
        torch.library.opcheck(
            torch.ops.moe_ext._router_logits_backward.default,
            (grad, tokens.detach(), weight.detach(), mask),
        )


def test_no_copy_of_the_tokens_is_saved(device):
    tokens = torch.randn(6, 4, dtype=torch.bfloat16, device=device)
    weight = leaf(torch.randn(3, 4, device=device))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor.data_ptr()) or tensor, lambda tensor: tensor
    ):
        op(tokens, weight)
    assert set(saved) == {tokens.data_ptr(), weight.data_ptr()}


def test_fp32_under_autocast(device):
    tokens, weight = torch.randn(6, 4, device=device), torch.randn(3, 4, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        logits = op(tokens, weight)
        assert (tokens @ weight.T).dtype == torch.bfloat16  # what it would be without us
    assert logits.dtype == torch.float32 and torch.equal(logits, op(tokens, weight))
