import pytest
import torch
from conftest import (
    DTYPES,
    check_against_reference,
    leaf,
    make_experts,
    relative_error,
    run_backward,
)

import moe_ext
from moe_ext import reference

COUNTS = [  # rows of each expert, rows that belong to none
    ([3, 4, 5], 0),
    ([0, 7, 0, 2], 3),  # idle experts, a tail
    ([300, 0, 257], 0),  # several blocks
    ([0, 0], 4),
    ([1], 0),
]


def make_inputs(
    counts, tail, H=9, I=7, dtype=torch.float32, device="cpu", weighted=True, **experts
):
    offsets = torch.tensor([0, *counts]).cumsum(0).int().to(device)
    N = sum(counts) + tail
    inputs = {
        "rows": torch.randn(N, H, device=device).to(dtype),
        "expert_offsets": offsets,
        **make_experts(len(counts), H, I, dtype=dtype, device=device, **experts),
    }
    if weighted:
        inputs["row_weights"] = (torch.rand(N, device=device) + 0.1).to(dtype)
    return inputs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts,tail", COUNTS)
@pytest.mark.parametrize("recompute", ["activation", "hidden"])
@pytest.mark.parametrize("weighted,bias,gated", [(True, True, True), (False, False, False)])
def test_reference(device, dtype, counts, tail, recompute, weighted, bias, gated):
    inputs = make_inputs(
        counts, tail, dtype=dtype, device=device, weighted=weighted, bias=bias, gated=gated
    )
    check_against_reference(
        lambda **x: moe_ext.expert_ffn(**x, recompute=recompute, gated=gated),
        lambda **x: reference.expert_ffn(**x, gated=gated),
        inputs,
        dtype,
    )


@pytest.mark.parametrize("recompute", ["activation", "hidden"])
def test_gradcheck_and_opcheck(device, recompute):
    inputs = make_inputs([2, 0, 3], 2, H=5, I=3, bias=True, dtype=torch.float64, device=device)
    offsets = inputs.pop("expert_offsets")
    names = list(inputs)

    def run(*tensors):
        return moe_ext.expert_ffn(
            **dict(zip(names, tensors, strict=True)), expert_offsets=offsets, recompute=recompute
        )

    torch.autograd.gradcheck(run, [leaf(value) for value in inputs.values()])
    args = [leaf(inputs.pop("rows")), offsets, inputs.pop("gate_up_proj"), inputs.pop("down_proj")]
    torch.library.opcheck(
        torch.ops.moe_ext.expert_ffn.default, args, {**inputs, "recompute": recompute}
    )


def test_opcheck_private(device):
    # No tail: hidden is undefined there.
    inputs = make_inputs([2, 0, 3], 0, device=device, bias=True)
    args = [inputs[n].detach() for n in ("rows", "expert_offsets", "gate_up_proj", "down_proj")]
    options = [inputs[n].detach() for n in ("gate_up_bias", "down_bias")]
    weights = inputs["row_weights"]
    forward = torch.ops.moe_ext._expert_ffn_forward.default
    out, hidden = forward(*args, *options, weights, "silu", True, True)
    for save_hidden in (True, False):
        torch.library.opcheck(forward, (*args, *options, weights, "silu", True, save_hidden))
    torch.library.opcheck(
        torch.ops.moe_ext._expert_ffn_backward.default,
        (
            out,
            args[0],
            weights,
            None,
            None,
            args[1],
            hidden,
            *args[2:],
            *options,
            "silu",
            True,
            [True] * 6,
        ),
    )


def test_tail_rows_are_zeros_and_never_read(device):
    inputs = make_inputs([3, 2], 4, bias=True, device=device)
    inputs["rows"][5:] = float("nan")
    inputs["row_weights"][5:] = float("nan")
    for recompute in ("activation", "hidden"):
        out, grads = run_backward(
            lambda recompute=recompute, **x: moe_ext.expert_ffn(**x, recompute=recompute), inputs
        )
        assert not out[5:].any() and not grads["rows"][5:].any()
        assert not grads["row_weights"][5:].any()
        for name, grad in grads.items():
            assert grad.isfinite().all(), name


def test_saved_bytes(device):
    inputs = make_inputs([8, 8], 0, H=16, I=8, device=device)
    known = {value.data_ptr() for value in inputs.values()}
    saved = []

    def pack(tensor):
        if tensor.data_ptr() not in known:
            saved.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        moe_ext.expert_ffn(**inputs)
        assert saved == [16 * 2 * 8 * 4]
        moe_ext.expert_ffn(**inputs, recompute="hidden")
        assert len(saved) == 1


def test_stride_0_gradient_and_strides(device):
    inputs = make_inputs([4, 3], 1, dtype=torch.float64, device=device)
    rows = leaf(inputs.pop("rows"))
    moe_ext.expert_ffn(rows.T.contiguous().T, **inputs).sum().backward()
    other = leaf(rows)
    reference.expert_ffn(other, **inputs).sum().backward()
    assert relative_error(rows.grad, other.grad) < 1e-12


def test_second_derivative_is_an_error(device):
    inputs = make_inputs([4, 3], 1, device=device)
    rows = leaf(inputs.pop("rows"))
    out = moe_ext.expert_ffn(rows, **inputs)
    (grad,) = torch.autograd.grad(out.square().sum(), rows, create_graph=True)
    with pytest.raises(RuntimeError, match="expert_ffn: second derivatives"):
        grad.sum().backward()
