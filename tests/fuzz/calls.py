"""Good calls of every operator, and what each must return.

A variant of an operator is a table of its tensors, its other arguments and its outputs. Sizes are
letters (T tokens, H hidden, I intermediate, E experts, K choices, N rows, P pairs, S sequences,
O outputs), of which W = 2I if gated else I, E1 = E + 1 and TK = T K derive. Of packed weights: UB,
DB, OB blocks of W, H, O columns; H2, I2 pairs of terms; 64 and 2.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
IDS = (torch.int64, torch.int32)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "identity", "swiglu_clamped")
ROUNDINGS = ("nearest", "up", "down", "stochastic", "balanced")


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# What an argument's dtype may be. "like NAME": that argument's.
DTYPES = {
    "float": FLOATS,
    "wide": FLOATS[:2],
    "ids": IDS,
    "int32": (torch.int32,),
    "int64": (torch.int64,),
    "float64": (torch.float64,),
    "bf16": (torch.bfloat16,),
    "not bf16": (torch.float64, torch.float32, torch.float16),
    "bool": (torch.bool,),
}


@dataclass(frozen=True)
class Spec:
    """A tensor argument: its dtype (see DTYPES), its sizes, how its values are drawn."""

    dtype: str
    sizes: tuple[str, ...]
    values: str
    optional: bool = False


def spec(dtype: str, sizes: str, values: str = "normal") -> Spec:
    return Spec(dtype.rstrip("?"), tuple(sizes.split()), values, dtype.endswith("?"))


@dataclass
class Variant:
    tensors: dict[str, Spec]
    others: Callable[["Draw"], dict[str, Any]]  # arguments that are no tensors
    outputs: Callable[["Draw", dict[str, Any]], list]  # (dtype, sizes) of every output, or None
    uses: frozenset[str] = frozenset()  # letters that an argument which is no tensor fixes


@dataclass
class Call:
    operator: str
    arguments: dict[str, Any]
    variant: Variant
    draw: "Draw"
    outputs: list
    notes: list[str] = field(default_factory=list)


class Draw:
    """Sizes, a routing and values, all from one seed."""

    def __init__(self, rng: random.Random, large: bool = False):
        self.rng = rng
        self.generator = torch.Generator().manual_seed(rng.getrandbits(60))
        T = rng.choice([0, 1, 2, 3, 5, 8, 17, 33, 64] + [130, 300] * large)
        E = rng.choice([1, 2, 3, 4, 6, 8, 12] + [16, 40, 70] * large)
        K = rng.randint(1, min(E, 6))
        self.gated = rng.random() < 0.6
        I = rng.choice([1, 2, 3, 5, 8, 16] + [24, 33, 64, 100] * large)
        H = rng.choice([1, 2, 3, 7, 8, 16] + [20, 33, 64, 130] * large)
        O = rng.choice([1, 2, 5, 8, 16] + [17, 64] * large)
        self.sizes = {
            "T": T,
            "H": H,
            "I": I,
            "W": 2 * I if self.gated else I,
            "E": E,
            "E1": E + 1,
            "K": K,
            "O": O,
            "UB": math.ceil(I / (32 if self.gated else 64)),
            "DB": math.ceil(H / 64),
            "OB": math.ceil(O / 64),
            "H2": math.ceil(H / 2),
            "I2": math.ceil(I / 2),
            "64": 64,
            "2": 2,
            "1": 1,
            "N": T * K + rng.choice([0, 0, 1, 7]),
            "TK": T * K,
            "P": rng.choice([0, 1, 2, 9, 30]) if T else rng.choice([0, 3]),
            "S": rng.choice([s for s in (1, 1, 2, 3, 4) if T % s == 0]),
        }
        self.route()

    def route(self) -> None:
        """ids [T, K] with skipped ones, their plan, and pairs [P] with theirs."""
        rng, T, K, E, P = self.rng, *(self.sizes[x] for x in "TKEP")
        skip = rng.choice([0.0, 0.0, 0.3, 1.0])
        self.ids = [
            [rng.choice([-1, E, E + 9]) if rng.random() < skip else e for e in row]
            for row in (rng.sample(range(E), K) for _ in range(T))
        ]
        self.row_map, self.offsets = plan([e for row in self.ids for e in row], range(T * K), E)
        self.pair_tokens = [rng.choice([-1, *range(T)]) for _ in range(P)]
        self.pair_experts = [rng.randrange(E) for _ in range(P)]
        self.pair_slots = [rng.randrange(-1, T * K) for _ in range(P)]
        experts = [e if t >= 0 else -1 for t, e in zip(*self.pairs(), strict=True)]
        order = sorted(range(P), key=lambda p: self.pair_tokens[p])
        self.pair_row_map, self.pair_offsets = plan(experts, order, E)
        N = self.sizes["N"]
        cuts = sorted(rng.randint(0, N) for _ in range(E))
        self.row_offsets = [0, *cuts]

    def pairs(self) -> tuple[list[int], list[int]]:
        return self.pair_tokens, self.pair_experts

    def values(self, kind: str, sizes: list[int]) -> Tensor:
        normal = torch.randn(sizes, generator=self.generator, dtype=torch.float64)
        uniform = torch.rand(sizes, generator=self.generator, dtype=torch.float64)
        match kind:
            case "normal":
                return normal
            case "matrix":  # a weight, whose products are of size 1
                return normal / max(sizes[-1], 1) ** 0.5
            case "packed":  # the same of a packed one
                return normal / max(sizes[2] * sizes[4], 1) ** 0.5
            case "probs":
                return normal.softmax(-1)
            case "uniform":
                return uniform
            case "factor":
                return uniform * 2 + 0.1
            case "mask":
                return uniform < self.rng.choice([0.0, 0.5, 0.9, 1.0])
            case _:
                return torch.tensor(getattr(self, kind), dtype=torch.int64).reshape(sizes)


def plan(ids: list[int], order, E: int) -> tuple[list[int], list[int]]:
    """The row of every slot, rows grouped by expert and in `order` within one; their offsets."""
    row_map, offsets = [-1] * len(ids), [0]
    row = 0
    for e in range(E):
        for slot in order:
            if ids[slot] == e:
                row_map[slot], row = row, row + 1
        offsets.append(row)
    return row_map, offsets


def mask(n: int):
    return lambda d: {"output_mask": [d.rng.random() < 0.7 for _ in range(n)]}


def scores(d: Draw) -> dict:
    return {
        "score_function": d.rng.choice(["softmax", "sigmoid"]),
        "renormalize": d.rng.random() < 0.5,
        "scaling_factor": d.rng.choice([1.0, 2.5, 0.3]),
    }


def topk_options(d: Draw) -> dict:
    E, K, options = d.sizes["E"], d.sizes["K"], scores(d)
    least = 2 if options["score_function"] == "sigmoid" else 1
    groups = d.rng.choice(
        [g for g in range(1, E + 1) if E % g == 0 and (g == 1 or E // g >= least)]
    )
    chosen = d.rng.choice([g for g in range(1, groups + 1) if K <= E // groups * g])
    return {"top_k": K, **options, "num_groups": groups, "topk_groups": chosen}


def activation(d: Draw) -> dict:
    return {"activation": d.rng.choice(ACTIVATIONS[: None if d.gated else -1]), "gated": d.gated}


def recompute(d: Draw) -> dict:
    return {**activation(d), "recompute": d.rng.choice(["activation", "hidden"])}


def recompute_and_fuse(d: Draw) -> dict:
    return {**recompute(d), "fuse_grad_accumulation": d.rng.choice([False, True])}


def save_hidden(d: Draw) -> dict:
    return {**activation(d), "save_hidden": d.rng.random() < 0.5}


def balance(d: Draw) -> dict:
    return {"normalize_by_topk": d.rng.random() < 0.5, "num_sequences": d.sizes["S"]}


def capacity(d: Draw) -> dict:
    return {
        "num_experts": d.sizes["E"],
        "min_capacity": d.rng.choice([1, 1, 3, 1000]),
        "drop_policy": d.rng.choice(["probs", "position"]),
    }


def rounding(d: Draw) -> dict:
    return {
        "tile_size": d.rng.choice([1, 2, 3, 8, 100]),
        "rounding": d.rng.choice(ROUNDINGS),
        "min_capacity": d.rng.choice([1, 1, 3, 1000]),
    }


def num_experts(d: Draw) -> dict:
    return {"num_experts": d.sizes["E"]}


def pair_options(d: Draw) -> dict:
    return {"num_experts": d.sizes["E"], "scaling_factor": d.rng.choice([1.0, 0.3])}


def like(*names: str, masked: bool = False):
    """Outputs of the dtype and sizes of arguments; none for an absent one, and where the mask
    says so."""

    def outputs(d, a):
        asked = a["output_mask"] if masked else [True] * len(names)
        return [
            (a[name].dtype, list(a[name].shape)) if wanted and a.get(name) is not None else None
            for name, wanted in zip(names, asked, strict=True)
        ]

    return outputs


def shaped(*outputs):
    """Outputs given as (dtype, sizes): dtype a torch.dtype, "NAME", or "wide NAME"."""

    def build(d, a):
        result = []
        for dtype, sizes in outputs:
            if isinstance(dtype, str):
                name = dtype.removeprefix("wide ")
                dtype = wide(a[name].dtype) if name != dtype else a[name].dtype
            result.append((dtype, [d.sizes[x] for x in sizes.split()]))
        return result

    return build


def rounded_outputs(d: Draw, a: dict) -> list:
    T, K, E, M = *(d.sizes[x] for x in "TKE"), a["tile_size"]
    padding = {"nearest": E * M // 2, "down": 0}.get(a["rounding"], E * (M - 1))
    return [(torch.int64, [T * K + padding])] * 3 + [(torch.int64, [T, K])]


def chosen_outputs(d: Draw, a: dict) -> list:
    T, E = d.sizes["T"], d.sizes["E"]
    return [(torch.int64, [E * min(T, math.ceil(T * a["top_k"] / E))])] * 2


def hidden_output(sizes: str):
    def build(d, a):
        return shaped(("tokens" if "tokens" in a else "rows", sizes))(d, a) * a["save_hidden"] or [
            None
        ]

    return build


def joined(*builders):
    return lambda d, a: [output for build in builders for output in build(d, a)]


LOGITS = {"router_logits": spec("float", "T E")}
PROBS = {"router_probs": spec("float", "T E", "probs")}
CHOICE = {"topk_ids": spec("ids", "T K", "ids")}
MASK = {"token_mask": spec("bool?", "T", "mask")}
WEIGHTS = {"topk_weights": spec("float", "T K", "uniform")}
SHARE = {"expert_share": spec("float?", "E", "uniform")}


def experts(tokens: str) -> dict[str, Spec]:
    return {
        "gate_up_proj": spec(f"like {tokens}", "E W H", "matrix"),
        "down_proj": spec(f"like {tokens}", "E H I", "matrix"),
        "gate_up_bias": spec(f"like {tokens}?", "E W"),
        "down_bias": spec(f"like {tokens}?", "E H"),
    }


def pairs(slots: bool) -> dict[str, Spec]:
    return {
        "pair_tokens": spec("int64", "P", "pair_tokens"),
        "pair_experts": spec("int64", "P", "pair_experts"),
        **({"pair_slots": spec("int64?", "P", "pair_slots")} if slots else {}),
    }


BALANCE = {**PROBS, **CHOICE, **MASK, **SHARE}
EXPERT_FFN = {
    "rows": spec("float", "N H"),
    "expert_offsets": spec("int32", "E1", "row_offsets"),
    **experts("rows"),
    "row_weights": spec("float?", "N"),
}
TOKENS = {"tokens": spec("float", "T H")}
PAIRS = {
    "pair_tokens": spec("ids", "P", "pair_tokens"),
    "pair_experts": spec("ids", "P", "pair_experts"),
}
FFN_GRADS = like(
    *("tokens", "weights", "gate_up_proj", "down_proj", "gate_up_bias", "down_bias"), masked=True
)


def ffn_grads_into(d: Draw, a: dict) -> list:
    outputs = FFN_GRADS(d, a)
    for i, name in ((2, "into_gate_up_proj"), (3, "into_down_proj")):
        if a.get(name) is not None:
            outputs[i] = None
    return outputs


def ffn_backward(rows: str, **tensors: Spec) -> Variant:
    return Variant(
        {
            "grad_out": spec("like tokens", f"{rows} H"),
            "tokens": spec("float", f"{rows} H"),
            **tensors,
            **experts("tokens"),
        },
        lambda d: {**activation(d), **mask(6)(d)},
        FFN_GRADS,
    )


def packed_experts(dtype: str, steps: tuple[str, str], pair: str, slots: bool) -> Variant:
    weights = (
        {"weights": spec("float", "T K", "uniform"), "ids": CHOICE["topk_ids"]}
        if slots
        else {"weights": spec("float", "P"), "ids": PAIRS["pair_experts"], **TOKENS_OF_PAIRS}
    )
    return Variant(
        {
            "tokens": spec(dtype, "T H"),
            **weights,
            "gate_up_packed": spec("like tokens", f"E UB {steps[0]} 64 {pair}", "packed"),
            "down_packed": spec("like tokens", f"E DB {steps[1]} 64 {pair}", "packed"),
            "gate_up_bias": spec("like tokens?", "E W"),
            "down_bias": spec("like tokens?", "E H"),
        },
        lambda d: {**activation(d), "intermediate_size": d.sizes["I"]},
        shaped(("tokens", "T H")),
        frozenset({"I", *PACKED_SIZES}),
    )


def unpacked(dtype: str, steps: str, pair: str) -> Variant:
    return Variant(
        {"packed": spec(dtype, f"E OB {steps} 64 {pair}", "packed")},
        lambda d: {"N": d.sizes["O"], "K": d.sizes["H"], "gated": False},
        shaped(("packed", "E O H")),
        frozenset(PACKED_SIZES),
    )


TOKENS_OF_PAIRS = {"pair_tokens": PAIRS["pair_tokens"]}
PACKED_SIZES = ("UB", "DB", "OB", "H", "H2", "I2", "64", "2", "1")


OPERATORS: dict[str, list[Variant]] = {
    "_router_logits": [
        Variant(
            {**TOKENS, "weight": spec("float", "E H", "matrix")},
            lambda d: {},
            lambda d, a: [
                (
                    wide(torch.promote_types(wide(a["tokens"].dtype), wide(a["weight"].dtype))),
                    [d.sizes["T"], d.sizes["E"]],
                )
            ],
        )
    ],
    "_router_logits_backward": [
        Variant(
            {
                "grad_logits": spec("float", "T E"),
                **TOKENS,
                "weight": spec("float", "E H", "matrix"),
            },
            mask(2),
            like("tokens", "weight", masked=True),
        )
    ],
    "topk_router": [
        Variant(
            {**LOGITS, "expert_bias": spec("float?", "E")},
            topk_options,
            shaped(
                ("wide router_logits", "T K"), (torch.int64, "T K"), ("wide router_logits", "T E")
            ),
        )
    ],
    "_router_weights": [
        Variant(
            {**LOGITS, **CHOICE},
            scores,
            shaped(("wide router_logits", "T K"), ("wide router_logits", "T E")),
        )
    ],
    "_router_weights_backward": [
        Variant(
            {
                "grad_weights": spec("float?", "T K"),
                "grad_probs": spec("float?", "T E"),
                **LOGITS,
                **CHOICE,
            },
            scores,
            like("router_logits"),
        )
    ],
    "load_balancing_loss": [Variant(BALANCE, balance, shaped(("wide router_probs", "")))],
    "_load_balancing_loss_forward": [
        Variant(BALANCE, balance, shaped(("wide router_probs", ""), ("wide router_probs", "S E")))
    ],
    "_load_balancing_loss_backward": [
        Variant(
            {
                "grad_loss": spec("like grad_row", ""),
                "grad_row": spec("wide", "S E"),
                **CHOICE,
                **MASK,
            },
            lambda d: {},
            shaped(("grad_row", "T E")),
        )
    ],
    "router_z_loss": [
        Variant({**LOGITS, **MASK}, lambda d: {}, shaped(("wide router_logits", "")))
    ],
    "_router_z_loss_backward": [
        Variant(
            {"grad_loss": spec("float", ""), **LOGITS, **MASK},
            lambda d: {},
            like("router_logits"),
        )
    ],
    "_tokens_per_expert": [Variant(CHOICE, num_experts, shaped((torch.int64, "E")))],
    "_router_entropy": [
        Variant({**PROBS, **MASK}, lambda d: {}, shaped(("wide router_probs", "")))
    ],
    "_add_once": [
        Variant(
            {"total": spec("float", "E"), "value": spec("like total", "E")},
            lambda d: {},
            lambda d, a: [],
        )
    ],
    "_apply_capacity": [
        Variant(
            {**WEIGHTS, **CHOICE, "capacity_factor": spec("float64", "", "factor")},
            capacity,
            shaped((torch.int64, "T K")),
        )
    ],
    "_round_tokens": [
        Variant(
            {
                **PROBS,
                **WEIGHTS,
                **CHOICE,
                "capacity_factor": spec("float64?", "", "factor"),
                "noise": spec("float64", "E", "uniform"),
            },
            rounding,
            rounded_outputs,
        )
    ],
    "_expert_choice": [
        Variant({**PROBS, **MASK}, lambda d: {"top_k": d.sizes["K"]}, chosen_outputs)
    ],
    "_pair_weights": [
        Variant(
            {
                "topk_weights": spec("like router_probs", "T K", "uniform"),
                "router_probs": spec("wide", "T E", "probs"),
                **pairs(slots=True),
            },
            pair_options,
            shaped(("router_probs", "P")),
            frozenset("E"),
        )
    ],
    "_pair_weights_backward": [
        Variant(
            {
                "grad": spec("like topk_weights", "P"),
                "topk_weights": spec("wide", "T K", "uniform"),
                **pairs(slots=True),
            },
            lambda d: {**pair_options(d), **mask(2)(d)},
            lambda d, a: [
                output if wanted else None
                for output, wanted in zip(
                    shaped(("topk_weights", "T K"), ("topk_weights", "T E"))(d, a),
                    a["output_mask"],
                    strict=True,
                )
            ],
        )
    ],
    "permute": [
        Variant(
            {**TOKENS, **CHOICE},
            num_experts,
            shaped(("tokens", "TK H"), (torch.int32, "T K"), (torch.int32, "E1")),
        )
    ],
    "_permute_backward": [
        Variant(
            {"grad_permuted": spec("float", "TK H"), "row_map": spec("int32", "T K", "row_map")},
            lambda d: {},
            shaped(("grad_permuted", "T H")),
        )
    ],
    "unpermute": [
        Variant(
            {
                "rows": spec("float", "N H"),
                "row_map": spec("int32", "T K", "row_map"),
                "topk_weights": spec("float?", "T K", "uniform"),
            },
            lambda d: {},
            shaped(("rows", "T H")),
        )
    ],
    "_unpermute_backward": [
        Variant(
            {
                "grad_out": spec("like rows", "T H"),
                "rows": spec("float", "N H"),
                "row_map": spec("int32", "T K", "row_map"),
                "topk_weights": spec("float?", "T K", "uniform"),
            },
            mask(2),
            like("rows", "topk_weights", masked=True),
        )
    ],
    "_grouped_linear": [
        Variant(
            {
                "rows": spec("float", "N H"),
                "expert_offsets": spec("int32", "E1", "row_offsets"),
                "weight": spec("like rows", "E O H", "matrix"),
                "bias": spec("like rows?", "E O"),
            },
            lambda d: {},
            shaped(("rows", "N O")),
        )
    ],
    "_grouped_linear_backward": [
        Variant(
            {
                "grad_out": spec("like rows", "N O"),
                "rows": spec("float", "N H"),
                "expert_offsets": spec("int32", "E1", "row_offsets"),
                "weight": spec("like rows", "E O H", "matrix"),
            },
            mask(3),
            lambda d, a: [
                output if wanted else None
                for output, wanted in zip(
                    shaped(("rows", "N H"), ("rows", "E O H"), ("rows", "E O"))(d, a),
                    a["output_mask"],
                    strict=True,
                )
            ],
        )
    ],
    "expert_ffn": [Variant(EXPERT_FFN, recompute, shaped(("rows", "N H")))],
    "_expert_ffn_forward": [
        Variant(EXPERT_FFN, save_hidden, joined(shaped(("rows", "N H")), hidden_output("N W")))
    ],
    "moe_ffn": [
        Variant(
            {**TOKENS, **WEIGHTS, **CHOICE, **experts("tokens")},
            recompute_and_fuse,
            shaped(("tokens", "T H")),
        )
    ],
    "_moe_ffn_pairs": [
        Variant(
            {**TOKENS, "pair_weights": spec("float", "P"), **PAIRS, **experts("tokens")},
            recompute_and_fuse,
            shaped(("tokens", "T H")),
        )
    ],
    "_moe_ffn_packed": [
        packed_experts(*packed, slots)
        for packed in (("not bf16", ("H", "I"), "1"), ("bf16", ("H2", "I2"), "2"))
        for slots in (True, False)
    ],
    "_pack_weights": [
        Variant(
            {"weight": spec(dtype, "E O H", "matrix")},
            lambda d: {"gated": False},
            shaped(("weight", f"E OB {steps} 64 {pair}")),
        )
        for dtype, steps, pair in (("not bf16", "H", "1"), ("bf16", "H2", "2"))
    ],
    "_unpack_weights": [unpacked("not bf16", "H", "1"), unpacked("bf16", "H2", "2")],
    "_moe_ffn_forward": [
        Variant(
            {
                **TOKENS,
                "weights": spec("float", "T K", "uniform"),
                "ids": spec("ids", "T K", "ids"),
                **experts("tokens"),
            },
            save_hidden,
            joined(
                shaped(("tokens", "T H")),
                hidden_output("TK W"),
                shaped((torch.int32, "T K"), (torch.int32, "E1")),
            ),
        ),
        Variant(
            {
                **TOKENS,
                "weights": spec("float", "P"),
                "ids": spec("ids", "P", "pair_experts"),
                "pair_tokens": PAIRS["pair_tokens"],
                **experts("tokens"),
            },
            save_hidden,
            joined(
                shaped(("tokens", "T H")),
                hidden_output("P W"),
                shaped((torch.int32, "P"), (torch.int32, "E1")),
            ),
        ),
    ],
    "_expert_ffn_backward": [
        ffn_backward(
            "N",
            weights=spec("float?", "N"),
            expert_offsets=spec("int32", "E1", "row_offsets"),
            hidden=spec("like tokens?", "N W"),
        ),
        ffn_backward(
            "T",
            weights=spec("float", "T K", "uniform"),
            row_map=spec("int32", "T K", "row_map"),
            expert_offsets=spec("int32", "E1", "offsets"),
            hidden=spec("like tokens?", "TK W"),
        ),
        ffn_backward(
            "T",
            weights=spec("float", "P"),
            row_map=spec("int32", "P", "pair_row_map"),
            pair_tokens=PAIRS["pair_tokens"],
            expert_offsets=spec("int32", "E1", "pair_offsets"),
            hidden=spec("like tokens?", "P W"),
        ),
    ],
}
OPERATORS["_expert_ffn_backward_into"] = [
    Variant(
        {
            **variant.tensors,
            "into_gate_up_proj": spec("like tokens?", "E W H", "matrix"),
            "into_down_proj": spec("like tokens?", "E H I", "matrix"),
        },
        variant.others,
        ffn_grads_into,
    )
    for variant in OPERATORS["_expert_ffn_backward"]
]


def schemas() -> dict[str, torch.FunctionSchema]:
    """The registered operators, by name."""
    return {
        schema.name.removeprefix("moe_ext::"): schema
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("moe_ext::")
    }


def lay_out(tensor: Tensor, rng: random.Random) -> tuple[Tensor, str]:
    """The same values at other strides and offsets, and what was done."""
    choice = rng.choice(["dense"] * 4 + ["offset", "sliced", "transposed", "padded"])
    if tensor.dim() == 0 and choice != "offset":
        return tensor, "dense"
    match choice:
        case "offset":
            n = rng.choice([1, 3, 5])
            whole = torch.zeros(tensor.numel() + n, dtype=tensor.dtype)
            view = whole[n:].view(tensor.shape)
        case "sliced":
            whole = torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1], dtype=tensor.dtype)
            view = whole[..., ::2]
        case "transposed":
            view = torch.zeros(tensor.shape[::-1], dtype=tensor.dtype).permute(
                *reversed(range(tensor.dim()))
            )
        case "padded":
            whole = torch.zeros(*(n + 2 for n in tensor.shape), dtype=tensor.dtype)
            view = whole[tuple(slice(1, n + 1) for n in tensor.shape)]
        case _:
            return tensor, choice
    return view.copy_(tensor), choice


def good_call(operator: str, rng: random.Random, large: bool = False) -> Call:
    """A call that the operator must take."""
    variant = rng.choice(OPERATORS[operator])
    draw = Draw(rng, large)
    arguments: dict[str, Any] = {}
    others = variant.others(draw)
    for name, s in sorted(variant.tensors.items(), key=lambda item: " " in item[1].dtype):
        if s.optional and rng.random() < 0.5:
            arguments[name] = None
            continue
        if s.dtype.startswith("like "):
            dtype = arguments[s.dtype.removeprefix("like ")].dtype
        else:
            dtype = rng.choice(DTYPES[s.dtype])
        values = draw.values(s.values, [draw.sizes[x] for x in s.sizes])
        arguments[name] = values.to(dtype)
    if operator in ("load_balancing_loss", "_load_balancing_loss_forward"):
        if others["num_sequences"] != 1:
            arguments["expert_share"] = None
    if operator == "_round_tokens" and others["rounding"] != "stochastic":
        arguments["noise"] = None
    schema = getattr(torch.ops.moe_ext, operator).default._schema
    known = {**arguments, **others}
    ordered = {}
    for argument in schema.arguments:
        if argument.name in known:
            ordered[argument.name] = known[argument.name]
        elif not argument.has_default_value():
            ordered[argument.name] = None
    call = Call(operator, ordered, variant, draw, [])
    call.outputs = variant.outputs(draw, ordered)
    return call
