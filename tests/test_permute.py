import pytest
import torch
from conftest import DTYPES, ROUTINGS, assert_close, leaf, make_ids, relative_error

import moe_ext
from moe_ext import reference

SHAPES = [  # T, H, E, K
    (1, 8, 4, 1),
    (7, 16, 4, 2),  # T < E * K: some experts stay empty
    (64, 33, 8, 8),  # odd H, K == E
    (0, 4, 3, 2),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("T,H,E,K", SHAPES)
def test_reference(device, dtype, routing, T, H, E, K):
    tokens = leaf(torch.randn(T, H, device=device).to(dtype))
    other = leaf(tokens.double())
    ids = make_ids(routing, T, K, E, device)
    out, expected = moe_ext.permute(tokens, ids, E), reference.permute(other, ids, E)
    for a, b in zip(out, expected, strict=True):
        assert torch.equal(a, b.to(a.dtype)) and a.dtype in (dtype, torch.int32)
    grad = torch.randn_like(out[0])
    out[0].backward(grad)
    expected[0].backward(grad.double())
    assert_close(tokens.grad, other.grad, dtype, scale=2)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_invariants(device, routing):
    """The definitions of row_map and expert_offsets."""
    T, H, E, K = 40, 8, 5, 3
    tokens = torch.randn(T, H, device=device)
    ids = make_ids(routing, T, K, E, device)
    rows, row_map, offsets = moe_ext.permute(tokens, ids, E)
    valid = (ids >= 0) & (ids < E)
    assert ((row_map >= 0) == valid).all() and (row_map[~valid] == -1).all()
    assert sorted(row_map[valid].tolist()) == list(range(int(valid.sum())))
    assert offsets[0] == 0 and offsets[-1] == valid.sum()
    counts = torch.ops.moe_ext._tokens_per_expert(ids, E)
    assert torch.equal(offsets.diff().long(), counts)
    assert not rows[offsets[-1] :].any()
    for t, k in valid.nonzero().tolist():
        row = row_map[t, k]
        assert torch.equal(rows[row], tokens[t])
        assert offsets[ids[t, k]] <= row < offsets[ids[t, k] + 1]
    slots = row_map.flatten()[valid.flatten()]
    for e in range(E):  # stable
        assert slots[ids.flatten()[valid.flatten()] == e].diff().gt(0).all()


def test_gradcheck(device):
    ids = make_ids("skipped", 6, 3, 4, device)
    tokens = leaf(torch.randn(6, 5, dtype=torch.float64, device=device))
    torch.autograd.gradcheck(lambda x: moe_ext.permute(x, ids, 4)[0], [tokens])


def test_opcheck(device):
    tokens, ids = leaf(torch.randn(7, 16, device=device)), make_ids("skipped", 7, 2, 4, device)
    torch.library.opcheck(torch.ops.moe_ext.permute.default, (tokens, ids, 4))
    torch.library.opcheck(torch.ops.moe_ext.permute.default, (tokens, ids.int(), 4))
    rows, row_map, _ = moe_ext.permute(tokens.detach(), ids, 4)
    torch.library.opcheck(torch.ops.moe_ext._permute_backward.default, (rows, row_map))
    torch.library.opcheck(torch.ops.moe_ext._tokens_per_expert.default, (ids, 4))


def test_strides(device):
    base = torch.randn(9, 20, device=device)
    ids = make_ids("random", 10, 2, 4, device)
    tokens = base.T[::2]  # [10, 9], not contiguous
    for a, b in zip(
        moe_ext.permute(tokens, ids.T.contiguous().T, 4),
        moe_ext.permute(tokens.contiguous(), ids, 4),
        strict=True,
    ):
        assert torch.equal(a, b)
    tokens = leaf(tokens)
    moe_ext.permute(tokens, ids, 4)[0].sum().backward()  # stride-0 gradient
    assert (tokens.grad == 2).all()


def test_many_compilations_are_not_needed(device):
    import torch._dynamo.testing

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = torch.compile(
        lambda x, ids: moe_ext.permute(x, ids, 4)[0].square().sum(),
        fullgraph=True,
        backend=counter,
    )
    for T in range(2, 12):
        tokens = leaf(torch.randn(T, 8, device=device))
        run(tokens, make_ids("random", T, 2, 4, device)).backward()
        assert relative_error(tokens.grad, 4 * tokens) < 1e-6
    assert counter.frame_count <= 2
