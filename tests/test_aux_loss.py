import math
import warnings

import pytest
import torch
from conftest import DTYPES, assert_close, leaf, make_ids

import moe_ext
from moe_ext import reference

MASKS = [None, "some", "all"]


def make_mask(kind, T, device):
    if kind is None:
        return None
    return (
        torch.rand(T, device=device) > 0.4 if kind == "some" else torch.zeros(T).bool().to(device)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("normalize_by_topk", [True, False])
@pytest.mark.parametrize("T", [0, 1, 700])
def test_load_balancing_loss(device, dtype, mask, normalize_by_topk, T):
    probs = leaf(torch.randn(T, 6, device=device).softmax(-1).to(dtype))
    wide = leaf(probs.double())
    options = {"token_mask": make_mask(mask, T, device), "normalize_by_topk": normalize_by_topk}
    ids = make_ids("skipped", T, 2, 6, device)
    loss = moe_ext.load_balancing_loss(probs, ids, **options)
    expected = reference.load_balancing_loss(wide, ids, **options)
    compute = torch.promote_types(dtype, torch.float32)
    assert loss.dtype == compute and loss.shape == ()
    assert_close(loss, expected, compute)
    (3 * loss).backward()
    (3 * expected).backward()
    assert probs.grad.dtype == dtype
    assert_close(probs.grad, wide.grad, dtype, scale=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("T", [0, 1, 700])
def test_router_z_loss(device, dtype, mask, T):
    logits = leaf((3 * torch.randn(T, 6, device=device)).to(dtype))
    wide = leaf(logits.double())
    token_mask = make_mask(mask, T, device)
    loss = moe_ext.router_z_loss(logits, token_mask=token_mask)
    expected = reference.router_z_loss(wide, token_mask=token_mask)
    compute = torch.promote_types(dtype, torch.float32)
    assert loss.dtype == compute and loss.shape == ()
    assert_close(loss, expected, compute)
    (3 * loss).backward()
    (3 * expected).backward()
    assert_close(logits.grad, wide.grad, dtype, scale=2)


@pytest.mark.parametrize("mask", [None, "some"])
def test_gradcheck_and_opcheck(device, mask):
    token_mask = make_mask(mask, 7, device)
    ids = make_ids("skipped", 7, 2, 5, device)
    probs = leaf(torch.rand(7, 5, dtype=torch.float64, device=device))
    torch.autograd.gradcheck(
        lambda p: moe_ext.load_balancing_loss(p, ids, token_mask=token_mask), [probs]
    )
    torch.autograd.gradcheck(lambda z: moe_ext.router_z_loss(z, token_mask=token_mask), [probs])
    ops = torch.ops.moe_ext
    options = {"token_mask": token_mask}
    torch.library.opcheck(ops.load_balancing_loss.default, (probs, ids), options)
    torch.library.opcheck(ops.router_z_loss.default, (probs,), options)
    p = probs.detach()
    loss, grad_row = ops._load_balancing_loss_forward(p, ids, token_mask, True, 1, None)
    torch.library.opcheck(
        ops._load_balancing_loss_forward.default, (p, ids, token_mask, True, 1, None)
    )
    torch.library.opcheck(
        ops._load_balancing_loss_backward.default, (loss, grad_row, ids, token_mask)
    )
    torch.library.opcheck(ops._router_z_loss_backward.default, (loss, p, token_mask))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", [None, "some", "a whole sequence", "all"])
@pytest.mark.parametrize("T,S", [(0, 3), (3, 3), (700, 2), (900, 5)])
def test_loss_per_sequence(device, dtype, mask, T, S):
    """The mean of the losses of the sequences that have a token."""
    probs = leaf(torch.randn(T, 6, device=device).softmax(-1).to(dtype))
    wide = leaf(probs.double())
    token_mask = make_mask("some" if mask == "a whole sequence" else mask, T, device)
    if mask == "a whole sequence":
        token_mask[: T // S] = False
    options = {"token_mask": token_mask, "num_sequences": S}
    ids = make_ids("skewed", T, 2, 6, device)
    loss = moe_ext.load_balancing_loss(probs, ids, **options)
    expected = reference.load_balancing_loss(wide, ids, **options)
    assert_close(loss, expected, torch.promote_types(dtype, torch.float32))
    (3 * loss).backward()
    (3 * expected).backward()
    assert_close(probs.grad, wide.grad, dtype, scale=2)


@pytest.mark.parametrize("mask", [None, "some"])
@pytest.mark.parametrize("normalize_by_topk", [True, False])
def test_given_shares(device, mask, normalize_by_topk):
    """f counted elsewhere: with the shares of these very tokens nothing changes."""
    probs = leaf(torch.rand(60, 6, dtype=torch.float64, device=device))
    ids, token_mask = make_ids("skewed", 60, 2, 6, device), make_mask(mask, 60, device)
    counted = ids if token_mask is None else ids[token_mask]
    share = torch.bincount(counted.flatten(), minlength=6).double() / counted.numel()
    options = {"token_mask": token_mask, "normalize_by_topk": normalize_by_topk}
    expected = moe_ext.load_balancing_loss(probs, ids, **options)
    actual = moe_ext.load_balancing_loss(probs, ids, expert_share=share, **options)
    torch.testing.assert_close(actual, expected)
    other = torch.rand(6, dtype=torch.float64, device=device)
    expected = reference.load_balancing_loss(probs, ids, expert_share=other, token_mask=token_mask)
    actual = moe_ext.load_balancing_loss(probs, ids, expert_share=other, token_mask=token_mask)
    torch.testing.assert_close(actual, expected)
    grads = [torch.autograd.grad(loss, probs)[0] for loss in (actual, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("options", [{"num_sequences": 2}, {"expert_share": True}])
def test_gradcheck_and_opcheck_of_the_options(device, options):
    if "expert_share" in options:
        options = {"expert_share": torch.rand(5, device=device)}
    ids = make_ids("skipped", 8, 2, 5, device)
    probs = leaf(torch.rand(8, 5, dtype=torch.float64, device=device))
    torch.autograd.gradcheck(lambda p: moe_ext.load_balancing_loss(p, ids, **options), [probs])
    torch.library.opcheck(torch.ops.moe_ext.load_balancing_loss.default, (probs, ids), options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("T", [0, 1, 700])
def test_router_entropy(device, dtype, mask, T):
    probs = (3 * torch.randn(T, 6, device=device)).softmax(-1).to(dtype)
    probs[: T // 3, 0] = 0
    token_mask = make_mask(mask, T, device)
    entropy = torch.ops.moe_ext._router_entropy(probs, token_mask)
    expected = reference.router_entropy(probs.double(), token_mask)
    assert_close(entropy, expected, torch.promote_types(dtype, torch.float32))
    torch.library.opcheck(torch.ops.moe_ext._router_entropy.default, (probs, token_mask))
    uniform = torch.full((5, 8), 1 / 8, device=device)
    assert torch.ops.moe_ext._router_entropy(uniform).item() == pytest.approx(math.log(8))


def test_closed_forms(device):
    E, K = 8, 2
    uniform = torch.full((16, E), 1 / E, device=device)
    balanced = torch.arange(32, device=device).view(16, K) % E
    assert moe_ext.load_balancing_loss(uniform, balanced).item() == pytest.approx(1)
    assert moe_ext.load_balancing_loss(
        uniform, balanced, normalize_by_topk=False
    ).item() == pytest.approx(K)
    collapsed = torch.zeros(16, E, device=device)
    collapsed[:, 3] = 1
    ids = torch.full((16, 1), 3, device=device)
    assert moe_ext.load_balancing_loss(collapsed, ids).item() == pytest.approx(E)
    # Skipped ids leave the numerator only: half of the choices, half of the loss.
    ids = torch.tensor([[3, -1]], device=device).expand(16, 2)
    assert moe_ext.load_balancing_loss(collapsed, ids).item() == pytest.approx(E / 2)
    logits = torch.zeros(5, E, device=device)
    assert moe_ext.router_z_loss(logits).item() == pytest.approx(torch.tensor(8.0).log() ** 2)


def test_same_as_hugging_face(device):
    """normalize_by_topk=False is transformers' load_balancing_loss_func."""
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits = torch.randn(40, 8, device=device)
    _, ids, probs = moe_ext.topk_router(logits, 2)
    expected = mixtral.load_balancing_loss_func((logits,), num_experts=8, top_k=2)
    actual = moe_ext.load_balancing_loss(probs, ids, normalize_by_topk=False)
    torch.testing.assert_close(actual, expected)


def test_nothing_of_size_t_by_e_is_saved(device):
    probs = leaf(torch.rand(64, 8, device=device))
    ids = make_ids("random", 64, 2, 8, device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tuple(tensor.shape)) or tensor, lambda tensor: tensor
    ):
        moe_ext.load_balancing_loss(probs, ids)
    assert saved == [(1, 8), (64, 2)]


def test_strides_and_second_derivatives(device):
    z = leaf(torch.randn(6, 9, device=device))
    assert torch.equal(moe_ext.router_z_loss(z.T), moe_ext.router_z_loss(z.T.contiguous()))
    (grad,) = torch.autograd.grad(moe_ext.router_z_loss(z), z, create_graph=True)
    with pytest.raises(RuntimeError, match="router_z_loss: second derivatives"):
        grad.sum().backward()


def test_counts_and_choices_have_no_derivative(device):
    """Beside a differentiable use of the same probabilities; without a warning of autograd's."""
    probs = torch.rand(6, 4, device=device).requires_grad_()
    weights, ids = probs.topk(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        entropy = torch.ops.moe_ext._router_entropy(probs)
        pairs = torch.ops.moe_ext._expert_choice(probs, None, 2)
        one = torch.ones((), dtype=torch.float64, device=device)
        kept = torch.ops.moe_ext._apply_capacity(weights, ids, one, 4)
        assert not (entropy.requires_grad or pairs[0].requires_grad or kept.requires_grad)
        (probs.square().sum() + entropy).backward()
    assert torch.equal(probs.grad, 2 * probs.detach())
