"""Routers: modules that map tokens [T, H] to a `RouterOutput`. No mathematics of their own."""

import copy
import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_ext import ops
from moe_ext._buffers import writable
from moe_ext._messages import need, need_bool, need_choice, need_int, need_number, warn_once


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


class TopKRouter(nn.Module):
    """A linear router that takes the K best experts of each token.

    Args:
        hidden_size, num_experts, top_k: H, E, K.
        score_function, renormalize, scaling_factor, num_groups, topk_groups: see
            `moe_ext.topk_router`.
        temperature: the logits are divided by it before everything else.
        jitter: in training, the router's input (not the experts') is multiplied by noise uniform
            in [1 - jitter, 1 + jitter] (Switch, arXiv 2101.03961).
        bias_update_rate: None, or the step of `update_expert_bias`: balance by a bias that is
            added to the scores for the choice only (arXiv 2408.15664).
        capacity_factor, eval_capacity_factor: None, or an expert keeps at most ceil(factor * T K /
            E) slots in training, in evaluation. What it drops, gets id -1 and weight 0; the weights
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
        super().__init__()
        who = type(self).__name__
        for name, size in {"hidden_size": hidden_size, "num_experts": num_experts}.items():
            need_int(who, name, size, least=1)
        need_int(who, "top_k", top_k, least=1)
        must_be = f"in [1, num_experts={num_experts}]"
        need(who, top_k <= num_experts, "top_k", must_be, top_k)
        need_choice(who, "score_function", score_function, "softmax", "sigmoid")
        need_bool(who, "renormalize", renormalize)
        need_bool(who, "normalize_by_topk", normalize_by_topk)
        for name, number in {
            "scaling_factor": scaling_factor,
            "temperature": temperature,
            "jitter": jitter,
            "init_std": init_std,
        }.items():
            need_number(who, name, number)
        need(who, temperature > 0, "temperature", "> 0", temperature)
        need(who, 0 <= jitter < 1, "jitter", "in [0, 1)", jitter)
        need(who, init_std >= 0, "init_std", ">= 0", init_std)
        need_int(who, "num_groups", num_groups, least=1)
        need_int(who, "topk_groups", topk_groups, least=1)
        if bias_update_rate is not None:
            need_number(who, "bias_update_rate", bias_update_rate)
            need(who, bias_update_rate >= 0, "bias_update_rate", ">= 0", bias_update_rate)
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
        need_choice(who, "balance_per", balance_per, "batch", "sequence")
        choice = {
            "top_k": top_k,
            "score_function": score_function,
            "num_groups": num_groups,
            "topk_groups": topk_groups,
        }
        self._check_choice(num_experts, choice)
        self.top_k = top_k
        self.score_function = score_function
        self.renormalize = renormalize
        self.scaling_factor = scaling_factor
        self.temperature = temperature
        self.jitter = jitter
        self.num_groups = num_groups
        self.topk_groups = topk_groups
        self.bias_update_rate = bias_update_rate
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor
        self.min_capacity = min_capacity
        self.drop_policy = drop_policy
        self.capacity_bounds = capacity_bounds
        self.tile_size = tile_size
        self.rounding = rounding
        self.balance_per = balance_per
        self.normalize_by_topk = normalize_by_topk
        self.process_group = process_group
        self.init_std = init_std
        self._warned: set[str] = set()
        for name, rows in self._weight_rows(num_experts).items():
            weight = torch.empty(rows, hidden_size, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(weight))
        with torch.inference_mode(False):  # a router made under it may be trained later
            wide = {"device": device, "dtype": torch.float32}
            bias = None if bias_update_rate is None else torch.zeros(num_experts, **wide)
            wide["dtype"] = torch.float64
            average = None if capacity_bounds is None else torch.full((), capacity_factor, **wide)
            # Counts since the start, and what the two updates have seen of them. No buffers, or
            # DDP would overwrite every rank's counts with the first one's.
            self._counters = torch.zeros(3, num_experts, device=device, dtype=torch.int64)
        self.register_buffer("expert_bias", bias)
        self.register_buffer("load_average", average)
        self.reset_parameters()

    def _check_choice(self, num_experts: int, options: dict) -> None:
        # The operator knows the rules for these options; a run on no tokens applies them now.
        ops.topk_router(torch.empty(0, num_experts, device="meta"), **options)

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
        self._counters.zero_()
        if self.expert_bias is not None:
            self.expert_bias.zero_()
        if self.load_average is not None:
            self.load_average.fill_(self.capacity_factor)

    def _apply(self, fn, recurse: bool = True) -> "TopKRouter":
        # A bias in bfloat16 would swallow its updates: casts of the module pass these buffers by.
        wide = {name: self._buffers[name] for name in ("expert_bias", "load_average")}
        super()._apply(fn, recurse)
        for name, before in wide.items():
            now = self._buffers[name]
            if before is not None and now.dtype not in (torch.float32, torch.float64):
                self._buffers[name] = before.to(now.device)
        counters = fn(self._counters)
        if self._counters.is_meta:  # to_empty leaves anything in them
            counters = torch.zeros_like(counters, dtype=torch.int64)
        is_cast = counters.dtype != torch.int64  # Module.type casts integers too
        self._counters = self._counters.to(counters.device) if is_cast else counters
        return self

    @property
    def waiting_counts(self) -> Tensor:
        """Choices [2, E] int64 in training that `update_expert_bias` and `update_capacity_factor`
        have not seen yet. Part of the state dict where one of them is in use, so that a run that
        is resumed between a step and its update goes on as if it had not stopped."""
        return self._counters[0] - self._counters[1:]

    def _is_counting(self) -> bool:
        return self.expert_bias is not None or self.load_average is not None

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._is_counting():
            destination[f"{prefix}waiting_counts"] = self.waiting_counts

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        # Not asked for: checkpoints of other programs have no counts.
        waiting = state_dict.pop(f"{prefix}waiting_counts", None) if self._is_counting() else None
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if waiting is None:
            return
        if waiting.shape != (2, self.num_experts):
            error_msgs.append(
                f"{prefix}waiting_counts must be [2, E={self.num_experts}], got "
                f"{list(waiting.shape)}"
            )
            return
        with torch.inference_mode(False):
            counters = torch.zeros_like(self._counters, device=self.weight.device)
            counters[1:] -= waiting.to(counters)
        self._counters = counters

    def __getstate__(self) -> dict:
        return {**self.__dict__, "process_group": None}

    def __deepcopy__(self, memo: dict) -> "TopKRouter":
        # A process group can't be copied; the copy belongs to the same ranks.
        memo[id(self.process_group)] = self.process_group
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__setstate__(copy.deepcopy(self.__dict__, memo))
        return twin

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
            expert_bias=self.expert_bias,
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
            counts = ops._tokens_per_expert(topk_ids, self.weight.shape[0])
            ops._add_once(writable(self, "_counters", counts)[0], counts)
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

    # --- capacity and token rounding ---

    def _factor(self, like: Tensor) -> Tensor | None:
        """The capacity factor of this forward: a float64 scalar on like's device."""
        if self.training and self.load_average is not None:
            return self.load_average.clamp(*self.capacity_bounds).double()
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        if factor is None:
            return None
        return torch.full((), factor, dtype=torch.float64, device=like.device)

    def _rounds(self, num_tokens: int) -> bool:
        """Whether this forward rounds; warns once where tiles are too few to round well."""
        if not self.training or self.tile_size is None or num_tokens == 0:
            return False
        num_experts = self.weight.shape[0]
        has_tiles = num_tokens * self.top_k >= 2 * num_experts * self.tile_size
        if has_tiles and num_tokens >= self.tile_size:
            return True
        if not torch.compiler.is_compiling():  # the text would be traced
            tiles = num_tokens * self.top_k / (num_experts * self.tile_size)
            warn_once(
                self._warned,
                "rounding",
                f"{type(self).__name__}: token rounding to {self.tile_size} is off where T < "
                "tile_size or T K / (E tile_size) < 2, since it would cost quality; here T = "
                f"{num_tokens} and T K / (E tile_size) = {tiles:.2g}. Take more tokens in a "
                "forward, or a smaller tile_size.",
            )
        return False

    def _limit(self, routed: RouterOutput, token_mask: Tensor | None) -> RouterOutput:
        """Capacity and token rounding, as they are asked for."""
        weights, ids, probs, logits, *_ = routed
        num_experts = self.weight.shape[0]
        factor, pairs = self._factor(ids), None
        if self._rounds(ids.shape[0]):
            noise = None
            if self.rounding == "stochastic":
                noise = torch.rand(num_experts, dtype=torch.float64, device=ids.device)
            pair_tokens, pair_experts, pair_slots, kept_ids = ops._round_tokens(
                probs.detach(),
                weights.detach(),
                ids,
                tile_size=self.tile_size,
                rounding=self.rounding,
                capacity_factor=factor,
                min_capacity=self.min_capacity,
                noise=noise,
            )
            pair_weights = ops._pair_weights(
                weights,
                probs,
                pair_tokens,
                pair_experts,
                pair_slots,
                num_experts,
                self.scaling_factor,
            )
            pairs = (pair_tokens, pair_experts, pair_weights)
        elif factor is not None:
            kept_ids = ops._apply_capacity(
                weights.detach(),
                ids,
                factor,
                num_experts,
                min_capacity=self.min_capacity,
                drop_policy=self.drop_policy,
            )
        else:
            return routed
        weights = weights.masked_fill(kept_ids < 0, 0)
        return RouterOutput(weights, kept_ids, probs, logits, pairs, chosen_ids=ids)

    # --- balance ---

    def load_balancing_loss(
        self, routed: RouterOutput, token_mask: Tensor | None = None, num_sequences: int = 1
    ) -> Tensor:
        """`moe_ext.load_balancing_loss` of an output, over what balance_per and process_group say.

        The tokens are num_sequences sequences of equal length, one after the other.
        """
        ids = routed.topk_ids if routed.chosen_ids is None else routed.chosen_ids
        share = None
        if self.process_group is not None and self.balance_per == "batch":
            masked = ids if token_mask is None else ids.masked_fill(~token_mask.unsqueeze(1), -1)
            counts = ops._tokens_per_expert(masked, self.weight.shape[0])
            tokens = counts.new_full((1,), ids.shape[0]) if token_mask is None else token_mask.sum()
            counts = torch.cat([counts, tokens.view(1)])
            dist.all_reduce(counts, group=self.process_group)
            share = counts[:-1].double() / (counts[-1] * ids.shape[1]).clamp(min=1)
        return ops.load_balancing_loss(
            routed.router_probs,
            ids,
            token_mask=token_mask,
            normalize_by_topk=self.normalize_by_topk,
            num_sequences=num_sequences if self._balances_sequences(ids, num_sequences) else 1,
            expert_share=share,
        )

    def _balances_sequences(self, topk_ids: Tensor, num_sequences: int) -> bool:
        return self.balance_per == "sequence" and num_sequences > 0 and topk_ids.shape[0] > 0

    def _new_counts(self, reader: int) -> Tensor:
        """Choices [E] in training since this reader's last call, over the process group."""
        counters = writable(self, "_counters", self.weight)
        counts = counters[0] - counters[reader]
        counters[reader] = counters[0]
        if self.process_group is not None:
            dist.all_reduce(counts, group=self.process_group)
        return counts

    @torch.no_grad()
    def update_expert_bias(self) -> None:
        """bias_e += rate * sign(mean(count) - count_e), then its mean is taken off.

        To be called after an optimizer step. The counts are those of all training forwards since
        the last call (micro-batches; over process_group, where all ranks must call it); what
        activation checkpointing runs again counts once. Wang et al., arXiv 2408.15664.

        Raises RuntimeError without bias_update_rate.
        """
        if self.expert_bias is None:
            raise RuntimeError(
                f"{type(self).__name__}.update_expert_bias: bias_update_rate must be given (or "
                "MoE(balance='bias')), got None"
            )
        has_ranks = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if self.process_group is None and has_ranks:
            warn_once(
                self._warned,
                "ranks",
                f"{type(self).__name__}.update_expert_bias: there are {dist.get_world_size()} "
                "ranks and no process_group, so each moves its own bias by its own counts. Set "
                "router.process_group, to torch.distributed.group.WORLD say.",
            )
        counts = self._new_counts(1)
        direction = (counts.sum() - counts * len(counts)).sign()
        bias = writable(self, "expert_bias", counts)
        bias += self.bias_update_rate * direction
        bias -= bias.mean()

    @torch.no_grad()
    def update_capacity_factor(self, momentum: float = 0.9) -> None:
        """The training capacity factor follows max/mean load: average = momentum * average +
        (1 - momentum) * load, within capacity_bounds. To be called after an optimizer step; the
        load is that of all training forwards since the last call.

        Raises RuntimeError without capacity_bounds.
        """
        if self.load_average is None:
            raise RuntimeError(
                f"{type(self).__name__}.update_capacity_factor: capacity_bounds must be given, "
                "got None"
            )
        counts = self._new_counts(2).double()
        load = torch.where(counts.sum() > 0, counts.max() / counts.mean(), self.load_average)
        writable(self, "load_average", counts).lerp_(load.to(self.load_average.dtype), 1 - momentum)

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


class HierarchicalRouter(TopKRouter):
    """Two levels (Shazeer et al. 2017, appendix B): E experts in num_groups equal groups; a token
    chooses its best topk_groups groups, and in each of them top_k / topk_groups experts. A weight
    is the product of both probabilities: softmax over the groups, softmax over a group's experts.

    router_probs [T, E] are these products for all experts; router_logits, which the z-loss sees,
    the sums of both levels' logits.

    Args: num_groups must divide num_experts, topk_groups must divide top_k; renormalize: divide
        the K weights by their sum; the others as for `TopKRouter`, except score_function and
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

    def _check_choice(self, num_experts: int, options: dict) -> None:
        top_k, num_groups = options["top_k"], options["num_groups"]
        topk_groups = options["topk_groups"]
        who = type(self).__name__
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
    for name, value in {"num_experts": num_experts, "top_k": top_k}.items():
        need_int("hash_ids", name, value, least=1)
    need("hash_ids", top_k <= num_experts, "top_k", f"in [1, num_experts={num_experts}]", top_k)
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
