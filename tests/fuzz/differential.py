"""Calls compared with the loops of `loops.py`: outputs and gradients, within the tests' tolerances.

Shapes, dtypes, strides, routings, options, instruction sets and the number of threads are drawn;
values are of size 1.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from conftest import TOLERANCE
from torch import Tensor

import moe_ext

from . import loops
from .calls import ACTIVATIONS, FLOATS, IDS, ROUNDINGS, Draw, lay_out, scores, topk_options, wide

ops = torch.ops.moe_ext


@dataclass
class Comparison:
    """An operator and its loop on the same inputs. Both take the inputs by name."""

    operator: Callable
    loop: Callable
    inputs: dict[str, Tensor]  # what gradients may be taken by
    dtype: torch.dtype  # of the arithmetic
    what: str
    # Errors are relative to the largest value, or to this where all are smaller: the size of what
    # is summed, whose terms may cancel. For outputs it is 1; for gradients by name, else 1.
    grad_sizes: dict[str, float] = field(default_factory=dict)


class Case:
    def __init__(self, rng: random.Random):
        self.rng = rng
        self.draw = Draw(rng, large=True)
        self.sizes = self.draw.sizes
        self.dtype = rng.choice(FLOATS)
        if self.dtype in (torch.bfloat16, torch.float16):
            # The tolerances of few bits are for sums of many terms.
            for letter, least in (("T", 8), ("H", 16), ("I", 16), ("O", 8)):
                self.sizes[letter] = max(self.sizes[letter], least)
        if self.sizes["T"] * self.sizes["K"] > 200:  # loops are slow
            self.sizes["T"] = max(200 // self.sizes["K"], 8)
        T, K, I = (self.sizes[x] for x in "TKI")
        self.sizes["W"] = 2 * I if self.draw.gated else I
        self.sizes["N"] = T * K + rng.choice([0, 0, 1, 7])
        self.sizes["P"] = rng.choice([0, 1, 9, 60]) if T else 0
        if rng.random() < 0.3:
            self.sizes["S"] = 1
        elif T % self.sizes["S"]:
            self.sizes["S"] = rng.choice([s for s in range(1, max(T, 1) + 1) if T % s == 0][:6])
        self.draw.route()
        if rng.random() < 0.15:  # ids that occur twice in a row
            self.draw.ids = [row[:1] * len(row) for row in self.draw.ids]
        self.lists = [self.draw.ids[t] for t in range(T)]

    def floats(self, kind: str, sizes: str, dtype: torch.dtype | None = None) -> Tensor:
        values = self.draw.values(kind, [self.sizes[x] for x in sizes.split()])
        return values.to(dtype or self.dtype)

    def any_float(self, kind: str, sizes: str) -> Tensor:
        return self.floats(kind, sizes, self.rng.choice(FLOATS))

    def ids(self) -> Tensor:
        T, K = self.sizes["T"], self.sizes["K"]
        ids = torch.tensor(self.draw.ids, dtype=self.rng.choice(IDS)).reshape(T, K)
        return lay_out(ids, self.rng)[0]

    def mask(self) -> tuple[Tensor | None, list[bool] | None]:
        if self.rng.random() < 0.5:
            return None, None
        mask = self.draw.values("mask", [self.sizes["T"]])
        return lay_out(mask, self.rng)[0], mask.tolist()

    def maybe(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: t for n, t in inputs.items() if self.rng.random() < 0.5}

    def experts(self) -> tuple[dict[str, Tensor], dict]:
        """The experts' weights and options."""
        gated = self.draw.gated
        weights = {
            "gate_up_proj": self.floats("matrix", "E W H"),
            "down_proj": self.floats("matrix", "E H I"),
            **self.maybe(
                {
                    "gate_up_bias": self.floats("normal", "E W"),
                    "down_bias": self.floats("normal", "E H"),
                }
            ),
        }
        activation = self.rng.choice(ACTIVATIONS[: None if gated else -1])
        recompute = self.rng.choice(["activation", "hidden"])
        return weights, {"activation": activation, "gated": gated, "recompute": recompute}


def loop_experts(inputs: dict[str, Tensor], options: dict) -> loops.Experts:
    return loops.Experts(
        inputs["gate_up_proj"],
        inputs["down_proj"],
        inputs.get("gate_up_bias"),
        inputs.get("down_bias"),
        options["activation"],
        options["gated"],
    )


# -- One function for every operator: a Comparison, or a list of what is wrong.


def router_logits(c: Case):
    weight = c.any_float("matrix", "E H")
    inputs = {"tokens": c.floats("normal", "T H"), "weight": weight}
    dtype = torch.float64 if torch.float64 in (c.dtype, weight.dtype) else torch.float32
    return Comparison(ops._router_logits, loops.router_logits, inputs, dtype, "")


def topk_router(c: Case):
    options = topk_options(c.draw)
    logits = c.floats("normal", "T E") * c.rng.choice([0.1, 1, 3])
    if c.rng.random() < 0.2:
        logits = logits.round()  # ties
    bias = c.any_float("normal", "E") if c.rng.random() < 0.4 else None
    laid_out = None if bias is None else lay_out(bias, c.rng)[0]
    _, ids, _ = moe_ext.topk_router(logits, expert_bias=laid_out, **options)
    problems = []
    for t, z in enumerate(logits.double().tolist()):
        expected, safe = loops.choice(
            z,
            options["top_k"],
            options["score_function"],
            None if bias is None else bias.double().tolist(),
            options["num_groups"],
            options["topk_groups"],
        )
        if safe and ids[t].tolist() != expected:
            problems.append(f"token {t} chose {ids[t].tolist()}, expected {expected}")
    if problems:
        return problems
    named = {n: options[n] for n in ("score_function", "renormalize", "scaling_factor")}

    def operator(logits):
        weights, _, probs = moe_ext.topk_router(logits, expert_bias=laid_out, **options)
        return weights, probs

    return Comparison(
        operator,
        lambda logits: loops.router_weights(logits, ids.tolist(), ids.shape[1], **named),
        {"logits": logits},
        wide(c.dtype),
        str(options),
    )


def router_weights(c: Case):
    options, ids = scores(c.draw), c.ids()
    return Comparison(
        lambda logits: ops._router_weights(logits, ids, **options),
        lambda logits: loops.router_weights(logits, c.lists, c.sizes["K"], **options),
        {"logits": c.floats("normal", "T E")},
        wide(c.dtype),
        str(options),
    )


def load_balancing_loss(c: Case):
    mask, mask_list = c.mask()
    options = {"normalize_by_topk": c.rng.random() < 0.5, "num_sequences": c.sizes["S"]}
    share = None
    if options["num_sequences"] == 1 and c.rng.random() < 0.3:
        share = c.any_float("uniform", "E")
    ids = c.ids()
    wide_share = None if share is None else share.double()
    size = c.sizes["E"] * (1 if options["normalize_by_topk"] else c.sizes["K"])
    return Comparison(
        lambda probs: moe_ext.load_balancing_loss(
            probs, ids, token_mask=mask, expert_share=share, **options
        ),
        lambda probs: loops.load_balancing_loss(
            probs, c.lists, mask_list, expert_share=wide_share, **options
        ),
        {"probs": c.floats("probs", "T E")},
        wide(c.dtype),
        str(options),
        {"probs": size / max(c.sizes["T"], 1)},
    )


def router_z_loss(c: Case):
    mask, mask_list = c.mask()
    return Comparison(
        lambda logits: moe_ext.router_z_loss(logits, token_mask=mask),
        lambda logits: loops.router_z_loss(logits, mask_list),
        {"logits": c.floats("normal", "T E")},
        wide(c.dtype),
        "",
        {"logits": 1 / max(c.sizes["T"], 1)},
    )


def router_entropy(c: Case):
    mask, mask_list = c.mask()
    probs = c.floats("probs", "T E")
    actual = ops._router_entropy(probs, mask)
    return disagreement(
        "entropy", actual, loops.router_entropy(probs.double(), mask_list), wide(c.dtype)
    )


def tokens_per_expert(c: Case):
    actual = ops._tokens_per_expert(c.ids(), c.sizes["E"]).tolist()
    return unequal("counts", actual, loops.tokens_per_expert(c.lists, c.sizes["E"]))


def tied_weights(c: Case) -> Tensor:
    """[T, K], some of them equal."""
    weights = c.floats("uniform", "T K")
    return (weights * 4).round() / 4 if c.rng.random() < 0.3 else weights


def limits(c: Case) -> tuple[float, int]:
    return c.rng.choice([0.0, 0.25, 0.5, 1.0, 1.25, 2.0, 9.0]), c.rng.choice([1, 1, 2, 5, 1000])


def apply_capacity(c: Case):
    weights, (factor, least) = tied_weights(c), limits(c)
    policy = c.rng.choice(["probs", "position"])
    actual = ops._apply_capacity(
        lay_out(weights, c.rng)[0],
        c.ids(),
        torch.tensor(factor, dtype=torch.float64),
        c.sizes["E"],
        min_capacity=least,
        drop_policy=policy,
    )
    expected = loops.apply_capacity(
        weights.double().tolist(), c.lists, factor, c.sizes["E"], least, policy
    )
    return unequal("kept_ids", actual.tolist(), expected)


def round_tokens(c: Case):
    T, E, K = (c.sizes[x] for x in "TEK")
    c.draw.ids = c.lists = [  # distinct in a row; a row without any is masked
        [-1] * K if c.rng.random() < 0.1 else c.rng.sample(range(E), K) for _ in range(T)
    ]
    probs, weights = c.floats("probs", "T E"), tied_weights(c)
    M, rounding, (factor, least) = (
        c.rng.choice([1, 2, 3, 8, 20]),
        c.rng.choice(ROUNDINGS),
        limits(c),
    )
    factor = factor if c.rng.random() < 0.5 else None
    noise = c.floats("uniform", "E", torch.float64) if rounding == "stochastic" else None
    actual = ops._round_tokens(
        lay_out(probs, c.rng)[0],
        lay_out(weights, c.rng)[0],
        c.ids(),
        tile_size=M,
        rounding=rounding,
        capacity_factor=None if factor is None else torch.tensor(factor, dtype=torch.float64),
        min_capacity=least,
        noise=noise,
    )
    pairs, kept = loops.round_tokens(
        probs.double().tolist(),
        weights.double().tolist(),
        c.lists,
        E,
        M,
        rounding,
        factor,
        least,
        None if noise is None else noise.tolist(),
    )
    unused = [(-1, -1, -1)] * (len(actual[0]) - len(pairs))
    listed = list(zip(*(x.tolist() for x in actual[:3]), strict=True))
    return unequal("pairs", listed, pairs + unused) + unequal("kept_ids", actual[3].tolist(), kept)


def expert_choice(c: Case):
    mask, mask_list = c.mask()
    probs = c.floats("probs", "T E")
    if c.rng.random() < 0.3:
        probs = (probs * 8).round() / 8
    top_k = c.rng.choice([1, c.sizes["K"], c.sizes["E"]])
    actual = ops._expert_choice(lay_out(probs, c.rng)[0], mask, top_k)
    expected = loops.expert_choice(probs.double().tolist(), mask_list, c.sizes["E"], top_k)
    listed = list(zip(*(x.tolist() for x in actual), strict=True))
    return unequal("pairs", listed, expected + [(-1, -1)] * (len(listed) - len(expected)))


def pair_weights(c: Case):
    T, K, E = (c.sizes[x] for x in "TKE")
    every = [(t, e) for t in range(T) for e in range(E)]
    pairs = c.rng.sample(every, min(len(every), c.sizes["P"]))
    tokens = [t if c.rng.random() < 0.8 else -1 for t, _ in pairs]
    experts, free = [e for _, e in pairs], c.rng.sample(range(T * K), T * K)
    slots = [free.pop() if free and c.rng.random() < 0.5 else -1 for _ in pairs]
    if c.rng.random() < 0.3:
        slots = None
    scaling = c.rng.choice([1.0, 0.3])
    dtype = wide(c.dtype)

    def operator(weights, probs):
        lists = [None if x is None else torch.tensor(x, dtype=torch.int64) for x in (slots,)]
        return ops._pair_weights(
            weights,
            probs,
            torch.tensor(tokens, dtype=torch.int64),
            torch.tensor(experts, dtype=torch.int64),
            *lists,
            E,
            scaling,
        )

    return Comparison(
        operator,
        lambda weights, probs: loops.pair_weights(weights, probs, tokens, experts, slots, scaling),
        {"weights": c.floats("uniform", "T K", dtype), "probs": c.floats("probs", "T E", dtype)},
        dtype,
        f"slots={slots is not None}, scaling={scaling}",
    )


def permute(c: Case):
    ids, tokens = c.ids(), c.floats("normal", "T H")
    _, row_map, offsets = moe_ext.permute(tokens, ids, c.sizes["E"])
    _, expected_map, expected_offsets = loops.permute(tokens.double(), c.lists, c.sizes["E"])
    problems = unequal("row_map", row_map.tolist(), expected_map)
    problems += unequal("expert_offsets", offsets.tolist(), expected_offsets)
    return problems or Comparison(
        lambda tokens: moe_ext.permute(tokens, ids, c.sizes["E"])[0],
        lambda tokens: loops.permute(tokens, c.lists, c.sizes["E"])[0],
        {"tokens": tokens},
        c.dtype,
        "",
    )


def unpermute(c: Case):
    T, K, N = (c.sizes[x] for x in "TKN")
    rows = c.rng.sample(range(N), T * K)
    row_map = [
        [r if c.rng.random() < 0.8 else -1 for r in rows[t * K : (t + 1) * K]] for t in range(T)
    ]
    tensor = lay_out(torch.tensor(row_map, dtype=torch.int32).reshape(T, K), c.rng)[0]
    inputs = {
        "rows": c.floats("normal", "N H"),
        **c.maybe({"weights": c.any_float("uniform", "T K")}),
    }
    return Comparison(
        lambda rows, weights=None: moe_ext.unpermute(rows, tensor, weights),
        lambda rows, weights=None: loops.unpermute(rows, row_map, weights),
        inputs,
        c.dtype,
        "",
    )


def row_offsets(c: Case) -> Tensor:
    return torch.tensor(c.draw.row_offsets, dtype=torch.int32)


def grouped_linear(c: Case):
    offsets = row_offsets(c)
    inputs = {
        "rows": c.floats("normal", "N H"),
        "weight": c.floats("matrix", "E O H"),
        **c.maybe({"bias": c.floats("normal", "E O")}),
    }
    return Comparison(
        lambda rows, weight, bias=None: ops._grouped_linear(rows, offsets, weight, bias),
        lambda rows, weight, bias=None: loops.grouped_linear(
            rows, c.draw.row_offsets, weight, bias
        ),
        inputs,
        c.dtype,
        "",
    )


def kinks(c: Case, experts: loops.Experts) -> bool:
    """Whether rounding may have put a number past a kink, where gradients are others."""
    rounding = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
    near = rounding[c.dtype] if experts.activation == "swiglu_clamped" else 1e-5
    return experts.nearest_kink < near


_WEIGHTS = ("row_weights", "topk_weights", "pair_weights")


def expert_comparison(c: Case, inputs: dict, options: dict, operator, loop) -> Comparison | list:
    """operator(inputs), loop(inputs, experts)."""
    with torch.no_grad():
        probe = {n: t.double() for n, t in inputs.items()}
        experts = loop_experts(probe, options)
        unweighted = {n: torch.ones_like(t) if n in _WEIGHTS else t for n, t in probe.items()}
        rows = loop(unweighted, experts)
    if kinks(c, experts):
        return []
    # A weight's gradient is a product of an expert's row [H], whose size the activation decides,
    # and of a row of output gradients of size 1.
    size = rows.square().mean().sqrt().item() if rows.numel() else 0.0
    products = c.sizes["H"] ** 0.5 * max(size, 1.0)
    return Comparison(
        lambda **inputs: operator(inputs),
        lambda **inputs: loop(inputs, loop_experts(inputs, options)),
        inputs,
        c.dtype,
        str(options),
        {name: products for name in _WEIGHTS},
    )


def expert_ffn(c: Case):
    weights, options = c.experts()
    offsets = row_offsets(c)
    inputs = {
        "rows": c.floats("normal", "N H"),
        **weights,
        **c.maybe({"row_weights": c.any_float("normal", "N")}),
    }
    return expert_comparison(
        c,
        inputs,
        options,
        lambda i: moe_ext.expert_ffn(expert_offsets=offsets, **i, **options),
        lambda i, experts: loops.expert_ffn(
            i["rows"], c.draw.row_offsets, experts, i.get("row_weights")
        ),
    )


def moe_ffn(c: Case):
    weights, options = c.experts()
    ids = c.ids()
    inputs = {
        "tokens": c.floats("normal", "T H"),
        "topk_weights": c.any_float("uniform", "T K"),
        **weights,
    }

    def loop(i, experts):
        pairs = [
            (t, e, i["topk_weights"][t, k])
            for t, row in enumerate(c.lists)
            for k, e in enumerate(row)
            if loops.used(e, c.sizes["E"])
        ]
        return loops.moe_ffn(i["tokens"], pairs, experts)

    return expert_comparison(
        c, inputs, options, lambda i: moe_ext.moe_ffn(topk_ids=ids, **i, **options), loop
    )


def moe_ffn_pairs(c: Case):
    weights, options = c.experts()
    E = c.sizes["E"]
    experts_list = [
        e if c.rng.random() < 0.9 else c.rng.choice([-1, E, E + 5]) for e in c.draw.pair_experts
    ]
    tokens_list = c.draw.pair_tokens
    lists = {
        "pair_experts": torch.tensor(experts_list, dtype=c.rng.choice(IDS)),
        "pair_tokens": torch.tensor(tokens_list, dtype=c.rng.choice(IDS)),
    }
    inputs = {
        "tokens": c.floats("normal", "T H"),
        "pair_weights": c.any_float("uniform", "P"),
        **weights,
    }

    def loop(i, experts):
        pairs = [
            (t, e, i["pair_weights"][p])
            for p, (t, e) in enumerate(zip(tokens_list, experts_list, strict=True))
            if t >= 0 and loops.used(e, E)
        ]
        return loops.moe_ffn(i["tokens"], pairs, experts)

    return expert_comparison(
        c, inputs, options, lambda i: ops._moe_ffn_pairs(**lists, **i, **options), loop
    )


OPERATORS = [
    *(router_logits, topk_router, router_weights, load_balancing_loss, router_z_loss),
    *(router_entropy, tokens_per_expert, apply_capacity, round_tokens, expert_choice),
    *(pair_weights, permute, unpermute, grouped_linear, expert_ffn, moe_ffn, moe_ffn_pairs),
]


# -- Comparing.


def unequal(name: str, actual, expected) -> list[str]:
    return [] if actual == expected else [f"{name} is {actual}, expected {expected}"[:600]]


def disagreement(
    name: str,
    actual: Tensor,
    expected: Tensor,
    dtype: torch.dtype,
    scale: float = 1.0,
    size: float = 1.0,
) -> list[str]:
    """What is wrong with a tensor: its shape, a NaN, or an error above the tolerance."""
    if actual.shape != expected.shape:
        return [f"{name} is {list(actual.shape)}, expected {list(expected.shape)}"]
    if actual.numel() == 0:
        return []
    most = max(expected.abs().max().item(), size)
    error = (actual.detach().double() - expected.detach()).abs().max().item() / most
    tolerance = scale * max(TOLERANCE[dtype], TOLERANCE[actual.dtype])
    return [] if error <= tolerance else [f"{name} is off by {error:.2e} of {most:.2e} in {dtype}"]


def as_list(outputs) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


def compare(comparison: Comparison, rng: random.Random) -> list[str]:
    names = [n for n in comparison.inputs if rng.random() < 0.7] if rng.random() < 0.8 else []
    mine, theirs = {}, {}
    for name, tensor in comparison.inputs.items():
        mine[name] = lay_out(tensor, rng)[0].detach().requires_grad_(name in names)
        theirs[name] = tensor.double().detach().clone().requires_grad_(name in names)
    actual = as_list(comparison.operator(**mine))
    expected = as_list(comparison.loop(**theirs))
    problems = []
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        problems += disagreement(f"output {i}", a, e, comparison.dtype)
    if not names or problems:
        return problems
    # Both get the same numbers; rounded to bf16 they are the same in every dtype.
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    grads = [torch.randn(e.shape, generator=generator).bfloat16() for e in expected]
    used = [i for i in range(len(grads)) if len(grads) == 1 or rng.random() < 0.8] or [0]
    gradients = []
    for inputs, outputs in ((mine, actual), (theirs, expected)):
        chosen = [i for i in used if outputs[i].requires_grad]
        leaves = [inputs[n] for n in names]
        if not chosen:  # loops over nothing
            gradients.append([None] * len(names))
            continue
        gradients.append(
            torch.autograd.grad(
                [outputs[i] for i in chosen],
                leaves,
                [grads[i].to(outputs[i].dtype) for i in chosen],
                allow_unused=True,
            )
        )
    for name, a, e in zip(names, *gradients, strict=True):
        if a is None or (e is None and not a.any()):
            a = torch.zeros_like(mine[name]) if a is None else a
            e = torch.zeros_like(theirs[name]) if e is None else e
        elif e is None:
            e = torch.zeros_like(theirs[name])
        if a.dtype != mine[name].dtype:
            problems.append(f"the gradient of {name} is {a.dtype}, not {mine[name].dtype}")
        size = comparison.grad_sizes.get(name, 1.0)
        problems += disagreement(f"the gradient of {name}", a, e, comparison.dtype, 2, size)
    return problems


def run_case(rng: random.Random, announce: Callable[[str], None] = str) -> dict:
    build = rng.choice(OPERATORS)
    isa = rng.choice(["generic", "avx2", "avx512", "avx512_bf16"])
    torch.set_num_threads(rng.choice([1, 2]))
    before = moe_ext.cpu_isa()
    try:
        try:
            moe_ext.set_cpu_isa(isa)
        except ValueError:  # not this machine's
            isa = before
        case = Case(rng)
        sizes = {n: case.sizes[n] for n in ("T", "H", "I", "E", "K", "O", "N", "P", "S")}
        what = ""
        text = f"{build.__name__} {sizes} {case.dtype} {isa}"
        announce(text)
        result = build(case)
        if isinstance(result, Comparison):
            what = result.what
            result = compare(result, rng)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        result = [f"raised {type(error).__name__}: {error}"]
    finally:
        moe_ext.set_cpu_isa(before)
    return {
        "operator": build.__name__,
        "outcome": "differs" if result else "agrees",
        "problems": result,
        "call": f"{text} {what}",
    }
