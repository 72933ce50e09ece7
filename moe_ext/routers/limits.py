"""What bounds the tokens of an expert: capacity and token rounding."""

import torch
from torch import Tensor

from moe_ext import ops
from moe_ext._messages import need, need_choice, need_int, need_number, warn_once
from moe_ext.routers.output import RouterOutput


def check_limits(
    who: str,
    *,
    capacity_factor: float | None,
    eval_capacity_factor: float | None,
    min_capacity: int,
    drop_policy: str,
    capacity_bounds: tuple[float, float] | None,
    tile_size: int | None,
    rounding: str,
) -> None:
    """Raises ValueError for options of `TopKRouter` that make no sense."""
    for name, factor in {
        "capacity_factor": capacity_factor,
        "eval_capacity_factor": eval_capacity_factor,
    }.items():
        if factor is not None:
            need_number(who, name, factor)
            need(who, factor > 0, name, "> 0", factor)
    need_int(who, "min_capacity", min_capacity, least=1)
    need_choice(who, "drop_policy", drop_policy, "probs", "position")
    if capacity_bounds is not None:
        must_be = "(least, most) with 0 < least <= most"
        is_pair = isinstance(capacity_bounds, (tuple, list)) and len(capacity_bounds) == 2
        need(who, is_pair, "capacity_bounds", must_be, capacity_bounds)
        for bound in capacity_bounds:
            need_number(who, "capacity_bounds", bound)
        least, most = capacity_bounds
        need(who, 0 < least <= most, "capacity_bounds", must_be, capacity_bounds)
        given = capacity_factor is not None
        need(who, given, "capacity_factor", "given with capacity_bounds", None)
    if tile_size is not None:
        need_int(who, "tile_size", tile_size, least=1)
    roundings = ("nearest", "up", "down", "stochastic", "balanced")
    need_choice(who, "rounding", rounding, *roundings)


def has_tiles(
    who: str, warned: set[str], num_tokens: int, top_k: int, num_experts: int, tile_size: int
) -> bool:
    """Whether T tokens fill tiles enough to round well; warns once where they don't."""
    has_enough = num_tokens * top_k >= 2 * num_experts * tile_size
    if has_enough and num_tokens >= tile_size:
        return True
    if not torch.compiler.is_compiling():  # the text would be traced
        tiles = num_tokens * top_k / (num_experts * tile_size)
        warn_once(
            warned,
            "rounding",
            f"{who}: token rounding to {tile_size} is off where T < tile_size or "
            "T K / (E tile_size) < 2, since it would cost quality; here T = "
            f"{num_tokens} and T K / (E tile_size) = {tiles:.2g}. Take more tokens in a "
            "forward, or a smaller tile_size.",
        )
    return False


def drop_over_capacity(
    routed: RouterOutput, capacity_factor: Tensor, *, min_capacity: int, drop_policy: str
) -> RouterOutput:
    """The output without what an expert drops over its capacity; the factor is a float64 scalar."""
    weights, ids, probs, logits, *_ = routed
    kept_ids = ops._apply_capacity(
        weights.detach(),
        ids,
        capacity_factor,
        probs.shape[1],
        min_capacity=min_capacity,
        drop_policy=drop_policy,
    )
    weights = weights.masked_fill(kept_ids < 0, 0)
    return RouterOutput(weights, kept_ids, probs, logits, chosen_ids=ids)


def round_to_tiles(
    routed: RouterOutput,
    capacity_factor: Tensor | None,
    *,
    tile_size: int,
    rounding: str,
    min_capacity: int,
    scaling_factor: float,
) -> RouterOutput:
    """The output as pairs, with a multiple of tile_size tokens for every expert."""
    weights, ids, probs, logits, *_ = routed
    num_experts = probs.shape[1]
    noise = None
    if rounding == "stochastic":
        noise = torch.rand(num_experts, dtype=torch.float64, device=ids.device)
    pair_tokens, pair_experts, pair_slots, kept_ids = ops._round_tokens(
        probs.detach(),
        weights.detach(),
        ids,
        tile_size=tile_size,
        rounding=rounding,
        capacity_factor=capacity_factor,
        min_capacity=min_capacity,
        noise=noise,
    )
    pair_weights = ops._pair_weights(
        weights, probs, pair_tokens, pair_experts, pair_slots, num_experts, scaling_factor
    )
    pairs = (pair_tokens, pair_experts, pair_weights)
    weights = weights.masked_fill(kept_ids < 0, 0)
    return RouterOutput(weights, kept_ids, probs, logits, pairs, chosen_ids=ids)
