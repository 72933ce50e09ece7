"""The operators, typed: the only way from Python into `torch.ops.moe_ext`. Each is one call; their
twins in plain PyTorch are in `moe_ext.reference`.

Rules for all of them:

- Tokens and the experts' weights are float64, float32, bfloat16 or float16, of one dtype. Products
  are summed in float32 (float64 for float64); every operand of a product is rounded once to the
  tokens' dtype, and so is the output.
- A slot (t, k) whose id is -1 or >= E is skipped: no arithmetic, exact zeros, no gradient. Other
  negative ids raise IndexError on the CPU and are skipped elsewhere.
- Any stride, storage offset and size; T = 0, idle experts and repeated ids included.
- Gradients come in each input's own dtype; frozen inputs cost no work. Second derivatives raise;
  `moe_ext.reference` has them.
- The same input gives the same bits from run to run.
- RuntimeError for shapes, dtypes and devices, ValueError for options, IndexError for ids, TypeError
  for values of another type, each naming the operator, the argument, what it must be and what it
  got. NotImplementedError for second derivatives and torch.vmap.
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from moe_ext import _C

_WRONG_TYPE = re.compile(
    r"moe_ext::_?(\w+)\(\) Expected a value of type '(.+?)' for argument '(\w+)' but instead found "
    r"type '(.+?)'"
)
_TYPE_NAMES = {"int": "an integer", "SymInt": "an integer", "bool": "True or False"}
_TYPE_NAMES |= {"str": "a string", "float": "a number", "number": "a number"}


def _readable(error: RuntimeError) -> Exception:
    """The error itself, or, of the dispatcher's with a C++ schema for a wrong type, a sentence."""
    wrong = _WRONG_TYPE.search(str(error))
    if wrong is None:
        return error
    operator, expected, argument, got = wrong.groups()
    is_optional = expected.startswith("Optional[")
    expected = expected.removeprefix("Optional[").removesuffix("]")
    must_be = _TYPE_NAMES.get(expected, "a tensor") + (" or None" if is_optional else "")
    return TypeError(f"{operator}: {argument} must be {must_be}, got {got}")


def _operator(name: str) -> Callable:
    """`torch.ops.moe_ext.<name>` as a function of all its arguments in the order of the schema,
    with errors that a reader understands.

    Plain arguments take a short way to the dispatcher (csrc/python/call.h): torch.ops takes 2 to 5
    microseconds to look at those of one call.
    """
    overload = getattr(torch.ops.moe_ext, name).default
    call_plain = _C.operator(name)
    arguments = overload._schema.arguments
    names = tuple(argument.name for argument in arguments if argument.kwarg_only)
    first = len(arguments) - len(names)

    def call(*args):
        # What is compiled needs the overload, and so does what is not plain.
        if not torch.compiler.is_compiling():
            result = call_plain(*args)
            if result is not NotImplemented:
                return result
        try:
            return overload(*args[:first], **dict(zip(names, args[first:], strict=True)))
        except RuntimeError as error:
            raise _readable(error) from None

    return call


_call_topk_router = _operator("topk_router")
_call_permute = _operator("permute")
_call_unpermute = _operator("unpermute")
_call_expert_ffn = _operator("expert_ffn")
_call_moe_ffn = _operator("moe_ffn")
_call_load_balancing_loss = _operator("load_balancing_loss")
_call_router_z_loss = _operator("router_z_loss")
_call_router_logits = _operator("_router_logits")
_call_router_weights = _operator("_router_weights")
_call_tokens_per_expert = _operator("_tokens_per_expert")
_call_router_entropy = _operator("_router_entropy")
_call_add_once = _operator("_add_once")
_call_apply_capacity = _operator("_apply_capacity")
_call_round_tokens = _operator("_round_tokens")
_call_expert_choice = _operator("_expert_choice")
_call_pair_weights = _operator("_pair_weights")
_call_grouped_linear = _operator("_grouped_linear")
_call_moe_ffn_pairs = _operator("_moe_ffn_pairs")
_call_moe_ffn_packed = _operator("_moe_ffn_packed")
_call_pack_weights = _operator("_pack_weights")
_call_unpack_weights = _operator("_unpack_weights")


def topk_router(
    router_logits: Tensor,
    top_k: int,
    *,
    score_function: str = "softmax",
    renormalize: bool = True,
    scaling_factor: float = 1.0,
    expert_bias: Tensor | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Chooses K experts for each token, and their weights.

    Args:
        router_logits: [T, E], any supported dtype; differentiable.
        top_k: K, in [1, E].
        score_function: "softmax" over E (Mixtral, Qwen3-MoE, OLMoE) or "sigmoid" of each logit
            (DeepSeek-V3, arXiv 2412.19437).
        renormalize: divide the K weights by their sum (softmax: a softmax over the K chosen
            logits; sigmoid: the sum + 1e-20).
        scaling_factor: multiplies the weights.
        expert_bias: [E], added to the scores for the choice only (arXiv 2408.15664).
        num_groups, topk_groups: E in num_groups equal groups, of which each token may use its best
            topk_groups. A group's score is its best expert's (softmax, DeepSeek-V2) or the sum of
            its best two (sigmoid, DeepSeek-V3), bias included.

    Returns:
        topk_weights [T, K], topk_ids [T, K] int64 by descending score (the lower id of equal ones;
        NaN last), router_probs [T, E] (softmax, or sigmoid scores divided by their sum over E).
        Weights and probabilities are float32, float64 for float64 logits. A NaN among a token's
        logits makes its weights NaN.
    """
    return _call_topk_router(
        router_logits,
        top_k,
        score_function,
        renormalize,
        scaling_factor,
        expert_bias,
        num_groups,
        topk_groups,
    )


def permute(tokens: Tensor, topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gathers token rows so that the rows of each expert are contiguous.

    Args:
        tokens: [T, H]; differentiable.
        topk_ids: [T, K] int64 or int32.
        num_experts: E.

    Returns:
        permuted_tokens [N, H] (expert-major, stable; rows past expert_offsets[E] are zeros),
        row_map [T, K] int32 (permuted_tokens[row_map[t, k]] is tokens[t]; -1 for a skipped slot),
        expert_offsets [E + 1] int32 (expert e owns rows offsets[e] to offsets[e + 1]).
    """
    return _call_permute(tokens, topk_ids, num_experts)


def unpermute(rows: Tensor, row_map: Tensor, topk_weights: Tensor | None = None) -> Tensor:
    """The weighted sum over k of each token's rows: the inverse of `permute`.

    Args:
        rows: [N, H]; differentiable.
        row_map: [T, K] int32 from `permute`.
        topk_weights: [T, K], any supported dtype; differentiable. None: all 1.

    Returns:
        [T, H] in rows' dtype.
    """
    return _call_unpermute(rows, row_map, topk_weights)


def expert_ffn(
    rows: Tensor,
    expert_offsets: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    row_weights: Tensor | None = None,
    activation: str = "silu",
    gated: bool = True,
    recompute: str = "activation",
) -> Tensor:
    """Each row through its expert: down(act(gate(x)) * up(x)), or down(act(up(x))) if not gated.

    Args:
        rows: [N, H], grouped by expert.
        expert_offsets: [E + 1] int32, ascending from 0 to at most N.
        gate_up_proj: [E, 2I, H] (rows 0..I-1 gate, I..2I-1 up), or [E, I, H] if not gated.
        down_proj: [E, H, I].
        gate_up_bias: [E, 2I] or [E, I].
        down_bias: [E, H].
        row_weights: [N], any supported dtype; multiply the finished row, bias included.
        activation: silu, gelu, gelu_tanh, relu, relu2 (squared), identity, or, gated only,
            swiglu_clamped (GPT-OSS: alpha 1.702, limit 7).
        recompute: what backward recomputes: "activation" keeps the pre-activation [N, 2I] (or
            [N, I]), "hidden" keeps only the inputs.

    Returns:
        [N, H] in rows' dtype; rows past expert_offsets[E] are zeros.
    """
    return _call_expert_ffn(
        rows,
        expert_offsets,
        gate_up_proj,
        down_proj,
        gate_up_bias,
        down_bias,
        row_weights,
        activation,
        gated,
        recompute,
    )


def moe_ffn(
    tokens: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
    gated: bool = True,
    recompute: str = "activation",
    fuse_grad_accumulation: bool = False,
) -> Tensor:
    """`permute`, `expert_ffn` and `unpermute` in one: sum_k w[t, k] ffn_{ids[t, k]}(x[t]).

    Beyond its inputs it keeps for backward the pre-activation ([N, 2I] or [N, I]; not with
    recompute="hidden") and N + E + 1 int32.

    Args:
        tokens: [T, H].
        topk_weights: [T, K], any supported dtype.
        topk_ids: [T, K] int64 or int32.
        gate_up_proj, down_proj, gate_up_bias, down_bias, activation, gated, recompute: as for
            `expert_ffn`.
        fuse_grad_accumulation: see `GroupedExperts`; gate_up_proj and down_proj must be the
            parameters themselves, not views or casts of them.

    Returns:
        [T, H] in tokens' dtype.
    """
    return _call_moe_ffn(
        tokens,
        topk_weights,
        topk_ids,
        gate_up_proj,
        down_proj,
        gate_up_bias,
        down_bias,
        activation,
        gated,
        recompute,
        fuse_grad_accumulation,
    )


def load_balancing_loss(
    router_probs: Tensor,
    topk_ids: Tensor,
    *,
    token_mask: Tensor | None = None,
    normalize_by_topk: bool = True,
    num_sequences: int = 1,
    expert_share: Tensor | None = None,
) -> Tensor:
    """E sum_e f_e P_e: f_e the share of the choices that went to e, P_e the mean probability of e.

    1 when balanced (Switch, arXiv 2101.03961; Megatron's convention). No gradient flows through f.

    Args:
        router_probs: [T, E]; differentiable.
        topk_ids: [T, K] int64 or int32; skipped ids are left out of f's numerator.
        token_mask: [T] bool; False tokens count nowhere, whatever their ids.
        normalize_by_topk: False gives Hugging Face's value, K times as large.
        num_sequences: the tokens are so many sequences of equal length, one after the other; the
            loss is the mean of the sequences' own losses, over those with an unmasked token
            (DeepSeek-V3's sequence-wise loss, arXiv 2412.19437).
        expert_share: [E], f itself where it is counted elsewhere, over all ranks say; the choices
            in topk_ids then do not matter.

    Returns:
        A scalar, float32 (float64 for float64); 0 if there is no unmasked token.
    """
    return _call_load_balancing_loss(
        router_probs,
        topk_ids,
        token_mask,
        normalize_by_topk,
        num_sequences,
        expert_share,
    )


def router_z_loss(router_logits: Tensor, *, token_mask: Tensor | None = None) -> Tensor:
    """mean_t logsumexp(logits_t)^2 (ST-MoE, arXiv 2202.08906).

    Args:
        router_logits: [T, E]; differentiable.
        token_mask: [T] bool; False tokens count nowhere.

    Returns:
        A scalar, float32 (float64 for float64); 0 if there is no unmasked token.
    """
    return _call_router_z_loss(router_logits, token_mask)


# Operators that are no part of the public API, for the modules of this package, which check their
# options themselves.


def _router_logits(tokens: Tensor, weight: Tensor) -> Tensor:
    """tokens [T, H], weight [E, H] -> [T, E] in float32 (float64 for float64), summed in that dtype
    under autocast too; differentiable."""
    return _call_router_logits(tokens, weight)


def _router_weights(
    router_logits: Tensor,
    topk_ids: Tensor,
    *,
    score_function: str,
    renormalize: bool,
    scaling_factor: float,
) -> tuple[Tensor, Tensor]:
    """topk_weights [T, K] and router_probs [T, E] of `topk_router` for ids that are given."""
    return _call_router_weights(
        router_logits,
        topk_ids,
        score_function,
        renormalize,
        scaling_factor,
    )


def _tokens_per_expert(topk_ids: Tensor, num_experts: int) -> Tensor:
    """How often each expert stands in topk_ids [T, K]: [E] int64; skipped ids count nowhere."""
    return _call_tokens_per_expert(topk_ids, num_experts)


def _router_entropy(router_probs: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """The mean over the unmasked tokens of -sum_e p_e log p_e: a scalar; not differentiable."""
    return _call_router_entropy(router_probs, token_mask)


def _add_once(total: Tensor, value: Tensor) -> None:
    """total += value, unless activation checkpointing runs this forward again."""
    _call_add_once(total, value)


def _apply_capacity(
    topk_weights: Tensor,
    topk_ids: Tensor,
    capacity_factor: Tensor,
    num_experts: int,
    *,
    min_capacity: int,
    drop_policy: str,
) -> Tensor:
    """topk_ids [T, K] with -1 for what an expert drops over its capacity, see `TopKRouter`;
    capacity_factor is a float64 scalar."""
    return _call_apply_capacity(
        topk_weights,
        topk_ids,
        capacity_factor,
        num_experts,
        min_capacity,
        drop_policy,
    )


def _round_tokens(
    router_probs: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    tile_size: int,
    rounding: str,
    capacity_factor: Tensor | None,
    min_capacity: int,
    noise: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token rounding, see `TopKRouter`.

    capacity_factor is a float64 scalar or None; noise [E] float64 in [0, 1) belongs to rounding=
    "stochastic". Returns pair_tokens, pair_experts and pair_slots [P] (the slot t K + k that a pair
    comes from, -1 for a token that was taken beyond the choice), and kept_ids [T, K].
    """
    return _call_round_tokens(
        router_probs,
        topk_weights,
        topk_ids,
        tile_size,
        rounding,
        capacity_factor,
        min_capacity,
        noise,
    )


def _expert_choice(
    router_probs: Tensor, token_mask: Tensor | None, top_k: int
) -> tuple[Tensor, Tensor]:
    """pair_tokens and pair_experts [P]: each expert's min(T, ceil(T K / E)) most probable tokens,
    T being the unmasked ones."""
    return _call_expert_choice(router_probs, token_mask, top_k)


def _pair_weights(
    topk_weights: Tensor,
    router_probs: Tensor,
    pair_tokens: Tensor,
    pair_experts: Tensor,
    pair_slots: Tensor | None,
    num_experts: int,
    scaling_factor: float,
) -> Tensor:
    """The weight [P] of each pair: its slot's, or without one its probability times scaling_factor;
    differentiable in topk_weights and router_probs."""
    return _call_pair_weights(
        topk_weights,
        router_probs,
        pair_tokens,
        pair_experts,
        pair_slots,
        num_experts,
        scaling_factor,
    )


def _grouped_linear(
    rows: Tensor, expert_offsets: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Each row [N, H], grouped by expert as for `expert_ffn`, times its expert's weight [E, W, H],
    plus bias [E, W]: [N, W]."""
    return _call_grouped_linear(rows, expert_offsets, weight, bias)


def _moe_ffn_pairs(
    tokens: Tensor,
    pair_weights: Tensor,
    pair_experts: Tensor,
    pair_tokens: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
    gated: bool = True,
    recompute: str = "activation",
    fuse_grad_accumulation: bool = False,
) -> Tensor:
    """`moe_ffn` for tokens with a varying number of experts: a list of pairs [P] in any order."""
    return _call_moe_ffn_pairs(
        tokens,
        pair_weights,
        pair_experts,
        pair_tokens,
        gate_up_proj,
        down_proj,
        gate_up_bias,
        down_bias,
        activation,
        gated,
        recompute,
        fuse_grad_accumulation,
    )


def _moe_ffn_packed(
    tokens: Tensor,
    weights: Tensor,
    ids: Tensor,
    pair_tokens: Tensor | None,
    gate_up_packed: Tensor,
    down_packed: Tensor,
    *,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    intermediate_size: int,
    activation: str,
    gated: bool,
) -> Tensor:
    """`moe_ffn` or, with pair_tokens [P], `_moe_ffn_pairs`, without backward and on the CPU, on
    weights of `_pack_weights`."""
    return _call_moe_ffn_packed(
        tokens,
        weights,
        ids,
        pair_tokens,
        gate_up_packed,
        down_packed,
        gate_up_bias,
        down_bias,
        intermediate_size,
        activation,
        gated,
    )


def _pack_weights(weight: Tensor, gated: bool) -> Tensor:
    """weight [E, N, K], gated: gate and up [E, 2I, K], in the order in which products read it:
    csrc/ops/moe_ffn_packed.h. On the CPU."""
    return _call_pack_weights(weight, gated)


def _unpack_weights(packed: Tensor, N: int, K: int, gated: bool) -> Tensor:
    """The weight [E, N, K] that was packed."""
    return _call_unpack_weights(packed, N, K, gated)
