"""Routing in two levels."""

from torch import Tensor

from moe_ext import ops
from moe_ext._messages import need
from moe_ext.routers.topk import TopKRouter


class HierarchicalRouter(TopKRouter):
    """Two levels (Shazeer et al. 2017, appendix B): E experts in num_groups equal groups; a token
    chooses its best topk_groups groups, and in each of them top_k / topk_groups experts. A weight
    is the product of both probabilities: softmax over the groups, softmax over a group's experts.

    router_probs [T, E] are these products for all experts; router_logits, which the z-loss sees,
    the sums of both levels' logits.

    num_groups must divide num_experts, and topk_groups must divide top_k. renormalize divides the K
    weights by their sum. The other arguments are those of `TopKRouter`, but for score_function and
    bias_update_rate, which it has not.

    Parameters: weight [E, H], group_weight [num_groups, H].
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        num_groups: int,
        topk_groups: int = 1,
        renormalize: bool = False,
        **options,
    ) -> None:
        for name in ("score_function", "bias_update_rate"):
            need("HierarchicalRouter", name not in options, name, "left out", options.get(name))
        options |= {"num_groups": num_groups, "topk_groups": topk_groups}
        super().__init__(hidden_size, num_experts, top_k, renormalize=renormalize, **options)

    def _check_choice(self, who: str, num_experts: int) -> None:
        top_k, num_groups, topk_groups = self.top_k, self.num_groups, self.topk_groups
        must_be = f"a divisor of num_experts={num_experts}"
        need(who, num_experts % num_groups == 0, "num_groups", must_be, num_groups)
        must_be = f"in [1, num_groups={num_groups}] and a divisor of top_k={top_k}"
        divides = topk_groups <= num_groups and top_k % topk_groups == 0
        need(who, divides, "topk_groups", must_be, topk_groups)
        most = topk_groups * num_experts // num_groups
        must_be = f"in [1, {most}], the chosen groups' experts"
        need(who, top_k <= most, "top_k", must_be, top_k)

    def _weight_rows(self, num_experts: int) -> dict[str, int]:
        return {"weight": num_experts, "group_weight": self.num_groups}

    def _score(self, tokens: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        groups = self._logits(tokens, self.group_weight)  # [T, G]
        # Not unflatten: under torch.set_default_device it can't be compiled.
        size = self.weight.shape[0] // self.num_groups
        experts = self._logits(tokens, self.weight).view(tokens.shape[0], self.num_groups, size)
        return (groups, experts), (experts + groups.unsqueeze(2)).flatten(1)

    def _choose(self, scores: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        groups, experts = scores[0].detach(), scores[1].detach()
        size, count = experts.shape[2], self.top_k // self.topk_groups
        _, group_ids, _ = ops.topk_router(groups, self.topk_groups)  # [T, topk_groups]
        _, within, _ = ops.topk_router(experts.flatten(0, 1), count)  # [T G, count]
        within = within.view(groups.shape[0], self.num_groups, count)
        within = within.gather(1, group_ids.unsqueeze(2).expand(-1, -1, count))
        topk_ids = (group_ids.unsqueeze(2) * size + within).flatten(1)
        weights, probs = self._weights(scores, topk_ids)
        return weights, topk_ids, probs

    def _weights(self, scores: tuple[Tensor, Tensor], topk_ids: Tensor) -> tuple[Tensor, Tensor]:
        # Softmax over all experts of the logarithm of the product is the product.
        groups, experts = scores
        product = groups.log_softmax(1).unsqueeze(2) + experts.log_softmax(2)
        return super()._weights(product.flatten(1), topk_ids)
