"""What CUDA alone has: graphs, streams, asynchrony, sizes, several kinds of product. The operators'
own tests run on every device."""

import pytest
import torch
from conftest import DEVICES, leaf, make_experts, make_ids, relative_error

import moe_ext
from moe_ext import reference

needs_cuda = pytest.mark.skipif("cuda" not in DEVICES, reason="no CUDA device")

# bf16 with sizes of 16 bytes takes torch's grouped product on Hopper, the others our own.
SIZES = [(torch.bfloat16, 64, 32), (torch.bfloat16, 60, 29), (torch.float32, 64, 32)]
TOLERANCE = {torch.bfloat16: 2**-7, torch.float32: 1e-5}


def make(T, H, I, E, K, dtype, routing="random", device="cuda"):
    inputs = {
        "tokens": torch.randn(T, H, device=device).to(dtype),
        "topk_weights": torch.rand(T, K, device=device),
        "topk_ids": make_ids(routing, T, K, E, device),
        **make_experts(E, H, I, bias=True, dtype=dtype, device=device),
    }
    return {k: leaf(v) if v.is_floating_point() else v for k, v in inputs.items()}


def forward_and_gradients(inputs, grad):
    out = moe_ext.moe_ffn(**inputs)
    leaves = [value for value in inputs.values() if value.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@needs_cuda
@pytest.mark.parametrize("dtype,H,I", SIZES)
@pytest.mark.parametrize("T", [4, 300])
def test_graph_with_changing_routing(dtype, H, I, T):
    E, K = 8, 2
    inputs = make(T, H, I, E, K, dtype)
    grad = torch.randn(T, H, device="cuda").to(dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        forward_and_gradients(inputs, grad)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward_and_gradients(inputs, grad)
    for routing in ("skewed", "one_expert", "skipped", "all_skipped", "random"):
        inputs["topk_ids"].copy_(make_ids(routing, T, K, E, "cuda"))
        graph.replay()
        for actual, expected in zip(captured, forward_and_gradients(inputs, grad), strict=True):
            assert torch.equal(actual, expected), routing


def make_layer(**options):
    return moe_ext.MoE(
        64, 32, num_experts=8, top_k=2, device="cuda", dtype=torch.bfloat16, **options
    )


LAYERS = {
    "loss": {"balance": "aux_loss"},
    "bias": {"balance": "bias"},
    "capacity": {"capacity_factor": 1.0},
    "rounding": {"tile_size": 16},
}


@needs_cuda
@pytest.mark.parametrize("name", list(LAYERS))
def test_layer_in_a_graph(name):
    layer = make_layer(**LAYERS[name]).eval()
    tokens = torch.randn(256, 64, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        layer(tokens)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(tokens)
        for _ in range(3):
            tokens.copy_(torch.randn(256, 64, device="cuda"))
            graph.replay()
            assert torch.equal(out, layer(tokens))


@needs_cuda
@pytest.mark.parametrize("name", list(LAYERS))
def test_nothing_waits_for_the_device(name):
    layer = make_layer(**LAYERS[name])
    tokens = torch.randn(256, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    layer(tokens).square().mean().backward()
    try:
        torch.cuda.set_sync_debug_mode("error")
        layer(tokens).square().mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.parametrize("dtype,H,I", SIZES)
def test_on_another_stream(dtype, H, I):
    """Inputs that come late on that stream are waited for, and no other."""
    inputs = make(64, H, I, 8, 2, dtype)
    expected = moe_ext.moe_ffn(**inputs)
    late = torch.zeros_like(inputs["tokens"])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.copy_(inputs["tokens"].detach())
        out = moe_ext.moe_ffn(**{**inputs, "tokens": late})
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype,H,I", SIZES)
def test_same_bits_every_time(device, dtype, H, I):
    inputs = make(500, H, I, 8, 2, dtype, "skewed", device)
    grad = torch.randn(500, H, device=device).to(dtype)
    first = forward_and_gradients(inputs, grad)
    for _ in range(5):
        for actual, expected in zip(forward_and_gradients(inputs, grad), first, strict=True):
            assert torch.equal(actual, expected)


@needs_cuda
def test_tf32_is_torchs_switch():
    inputs = make(500, 256, 128, 8, 2, torch.float32)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    expected = reference.moe_ffn(**wide)
    before = torch.backends.cuda.matmul.fp32_precision
    errors = {}
    try:
        for precision in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = precision
            errors[precision] = relative_error(moe_ext.moe_ffn(**inputs).detach(), expected)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert errors["ieee"] < 1e-5 < errors["tf32"] < 2**-8


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("routing", ["skewed", "one_expert", "idle", "skipped"])
@pytest.mark.parametrize("dtype,H,I", SIZES)
@pytest.mark.parametrize("T", [3, 700])
def test_products_large_and_small(device, dtype, H, I, T, routing, transposed):
    """Every path of the grouped products: torch's and ours, for few rows and for many, weights in
    either layout."""
    inputs = make(T, H, I, 8, 2, dtype, routing, device)
    if transposed:
        for name in ("gate_up_proj", "down_proj"):
            stored = inputs[name].detach().transpose(1, 2).contiguous().transpose(1, 2)
            inputs[name] = stored.requires_grad_()
    wide = {k: leaf(v.double()) if v.is_floating_point() else v for k, v in inputs.items()}
    grad = torch.randn(T, H, device=device).to(dtype)
    out = reference.moe_ffn(**wide)
    leaves = [value for value in wide.values() if value.requires_grad]
    expected = [out.detach(), *torch.autograd.grad(out, leaves, grad.double())]
    for i, (a, b) in enumerate(zip(forward_and_gradients(inputs, grad), expected, strict=True)):
        assert relative_error(a, b) < (1 if i == 0 else 2) * TOLERANCE[dtype], i


@needs_cuda
def test_more_than_two_to_the_31_elements():
    T, H, I, E = 600_000, 4096, 64, 4
    if torch.cuda.mem_get_info()[0] < 45 << 30:
        pytest.skip("needs 45 GiB of free memory")
    inputs = {
        "tokens": torch.randn(T, H, device="cuda", dtype=torch.bfloat16),
        "topk_weights": torch.rand(T, 1, device="cuda"),
        "topk_ids": torch.randint(E, (T, 1), device="cuda"),
        **make_experts(E, H, I, dtype=torch.bfloat16, device="cuda"),
    }
    assert inputs["tokens"].numel() > 2**31
    inputs["tokens"].requires_grad_()
    out = moe_ext.moe_ffn(**inputs)
    out.backward(inputs["tokens"].detach())
    some = torch.cat([torch.arange(50), torch.arange(T - 50, T)]).cuda()
    wide = {
        name: value.detach()[some] if name in ("tokens", "topk_weights", "topk_ids") else value
        for name, value in inputs.items()
    }
    wide = {k: v.detach().double() if v.is_floating_point() else v for k, v in wide.items()}
    wide["tokens"].requires_grad_()
    expected = reference.moe_ffn(**wide)
    expected.backward(wide["tokens"].detach())
    assert relative_error(out.detach()[some], expected.detach()) < 2**-7
    assert relative_error(inputs["tokens"].grad[some], wide["tokens"].grad) < 2**-6
