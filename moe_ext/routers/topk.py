"""The linear router that the others derive from."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_ext import ops
from moe_ext._messages import need, need_bool, need_choice, need_int, need_number, need_sizes
from moe_ext.routers.balance import HasBalance
from moe_ext.routers.limits import check_limits, drop_over_capacity, has_tiles, round_to_tiles
from moe_ext.routers.output import RouterOutput


class TopKRouter(HasBalance):
    """A linear router that takes the K best experts of each token.

    Args:
        hidden_size, num_experts, top_k: H, E, K.
        score_function, renormalize, scaling_factor, num_groups, topk_groups: see
            `moe_ext.topk_router`. With top_k=1 set renormalize=False: otherwise the only weight is
            always scaling_factor, and the router gets no gradient from the main loss.
        temperature: the logits are divided by it before everything else.
        jitter: in training, the router's input (not the experts') is multiplied by noise uniform
            in [1 - jitter, 1 + jitter] (Switch, arXiv 2101.03961).
        bias_update_rate: None, or the step of `update_expert_bias`: balance by a bias that is
            added to the scores for the choice only (arXiv 2408.15664).
        capacity_factor, eval_capacity_factor: None, or an expert keeps at most ceil(factor * T K /
            E) slots in training, in evaluation. A dropped slot gets id -1 and weight 0; the weights
            that are left are not renormalized.
        min_capacity: the least capacity.
        drop_policy: "probs": an expert keeps its highest weights; "position": its earliest tokens,
            all first choices before all second ones (GShard, arXiv 2006.16668).
        capacity_bounds: None, or (least, most): `update_capacity_factor` lets the training factor
            follow the load within them.
        tile_size, rounding: token rounding (arXiv 2512.14080): in training every expert's number of
            tokens becomes a multiple of tile_size, by dropping its lowest weights or by taking the
            most probable further tokens. rounding is "nearest" (ties down), "up", "down",
            "stochastic" (the mean is kept) or "balanced" (the sum comes nearest to T K). Where
            T K / (E tile_size) < 2, or T < tile_size, it costs quality and is off, with a warning.
        balance_per: the load-balancing loss is taken over the "batch" or per "sequence" and
            averaged (DeepSeek-V3).
        normalize_by_topk: False: Hugging Face's value of that loss, K times as large.
        process_group: the ranks whose counts the load-balancing loss (per batch) and
            `update_expert_bias` add up; None: this one's. It is not kept in pickles.
        init_std: standard deviation of the weight at initialization.

    Parameters: weight [E, H]. Buffers: expert_bias [E] (float32 or wider, whatever the module is
    cast to) with bias_update_rate; load_average [] (float64) with capacity_bounds. The logits are
    summed in float32 (float64 for float64) from tokens and weight as they are, under autocast too.
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
        bias_update_rate: float | None = None,
        capacity_factor: float | None = None,
        eval_capacity_factor: float | None = None,
        min_capacity: int = 4,
        drop_policy: str = "probs",
        capacity_bounds: tuple[float, float] | None = None,
        tile_size: int | None = None,
        rounding: str = "nearest",
        balance_per: str = "batch",
        normalize_by_topk: bool = True,
        process_group: "dist.ProcessGroup | None" = None,
        init_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        who = type(self).__name__
        need_sizes(who, hidden_size=hidden_size, num_experts=num_experts, top_k=top_k)
        super().__init__(
            num_experts,
            bias_update_rate=bias_update_rate,
            capacity_factor=capacity_factor,
            capacity_bounds=capacity_bounds,
            balance_per=balance_per,
            normalize_by_topk=normalize_by_topk,
            process_group=process_group,
            device=device,
        )
        self.top_k = top_k
        self.score_function = score_function
        self.renormalize = renormalize
        self.scaling_factor = scaling_factor
        self.temperature = temperature
        self.jitter = jitter
        self.num_groups = num_groups
        self.topk_groups = topk_groups
        self.eval_capacity_factor = eval_capacity_factor
        self.min_capacity = min_capacity
        self.drop_policy = drop_policy
        self.tile_size = tile_size
        self.rounding = rounding
        self.init_std = init_std
        self._check_options(who, num_experts)
        for name, rows in self._weight_rows(num_experts).items():
            weight = torch.empty(rows, hidden_size, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(weight))
        self.reset_parameters()

    def _check_options(self, who: str, num_experts: int) -> None:
        need_choice(who, "score_function", self.score_function, "softmax", "sigmoid")
        need_bool(who, "renormalize", self.renormalize)
        for name in ("scaling_factor", "temperature", "jitter", "init_std"):
            need_number(who, name, getattr(self, name))
        need(who, self.temperature > 0, "temperature", "> 0", self.temperature)
        need(who, 0 <= self.jitter < 1, "jitter", "in [0, 1)", self.jitter)
        need(who, self.init_std >= 0, "init_std", ">= 0", self.init_std)
        need_int(who, "num_groups", self.num_groups, least=1)
        need_int(who, "topk_groups", self.topk_groups, least=1)
        check_limits(
            who,
            capacity_factor=self.capacity_factor,
            eval_capacity_factor=self.eval_capacity_factor,
            min_capacity=self.min_capacity,
            drop_policy=self.drop_policy,
            capacity_bounds=self.capacity_bounds,
            tile_size=self.tile_size,
            rounding=self.rounding,
        )
        self._check_choice(who, num_experts)

    def _check_choice(self, who: str, num_experts: int) -> None:
        # The operator knows the rules for these options; a run on no tokens applies them now.
        ops.topk_router(
            torch.empty(0, num_experts, device="meta"),
            self.top_k,
            score_function=self.score_function,
            num_groups=self.num_groups,
            topk_groups=self.topk_groups,
        )

    def _weight_rows(self, num_experts: int) -> dict[str, int]:
        """The parameters, and their rows."""
        return {"weight": num_experts}

    @property
    def hidden_size(self) -> int:
        return self.weight.shape[1]

    @property
    def num_experts(self) -> int:
        return self.weight.shape[0]

    def reset_parameters(self) -> None:
        """Normal with standard deviation init_std; no bias, no counts."""
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=self.init_std)
        self._reset_balance()

    # --- from tokens to a choice ---

    def _logits(self, tokens: Tensor, weight: Tensor) -> Tensor:
        logits = ops._router_logits(tokens, weight)
        return logits if self.temperature == 1 else logits / self.temperature

    def _score(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What _choose and _weights work on, and the logits of the output."""
        logits = self._logits(tokens, self.weight)
        return logits, logits

    def _choose(self, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return ops.topk_router(
            scores,
            self.top_k,
            score_function=self.score_function,
            renormalize=self.renormalize,
            scaling_factor=self.scaling_factor,
            expert_bias=self._buffers["expert_bias"],
            num_groups=self.num_groups,
            topk_groups=self.topk_groups,
        )

    def _weights(self, scores: Tensor, topk_ids: Tensor) -> tuple[Tensor, Tensor]:
        return ops._router_weights(
            scores,
            topk_ids,
            score_function=self.score_function,
            renormalize=self.renormalize,
            scaling_factor=self.scaling_factor,
        )

    def forward(
        self, tokens: Tensor, topk_ids: Tensor | None = None, token_mask: Tensor | None = None
    ) -> RouterOutput:
        """tokens [T, H] -> RouterOutput.

        With topk_ids [T, K] the choice is given and only the weights are the router's, so that it
        still learns; -1 (or any id >= E) is skipped; capacity and rounding are off. Tokens whose
        token_mask [T] is False are not routed and count nowhere.

        Raises RuntimeError for shapes, dtypes and devices.
        """
        self._check_inputs(tokens, topk_ids)
        if self.training and self.jitter > 0:
            noise = torch.empty_like(tokens).uniform_(1 - self.jitter, 1 + self.jitter)
            tokens = tokens * noise
        scores, logits = self._score(tokens)
        if topk_ids is not None:
            weights, probs = self._weights(scores, topk_ids)
            return RouterOutput(weights, topk_ids, probs, logits)
        weights, topk_ids, probs = self._choose(scores)
        if token_mask is not None:
            topk_ids = topk_ids.masked_fill(~token_mask.unsqueeze(1), -1)
        if self.training and self._is_counting():
            self._count_choices(topk_ids)
        return self._limit(RouterOutput(weights, topk_ids, probs, logits), token_mask)

    def _check_inputs(self, tokens: Tensor, topk_ids: Tensor | None) -> None:
        who, weight = type(self).__name__, self.weight
        hidden_size = weight.shape[1]
        if tokens.dim() != 2 or tokens.shape[1] != hidden_size:
            must_be = f"[T, H={hidden_size}]"
            raise RuntimeError(f"{who}: tokens must be {must_be}, got {list(tokens.shape)}")
        if not tokens.is_floating_point():
            raise RuntimeError(f"{who}: tokens must be floating point, got {tokens.dtype}")
        if tokens.device != weight.device:
            must_be = f"on {weight.device} like its weight"
            raise RuntimeError(f"{who}: tokens must be {must_be}, got {tokens.device}")
        if topk_ids is not None and topk_ids.shape != (tokens.shape[0], self.top_k):
            raise RuntimeError(
                f"{who}: topk_ids must be [T={tokens.shape[0]}, K={self.top_k}], got "
                f"{list(topk_ids.shape)}"
            )

    # --- limits ---

    def _factor(self, like: Tensor) -> Tensor | None:
        """The capacity factor of this forward: a float64 scalar on like's device."""
        if self.training and self.load_average is not None:
            return self.load_average.clamp(*self.capacity_bounds).double()
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        if factor is None:
            return None
        return torch.full((), factor, dtype=torch.float64, device=like.device)

    def _rounds(self, num_tokens: int) -> bool:
        """Whether this forward rounds."""
        if not self.training or self.tile_size is None or num_tokens == 0:
            return False
        who, num_experts = type(self).__name__, self.weight.shape[0]
        return has_tiles(who, self._warned, num_tokens, self.top_k, num_experts, self.tile_size)

    def _limit(self, routed: RouterOutput, token_mask: Tensor | None) -> RouterOutput:
        """Capacity and token rounding, as they are asked for."""
        factor = self._factor(routed.topk_ids)
        if self._rounds(routed.topk_ids.shape[0]):
            return round_to_tiles(
                routed,
                factor,
                tile_size=self.tile_size,
                rounding=self.rounding,
                min_capacity=self.min_capacity,
                scaling_factor=self.scaling_factor,
            )
        if factor is None:
            return routed
        return drop_over_capacity(
            routed, factor, min_capacity=self.min_capacity, drop_policy=self.drop_policy
        )

    def extra_repr(self) -> str:
        num_experts, hidden_size = self.weight.shape
        text = (
            f"hidden_size={hidden_size}, num_experts={num_experts}, top_k={self.top_k}, "
            f"score_function={self.score_function}, renormalize={self.renormalize}"
        )
        for name in ("bias_update_rate", "capacity_factor", "eval_capacity_factor", "tile_size"):
            if getattr(self, name) is not None:
                text += f", {name}={getattr(self, name)}"
        return text
