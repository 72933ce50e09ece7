import pytest
import torch
from conftest import DTYPES, check_against_reference, leaf

from moe_ext import reference

op = torch.ops.moe_ext._grouped_linear


def make_inputs(counts, tail, H=9, O=7, dtype=torch.float32, device="cpu", bias=True):
    inputs = {
        "rows": torch.randn(sum(counts) + tail, H, device=device).to(dtype),
        "expert_offsets": torch.tensor([0, *counts]).cumsum(0).int().to(device),
        "weight": (torch.randn(len(counts), O, H, device=device) / H**0.5).to(dtype),
    }
    if bias:
        inputs["bias"] = torch.randn(len(counts), O, device=device).to(dtype)
    return inputs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts,tail", [([3, 0, 300], 2), ([0, 0], 3), ([5], 0)])
@pytest.mark.parametrize("bias", [True, False])
def test_reference(device, dtype, counts, tail, bias):
    inputs = make_inputs(counts, tail, dtype=dtype, device=device, bias=bias)
    check_against_reference(op, reference.grouped_linear, inputs, dtype)


def test_transposed_weight(device):
    inputs = make_inputs([3, 4], 2, dtype=torch.float64, device=device)
    inputs["weight"] = inputs["weight"].mT.contiguous().mT
    check_against_reference(op, reference.grouped_linear, inputs, torch.float64)
    weight, grad = leaf(inputs["weight"]), torch.randn(9, 7, dtype=torch.float64, device=device)
    args = grad, inputs["rows"], inputs["expert_offsets"], weight.detach(), [True, True, True]
    backward = torch.ops.moe_ext._grouped_linear_backward.default
    assert backward(*args)[1].stride() == weight.stride()
    torch.library.opcheck(backward, args)


def test_gradcheck_and_opcheck(device):
    inputs = make_inputs([2, 0, 3], 2, H=4, O=3, dtype=torch.float64, device=device)
    offsets = inputs["expert_offsets"]
    args = leaf(inputs["rows"]), leaf(inputs["weight"]), leaf(inputs["bias"])
    torch.autograd.gradcheck(lambda rows, w, b: op(rows, offsets, w, b), args)
    torch.library.opcheck(op.default, (args[0], offsets, *args[1:]))
    grad = torch.randn(7, 3, dtype=torch.float64, device=device)
    rows, weight, _ = (value.detach() for value in args)
    for mask in ([True, True, True], [False, True, False], [True, False, True]):
        torch.library.opcheck(
            torch.ops.moe_ext._grouped_linear_backward.default,
            (grad, rows, offsets, weight, mask),
        )


def test_tail_rows_are_zeros_and_never_read(device):
    inputs = make_inputs([3, 2], 4, device=device)
    inputs["rows"][5:] = float("nan")
    rows, weight = leaf(inputs["rows"]), leaf(inputs["weight"])
    out = op(rows, inputs["expert_offsets"], weight, inputs["bias"])
    out.sum().backward()
    assert not out[5:].any() and not rows.grad[5:].any() and weight.grad.isfinite().all()
