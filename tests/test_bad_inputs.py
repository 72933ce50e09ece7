"""Every bad input, and the exact start of the error it gives."""

import pytest
import torch
from conftest import EMULATED

import moe_ext

T, H, I, E, K = 6, 8, 4, 3, 2


def good(op: str) -> dict:
    tokens, ids = torch.randn(T, H), torch.randint(E, (T, K))
    experts = {"gate_up_proj": torch.randn(E, 2 * I, H), "down_proj": torch.randn(E, H, I)}
    offsets = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    row_map = torch.arange(T * K, dtype=torch.int32).view(T, K)
    pairs = {"pair_tokens": torch.randint(T, (9,)), "pair_experts": torch.randint(E, (9,))}
    factor = torch.tensor(1.0, dtype=torch.float64)
    rows = torch.randn(T * K, H)
    return {
        "topk_router": {"router_logits": torch.randn(T, 8), "top_k": K},
        "permute": {"tokens": tokens, "topk_ids": ids, "num_experts": E},
        "unpermute": {"rows": rows, "row_map": row_map, "topk_weights": torch.rand(T, K)},
        "expert_ffn": {"rows": rows, "expert_offsets": offsets, **experts},
        "moe_ffn": {"tokens": tokens, "topk_weights": torch.rand(T, K), "topk_ids": ids, **experts},
        "load_balancing_loss": {"router_probs": torch.rand(T, E), "topk_ids": ids},
        "router_z_loss": {"router_logits": torch.randn(T, E)},
        "_router_logits": {"tokens": tokens, "weight": torch.randn(E, H)},
        "_router_weights": {
            "router_logits": torch.randn(T, E),
            "topk_ids": ids,
            "score_function": "softmax",
            "renormalize": True,
            "scaling_factor": 1.0,
        },
        "_grouped_linear": {
            "rows": rows,
            "expert_offsets": offsets,
            "weight": torch.randn(E, I, H),
        },
        "_tokens_per_expert": {"topk_ids": ids, "num_experts": E},
        "_router_entropy": {"router_probs": torch.rand(T, E)},
        "_moe_ffn_pairs": {"tokens": tokens, "pair_weights": torch.rand(9), **pairs, **experts},
        "_apply_capacity": {
            "topk_weights": torch.rand(T, K),
            "topk_ids": ids,
            "capacity_factor": factor,
            "num_experts": E,
        },
        "_round_tokens": {
            "router_probs": torch.rand(T, E),
            "topk_weights": torch.rand(T, K),
            "topk_ids": ids,
            "tile_size": 4,
        },
        "_expert_choice": {"router_probs": torch.rand(T, E), "token_mask": None, "top_k": K},
        "_pair_weights": {
            "topk_weights": torch.rand(T, K),
            "router_probs": torch.rand(T, E),
            **pairs,
            "pair_slots": None,
            "num_experts": E,
        },
    }[op]


def f(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(*shape, dtype=dtype, device=device)


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


R, V, X = RuntimeError, ValueError, IndexError
BAD = [  # operator, changed arguments, error, message
    ("topk_router", {"router_logits": f(T)}, R, "router_logits must be [T, E], got [6]"),
    (
        "topk_router",
        {"router_logits": f(T, 8).int()},
        R,
        "router_logits must be float64, float32, bfloat16 or float16, got Int",
    ),
    ("topk_router", {"router_logits": f(T, 0)}, R, "router_logits must have E >= 1, got E=0"),
    ("topk_router", {"top_k": 0}, V, "top_k must be in [1, E=8], got 0"),
    ("topk_router", {"top_k": 9}, V, "top_k must be in [1, E=8], got 9"),
    (
        "topk_router",
        {"score_function": "tanh"},
        V,
        "score_function must be softmax or sigmoid, got tanh",
    ),
    ("topk_router", {"expert_bias": f(7)}, R, "expert_bias must be [E=8], got [7]"),
    (
        "topk_router",
        {"expert_bias": f(8, device="meta")},
        R,
        "expert_bias must be on cpu, got meta",
    ),
    ("topk_router", {"num_groups": 3}, V, "num_groups must divide E=8, got 3"),
    ("topk_router", {"num_groups": 0}, V, "num_groups must divide E=8, got 0"),
    (
        "topk_router",
        {"num_groups": 4, "topk_groups": 5},
        V,
        "topk_groups must be in [1, num_groups=4], got 5",
    ),
    (
        "topk_router",
        {"num_groups": 8},
        V,
        "top_k must be at most topk_groups * E / num_groups = 1, got 2",
    ),
    (
        "topk_router",
        {"num_groups": 8, "topk_groups": 2, "score_function": "sigmoid"},
        V,
        "num_groups must leave groups of at least 2 experts for sigmoid, got groups of 1",
    ),
    ("_router_weights", {"topk_ids": f(T, K)}, R, "topk_ids must be int64 or int32, got Float"),
    (
        "_router_weights",
        {"topk_ids": f(T + 1, K).long()},
        R,
        "topk_ids must be [T=6, K], got [7, 2]",
    ),
    (
        "_router_weights",
        {"score_function": "x"},
        V,
        "score_function must be softmax or sigmoid, got x",
    ),
    ("_router_logits", {"weight": f(E, H + 1)}, R, "weight must be [E, H=8], got [3, 9]"),
    ("_router_logits", {"tokens": f(T)}, R, "tokens must be [T, H], got [6]"),
    ("permute", {"tokens": f(T)}, R, "tokens must be [T, H], got [6]"),
    ("permute", {"topk_ids": f(T + 1, K).long()}, R, "topk_ids must be [T=6, K], got [7, 2]"),
    ("permute", {"topk_ids": f(T, K)}, R, "topk_ids must be int64 or int32, got Float"),
    ("permute", {"topk_ids": f(T, K).long() - 2}, X, "topk_ids must be >= -1, got -2"),
    ("permute", {"num_experts": 0}, R, "num_experts must be >= 1, got 0"),
    (
        "permute",
        {"topk_ids": f(T, K, device="meta").long()},
        R,
        "topk_ids must be on cpu, got meta",
    ),
    ("unpermute", {"rows": f(T)}, R, "rows must be [N, H], got [6]"),
    ("unpermute", {"row_map": f(T, K).long()}, R, "row_map must be Int, got Long"),
    ("unpermute", {"row_map": i32([99, 0])}, R, "topk_weights must be [T=1, K=2], got [6, 2]"),
    (
        "unpermute",
        {"row_map": i32([99, 0]), "topk_weights": None},
        X,
        "row_map must be -1 or in [0, N=12), got 99",
    ),
    (
        "unpermute",
        {"row_map": i32([-2, 0]), "topk_weights": None},
        X,
        "row_map must be -1 or in [0, N=12), got -2",
    ),
    (
        "unpermute",
        {"row_map": i32([4, 4]), "topk_weights": None},
        X,
        "row_map must name a row once at most, got row 4 twice",
    ),
    ("expert_ffn", {"rows": f(T)}, R, "rows must be [N, H], got [6]"),
    ("expert_ffn", {"expert_offsets": i32(0, 2, 5)}, R, "expert_offsets must be [E+1=4], got [3]"),
    (
        "expert_ffn",
        {"expert_offsets": torch.tensor([0, 2, 2, 5])},
        R,
        "expert_offsets must be Int, got Long",
    ),
    (
        "expert_ffn",
        {"expert_offsets": i32(0, 3, 2, 5)},
        X,
        "expert_offsets must ascend from 0 to at most N=12, got [0, 3, 2, 5]",
    ),
    (
        "expert_ffn",
        {"expert_offsets": i32(1, 2, 2, 5)},
        X,
        "expert_offsets must ascend from 0 to at most N=12, got [1, 2, 2, 5]",
    ),
    (
        "expert_ffn",
        {"expert_offsets": i32(0, 2, 2, 13)},
        X,
        "expert_offsets must ascend from 0 to at most N=12, got [0, 2, 2, 13]",
    ),
    ("expert_ffn", {"row_weights": f(5)}, R, "row_weights must be [N=12], got [5]"),
    ("expert_ffn", {"recompute": "all"}, V, "recompute must be activation or hidden, got all"),
    ("moe_ffn", {"tokens": f(T, H, 1)}, R, "tokens must be [T, H], got [6, 8, 1]"),
    (
        "moe_ffn",
        {"tokens": f(T, H, dtype=torch.complex64)},
        R,
        "tokens must be float64, float32, bfloat16 or float16, got ComplexFloat",
    ),
    ("moe_ffn", {"topk_weights": f(T, K + 1)}, R, "topk_weights must be [T=6, K=2], got [6, 3]"),
    (
        "moe_ffn",
        {"topk_weights": f(T, K).int()},
        R,
        "topk_weights must be float64, float32, bfloat16 or float16, got Int",
    ),
    ("moe_ffn", {"topk_ids": f(T).long()}, R, "topk_ids must be [T=6, K], got [6]"),
    ("moe_ffn", {"topk_ids": f(T, K).long() - 5}, X, "topk_ids must be >= -1, got -5"),
    (
        "moe_ffn",
        {"gate_up_proj": f(E, 2 * I, H + 1)},
        R,
        "gate_up_proj must be [E, 2I, H=8], got [3, 8, 9]",
    ),
    (
        "moe_ffn",
        {"gate_up_proj": f(E, 2 * I + 1, H)},
        R,
        "gate_up_proj must be [E, 2I, H] with an even 2I, got [3, 9, 8]",
    ),
    ("moe_ffn", {"gate_up_proj": f(0, 2 * I, H)}, R, "gate_up_proj must have E >= 1, got E=0"),
    (
        "moe_ffn",
        {"gate_up_proj": f(E, 2 * I, H).double()},
        R,
        "gate_up_proj must be Float like tokens, got Double",
    ),
    (
        "moe_ffn",
        {"down_proj": f(E, H, I + 1)},
        R,
        "down_proj must be [E=3, H=8, I=4], got [3, 8, 5]",
    ),
    ("moe_ffn", {"gated": False}, R, "down_proj must be [E=3, H=8, I=8], got [3, 8, 4]"),
    ("moe_ffn", {"down_proj": f(E, H, I, device="meta")}, R, "down_proj must be on cpu, got meta"),
    ("moe_ffn", {"gate_up_bias": f(E, I)}, R, "gate_up_bias must be [E=3, 2I=8], got [3, 4]"),
    ("moe_ffn", {"down_bias": f(E)}, R, "down_bias must be [E=3, H=8], got [3]"),
    (
        "moe_ffn",
        {"activation": "swish"},
        V,
        "activation must be silu, gelu, gelu_tanh, relu, relu2, identity or swiglu_clamped, "
        "got swish",
    ),
    (
        "moe_ffn",
        {"activation": "swiglu_clamped", "gated": False, "gate_up_proj": f(E, I, H)},
        V,
        "activation must be gated for swiglu_clamped, got gated=False",
    ),
    ("moe_ffn", {"recompute": "nothing"}, V, "recompute must be activation or hidden, got nothing"),
    ("_grouped_linear", {"weight": f(E, I, H + 1)}, R, "weight must be [E, O, H=8], got [3, 4, 9]"),
    ("_grouped_linear", {"bias": f(E, I + 1)}, R, "bias must be [E=3, O=4], got [3, 5]"),
    (
        "_grouped_linear",
        {"expert_offsets": i32(0, 2, 2, 13)},
        X,
        "expert_offsets must ascend from 0 to at most N=12",
    ),
    ("load_balancing_loss", {"router_probs": f(T)}, R, "router_probs must be [T, E], got [6]"),
    ("load_balancing_loss", {"topk_ids": f(T, 0).long()}, R, "topk_ids must have K >= 1, got K=0"),
    ("load_balancing_loss", {"token_mask": f(T)}, R, "token_mask must be Bool, got Float"),
    (
        "load_balancing_loss",
        {"token_mask": f(T + 1).bool()},
        R,
        "token_mask must be [T=6], got [7]",
    ),
    (
        "router_z_loss",
        {"router_logits": f(T, E).long()},
        R,
        "router_logits must be float64, float32, bfloat16 or float16, got Long",
    ),
    ("router_z_loss", {"token_mask": f(1, T).bool()}, R, "token_mask must be [T=6], got [1, 6]"),
    (
        "load_balancing_loss",
        {"num_sequences": 0},
        V,
        "num_sequences must be >= 1, got 0",
    ),
    ("load_balancing_loss", {"num_sequences": 4}, R, "num_sequences must divide T=6, got 4"),
    ("load_balancing_loss", {"expert_share": f(4)}, R, "expert_share must be [E=3], got [4]"),
    (
        "load_balancing_loss",
        {"expert_share": f(E), "num_sequences": 2},
        V,
        "expert_share must go with num_sequences=1, got 2",
    ),
    ("_router_entropy", {"router_probs": f(T)}, R, "router_probs must be [T, E], got [6]"),
    ("_router_entropy", {"token_mask": f(T)}, R, "token_mask must be Bool, got Float"),
    ("_moe_ffn_pairs", {"pair_weights": f(8)}, R, "pair_weights must be [P=9], got [8]"),
    ("_moe_ffn_pairs", {"pair_experts": f(9)}, R, "pair_experts must be int64 or int32, got Float"),
    ("_moe_ffn_pairs", {"pair_tokens": f(8).long()}, R, "pair_tokens must be [P=9], got [8]"),
    ("_moe_ffn_pairs", {"pair_tokens": f(9).long() + 6}, X, "pair_tokens must be in [-1, T=6)"),
    ("_moe_ffn_pairs", {"pair_tokens": f(9).long() - 2}, X, "pair_tokens must be in [-1, T=6)"),
    ("_moe_ffn_pairs", {"pair_experts": f(9).long() - 2}, X, "pair_experts must be >= -1, got -2"),
    ("_moe_ffn_pairs", {"recompute": "x"}, V, "recompute must be activation or hidden, got x"),
    ("_apply_capacity", {"topk_weights": f(T, 3)}, R, "topk_weights must be [T=6, K=2], got"),
    ("_apply_capacity", {"topk_ids": f(T, K)}, R, "topk_ids must be int64 or int32, got Float"),
    ("_apply_capacity", {"capacity_factor": f(())}, R, "capacity_factor must be Double, got Float"),
    (
        "_apply_capacity",
        {"capacity_factor": f(1, dtype=torch.float64)},
        R,
        "capacity_factor must be [], got [1]",
    ),
    ("_apply_capacity", {"min_capacity": 0}, V, "min_capacity must be >= 1, got 0"),
    ("_apply_capacity", {"num_experts": 0}, R, "num_experts must be >= 1, got 0"),
    ("_apply_capacity", {"drop_policy": "x"}, V, "drop_policy must be probs or position, got x"),
    ("_round_tokens", {"router_probs": f(T)}, R, "router_probs must be [T, E], got [6]"),
    ("_round_tokens", {"tile_size": 0}, V, "tile_size must be in [1, 2^20], got 0"),
    (
        "_round_tokens",
        {"rounding": "x"},
        V,
        "rounding must be nearest, up, down, stochastic or balanced, got x",
    ),
    (
        "_round_tokens",
        {"rounding": "stochastic"},
        V,
        "noise must be given for stochastic rounding and no other, got rounding stochastic",
    ),
    (
        "_round_tokens",
        {"noise": f(E, dtype=torch.float64)},
        V,
        "noise must be given for stochastic rounding and no other, got rounding nearest",
    ),
    (
        "_round_tokens",
        {"noise": f(E), "rounding": "stochastic"},
        R,
        "noise must be Double, got Float",
    ),
    (
        "_round_tokens",
        {"capacity_factor": f((), dtype=torch.float64), "min_capacity": 0},
        V,
        "min_capacity must be >= 1, got 0",
    ),
    ("_expert_choice", {"top_k": 0}, V, "top_k must be in [1, E=3], got 0"),
    ("_expert_choice", {"token_mask": f(T)}, R, "token_mask must be Bool, got Float"),
    ("_pair_weights", {"num_experts": 4}, R, "router_probs must be [T, E=4], got [6, 3]"),
    (
        "_pair_weights",
        {"router_probs": f(T, E).half()},
        R,
        "router_probs must be float32 or float64, got Half",
    ),
    (
        "_pair_weights",
        {"topk_weights": f(T, K).double()},
        R,
        "topk_weights must be Float like router_probs, got",
    ),
    ("_pair_weights", {"pair_tokens": f(9).int()}, R, "pair_tokens must be Long, got Int"),
    ("_pair_weights", {"pair_slots": f(8).long()}, R, "pair_slots must be [P=9], got [8]"),
    ("_pair_weights", {"pair_tokens": f(9).long() + 6}, X, "pair_tokens must be in [-1, T=6)"),
    ("_pair_weights", {"pair_experts": f(9).long() + 3}, X, "pair_experts must be in [0, E=3)"),
    ("_pair_weights", {"pair_slots": f(9).long() + 12}, X, "pair_slots must be in [-1, T K=12)"),
    ("_tokens_per_expert", {"num_experts": 0}, R, "num_experts must be >= 1, got 0"),
    ("_tokens_per_expert", {"topk_ids": f(T).long()}, R, "topk_ids must be [T, K], got [6]"),
]


def moved(arguments: dict, device: str) -> dict:
    """On the device, but for what is to stay on meta."""
    return {
        name: value.to(device) if torch.is_tensor(value) and not value.is_meta else value
        for name, value in arguments.items()
    }


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "op,change,error,message", BAD, ids=[f"{op}-{next(iter(change))}" for op, change, *_ in BAD]
)
def test_error(device, op, change, error, message, grad):
    if error is X and (device == "cuda" or EMULATED):
        pytest.skip("values are not checked on CUDA: nothing is read back")
    function = getattr(moe_ext, op, None) or getattr(torch.ops.moe_ext, op)
    with torch.set_grad_enabled(grad), pytest.raises(error) as caught:
        function(**moved({**good(op), **change}, device))
    assert str(caught.value).startswith(f"{op}: {message.replace('on cpu', f'on {device}')}")
    assert type(caught.value) is error


@pytest.mark.parametrize("op", sorted({op for op, *_ in BAD}))
def test_good_inputs_pass(device, op):
    function = getattr(moe_ext, op, None) or getattr(torch.ops.moe_ext, op)
    function(**moved(good(op), device))


def is_for_fake_tensors(row) -> bool:
    """Not the checks of values, nor a mix of devices, which torch refuses itself there."""
    _, change, error, _ = row
    return error is not X and not any(torch.is_tensor(v) and v.is_meta for v in change.values())


@pytest.mark.parametrize("op,change,error,message", [*filter(is_for_fake_tensors, BAD)])
def test_same_error_under_fake_tensors(op, change, error, message):
    from torch._subclasses.fake_tensor import FakeTensorMode

    function = getattr(moe_ext, op, None) or getattr(torch.ops.moe_ext, op)
    arguments = {**good(op), **change}
    with FakeTensorMode() as mode, pytest.raises(error) as caught:
        function(
            **{
                name: mode.from_tensor(value) if torch.is_tensor(value) else value
                for name, value in arguments.items()
            }
        )
    assert message in str(caught.value)
