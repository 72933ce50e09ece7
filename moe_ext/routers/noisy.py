"""Noisy top-k gating."""

import torch
from torch import Tensor, nn

from moe_ext.routers.topk import TopKRouter


class NoisyTopKRouter(TopKRouter):
    """Noisy top-k gating (Shazeer et al. 2017, arXiv 1701.06538): in training the logits are
    x W^T + n * softplus(x W_noise^T), n standard normal; the rest as `TopKRouter`.

    Parameters: weight [E, H], noise_weight [E, H] (zeros at first: noise of size log 2).
    """

    def _weight_rows(self, num_experts: int) -> dict[str, int]:
        return {"weight": num_experts, "noise_weight": num_experts}

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.noise_weight)

    def _score(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        logits, _ = super()._score(tokens)
        if self.training:
            size = nn.functional.softplus(self._logits(tokens, self.noise_weight))
            logits = logits + torch.randn_like(logits) * size
        return logits, logits
