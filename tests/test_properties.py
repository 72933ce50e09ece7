"""Operators against the reference over sizes, strides and routings that nobody wrote down."""

import pytest
import torch
from conftest import DEVICES, leaf, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_ext
from moe_ext import reference

settings.register_profile("moe_ext", max_examples=150, deadline=None, derandomize=True)
settings.load_profile("moe_ext")


def view_of(tensor: torch.Tensor, step: int, offset: int) -> torch.Tensor:
    """The same values behind another stride and storage offset."""
    base = torch.full((tensor.numel() * step + offset,), float("nan"), dtype=tensor.dtype)
    strides = [stride * step for stride in tensor.contiguous().stride()]
    view = base.as_strided(tensor.shape, strides, offset)
    return view.copy_(tensor)


@st.composite
def problems(draw):
    E = draw(st.integers(1, 17))
    return {
        "T": draw(st.integers(0, 80)),
        "H": draw(st.integers(1, 37)),
        "I": draw(st.integers(1, 23)),
        "E": E,
        "K": draw(st.integers(1, E)),
        "gated": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "activation": draw(st.sampled_from(sorted(reference.ACTIVATIONS))),
        "recompute": draw(st.sampled_from(["activation", "hidden"])),
        "routing": draw(st.sampled_from(["any", "one", "few", "skips", "distinct"])),
        "step": draw(st.integers(1, 3)),
        "offset": draw(st.integers(0, 5)),
        "expanded_grad": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**16)),
    }


@pytest.mark.parametrize("device", DEVICES)
@given(p=problems())
def test_moe_ffn(device, p):
    with torch.device(device):
        check_moe_ffn(p)


def check_moe_ffn(p):
    torch.manual_seed(p["seed"])
    T, H, I, E, K = (p[letter] for letter in "THIEK")
    ids = {
        "any": lambda: torch.randint(E, (T, K)),
        "one": lambda: torch.full((T, K), E // 2),
        "few": lambda: torch.randint(min(2, E), (T, K)),
        "skips": lambda: torch.randint(-1, E + 2, (T, K)),
        "distinct": lambda: torch.rand(T, E).argsort(1)[:, :K],
    }[p["routing"]]()
    W = 2 * I if p["gated"] else I
    tensors = {
        "tokens": torch.randn(T, H),
        "topk_weights": torch.randn(T, K),
        "gate_up_proj": torch.randn(E, W, H) / H**0.5,
        "down_proj": torch.randn(E, H, I) / I**0.5,
    }
    if p["bias"]:
        tensors |= {"gate_up_bias": torch.randn(E, W), "down_bias": torch.randn(E, H)}
    tensors = {name: value.double() for name, value in tensors.items()}
    options = {name: p[name] for name in ("activation", "gated", "recompute")}
    bases = {name: leaf(value) for name, value in tensors.items()}
    views = {
        name: view_of(value, p["step"], p["offset"]).requires_grad_()
        for name, value in tensors.items()
    }
    out = moe_ext.moe_ffn(**views, topk_ids=ids, **options)
    expected = reference.moe_ffn(**bases, topk_ids=ids, **options)
    if p["expanded_grad"]:
        out.sum().backward()
        expected.sum().backward()
    else:
        grad = torch.randn(T, H, dtype=torch.float64)
        out.backward(grad)
        expected.backward(grad)
    assert relative_error(out, expected) < 1e-12
    for name, base in bases.items():
        grad = views[name].grad
        assert grad is not None and grad.shape == base.shape
        if base.grad is None or not base.grad.any():
            assert not grad.any()
        else:
            assert relative_error(grad, base.grad) < 1e-11, name


@pytest.mark.parametrize("device", DEVICES)
@given(
    T=st.integers(0, 60),
    E=st.integers(1, 40),
    data=st.data(),
    renormalize=st.booleans(),
    score_function=st.sampled_from(["softmax", "sigmoid"]),
    seed=st.integers(0, 2**16),
)
def test_topk_router(device, T, E, data, renormalize, score_function, seed):
    with torch.device(device):
        check_topk_router(T, E, data, renormalize, score_function, seed)


def check_topk_router(T, E, data, renormalize, score_function, seed):
    torch.manual_seed(seed)
    groups = data.draw(st.sampled_from([g for g in range(1, E + 1) if E % g == 0]))
    if score_function == "sigmoid" and E // groups < 2:
        groups = 1
    chosen_groups = data.draw(st.integers(1, groups))
    K = data.draw(st.integers(1, E // groups * chosen_groups))
    bias = torch.randn(E, dtype=torch.float64) if data.draw(st.booleans()) else None
    # Few distinct values: many ties.
    logits = leaf(torch.randint(-3, 4, (T, E)).double())
    other = leaf(logits)
    options = {
        "score_function": score_function,
        "renormalize": renormalize,
        "expert_bias": bias,
        "num_groups": groups,
        "topk_groups": chosen_groups,
    }
    weights, ids, probs = moe_ext.topk_router(logits, K, **options)
    expected_weights, expected_ids, expected_probs = reference.topk_router(other, K, **options)
    assert torch.equal(ids, expected_ids)
    assert relative_error(weights, expected_weights) < 1e-12
    assert relative_error(probs, expected_probs) < 1e-12
    (weights.square().sum() + probs.square().sum()).backward()
    (expected_weights.square().sum() + expected_probs.square().sum()).backward()
    assert relative_error(logits.grad, other.grad) < 1e-9 or not other.grad.abs().gt(1e-12).any()
