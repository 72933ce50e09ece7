"""The Mixture-of-Experts layer: thin modules over the operators."""

import dataclasses
import inspect
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_ext import ops
from moe_ext._buffers import writable
from moe_ext._messages import need, need_bool, need_choice, need_int, need_number
from moe_ext.aux_loss import HasAuxLoss
from moe_ext.routers import RouterOutput, TopKRouter


class _Experts(nn.Module):
    """Projections of one expert or of a stack of them: shapes begin with `leading`."""

    def __init__(
        self,
        leading: tuple[int, ...],
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str,
        gated: bool,
        bias: bool,
        recompute: str,
        init_std: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        who = type(self).__name__
        sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size}
        for name, size in sizes.items():
            need_int(who, name, size, least=1)
        need(who, isinstance(activation, str), "activation", 'a name, "silu" say', activation)
        need_choice(who, "recompute", recompute, "activation", "hidden")
        need_bool(who, "gated", gated)
        need_bool(who, "bias", bias)
        need_number(who, "init_std", init_std)
        need(who, init_std >= 0, "init_std", ">= 0", init_std)
        self.activation = activation
        self.gated = gated
        self.recompute = recompute
        self.init_std = init_std
        self._up_name = "gate_up_proj" if gated else "up_proj"
        width = 2 * intermediate_size if gated else intermediate_size
        shapes = {
            self._up_name: (*leading, width, hidden_size),
            "down_proj": (*leading, hidden_size, intermediate_size),
        }
        if bias:
            shapes[f"{self._up_name}_bias"] = (*leading, width)
            shapes["down_proj_bias"] = (*leading, hidden_size)
        for name, shape in shapes.items():
            parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.register_parameter(name, parameter)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with standard deviation init_std; zero biases."""
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith("_bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=self.init_std)

    def _check_tokens(self, tokens: Tensor) -> None:
        # Here, not in the layer: whoever shards or casts a module does it around its own forward.
        weight = self.down_proj
        dtype, device = weight.dtype, weight.device
        if tokens.dtype != dtype and not torch.is_autocast_enabled(tokens.device.type):
            raise RuntimeError(
                f"{type(self).__name__}: tokens (the layer's x) must be {dtype} like its weights, "
                f"got {tokens.dtype}: convert one of them with .to(), or run it under "
                "torch.autocast"
            )
        if tokens.device != device:
            raise RuntimeError(
                f"{type(self).__name__}: tokens (the layer's x) must be on {device} like its "
                f"weights, got {tokens.device}"
            )

    def extra_repr(self) -> str:
        shape = list(getattr(self, self._up_name).shape)
        return f"{self._up_name}={shape}, activation={self.activation}, recompute={self.recompute}"


class GroupedExperts(_Experts):
    """E feed-forward experts with stacked weights, in Hugging Face's layout.

    Args:
        num_experts, hidden_size, intermediate_size: E, H, I.
        activation, gated, recompute: see `moe_ext.expert_ffn`.
        bias: on both projections.
        init_std: standard deviation of the projections at initialization; biases start at zero.

    Parameters: gate_up_proj [E, 2I, H] (rows 0..I-1 gate, I..2I-1 up) or, not gated, up_proj
    [E, I, H]; down_proj [E, H, I]; with bias gate_up_proj_bias [E, 2I] or up_proj_bias [E, I], and
    down_proj_bias [E, H].
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str = "silu",
        gated: bool = True,
        bias: bool = False,
        recompute: str = "activation",
        init_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        need_int("GroupedExperts", "num_experts", num_experts, least=1)
        super().__init__(
            (num_experts,),
            hidden_size,
            intermediate_size,
            activation=activation,
            gated=gated,
            bias=bias,
            recompute=recompute,
            init_std=init_std,
            device=device,
            dtype=dtype,
        )
        # The operator knows the rules for the options; a run on no tokens applies them now.
        on_meta = {name: parameter.to("meta") for name, parameter in self.named_parameters()}
        tokens = self.down_proj.new_empty(0, hidden_size, device="meta")
        slots = tokens.new_empty(0, 1)
        torch.func.functional_call(self, on_meta, (tokens, slots, slots.long()))

    def forward(
        self,
        tokens: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        pair_tokens: Tensor | None = None,
    ) -> Tensor:
        """tokens [T, H], topk_weights [T, K], topk_ids [T, K] -> [T, H]: `moe_ext.moe_ffn`.

        With pair_tokens [P] the weights and ids are [P] too: a list of pairs in any order, for
        tokens with a varying number of experts; -1 marks an unused one.
        """
        self._check_tokens(tokens)
        weights = (getattr(self, self._up_name), self.down_proj)
        options = {
            "gate_up_bias": getattr(self, f"{self._up_name}_bias", None),
            "down_bias": getattr(self, "down_proj_bias", None),
            "activation": self.activation,
            "gated": self.gated,
            "recompute": self.recompute,
        }
        if pair_tokens is None:
            return ops.moe_ffn(tokens, topk_weights, topk_ids, *weights, **options)
        return ops._moe_ffn_pairs(tokens, topk_weights, topk_ids, pair_tokens, *weights, **options)


class SharedExpert(_Experts):
    """One expert that sees every token with weight 1; no biases.

    Parameters: gate_up_proj [2I, H] or, not gated, up_proj [I, H]; down_proj [H, I].
    """

    def __init__(self, hidden_size: int, intermediate_size: int, **options) -> None:
        super().__init__((), hidden_size, intermediate_size, bias=False, **options)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [T, H] -> [T, H]: moe_ffn with one expert, for its small activation memory."""
        self._check_tokens(tokens)
        slots = tokens.new_ones(tokens.shape[0], 1)
        return ops.moe_ffn(
            tokens,
            slots,
            torch.zeros_like(slots, dtype=torch.int64),
            getattr(self, self._up_name).unsqueeze(0),
            self.down_proj.unsqueeze(0),
            activation=self.activation,
            gated=self.gated,
            recompute=self.recompute,
        )


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
    init_std: float = 0.02
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None


class MoEStats(NamedTuple):
    """What the last forward did: tokens_per_expert [E] int64, dropped (scalar int64)."""

    tokens_per_expert: Tensor
    dropped: Tensor


# What a watched layer adds up beside the counts [E] (`moe_ext.monitor`): slots dropped, entropy of
# the router's probabilities over all tokens, losses, tokens, forwards.
MONITORED = ("dropped", "entropy", "loss", "tokens", "forwards")


def add_to_monitor(totals: Tensor, counts: Tensor, **scalars: Tensor) -> None:
    """Adds a forward to the totals [E + len(MONITORED)] of a watched module: its counts [E] and
    the scalars of MONITORED but forwards; one that is left out is unknown, NaN. What checkpointing
    runs again adds nothing. No sync."""
    unknown = totals.new_full((), torch.nan)
    values = [scalars.get(name, unknown).double() for name in MONITORED[:-1]]
    once = torch.cat([counts.double(), torch.stack([*values, totals.new_ones(())])])
    ops._add_once(totals, once)


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
            see `TopKRouter`.
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
        init_std: standard deviation of all weights at initialization.

    Raises:
        ValueError for options, RuntimeError for shapes and dtypes.
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
        init_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(inject_aux_loss, device)
        sizes = {
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "num_experts": num_experts,
            "top_k": top_k,
        }
        for name, size in sizes.items():
            need_int("MoE", name, size, least=1)
        must_be = f"in [1, num_experts={num_experts}]"
        need("MoE", top_k <= num_experts, "top_k", must_be, top_k)
        need_choice("MoE", "balance", balance, "aux_loss", "bias", "none")
        for name, coef in {"aux_loss_coef": aux_loss_coef, "z_loss_coef": z_loss_coef}.items():
            need_number("MoE", name, coef)
            need("MoE", coef >= 0, name, ">= 0", coef)
        need_bool("MoE", "inject_aux_loss", inject_aux_loss)
        need_int("MoE", "shared_intermediate_size", shared_intermediate_size, least=0)
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.top_k = top_k
        self.balance = balance
        self.aux_loss_coef = aux_loss_coef if balance == "aux_loss" else 0.0
        self.z_loss_coef = z_loss_coef
        common = {"init_std": init_std, "device": device, "dtype": dtype}
        routing = {
            "score_function": score_function,
            "renormalize": renormalize,
            "scaling_factor": scaling_factor,
            "temperature": temperature,
            "jitter": jitter,
            "num_groups": num_groups,
            "topk_groups": topk_groups,
            "bias_update_rate": bias_update_rate,
            "capacity_factor": capacity_factor,
            "eval_capacity_factor": eval_capacity_factor,
            "min_capacity": min_capacity,
            "drop_policy": drop_policy,
            "capacity_bounds": capacity_bounds,
            "tile_size": tile_size,
            "rounding": rounding,
            "balance_per": balance_per,
            "normalize_by_topk": normalize_by_topk,
        }
        if router is None:
            if balance != "bias":
                routing["bias_update_rate"] = None
            router = TopKRouter(hidden_size, num_experts, top_k, **routing, **common)
        else:
            for name, value in routing.items():
                default = MoEConfig.__dataclass_fields__[name].default
                must_be = "left to the router where one is given"
                need("MoE", value == default, name, must_be, value)
            self._check_router(router)
        self.router = router
        self._router_takes_mask = "token_mask" in inspect.signature(router.forward).parameters
        # The routers of this package name no experts that are not there.
        self._router_is_ours = type(router).__module__ == TopKRouter.__module__
        ffn = {"activation": activation, "gated": gated, "recompute": recompute, **common}
        self.experts = GroupedExperts(num_experts, hidden_size, intermediate_size, bias=bias, **ffn)
        self.shared_expert = (
            SharedExpert(hidden_size, shared_intermediate_size, **ffn)
            if shared_intermediate_size
            else None
        )
        # Statistics are buffers written in place: that works in a compiled checkpoint, where
        # assigning a tensor to an attribute does not.
        with torch.inference_mode(False):
            counts = torch.zeros(num_experts, device=device, dtype=torch.int64)
            dropped = torch.zeros((), device=device, dtype=torch.int64)
        self.register_buffer("_tokens_per_expert", counts, persistent=False)
        self.register_buffer("_dropped", dropped, persistent=False)
        self._monitor_totals: Tensor | None = None  # moe_ext.monitor's, while it watches

    def _check_router(self, router: nn.Module) -> None:
        """That a router of the user's fits, as far as it tells its sizes; `_check_routed` sees the
        rest at the first forward."""
        must_be = "a module, moe_ext.TopKRouter(...) say, that returns a moe_ext.RouterOutput"
        need("MoE", isinstance(router, nn.Module), "router", must_be, router)
        try:
            inspect.signature(router.forward).bind(None, None)
        except TypeError:
            need("MoE", False, "router", "one with forward(tokens, topk_ids=None)", router)
        for name in ("hidden_size", "num_experts", "top_k"):
            size, own = getattr(router, name, None), getattr(self, name)
            need("MoE", size is None or size == own, f"router.{name}", f"the layer's {own}", size)
        if self.balance == "bias":
            has_bias = getattr(router, "expert_bias", None) is not None
            need("MoE", has_bias, "router", "one with bias_update_rate", router)

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
        tokens = x.reshape(-1, self.hidden_size)
        if token_mask is not None:
            # Masked tokens may hold anything, NaN included: as zeros they reach no gradient.
            token_mask = token_mask.reshape(-1)
            tokens = tokens.masked_fill(~token_mask.unsqueeze(1), 0)
        if topk_ids is not None:
            topk_ids = topk_ids.reshape(tokens.shape[0], topk_ids.shape[-1])
        routed = self._route(tokens, topk_ids, token_mask)
        y = self.experts(tokens, *self._assignment(routed))
        if self.shared_expert is not None:
            y = y + self.shared_expert(tokens)  # zeros in, zeros out for masked tokens
        loss = self._losses(routed, token_mask, math.prod(x.shape[:-2]))
        self._record(routed, token_mask, loss)
        has_loss = self.aux_loss_coef > 0 or self.z_loss_coef > 0
        y, loss = self._hand_out(y, loss, is_taken=return_aux_loss or not has_loss)
        y = y.reshape(x.shape)
        return (y, loss) if return_aux_loss else y

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
        self, tokens: Tensor, topk_ids: Tensor | None, token_mask: Tensor | None
    ) -> RouterOutput:
        """The router's output, without masked tokens whether it knows of masks or not."""
        has_mask = token_mask is not None
        knows = {"token_mask": token_mask} if has_mask and self._router_takes_mask else {}
        routed = self.router(tokens, topk_ids, **knows)
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

    def _record(self, routed: RouterOutput, token_mask: Tensor | None, loss: Tensor) -> None:
        """Keeps the statistics of this forward."""

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
            if hasattr(self.router, "load_balancing_loss"):
                balance = self.router.load_balancing_loss(routed, token_mask, num_sequences)
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
