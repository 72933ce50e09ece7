"""Routing that is given: a replay, or a hash of the token."""

import math

import torch
from torch import Tensor

from moe_ext._messages import need_sizes
from moe_ext.routers.output import RouterOutput
from moe_ext.routers.topk import TopKRouter


class GivenIdsRouter(TopKRouter):
    """Takes the experts it is told; the weights are the router's own, which so still learns. For
    replaying a routing, or routing by a hash of the token (Roller et al. 2021, arXiv 2106.04426;
    `hash_ids`).

    The ids are those of the call (`MoE.forward(x, topk_ids=...)`), else those of the last
    `give(ids)`, for models that can't pass them on. Args and parameters as for `TopKRouter`.
    """

    given_ids: Tensor | None = None

    def give(self, topk_ids: Tensor | None) -> None:
        """The ids [..., K] of all the tokens of the next forwards, in order; None: none."""
        self.given_ids = None if topk_ids is None else topk_ids.reshape(-1, topk_ids.shape[-1])

    def forward(
        self, tokens: Tensor, topk_ids: Tensor | None = None, token_mask: Tensor | None = None
    ) -> RouterOutput:
        """tokens [T, H], topk_ids [T, K] -> RouterOutput. Raises RuntimeError without any ids, or
        if there are not as many as tokens."""
        if topk_ids is None:
            topk_ids = self.given_ids
        if topk_ids is None:
            raise RuntimeError(
                "GivenIdsRouter: topk_ids must be given, to forward or before it by give(), got "
                "None"
            )
        return super().forward(tokens, topk_ids, token_mask)


def hash_ids(token_ids: Tensor, num_experts: int, top_k: int, seed: int = 0) -> Tensor:
    """K different experts for every token id, by a hash of it: int64 [...] -> int64 [..., K].

    The same id has the same experts always; different seeds, for the layers of a model, give
    different ones. Hash layers: Roller et al. 2021, arXiv 2106.04426.

    Raises TypeError for token_ids that are no integers, ValueError unless 1 <= top_k <=
    num_experts.
    """
    is_tensor = isinstance(token_ids, Tensor)
    if not is_tensor or token_ids.is_floating_point() or token_ids.is_complex():
        got = token_ids.dtype if is_tensor else type(token_ids).__name__
        raise TypeError(f"hash_ids: token_ids must be a tensor of integers, got {got}")
    need_sizes("hash_ids", num_experts=num_experts, top_k=top_k)
    # An expert, and a step that meets all experts before it comes back: one without a common
    # divisor with E.
    steps = [step for step in range(1, num_experts + 1) if math.gcd(step, num_experts) == 1]
    mixed = _mix(token_ids.long() + 0x632BE5AB * (seed + 1))
    first = (mixed & 0x7FFFFFFF) % num_experts
    which = (_mix(mixed) & 0x7FFFFFFF) % len(steps)
    step = torch.tensor(steps, device=token_ids.device)[which]
    turns = torch.arange(top_k, device=token_ids.device)
    return (first.unsqueeze(-1) + step.unsqueeze(-1) * turns) % num_experts


def _mix(x: Tensor) -> Tensor:
    """Every bit of x [...] int64 changes about half of the result's (products wrap around)."""
    for multiplier, shift in ((0x7FB5D329728EA185, 29), (0x01DADEF4BC2DD44D, 32), (1, 27)):
        x = x * multiplier
        x = x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))
    return x
