"""Lists of (token, expert) pairs: token rounding, expert choice, their weights."""

import pytest
import torch
from conftest import DTYPES, EMULATED, ROUTINGS, leaf, relative_error
from hypothesis import given
from hypothesis import strategies as st

import moe_ext
from moe_ext import reference

ops = torch.ops.moe_ext
ROUNDINGS = ["nearest", "up", "down", "stochastic", "balanced"]


def make_choice(T, E, K, *, skew=1.0, dtype=torch.float32, device="cpu"):
    """router_probs, topk_weights, topk_ids."""
    logits = torch.randn(T, E, dtype=dtype) + skew * torch.linspace(1, -1, E, dtype=dtype)
    weights, ids, probs = moe_ext.topk_router(logits.to(device), K)
    return probs, weights, ids


def round_tokens(choice, rounding="nearest", seed=0, capacity_factor=None, **options):
    """The operator, and its used pairs as a list."""
    if rounding == "stochastic":
        generator = torch.Generator().manual_seed(seed)
        noise = torch.rand(choice[0].shape[1], generator=generator, dtype=torch.float64)
        options["noise"] = noise.to(choice[0].device)
    if capacity_factor is not None:
        options["capacity_factor"] = choice[0].new_tensor(capacity_factor, dtype=torch.float64)
    out = ops._round_tokens(*choice, rounding=rounding, **options)
    tokens, experts, slots, _ = (x.tolist() for x in out)
    used = [pair for pair in zip(tokens, experts, slots, strict=True) if pair[0] >= 0]
    return out, used, options.get("noise")


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("capacity_factor", [None, 0.8])
@pytest.mark.parametrize("T,E,K,M", [(0, 4, 2, 8), (5, 4, 2, 8), (200, 6, 2, 16), (64, 3, 3, 7)])
def test_rounding_is_the_references(device, rounding, capacity_factor, T, E, K, M):
    choice = make_choice(T, E, K, device=device)
    out, used, noise = round_tokens(choice, rounding, tile_size=M, capacity_factor=capacity_factor)
    expected = reference.round_tokens(
        *(x.cpu() for x in choice),
        tile_size=M,
        rounding=rounding,
        capacity_factor=capacity_factor,
        noise=None if noise is None else noise.cpu(),
    )
    assert used == expected
    padding = {"nearest": E * M // 2, "down": 0}.get(rounding, E * (M - 1))
    assert all(x.shape == (T * K + padding,) and x.dtype == torch.int64 for x in out[:3])
    kept = torch.full((T * K,), -1)
    for _, expert, slot in used:
        if slot >= 0:
            kept[slot] = expert
    assert torch.equal(out[3].cpu(), kept.view(T, K))


@given(
    st.integers(0, 70),
    st.integers(1, 20),
    st.integers(1, 9),
    st.sampled_from(ROUNDINGS),
    st.sampled_from([None, 0.3, 1.0, 1.5]),
    st.data(),
    st.integers(0, 2**16),
)
def test_rounding_of_any_size_with_ties_and_masks(T, E, M, rounding, factor, data, seed):
    torch.manual_seed(seed)
    K = data.draw(st.integers(1, E))
    weights, ids, probs = moe_ext.topk_router(torch.randint(-2, 3, (T, E)).double(), K)
    ids = ids.masked_fill(torch.rand(T, 1) < data.draw(st.sampled_from([0.0, 0.3])), -1)
    choice = (probs, weights, ids)
    _, used, noise = round_tokens(choice, rounding, seed, tile_size=M, capacity_factor=factor)
    options = {"tile_size": M, "rounding": rounding, "capacity_factor": factor, "noise": noise}
    assert used == reference.round_tokens(*choice, **options)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("skew", [0.0, 2.0])
def test_properties(device, rounding, skew):
    T, E, K, M = 600, 8, 2, 32
    choice = make_choice(T, E, K, skew=skew, device=device)
    _, used, _ = round_tokens(choice, rounding, tile_size=M)
    f = torch.bincount(choice[2].flatten().cpu(), minlength=E)
    c = torch.bincount(torch.tensor([e for _, e, _ in used]), minlength=E)
    padded = torch.bincount(torch.tensor([e for _, e, s in used if s < 0]).long(), minlength=E)
    limit = T // M * M
    assert (c % M == 0).all() and (c <= limit).all()
    free = f <= limit
    distance = (c - f).abs()[free]
    assert (2 * distance <= M if rounding == "nearest" else distance < M).all()
    if rounding == "up":
        assert (c >= f)[free].all()
    if rounding == "down":
        assert (c <= f).all()
    if rounding == "balanced" and free.all():
        assert abs(int(c.sum()) - T * K) <= M // 2
    # No padded pair while a chosen one of the same expert is dropped.
    kept = c - padded
    assert ((padded == 0) | (kept == f)).all() and (kept <= f).all()
    assert len({(t, e) for t, e, _ in used}) == len(used)
    assert used == sorted(used, key=lambda pair: (pair[1], pair[0]))


@pytest.mark.parametrize("f,c", [(0, 0), (3, 0), (4, 0), (5, 8), (11, 8), (12, 8), (13, 16)])
def test_nearest_rounds_ties_down(device, f, c):
    """M = 8: f of 40 tokens choose expert 0, the others expert 1."""
    logits = torch.zeros(40, 2, device=device)
    logits[:, 1] = 1
    logits[:f, 0] = 2
    weights, ids, probs = moe_ext.topk_router(logits, 1)
    _, used, _ = round_tokens((probs, weights, ids), tile_size=8)
    assert sum(expert == 0 for _, expert, _ in used) == c


def test_balanced_is_nearest_in_sum(device):
    """Counts of 5, 5, 5 and 9 with M = 8: nearest gives 8 + 8 + 8 + 8 = 32, balanced 24."""
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor([5, 5, 5, 9])).view(-1, 1)
    logits = torch.nn.functional.one_hot(ids[:, 0], 4).float().to(device)
    weights, ids, probs = moe_ext.topk_router(logits, 1)
    choice = (probs, weights, ids)
    for rounding, total in (("nearest", 32), ("balanced", 24), ("down", 8), ("up", 40)):
        _, used, _ = round_tokens(choice, rounding, tile_size=8)
        assert len(used) == total, rounding
    # Up where the remainder is largest, the lower id first.
    _, used, _ = round_tokens(choice, "balanced", tile_size=8)
    assert [sum(e == expert for _, e, _ in used) for expert in range(4)] == [8, 8, 0, 8]


def test_stochastic_rounding_keeps_the_mean(device):
    choice = make_choice(300, 4, 1, skew=1.5, device=device)
    f = torch.bincount(choice[2].flatten().cpu(), minlength=4).double()
    total = torch.zeros(4, dtype=torch.float64)
    for seed in range(400):
        _, used, _ = round_tokens(choice, "stochastic", seed, tile_size=32)
        total += torch.bincount(torch.tensor([e for _, e, _ in used]), minlength=4)
    assert (total / 400 - f).abs().max() < 3


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("T,E,K", [(0, 3, 1), (1, 3, 2), (40, 8, 2), (200, 17, 3), (30, 2, 2)])
def test_expert_choice_is_the_references(device, masked, T, E, K):
    probs, _, _ = make_choice(T, E, K, device=device)
    mask = torch.rand(T) < 0.6 if masked else None
    tokens, experts = ops._expert_choice(probs, None if mask is None else mask.to(device), K)
    count = min(T, -(-T * K // E))
    assert tokens.shape == experts.shape == (E * count,)
    used = [(t, e) for t, e in zip(tokens.tolist(), experts.tolist(), strict=True) if t >= 0]
    assert used == reference.expert_choice(probs.cpu(), mask, K)


def test_ties_of_expert_choice_go_to_the_earlier_token(device):
    probs = torch.full((10, 5), 0.2, device=device)
    tokens, experts = ops._expert_choice(probs, None, 2)
    assert tokens.tolist() == [0, 1, 2, 3] * 5
    assert experts.tolist() == [e for e in range(5) for _ in range(4)]


def test_nan_is_chosen_last(device):
    probs = torch.rand(8, 2, device=device)
    probs[:3] = torch.nan
    tokens, _ = ops._expert_choice(probs, None, 1)
    assert all(t >= 3 for t in tokens.tolist())
    tokens, _ = ops._expert_choice(torch.full((4, 2), torch.nan, device=device), None, 1)
    assert tokens.tolist() == [0, 1, 0, 1]


def expected_pair_weights(weights, probs, tokens, experts, slots, scale):
    out = []
    for p in range(len(tokens)):
        if tokens[p] < 0:
            out.append(weights.new_zeros(()))
        elif slots is not None and slots[p] >= 0:
            out.append(weights.flatten()[slots[p]])
        else:
            out.append(scale * probs[tokens[p], experts[p]])
    return torch.stack(out)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("with_slots", [True, False])
def test_pair_weights(device, dtype, with_slots):
    T, E, K = 50, 5, 2
    probs, weights, ids = make_choice(T, E, K, dtype=dtype, device=device)
    if with_slots:
        tokens, experts, slots, _ = ops._round_tokens(
            probs, weights, ids, tile_size=16, rounding="up"
        )
    else:
        (tokens, experts), slots = ops._expert_choice(probs, None, K), None
    results = []
    for fn in (
        lambda w, p: ops._pair_weights(w, p, tokens, experts, slots, E, 2.5),
        lambda w, p: expected_pair_weights(w, p, tokens, experts, slots, 2.5),
    ):
        w, p = leaf(weights), leaf(probs)
        out = fn(w, p)
        out.backward(torch.linspace(-1, 1, len(tokens), dtype=dtype, device=device))
        results.append((out.detach(), w.grad if with_slots else torch.zeros(1), p.grad))
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected) or relative_error(actual, expected) < 1e-6


@pytest.mark.parametrize("with_slots", [True, False])
def test_gradcheck_and_opcheck(device, with_slots):
    T, E, K = 12, 4, 2
    probs, weights, ids = make_choice(T, E, K, dtype=torch.float64, device=device)
    if with_slots:
        tokens, experts, slots, _ = ops._round_tokens(probs, weights, ids, tile_size=4)
    else:
        (tokens, experts), slots = ops._expert_choice(probs, None, K), None
    pairs = (tokens, experts, slots, E, 1.5)
    torch.autograd.gradcheck(
        lambda w, p: ops._pair_weights(w, p, *pairs), [leaf(weights), leaf(probs)]
    )
    torch.library.opcheck(ops._pair_weights.default, (leaf(weights), leaf(probs), *pairs))
    grad = torch.ones_like(tokens, dtype=torch.float64)
    for mask in ([True, True], [False, True], [True, False]):
        torch.library.opcheck(ops._pair_weights_backward.default, (grad, weights, *pairs, mask))
    torch.library.opcheck(ops._expert_choice.default, (probs, None, K))
    for rounding in ROUNDINGS:
        options = {"tile_size": 4, "rounding": rounding}
        if rounding == "stochastic":
            options["noise"] = torch.rand(E, dtype=torch.float64, device=device)
        torch.library.opcheck(ops._round_tokens.default, (probs, weights, ids), options)


def test_strides_and_second_derivatives(device):
    probs, weights, ids = make_choice(20, 6, 2, dtype=torch.float64, device=device)
    strided = [torch.stack([x, x], -1)[..., 0] for x in (probs, weights, ids)]
    expected = ops._round_tokens(probs, weights, ids, tile_size=4)
    for a, b in zip(ops._round_tokens(*strided, tile_size=4), expected, strict=True):
        assert torch.equal(a, b)
    tokens, experts = ops._expert_choice(strided[0], None, 2)
    p = leaf(probs)
    out = ops._pair_weights(weights, p, tokens, experts, None, 6)
    (grad,) = torch.autograd.grad(out.sum(), p, create_graph=True)  # a stride-0 gradient
    assert grad.sum() == len(tokens)
    assert not grad.requires_grad  # the weights are linear in the probabilities
    out = ops._pair_weights(weights, p, tokens, experts, None, 6)
    (grad,) = torch.autograd.grad(out.square().sum(), p, create_graph=True)
    with pytest.raises(NotImplementedError, match="^pair_weights: second derivatives"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(device, dtype):
    probs, weights, ids = make_choice(64, 6, 2, device=device)
    narrow = (probs.to(dtype), weights.to(dtype), ids.int())
    wide = (narrow[0].double(), narrow[1].double(), ids)
    for a, b in zip(
        ops._round_tokens(*narrow, tile_size=8),
        ops._round_tokens(*wide, tile_size=8),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_same_for_any_number_of_threads():
    choice = make_choice(3000, 40, 4)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(
                [*ops._round_tokens(*choice, tile_size=64), *ops._expert_choice(choice[0], None, 4)]
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# --- the experts over pairs ---------------------------------------------------------------------


@pytest.mark.parametrize("routing", ROUTINGS)
def test_topk_as_pairs(device, routing):
    """[T, K] written as a list of pairs, in any order, with the same bits for all orders."""
    from test_moe_ffn import make_inputs

    inputs = make_inputs(50, 16, 12, 5, 3, routing=routing, bias=True, device=device)
    inputs = {k: leaf(v) if v.is_floating_point() else v for k, v in inputs.items()}
    expected = moe_ext.moe_ffn(**inputs)
    weights, ids = inputs.pop("topk_weights"), inputs.pop("topk_ids")
    tokens = torch.arange(50, device=device).repeat_interleave(3)

    def in_order(order):
        return ops._moe_ffn_pairs(
            pair_weights=weights.flatten()[order],
            pair_experts=ids.flatten()[order],
            pair_tokens=tokens[order].int(),
            **inputs,
        )

    actual = in_order(torch.randperm(150, device=device))
    assert relative_error(actual.detach(), expected.detach()) < 1e-6
    # Twice the same expert: those rows are in the order of the list.
    if routing not in ("duplicates", "one_expert", "idle"):
        assert torch.equal(actual, in_order(torch.randperm(150, device=device)))
        if device == "cpu" and not EMULATED:  # elsewhere moe_ffn sums k ascending
            assert torch.equal(actual, expected)
    names = ["tokens", *(k for k in inputs if k != "tokens")]
    leaves = [inputs[name] for name in names] + [weights]
    grad = torch.randn_like(expected)
    for name, a, b in zip(
        [*names, "weights"],
        torch.autograd.grad(actual, leaves, grad),
        torch.autograd.grad(expected, leaves, grad),
        strict=True,
    ):
        assert relative_error(a, b) < 1e-5 or not b.any(), name


@given(
    st.integers(0, 40),
    st.integers(0, 60),
    st.integers(1, 9),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["activation", "hidden"]),
    st.integers(0, 2**16),
)
def test_any_list_of_pairs(T, P, E, gated, bias, recompute, seed):
    from conftest import make_experts

    torch.manual_seed(seed)
    P = P if T else 0
    experts = make_experts(E, 7, 5, gated=gated, bias=bias, dtype=torch.float64)
    tensors = {"tokens": torch.randn(T, 7).double(), "pair_weights": torch.randn(P).double()}
    tensors |= {name: value.detach() for name, value in experts.items()}
    ids = {
        "pair_experts": torch.randint(-1, E + 2, (P,)),
        "pair_tokens": torch.randint(-1, max(T, 1), (P,)),
    }
    options = {"activation": "gelu", "gated": gated, "recompute": recompute}
    results = []
    for fn in (ops._moe_ffn_pairs, reference.moe_ffn_pairs):
        leaves = {name: leaf(value) for name, value in tensors.items()}
        out = fn(**leaves, **ids, **options)
        out.sin().sum().backward()
        grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves.values()]
        results.append([out.detach(), *grads])
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual, expected) < 1e-11 or not expected.any()


def test_pairs_gradcheck_and_opcheck(device):
    from conftest import make_experts

    T, E, K = 6, 4, 2
    probs, weights, ids = make_choice(T, E, K, dtype=torch.float64, device=device)
    tokens, experts, slots, _ = ops._round_tokens(probs, weights, ids, tile_size=2)
    ffn = make_experts(E, 5, 3, bias=True, dtype=torch.float64, device=device)
    x = torch.randn(T, 5, dtype=torch.float64, device=device)
    pair_weights = ops._pair_weights(weights, probs, tokens, experts, slots, E)
    names = list(ffn)

    def run(x, w, *values):
        return ops._moe_ffn_pairs(x, w, experts, tokens, **dict(zip(names, values, strict=True)))

    leaves = [leaf(x), leaf(pair_weights), *(leaf(value) for value in ffn.values())]
    torch.autograd.gradcheck(run, leaves)
    ffn = {name: value.detach() for name, value in ffn.items()}
    for recompute in ("activation", "hidden"):
        torch.library.opcheck(
            ops._moe_ffn_pairs.default,
            (leaf(x), leaf(pair_weights), experts, tokens),
            {**ffn, "recompute": recompute},
        )
    out, hidden, row_map, offsets = ops._moe_ffn_forward(
        x, pair_weights, experts, tokens, *ffn.values(), "silu", True, True
    )
    assert hidden.shape[0] == row_map.shape[0] == len(tokens)
    torch.library.opcheck(
        ops._expert_ffn_backward.default,
        (x, x, pair_weights, row_map, tokens, offsets, hidden, *ffn.values(), "silu", True)
        + ([True] * 6,),
    )


def test_second_derivatives_of_pairs():
    from conftest import make_experts

    ffn = make_experts(2, 4, 3)
    x, ids = leaf(torch.randn(2, 4)), torch.tensor([0, 1])
    y = ops._moe_ffn_pairs(x, torch.ones(2), ids, ids, **ffn)
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="^moe_ffn: second derivatives"):
        grad.sum().backward()


def test_pairs_under_autocast():
    from conftest import make_experts

    ffn = make_experts(3, 8, 6)
    tokens = torch.tensor([0, 1, 1, 4, -1])
    experts = torch.tensor([0, 2, 0, 1, -1])
    x, weights = leaf(torch.randn(5, 8)), leaf(torch.rand(5))
    expected = ops._moe_ffn_pairs(x, weights, experts, tokens, **ffn)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops._moe_ffn_pairs(x, weights, experts, tokens, **ffn)
    assert y.dtype == torch.bfloat16 and relative_error(y.float(), expected) < 2**-6
    y.float().sum().backward()
    assert x.grad.dtype == weights.grad.dtype == torch.float32
