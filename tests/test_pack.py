"""pack_ and unpack_: the same results from packed weights, the same weights afterwards."""

import copy
import io
import subprocess
import sys

import pytest
import torch
from conftest import DTYPES, EMULATED, ROUTINGS, assert_close, make_ids
from torch import nn

import moe_ext
from moe_ext import ops

pytestmark = pytest.mark.skipif(EMULATED, reason="packed weights are the CPU's own")

ISAS = ["generic", "avx2", "avx512", "avx512_bf16"]  # each needs the ones before it
SIZES = [  # T, H, I, E, K
    (1, 1, 1, 1, 1),
    (3, 70, 34, 5, 2),
    (40, 129, 31, 3, 2),
    (90, 701, 37, 2, 1),  # more terms than a block of them, an odd number
    (1100, 24, 40, 2, 1),  # more rows than a block
]


@pytest.fixture(params=ISAS)
def isa(request):
    best = moe_ext.cpu_isa()
    if ISAS.index(request.param) > ISAS.index(best):
        pytest.skip(f"this machine has {best}")
    moe_ext.set_cpu_isa(request.param)
    yield request.param
    moe_ext.set_cpu_isa(best)


def make(E=3, H=40, I=24, *, dtype=torch.float32, **options):
    experts = moe_ext.GroupedExperts(E, H, I, dtype=dtype, **options).eval()
    with torch.no_grad():
        for name, parameter in experts.named_parameters():
            std = 1.0 if name.endswith("_bias") else parameter.shape[-1] ** -0.5
            parameter.normal_(std=std)
    return experts


def inputs(T, H, E, K, dtype=torch.float32, routing="random"):
    weights = torch.rand(T, K).to(dtype) + 0.1
    return torch.randn(T, H).to(dtype), weights, make_ids(routing, T, K, E)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("sizes", SIZES)
@torch.no_grad()
def test_equals_plain(isa, sizes, gated, dtype):
    T, H, I, E, K = sizes
    experts = make(E, H, I, dtype=dtype, gated=gated, bias=gated)
    x = inputs(T, H, E, K, dtype)
    plain = experts(*x)
    assert moe_ext.pack_(experts) is experts
    assert_close(experts(*x), plain, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_same_bits_with_many_rows(isa, dtype):
    experts = make(2, 601, 80, dtype=dtype)
    x = inputs(100, 601, 2, 2, dtype)
    plain = experts(*x)
    assert torch.equal(moe_ext.pack_(experts)(*x), plain)


@pytest.mark.parametrize("routing", ROUTINGS)
@torch.no_grad()
def test_routings(routing):
    experts = make(6, 40, 24)
    x = inputs(33, 40, 6, 2, routing=routing)
    plain = experts(*x)
    assert_close(moe_ext.pack_(experts)(*x), plain, torch.float32)


@torch.no_grad()
def test_pairs():
    experts = make()
    pair_tokens, pair_experts = torch.randint(-1, 7, (30,)), torch.randint(-1, 4, (30,))
    x = torch.randn(7, 40), torch.rand(30), pair_experts, pair_tokens
    plain = experts(*x)
    assert_close(moe_ext.pack_(experts)(*x), plain, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_token_alone(isa, dtype):
    """A token's bits do not depend on the tokens beside it, nor on the number of threads."""
    experts = moe_ext.pack_(make(3, 600, 40, dtype=dtype))
    x, weights, ids = inputs(150, 600, 3, 2, dtype)
    together = experts(x, weights, ids)
    for part in (slice(0, 1), slice(7, 20), slice(20, 150)):
        assert torch.equal(experts(x[part], weights[part], ids[part]), together[part])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = experts(x, weights, ids)
    torch.set_num_threads(threads)
    assert torch.equal(alone, together)


@torch.no_grad()
def test_set_cpu_isa_after_packing():
    """The layout is the same for every instruction set."""
    experts = moe_ext.pack_(make(dtype=torch.bfloat16))
    x = inputs(50, 40, 3, 2, torch.bfloat16)
    best = moe_ext.cpu_isa()
    expected = experts(*x)
    for isa in ISAS[: ISAS.index(best)]:
        moe_ext.set_cpu_isa(isa)
        assert_close(experts(*x), expected, torch.bfloat16)
    moe_ext.set_cpu_isa(best)


def make_layer(**options):
    layer = moe_ext.MoE(40, 24, 4, 2, shared_intermediate_size=33, bias=True, **options)
    return layer.eval()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [True, False])
def test_unpack_restores(dtype, gated):
    layer = make_layer(dtype=dtype, gated=gated)
    layer.experts.down_proj.requires_grad_(False)
    with torch.no_grad():  # bits, not numbers
        layer.experts.down_proj.view(-1)[:2] = torch.tensor([float("nan"), -0.0], dtype=dtype)
    before = dict(layer.named_parameters())
    values = {name: p.detach().clone() for name, p in before.items()}
    moe_ext.pack_(layer)
    assert layer.experts.is_packed and layer.shared_expert.is_packed
    assert "packed" in repr(layer)
    assert moe_ext.unpack_(layer) is layer
    after = dict(layer.named_parameters())
    assert list(after) == list(before)
    for name, parameter in after.items():
        assert parameter is before[name]
        assert parameter.requires_grad == (name != "experts.down_proj")
        same = parameter.view(torch.uint8), values[name].view(torch.uint8)
        assert torch.equal(*same) and parameter.shape == values[name].shape
    assert not [name for name, _ in layer.named_buffers() if "packed" in name]
    layer.train()(torch.randn(5, 40, dtype=dtype)).sum().backward()


@torch.no_grad()
def test_layer_with_shared_expert():
    layer = make_layer()
    x = torch.randn(2, 9, 40)
    plain = layer(x)
    assert_close(moe_ext.pack_(layer)(x), plain, torch.float32)
    assert moe_ext.pack_(layer) is layer  # again: left as it is
    assert_close(layer(x), plain, torch.float32)


@torch.no_grad()
def test_capacity_and_rounding():
    layer = moe_ext.MoE(40, 24, 4, 2, eval_capacity_factor=0.7).eval()
    x = torch.randn(30, 40)
    plain = layer(x)
    assert layer.last_stats.dropped > 0
    assert_close(moe_ext.pack_(layer)(x), plain, torch.float32)
    layer = moe_ext.MoE(40, 24, 4, 2, router=moe_ext.ExpertChoiceRouter(40, 4, 2)).eval()
    plain = layer(x)
    assert_close(moe_ext.pack_(layer)(x), plain, torch.float32)


def test_state_dict():
    layer = make_layer()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    moe_ext.pack_(layer)
    after = layer.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    with pytest.raises(RuntimeError, match=r"load_state_dict, got packed.*moe_ext.unpack_"):
        layer.load_state_dict(before)
    moe_ext.unpack_(layer).load_state_dict(before)


@torch.no_grad()
def test_copies():
    layer = moe_ext.pack_(make_layer())
    x = torch.randn(6, 40)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), layer(x))
        moe_ext.unpack_(other)
        assert_close(other(x), layer(x), torch.float32)
        assert other.experts.gate_up_proj.shape == (4, 48, 40)
    assert layer.experts.is_packed


def test_moving():
    for target in (torch.float16, torch.float64, "meta"):
        with pytest.raises(RuntimeError, match=r"must not be packed for .*moe_ext.unpack_"):
            moe_ext.pack_(make_layer()).to(target)
    layer = moe_ext.pack_(make_layer())
    layer.to("cpu").float().requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"must not be packed for reset_parameters"):
        layer.reset_parameters()


def test_training_is_refused():
    layer = moe_ext.pack_(make_layer())
    x = torch.randn(3, 40)
    with pytest.raises(RuntimeError, match=r"training mode \(call .eval.*moe_ext.unpack_"):
        layer.train()(x)
    with pytest.raises(RuntimeError, match=r"must not require grad.*moe_ext.unpack_"):
        layer.eval()(x)
    with torch.inference_mode():
        layer(x)


def test_refused_modules():
    with pytest.raises(ValueError, match="pack_: module must hold experts .* got Linear"):
        moe_ext.pack_(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="unpack_: module must hold experts .* got Linear"):
        moe_ext.unpack_(nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="pack_: gate_up_proj must be on the CPU, got meta"):
        moe_ext.pack_(moe_ext.GroupedExperts(2, 4, 4, device="meta"))
    pair = nn.ModuleList([make(), make()])
    pair[1].down_proj = pair[0].down_proj
    with pytest.raises(RuntimeError, match=r"pack_: 0.down_proj must belong to one module, got 2"):
        moe_ext.pack_(pair)
    assert not pair[0].is_packed
    experts = make()
    nn.utils.parametrize.register_parametrization(experts, "down_proj", nn.Identity())
    with pytest.raises(RuntimeError, match="pack_: down_proj must be a plain parameter"):
        moe_ext.pack_(experts)


def test_shared_module_is_packed_once():
    experts = make()
    both = nn.ModuleList([experts, experts])
    moe_ext.unpack_(moe_ext.pack_(both))
    assert experts.down_proj.shape == (3, 40, 24)


def test_autocast():
    experts = moe_ext.pack_(make(dtype=torch.bfloat16))
    x, weights, ids = inputs(5, 40, 3, 2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert experts(x, weights, ids).dtype == torch.bfloat16
    experts = moe_ext.pack_(make())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(RuntimeError, match="gate_up_packed must be BFloat16 like tokens"):
            experts(x, weights, ids)


def test_opcheck():
    experts = make(dtype=torch.bfloat16, bias=True)
    gate_up, down = experts.gate_up_proj.detach(), experts.down_proj.detach()
    packed = ops._pack_weights(gate_up, True), ops._pack_weights(down, False)
    biases = experts.gate_up_proj_bias.detach(), experts.down_proj_bias.detach()
    x = inputs(7, 40, 3, 2, torch.bfloat16)
    library = torch.ops.moe_ext
    torch.library.opcheck(
        library._moe_ffn_packed.default, (*x, None, *packed, *biases, 24, "silu", True)
    )
    torch.library.opcheck(library._pack_weights.default, (gate_up, True))
    torch.library.opcheck(library._unpack_weights.default, (packed[0], 48, 40, True))


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("gate_up_packed", torch.zeros(3, 1, 40, 64), "gate_up_packed must be .E, blocks, steps"),
        ("gate_up_packed", torch.zeros(3, 2, 40, 64, 1), "gate_up_packed must be .E=3, blocks=1"),
        ("down_packed", torch.zeros(3, 1, 23, 64, 1), "down_packed must be .E=3, .*steps=24"),
        ("down_packed", torch.zeros(3, 1, 24, 64, 1).double(), "down_packed must be .* like tok"),
        ("intermediate_size", 0, "intermediate_size must have I >= 1"),
        ("gate_up_bias", torch.zeros(3, 24), "gate_up_bias must be .E=3, 2I=48"),
        ("tokens", torch.zeros(7, 41), "gate_up_packed must be .*steps=41"),
    ],
)
def test_operator_refuses(argument, value, message):
    tokens, weights, ids = inputs(7, 40, 3, 2)
    arguments = {
        "tokens": tokens,
        "weights": weights,
        "ids": ids,
        "pair_tokens": None,
        "gate_up_packed": torch.zeros(3, 1, 40, 64, 1),
        "down_packed": torch.zeros(3, 1, 24, 64, 1),
        "gate_up_bias": None,
        "down_bias": None,
        "intermediate_size": 24,
        "activation": "silu",
        "gated": True,
    }
    ops._moe_ffn_packed(**arguments)
    with pytest.raises(RuntimeError, match=f"_moe_ffn_packed: {message}"):
        ops._moe_ffn_packed(**arguments | {argument: value})


@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_compile_and_export():
    layer = moe_ext.pack_(make_layer())
    x = torch.randn(6, 40)
    plain = layer(x)
    assert torch.equal(torch.compile(layer, fullgraph=True)(x), plain)
    exported = torch.export.export(layer, (x,)).module()
    assert torch.equal(exported(x), plain)


MEMORY = """
import resource, torch, moe_ext
experts = moe_ext.GroupedExperts(16, 512, 512).eval()
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
moe_ext.pack_(moe_ext.GroupedExperts(1, 512, 512))  # what the first call alone takes
before = peak()
largest = experts.gate_up_proj.nbytes
moe_ext.pack_(experts)
packed = peak() - before
moe_ext.unpack_(experts)
print(packed / largest, (peak() - before) / largest)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_peak_memory():
    """One parameter more, while it is packed; no second copy is kept."""
    result = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True
    )
    packed, unpacked = map(float, result.stdout.split())
    assert packed < 1.3 and unpacked < 1.3
