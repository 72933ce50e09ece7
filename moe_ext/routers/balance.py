"""How the load of the experts is counted, over all ranks, and what follows it."""

import copy

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_ext import ops
from moe_ext._buffers import writable
from moe_ext._messages import need, need_bool, need_choice, need_number, warn_once
from moe_ext.routers.output import RouterOutput


def share_over_ranks(
    topk_ids: Tensor, token_mask: Tensor | None, num_experts: int, group: "dist.ProcessGroup"
) -> Tensor:
    """Each expert's share of the choices [T, K] of all ranks of a group, those of masked tokens
    left out: [E] float64."""
    masked = topk_ids
    if token_mask is not None:
        masked = topk_ids.masked_fill(~token_mask.unsqueeze(1), -1)
    counts = ops._tokens_per_expert(masked, num_experts)
    tokens = counts.new_full((1,), topk_ids.shape[0]) if token_mask is None else token_mask.sum()
    counts = torch.cat([counts, tokens.view(1)])
    dist.all_reduce(counts, group=group)
    return counts[:-1].double() / (counts[-1] * topk_ids.shape[1]).clamp(min=1)


class HasBalance(nn.Module):
    """A router that counts its choices in training, with what follows the counts: the bias of the
    choice, the capacity factor; and its load-balancing loss.

    The options are those of `TopKRouter`. A subclass has a parameter weight [E, H], calls
    `_count_choices` in training and `_reset_balance` once its parameters are there.

    Buffers: expert_bias [E] float32 with bias_update_rate; load_average [] float64 with
    capacity_bounds. Both stay at least so wide, whatever the module is cast to.
    """

    def __init__(
        self,
        num_experts: int,
        *,
        bias_update_rate: float | None,
        capacity_factor: float | None,
        capacity_bounds: tuple[float, float] | None,
        balance_per: str,
        normalize_by_topk: bool,
        process_group: "dist.ProcessGroup | None",
        device: torch.device | str | None,
    ) -> None:
        super().__init__()
        who = type(self).__name__
        if bias_update_rate is not None:
            need_number(who, "bias_update_rate", bias_update_rate)
            need(who, bias_update_rate >= 0, "bias_update_rate", ">= 0", bias_update_rate)
        need_choice(who, "balance_per", balance_per, "batch", "sequence")
        need_bool(who, "normalize_by_topk", normalize_by_topk)
        self.bias_update_rate = bias_update_rate
        self.capacity_factor = capacity_factor
        self.capacity_bounds = capacity_bounds
        self.balance_per = balance_per
        self.normalize_by_topk = normalize_by_topk
        self.process_group = process_group
        self._warned: set[str] = set()
        bias = average = None
        with torch.inference_mode(False):  # a router made under it may be trained later
            if bias_update_rate is not None:
                bias = torch.zeros(num_experts, device=device, dtype=torch.float32)
            if capacity_bounds is not None:
                average = torch.zeros((), device=device, dtype=torch.float64)
            # Counts since the start, and what the two updates have seen of them. No buffers, or
            # DDP would overwrite every rank's counts with the first one's.
            self._counters = torch.zeros(3, num_experts, device=device, dtype=torch.int64)
        self.register_buffer("expert_bias", bias)
        self.register_buffer("load_average", average)

    def _reset_balance(self) -> None:
        """No bias, no counts; the load is taken to be capacity_factor."""
        self._counters.zero_()
        if self.expert_bias is not None:
            self.expert_bias.zero_()
        if self.load_average is not None:
            self.load_average.fill_(self.capacity_factor)

    def _apply(self, fn, recurse: bool = True) -> "HasBalance":
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

    # --- counts ---

    @property
    def waiting_counts(self) -> Tensor:
        """Choices [2, E] int64 in training that `update_expert_bias` and `update_capacity_factor`
        have not seen yet. Part of the state dict where one of them is in use, so that a run that
        is resumed between a step and its update goes on as if it had not stopped."""
        return self._counters[0] - self._counters[1:]

    def _is_counting(self) -> bool:
        return self.expert_bias is not None or self.load_average is not None

    def _count_choices(self, topk_ids: Tensor) -> None:
        """Adds the choices [T, K] of a forward; what checkpointing runs again adds nothing."""
        counts = ops._tokens_per_expert(topk_ids, self.weight.shape[0])
        ops._add_once(writable(self, "_counters", counts)[0], counts)

    def _new_counts(self, reader: int) -> Tensor:
        """Choices [E] in training since this reader's last call, over the process group."""
        counters = writable(self, "_counters", self.weight)
        counts = counters[0] - counters[reader]
        counters[reader] = counters[0]
        if self.process_group is not None:
            dist.all_reduce(counts, group=self.process_group)
        return counts

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
        num_experts = self.weight.shape[0]
        if waiting.shape != (2, num_experts):
            error_msgs.append(
                f"{prefix}waiting_counts must be [2, E={num_experts}], got {list(waiting.shape)}"
            )
            return
        with torch.inference_mode(False):
            counters = torch.zeros_like(self._counters, device=self.weight.device)
            counters[1:] -= waiting.to(counters)
        self._counters = counters

    def __getstate__(self) -> dict:
        return {**self.__dict__, "process_group": None}

    def __deepcopy__(self, memo: dict) -> "HasBalance":
        # A process group can't be copied; the copy belongs to the same ranks.
        memo[id(self.process_group)] = self.process_group
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__setstate__(copy.deepcopy(self.__dict__, memo))
        return twin

    # --- what follows them ---

    def load_balancing_loss(
        self, routed: RouterOutput, token_mask: Tensor | None = None, num_sequences: int = 1
    ) -> Tensor:
        """`moe_ext.load_balancing_loss` of an output, over what balance_per and process_group say.

        The tokens are num_sequences sequences of equal length, one after the other.
        """
        ids = routed.topk_ids if routed.chosen_ids is None else routed.chosen_ids
        share = None
        if self.process_group is not None and self.balance_per == "batch":
            num_experts = self.weight.shape[0]
            share = share_over_ranks(ids, token_mask, num_experts, self.process_group)
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
