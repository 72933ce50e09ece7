"""What every router returns."""

from typing import NamedTuple

from torch import Tensor


class RouterOutput(NamedTuple):
    """What a router decides; the layer depends on nothing else.

    topk_weights [T, K] and router_probs [T, E] are float32 (float64 for float64), topk_ids [T, K]
    int64, router_logits [T, E] the scores before the score function. A slot that a capacity or
    token rounding dropped has id -1 and weight 0; chosen_ids [T, K] is then the choice before,
    which losses and balance count, else None.

    pairs, where tokens have a varying number of experts, is what runs instead of topk_ids: token
    [P] int64, expert [P] int64, weight [P], of a length that depends on shapes only; unused entries
    have token and expert -1.
    """

    topk_weights: Tensor
    topk_ids: Tensor
    router_probs: Tensor
    router_logits: Tensor
    pairs: tuple[Tensor, Tensor, Tensor] | None = None
    chosen_ids: Tensor | None = None
