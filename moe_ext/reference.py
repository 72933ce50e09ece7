"""The operators in plain PyTorch: obviously right, differentiable by autograd, not fast.

They take and give exactly what the operators of `moe_ext.ops` do, and are the oracle of the tests
and a baseline of the benchmarks. Values of ids are not checked.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def _swiglu_clamped(gate: Tensor, up: Tensor) -> Tensor:
    gate = gate.clamp(max=7.0)
    return (up.clamp(-7.0, 7.0) + 1) * gate * torch.sigmoid(1.702 * gate)


# Functions of one variable: f(gate) * up if gated, f(up) if not.
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "identity": lambda x: x,
}

# Functions of gate and up together, gated only.
GATED_ACTIVATIONS = {"swiglu_clamped": _swiglu_clamped}

SCORE_FUNCTIONS = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
}


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _activate(hidden: Tensor, activation: str, gated: bool) -> Tensor:
    if not gated:
        return ACTIVATIONS[activation](hidden)
    gate, up = hidden.chunk(2, dim=-1)
    if activation in GATED_ACTIVATIONS:
        return GATED_ACTIVATIONS[activation](gate, up)
    return ACTIVATIONS[activation](gate) * up


def router_logits(tokens: Tensor, weight: Tensor) -> Tensor:
    """tokens [T, H], weight [E, H] -> [T, E] in float32 (float64 if either is float64)."""
    dtype = _compute_dtype(torch.promote_types(tokens.dtype, weight.dtype))
    return tokens.to(dtype) @ weight.to(dtype).T


def _rank(keys: Tensor, allowed: Tensor) -> Tensor:
    """Experts of each row, best first: allowed ones, then larger keys, NaN last, ties by id."""
    nan = keys.isnan()
    order = keys.masked_fill(nan, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, nan.gather(-1, order).long().argsort(dim=-1, stable=True))
    forbidden = (~allowed).gather(-1, order).long()
    return order.gather(-1, forbidden.argsort(dim=-1, stable=True))


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
    """See `moe_ext.topk_router`."""
    logits = router_logits.to(_compute_dtype(router_logits.dtype))
    num_experts = logits.shape[1]
    with torch.no_grad():
        keys = logits
        if expert_bias is not None or num_groups > 1:
            keys = SCORE_FUNCTIONS[score_function](logits)
        if expert_bias is not None:
            keys = keys + expert_bias.to(logits.dtype)
        allowed = torch.ones_like(keys, dtype=torch.bool)
        if topk_groups < num_groups:
            by_group = keys.masked_fill(keys.isnan(), -torch.inf)
            by_group = by_group.unflatten(1, (num_groups, num_experts // num_groups))
            best = by_group.sort(dim=-1, descending=True).values
            group_scores = best[..., : 2 if score_function == "sigmoid" else 1].sum(-1)
            groups = _rank(group_scores, torch.ones_like(group_scores, dtype=torch.bool))
            allowed = torch.zeros_like(group_scores, dtype=torch.bool)
            allowed = allowed.scatter(-1, groups[:, :topk_groups], True)
            allowed = allowed.repeat_interleave(num_experts // num_groups, dim=-1)
        topk_ids = _rank(keys, allowed)[:, :top_k]
    topk_weights, router_probs = router_weights(
        logits,
        topk_ids,
        score_function=score_function,
        renormalize=renormalize,
        scaling_factor=scaling_factor,
    )
    return topk_weights, topk_ids, router_probs


def router_weights(
    router_logits: Tensor,
    topk_ids: Tensor,
    *,
    score_function: str = "softmax",
    renormalize: bool = True,
    scaling_factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Weights [T, K] of choices [T, K] that are given, and the probabilities [T, E].

    Ids that are -1 or >= E are skipped: weight 0, and no part of the sum.
    """
    logits = router_logits.to(_compute_dtype(router_logits.dtype))
    valid = (topk_ids >= 0) & (topk_ids < logits.shape[1])
    ids = topk_ids.long().masked_fill(~valid, 0)
    scores = SCORE_FUNCTIONS[score_function](logits)
    if score_function == "softmax" and renormalize:
        # Over the chosen logits: their probabilities may all underflow. A row without a valid
        # choice gets finite stand-ins, so that its gradient is zero and not NaN.
        chosen = logits.gather(1, ids).masked_fill(~valid, -torch.inf)
        chosen = chosen.masked_fill(~valid.any(1, keepdim=True), 0)
        weights = chosen.softmax(-1)
    else:
        weights = scores.gather(1, ids).masked_fill(~valid, 0)
        if renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    weights = weights.masked_fill(logits.isnan().any(1, keepdim=True), torch.nan)
    weights = weights.masked_fill(~valid, 0) * scaling_factor
    return weights, scores / scores.sum(-1, keepdim=True) if score_function == "sigmoid" else scores


def _plan(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """slots [M] of the used rows in order, row_map [T, K] int32, expert_offsets [E + 1] int32."""
    ids = topk_ids.reshape(-1).long()
    valid = (ids >= 0) & (ids < num_experts)
    key = ids.masked_fill(~valid, num_experts)
    order = key.argsort(stable=True)
    slots = order[: valid.sum()]
    row_map = torch.full_like(ids, -1)
    row_map[slots] = torch.arange(len(slots), device=ids.device)
    counts = torch.bincount(key, minlength=num_experts + 1)[:num_experts]
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return slots, row_map.view_as(topk_ids).int(), offsets.int()


def permute(tokens: Tensor, topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `moe_ext.permute`."""
    slots, row_map, offsets = _plan(topk_ids, num_experts)
    rows = tokens[slots // max(topk_ids.shape[1], 1)]
    padding = tokens.new_zeros(topk_ids.numel() - len(slots), tokens.shape[1])
    return torch.cat([rows, padding]), row_map, offsets


def unpermute(rows: Tensor, row_map: Tensor, topk_weights: Tensor | None = None) -> Tensor:
    """See `moe_ext.unpermute`."""
    dtype = _compute_dtype(rows.dtype)
    out = torch.zeros(row_map.shape[0], rows.shape[1], dtype=dtype, device=rows.device)
    for k in range(row_map.shape[1]):
        used = (row_map[:, k] >= 0).nonzero().squeeze(1)
        part = rows[row_map[used, k].long()].to(dtype)
        if topk_weights is not None:
            part = part * topk_weights[used, k].to(dtype).unsqueeze(1)
        out = out.index_add(0, used, part)
    return out.to(rows.dtype)


def grouped_linear(
    rows: Tensor, expert_offsets: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """rows [N, H], weight [E, O, H], bias [E, O] -> [N, O]; rows past expert_offsets[E] are 0."""
    offsets = expert_offsets.tolist()
    out = [rows.new_zeros(0, weight.shape[1])]
    biases = [None] * weight.shape[0] if bias is None else bias.unbind(0)
    # unbind, since the gradient of weight[e] would be as large as the whole stack.
    for e, (w, b) in enumerate(zip(weight.unbind(0), biases, strict=True)):
        out.append(F.linear(rows[offsets[e] : offsets[e + 1]], w, b))
    out.append(rows.new_zeros(rows.shape[0] - offsets[-1], weight.shape[1]))
    return torch.cat(out)


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
    """See `moe_ext.expert_ffn`; `recompute` has no meaning here."""
    del recompute
    num_used = int(expert_offsets[-1])
    used = rows[:num_used]
    hidden = grouped_linear(used, expert_offsets, gate_up_proj, gate_up_bias)
    out = grouped_linear(_activate(hidden, activation, gated), expert_offsets, down_proj, down_bias)
    if row_weights is not None:
        out = (out * row_weights[:num_used].unsqueeze(1)).to(rows.dtype)
    return torch.cat([out, rows.new_zeros(rows.shape[0] - num_used, rows.shape[1])])


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
) -> Tensor:
    """See `moe_ext.moe_ffn`; `recompute` has no meaning here."""
    rows, row_map, offsets = permute(tokens, topk_ids, gate_up_proj.shape[0])
    out = expert_ffn(
        rows,
        offsets,
        gate_up_proj,
        down_proj,
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        activation=activation,
        gated=gated,
        recompute=recompute,
    )
    return unpermute(out, row_map, topk_weights)


def moe_ffn_pairs(
    tokens: Tensor,
    pair_weights: Tensor,
    pair_experts: Tensor,
    pair_tokens: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    **options,
) -> Tensor:
    """moe_ffn for a list of pairs [P] in any order; unused ones have token or expert -1 (or >= E).

    pair_weights [P], pair_experts [P], pair_tokens [P]; the rest as for `moe_ffn`.
    """
    num_experts = gate_up_proj.shape[0]
    used = (pair_tokens >= 0) & (pair_experts >= 0) & (pair_experts < num_experts)
    order = used.nonzero().squeeze(1)
    order = order[pair_experts[order].argsort(stable=True)]
    token = pair_tokens[order].long()
    counts = torch.bincount(pair_experts[order].long(), minlength=num_experts)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    options.pop("recompute", None)
    rows = expert_ffn(tokens[token], offsets, gate_up_proj, down_proj, **options)
    dtype = _compute_dtype(tokens.dtype)
    weighted = rows.to(dtype) * pair_weights[order].to(dtype).unsqueeze(1)
    return tokens.new_zeros(tokens.shape, dtype=dtype).index_add(0, token, weighted).to(tokens)


def capacity(
    capacity_factor: float, topk_ids: Tensor, num_experts: int, min_capacity: int = 1
) -> int:
    """How many slots of topk_ids [T, K] an expert may keep: ceil(factor * choices / E), at least
    min_capacity, at most every token. Skipped slots are no choice, a row of them no token."""
    valid = (topk_ids >= 0) & (topk_ids < num_experts)
    tokens, choices = int(valid.any(1).sum()), int(valid.sum())
    return min(max(math.ceil(capacity_factor * choices / num_experts), min_capacity), tokens)


def apply_capacity(
    topk_weights: Tensor,
    topk_ids: Tensor,
    capacity_factor: float,
    num_experts: int,
    *,
    min_capacity: int = 1,
    drop_policy: str = "probs",
) -> Tensor:
    """topk_ids [T, K] with -1 for every slot beyond its expert's capacity.

    "probs": an expert keeps its highest weights, ties go to the earlier slot; "position": its
    earliest slots, all first choices before all second ones (GShard, arXiv 2006.16668).
    """
    limit = capacity(capacity_factor, topk_ids, num_experts, min_capacity)
    if drop_policy == "probs":
        keys = topk_weights.flatten().nan_to_num(nan=-torch.inf)
        order = keys.argsort(descending=True, stable=True)
    else:
        order = torch.arange(topk_ids.numel()).view(topk_ids.shape).T.flatten()
    ids = topk_ids.flatten().long()
    kept = torch.full_like(ids, -1)
    for e in range(num_experts):
        slots = order[ids[order] == e][:limit]
        kept[slots] = e
    return kept.view(topk_ids.shape)


def round_counts(
    counts: list[int], tile_size: int, most: int, rounding: str, noise: list[float] | None = None
) -> list[int]:
    """Multiples of the tile size near counts [E], none above `most` (see `round_tokens`)."""
    M, limit = tile_size, most // tile_size * tile_size
    down = [f // M * M for f in counts]
    rest = [f % M for f in counts]
    if rounding == "balanced":
        ups = math.ceil(sum(rest) / M - 0.5)
        result = list(down)
        for e in sorted(range(len(counts)), key=lambda e: (-rest[e], e)):
            if ups > 0 and rest[e] > 0 and down[e] + M <= limit:
                result[e] += M
                ups -= 1
    else:
        rule = {
            "nearest": lambda e: rest[e] / M > 0.5,
            "up": lambda e: rest[e] > 0,
            "down": lambda e: False,
            "stochastic": lambda e: noise[e] < rest[e] / M,
        }[rounding]
        result = [d + M * rule(e) for e, d in enumerate(down)]
    return [min(c, limit) for c in result]


def round_tokens(
    router_probs: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    tile_size: int,
    rounding: str = "nearest",
    capacity_factor: float | None = None,
    min_capacity: int = 1,
    noise: Tensor | None = None,
) -> list[tuple[int, int, int]]:
    """Token rounding (arXiv 2512.14080, algorithm 4): (token, expert, slot) for every pair, slot
    -1 for a padded one. router_probs [T, E], topk_weights and topk_ids [T, K].

    A chosen pair ranks by its weight, all others by their probability - 1, so every chosen pair
    outranks every other; expert e keeps its c_e best, ties going to the earlier token.
    """
    T, K = topk_ids.shape
    num_experts = router_probs.shape[1]
    valid = (topk_ids >= 0) & (topk_ids < num_experts)
    routed = valid.any(1).nonzero().squeeze(1).tolist()
    counts = torch.bincount(topk_ids[valid].long(), minlength=num_experts).tolist()
    most = len(routed)
    if capacity_factor is not None:
        most = capacity(capacity_factor, topk_ids, num_experts, min_capacity)
    noise = None if noise is None else noise.tolist()
    pairs = []
    for e, c in enumerate(round_counts(counts, tile_size, most, rounding, noise)):
        ranked = []
        for t in routed:
            slot = next((t * K + k for k in range(K) if topk_ids[t, k] == e), -1)
            chosen = slot >= 0
            score = topk_weights.flatten()[slot] if chosen else router_probs[t, e]
            ranked.append((not chosen, -score.item(), t, slot))
        pairs += sorted((t, e, slot) for _, _, t, slot in sorted(ranked)[:c])
    return pairs


def expert_choice(
    router_probs: Tensor, token_mask: Tensor | None, top_k: int
) -> list[tuple[int, int]]:
    """Expert choice (Zhou et al., arXiv 2202.09368): (token, expert) for every pair; an expert
    takes its min(T, ceil(T K / E)) best unmasked tokens, ties going to the earlier one."""
    T, num_experts = router_probs.shape
    tokens = [t for t in range(T) if token_mask is None or token_mask[t]]
    count = min(len(tokens), math.ceil(len(tokens) * top_k / num_experts))
    pairs = []
    for e in range(num_experts):
        best = sorted(tokens, key=lambda t: (-router_probs[t, e].item(), t))[:count]
        pairs += sorted((t, e) for t in best)
    return pairs


def load_balancing_loss(
    router_probs: Tensor,
    topk_ids: Tensor,
    *,
    token_mask: Tensor | None = None,
    normalize_by_topk: bool = True,
    num_sequences: int = 1,
    expert_share: Tensor | None = None,
) -> Tensor:
    """See `moe_ext.load_balancing_loss`."""
    probs = router_probs.to(_compute_dtype(router_probs.dtype))
    num_experts = probs.shape[1]
    if num_sequences > 1:
        masks = [None] * num_sequences if token_mask is None else token_mask.chunk(num_sequences)
        parts = zip(probs.chunk(num_sequences), topk_ids.chunk(num_sequences), masks, strict=True)
        losses = [
            load_balancing_loss(p, i, token_mask=m, normalize_by_topk=normalize_by_topk)
            for p, i, m in parts
            if m is None or m.any()
        ]
        return sum(losses, start=probs.sum() * 0) / max(len(losses), 1)
    if token_mask is not None:
        probs, topk_ids = probs[token_mask], topk_ids[token_mask]
    if probs.shape[0] == 0:
        return probs.sum() * 0
    valid = topk_ids[(topk_ids >= 0) & (topk_ids < num_experts)].long()
    if expert_share is None:
        counts = torch.bincount(valid, minlength=num_experts).to(probs.dtype)
        expert_share = counts / topk_ids.numel()
    loss = num_experts * (expert_share.to(probs.dtype) * probs.mean(0)).sum()
    return loss if normalize_by_topk else loss * topk_ids.shape[1]


def router_z_loss(router_logits: Tensor, *, token_mask: Tensor | None = None) -> Tensor:
    """See `moe_ext.router_z_loss`."""
    logits = router_logits.to(_compute_dtype(router_logits.dtype))
    if token_mask is not None:
        logits = logits[token_mask]
    if logits.shape[0] == 0:
        return logits.sum() * 0
    return logits.logsumexp(-1).square().mean()


def router_entropy(router_probs: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """mean_t -sum_e p_e log p_e of router_probs [T, E], in nats; token_mask [T] bool."""
    probs = router_probs.to(_compute_dtype(router_probs.dtype))
    if token_mask is not None:
        probs = probs[token_mask]
    if probs.shape[0] == 0:
        return probs.sum() * 0
    return torch.special.entr(probs).sum(-1).mean()
