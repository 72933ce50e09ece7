"""What the tests share: devices, dtypes, tolerances, inputs of size O(1)."""

import os

import pytest
import torch

# Error allowed against an fp64 run of the reference: max|a - b| / max|b|; twice for gradients.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 2**-7,
    torch.float16: 2**-10,
}
DTYPES = list(TOLERANCE)

# MOE_EXT_REQUIRE_CUDA=1: the CUDA tests run, and fail where there is no device.
DEVICES = ["cpu"]
if torch.cuda.is_available() or os.environ.get("MOE_EXT_REQUIRE_CUDA") == "1":
    DEVICES.append("cuda")


# tests/emulation/emulate.py: "cpu" runs the CUDA operators.
EMULATED = os.environ.get("MOE_EXT_EMULATED") == "1"


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.fixture
def on_device(device):
    """New tensors and modules are made on the device, for tests that name none."""
    torch.set_default_device(device)
    yield device
    torch.set_default_device(None)


@pytest.fixture
def fresh_compiler():
    """Layers of other options share their code, of which only so many versions are kept."""
    yield
    torch.compiler.reset()


ISAS = ["generic", "avx2", "avx512", "avx512_bf16"]  # each needs the ones before it


@pytest.fixture(params=ISAS)
def isa(request):
    """The CPU's instruction sets, one after the other."""
    import moe_ext

    best = moe_ext.cpu_isa()
    if ISAS.index(request.param) > ISAS.index(best):
        pytest.skip(f"this machine has {best}")
    moe_ext.set_cpu_isa(request.param)
    assert moe_ext.cpu_isa() == request.param
    yield request.param
    moe_ext.set_cpu_isa(best)


@pytest.fixture
def threads():
    """Sets the number of threads."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """max|a - b| / max|b|; 0 for two empty tensors."""
    assert actual.shape == expected.shape
    assert not actual.isnan().any()
    if expected.numel() == 0:
        return 0.0
    difference = (actual.double() - expected.double()).abs().max()
    return (difference / expected.double().abs().max().clamp(min=1e-30)).item()


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, scale=1.0):
    error = relative_error(actual.detach().cpu(), expected.detach().cpu())
    assert error <= scale * TOLERANCE[dtype], f"relative error {error:.2e} in {dtype}"


def leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().requires_grad_()


def make_experts(E, H, I, *, gated=True, bias=False, dtype=torch.float32, device="cpu"):
    """Experts' weights scaled so that every intermediate value is O(1)."""
    W = 2 * I if gated else I
    weights = {
        "gate_up_proj": torch.randn(E, W, H, device=device) / H**0.5,
        "down_proj": torch.randn(E, H, I, device=device) / I**0.5,
    }
    if bias:
        weights["gate_up_bias"] = torch.randn(E, W, device=device)
        weights["down_bias"] = torch.randn(E, H, device=device)
    return {name: weight.to(dtype).requires_grad_() for name, weight in weights.items()}


ROUTINGS = ["random", "skewed", "one_expert", "idle", "skipped", "duplicates", "all_skipped"]


def make_ids(routing: str, T: int, K: int, E: int, device="cpu") -> torch.Tensor:
    """[T, K] ids of a kind of routing."""
    random = torch.rand(T, E).argsort(dim=1)[:, :K]
    if routing == "random":
        ids = random
    elif routing == "skewed":
        ids = (torch.rand(T, E) * torch.linspace(1, 0.1, E)).argsort(1, descending=True)[:, :K]
    elif routing == "one_expert":
        ids = torch.full((T, K), E - 1)
    elif routing == "idle":
        ids = random // 2 * 2  # odd experts get nothing; some ids occur twice
    elif routing == "skipped":
        drop = torch.rand(T, K)
        ids = random.masked_fill(drop < 0.3, -1).masked_fill(drop > 0.8, E + 3)
    elif routing == "duplicates":
        ids = random[:, :1].repeat(1, K)
    elif routing == "all_skipped":
        ids = torch.full((T, K), -1)
    return ids.to(device)


def run_backward(fn, inputs: dict, grad_seed=1):
    """fn(**inputs) on fresh leaves, and the gradients of all floating inputs for a random
    output gradient that does not depend on the dtype of the output."""
    leaves = {
        name: leaf(value) if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    out = fn(**leaves)
    generator = torch.Generator().manual_seed(grad_seed)
    # Rounded to bf16, so that it is the same number in every dtype.
    grad = torch.randn(out.shape, generator=generator).bfloat16().to(out)
    out.backward(grad)
    grads = {
        name: value.grad
        for name, value in leaves.items()
        if torch.is_tensor(value) and value.is_floating_point()
    }
    return out.detach(), grads


def check_against_reference(fn, reference_fn, inputs: dict, dtype: torch.dtype):
    """Output and all gradients of fn against an fp64 run of the reference on the same numbers."""
    out, grads = run_backward(fn, inputs)
    wide = {
        name: value.double().cpu()
        if torch.is_tensor(value) and value.is_floating_point()
        else (value.cpu() if torch.is_tensor(value) else value)
        for name, value in inputs.items()
    }
    expected_out, expected_grads = run_backward(reference_fn, wide)
    assert_close(out, expected_out, dtype)
    for name, expected in expected_grads.items():
        actual = grads[name]
        assert actual.dtype == inputs[name].dtype, name
        if expected is None:
            assert actual is None or not actual.any(), name
        else:
            assert_close(actual, expected, dtype, scale=2)
