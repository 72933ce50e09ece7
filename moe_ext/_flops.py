"""FLOP formulas, so that torch.utils.flop_counter counts the work of these operators.

Counted are matrix products over all N = T K rows (or P pairs): what a skipped slot saves is not
known from shapes. An argument arrives as its shape, an absent tensor as None.
"""

import math

import torch
from torch.utils.flop_counter import register_flop_formula

_ops = torch.ops.moe_ext


def _experts(num_rows, gate_up_proj, down_proj) -> tuple[int, int]:
    """FLOPs of the up (or gate-up) and of the down product."""
    _, width, hidden_size = gate_up_proj
    _, _, intermediate_size = down_proj
    return 2 * num_rows * width * hidden_size, 2 * num_rows * intermediate_size * hidden_size


@register_flop_formula(_ops.moe_ffn)
def _moe_ffn(tokens, topk_weights, topk_ids, gate_up_proj, down_proj, *args, **kwargs) -> int:
    return sum(_experts(math.prod(topk_ids), gate_up_proj, down_proj))


@register_flop_formula([_ops._moe_ffn_pairs, _ops._moe_ffn_forward])
def _moe_ffn_forward(
    tokens, weights, ids, pair_tokens, gate_up_proj, down_proj, *args, **kwargs
) -> int:
    return sum(_experts(math.prod(ids), gate_up_proj, down_proj))


@register_flop_formula(_ops._moe_ffn_packed)
def _moe_ffn_packed(
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
    **kwargs,
) -> int:
    experts, hidden_size = gate_up_packed[0], tokens[1]
    width = 2 * intermediate_size if gated else intermediate_size
    shapes = (experts, width, hidden_size), (experts, hidden_size, intermediate_size)
    return sum(_experts(math.prod(ids), *shapes))


@register_flop_formula([_ops.expert_ffn, _ops._expert_ffn_forward])
def _expert_ffn(rows, expert_offsets, gate_up_proj, down_proj, *args, **kwargs) -> int:
    return sum(_experts(rows[0], gate_up_proj, down_proj))


@register_flop_formula([_ops._expert_ffn_backward, _ops._expert_ffn_backward_into])
def _expert_ffn_backward(
    grad_out,
    tokens,
    weights,
    row_map,
    pair_tokens,
    expert_offsets,
    hidden,
    gate_up_proj,
    down_proj,
    gate_up_bias,
    down_bias,
    activation,
    gated,
    output_mask,
    into_gate_up=None,
    into_down=None,
    **kwargs,
) -> int:
    num_rows = math.prod(row_map) if row_map is not None else tokens[0]
    up, down = _experts(num_rows, gate_up_proj, down_proj)
    needs_tokens, needs_weights, needs_gate_up, needs_down, needs_gate_up_bias, _ = output_mask
    needs_gate_up = needs_gate_up or into_gate_up is not None
    needs_down = needs_down or into_down is not None
    needs_hidden_grad = needs_tokens or needs_gate_up or needs_gate_up_bias
    flops = 0
    if needs_hidden_grad or needs_weights or needs_down:
        flops += down + (up if hidden is None else 0)
    return flops + needs_tokens * up + needs_gate_up * up + needs_down * down


@register_flop_formula(_ops._grouped_linear)
def _grouped_linear(rows, expert_offsets, weight, *args, **kwargs) -> int:
    return 2 * rows[0] * weight[1] * weight[2]


@register_flop_formula(_ops._grouped_linear_backward)
def _grouped_linear_backward(grad, rows, expert_offsets, weight, output_mask, **kwargs) -> int:
    return 2 * rows[0] * weight[1] * weight[2] * sum(output_mask[:2])


@register_flop_formula(_ops._router_logits)
def _router_logits(tokens, weight, **kwargs) -> int:
    return 2 * tokens[0] * tokens[1] * weight[0]


@register_flop_formula(_ops._router_logits_backward)
def _router_logits_backward(grad, tokens, weight, output_mask, **kwargs) -> int:
    return 2 * tokens[0] * tokens[1] * weight[0] * sum(output_mask)
