"""fuse_grad_accumulation: the same gradients as plain accumulation, however they are asked for."""

import warnings

import pytest
import torch
from conftest import DTYPES, assert_close, leaf, make_ids, relative_error
from torch import nn
from torch.utils.checkpoint import checkpoint

import moe_ext
from moe_ext import GroupedExperts

E, H, I, K, T = 5, 24, 16, 2, 40
HOOKS = "has hooks that need its gradient"


def make(dtype=torch.float32, **options) -> tuple[GroupedExperts, GroupedExperts]:
    """Two layers of the same weights: plain, and with the option."""
    torch.manual_seed(0)
    plain = GroupedExperts(E, H, I, dtype=dtype, init_std=0.3, **options)
    fused = GroupedExperts(E, H, I, dtype=dtype, fuse_grad_accumulation=True, **options)
    fused.load_state_dict(plain.state_dict())
    return plain, fused


def inputs(dtype=torch.float32, step=0, experts=E):
    torch.manual_seed(step)
    tokens = torch.randn(T, H).to(dtype).requires_grad_()
    return tokens, torch.rand(T, K).to(dtype), make_ids("random", T, K, experts, "cpu")


def loss_of(layer, *args):
    return layer(*args).float().square().sum()


def projections(layer) -> dict[str, nn.Parameter]:
    return {n: p for n, p in layer.named_parameters() if not n.endswith("_bias")}


def micro_batches(layer, dtype, count=3, **options) -> list[int]:
    """Where the gradients lie after each of them."""
    places = []
    for step in range(count):
        loss_of(layer, *inputs(dtype, step, **options)).backward()
        places.append([p.grad.data_ptr() for p in layer.parameters()])
    return places


@pytest.fixture
def added(monkeypatch):
    """Counts of what was added in place by the operator: gate_up_proj, down_proj."""
    seen = [0, 0]

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.moe_ext._expert_ffn_backward_into.default:
                for i in (0, 1):
                    seen[i] += args[14 + i] is not None
            return func(*args, **(kwargs or {}))

    with Mode():
        yield seen


def check(fused, plain, dtype=torch.float32, exact=True):
    expected = dict(plain.named_parameters())
    for name, parameter in fused.named_parameters():
        if exact and dtype in (torch.float32, torch.float64):
            assert torch.equal(parameter.grad, expected[name].grad), name
        else:
            assert_close(parameter.grad, expected[name].grad.double(), dtype, scale=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"gated": False, "activation": "gelu"}, {"bias": True}])
def test_equals_plain_accumulation(added, dtype, options):
    plain, fused = make(dtype, **options)
    micro_batches(plain, dtype)
    places = micro_batches(fused, dtype)
    check(fused, plain, dtype)
    assert added == [2, 2] and places[0] == places[1] == places[2]


def test_large_blocks_and_odd_sizes(added):
    """More rows, columns and tokens than a block of the gradient has."""
    torch.manual_seed(0)
    gate_up, down = torch.randn(2, 2 * 150, 301) * 0.06, torch.randn(2, 301, 150) * 0.08
    tokens, weights, ids = torch.randn(700, 301), torch.rand(700, 1), torch.randint(0, 2, (700, 1))
    for transposed in (False, True):
        grads = []
        for fuse in (False, True):
            params = [w.mT.contiguous().mT if transposed else w.clone() for w in (gate_up, down)]
            params = [nn.Parameter(p) for p in params]
            for _ in range(2):
                options = {"fuse_grad_accumulation": fuse}
                moe_ext.moe_ffn(tokens, weights, ids, *params, **options).square().sum().backward()
            assert all(p.grad.stride() == p.stride() for p in params)
            grads.append([p.grad for p in params])
        assert all(map(torch.equal, *grads))
    assert added == [2, 2]


def test_any_layout_of_the_gradient(added):
    plain, fused = make()
    for layer in (plain, fused):
        for parameter in layer.parameters():
            parameter.grad = torch.ones_like(parameter).mT.contiguous().mT
        micro_batches(layer, torch.float32, 2)
    check(fused, plain)
    wide = torch.zeros(E, H, 2 * I)[..., ::2]
    fused.down_proj.grad = wide
    loss_of(fused, *inputs()).backward()
    assert added == [3, 2] and fused.down_proj.grad is wide


def test_idle_experts_are_not_touched():
    _, fused = make()
    for parameter in fused.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
        parameter.grad[:2] = 1
    loss_of(fused, *inputs(experts=2)).backward()
    for parameter in fused.parameters():
        assert parameter.grad[:2].isfinite().all() and parameter.grad[2:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_pairs(added, dtype):
    plain, fused = make(dtype)
    for layer in (plain, fused):
        for step in range(2):
            tokens, weights, ids = inputs(dtype, step)
            pair_tokens = torch.arange(T).repeat_interleave(K)
            loss_of(layer, tokens, weights.flatten(), ids.flatten(), pair_tokens).backward()
    check(fused, plain, dtype)
    assert added == [1, 1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("own_dtype", [False, True])
def test_main_grad(added, dtype, own_dtype):
    plain, fused = make(dtype)
    kept = dtype if own_dtype or dtype == torch.float64 else torch.float32
    expected = {}
    for name, parameter in projections(fused).items():
        parameter.main_grad = torch.ones_like(parameter, dtype=kept)
        expected[name] = torch.ones_like(parameter, dtype=torch.float64)
    fused.down_proj.grad_added_to_main_grad = False
    for step in range(3):
        loss_of(fused, *inputs(dtype, step)).backward()
        plain.zero_grad()
        loss_of(plain, *inputs(dtype, step)).backward()
        for name, parameter in projections(plain).items():
            expected[name] += parameter.grad
    for name, parameter in projections(fused).items():
        assert parameter.grad is None
        assert_close(parameter.main_grad, expected[name], dtype)
        if kept == torch.float32 and dtype != torch.float32:  # not rounded to dtype in between
            assert relative_error(parameter.main_grad, expected[name]) < 4 * torch.finfo(dtype).eps
    assert fused.down_proj.grad_added_to_main_grad is True
    assert not hasattr(fused.gate_up_proj, "grad_added_to_main_grad")
    assert added == [3, 3]


def test_main_grad_with_a_trainers_hooks():
    """Hooks on the node that accumulates, as Megatron's: they run, see the mark, add nothing."""
    plain, fused = make()
    calls = []
    nodes = []
    for parameter in projections(fused).values():
        parameter.main_grad = torch.zeros_like(parameter)
        parameter.grad_added_to_main_grad = False
        node = parameter.view_as(parameter).grad_fn.next_functions[0][0]

        def add(*unused, parameter=parameter):
            assert parameter.grad is not None
            calls.append(parameter.grad_added_to_main_grad)
            if not parameter.grad_added_to_main_grad:
                parameter.main_grad += parameter.grad
            parameter.grad = None

        node.register_hook(add)
        nodes.append(node)
    for layer in (plain, fused):
        for step in range(2):
            loss_of(layer, *inputs(step=step)).backward()
    assert calls == [True] * 4
    for name, parameter in projections(plain).items():
        assert torch.equal(getattr(fused, name).main_grad, parameter.grad)


@pytest.mark.parametrize(
    "make_grad",
    [
        lambda p: torch.zeros(2, 3),
        lambda p: torch.zeros_like(p, dtype=torch.float64),
        lambda p: torch.zeros_like(p, device="meta"),
        lambda p: torch.zeros(*p.shape[:2], 2 * p.shape[2])[..., ::2],
        lambda p: torch.zeros_like(p).requires_grad_(),
    ],
    ids=["shape", "dtype", "device", "strides", "requires_grad"],
)
def test_bad_main_grad(make_grad):
    _, fused = make()
    fused.down_proj.main_grad = make_grad(fused.down_proj)
    with pytest.raises(RuntimeError, match=r"moe_ffn: main_grad of down_proj must be .*, got "):
        loss_of(fused, *inputs()).backward()
    fused.down_proj.main_grad = "none"
    with pytest.raises(TypeError, match="main_grad of down_proj must be a tensor, got str"):
        loss_of(fused, *inputs()).backward()


def test_asking_for_gradients_leaves_them_alone(added):
    """autograd.grad, backward(inputs=) and create_graph get gradients; nothing is added."""
    plain, fused = make()
    micro_batches(plain, torch.float32, 1)
    micro_batches(fused, torch.float32, 1)
    before = fused.down_proj.grad.clone()
    parameters = list(fused.parameters())
    grads = torch.autograd.grad(loss_of(fused, *inputs(step=1)), parameters)
    expected = torch.autograd.grad(loss_of(plain, *inputs(step=1)), list(plain.parameters()))
    assert all(map(torch.equal, grads, expected)) and torch.equal(fused.down_proj.grad, before)
    for layer in (plain, fused):
        loss_of(layer, *inputs(step=2)).backward(inputs=[layer.down_proj])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of cycles
            loss_of(layer, *inputs(step=3)).backward(create_graph=True)
    check(fused, plain)
    assert added == [0, 0]


def test_gradients_come_and_go_between_forward_and_backward(added):
    plain, fused = make()
    for layer in (plain, fused):
        micro_batches(layer, torch.float32, 1)
        loss = loss_of(layer, *inputs(step=1))
        layer.zero_grad()  # None again
        loss.backward(retain_graph=True)  # plain
        loss.backward(retain_graph=True)  # added
        layer.zero_grad(set_to_none=False)
        loss.backward()
    check(fused, plain)
    assert added == [2, 2]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("recompute", ["activation", "hidden"])
def test_checkpointing(added, reentrant, recompute):
    plain, fused = make(recompute=recompute)
    for layer in (plain, fused):
        for step in range(2):
            args = inputs(step=step)
            out = checkpoint(layer, *args, use_reentrant=reentrant)
            out.square().sum().backward()
    check(fused, plain)
    assert added == [1, 1]


def test_a_layer_twice_and_tied_weights(added):
    plain, fused = make()
    for layer in (plain, fused):
        other = GroupedExperts(E, H, I, fuse_grad_accumulation=layer is fused)
        other.gate_up_proj, other.down_proj = layer.gate_up_proj, layer.down_proj
        for step in range(2):
            tokens, *routing = inputs(step=step)
            out = other(layer(layer(tokens, *routing), *routing), *routing)
            (out.square().sum() + layer.down_proj.square().sum()).backward()
    check(fused, plain, exact=False)
    assert added == [3, 3]


def test_plain_where_there_is_no_leaf(added):
    """Views and casts of parameters, autocast, frozen weights."""
    plain, fused = make()
    for layer in (plain, fused):
        micro_batches(layer, torch.float32, 1)
        with torch.autocast("cpu", torch.bfloat16):
            loss_of(layer, *inputs(step=1)).backward()
        tokens, *routing = inputs(step=2)
        weights = layer.gate_up_proj.view_as(layer.gate_up_proj), layer.down_proj * 2
        options = {"fuse_grad_accumulation": layer is fused}
        moe_ext.moe_ffn(tokens, *routing, *weights, **options).square().sum().backward()
    check(fused, plain)
    assert added == [0, 0]
    for layer in (plain, fused):
        layer.down_proj.requires_grad_(False)
        loss_of(layer, *inputs(step=3)).backward()
    check(fused, plain)
    assert added == [1, 0]


def test_compiled():
    plain, fused = make()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    for step in range(2):
        loss_of(plain, *inputs(step=step)).backward()
        loss_of(compiled, *inputs(step=step)).backward()
    check(fused, plain, exact=False)


def test_hooks_turn_it_off_with_a_warning():
    seen, nodes = [], []
    torch.set_warn_always(True)  # torch's own "once" is once for the whole process
    try:
        for kind in ("tensor", "accumulated", "node"):
            plain, fused = make()
            for parameter in (plain.down_proj, fused.down_proj):
                if kind == "tensor":
                    parameter.register_hook(lambda grad: grad * 2)
                elif kind == "accumulated":
                    parameter.register_post_accumulate_grad_hook(lambda p: seen.append(p))
                else:
                    nodes.append(parameter.view_as(parameter).grad_fn.next_functions[0][0])
                    nodes[-1].register_hook(lambda *unused: seen.append(1))
            micro_batches(plain, torch.float32, 2)
            with pytest.warns(UserWarning, match=f"moe_ffn: .* down_proj: it {HOOKS}"):
                micro_batches(fused, torch.float32, 2)
            check(fused, plain)
        assert len(seen) == 8
    finally:
        torch.set_warn_always(False)


def test_version_of_the_gradient_moves():
    _, fused = make()
    micro_batches(fused, torch.float32, 1)
    before = fused.down_proj.grad._version
    micro_batches(fused, torch.float32, 1)
    assert fused.down_proj.grad._version > before


def test_gradient_scaling_and_the_whole_layer(added):
    torch.manual_seed(0)
    layers = [
        moe_ext.MoE(H, I, E, K, bias=True, shared_intermediate_size=8, fuse_grad_accumulation=fuse)
        for fuse in (False, True)
    ]
    layers[1].load_state_dict(layers[0].state_dict())
    assert layers[1].experts.fuse_grad_accumulation
    for layer in layers:
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(3):
            x = inputs(step=step)[0].detach()
            loss = layer(x).square().mean() + moe_ext.total_aux_loss(layer)
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    for ours, expected in zip(layers[1].parameters(), layers[0].parameters(), strict=True):
        assert_close(ours, expected.double(), torch.float32)
    assert added == [2, 2]


def test_option_is_checked():
    with pytest.raises(ValueError, match="GroupedExperts: fuse_grad_accumulation must be "):
        GroupedExperts(2, 4, 4, fuse_grad_accumulation=1)
    config = moe_ext.MoEConfig(
        hidden_size=4, intermediate_size=4, num_experts=2, top_k=1, fuse_grad_accumulation=True
    )
    assert moe_ext.MoE.from_config(config).experts.fuse_grad_accumulation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_of_the_operator(dtype):
    _, fused = make(dtype)
    tokens, weights, ids = (t.detach() for t in inputs(dtype))
    gate_up, down = (p.detach() for p in fused.parameters())
    forward = torch.ops.moe_ext._moe_ffn_forward
    options = (gate_up, down, None, None, "silu", True)
    out, hidden, row_map, offsets = forward(tokens, weights, ids, None, *options, True)
    backward = torch.ops.moe_ext._expert_ffn_backward_into
    shared = (out, tokens, weights, row_map, None, offsets, hidden, *options)
    for mask in ([True] * 4 + [False] * 2, [False] * 6):
        for into in ((gate_up.float(), None), (gate_up.clone(), down.float())):
            torch.library.opcheck(backward.default, (*shared, mask, *into))
    with pytest.raises(RuntimeError, match="into_down_proj must be contiguous or the transpose"):
        strided = torch.zeros(E, H, 2 * I, dtype=dtype)[..., ::2]
        backward(*shared, [True] * 6, None, strided)
    with pytest.raises(RuntimeError, match="into_down_proj must be .* like its weight or Float"):
        backward(*shared, [True] * 6, None, down.double())
    leaves = leaf(tokens), leaf(gate_up), leaf(down)
    torch.library.opcheck(
        torch.ops.moe_ext.moe_ffn.default,
        (leaves[0], weights, ids, *leaves[1:]),
        {"fuse_grad_accumulation": True},
    )
