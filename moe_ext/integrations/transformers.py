"""Runs the experts of Hugging Face models on moe_ext.

    import moe_ext.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="moe_ext")

or `model.set_experts_implementation("moe_ext")` for a model that is already there. It serves every
model whose experts class has transformers' `use_experts_implementation` decorator.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ext import monitor, ops
from moe_ext.layers import add_to_monitor

try:
    from transformers import activations
    from transformers.integrations.moe import ExpertsInterface, _default_apply_gate
except ImportError as error:
    raise ImportError(
        "moe_ext.integrations.transformers needs a transformers with experts implementations, "
        f"5.0 or newer: pip install -U 'transformers>=5.0' ({error})"
    ) from error

# What computes exactly one of our activations, by the module's class or as a function.
_ACTIVATION_OF_CLASS = {
    activations.SiLUActivation: "silu",
    nn.SiLU: "silu",
    activations.GELUActivation: "gelu",
    activations.GELUTanh: "gelu_tanh",
    activations.NewGELUActivation: "gelu_tanh",
    nn.ReLU: "relu",
    activations.ReLUSquaredActivation: "relu2",
    activations.LinearActivation: "identity",
}
_ACTIVATION_OF_FUNCTION = {F.silu: "silu", F.gelu: "gelu", F.relu: "relu"}


def _fused_activation(experts: nn.Module) -> str | None:
    """Our name for the experts' activation; None if only the model's own code computes it."""
    if experts.has_post_expert_norm:
        return None
    if experts.has_gate:
        own_gate = type(experts)._apply_gate is not _default_apply_gate
        if own_gate or not experts.is_concatenated:
            return None
    act = experts.act_fn
    if isinstance(act, nn.Module):
        return _ACTIVATION_OF_CLASS.get(type(act))
    return _ACTIVATION_OF_FUNCTION.get(act)


def experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The experts' forward, as transformers' ExpertsInterface wants it.

    Args:
        self: the model's experts module, with the decorator's flags and its weights; the sizes are
            those of the weights, which may be local shards.
        hidden_states: [T, H].
        top_k_index: [T, K]; ids at or past the number of (local) experts are expert parallelism's
            sentinels: no work, no contribution, no gradient.
        top_k_weights: [T, K], any floating dtype.

    Returns:
        [T, H] in hidden_states' dtype.
    """
    up_name = "gate_up_proj" if self.has_gate else "up_proj"
    up, down = getattr(self, up_name), self.down_proj
    up_bias = getattr(self, f"{up_name}_bias") if self.has_bias else None
    down_bias = self.down_proj_bias if self.has_bias else None
    if self.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    tokens = hidden_states
    if not torch.is_autocast_enabled(tokens.device.type):  # autocast casts in the operators
        tokens = tokens.to(up.dtype)
    totals = getattr(self, "_monitor_totals", None)
    if totals is not None and self.training:
        counts = torch.ops.moe_ext._tokens_per_expert.default(top_k_index, down.shape[0])
        zero = totals.new_zeros(())
        add_to_monitor(totals, counts, dropped=zero, tokens=zero + tokens.shape[0])

    activation = _fused_activation(self)
    if activation is not None:
        out = ops.moe_ffn(
            tokens,
            top_k_weights,
            top_k_index,
            up,
            down,
            gate_up_bias=up_bias,
            down_bias=down_bias,
            activation=activation,
            gated=self.has_gate,
        )
        return out.to(hidden_states.dtype)

    # The model's own function between the two products.
    grouped_linear = torch.ops.moe_ext._grouped_linear.default
    rows, row_map, expert_offsets = ops.permute(tokens, top_k_index, up.shape[0])
    hidden = grouped_linear(rows, expert_offsets, up, up_bias)
    hidden = self._apply_gate(hidden) if self.has_gate else self.act_fn(hidden)
    rows = grouped_linear(hidden.to(rows.dtype), expert_offsets, down, down_bias)
    if self.has_post_expert_norm:
        rows = self.post_expert_norm(rows)
    return ops.unpermute(rows, row_map, top_k_weights).to(hidden_states.dtype)


_registered: set[str] = set()


def register(name: str = "moe_ext") -> None:
    """Makes `experts_implementation=name` mean moe_ext.

    Importing this module registers "moe_ext". Registering "grouped_mm", transformers' default, too
    switches models whose implementation nobody chooses, `transformers serve` for one.
    """
    ExpertsInterface.register(name, experts_forward)
    _registered.add(name)


def _watch_experts(module: nn.Module) -> monitor.Watched | None:
    """For `moe_ext.monitor`: experts that run on moe_ext."""
    config = getattr(module, "config", None)
    if not (
        hasattr(module, "is_transposed")  # use_experts_implementation's
        and getattr(config, "_experts_implementation", None) in _registered
    ):
        return None
    top_k = getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k", 1)
    return monitor.Watched(module, module, top_k)


register()
monitor.WATCHERS.append(_watch_experts)
