"""Values and memory that no honest caller gives: an error that names the operator, never a crash,
a hang, or a byte out of bounds. (`tests/fuzz` finds such calls; these are the ones it found.)"""

import pytest
import torch
from conftest import EMULATED

import moe_ext

ops = torch.ops.moe_ext
T, H, I, E, K = 4, 8, 6, 3, 2
HUGE = [2**31, 2**40, 2**62, 2**63 - 1]

pytestmark = pytest.mark.skipif(EMULATED, reason="values are not checked on CUDA")


def ids(*shape):
    return torch.zeros(*(shape or (T, K)), dtype=torch.int64)


def row_map(values):
    return torch.tensor(values, dtype=torch.int32)


def raises(operator, error=RuntimeError):
    return pytest.raises(error, match=f"^{operator}: ")


# --- maps, rows and sizes -----------------------------------------------------------------------


@pytest.mark.parametrize("value", [10**8, -5, -(2**31), 2**31 - 1, T * K])
def test_a_row_map_that_was_overwritten(value):
    """By way of numpy, behind autograd's back."""
    tokens = torch.randn(T, H, requires_grad=True)
    permuted, rows, _ = moe_ext.permute(tokens, ids(), E)
    rows.numpy()[1, 1] = value
    with raises("_permute_backward", IndexError):
        permuted.sum().backward()


def test_a_row_map_that_names_a_row_twice():
    with raises("_permute_backward", IndexError):
        ops._permute_backward(torch.randn(4, H), row_map([[0, 1], [1, 2]]))


@pytest.mark.parametrize("S", [0, 3, 5, 8])
def test_gradient_rows_of_another_number_of_sequences(S):
    with raises("_load_balancing_loss_backward"):
        ops._load_balancing_loss_backward(torch.ones(()), torch.randn(S, E), ids(), None)


@pytest.mark.parametrize(
    "call",
    [
        lambda: ops._router_logits(torch.randn(T, H), torch.randn(0, H)),
        lambda: ops._router_logits(torch.randn(T, 0), torch.randn(E, 0)),
        lambda: ops._grouped_linear(torch.randn(T, H), row_map([0, T]), torch.randn(1, 0, H)),
        lambda: ops._grouped_linear(torch.randn(T, 0), row_map([0, T]), torch.randn(1, H, 0)),
        lambda: ops._grouped_linear(torch.randn(T, H), row_map([0]), torch.randn(0, 5, H)),
        lambda: ops._router_logits_backward(
            torch.randn(T, 0), torch.randn(T, H), torch.randn(0, H), [True, True]
        ),
        lambda: ops._router_entropy(torch.randn(T, 0)),
    ],
)
def test_sizes_of_zero(call):
    with raises(r"_\w+"):
        call()


@pytest.mark.parametrize("size", HUGE)
@pytest.mark.parametrize(
    "call",
    [
        lambda n: moe_ext.permute(torch.randn(T, H), ids(), n),
        lambda n: ops._tokens_per_expert(ids(), n),
        lambda n: ops._apply_capacity(torch.rand(T, K), ids(), torch.ones(()).double(), n),
        lambda n: ops._expert_choice(torch.rand(T, E), None, n),
        lambda n: ops._round_tokens(torch.rand(T, E), torch.rand(T, K), ids(), tile_size=n),
        lambda n: ops._round_tokens(
            torch.rand(T, E), torch.rand(T, K), ids(), tile_size=n, rounding="up"
        ),
        lambda n: moe_ext.load_balancing_loss(torch.rand(0, E), ids(0, K), num_sequences=n),
        lambda n: moe_ext.load_balancing_loss(torch.rand(T, E), ids(), num_sequences=n),
        lambda n: moe_ext.topk_router(torch.rand(T, E), n),
        lambda n: ops._pair_weights_backward(
            torch.rand(2), torch.rand(T, K), ids(2), ids(2), None, n, 1.0, [True, True]
        ),
    ],
)
def test_huge_numbers(call, size):
    with raises(r"\w+", (RuntimeError, ValueError)):
        call(size)


@pytest.mark.parametrize("size", [2**31, 2**40])
@pytest.mark.parametrize(
    "call",
    [
        lambda n: moe_ext.permute(torch.rand(1, 1).expand(n, 1), ids(1, 1).expand(n, 1), E),
        lambda n: moe_ext.unpermute(torch.rand(1, 1).expand(n, 1), row_map([[0]])),
        lambda n: moe_ext.unpermute(torch.rand(1, 1), row_map([[0]]).expand(n, 1)),
        lambda n: moe_ext.moe_ffn(
            torch.rand(1, H).expand(n, H),
            torch.rand(1, 1).expand(n, 1),
            ids(1, 1).expand(n, 1),
            torch.rand(E, 2 * I, H),
            torch.rand(E, H, I),
        ),
        lambda n: moe_ext.expert_ffn(
            torch.rand(1, H).expand(n, H),
            row_map([0, 0, 0, 1]),
            torch.rand(E, 2 * I, H),
            torch.rand(E, H, I),
        ),
        lambda n: ops._moe_ffn_pairs(
            torch.rand(1, H).expand(n, H),
            torch.rand(2),
            ids(2),
            ids(2),
            torch.rand(E, 2 * I, H),
            torch.rand(E, H, I),
        ),
        lambda n: ops._expert_choice(torch.empty(0, n), None, 1),
        lambda n: ops._tokens_per_expert(ids(1, 0).expand(n, 0), E),
        lambda n: ops._router_logits_backward(
            torch.rand(1, E).expand(n, E),
            torch.rand(1, H).expand(n, H),
            torch.rand(E, H),
            [False, True],
        ),
        lambda n: moe_ext.permute(torch.rand(1, 0).expand(n, 0), ids(1, 0).expand(n, 0), E),
        lambda n: moe_ext.unpermute(torch.rand(0, 0), row_map([[]]).expand(n, 0)),
        lambda n: ops._apply_capacity(
            torch.rand(1, 0).expand(n, 0), ids(1, 0).expand(n, 0), torch.ones(()).double(), E
        ),
    ],
)
def test_expanded_sizes_past_the_range(call, size):
    """Stride-0 views have any size for nothing; nothing of that size is allocated."""
    with pytest.raises(RuntimeError, match=r"^\w+: |\(in \w+\)"):
        call(size)


def test_memory_that_cannot_be_had_names_the_operator():
    with pytest.raises(RuntimeError, match=r"can't allocate memory.*\(in permute\)"):
        moe_ext.permute(torch.rand(1, 1).expand(2**20, 2**40), ids(2**20, 1), E)


@pytest.mark.parametrize("factor", [-1e300, float("nan"), float("inf"), -float("inf"), 0.0])
def test_capacity_factors(factor):
    kept = ops._apply_capacity(
        torch.rand(T, K), ids(), torch.tensor(factor).double(), E, min_capacity=2
    )
    is_limited = factor <= 0  # NaN and infinity are no limit; an expert has T slots at most
    assert (kept >= 0).sum() == (2 if is_limited else T)


@pytest.mark.parametrize("noise", [-1e300, -0.5, 0.0, 1.0, float("nan"), float("inf")])
def test_noise_outside_of_its_range(noise):
    """An expert without a remainder is at a multiple already, whatever the noise."""
    noise = torch.full((E,), noise, dtype=torch.float64)
    pair_tokens, pair_experts, _, _ = ops._round_tokens(
        torch.rand(T, E),
        torch.rand(T, 1),
        ids(T, 1),
        tile_size=2,
        rounding="stochastic",
        noise=noise,
    )
    assert (pair_experts[pair_tokens >= 0] == 0).all() and (pair_tokens >= 0).sum() == T


def test_negative_ids_raise_everywhere():
    bad = ids() - 2
    for operator, call in {
        "load_balancing_loss": lambda: moe_ext.load_balancing_loss(torch.rand(T, E), bad),
        "_tokens_per_expert": lambda: ops._tokens_per_expert(bad, E),
        "_apply_capacity": lambda: ops._apply_capacity(
            torch.rand(T, K), bad, torch.ones((), dtype=torch.float64), E
        ),
        "_round_tokens": lambda: ops._round_tokens(
            torch.rand(T, E), torch.rand(T, K), bad, tile_size=2
        ),
        "_router_weights": lambda: ops._router_weights(
            torch.rand(T, E),
            bad,
            score_function="softmax",
            renormalize=True,
            scaling_factor=1.0,
        ),
    }.items():
        with pytest.raises(IndexError, match=f"^{operator}: topk_ids must be >= -1, got -2"):
            call()


# --- memory -------------------------------------------------------------------------------------


def freed(tensor, left=0):
    tensor.untyped_storage().resize_(left)
    return tensor


def arguments() -> dict[str, tuple]:
    """Good arguments of every public operator."""
    experts = (torch.rand(E, 2 * I, H), torch.rand(E, H, I))
    return {
        "topk_router": (torch.rand(T, E), K),
        "permute": (torch.rand(T, H), ids(), E),
        "unpermute": (torch.rand(T * K, H), row_map(range(T * K)).view(T, K), torch.rand(T, K)),
        "expert_ffn": (torch.rand(T, H), row_map([0, 1, 3, T]), *experts),
        "moe_ffn": (torch.rand(T, H), torch.rand(T, K), ids(), *experts),
        "load_balancing_loss": (torch.rand(T, E), ids()),
        "router_z_loss": (torch.rand(T, E),),
    }


@pytest.mark.parametrize("left", [0, 4])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(
    "operator,index",
    [
        (operator, index)
        for operator, given in arguments().items()
        for index, value in enumerate(given)
        if torch.is_tensor(value)
    ],
)
def test_freed_and_shrunk_storages(operator, index, left, dtype):
    """As FSDP leaves the parameters that it has not gathered."""
    given = list(arguments()[operator])
    if dtype is not None and given[index].is_floating_point():
        given[index] = given[index].to(dtype)
    given[index] = freed(given[index], left)
    with raises(operator):
        getattr(moe_ext, operator)(*given)


@pytest.mark.parametrize("operator", ["expert_ffn", "moe_ffn"])
@pytest.mark.parametrize("index", [0, -2, -1])
def test_freed_storages_under_autocast(operator, index):
    given = list(arguments()[operator])
    given[index] = freed(given[index])
    with raises(operator), torch.autocast("cpu", torch.bfloat16):
        getattr(moe_ext, operator)(*given)


@pytest.mark.parametrize("operator", list(arguments()))
def test_parts_of_a_storage_are_fine(operator):
    """A view that ends before its storage does, and one that ends with it."""
    given = [
        torch.cat([value, value])[: len(value)] if torch.is_tensor(value) else value
        for value in arguments()[operator]
    ]
    getattr(moe_ext, operator)(*given)
    given = [
        torch.cat([value, value])[len(value) :] if torch.is_tensor(value) else value
        for value in arguments()[operator]
    ]
    getattr(moe_ext, operator)(*given)


def test_layouts():
    with pytest.raises(RuntimeError, match="router_z_loss"):
        moe_ext.router_z_loss(torch.rand(T, E).to_sparse())


# --- dtypes of gradients ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.complex64, torch.bool, torch.float8_e4m3fn, torch.int8, torch.int64]
)
@pytest.mark.parametrize(
    "operator,call",
    [
        (
            "_router_logits_backward",
            lambda g: ops._router_logits_backward(
                g(T, E), torch.rand(T, H), torch.rand(E, H), [True, True]
            ),
        ),
        (
            "_router_weights_backward",
            lambda g: ops._router_weights_backward(
                g(T, K),
                None,
                torch.rand(T, E),
                ids(),
                score_function="softmax",
                renormalize=True,
                scaling_factor=1.0,
            ),
        ),
        (
            "_router_z_loss_backward",
            lambda g: ops._router_z_loss_backward(g(), torch.rand(T, E), None),
        ),
        (
            "_load_balancing_loss_backward",
            lambda g: ops._load_balancing_loss_backward(g(), torch.rand(1, E), ids(), None),
        ),
        (
            "_load_balancing_loss_backward",
            lambda g: ops._load_balancing_loss_backward(g(), g(1, E), ids(), None),
        ),
        (
            "_permute_backward",
            lambda g: ops._permute_backward(g(2, H), row_map([[0, 1]])),
        ),
        (
            "_unpermute_backward",
            lambda g: ops._unpermute_backward(
                g(1, H), torch.rand(2, H), row_map([[0, 1]]), None, [True, True]
            ),
        ),
        (
            "_pair_weights_backward",
            lambda g: ops._pair_weights_backward(
                g(2), torch.rand(T, K), ids(2), ids(2), None, E, 1.0, [True, True]
            ),
        ),
    ],
)
def test_gradients_of_other_dtypes(operator, call, dtype):
    with raises(operator):
        call(lambda *shape: torch.zeros(shape).to(dtype))


# --- infinities ---------------------------------------------------------------------------------


def test_a_z_loss_that_overflows_is_infinite():
    """A loss scaler has to see it."""
    logits = torch.full((T, E), 1e20, requires_grad=True)
    loss = moe_ext.router_z_loss(logits)
    assert loss == float("inf") == moe_ext.reference.router_z_loss(logits)
    loss.backward()
    assert logits.grad.isfinite().all()
