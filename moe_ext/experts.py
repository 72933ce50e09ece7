"""The experts of a layer: modules with their weights, over the operators."""

import torch
from torch import Tensor, nn

from moe_ext import ops
from moe_ext._messages import need, need_bool, need_choice, need_number, need_sizes


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
        self._check_tokens(tokens)
        weights = (getattr(self, self._up_name), self.down_proj)
        options = {
            "gate_up_bias": getattr(self, f"{self._up_name}_bias", None),
            "down_bias": getattr(self, "down_proj_bias", None),
            "activation": self.activation,
            "gated": self.gated,
            "recompute": self.recompute,
            "fuse_grad_accumulation": self.fuse_grad_accumulation,
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
