"""The experts of a layer: modules with their weights, over the operators."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_ext import ops
from moe_ext._messages import need, need_bool, need_choice, need_number, need_sizes


class _PackedParameter(NamedTuple):
    parameter: nn.Parameter  # without its numbers
    shape: torch.Size


class _Experts(nn.Module):
    """Projections of one expert or of a stack of them: shapes begin with `leading`."""

    # An option of stacks: the operator gets their weights as they are.
    fuse_grad_accumulation = False

    _packed: dict[str, _PackedParameter] | None = None

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
        need_sizes(who, hidden_size=hidden_size, intermediate_size=intermediate_size)
        need(who, isinstance(activation, str), "activation", 'a name, "silu" say', activation)
        need_choice(who, "recompute", recompute, "activation", "hidden")
        need_bool(who, "gated", gated)
        need_bool(who, "bias", bias)
        need_number(who, "init_std", init_std)
        need(who, init_std >= 0, "init_std", ">= 0", init_std)
        self.activation = activation
        self.gated = gated
        self.recompute = recompute
        self.has_bias = bias
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
        self._need_plain("reset_parameters")
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith("_bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=self.init_std)

    def _check_tokens(self, tokens: Tensor, weight: Tensor) -> None:
        # Here, not in the layer: whoever shards or casts a module does it around its own forward.
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

    def _run(
        self, tokens: Tensor, weights: Tensor, ids: Tensor, pair_tokens: Tensor | None
    ) -> Tensor:
        """The experts on their tokens; weights and ids [T, K], or [P] with pair_tokens [P]."""
        options = {
            "gate_up_bias": getattr(self, f"{self._up_name}_bias") if self.has_bias else None,
            "down_bias": self.down_proj_bias if self.has_bias else None,
            "activation": self.activation,
            "gated": self.gated,
        }
        if self.is_packed:
            packed = getattr(self, f"_packed_{self._up_name}"), self._packed_down_proj
            self._check_tokens(tokens, packed[1])
            if self.training:
                self._need_plain("training mode (call .eval() to evaluate)")
            options["intermediate_size"] = self._packed["down_proj"].shape[-1]
            return ops._moe_ffn_packed(tokens, weights, ids, pair_tokens, *packed, **options)
        # Each once: finding a parameter takes a module a microsecond.
        projections = (getattr(self, self._up_name), self.down_proj)
        self._check_tokens(tokens, projections[1])
        if projections[1].dim() == 2:
            projections = [weight.unsqueeze(0) for weight in projections]
        options["recompute"] = self.recompute
        options["fuse_grad_accumulation"] = self.fuse_grad_accumulation
        if pair_tokens is None:
            return ops.moe_ffn(tokens, weights, ids, *projections, **options)
        return ops._moe_ffn_pairs(tokens, weights, ids, pair_tokens, *projections, **options)

    # Packed weights (`moe_ext.pack_`): a buffer each, beside the parameter without its numbers.

    @property
    def is_packed(self) -> bool:
        """Whether the weights are packed: `moe_ext.pack_`."""
        return self._packed is not None

    def _need_plain(self, what: str) -> None:
        if self.is_packed:
            raise RuntimeError(
                f"{type(self).__name__}: weights must not be packed for {what}, got packed ones: "
                "call moe_ext.unpack_(module) first"
            )

    def _check_packable(self, name: str, owners: Mapping[int, int]) -> None:
        for weight_name in (self._up_name, "down_proj"):
            where = f"pack_: {name}.{weight_name}" if name else f"pack_: {weight_name}"
            weight = self._parameters.get(weight_name)
            if type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
                got = type(getattr(self, weight_name, None)).__name__
                raise RuntimeError(f"{where} must be a plain parameter, got {got}")
            if weight.device.type != "cpu":
                raise RuntimeError(f"{where} must be on the CPU, got {weight.device}")
            if owners[id(weight)] > 1:
                raise RuntimeError(
                    f"{where} must belong to one module, got {owners[id(weight)]} that share it"
                )

    @torch.inference_mode(False)
    @torch.no_grad()
    def _pack(self) -> None:
        self._packed = {}
        try:
            for name in (self._up_name, "down_proj"):
                parameter = self._parameters[name]
                weight = parameter.detach()
                stacked = weight if weight.dim() == 3 else weight.unsqueeze(0)
                packed = ops._pack_weights(stacked, self.gated and name == self._up_name)
                del self._parameters[name]
                self.register_buffer(f"_packed_{name}", packed, persistent=False)
                self._packed[name] = _PackedParameter(parameter, weight.shape)
                parameter.data = weight.new_empty(0)
        except BaseException:
            self._unpack()
            raise

    @torch.inference_mode(False)
    @torch.no_grad()
    def _unpack(self) -> None:
        biases = {name: p for name, p in self._parameters.items() if name.endswith("_bias")}
        for name in list(self._packed):
            parameter = self._packed[name].parameter
            parameter.data = self._plain_weight(name)
            delattr(self, f"_packed_{name}")
            self._parameters[name] = parameter
            del self._packed[name]
        for name, bias in biases.items():  # in the order of the constructor
            del self._parameters[name]
            self._parameters[name] = bias
        self._packed = None

    def _plain_weight(self, name: str) -> Tensor:
        packed, shape = getattr(self, f"_packed_{name}"), self._packed[name].shape
        gated = self.gated and name == self._up_name
        return ops._unpack_weights(packed, shape[-2], shape[-1], gated).view(shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_Experts":
        if self.is_packed:
            probe = self._packed_down_proj.new_empty(0)
            moved = fn(probe)
            if (moved.dtype, moved.device) != (probe.dtype, probe.device):
                self._need_plain(f"{moved.dtype} on {moved.device}")
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        if self.is_packed:
            with torch.no_grad():
                for name in self._packed:
                    destination[prefix + name] = self._plain_weight(name)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._need_plain("load_state_dict")
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        packed = self._packed or {}
        up = packed[self._up_name] if packed else getattr(self, self._up_name)
        text = f"{self._up_name}={list(up.shape)}, activation={self.activation}"
        return f"{text}, recompute={self.recompute}" + (", packed" if packed else "")


class GroupedExperts(_Experts):
    """E feed-forward experts with stacked weights, in Hugging Face's layout.

    Args:
        num_experts, hidden_size, intermediate_size: E, H, I.
        activation, gated, recompute: see `moe_ext.expert_ffn`.
        bias: on both projections.
        fuse_grad_accumulation: backward adds the gradient of a projection inside its kernel to
            where it is accumulated, so that it needs no memory and no pass of its own: to the
            parameter's `main_grad`, if it has one (float32 or the parameter's dtype, as Megatron's
            optimizers keep it; `grad_added_to_main_grad` is set where the parameter has that
            attribute), or to its `.grad`, where there is one of its dtype on the CPU. Sums are
            those of plain accumulation, rounded once. Where that can't be done (the first
            backward after `zero_grad`, `torch.autograd.grad`, create_graph, torch.compile,
            autocast, DTensor) autograd accumulates as ever; so it does, with a warning, where
            hooks need the gradient, DistributedDataParallel's say. Biases are accumulated by
            autograd.
        init_std: standard deviation of the projections at initialization; biases start at zero.

    Parameters: gate_up_proj [E, 2I, H] (rows 0..I-1 gate, I..2I-1 up) or, not gated, up_proj
    [E, I, H]; down_proj [E, H, I]; with bias gate_up_proj_bias [E, 2I] or up_proj_bias [E, I], and
    down_proj_bias [E, H].

    Raises:
        ValueError: for options.
        RuntimeError: for shapes and dtypes, and in backward for a main_grad of another shape,
            device, dtype or layout.
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
        fuse_grad_accumulation: bool = False,
        init_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        need_sizes("GroupedExperts", num_experts=num_experts)
        need_bool("GroupedExperts", "fuse_grad_accumulation", fuse_grad_accumulation)
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
        self.fuse_grad_accumulation = fuse_grad_accumulation
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
        return self._run(tokens, topk_weights, topk_ids, pair_tokens)


class SharedExpert(_Experts):
    """One expert that sees every token with weight 1; no biases.

    Parameters: gate_up_proj [2I, H] or, not gated, up_proj [I, H]; down_proj [H, I].
    """

    def __init__(self, hidden_size: int, intermediate_size: int, **options) -> None:
        super().__init__((), hidden_size, intermediate_size, bias=False, **options)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [T, H] -> [T, H]: moe_ffn with one expert, for its small activation memory."""
        slots = tokens.new_ones(tokens.shape[0], 1)
        return self._run(tokens, slots, torch.zeros_like(slots, dtype=torch.int64), None)
