"""The router modules and the balance methods, in the layer and alone."""

import copy
import math
import pickle
import warnings

import pytest
import torch
from conftest import leaf, relative_error
from torch import nn
from torch.utils.checkpoint import checkpoint

import moe_ext
from moe_ext import reference

pytestmark = pytest.mark.usefixtures("on_device", "fresh_compiler")

H, I, E, K = 10, 6, 6, 2
NOISE_SEED = 7


def top_k(**options):
    return lambda: moe_ext.TopKRouter(H, E, K, init_std=0.5, **options)


def other(cls, **options):
    return lambda: cls(H, E, K, init_std=0.5, **options)


ROUTERS = {
    "bias": top_k(bias_update_rate=0.1),
    "capacity": top_k(capacity_factor=0.8, min_capacity=1),
    "position": top_k(capacity_factor=0.8, drop_policy="position", score_function="sigmoid"),
    "dynamic capacity": top_k(capacity_factor=0.6, capacity_bounds=(0.5, 2.0), min_capacity=1),
    **{
        f"rounding {name}": top_k(tile_size=4, rounding=name, scaling_factor=2.5)
        for name in ("nearest", "up", "down", "stochastic", "balanced")
    },
    "rounding sigmoid": top_k(tile_size=4, score_function="sigmoid", renormalize=False),
    "rounding and capacity": top_k(tile_size=4, rounding="up", capacity_factor=1.0),
    "noisy": other(moe_ext.NoisyTopKRouter),
    "expert choice": other(moe_ext.ExpertChoiceRouter, scaling_factor=1.5),
    "hierarchical": other(moe_ext.HierarchicalRouter, num_groups=3),
    "two groups": other(moe_ext.HierarchicalRouter, num_groups=3, topk_groups=2, renormalize=True),
    "hierarchical capacity": other(
        moe_ext.HierarchicalRouter, num_groups=2, capacity_factor=0.8, min_capacity=1
    ),
}


@pytest.fixture(params=list(ROUTERS))
def name(request) -> str:
    return request.param


def make_router(name: str) -> moe_ext.TopKRouter:
    torch.manual_seed(0)
    router = ROUTERS[name]()
    for parameter_name, parameter in router.named_parameters():
        if "noise" in parameter_name:
            nn.init.normal_(parameter)
    if router.expert_bias is not None:
        nn.init.normal_(router.expert_bias)
    return router


def make_layer(name: str, **options) -> moe_ext.MoE:
    router = make_router(name)
    return moe_ext.MoE(H, I, E, K, router=router, init_std=0.4, **options)


def expected_routing(router, tokens):
    """weights, ids, probs, logits and pairs by the definitions, with the reference's operators."""
    logits = reference.router_logits(tokens, router.weight)
    options = {
        "score_function": router.score_function,
        "renormalize": router.renormalize,
        "scaling_factor": router.scaling_factor,
    }
    if isinstance(router, moe_ext.NoisyTopKRouter) and router.training:
        size = torch.log1p(reference.router_logits(tokens, router.noise_weight).exp())
        torch.manual_seed(NOISE_SEED)
        logits = logits + torch.randn_like(logits) * size
    if isinstance(router, moe_ext.HierarchicalRouter):
        groups = reference.router_logits(tokens, router.group_weight)
        size = E // router.num_groups
        p_group = groups.softmax(1)
        p_within = logits.unflatten(1, (-1, size)).softmax(2)
        probs = (p_group.unsqueeze(2) * p_within).flatten(1)
        ids = []
        for t in range(len(tokens)):
            row = []
            for g in p_group[t].argsort(descending=True)[: router.topk_groups].tolist():
                best = p_within[t, g].argsort(descending=True)[: K // router.topk_groups]
                row += [g * size + e for e in best.tolist()]
            ids.append(row)
        ids = torch.tensor(ids).view(-1, K)
        weights = probs.gather(1, ids)
        if router.renormalize:
            weights = weights / weights.sum(1, keepdim=True)
        logits = logits + groups.repeat_interleave(size, 1)
    else:
        weights, ids, probs = reference.topk_router(
            logits, K, expert_bias=router.expert_bias, **options
        )
    chosen, pairs = ids, None
    factor = router.capacity_factor
    limits = {"min_capacity": router.min_capacity}
    if router.training and isinstance(router, moe_ext.ExpertChoiceRouter):
        pairs = [(t, e, -1) for t, e in reference.expert_choice(probs, None, K)]
    elif router.training and router.tile_size is not None:
        noise = None
        if router.rounding == "stochastic":
            torch.manual_seed(NOISE_SEED)
            noise = torch.rand(E, dtype=torch.float64)
        pairs = reference.round_tokens(
            probs,
            weights,
            ids,
            tile_size=router.tile_size,
            rounding=router.rounding,
            capacity_factor=factor,
            noise=noise,
            **limits,
        )
        kept = {slot for _, _, slot in pairs}
        slots = torch.arange(ids.numel()).view_as(ids)
        ids = ids.masked_fill(~slots.apply_(lambda slot: slot in kept).bool(), -1)
    elif router.training and factor is not None:
        limits["drop_policy"] = router.drop_policy
        ids = reference.apply_capacity(weights, ids, factor, E, **limits)
    if pairs is not None:
        scale = router.scaling_factor
        pairs = [
            (t, e, weights.flatten()[slot] if slot >= 0 else scale * probs[t, e])
            for t, e, slot in pairs
        ]
    return weights.masked_fill(ids < 0, 0), ids, probs, logits, pairs, chosen


def expected_output(layer, tokens):
    weights, ids, probs, logits, pairs, chosen = expected_routing(layer.router, tokens)
    experts = layer.experts.gate_up_proj, layer.experts.down_proj
    if pairs is None:
        y = reference.moe_ffn(tokens, weights, ids, *experts)
        counted = ids[ids >= 0]
    else:
        counted = torch.tensor([e for _, e, _ in pairs]).long()
        y = reference.moe_ffn_pairs(
            tokens,
            torch.stack([w for _, _, w in pairs]),
            counted,
            torch.tensor([t for t, _, _ in pairs]),
            *experts,
        )
    loss = 0.5 * reference.load_balancing_loss(probs, chosen) + 0.1 * reference.router_z_loss(
        logits
    )
    return y, loss, torch.bincount(counted, minlength=E), (chosen >= 0).sum() - (ids >= 0).sum()


@pytest.mark.parametrize("training", [True, False])
def test_layer_is_the_references(name, training):
    layer = make_layer(name, aux_loss_coef=0.5, z_loss_coef=0.1).double().train(training)
    x = torch.randn(30, H, dtype=torch.float64)
    results, losses = [], []
    for run in (lambda x: (*layer(x, return_aux_loss=True), *layer.last_stats), None):
        layer.zero_grad()
        inputs = leaf(x)
        torch.manual_seed(NOISE_SEED)
        y, loss, counts, dropped = run(inputs) if run else expected_output(layer, inputs)
        (y.square().sum() + loss).backward()
        grads = [p.grad for _, p in sorted(layer.named_parameters()) if p.grad is not None]
        results.append((y.detach(), inputs.grad, counts.clone(), dropped.clone(), *grads))
        losses.append(loss.item())
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual, expected) < 1e-6
    assert relative_error(results[0][0], results[1][0]) < 1e-12
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    drops = training and any(word in name for word in ("capacity", "position", "rounding d"))
    assert bool(layer.last_stats.dropped > 0) == drops or "rounding" in name


def test_gradcheck(name):
    router = make_router(name).double()
    tokens = leaf(torch.randn(16, H, dtype=torch.float64))

    def run(tokens, *parameters):
        names = [n for n, _ in router.named_parameters()]
        torch.manual_seed(NOISE_SEED)
        routed = torch.func.functional_call(
            router, dict(zip(names, parameters, strict=True)), (tokens,)
        )
        out = [routed.topk_weights, routed.router_probs, routed.router_logits]
        return (*out, *(routed.pairs[2:] if routed.pairs else ()))

    torch.autograd.gradcheck(run, [tokens, *(leaf(p) for p in router.parameters())])


def test_masked_tokens_do_not_exist(name):
    """A masked run is the run of the other tokens alone."""
    layer = make_layer(name, aux_loss_coef=0.5)
    x, mask = torch.randn(60, H), torch.rand(60) < 0.7
    torch.manual_seed(NOISE_SEED)
    expected, expected_loss = layer(x[mask], return_aux_loss=True)
    stats = [value.clone() for value in layer.last_stats]
    x[~mask] = torch.nan
    if name == "noisy":  # other noise for other shapes
        nn.init.constant_(layer.router.noise_weight, 0.0)
        layer.router.eval()
        expected, expected_loss = layer(x[mask], return_aux_loss=True)
        stats = [value.clone() for value in layer.last_stats]
    torch.manual_seed(NOISE_SEED)
    y, loss = layer(x, token_mask=mask, return_aux_loss=True)
    assert relative_error(y[mask], expected) < 1e-6 and not y[~mask].any()
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(layer.last_stats, stats, strict=True))
    layer(x, token_mask=torch.zeros(60, dtype=torch.bool))
    assert not layer.last_stats.tokens_per_expert.any() and layer.last_stats.dropped == 0


def test_a_router_that_knows_no_masks():
    """The layer masks ids and pairs itself."""

    class Mine(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, tokens, topk_ids=None):
            return self.inner(tokens, topk_ids)

    for name in ("capacity", "expert choice"):
        layer = moe_ext.MoE(H, I, E, K, router=Mine(make_router(name)), init_std=0.4)
        x, mask = torch.randn(30, H), torch.rand(30) < 0.5
        routed = layer.router(x.masked_fill(~mask.unsqueeze(1), 0))
        full = layer(x.masked_fill(~mask.unsqueeze(1), 0))
        y = layer(x, token_mask=mask)
        assert not y[~mask].any() and relative_error(y[mask], full[mask]) < 1e-6
        if routed.pairs is None:
            kept = routed.topk_ids[mask]
            assert layer.last_stats.dropped == (kept < 0).sum() > 0
        else:
            kept = torch.tensor(
                [e for t, e in zip(*(x.tolist() for x in routed.pairs[:2]), strict=True) if mask[t]]
            )
        counts = torch.bincount(kept[kept >= 0], minlength=E)
        assert torch.equal(layer.last_stats.tokens_per_expert, counts)


def test_a_router_with_a_loss_of_its_own():
    class Mine(moe_ext.TopKRouter):
        def load_balancing_loss(self, routed, token_mask=None, num_sequences=1):
            return routed.router_probs.sum() * 0 + num_sequences

    layer = moe_ext.MoE(H, I, E, K, router=Mine(H, E, K), aux_loss_coef=0.5)
    assert layer(torch.randn(3, 4, H), return_aux_loss=True)[1] == 1.5


def test_given_ids_switch_limits_off(name):
    layer = make_layer(name)
    ids = torch.zeros(3, 10, K, dtype=torch.int64)
    ids[..., 1] = -1
    y = layer(torch.randn(3, 10, H), topk_ids=ids)
    assert layer.last_stats.tokens_per_expert.tolist() == [30, 0, 0, 0, 0, 0]
    assert layer.last_stats.dropped == 0
    y.sum().backward()
    assert all(p.grad is not None for p in layer.router.parameters())


def test_compiled(name):
    layer = make_layer(name, aux_loss_coef=0.5)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (24, 40):
        x, results = torch.randn(T, H), []
        for run in (layer, compiled):
            layer.zero_grad()
            torch.manual_seed(NOISE_SEED)
            inputs = leaf(x)
            y, loss = run(inputs, return_aux_loss=True)
            (y.square().sum() + loss).backward()
            stats = [value.clone() for value in layer.last_stats]
            grads = [p.grad for p in layer.parameters() if p.grad is not None]
            results.append((y.detach(), inputs.grad, *stats, *grads))
        if name in ("noisy", "rounding stochastic"):
            continue  # other random numbers; that they run is what is tested
        for a, b in zip(*results, strict=True):
            assert relative_error(b, a) < 1e-5


def test_checkpointed(name):
    """The recomputation draws the same noise and chooses the same experts."""
    x, results = torch.randn(30, H), []
    for checkpointed in (False, True):
        layer = make_layer(name, inject_aux_loss=True)
        inputs = leaf(x)
        torch.manual_seed(NOISE_SEED)
        y = checkpoint(layer, inputs, use_reentrant=False) if checkpointed else layer(inputs)
        torch.rand(7)  # the generator has moved on when backward comes
        y.square().sum().backward()
        stats = [value.clone() for value in layer.last_stats]
        counters = layer.router._counters.clone()
        grads = [p.grad for p in layer.parameters() if p.grad is not None]
        results.append((y.detach(), inputs.grad, counters, *stats, *grads))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_exported(name):
    layer = make_layer(name).eval()
    program = torch.export.export(
        layer, (torch.randn(4, H),), dynamic_shapes=({0: torch.export.Dim("T", min=2)},)
    )
    x = torch.randn(9, H)
    assert relative_error(program.module()(x), layer(x)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_and_autocast(device, name, dtype):
    layer = make_layer(name)
    x = leaf(torch.randn(30, H))
    with torch.autocast(device, dtype=dtype):
        y, loss = layer(x, return_aux_loss=True)
    assert y.dtype == dtype and loss.dtype == torch.float32
    (y.float().sum() + loss).backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
    layer = layer.to(dtype)
    y, loss = layer(x.to(dtype), return_aux_loss=True)
    (y.float().sum() + loss).backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in layer.parameters())


def test_copies(name, tmp_path):
    layer = make_layer(name).eval()
    x = torch.randn(30, H)
    y = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), y)
    twin = make_layer(name).eval()
    for parameter in twin.parameters():
        nn.init.zeros_(parameter)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), y)


def test_meta_and_to_empty(device, name):
    with torch.device("meta"):
        router = ROUTERS[name]()
    assert router(torch.randn(40, H, device="meta")).router_probs.shape == (40, E)
    router = router.to_empty(device=device)
    router.reset_parameters()
    routed = router(torch.randn(40, H))
    assert routed.topk_weights.isfinite().all()
    assert router._counters.sum() == (40 * K if router._counters[0].any() else 0)


def test_no_tokens(name):
    layer = make_layer(name)
    y, loss = layer(torch.randn(0, H), return_aux_loss=True)
    assert y.shape == (0, H) and loss == 0
    y, loss = layer(torch.randn(0, 3, H), return_aux_loss=True)
    (y.sum() + loss).backward()
    assert all(p.grad is not None and not p.grad.any() for p in layer.experts.parameters())


# --- each method by itself ----------------------------------------------------------------------


def test_eval_capacity():
    layer = moe_ext.MoE(H, I, E, K, capacity_factor=0.5, eval_capacity_factor=0.25, min_capacity=1)
    x = torch.randn(60, H)
    layer(x)
    assert layer.last_stats.tokens_per_expert.max() <= 10
    layer.eval()
    layer(x)
    assert layer.last_stats.tokens_per_expert.max() <= 5
    assert layer.last_stats.dropped == 120 - layer.last_stats.tokens_per_expert.sum() > 0
    only_training = moe_ext.MoE(H, I, E, K, capacity_factor=0.5).eval()
    only_training(x)
    assert only_training.last_stats.dropped == 0


def test_a_token_that_lost_all_its_slots_is_zero():
    layer = moe_ext.MoE(H, I, E, 1, capacity_factor=0.1, min_capacity=1, init_std=0.5)
    x = torch.randn(60, H)
    y = layer(x)
    kept = layer.router(x).topk_ids[:, 0] >= 0
    assert 0 < kept.sum() <= E and y[kept].any(1).all() and not y[~kept].any()


def test_the_loss_counts_the_choice_before_drops():
    x = torch.randn(60, H)
    losses = []
    for options in ({}, {"capacity_factor": 0.3}, {"tile_size": 4, "rounding": "down"}):
        torch.manual_seed(0)
        layer = moe_ext.MoE(H, I, E, K, init_std=0.5, **options)
        losses.append(layer(x, return_aux_loss=True)[1].item())
    assert losses[0] == losses[1] == losses[2]


def test_rounding_is_off_with_a_warning_where_tiles_are_few():
    layer = moe_ext.MoE(H, I, E, K, tile_size=64)
    x = torch.randn(300, H)  # T K / (E M) = 1.6
    with pytest.warns(UserWarning, match=r"TopKRouter: token rounding to 64 is off .* = 1\.6\."):
        layer(x, return_aux_loss=True)
    assert layer.last_stats.tokens_per_expert.sum() == 600
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x, return_aux_loss=True)  # once
        layer(torch.randn(400, H), return_aux_loss=True)
        assert (layer.last_stats.tokens_per_expert % 64 == 0).all()
        layer.eval()
        layer(torch.randn(400, H))
    assert layer.last_stats.tokens_per_expert.sum() == 800
    dense = moe_ext.MoE(H, I, 2, 2, tile_size=64)  # many choices, but of few tokens
    with pytest.warns(UserWarning, match="here T = 63 and"):
        dense(torch.randn(63, H), return_aux_loss=True)
    assert dense.last_stats.tokens_per_expert.tolist() == [63, 63]


def test_dynamic_capacity():
    router = moe_ext.TopKRouter(
        H, E, K, capacity_factor=1.0, capacity_bounds=(1.0, 1.5), min_capacity=1
    )
    tokens = torch.randn(60, H)
    load = torch.bincount(router.eval()(tokens).topk_ids.flatten(), minlength=E).max() / 20
    router.train()

    def most(tokens):
        return torch.bincount(router(tokens).topk_ids.flatten() + 1, minlength=E + 1)[1:].max()

    assert most(tokens) == 20
    router.update_capacity_factor(momentum=0.0)
    assert router.load_average.item() == pytest.approx(load.item())
    expected = min(max(load.item(), 1.0), 1.5)
    assert most(tokens) == min(math.ceil(expected * 20), 20 * load)
    router.update_capacity_factor(momentum=0.5)
    assert router.load_average.item() == pytest.approx(load.item())
    router.update_capacity_factor()  # nothing since
    assert router.load_average.item() == pytest.approx(load.item())
    router.load_average.fill_(9.0)
    assert router._factor(tokens) == 1.5
    router.load_average.fill_(0.1)
    assert router._factor(tokens) == 1.0
    assert "load_average" in router.state_dict()
    with pytest.raises(RuntimeError, match="update_capacity_factor: capacity_bounds must be"):
        moe_ext.TopKRouter(H, E, K).update_capacity_factor()


def test_expert_choice_gives_every_expert_the_same_load():
    layer = make_layer("expert choice")
    layer(torch.randn(60, H))
    assert layer.last_stats.tokens_per_expert.tolist() == [20] * E
    layer.eval()
    layer(torch.randn(60, H))
    assert layer.last_stats.tokens_per_expert.unique().numel() > 1


def test_hierarchical_probabilities():
    router = make_router("two groups").double()
    tokens = torch.randn(20, H, dtype=torch.float64)
    routed = router(tokens)
    assert relative_error(routed.router_probs.sum(1), torch.ones(20).double()) < 1e-12
    group = routed.topk_ids // 2
    assert (group[:, 0] != group[:, 1]).all()  # two groups, one expert of each
    one = make_router("hierarchical")(tokens.float())
    assert (one.topk_ids[:, 0] // 2 == one.topk_ids[:, 1] // 2).all()
    assert relative_error(one.topk_weights, one.router_probs.gather(1, one.topk_ids)) < 1e-6


def test_noise_only_in_training():
    router = make_router("noisy")
    tokens = torch.randn(400, H)
    clean = router.eval()(tokens).router_logits
    router.train()
    noisy = [router(tokens).router_logits for _ in range(30)]
    assert not torch.equal(noisy[0], noisy[1])
    size = nn.functional.softplus(tokens @ router.noise_weight.T)
    spread = (torch.stack(noisy) - clean).div(size).std()
    assert abs(spread - 1) < 0.02


class TestGivenIds:
    def test_replay(self):
        layer, x = make_layer("capacity").eval(), torch.randn(20, H)
        recorded = layer.router(x).topk_ids
        torch.manual_seed(0)
        replayed = moe_ext.MoE(H, I, E, K, router=moe_ext.GivenIdsRouter(H, E, K), init_std=0.4)
        replayed.load_state_dict(layer.state_dict())
        for call in (
            lambda: replayed(x, topk_ids=recorded),
            lambda: replayed.router.give(recorded) or replayed(x),
        ):
            y = call()
            assert torch.equal(y, layer(x))
        y.sum().backward()
        assert replayed.router.weight.grad.any()

    def test_rows_of_minus_one_are_zeros(self):
        router = moe_ext.GivenIdsRouter(H, E, K)
        routed = router(torch.randn(2, H), torch.tensor([[-1, -1], [2, -1]]))
        assert routed.topk_weights.tolist() == [[0, 0], [1, 0]]

    def test_without_ids(self):
        router = moe_ext.GivenIdsRouter(H, E, K)
        with pytest.raises(RuntimeError, match="GivenIdsRouter: topk_ids must be given"):
            router(torch.randn(2, H))
        router.give(torch.zeros(3, K).long())
        with pytest.raises(RuntimeError, match=r"topk_ids must be \[T=2, K=2\], got \[3, 2\]"):
            router(torch.randn(2, H))
        router.give(None)
        with pytest.raises(RuntimeError, match="GivenIdsRouter: topk_ids must be given"):
            router(torch.randn(2, H))

    @pytest.mark.parametrize("num_experts,k", [(1, 1), (6, 6), (7, 3), (8, 2), (256, 8)])
    def test_hash_ids(self, num_experts, k):
        tokens = torch.arange(20_000).view(4, 5000)
        ids = moe_ext.hash_ids(tokens, num_experts, k)
        assert ids.shape == (4, 5000, k) and ids.dtype == torch.int64
        assert ids.min() >= 0 and ids.max() < num_experts
        ordered = ids.sort(-1).values
        assert k == 1 or (ordered[..., 1:] != ordered[..., :-1]).all()
        load = torch.bincount(ids.flatten(), minlength=num_experts) * num_experts / ids.numel()
        assert 0.75 < load.min() and load.max() < 1.25
        assert torch.equal(ids, moe_ext.hash_ids(tokens.int(), num_experts, k))
        if num_experts > 1 and k < num_experts:
            assert not torch.equal(ids, moe_ext.hash_ids(tokens, num_experts, k, seed=1))

    def test_bad_hash(self):
        with pytest.raises(ValueError, match=r"hash_ids: top_k must be in \[1, num_experts=4\]"):
            moe_ext.hash_ids(torch.arange(3), 4, 5)


# --- balance by a bias --------------------------------------------------------------------------


def bias_layer(**options) -> moe_ext.MoE:
    torch.manual_seed(0)
    options = {"init_std": 0.5, "bias_update_rate": 0.1, **options}
    return moe_ext.MoE(H, I, E, K, balance="bias", **options)


def counts_of(layer) -> torch.Tensor:
    """What the next update will see."""
    return layer.router._counters[0] - layer.router._counters[1]


class TestBias:
    def test_update(self):
        layer = bias_layer(score_function="sigmoid")
        x = torch.randn(50, H)
        ids = layer.router.eval()(x).topk_ids
        counts = torch.bincount(ids.flatten(), minlength=E)
        layer.train()
        layer(x)
        assert torch.equal(counts_of(layer), counts)
        layer.router.update_expert_bias()
        expected = 0.1 * (counts.double().mean() - counts).sign()
        expected -= expected.mean()
        assert relative_error(layer.router.expert_bias, expected) < 1e-6
        assert not counts_of(layer).any()
        before = layer.router.expert_bias.clone()
        layer.router.update_expert_bias()  # nothing was counted
        assert relative_error(layer.router.expert_bias, before) < 1e-6
        # The bias moves the choice and no weight.
        routed = layer.router.eval()(x)
        _, ids, _ = reference.topk_router(
            routed.router_logits, K, score_function="sigmoid", expert_bias=layer.router.expert_bias
        )
        assert torch.equal(routed.topk_ids, ids)

    def test_is_a_buffer_in_fp32(self, device):
        layer = bias_layer()
        assert list(layer.state_dict())[:2] == ["router.weight", "router.expert_bias"]
        assert "expert_bias" not in moe_ext.MoE(H, I, E, K).state_dict()
        layer.router.expert_bias.fill_(1 + 2**-20)
        for cast in (layer.bfloat16(), layer.half(), layer.to(device, torch.bfloat16)):
            assert cast.router.weight.dtype in (torch.bfloat16, torch.float16)
            assert cast.router.expert_bias.dtype == torch.float32
            assert cast.router.expert_bias[0] == 1 + 2**-20
        assert layer.double().router.expert_bias.dtype == torch.float64
        layer(torch.randn(5, H).double())
        before = counts_of(layer).clone()
        assert torch.equal(counts_of(layer.type(torch.float32)), before) and before.any()

    def test_counts_training_only(self):
        layer, x = bias_layer(), torch.randn(20, H)
        layer.eval()(x)
        assert not counts_of(layer).any()
        layer.train()(x, topk_ids=torch.zeros(20, K).long())  # not the router's choice
        assert not counts_of(layer).any()
        layer(x, token_mask=torch.arange(20) < 5)
        assert counts_of(layer).sum() == 5 * K
        with torch.no_grad():
            layer(x)
        assert counts_of(layer).sum() == 25 * K

    def test_counts_before_drops(self):
        x = torch.randn(60, H)
        expected = bias_layer()
        expected(x)
        for options in ({"capacity_factor": 0.3}, {"tile_size": 4}):
            layer = bias_layer(**options)
            layer(x)
            assert torch.equal(counts_of(layer), counts_of(expected))

    @pytest.mark.parametrize("options", [{}, {"capacity_factor": 1, "capacity_bounds": (1, 3)}])
    def test_a_run_resumed_before_the_update_is_the_same(self, options, tmp_path):
        x = torch.randn(20, H)
        layer = bias_layer(**options)
        layer(x)
        torch.save(layer.state_dict(), tmp_path / "layer.pt")
        resumed = bias_layer(**options)
        resumed(torch.randn(9, H))  # what it counted before is not of this run
        resumed.load_state_dict(torch.load(tmp_path / "layer.pt"))
        for each in (layer, resumed):
            each(x + 1)
            each.router.update_expert_bias()
            if options:
                each.router.update_capacity_factor()
        assert torch.equal(resumed.router.expert_bias, layer.router.expert_bias)
        assert layer.router.expert_bias.any()
        if options:
            assert torch.equal(resumed.router.load_average, layer.router.load_average)

    def test_checkpoints_without_counts(self):
        """Those of other programs load, strictly too; wrong ones are refused."""
        layer, other = bias_layer(), bias_layer()
        layer(torch.randn(20, H))
        state = layer.state_dict()
        waiting = state.pop("router.waiting_counts")
        assert waiting.shape == (2, E) and waiting.any()
        other.load_state_dict(state)
        state["router.waiting_counts"] = torch.zeros(3)
        with pytest.raises(RuntimeError, match=r"waiting_counts must be \[2, E=6\], got \[3\]"):
            other.load_state_dict(state)
        assert "router.waiting_counts" not in moe_ext.MoE(H, I, E, K).state_dict()

    def test_all_routers_of_a_model(self):
        model = torch.nn.Sequential(bias_layer(), torch.nn.Tanh(), bias_layer())
        model(torch.randn(40, H))
        assert moe_ext.update_expert_bias(model) == 2
        assert model[0].router.expert_bias.any() and model[2].router.expert_bias.any()

    def test_reset(self):
        layer = bias_layer()
        layer(torch.randn(20, H))
        layer.router.update_expert_bias()
        layer(torch.randn(20, H))
        layer.reset_parameters()
        assert not layer.router.expert_bias.any() and not counts_of(layer).any()

    def test_without(self):
        with pytest.raises(RuntimeError, match="update_expert_bias: bias_update_rate must be"):
            moe_ext.MoE(H, I, E, K).router.update_expert_bias()

    @pytest.mark.parametrize(
        "how",
        [
            "accumulated",
            "checkpoint",
            "reentrant checkpoint",
            "compiled",
            "compiled checkpoint",
            "checkpoint of compiled",
            "checkpoint of compiled, inductor",
        ],
    )
    def test_counts_every_forward_once(self, how):
        """Also when checkpointing runs it again, in any nesting with compiling."""
        x = torch.randn(40, H)
        plain = bias_layer()
        plain(x).square().sum().backward()
        expected = counts_of(plain).clone()
        plain.router.update_expert_bias()

        layer = bias_layer()
        backend = "inductor" if "inductor" in how else "aot_eager"
        options = {"fullgraph": True, "backend": backend}

        def checkpointed(x, function=layer):
            return checkpoint(function, x, use_reentrant="reentrant" in how)

        run = layer
        if "checkpoint of compiled" in how:
            compiled = torch.compile(layer, **options)
            run = lambda x: checkpointed(x, compiled)  # noqa: E731
        elif how == "compiled checkpoint":
            run = torch.compile(checkpointed, **options)
        elif "checkpoint" in how:
            run = checkpointed
        elif how == "compiled":
            run = torch.compile(layer, **options)
        for part in x.chunk(4) if how == "accumulated" else [x]:
            run(leaf(part)).square().sum().backward()
        assert torch.equal(counts_of(layer), expected)
        layer.router.update_expert_bias()
        assert torch.equal(layer.router.expert_bias, plain.router.expert_bias)
        if how != "accumulated":
            for a, b in zip(layer.parameters(), plain.parameters(), strict=True):
                assert relative_error(a.grad, b.grad) < 1e-5

    def test_add_once_is_an_operator(self):
        total, value = torch.zeros(3), torch.ones(3)
        torch.library.opcheck(torch.ops.moe_ext._add_once.default, (total, value))
        torch.ops.moe_ext._add_once(total, value)
        assert total.tolist() == [1, 1, 1]


# --- the balance loss's options -----------------------------------------------------------------


def test_loss_per_sequence():
    router = moe_ext.TopKRouter(H, E, K, balance_per="sequence", init_std=0.5)
    layer = moe_ext.MoE(H, I, E, K, router=router, aux_loss_coef=1.0)
    x = torch.randn(3, 20, H)
    mask = torch.rand(3, 20) < 0.7
    _, loss = layer(x, return_aux_loss=True)
    parts = [layer(sequence, return_aux_loss=True)[1] for sequence in x]
    assert loss.item() == pytest.approx(sum(parts).item() / 3, rel=1e-5)
    _, loss = layer(x, return_aux_loss=True, token_mask=mask)
    parts = [
        layer(sequence, return_aux_loss=True, token_mask=m)[1]
        for sequence, m in zip(x, mask, strict=True)
    ]
    assert loss.item() == pytest.approx(sum(parts).item() / 3, rel=1e-5)


def test_hugging_faces_value():
    values = []
    for normalize in (True, False):
        torch.manual_seed(0)
        router = moe_ext.TopKRouter(H, E, K, normalize_by_topk=normalize)
        layer = moe_ext.MoE(H, I, E, K, router=router, aux_loss_coef=1.0)
        values.append(layer(torch.ones(20, H), return_aux_loss=True)[1].item())
    assert values[1] == pytest.approx(K * values[0])


BAD_OPTIONS = [
    (moe_ext.TopKRouter, {"balance_per": "x"}, "balance_per must be batch or sequence, got 'x'"),
    (
        moe_ext.TopKRouter,
        {"capacity_factor": 1.0, "capacity_bounds": (2.0, 1.0)},
        "capacity_bounds must be (least, most) with 0 < least <= most, got (2.0, 1.0)",
    ),
    (
        moe_ext.TopKRouter,
        {"capacity_bounds": (1.0, 2.0)},
        "capacity_factor must be given with capacity_bounds, got None",
    ),
    (
        moe_ext.HierarchicalRouter,
        {"num_groups": 4},
        "num_groups must be a divisor of num_experts=6, got 4",
    ),
    (
        moe_ext.HierarchicalRouter,
        {"num_groups": 3, "topk_groups": 4},
        "topk_groups must be in [1, num_groups=3] and a divisor of top_k=2, got 4",
    ),
    (
        moe_ext.HierarchicalRouter,
        {"num_groups": 6},
        "top_k must be in [1, 1], the chosen groups' experts, got 2",
    ),
    (
        moe_ext.HierarchicalRouter,
        {"num_groups": 3, "bias_update_rate": 0.1},
        "bias_update_rate must be left out, got 0.1",
    ),
    (moe_ext.NoisyTopKRouter, {"temperature": 0.0}, "temperature must be > 0, got 0.0"),
    (moe_ext.ExpertChoiceRouter, {"jitter": 1.0}, "jitter must be in [0, 1), got 1.0"),
]


@pytest.mark.parametrize("cls,options,message", BAD_OPTIONS)
def test_bad_options(cls, options, message):
    with pytest.raises(ValueError) as caught:
        cls(H, E, K, **options)
    assert str(caught.value) == f"{cls.__name__}: {message}"
