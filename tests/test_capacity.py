import math

import pytest
import torch
from conftest import DTYPES, ROUTINGS, make_ids
from hypothesis import given
from hypothesis import strategies as st

import moe_ext
from moe_ext import reference

apply_capacity = torch.ops.moe_ext._apply_capacity


def factor(value: float, device="cpu") -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64, device=device)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("drop_policy", ["probs", "position"])
@pytest.mark.parametrize("capacity_factor", [0.0, 0.5, 1.0, 1.25, math.inf])
@pytest.mark.parametrize("T,E,K", [(0, 4, 2), (1, 4, 1), (300, 6, 3)])
def test_reference(device, routing, drop_policy, capacity_factor, T, E, K):
    weights, ids = torch.rand(T, K, device=device), make_ids(routing, T, K, E, device)
    options = {"drop_policy": drop_policy, "min_capacity": 2}
    kept = apply_capacity(weights, ids, factor(capacity_factor, device), E, **options)
    expected_factor = min(capacity_factor, 1e9)
    expected = reference.apply_capacity(weights.cpu(), ids.cpu(), expected_factor, E, **options)
    assert torch.equal(kept.cpu(), expected)


@given(st.integers(0, 60), st.integers(1, 9), st.data(), st.integers(0, 2**16))
def test_any_size_with_ties(T, E, data, seed):
    torch.manual_seed(seed)
    K = data.draw(st.integers(1, E))
    weights = torch.randint(3, (T, K)).double()
    weights[torch.rand(T, K) < 0.1] = torch.nan
    ids = torch.randint(-1, E + 2, (T, K))
    capacity_factor = data.draw(st.floats(0, 3))
    for drop_policy in ("probs", "position"):
        kept = apply_capacity(weights, ids, factor(capacity_factor), E, drop_policy=drop_policy)
        expected = reference.apply_capacity(
            weights, ids, capacity_factor, E, drop_policy=drop_policy
        )
        assert torch.equal(kept, expected)


def test_exact_masks(device):
    """Two of four slots of expert 0 stay; which ones, is the policy's."""
    ids = torch.tensor([[1, 0], [0, 2], [0, 1], [0, 2]], device=device)
    weights = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.4, 0.3], [0.7, 0.2]], device=device)

    def kept(capacity_factor, **options):
        return apply_capacity(weights, ids, factor(capacity_factor, device), 3, **options).tolist()

    # ceil(0.75 * 8 / 3) = 2
    assert kept(0.75) == [[1, -1], [0, 2], [-1, 1], [0, 2]]
    # First choices first: tokens 1 and 2 come before token 3 and before token 0's second choice.
    assert kept(0.75, drop_policy="position") == [[1, -1], [0, 2], [0, 1], [-1, 2]]
    assert kept(0.0, min_capacity=1) == [[1, -1], [0, -1], [-1, -1], [-1, 2]]
    assert kept(0.0, min_capacity=99) == ids.tolist()
    # A tie goes to the earlier token.
    weights[3, 0] = weights[1, 0] = weights[2, 0]
    assert kept(0.75) == [[1, 0], [0, 2], [-1, 1], [-1, 2]]


def test_masked_tokens_do_not_count(device):
    ids, weights = make_ids("random", 40, 2, 5, device), torch.rand(40, 2, device=device)
    mask = torch.rand(40, device=device) < 0.6
    masked = ids.masked_fill(~mask.unsqueeze(1), -1)
    for policy in ("probs", "position"):
        kept = apply_capacity(weights, masked, factor(0.8, device), 5, drop_policy=policy)
        alone = apply_capacity(weights[mask], ids[mask], factor(0.8, device), 5, drop_policy=policy)
        assert torch.equal(kept[mask], alone) and (kept[~mask] == -1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_strides(device, dtype):
    weights = torch.rand(30, 8, device=device).to(dtype)
    ids = make_ids("random", 30, 4, 6, device)
    expected = apply_capacity(weights[:, ::2].contiguous(), ids, factor(0.7, device), 6)
    assert torch.equal(apply_capacity(weights[:, ::2], ids.int(), factor(0.7, device), 6), expected)


def test_same_for_any_number_of_threads():
    weights, ids = torch.rand(5000, 4), make_ids("skewed", 5000, 4, 32)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(apply_capacity(weights, ids, factor(0.5), 32))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("drop_policy", ["probs", "position"])
def test_opcheck(device, drop_policy):
    _, ids, _ = moe_ext.topk_router(torch.randn(9, 4, device=device), 2)
    args = (torch.rand(9, 2, device=device), ids, factor(0.5, device), 4)
    torch.library.opcheck(apply_capacity.default, args, {"drop_policy": drop_policy})
