import copy
import dataclasses
import inspect
import pickle
import warnings

import pytest
import torch
from conftest import leaf, relative_error
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

import moe_ext
from moe_ext import reference

pytestmark = pytest.mark.usefixtures("on_device")

H, I, E, K = 16, 12, 6, 2

VARIANTS = {
    "default": {},
    "plain": {"gated": False, "activation": "relu2", "bias": True},
    "clamped": {"activation": "swiglu_clamped", "bias": True, "recompute": "hidden"},
    "sigmoid": {
        "score_function": "sigmoid",
        "num_groups": 3,
        "topk_groups": 2,
        "scaling_factor": 2.5,
        "z_loss_coef": 1e-2,
    },
    "shared": {"shared_intermediate_size": 20, "renormalize": False, "temperature": 2.0},
}


@pytest.fixture(params=list(VARIANTS))
def variant(request) -> dict:
    return VARIANTS[request.param]


def make_layer(**options) -> moe_ext.MoE:
    torch.manual_seed(0)
    return moe_ext.MoE(H, I, E, K, **{"init_std": 0.3, **options})


def expected_output(layer: moe_ext.MoE, x, v: dict, ids=None):
    """The layer's definition in terms of the reference."""
    tokens = x.reshape(-1, H)
    logits = reference.router_logits(tokens, layer.router.weight) / v.get("temperature", 1.0)
    routing = {k: v[k] for k in ("score_function", "renormalize", "scaling_factor") if k in v}
    if ids is None:
        groups = {k: v[k] for k in ("num_groups", "topk_groups") if k in v}
        weights, ids, probs = reference.topk_router(logits, K, **routing, **groups)
    else:
        weights, probs = reference.router_weights(logits, ids, **routing)
    experts = dict(layer.experts.named_parameters())
    up = "gate_up_proj" if "gate_up_proj" in experts else "up_proj"
    options = {
        "activation": v.get("activation", "silu"),
        "gated": v.get("gated", True),
    }
    y = reference.moe_ffn(
        tokens,
        weights,
        ids,
        experts[up],
        experts["down_proj"],
        gate_up_bias=experts.get(f"{up}_bias"),
        down_bias=experts.get("down_proj_bias"),
        **options,
    )
    if layer.shared_expert is not None:
        one = tokens.new_ones(len(tokens), 1)
        shared = dict(layer.shared_expert.named_parameters())
        y = y + reference.moe_ffn(
            tokens,
            one,
            torch.zeros_like(one).long(),
            shared["gate_up_proj"][None],
            shared["down_proj"][None],
            **options,
        )
    loss = 0.01 * reference.load_balancing_loss(probs, ids)
    loss = loss + v.get("z_loss_coef", 0.0) * reference.router_z_loss(logits)
    return y.reshape(x.shape), loss


def grads_of(layer):
    return {name: p.grad.clone() for name, p in layer.named_parameters()}


@pytest.mark.parametrize("shape", [(3, 5, H), (7, H), (H,), (0, H), (2, 0, H)])
def test_reference(variant, shape):
    layer = make_layer(**variant).double()
    x = torch.randn(shape, dtype=torch.float64)
    results = []
    for run in (
        lambda x: layer(x, return_aux_loss=True),
        lambda x: expected_output(layer, x, variant),
    ):
        layer.zero_grad()
        inputs = leaf(x)
        y, loss = run(inputs)
        assert y.shape == x.shape and y.dtype == x.dtype
        (y.square().sum() + loss).backward()
        results.append((y, loss, inputs.grad, grads_of(layer)))
    (y, loss, grad, grads), (y2, loss2, grad2, grads2) = results
    assert relative_error(y, y2) < 1e-12 and relative_error(grad, grad2) < 1e-11
    assert loss.shape == () and loss.item() == pytest.approx(loss2.item(), rel=1e-6)
    for name, value in grads.items():
        assert value is not None
        assert relative_error(value, grads2[name]) < 1e-6 or not grads2[name].any(), name


def test_parameters():
    """Names and shapes are those of Hugging Face checkpoints."""

    def shapes(**options):
        return {n: list(p.shape) for n, p in make_layer(**options).state_dict().items()}

    assert shapes() == {
        "router.weight": [E, H],
        "experts.gate_up_proj": [E, 2 * I, H],
        "experts.down_proj": [E, H, I],
    }
    assert shapes(gated=False, bias=True, shared_intermediate_size=5) == {
        "router.weight": [E, H],
        "experts.up_proj": [E, I, H],
        "experts.down_proj": [E, H, I],
        "experts.up_proj_bias": [E, I],
        "experts.down_proj_bias": [E, H],
        "shared_expert.up_proj": [5, H],
        "shared_expert.down_proj": [H, 5],
    }
    assert shapes(bias=True, shared_intermediate_size=5) == {
        "router.weight": [E, H],
        "experts.gate_up_proj": [E, 2 * I, H],
        "experts.down_proj": [E, H, I],
        "experts.gate_up_proj_bias": [E, 2 * I],
        "experts.down_proj_bias": [E, H],
        "shared_expert.gate_up_proj": [10, H],
        "shared_expert.down_proj": [H, 5],
    }


def test_config():
    arguments = inspect.signature(moe_ext.MoE).parameters
    fields = dataclasses.fields(moe_ext.MoEConfig)
    assert [field.name for field in fields] == list(arguments)
    for field in fields:
        missing = field.default is dataclasses.MISSING
        assert missing == (arguments[field.name].default is inspect.Parameter.empty)
        assert missing or field.default == arguments[field.name].default
    config = moe_ext.MoEConfig(
        hidden_size=H, intermediate_size=I, num_experts=E, top_k=K, gated=False, z_loss_coef=0.1
    )
    layer = moe_ext.MoE.from_config(config)
    assert layer.experts.up_proj.shape == (E, I, H) and layer.z_loss_coef == 0.1


def test_statistics():
    layer = make_layer()
    x = torch.randn(40, H)
    ids = layer.router(x).topk_ids
    layer(x)
    counts, dropped = layer.last_stats
    assert torch.equal(counts, torch.bincount(ids.flatten(), minlength=E)) and dropped == 0
    assert counts.dtype == dropped.dtype == torch.int64 and dropped.shape == ()


def test_given_ids(variant):
    layer = make_layer(**variant).double()
    x = torch.randn(3, 5, H, dtype=torch.float64)
    ids = torch.randint(-1, E + 1, (3, 5, K))
    expected, _ = expected_output(layer, x, variant, ids.view(-1, K))
    y = layer(x, topk_ids=ids)
    assert relative_error(y, expected) < 1e-12
    y.sum().backward()
    assert layer.router.weight.grad.any()


@pytest.mark.parametrize("garbage", [0.0, float("nan")])
def test_token_mask(variant, garbage):
    """Masked tokens are zeros, whatever they held, and count nowhere."""
    layer = make_layer(**variant)
    x, mask = torch.randn(4, 6, H), torch.rand(4, 6) > 0.3
    layer.zero_grad()
    kept = leaf(x[mask])
    y_kept, loss_kept = layer(kept, return_aux_loss=True)
    (y_kept.square().sum() + loss_kept).backward()
    grads = grads_of(layer)
    layer.zero_grad()
    x[~mask] = garbage
    x = leaf(x)
    y, loss = layer(x, token_mask=mask, return_aux_loss=True)
    (y.square().sum() + loss).backward()
    assert not y[~mask].any() and not x.grad[~mask].any()
    assert relative_error(y[mask], y_kept) < 1e-6
    assert loss.item() == pytest.approx(loss_kept.item(), rel=1e-5)
    assert layer.last_stats.tokens_per_expert.sum() == mask.sum() * K
    for name, grad in grads_of(layer).items():
        assert relative_error(grad, grads[name]) < 1e-5, name
    y = layer(x, token_mask=torch.zeros(4, 6, dtype=torch.bool))
    assert not y.any() and layer.last_aux_loss == 0


class TestAuxLoss:
    def gradients(self, take, **options):
        layer = make_layer(z_loss_coef=0.1, aux_loss_coef=0.5, **options)
        x = leaf(torch.randn(20, H))
        loss = take(layer, x)
        loss.backward()
        return layer.router.weight.grad, x.grad

    def test_three_ways_agree(self):
        def returned(layer, x):
            y, loss = layer(x, return_aux_loss=True)
            assert torch.equal(loss, layer.last_aux_loss)
            return y.sum() + loss

        def totalled(layer, x):
            model = nn.Sequential(nn.Identity(), layer)
            return model(x).sum() + moe_ext.total_aux_loss(model)

        def injected(layer, x):
            y = layer(x).sum()
            assert layer.last_aux_loss > 0 and not layer.last_aux_loss.requires_grad
            return y + moe_ext.total_aux_loss(layer)  # no second gradient

        torch.manual_seed(1)
        expected = self.gradients(returned)
        plain = self.gradients(lambda layer, x: layer(x).sum())
        assert relative_error(plain[0], expected[0]) > 1e-3
        for take, options in ((totalled, {}), (injected, {"inject_aux_loss": True})):
            torch.manual_seed(1)
            for actual, value in zip(self.gradients(take, **options), expected, strict=True):
                assert relative_error(actual, value) < 1e-6

    def test_two_layers(self):
        model = nn.Sequential(make_layer(), nn.Tanh(), make_layer(z_loss_coef=0.2))
        model(torch.randn(9, H))
        assert torch.equal(
            moe_ext.total_aux_loss(model), model[0].last_aux_loss + model[2].last_aux_loss
        )
        assert moe_ext.total_aux_loss(nn.Linear(2, 2)) == 0

    def test_no_coefficient(self):
        layer = make_layer(balance="none")
        _, loss = layer(torch.randn(9, H), return_aux_loss=True)
        assert loss == 0 and loss.dtype == torch.float32
        layer = make_layer(balance="none", z_loss_coef=0.1)  # the z-loss stays
        layer(torch.randn(9, H))
        assert layer.last_aux_loss > 0

    def test_warns_once_when_nobody_takes_it(self):
        layer, x = make_layer(), torch.randn(9, H)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(5):
                layer(x)
        assert len(caught) == 1 and "auxiliary loss was never used" in str(caught[0].message)

    @pytest.mark.parametrize("how", ["returned", "total", "inject", "none", "eval", "no_grad"])
    def test_does_not_warn(self, how):
        layer = make_layer(
            inject_aux_loss=how == "inject", balance="none" if how == "none" else "aux_loss"
        )
        layer.train(how != "eval")
        with warnings.catch_warnings(), torch.set_grad_enabled(how != "no_grad"):
            warnings.simplefilter("error")
            for _ in range(3):
                layer(torch.randn(9, H), return_aux_loss=how == "returned")
                if how == "total":
                    moe_ext.total_aux_loss(layer)


def test_jitter_moves_the_router_only():
    layer = make_layer(jitter=0.3)
    x = torch.randn(50, H)
    assert not torch.equal(layer.router(x).router_logits, layer.router(x).router_logits)
    layer.eval()
    assert torch.equal(layer.router(x).router_logits, layer.router(x).router_logits)


def test_any_router():
    class First(nn.Module):
        def forward(self, tokens, topk_ids=None):
            logits = tokens[:, :E]
            return moe_ext.RouterOutput(*moe_ext.topk_router(logits, 1), logits)

    layer = moe_ext.MoE(H, I, E, 1, router=First())
    x = torch.randn(9, H)
    layer(x)
    assert torch.equal(
        layer.last_stats.tokens_per_expert, torch.bincount(x[:, :E].argmax(1), minlength=E)
    )


def test_ids_of_a_router_that_are_no_experts_count_as_dropped():
    class Beyond(nn.Module):
        def forward(self, tokens, topk_ids=None):
            logits = tokens[:, :E]
            weights, ids, probs = moe_ext.topk_router(logits, K)
            return moe_ext.RouterOutput(weights, ids + 2, probs, logits)

    layer = make_layer(router=Beyond())
    layer(torch.randn(30, H))
    stats = layer.last_stats
    assert stats.dropped > 0 and stats.dropped + stats.tokens_per_expert.sum() == 30 * K
    masked = torch.arange(30) < 10  # slots of -1 are nobody's loss
    layer(torch.randn(30, H), token_mask=masked)
    assert layer.last_stats.dropped + layer.last_stats.tokens_per_expert.sum() == 10 * K


def test_the_routers_options_are_the_layers_too():
    options = {
        "balance_per": "sequence",
        "normalize_by_topk": False,
        "capacity_factor": 1.0,
        "capacity_bounds": (1.0, 2.0),
    }
    layer = make_layer(**options)
    for name, value in options.items():
        assert getattr(layer.router, name) == value
    assert (
        moe_ext.MoE.from_config(
            moe_ext.MoEConfig(
                hidden_size=H, intermediate_size=I, num_experts=E, top_k=K, balance_per="sequence"
            )
        ).router.balance_per
        == "sequence"
    )


@pytest.mark.parametrize("moved", [False, True])
def test_made_in_inference_mode(variant, moved):
    """It runs, and trains what can be trained, outside of it."""
    with torch.inference_mode():
        layer = make_layer(balance="bias", **variant)
        if moved:
            layer = layer.double().float()
        expected = layer(torch.ones(9, H))
    with torch.no_grad():
        assert torch.equal(layer(torch.ones(9, H)), expected)
        layer.router.update_expert_bias()
    assert layer.last_stats.tokens_per_expert.sum() == 9 * K


def test_copies_and_checkpoints(variant, tmp_path):
    layer, x = make_layer(**variant), torch.randn(9, H)
    y, _ = layer(x, return_aux_loss=True)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), y)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    twin = moe_ext.MoE(H, I, E, K, **variant)
    twin.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(twin(x), y)


def test_meta_and_assign(device):
    """A layer that was made on meta and got its tensors from a checkpoint is a whole one."""
    with torch.device(device):
        whole = make_layer(balance="bias", bias_update_rate=0.1)
    layer = make_layer(balance="bias", bias_update_rate=0.1, device="meta")
    layer.load_state_dict(copy.deepcopy(whole.state_dict()), assign=True)
    x = torch.randn(50, H, device=device)
    for each in (whole, layer):
        each(x)
        each.router.update_expert_bias()
    assert whole.router.expert_bias.any()
    assert torch.equal(layer.router.expert_bias, whole.router.expert_bias)
    assert torch.equal(layer.last_stats.tokens_per_expert, whole.last_stats.tokens_per_expert)
    assert layer.last_stats.dropped.device == x.device


def test_meta_and_to_empty(device, variant):
    with torch.device("meta"):
        layer = moe_ext.MoE(H, I, E, K, balance="none", **{**variant, "z_loss_coef": 0.0})
    assert all(p.is_meta for p in layer.parameters())
    assert layer(torch.randn(5, H, device="meta")).shape == (5, H)
    layer = layer.to_empty(device=device)
    layer.reset_parameters()
    y = layer(torch.randn(5, H))
    assert y.isfinite().all() and layer.last_stats.tokens_per_expert.sum() == 5 * K
    assert abs(layer.experts.down_proj.std() - 0.02) < 0.005


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(variant, dtype):
    layer = moe_ext.MoE(H, I, E, K, dtype=dtype, **{"init_std": 0.3, **variant})
    x = torch.randn(9, H, dtype=dtype, requires_grad=True)
    y = layer(x)
    assert y.dtype == x.dtype and layer.last_aux_loss.dtype == torch.float32
    (y.float().sum() + layer.last_aux_loss).backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(device, variant, dtype):
    layer, x = make_layer(**variant), torch.randn(30, H)
    expected, expected_loss = layer(x, return_aux_loss=True)
    inputs = leaf(x)
    with torch.autocast(device, dtype=dtype):
        y, loss = layer(inputs, return_aux_loss=True)
    assert y.dtype == dtype and torch.equal(loss, expected_loss)  # the router's math is fp32
    assert relative_error(y.float(), expected) < 2**-6
    (y.float().square().mean() + loss).backward()
    assert inputs.grad.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


def test_grad_scaler(device):
    """fp16 training with loss scaling: an overflow is seen and skipped, then the loss falls."""
    layer, x = make_layer(), torch.randn(64, H)
    target = torch.randn(64, H)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**40, growth_interval=1000)
    losses, scales = [], []
    for _ in range(60):
        with torch.autocast(device, dtype=torch.float16):
            y, aux = layer(x, return_aux_loss=True)
        loss = (y.float() - target).square().mean() + aux
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        scales.append(scaler.get_scale())
    assert scales[-1] < 2.0**40 and losses[-1] < 0.8 * losses[0]
    assert all(p.isfinite().all() for p in layer.parameters())


def test_compile_twice_at_most(variant):
    import torch._dynamo.testing

    layer = make_layer(**variant)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for T in range(2, 12):
        x = torch.randn(T, H)
        results = []
        for run in (layer, compiled):
            layer.zero_grad()
            inputs = leaf(x)
            y = run(inputs)
            (y.square().sum() + moe_ext.total_aux_loss(layer)).backward()
            results.append((y, inputs.grad, layer.last_aux_loss, *grads_of(layer).values()))
        for a, b in zip(*results, strict=True):
            assert relative_error(b.detach(), a.detach()) < 1e-5
        assert layer.last_stats.tokens_per_expert.sum() == T * K
    assert counter.frame_count <= 2


def test_compile_with_inductor():
    layer, x = make_layer(z_loss_coef=0.1), torch.randn(9, H)
    compiled = torch.compile(layer, fullgraph=True)
    y, loss = compiled(x, return_aux_loss=True)
    (y.square().sum() + loss).backward()
    grads = grads_of(layer)
    layer.zero_grad()
    expected, expected_loss = layer(x, return_aux_loss=True)
    (expected.square().sum() + expected_loss).backward()
    assert relative_error(y.detach(), expected.detach()) < 1e-5
    for name, grad in grads_of(layer).items():
        assert relative_error(grads[name], grad) < 1e-5, name


def test_export(variant):
    layer = make_layer(**variant).eval()
    program = torch.export.export(
        layer, (torch.randn(4, H),), dynamic_shapes=({0: torch.export.Dim("T", min=2)},)
    )
    for T in (2, 9):
        x = torch.randn(T, H)
        assert relative_error(program.module()(x), layer(x)) < 1e-6


@pytest.mark.parametrize(
    "how,compiled",
    [
        ("total", False),  # a compiled checkpoint can't keep the loss: see the next test
        ("returned", False),
        ("returned", True),
        ("inject", False),
        ("inject", True),
    ],
)
def test_activation_checkpointing(how, compiled):
    layer = make_layer(inject_aux_loss=how == "inject", aux_loss_coef=0.5)
    x = torch.randn(20, H)

    def run(x, checkpointed):
        if checkpointed:
            out = checkpoint(layer, x, use_reentrant=False, return_aux_loss=how == "returned")
        else:
            out = layer(x, return_aux_loss=how == "returned")
        y, loss = out if how == "returned" else (out, 0)
        return y.square().sum() + loss

    results = []
    for checkpointed in (False, True):
        layer.zero_grad()
        inputs = leaf(x)
        function = run
        if checkpointed and compiled:
            function = torch.compile(run, fullgraph=True, backend="aot_eager")
        loss = function(inputs, checkpointed)
        if how == "total":
            loss = loss + moe_ext.total_aux_loss(layer)
        loss.backward()
        stats = layer.last_stats.tokens_per_expert.clone()
        results.append((loss.detach(), inputs.grad, stats, *grads_of(layer).values()))
    for a, b in zip(*results, strict=True):
        assert relative_error(b, a) < 1e-6


def test_compiled_checkpoint_says_that_it_cannot_keep_the_loss():
    layer = make_layer()
    run = torch.compile(
        lambda x: checkpoint(layer, x, use_reentrant=False), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(torch._dynamo.exc.Unsupported, match="side effect"):
        run(leaf(torch.randn(4, H)))
    layer.aux_loss_coef = 0.0  # nothing to keep
    torch.compiler.reset()
    run(leaf(torch.randn(4, H)))


def test_idle_and_frozen_experts():
    layer = make_layer(bias=True, balance="none")
    ids = torch.zeros(9, K, dtype=torch.int64)
    layer(torch.randn(9, H), topk_ids=ids).sum().backward()
    for name, p in layer.experts.named_parameters():
        assert p.grad is not None and p.grad[0].any() and not p.grad[1:].any(), name
    layer.zero_grad()
    layer.experts.requires_grad_(False)
    layer(leaf(torch.randn(9, H))).sum().backward()
    assert all(p.grad is None for p in layer.experts.parameters())
    assert layer.router.weight.grad is not None


BAD_OPTIONS = [
    ({"top_k": 7}, ValueError, "MoE: top_k must be in [1, num_experts=6], got 7"),
    ({"hidden_size": 0}, ValueError, "MoE: hidden_size must be >= 1, got 0"),
    ({"balance": "luck"}, ValueError, "MoE: balance must be aux_loss, bias or none, got 'luck'"),
    ({"aux_loss_coef": -1.0}, ValueError, "MoE: aux_loss_coef must be >= 0, got -1.0"),
    ({"z_loss_coef": -1.0}, ValueError, "MoE: z_loss_coef must be >= 0, got -1.0"),
    (
        {"shared_intermediate_size": -1},
        ValueError,
        "MoE: shared_intermediate_size must be >= 0, got -1",
    ),
    ({"min_capacity": 0}, ValueError, "TopKRouter: min_capacity must be >= 1, got 0"),
    (
        {"drop_policy": "x"},
        ValueError,
        "TopKRouter: drop_policy must be probs or position, got 'x'",
    ),
    (
        {"rounding": "x"},
        ValueError,
        "TopKRouter: rounding must be nearest, up, down, stochastic or balanced, got 'x'",
    ),
    ({"activation": "swish"}, ValueError, "moe_ffn: activation must be silu, "),
    (
        {"activation": "swiglu_clamped", "gated": False},
        ValueError,
        "moe_ffn: activation must be gated for swiglu_clamped, got gated=False",
    ),
    (
        {"recompute": "all"},
        ValueError,
        "GroupedExperts: recompute must be activation or hidden, got 'all'",
    ),
    ({"dtype": torch.float8_e4m3fn}, (RuntimeError, NotImplementedError), ""),
    (
        {"score_function": "x"},
        ValueError,
        "TopKRouter: score_function must be softmax or sigmoid, got 'x'",
    ),
    ({"num_groups": 4}, ValueError, "topk_router: num_groups must divide E=6, got 4"),
    ({"temperature": 0.0}, ValueError, "TopKRouter: temperature must be > 0, got 0.0"),
    ({"jitter": 1.0}, ValueError, "TopKRouter: jitter must be in [0, 1), got 1.0"),
    ({"capacity_factor": 0.0}, ValueError, "TopKRouter: capacity_factor must be > 0, got 0.0"),
    (
        {"eval_capacity_factor": -1.0},
        ValueError,
        "TopKRouter: eval_capacity_factor must be > 0, got -1.0",
    ),
    ({"tile_size": 0}, ValueError, "TopKRouter: tile_size must be >= 1, got 0"),
    (
        {"balance": "bias", "bias_update_rate": -1.0},
        ValueError,
        "TopKRouter: bias_update_rate must be >= 0, got -1.0",
    ),
    (
        {"router": moe_ext.TopKRouter(H, E, K), "tile_size": 64},
        ValueError,
        "MoE: tile_size must be left to the router where one is given, got 64",
    ),
    (
        {"router": moe_ext.TopKRouter(H, E, K), "balance": "bias"},
        ValueError,
        "MoE: router must be one with bias_update_rate, got TopKRouter(",
    ),
]


@pytest.mark.parametrize("options,error,message", BAD_OPTIONS)
def test_bad_options(options, error, message):
    sizes = {"hidden_size": H, "intermediate_size": I, "num_experts": E, "top_k": K}
    with pytest.raises(error) as caught:
        moe_ext.MoE(**{**sizes, **options})
    assert str(caught.value).startswith(message)


BAD_CALLS = [
    ({"x": torch.zeros(3, H + 1)}, f"MoE: x must be [..., H={H}], got [3, {H + 1}]"),
    ({"x": torch.zeros(())}, f"MoE: x must be [..., H={H}], got []"),
    ({"token_mask": torch.ones(4).bool()}, "MoE: token_mask must be [3], got [4]"),
    ({"token_mask": torch.ones(3)}, "MoE: token_mask must be torch.bool, got torch.float32"),
    (
        {"topk_ids": torch.ones(4, K).long()},
        f"MoE: topk_ids must be [3, {K}] (K={K}), got [4, {K}]",
    ),
    (
        {"topk_ids": torch.ones(3, 0).long()},
        f"MoE: topk_ids must be [3, {K}] (K={K}), got [3, 0]",
    ),
    (
        {"x": torch.zeros(3, H).double()},
        "GroupedExperts: tokens (the layer's x) must be torch.float32 like its weights, got "
        "torch.float64: convert one of them with .to(), or run it under torch.autocast",
    ),
]


@pytest.mark.parametrize("arguments,message", BAD_CALLS)
def test_bad_calls(arguments, message):
    with pytest.raises(RuntimeError) as caught:
        make_layer()(**{"x": torch.zeros(3, H), **arguments})
    assert str(caught.value).startswith(message)


def test_grouped_experts_alone():
    experts = moe_ext.GroupedExperts(E, H, I, activation="gelu", gated=False, bias=True)
    tokens, weights = torch.randn(9, H), torch.rand(9, K)
    ids = torch.randint(E, (9, K))
    assert torch.equal(
        experts(tokens, weights, ids),
        moe_ext.moe_ffn(
            tokens,
            weights,
            ids,
            experts.up_proj,
            experts.down_proj,
            gate_up_bias=experts.up_proj_bias,
            down_bias=experts.down_proj_bias,
            activation="gelu",
            gated=False,
        ),
    )


def test_version_guard():
    with pytest.raises(ImportError, match=r"built for torch 2\.11\.0, but torch 2\.13\.0\+cpu"):
        moe_ext._check_torch("2.11.0", "2.13.0+cpu")
    moe_ext._check_torch("2.13.1", "2.13.0+cpu")
    assert moe_ext.build_info()["openmp"]
