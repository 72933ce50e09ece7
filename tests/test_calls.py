"""How Python calls the operators: the short way for plain arguments, and nothing lost by it."""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import moe_ext
from moe_ext import _C, ops

PLAIN = {
    "_tokens_per_expert": lambda: (torch.tensor([[0, 2], [1, 2]]), 4),
    "topk_router": lambda: (torch.randn(5, 6), 2, "softmax", True, 1.0, None, 1, 1),
    "permute": lambda: (torch.randn(3, 4), torch.tensor([[0, 1]] * 3), 2),
    "router_z_loss": lambda: (torch.randn(5, 6), torch.ones(5, dtype=torch.bool)),
    "_add_once": lambda: (torch.zeros(3), torch.ones(3)),
}


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("name", PLAIN)
def test_the_short_call_is_the_overload(name):
    arguments = PLAIN[name]()
    overload = getattr(torch.ops.moe_ext, name).default
    names = [argument.name for argument in overload._schema.arguments]
    short = _C.operator(name)(*arguments)
    long = overload(**dict(zip(names, arguments, strict=True)))
    assert short is not NotImplemented and type(short) is type(long)
    for a, b in zip(as_tuple(short), as_tuple(long), strict=True):
        assert a is b is None or torch.equal(a, b)


def test_a_parameter_is_plain_and_keeps_its_history():
    logits = torch.nn.Parameter(torch.randn(5, 6))
    weights, ids, probs = _C.operator("topk_router")(logits, 2, "softmax", True, 1.0, None, 1, 1)
    assert weights.requires_grad and probs.requires_grad and not ids.requires_grad
    assert torch.autograd.grad(weights.sum() + probs[0, 0], logits)[0].abs().sum() > 0


@pytest.mark.parametrize(
    "changed",
    [
        {0: None},
        {0: [1.0]},
        {1: 2.0},
        {1: True},
        {1: 2**70},
        {2: b"softmax"},
        {2: "\udc80"},
        {3: 1},
        {4: 1},
        {4: torch.ones(())},
        {5: 0},
    ],
    ids=str,
)
def test_what_is_not_plain_is_left_to_torch(changed):
    arguments = list(PLAIN["topk_router"]())
    for place, value in changed.items():
        arguments[place] = value
    assert _C.operator("topk_router")(*arguments) is NotImplemented


def test_the_number_of_arguments():
    call = _C.operator("_tokens_per_expert")
    assert call(torch.zeros(1, 1).long()) is NotImplemented
    assert call(torch.zeros(1, 1).long(), 2, 3) is NotImplemented
    with pytest.raises(RuntimeError, match="moe_ext::no_such"):
        _C.operator("no_such")


def test_errors_are_the_operators_own():
    with pytest.raises(IndexError, match="_tokens_per_expert: topk_ids must be >= -1, got -5"):
        ops._tokens_per_expert(torch.tensor([[-5]]), 2)
    with pytest.raises(ValueError, match="score_function must be softmax or sigmoid"):
        moe_ext.topk_router(torch.randn(5, 6), 2, score_function="none")
    with pytest.raises(TypeError, match="topk_router: top_k must be an integer, got str"):
        moe_ext.topk_router(torch.randn(5, 6), "2")


def test_subclasses_and_modes_see_the_operator():
    class Logged(torch.Tensor):
        calls = []

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            cls.calls.append(str(function))
            return super().__torch_function__(function, types, args, kwargs)

    class Functions(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    class Dispatches(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    logits = torch.randn(5, 6)
    moe_ext.topk_router(logits.as_subclass(Logged), 2)
    assert "moe_ext.topk_router.default" in Logged.calls
    for mode in (Functions(), Dispatches()):
        seen = []
        with mode:
            moe_ext.topk_router(logits, 2)
        assert "moe_ext.topk_router.default" in seen


def test_no_graph_is_made_where_nobody_can_ask_for_a_derivative():
    tokens, weight = torch.randn(5, 4), torch.nn.Parameter(torch.randn(6, 4))
    with torch.no_grad():
        assert ops._router_logits(tokens, weight).grad_fn is None
    logits = ops._router_logits(tokens, weight.detach())
    assert logits.grad_fn is None and not logits.requires_grad
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(tokens, tokens)
        with torch.no_grad(), pytest.raises(RuntimeError, match="jvp is not implemented"):
            ops._router_logits(dual, weight)
