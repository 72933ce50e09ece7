"""What a token's bits depend on: by default on its row, its experts' weights and how many rows they
have; in the batch-invariant mode not even on that."""

import threading

import pytest
import torch
from conftest import DTYPES, leaf, make_experts

import moe_ext
from moe_ext import reference

_grouped_linear = torch.ops.moe_ext._grouped_linear
_router_logits = torch.ops.moe_ext._router_logits


@pytest.fixture
def invariant():
    moe_ext.set_batch_invariant(True)
    yield
    moe_ext.set_batch_invariant(False)


def transposed(weight):
    """The same numbers, stored as [E, K, N]."""
    return weight.transpose(1, 2).contiguous().transpose(1, 2)


def in_layout(experts, layout):
    if layout == "rows":
        return experts
    return {k: transposed(v) if k.endswith("proj") else v for k, v in experts.items()}


# By default.

SHAPES = [  # H, I, E, K
    (64, 96, 8, 2),
    (130, 33, 3, 1),  # columns and terms that fill no vector
    (701, 6, 5, 2),  # several blocks of terms; a product of fewer terms than a vector
    (33, 257, 1, 1),
]
# Rows of an expert: one, few (dot products), the most of these, one more, and many.
COUNTS = [1, 2, 3, 5, 7, 12, 31, 32, 33, 40, 75, 300]


def among_others(kept, T, counts):
    """T tokens: the kept ones (a dict of their tokens, weights and ids) at random places in their
    order, and others, so that expert e gets counts[e] rows; and where the kept ones are."""
    n, K = kept["topk_ids"].shape
    left = counts - torch.bincount(kept["topk_ids"].flatten(), minlength=len(counts))
    ids = torch.repeat_interleave(torch.arange(len(counts)), left)
    others = torch.full(((T - n) * K,), -1)
    others[torch.randperm(len(others))[: len(ids)]] = ids[torch.randperm(len(ids))]
    at = torch.randperm(T)[:n].sort().values
    is_other = torch.ones(T, dtype=torch.bool).index_fill(0, at, False)
    batch = {
        "tokens": torch.randn(T, kept["tokens"].shape[1]).to(kept["tokens"].dtype),
        "topk_weights": torch.rand(T, K),
        "topk_ids": torch.empty(T, K, dtype=torch.int64),
    }
    batch["topk_ids"][is_other] = others.view(-1, K)
    for name, value in kept.items():
        batch[name][at] = value
    return batch, at


def forward_and_backward(batch, at, grad, experts):
    """The kept tokens' outputs, and the gradients of their rows and weights."""
    tokens, weights = leaf(batch["tokens"]), leaf(batch["topk_weights"])
    out = moe_ext.moe_ffn(tokens, weights, batch["topk_ids"], **experts)
    grads = torch.randn_like(out)
    grads[at] = grad
    out.backward(grads)
    return [out[at], tokens.grad[at], weights.grad[at]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_bits_go_by_the_experts_rows(isa, dtype, layout):
    """Other neighbours, another place, another number of tokens; the same rows per expert."""
    for i, (H, I, E, K) in enumerate(SHAPES):
        experts = make_experts(E, H, I, dtype=dtype, gated=i % 2 == 0, bias=i % 2 == 1)
        options = {"gated": i % 2 == 0, **in_layout(experts, layout)}
        counts = torch.tensor(COUNTS)[torch.randperm(len(COUNTS))[:E]]
        rows = torch.repeat_interleave(torch.arange(E), counts.clamp(max=6))
        ids = rows[torch.randperm(len(rows))][: len(rows) // K * K].view(-1, K)
        kept = {
            "tokens": torch.randn(len(ids), H).to(dtype),
            "topk_weights": torch.rand(len(ids), K),
            "topk_ids": ids,
        }
        grad = torch.randn(len(ids), H).to(dtype)
        least = len(ids) + int(counts.sum())
        expected = None
        for T in (least, least + 5, 4 * least + 300):
            batch, at = among_others(kept, T, counts)
            found = forward_and_backward(batch, at, grad, options)
            expected = expected or found
            for actual, first in zip(found, expected, strict=True):
                assert torch.equal(actual, first), (H, I, E, K, T, counts)


def test_a_skewed_batch_of_many_tokens(isa):
    """An expert whose few rows are spread over all blocks of tokens, beside one with most."""
    experts = make_experts(2, 64, 96)
    kept = {
        "tokens": torch.randn(40, 64),
        "topk_weights": torch.rand(40, 1),
        "topk_ids": torch.zeros(40, 1, dtype=torch.int64),
    }
    alone = moe_ext.moe_ffn(**kept, **experts)
    batch, at = among_others(kept, 2048, torch.tensor([40, 2008]))
    assert torch.equal(moe_ext.moe_ffn(**batch, **experts)[at], alone)


@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_rows_go_by_the_experts_rows(isa, dtype):
    H, I, E = 65, 34, 3
    experts = make_experts(E, H, I, dtype=dtype)
    weight = torch.randn(E, 70, H).to(dtype)
    for count in COUNTS:
        rows = torch.randn(count, H).to(dtype)
        expected = None
        for before, after in ((0, 0), (1, 900), (700, 50)):
            offsets = torch.tensor([0, before, before + count, before + count + after]).int()
            batch = torch.cat(
                [torch.randn(before, H).to(dtype), rows, torch.randn(after, H).to(dtype)]
            )
            outs = (
                moe_ext.expert_ffn(batch, offsets, **experts),
                _grouped_linear(batch, offsets, weight),
            )
            found = [out[before : before + count] for out in outs]
            expected = expected or found
            for actual, first in zip(found, expected, strict=True):
                assert torch.equal(actual, first), (count, before, after)


# The mode.

PARTS = [(0, 1), (77, 78), (199, 200), (5, 7), (11, 18), (30, 63), (1, 200)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("H,I,E,K", [(64, 96, 8, 2), (131, 33, 5, 3), (701, 6, 1, 1)])
def test_operators_alone_and_among_200(isa, invariant, dtype, layout, H, I, E, K):
    experts = in_layout(make_experts(E, H, I, bias=True, dtype=dtype), layout)
    tokens = torch.randn(200, H).to(dtype)
    router = torch.randn(E, H).to(dtype)
    if layout == "columns":
        router = router.t().contiguous().t()

    def run(begin, end):
        part = tokens[begin:end]
        logits = _router_logits(part, router)
        weights, ids, probs = moe_ext.topk_router(logits, K)
        out = moe_ext.moe_ffn(part, weights, ids, **experts)
        offsets = torch.tensor([0] + [len(part)] * E, dtype=torch.int32)  # all to expert 0
        return [
            logits,
            weights,
            ids,
            probs,
            out,
            moe_ext.expert_ffn(part, offsets, **experts),
            _grouped_linear(part, offsets, experts["gate_up_proj"]),
        ]

    whole = run(0, 200)
    for begin, end in PARTS:
        for i, (actual, expected) in enumerate(zip(run(begin, end), whole, strict=True)):
            assert torch.equal(actual, expected[begin:end]), (i, begin, end)


@pytest.mark.parametrize("activation", [*reference.ACTIVATIONS, *reference.GATED_ACTIVATIONS])
def test_activations(isa, invariant, activation):
    gated = activation in reference.GATED_ACTIVATIONS
    experts = make_experts(1, 40, 37, gated=gated)
    tokens, options = torch.randn(200, 40), {"activation": activation, "gated": gated}
    whole = moe_ext.expert_ffn(tokens, torch.tensor([0, 200]).int(), **experts, **options)
    for begin, end in PARTS:
        offsets = torch.tensor([0, end - begin]).int()
        part = moe_ext.expert_ffn(tokens[begin:end], offsets, **experts, **options)
        assert torch.equal(part, whole[begin:end])


LAYERS = [  # H, I, E, K, options
    (64, 96, 8, 2, {"shared_intermediate_size": 48}),
    (130, 33, 5, 1, {"bias": True, "shared_intermediate_size": 7}),
    (96, 40, 40, 6, {"gated": False, "activation": "relu2", "score_function": "sigmoid"}),
    (72, 16, 8, 2, {"num_groups": 4, "topk_groups": 2, "balance": "bias"}),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("H,I,E,K,options", LAYERS)
def test_layer_alone_and_among_200(isa, invariant, threads, dtype, H, I, E, K, options):
    layer = moe_ext.MoE(H, I, E, K, dtype=dtype, init_std=0.2, **options).eval()
    x = torch.randn(200, H).to(dtype)
    with torch.no_grad():
        threads(1)
        whole = layer(x)
        for count in (1, 2):
            threads(count)
            assert torch.equal(layer(x), whole)
            for begin, end in PARTS:
                assert torch.equal(layer(x[begin:end]), whole[begin:end]), (begin, end, count)
            order = torch.randperm(200)
            assert torch.equal(layer(x[order]), whole[order])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_tokens_and_weights(invariant, dtype):
    experts = make_experts(4, 72, 40, bias=True, dtype=dtype)
    tokens, weights = torch.randn(200, 72).to(dtype), torch.rand(200, 2)
    ids, grad = torch.rand(200, 4).topk(2).indices, torch.randn(200, 72).to(dtype)

    def gradients(begin, end, recompute):
        x, w = leaf(tokens[begin:end]), leaf(weights[begin:end])
        moe_ext.moe_ffn(x, w, ids[begin:end], **experts, recompute=recompute).backward(
            grad[begin:end]
        )
        return x.grad, w.grad

    whole = gradients(0, 200, "activation")
    for begin, end in PARTS:
        for recompute in ("activation", "hidden"):
            for part, all_ in zip(gradients(begin, end, recompute), whole, strict=True):
                assert torch.equal(part, all_[begin:end])


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_the_switch_that_does_it(isa, dtype):
    """Off, a token alone has other bits than among 200; on, the numbers are the same ones."""
    layer = moe_ext.MoE(256, 96, 4, 2, dtype=dtype, init_std=0.2).eval()
    x = torch.randn(200, 256).to(dtype)
    with torch.no_grad():
        off = layer(x)
        assert any(not torch.equal(layer(x[t : t + 1]), off[t : t + 1]) for t in range(200))
        moe_ext.set_batch_invariant(True)
        try:
            on = torch.cat([layer(x[t : t + 1]) for t in range(200)])
            assert torch.equal(layer(x), on)
        finally:
            moe_ext.set_batch_invariant(False)
    assert ((on - off).abs().max() / off.abs().max()).item() <= 4 * torch.finfo(dtype).eps


def test_a_compiled_layer_obeys(fresh_compiler):
    layer = moe_ext.MoE(256, 96, 4, 2, init_std=0.2).eval()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    x = torch.randn(40, 256)
    with torch.no_grad():
        off = compiled(x[:2])
        moe_ext.set_batch_invariant(True)
        try:
            assert torch.equal(compiled(x[:2]), layer(x)[:2])
            assert torch.equal(compiled(x), layer(x))
        finally:
            moe_ext.set_batch_invariant(False)
        assert torch.equal(compiled(x[:2]), off)


def test_the_switch():
    assert not moe_ext.is_batch_invariant()
    for wrong in (1, None, "on"):
        with pytest.raises(TypeError, match="set_batch_invariant: enabled must be a bool, got "):
            moe_ext.set_batch_invariant(wrong)
    assert not moe_ext.is_batch_invariant()
    thread = threading.Thread(target=moe_ext.set_batch_invariant, args=(True,))
    thread.start()
    thread.join()
    assert moe_ext.is_batch_invariant()
    moe_ext.set_batch_invariant(False)
    assert not moe_ext.is_batch_invariant()
