import pytest
import torch
from conftest import DTYPES, ROUTINGS, check_against_reference, leaf, make_ids, relative_error

import moe_ext
from moe_ext import reference


def make_inputs(routing, T, H, E, K, dtype, device, weighted=True):
    ids = make_ids(routing, T, K, E, device)
    row_map = moe_ext.permute(torch.zeros(T, 1, device=device), ids, E)[1]
    inputs = {"rows": torch.randn(T * K, H, device=device).to(dtype), "row_map": row_map}
    if weighted:
        inputs["topk_weights"] = torch.rand(T, K, device=device).to(dtype)
    return inputs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("weighted", [True, False])
def test_reference(device, dtype, routing, weighted):
    inputs = make_inputs(routing, 30, 17, 5, 3, dtype, device, weighted)
    check_against_reference(moe_ext.unpermute, reference.unpermute, inputs, dtype)


@pytest.mark.parametrize("weights_dtype", DTYPES)
def test_weights_of_any_dtype(device, weights_dtype):
    inputs = make_inputs("skipped", 30, 17, 5, 3, torch.float32, device)
    inputs["topk_weights"] = inputs["topk_weights"].to(weights_dtype)
    coarse = weights_dtype if weights_dtype.itemsize == 2 else torch.float32
    check_against_reference(moe_ext.unpermute, reference.unpermute, inputs, coarse)


def test_inverts_permute(device):
    tokens = torch.randn(20, 8, device=device)
    rows, row_map, _ = moe_ext.permute(tokens, make_ids("random", 20, 1, 5, device), 5)
    assert torch.equal(moe_ext.unpermute(rows, row_map), tokens)


def test_gradcheck_and_opcheck(device):
    inputs = make_inputs("skipped", 6, 5, 4, 2, torch.float64, device)
    args = leaf(inputs["rows"]), inputs["row_map"], leaf(inputs["topk_weights"])
    torch.autograd.gradcheck(moe_ext.unpermute, args)
    torch.autograd.gradcheck(moe_ext.unpermute, args[:2])
    torch.library.opcheck(torch.ops.moe_ext.unpermute.default, args)
    torch.library.opcheck(torch.ops.moe_ext.unpermute.default, args[:2])
    rows, row_map, weights = (value.detach() for value in args)
    grad = torch.randn(6, 5, dtype=torch.float64, device=device)
    for w in (weights, None):
        for mask in ([True, w is not None], [True, False], [False, w is not None]):
            torch.library.opcheck(
                torch.ops.moe_ext._unpermute_backward.default, (grad, rows, row_map, w, mask)
            )


def test_skipped_slots_and_unused_rows_are_zeros(device):
    inputs = make_inputs("skipped", 10, 4, 4, 2, torch.float32, device)
    skipped = inputs["row_map"] < 0
    used = int((~skipped).sum())
    inputs["rows"][used:] = float("nan")
    inputs["topk_weights"][skipped] = float("nan")
    rows, weights = leaf(inputs["rows"]), leaf(inputs["topk_weights"])
    out = moe_ext.unpermute(rows, inputs["row_map"], weights)
    out.sum().backward()  # stride-0 gradient
    assert out.isfinite().all() and not out[skipped.all(1)].any()
    assert rows.grad.isfinite().all() and not rows.grad[used:].any()
    assert weights.grad.isfinite().all() and not weights.grad[skipped].any()


def test_strides(device):
    inputs = make_inputs("random", 10, 6, 4, 2, torch.float64, device)
    expected = moe_ext.unpermute(**inputs)
    strange = {name: value.T.contiguous().T for name, value in inputs.items()}
    assert relative_error(moe_ext.unpermute(**strange), expected) < 1e-15
