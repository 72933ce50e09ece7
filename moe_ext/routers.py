"""Routers: modules that map tokens [T, H] to a `RouterOutput`. No mathematics of their own."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_ext import ops


class RouterOutput(NamedTuple):
    """What a router decides; the layer depends on nothing else.

    topk_weights [T, K] and router_probs [T, E] are float32 (float64 for float64), topk_ids [T, K]
    int64, router_logits [T, E] the scores before the score function.
    """

    topk_weights: Tensor
    topk_ids: Tensor
    router_probs: Tensor
    router_logits: Tensor


class TopKRouter(nn.Module):
    """A linear router that takes the K best experts of each token.

    Args:
        hidden_size, num_experts, top_k: H, E, K.
        score_function, renormalize, scaling_factor, num_groups, topk_groups: see
            `moe_ext.topk_router`.
        temperature: the logits are divided by it before everything else.
        jitter: in training, the router's input (not the experts') is multiplied by noise uniform
            in [1 - jitter, 1 + jitter] (Switch, arXiv 2101.03961).
        init_std: standard deviation of the weight at initialization.

    Parameters: weight [E, H]. The logits are summed in float32 (float64 for float64) from tokens
    and weight as they are, under autocast too.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        score_function: str = "softmax",
        renormalize: bool = True,
        scaling_factor: float = 1.0,
        temperature: float = 1.0,
        jitter: float = 0.0,
        num_groups: int = 1,
        topk_groups: int = 1,
        init_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"TopKRouter: temperature must be > 0, got {temperature}")
        if not 0 <= jitter < 1:
            raise ValueError(f"TopKRouter: jitter must be in [0, 1), got {jitter}")
        self.top_k = top_k
        self.score_function = score_function
        self.renormalize = renormalize
        self.scaling_factor = scaling_factor
        self.temperature = temperature
        self.jitter = jitter
        self.num_groups = num_groups
        self.topk_groups = topk_groups
        self.init_std = init_std
        self.weight = nn.Parameter(
            torch.empty(num_experts, hidden_size, device=device, dtype=dtype)
        )
        self.reset_parameters()
        # The operator knows the rules for these options; a run on no tokens applies them now.
        self._choose(torch.empty(0, num_experts, device="meta"))

    def reset_parameters(self) -> None:
        """Normal with standard deviation init_std."""
        nn.init.normal_(self.weight, std=self.init_std)

    def _choose(self, router_logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return ops.topk_router(
            router_logits,
            self.top_k,
            score_function=self.score_function,
            renormalize=self.renormalize,
            scaling_factor=self.scaling_factor,
            num_groups=self.num_groups,
            topk_groups=self.topk_groups,
        )

    def forward(self, tokens: Tensor, topk_ids: Tensor | None = None) -> RouterOutput:
        """tokens [T, H] -> RouterOutput. With topk_ids [T, K] the choice is given and only the
        weights are the router's, so that it still learns; -1 (or any id >= E) is skipped."""
        if self.training and self.jitter > 0:
            noise = torch.empty_like(tokens).uniform_(1 - self.jitter, 1 + self.jitter)
            tokens = tokens * noise
        logits = torch.ops.moe_ext._router_logits.default(tokens, self.weight)
        if self.temperature != 1:
            logits = logits / self.temperature
        if topk_ids is None:
            weights, topk_ids, probs = self._choose(logits)
        else:
            weights, probs = torch.ops.moe_ext._router_weights.default(
                logits,
                topk_ids,
                score_function=self.score_function,
                renormalize=self.renormalize,
                scaling_factor=self.scaling_factor,
            )
        return RouterOutput(weights, topk_ids, probs, logits)

    def extra_repr(self) -> str:
        num_experts, hidden_size = self.weight.shape
        return (
            f"hidden_size={hidden_size}, num_experts={num_experts}, top_k={self.top_k}, "
            f"score_function={self.score_function}, renormalize={self.renormalize}"
        )
