import pytest
import torch
from conftest import DTYPES, assert_close, leaf, make_ids, relative_error

import moe_ext
from moe_ext import reference

OPTIONS = [  # E, K, options
    (8, 2, {}),
    (8, 2, {"renormalize": False}),
    (7, 7, {"scaling_factor": 2.5}),
    (1, 1, {}),
    (8, 3, {"score_function": "sigmoid"}),
    (8, 3, {"score_function": "sigmoid", "renormalize": False, "scaling_factor": 0.5}),
    (16, 4, {"num_groups": 4, "topk_groups": 2}),
    (16, 4, {"num_groups": 4, "topk_groups": 2, "score_function": "sigmoid"}),
    (16, 8, {"num_groups": 8, "topk_groups": 4, "score_function": "sigmoid", "bias": True}),
    (16, 4, {"num_groups": 4, "topk_groups": 4, "bias": True}),
    (130, 8, {"bias": True, "score_function": "sigmoid"}),
]


def make_options(E, options, device):
    options = dict(options)
    if options.pop("bias", False):
        options["expert_bias"] = torch.randn(E, device=device)
    return options


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("E,K,options", OPTIONS)
def test_reference(device, dtype, E, K, options):
    options = make_options(E, options, device)
    logits = leaf(torch.randn(70, E, device=device).mul(2).to(dtype))
    wide = leaf(logits.double())
    weights, ids, probs = moe_ext.topk_router(logits, K, **options)
    expected = reference.topk_router(wide, K, **options)
    # Choices are compared in the dtype the router computes in; fp64 keys may break fp32 ties.
    _, same_ids, _ = reference.topk_router(logits, K, **options)
    assert torch.equal(ids, same_ids)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    assert weights.dtype == probs.dtype == compute and ids.dtype == torch.int64
    same = (ids == expected[1]).all(1)
    assert same.float().mean() > 0.9
    assert_close(weights[same], expected[0][same], compute)
    assert_close(probs, expected[2], compute)
    grads = torch.randn_like(weights) * same[:, None], torch.randn_like(probs)
    torch.autograd.backward([weights, probs], grads)
    torch.autograd.backward([expected[0], expected[2]], [grad.double() for grad in grads])
    assert logits.grad.dtype == dtype
    assert_close(logits.grad, wide.grad, dtype, scale=2)


@pytest.mark.parametrize("E,K,options", OPTIONS)
def test_gradcheck(device, E, K, options):
    options = make_options(E, options, device)
    logits = leaf(torch.randn(5, E, dtype=torch.float64, device=device))

    def run(logits):
        weights, _, probs = moe_ext.topk_router(logits, K, **options)
        return weights, probs

    torch.autograd.gradcheck(run, [logits])


@pytest.mark.parametrize("E,K,options", OPTIONS[:9])
def test_opcheck(device, E, K, options):
    options = make_options(E, options, device)
    logits = leaf(torch.randn(5, E, device=device))
    torch.library.opcheck(torch.ops.moe_ext.topk_router.default, (logits, K), options)


@pytest.mark.parametrize("score_function", list(reference.SCORE_FUNCTIONS))
@pytest.mark.parametrize("renormalize", [True, False])
class TestGivenIds:
    def options(self, score_function, renormalize):
        return {"score_function": score_function, "renormalize": renormalize, "scaling_factor": 1.5}

    @pytest.mark.parametrize("routing", ["random", "skipped", "duplicates", "all_skipped"])
    def test_reference(self, device, score_function, renormalize, routing):
        options = self.options(score_function, renormalize)
        ids = make_ids(routing, 40, 3, 6, device)
        ids[0] = -1  # a row without a choice
        logits = leaf(torch.randn(40, 6, dtype=torch.float64, device=device))
        other = leaf(logits)
        out = torch.ops.moe_ext._router_weights(logits, ids, **options)
        expected = reference.router_weights(other, ids, **options)
        assert not out[0][0].any()
        grads = [torch.randn_like(value) for value in out]
        for a, b in zip(out, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-14)
        torch.autograd.backward(out, grads)
        torch.autograd.backward(expected, grads)
        assert relative_error(logits.grad, other.grad) < 1e-12

    def test_gradcheck_and_opcheck(self, device, score_function, renormalize):
        options = self.options(score_function, renormalize)
        ids = make_ids("skipped", 6, 3, 5, device)
        logits = leaf(torch.randn(6, 5, dtype=torch.float64, device=device))
        op = torch.ops.moe_ext._router_weights
        torch.autograd.gradcheck(lambda z: op(z, ids, **options), [logits])
        torch.library.opcheck(op.default, (logits, ids), options)
        backward = torch.ops.moe_ext._router_weights_backward.default
        weights, probs = op(logits.detach(), ids, **options)
        for grads in ((weights, probs), (None, probs), (weights, None)):
            torch.library.opcheck(backward, (*grads, logits.detach(), ids), options)


@pytest.mark.parametrize("score_function", list(reference.SCORE_FUNCTIONS))
def test_ties_go_to_the_lower_id(device, score_function):
    logits = torch.zeros(3, 9, device=device)
    logits[1, 5:7] = 1
    ids = moe_ext.topk_router(logits, 4, score_function=score_function)[1]
    assert ids.tolist() == [[0, 1, 2, 3], [5, 6, 0, 1], [0, 1, 2, 3]]


@pytest.mark.parametrize("score_function", list(reference.SCORE_FUNCTIONS))
@pytest.mark.parametrize("groups", [{}, {"num_groups": 4, "topk_groups": 2}])
def test_nan(device, score_function, groups):
    """NaN sorts last, ids stay valid and distinct, the weights of the row are NaN."""
    logits = torch.randn(4, 8, device=device)
    logits[1, 3] = float("nan")
    logits[2] = float("nan")
    weights, ids, _ = moe_ext.topk_router(logits, 3, score_function=score_function, **groups)
    assert weights[1:3].isnan().all() and weights[[0, 3]].isfinite().all()
    assert ((ids >= 0) & (ids < 8)).all()
    assert all(len(set(row)) == 3 for row in ids.tolist())
    expected = reference.topk_router(logits, 3, score_function=score_function, **groups)
    assert torch.equal(ids, expected[1])
    if not groups:
        assert 3 not in ids[1].tolist()


def test_infinite_logits(device):
    logits = torch.tensor([[0.0, -torch.inf, 1.0], [-torch.inf, 2.0, -torch.inf]], device=device)
    weights, ids, probs = moe_ext.topk_router(logits, 2)
    assert ids.tolist() == [[2, 0], [1, 0]]
    torch.testing.assert_close(weights[1], torch.tensor([1.0, 0.0], device=device))
    torch.testing.assert_close(probs, logits.softmax(-1))


def test_bias_is_for_the_choice_only(device):
    logits = torch.randn(20, 6, device=device)
    bias = torch.zeros(6, device=device)
    bias[4] = 10
    weights, ids, _ = moe_ext.topk_router(
        logits, 2, score_function="sigmoid", renormalize=False, expert_bias=bias
    )
    assert (ids[:, 0] == 4).all()
    torch.testing.assert_close(weights, logits.sigmoid().gather(1, ids))


def test_renormalized_softmax_survives_underflow(device):
    """The chosen probabilities are all zero in fp32; their ratio is not."""
    logits = torch.tensor([[500.0, 0.0, 1.0]], device=device)
    bias = torch.tensor([-5.0, 1.0, 1.0], device=device)
    weights, ids, _ = moe_ext.topk_router(logits, 2, expert_bias=bias)
    assert ids.tolist() == [[1, 2]]
    torch.testing.assert_close(weights, torch.tensor([[0.0, 1.0]], device=device).softmax(-1))


def test_partial_gradients(device):
    """Only one of the outputs is used."""
    logits = leaf(torch.randn(9, 6, dtype=torch.float64, device=device))
    other = leaf(logits)
    for index in (0, 2):
        moe_ext.topk_router(logits, 2, renormalize=False)[index].square().sum().backward()
        reference.topk_router(other, 2, renormalize=False)[index].square().sum().backward()
    assert relative_error(logits.grad, other.grad) < 1e-12


def test_empty_strided_and_double_backward(device):
    assert moe_ext.topk_router(torch.empty(0, 4, device=device), 2)[0].shape == (0, 2)
    logits = torch.randn(6, 9, device=device)
    out = moe_ext.topk_router(logits.T, 2)
    for a, b in zip(out, moe_ext.topk_router(logits.T.contiguous(), 2), strict=True):
        assert torch.equal(a, b)
    leaf_logits = leaf(logits)
    weights = moe_ext.topk_router(leaf_logits, 2)[0]
    (grad,) = torch.autograd.grad(weights.square().sum(), leaf_logits, create_graph=True)
    with pytest.raises(RuntimeError, match="topk_router: second derivatives"):
        grad.sum().backward()


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_weights_of_no_choices(device, score_function, renormalize):
    logits = leaf(torch.randn(5, 4, dtype=torch.float64, device=device))
    ids = torch.zeros(5, 0, dtype=torch.int64, device=device)
    options = {"score_function": score_function, "renormalize": renormalize, "scaling_factor": 1.0}
    results = []
    for fn in (torch.ops.moe_ext._router_weights, reference.router_weights):
        weights, probs = fn(logits, ids, **options)
        assert weights.shape == (5, 0)
        (grad,) = torch.autograd.grad(weights.sum() + probs.square().sum(), logits)
        results.append((probs.detach(), grad))
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual, expected) < 1e-12
