"""The CPU kernels on every instruction set of this machine, and with any number of threads."""

import pytest
import torch
from conftest import (
    DTYPES,
    ROUTINGS,
    assert_close,
    check_against_reference,
    leaf,
    make_experts,
    make_ids,
)

import moe_ext
from moe_ext import reference

SHAPES = [  # T, H, I, E, K, routing
    (1, 1, 1, 1, 1, "random"),
    (3, 70, 34, 5, 2, "random"),  # few rows: dot products
    (31, 2100, 37, 3, 1, "random"),  # dot products in strips, over several blocks of terms
    (90, 701, 37, 2, 1, "random"),  # more terms than a packed block, an odd number of them
    (1100, 24, 40, 2, 1, "one_expert"),  # more rows than a chunk, more tokens than a block
    (70, 33, 130, 3, 2, "skipped"),
    (533, 129, 65, 4, 2, "skewed"),
]


def make_inputs(T, H, I, E, K, routing, dtype, **experts):
    return {
        "tokens": torch.randn(T, H).to(dtype),
        "topk_weights": torch.rand(T, K).to(dtype) + 0.1,
        "topk_ids": make_ids(routing, T, K, E),
        **make_experts(E, H, I, dtype=dtype, **experts),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_reference(isa, dtype, shape):
    inputs = make_inputs(*shape, dtype, bias=True)
    check_against_reference(moe_ext.moe_ffn, reference.moe_ffn, inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [*reference.ACTIVATIONS, *reference.GATED_ACTIVATIONS])
def test_activations(isa, dtype, activation):
    for gated in (True, False) if activation in reference.ACTIVATIONS else (True,):
        inputs = make_inputs(50, 24, 21, 3, 2, "random", dtype, gated=gated)
        options = {"activation": activation, "gated": gated}
        check_against_reference(
            lambda options=options, **x: moe_ext.moe_ffn(**x, **options),
            lambda options=options, **x: reference.moe_ffn(**x, **options),
            inputs,
            dtype,
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_values(isa, dtype):
    """Each element of the output is act(x), so every value's error shows by itself."""
    largest = {torch.float16: 3e4}.get(dtype, 1e30)
    x = torch.cat([torch.linspace(-30, 30, 6001), torch.tensor([0.0, -0.0, largest, -largest])])
    x = x.to(dtype).unsqueeze(1)
    one = torch.ones(1, 1, 1, dtype=dtype)
    offsets = torch.tensor([0, len(x)], dtype=torch.int32)
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    for activation in ("silu", "gelu", "gelu_tanh", "relu", "identity"):
        options = {"activation": activation, "gated": False}
        out = moe_ext.expert_ffn(x, offsets, one, one, **options)
        expected = reference.ACTIVATIONS[activation](x.double())
        error = (out.double() - expected).abs()
        # Relative to |x|, since no one asks for digits of silu(-30) but of its size.
        assert (error <= 4 * eps * x.double().abs().clamp(min=tiny)).all(), activation
    nan = torch.full((3, 1), float("nan"), dtype=dtype)
    three = torch.tensor([0, 3], dtype=torch.int32)
    for activation in reference.ACTIVATIONS:
        out = moe_ext.expert_ffn(nan, three, one, one, activation=activation, gated=False)
        assert out.isnan().all(), activation


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_to_nearest_even(isa, dtype):
    """grouped_linear by the identity returns every finite 16-bit number; a sum is rounded once."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    smallest = torch.finfo(dtype).smallest_normal if dtype == torch.bfloat16 else 0.0
    numbers = numbers[numbers.isfinite() & (numbers.abs() >= smallest)].unsqueeze(1)
    offsets = torch.tensor([0, len(numbers)], dtype=torch.int32)
    one = torch.ones(1, 1, 1, dtype=dtype)
    out = torch.ops.moe_ext._grouped_linear(numbers, offsets, one)
    assert torch.equal(out, numbers)
    odd = 1 + torch.arange(64, dtype=torch.float64).unsqueeze(1) * torch.finfo(dtype).eps
    half = torch.full((64, 1), torch.finfo(dtype).eps / 2, dtype=torch.float64)
    rows = torch.cat([odd, half], dim=1)
    ties = torch.ops.moe_ext._grouped_linear(
        rows.to(dtype), torch.tensor([0, 64], dtype=torch.int32), torch.ones(1, 1, 2, dtype=dtype)
    )
    assert torch.equal(ties, rows.sum(dim=1, keepdim=True).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_in_any_layout(isa, dtype):
    """[E, H, 2I] storage read as [E, 2I, H], rows far apart, nothing dense: the same numbers."""
    inputs = make_inputs(60, 40, 24, 3, 2, "random", dtype)
    expected = moe_ext.moe_ffn(**inputs)
    for name in ("gate_up_proj", "down_proj"):
        weight = inputs[name].detach()
        wide = torch.zeros(*weight.shape[:2], 2 * weight.shape[2], dtype=dtype)
        layouts = {
            "transposed": weight.transpose(1, 2).contiguous().transpose(1, 2),
            "padded": torch.cat([weight, weight], dim=2)[:, :, : weight.shape[2]],
            "strided": wide[:, :, ::2].copy_(weight),
        }
        for layout, other in layouts.items():
            assert torch.equal(other, weight)
            out = moe_ext.moe_ffn(**{**inputs, name: other})
            error = (out - expected).abs().max() / expected.abs().max()
            assert error <= 2 * torch.finfo(dtype).eps, (name, layout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score_function", list(reference.SCORE_FUNCTIONS))
@pytest.mark.parametrize("E,K,groups", [(1, 1, 1), (7, 2, 1), (40, 8, 1), (130, 9, 1), (48, 6, 8)])
def test_router(isa, dtype, score_function, E, K, groups):
    options = {"score_function": score_function}
    if groups > 1:
        options |= {"num_groups": groups, "topk_groups": 3, "expert_bias": torch.rand(E)}
    logits = leaf(torch.randn(90, E).mul(2).to(dtype))
    wide = leaf(logits.double())
    weights, ids, probs = moe_ext.topk_router(logits, K, **options)
    expected = reference.topk_router(wide, K, **options)
    same = (ids == expected[1]).all(1)
    # Rounded logits can be equal, and keys in fp32 closer than their rounding.
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    assert same.all() if dtype == torch.float64 else same.float().mean() > 0.9
    losses = torch.stack([moe_ext.load_balancing_loss(probs, ids), moe_ext.router_z_loss(logits)])
    expected_losses = torch.stack(
        [reference.load_balancing_loss(expected[2], ids), reference.router_z_loss(wide)]
    )
    assert_close(weights[same], expected[0][same], compute)
    assert_close(probs, expected[2], compute)
    assert_close(losses, expected_losses, compute)
    grads = [torch.randn_like(weights) * same[:, None], torch.randn_like(probs), torch.randn(2)]
    torch.autograd.backward([weights, probs, losses], [g.to(compute) for g in grads])
    torch.autograd.backward([*expected[::2], expected_losses], [g.double() for g in grads])
    assert_close(logits.grad, wide.grad, dtype, scale=2)


def test_choice_of_extreme_logits(isa):
    """Infinite and NaN logits, and ties, at every place of a vector."""
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 1.0, 1.0, -2.0])
    for E in (5, 16, 19, 40):
        logits = values[torch.randint(len(values), (200, E))]
        order = torch.where(logits.isnan(), -float("inf"), logits)
        expected = torch.stack(
            [
                # larger first, NaN after -inf, then lower ids
                torch.tensor(sorted(range(E), key=lambda e: (n[e].item(), -o[e].item(), e))[:5])
                for n, o in zip(logits.isnan(), order, strict=True)
            ]
        )
        weights, ids, _ = moe_ext.topk_router(logits, 5)
        assert torch.equal(ids, expected)
        assert weights[logits.isnan().any(1)].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_unpermute(isa, dtype):
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    for H in (1, 31, 130):
        tokens, ids = torch.randn(50, H).to(dtype), make_ids("skipped", 50, 3, 6)
        rows, row_map, _ = moe_ext.permute(tokens, ids, 6)
        inputs = {"rows": rows, "row_map": row_map}
        inputs["topk_weights"] = torch.rand(50, 3, dtype=compute)
        check_against_reference(moe_ext.unpermute, reference.unpermute, inputs, dtype)


def train_step(inputs, **options):
    leaves = {
        name: leaf(value) if value.is_floating_point() else value for name, value in inputs.items()
    }
    out = moe_ext.moe_ffn(**leaves, **options)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    out.backward(grad)
    return [out, *(value.grad for value in leaves.values() if value.is_floating_point())]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_same_bits_for_any_number_of_threads(threads, dtype, routing):
    inputs = make_inputs(700, 96, 80, 6, 2, routing, dtype, bias=True)
    threads(1)
    expected = train_step(inputs)
    for count in (2, 3, 7):
        threads(count)
        for actual, one in zip(train_step(inputs), expected, strict=True):
            assert torch.equal(actual, one), count


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_has_the_same_bits_for_any_number_of_threads(threads, dtype):
    """Logits, router, losses, experts and shared experts, forward and backward."""
    torch.manual_seed(0)
    layer = moe_ext.MoE(
        96, 80, 6, 2, shared_intermediate_size=40, z_loss_coef=1e-3, init_std=0.2, dtype=dtype
    )
    x = torch.randn(700, 96).to(dtype)

    def run():
        layer.zero_grad()
        tokens = leaf(x)
        out, loss = layer(tokens, return_aux_loss=True)
        (out.float().square().mean() + loss).backward()
        return [out, loss, tokens.grad, *(p.grad for p in layer.parameters())]

    threads(1)
    expected = run()
    for count in (2, 3):
        threads(count)
        for actual, one in zip(run(), expected, strict=True):
            assert torch.equal(actual, one), count


def test_inside_a_parallel_region(threads):
    """Called by a worker of another thread pool, without waiting for threads that never come."""
    from concurrent.futures import ThreadPoolExecutor

    inputs = make_inputs(300, 96, 80, 6, 2, "random", torch.float32)
    expected = train_step(inputs)
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda _: train_step(inputs), range(8)):
            for actual, one in zip(result, expected, strict=True):
                assert torch.equal(actual, one)


@pytest.mark.parametrize("name", ["sse9", "", "AVX2"])
def test_unknown_instruction_set(name):
    before = moe_ext.cpu_isa()
    with pytest.raises(ValueError, match=f"set_cpu_isa: name must be .*got '{name}'"):
        moe_ext.set_cpu_isa(name)
    assert moe_ext.cpu_isa() == before
