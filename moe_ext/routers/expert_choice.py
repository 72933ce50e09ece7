"""Routing in which the experts choose."""

import torch
import torch.distributed as dist
from torch import Tensor

from moe_ext import ops
from moe_ext.routers.output import RouterOutput
from moe_ext.routers.topk import TopKRouter


class ExpertChoiceRouter(TopKRouter):
    """Expert choice (Zhou et al. 2022, arXiv 2202.09368): in training each expert takes its
    min(T, ceil(T K / E)) best tokens by softmax probability, which is also their weight, so that
    all have the same load; a token may get 0 to E experts. Evaluation, which must not look at later
    tokens, is plain top-K of the same probabilities.

    topk_ids of the output is that plain top-K in training too; a load-balancing loss on it keeps
    evaluation balanced (take balance="none" to go without).

    Args: as for `TopKRouter`, those of its choice excepted.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        scaling_factor: float = 1.0,
        temperature: float = 1.0,
        jitter: float = 0.0,
        balance_per: str = "batch",
        normalize_by_topk: bool = True,
        process_group: "dist.ProcessGroup | None" = None,
        init_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            hidden_size,
            num_experts,
            top_k,
            renormalize=False,
            scaling_factor=scaling_factor,
            temperature=temperature,
            jitter=jitter,
            balance_per=balance_per,
            normalize_by_topk=normalize_by_topk,
            process_group=process_group,
            init_std=init_std,
            device=device,
            dtype=dtype,
        )

    def _limit(self, routed: RouterOutput, token_mask: Tensor | None) -> RouterOutput:
        if not self.training:
            return routed
        probs = routed.router_probs
        pair_tokens, pair_experts = ops._expert_choice(probs.detach(), token_mask, self.top_k)
        pair_weights = ops._pair_weights(
            routed.topk_weights.detach(),
            probs,
            pair_tokens,
            pair_experts,
            None,
            self.weight.shape[0],
            self.scaling_factor,
        )
        return routed._replace(pairs=(pair_tokens, pair_experts, pair_weights))
