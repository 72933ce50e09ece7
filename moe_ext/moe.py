"""The Mixture-of-Experts layer: a router and experts, put together."""

import dataclasses
import inspect
import math
import weakref
from functools import partial

import torch
from torch import Tensor, nn

from moe_ext import ops, routers
from moe_ext._buffers import writable
from moe_ext._messages import need, need_bool, need_choice, need_int, need_number, need_sizes
from moe_ext.aux_loss import HasAuxLoss, in_backward
from moe_ext.experts import GroupedExperts, SharedExpert
from moe_ext.routers import GivenIdsRouter, RouterOutput, TopKRouter
from moe_ext.statistics import MoEStats, add_to_monitor


@dataclasses.dataclass(kw_only=True)
class MoEConfig:
    """The arguments of `MoE`, for `MoE.from_config`."""

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    activation: str = "silu"
    gated: bool = True
    bias: bool = False
    router: nn.Module | None = None
    score_function: str = "softmax"
    renormalize: bool = True
    scaling_factor: float = 1.0
    temperature: float = 1.0
    jitter: float = 0.0
    num_groups: int = 1
    topk_groups: int = 1
    balance: str = "aux_loss"
    aux_loss_coef: float = 0.01
    z_loss_coef: float = 0.0
    bias_update_rate: float = 1e-3
    inject_aux_loss: bool = False
    capacity_factor: float | None = None
    eval_capacity_factor: float | None = None
    min_capacity: int = 4
    drop_policy: str = "probs"
    capacity_bounds: tuple[float, float] | None = None
    tile_size: int | None = None
    rounding: str = "nearest"
    balance_per: str = "batch"
    normalize_by_topk: bool = True
    shared_intermediate_size: int = 0
    recompute: str = "activation"
    fuse_grad_accumulation: bool = False
    init_std: float = 0.02
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None


# The options of the router that MoE makes; a router that is given has its own.
_ROUTING = (
    "score_function",
    "renormalize",
    "scaling_factor",
    "temperature",
    "jitter",
    "num_groups",
    "topk_groups",
    "bias_update_rate",
    "capacity_factor",
    "eval_capacity_factor",
    "min_capacity",
    "drop_policy",
    "capacity_bounds",
    "tile_size",
    "rounding",
    "balance_per",
    "normalize_by_topk",
)


# Of a forward whose loss waits, in float32 a quarter of a megabyte. Beyond it, computing the loss
# takes no share of the forward worth saving, and a model's layers would hold much.
_MOST_SCORES = 1 << 16


def _check_config(config: MoEConfig) -> None:
    """Raises ValueError for what the router and the experts do not check."""
    names = ("hidden_size", "intermediate_size", "num_experts", "top_k")
    need_sizes("MoE", **{name: getattr(config, name) for name in names})
    need_choice("MoE", "balance", config.balance, "aux_loss", "bias", "none")
    for name in ("aux_loss_coef", "z_loss_coef"):
        coef = getattr(config, name)
        need_number("MoE", name, coef)
        need("MoE", coef >= 0, name, ">= 0", coef)
    need_bool("MoE", "inject_aux_loss", config.inject_aux_loss)
    need_int("MoE", "shared_intermediate_size", config.shared_intermediate_size, least=0)
    if config.router is not None:
        _check_router(config)


def _check_router(config: MoEConfig) -> None:
    """Raises ValueError unless a router of the user's fits, as far as it tells its sizes;
    `MoE._check_routed` sees the rest at the first forward."""
    router = config.router
    for name in _ROUTING:
        value, default = getattr(config, name), MoEConfig.__dataclass_fields__[name].default
        need("MoE", value == default, name, "left to the router where one is given", value)
    must_be = "a module, moe_ext.TopKRouter(...) say, that returns a moe_ext.RouterOutput"
    need("MoE", isinstance(router, nn.Module), "router", must_be, router)
    try:
        inspect.signature(router.forward).bind(None, None)
    except TypeError:
        need("MoE", False, "router", "one with forward(tokens, topk_ids=None)", router)
    for name in ("hidden_size", "num_experts", "top_k"):
        size, own = getattr(router, name, None), getattr(config, name)
        need("MoE", size is None or size == own, f"router.{name}", f"the layer's {own}", size)
    if config.balance == "bias":
        has_bias = getattr(router, "expert_bias", None) is not None
        need("MoE", has_bias, "router", "one with bias_update_rate", router)


def _make_router(config: MoEConfig) -> TopKRouter:
    names = (*_ROUTING, "init_std", "device", "dtype")
    options = {name: getattr(config, name) for name in names}
    if config.balance != "bias":
        options["bias_update_rate"] = None
    return TopKRouter(config.hidden_size, config.num_experts, config.top_k, **options)


class MoE(HasAuxLoss):
    """A Mixture-of-Experts layer: a drop-in for a dense feed-forward network.

    Args:
        hidden_size, intermediate_size, num_experts, top_k: H, I, E, K.
        activation, gated: see `moe_ext.expert_ffn`.
        bias: on both projections of the experts.
        router: a module tokens [T, H], topk_ids=None -> RouterOutput (see `moe_ext.routers`), which
            then has the routing's options; its forward may take token_mask [T], and its method
            load_balancing_loss, if it has one (see `TopKRouter`), gives that loss. None: a
            `TopKRouter` of the arguments here.
        score_function, renormalize, scaling_factor, temperature, jitter, num_groups, topk_groups:
            see `TopKRouter`. With top_k=1 set renormalize=False: otherwise the only weight is
            always 1, and the router gets no gradient from the main loss.
        balance: "aux_loss": the load-balancing loss with coefficient aux_loss_coef; "bias": a bias
            that is added to the scores for the choice only and moves by bias_update_rate when
            `router.update_expert_bias()` is called after an optimizer step; "none": without.
        aux_loss_coef, z_loss_coef: coefficients of `moe_ext.load_balancing_loss` (with balance=
            "aux_loss") and `moe_ext.router_z_loss`.
        inject_aux_loss: add the losses' gradient in backward, for training scripts that can't be
            changed. A layer does not know how the script scales its loss (GradScaler, division by
            the number of micro-batches): tell it by `moe_ext.set_aux_loss_scale`, or take the loss
            yourself.
        capacity_factor, eval_capacity_factor, min_capacity, drop_policy, capacity_bounds: dropping
            over a capacity, see `TopKRouter`; None is dropless. A token that lost all its slots
            comes out as zero.
        tile_size, rounding: token rounding in training, see `TopKRouter`; None is off.
        balance_per, normalize_by_topk: how the load-balancing loss is taken, see `TopKRouter`.
        shared_intermediate_size: size of a shared expert that is added for every token; 0: none.
        recompute: what backward recomputes: "activation" keeps x and the pre-activation, "hidden"
            only x.
        fuse_grad_accumulation: of the experts, see `GroupedExperts`.
        init_std: standard deviation of all weights at initialization.

    Raises:
        ValueError: for options.
        RuntimeError: for shapes and dtypes.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        activation: str = "silu",
        gated: bool = True,
        bias: bool = False,
        router: nn.Module | None = None,
        score_function: str = "softmax",
        renormalize: bool = True,
        scaling_factor: float = 1.0,
        temperature: float = 1.0,
        jitter: float = 0.0,
        num_groups: int = 1,
        topk_groups: int = 1,
        balance: str = "aux_loss",
        aux_loss_coef: float = 0.01,
        z_loss_coef: float = 0.0,
        bias_update_rate: float = 1e-3,
        inject_aux_loss: bool = False,
        capacity_factor: float | None = None,
        eval_capacity_factor: float | None = None,
        min_capacity: int = 4,
        drop_policy: str = "probs",
        capacity_bounds: tuple[float, float] | None = None,
        tile_size: int | None = None,
        rounding: str = "nearest",
        balance_per: str = "batch",
        normalize_by_topk: bool = True,
        shared_intermediate_size: int = 0,
        recompute: str = "activation",
        fuse_grad_accumulation: bool = False,
        init_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        arguments = locals()  # those of MoEConfig, by the same names
        config = MoEConfig(**{name: arguments[name] for name in MoEConfig.__dataclass_fields__})
        super().__init__(inject_aux_loss, device)
        _check_config(config)
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.top_k = top_k
        self.balance = balance
        self.aux_loss_coef = aux_loss_coef if balance == "aux_loss" else 0.0
        self.z_loss_coef = z_loss_coef
        self.router = router = _make_router(config) if router is None else router
        self._router_takes_mask = "token_mask" in inspect.signature(router.forward).parameters
        # The routers of this package name no experts that are not there.
        self._router_is_ours = type(router).__module__.startswith(f"{routers.__name__}.")
        # Their outputs are new, and their loss depends on nothing else. (Given ids are the user's.)
        self._loss_can_wait = self._router_is_ours and not isinstance(router, GivenIdsRouter)
        names = ("activation", "gated", "recompute", "init_std", "device", "dtype")
        ffn = {name: getattr(config, name) for name in names}
        self.experts = GroupedExperts(
            num_experts,
            hidden_size,
            intermediate_size,
            bias=bias,
            fuse_grad_accumulation=fuse_grad_accumulation,
            **ffn,
        )
        self.shared_expert = None
        if shared_intermediate_size:
            self.shared_expert = SharedExpert(hidden_size, shared_intermediate_size, **ffn)
        self._add_statistics(device)
        self._monitor_totals: Tensor | None = None  # moe_ext.monitor's, while it watches

    def _add_statistics(self, device: torch.device | str | None) -> None:
        # Buffers written in place: that works in a compiled checkpoint, where assigning a tensor to
        # an attribute does not.
        with torch.inference_mode(False):
            counts = torch.zeros(self.num_experts, device=device, dtype=torch.int64)
            dropped = torch.zeros((), device=device, dtype=torch.int64)
        self.register_buffer("_tokens_per_expert", counts, persistent=False)
        self.register_buffer("_dropped", dropped, persistent=False)

    @classmethod
    def from_config(cls, config: MoEConfig) -> "MoE":
        """The layer of a MoEConfig."""
        return cls(
            **{field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        )

    def reset_parameters(self) -> None:
        """Initializes parameters and statistics again, after `to_empty` say."""
        for module in self.children():
            if hasattr(module, "reset_parameters"):  # a router of the user's need not have it
                module.reset_parameters()
        for buffer in self.buffers(recurse=False):
            buffer.zero_()

    @property
    def last_stats(self) -> MoEStats:
        """Of the last forward: tokens_per_expert [E] int64, dropped (scalar int64). No sync.

        The tensors are the layer's own: the next forward overwrites them.
        """
        return MoEStats(self._tokens_per_expert, self._dropped)

    def forward(
        self,
        x: Tensor,
        *,
        return_aux_loss: bool = False,
        token_mask: Tensor | None = None,
        topk_ids: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x [..., H] -> y [..., H] in x's dtype (the autocast dtype under autocast).

        Args:
            x: [..., H].
            return_aux_loss: also return the losses, coefficients applied: a float32 scalar.
            token_mask: [...] bool; False tokens come out as zeros and count in no loss and no
                statistic.
            topk_ids: [..., K]: the routing is given; the router still gives the weights.
        """
        self._check_inputs(x, token_mask, topk_ids)
        tokens = x if x.dim() == 2 else x.reshape(-1, self.hidden_size)
        if token_mask is not None:
            # Masked tokens may hold anything, NaN included: as zeros they reach no gradient.
            token_mask = token_mask.reshape(-1)
            tokens = tokens.masked_fill(~token_mask.unsqueeze(1), 0)
        if topk_ids is not None:
            topk_ids = topk_ids.reshape(tokens.shape[0], topk_ids.shape[-1])
        router = self.router
        routed = self._route(router, tokens, topk_ids, token_mask)
        y = self.experts(tokens, *self._assignment(routed))
        if self.shared_expert is not None:
            y = y + self.shared_expert(tokens)  # zeros in, zeros out for masked tokens
        num_sequences = 1 if x.dim() == 2 else math.prod(x.shape[:-2])
        asked = return_aux_loss or token_mask is not None or topk_ids is not None
        if not asked and self._waits(router, routed):
            self._record(routed, None, None)
            this = weakref.proxy(self)  # or the layer would hold itself
            self._keep_unmade(partial(type(self)._losses, this, routed, None, num_sequences))
        else:
            loss = self._losses(routed, token_mask, num_sequences)
            self._record(routed, token_mask, loss)
            has_loss = self.aux_loss_coef > 0 or self.z_loss_coef > 0
            y, loss = self._hand_out(y, loss, is_taken=return_aux_loss or not has_loss)
        if x.dim() != 2:
            y = y.reshape(x.shape)
        return (y, loss) if return_aux_loss else y

    def _waits(self, router: nn.Module, routed: RouterOutput) -> bool:
        """Whether the loss of this forward is only computed when somebody asks for it: in
        evaluation, where what it is computed from is small and has no history."""
        if self.training or self.inject_aux_loss or not self._loss_can_wait:
            return False
        if torch.compiler.is_compiling() or in_backward() or router.process_group is not None:
            return False  # all ranks compute it together
        probs = routed.router_probs
        return not probs.requires_grad and probs.numel() <= _MOST_SCORES

    def _check_inputs(self, x: Tensor, token_mask: Tensor | None, topk_ids: Tensor | None) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"MoE: x must be a tensor, got {type(x).__name__}")
        if x.dim() == 0 or x.shape[-1] != self.hidden_size:
            raise RuntimeError(f"MoE: x must be [..., H={self.hidden_size}], got {list(x.shape)}")
        if token_mask is not None and token_mask.shape != x.shape[:-1]:
            raise RuntimeError(
                f"MoE: token_mask must be {list(x.shape[:-1])}, got {list(token_mask.shape)}"
            )
        if token_mask is not None and token_mask.dtype != torch.bool:
            raise RuntimeError(f"MoE: token_mask must be torch.bool, got {token_mask.dtype}")
        if topk_ids is not None and topk_ids.shape != (*x.shape[:-1], self.top_k):
            raise RuntimeError(
                f"MoE: topk_ids must be {[*x.shape[:-1], self.top_k]} (K={self.top_k}), got "
                f"{list(topk_ids.shape)}"
            )

    def _route(
        self,
        router: nn.Module,
        tokens: Tensor,
        topk_ids: Tensor | None,
        token_mask: Tensor | None,
    ) -> RouterOutput:
        """The router's output, without masked tokens whether it knows of masks or not."""
        has_mask = token_mask is not None
        knows = {"token_mask": token_mask} if has_mask and self._router_takes_mask else {}
        routed = router(tokens, topk_ids, **knows)
        self._check_routed(routed, tokens.shape[0])
        if not has_mask:
            return routed
        masked = ~token_mask.unsqueeze(1)
        if routed.chosen_ids is not None:
            routed = routed._replace(chosen_ids=routed.chosen_ids.masked_fill(masked, -1))
        if routed.pairs is not None and not knows:
            pair_tokens, pair_experts, pair_weights = routed.pairs
            is_masked = masked[pair_tokens.clamp(min=0), 0]
            pair_experts = pair_experts.masked_fill(is_masked, -1)
            routed = routed._replace(pairs=(pair_tokens, pair_experts, pair_weights))
        return routed._replace(topk_ids=routed.topk_ids.masked_fill(masked, -1))

    def _check_routed(self, routed: RouterOutput, num_tokens: int) -> None:
        if not isinstance(routed, RouterOutput):
            raise TypeError(
                f"MoE: router must return a moe_ext.RouterOutput, got {type(routed).__name__}"
            )
        slots, scores = (num_tokens, self.top_k), (num_tokens, self.num_experts)
        shapes = (slots, slots, scores, scores)
        for name, tensor, shape in zip(RouterOutput._fields[:4], routed[:4], shapes, strict=True):
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    f"MoE: router must return {name} as a tensor, got {type(tensor).__name__}"
                )
            if tensor.shape != shape:
                raise RuntimeError(
                    f"MoE: router must return {name} {list(shape)} (E={self.num_experts}, "
                    f"K={self.top_k}), got {list(tensor.shape)}"
                )

    @staticmethod
    def _assignment(routed: RouterOutput) -> tuple[Tensor, ...]:
        """Weights, ids and, of pairs, tokens: what the experts run."""
        if routed.pairs is None:
            return routed.topk_weights, routed.topk_ids
        pair_tokens, pair_experts, pair_weights = routed.pairs
        return pair_weights, pair_experts, pair_tokens

    def _record(self, routed: RouterOutput, token_mask: Tensor | None, loss: Tensor | None) -> None:
        """Keeps the statistics of this forward; None: a loss in evaluation that waits."""

        def count(ids: Tensor) -> Tensor:
            return ops._tokens_per_expert(ids, self.num_experts)

        kept = count(routed.topk_ids)
        ran = kept if routed.pairs is None else count(routed.pairs[1].unsqueeze(1))
        writable(self, "_tokens_per_expert", ran).copy_(ran)
        dropped = writable(self, "_dropped", ran).zero_()
        if routed.chosen_ids is not None:
            dropped += count(routed.chosen_ids).sum() - kept.sum()
        if not self._router_is_ours:
            chosen = routed.topk_ids if routed.chosen_ids is None else routed.chosen_ids
            dropped += (chosen >= self.num_experts).sum()
        if self._monitor_totals is not None and self.training:
            probs = routed.router_probs.detach()
            entropy = ops._router_entropy(probs, token_mask)
            tokens = probs.new_full((), probs.shape[0]) if token_mask is None else token_mask.sum()
            add_to_monitor(
                self._monitor_totals,
                self._tokens_per_expert,
                dropped=self._dropped,
                entropy=entropy * tokens,
                loss=loss.detach(),
                tokens=tokens,
            )

    def _losses(
        self, routed: RouterOutput, token_mask: Tensor | None, num_sequences: int
    ) -> Tensor:
        """The losses with their coefficients: a float32 scalar."""
        losses = []
        if self.aux_loss_coef:
            router = self.router
            if hasattr(router, "load_balancing_loss"):
                balance = router.load_balancing_loss(routed, token_mask, num_sequences)
            else:
                ids = routed.topk_ids if routed.chosen_ids is None else routed.chosen_ids
                balance = ops.load_balancing_loss(routed.router_probs, ids, token_mask=token_mask)
            losses.append((self.aux_loss_coef * balance).float())
        if self.z_loss_coef:
            z_loss = ops.router_z_loss(routed.router_logits, token_mask=token_mask)
            losses.append((self.z_loss_coef * z_loss).float())
        if not losses:
            return torch.zeros((), dtype=torch.float32, device=routed.router_probs.device)
        return sum(losses[1:], start=losses[0])

    def __getstate__(self) -> dict:
        # A copy is not the one that the monitor watches.
        return {**super().__getstate__(), "_monitor_totals": None}

    def extra_repr(self) -> str:
        return f"top_k={self.top_k}, balance={self.balance}"
