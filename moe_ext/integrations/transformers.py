"""Runs the experts of Hugging Face models on moe_ext.

    import moe_ext.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="moe_ext")

or `model.set_experts_implementation("moe_ext")` for a model that is already there. It serves every
model whose experts class has transformers' `use_experts_implementation` decorator.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ext import monitor, ops
from moe_ext.statistics import add_to_monitor

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
    gated = self.has_gate
    up, down = self.gate_up_proj if gated else self.up_proj, self.down_proj
    up_bias = down_bias = None
    if self.has_bias:
        up_bias = self.gate_up_proj_bias if gated else self.up_proj_bias
        down_bias = self.down_proj_bias
    if self.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    tokens, dtype = hidden_states, hidden_states.dtype
    # Autocast casts in the operators.
    if dtype != up.dtype and not torch.is_autocast_enabled(tokens.device.type):
        tokens = tokens.to(up.dtype)
    # In this order: looking for what a module does not have takes longer than the rest of this.
    if self.training and (totals := getattr(self, "_monitor_totals", None)) is not None:
        counts = ops._tokens_per_expert(top_k_index, down.shape[0])
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
            gated=gated,
        )
        return out if out.dtype == dtype else out.to(dtype)

    # The model's own function between the two products.
    rows, row_map, expert_offsets = ops.permute(tokens, top_k_index, up.shape[0])
    hidden = ops._grouped_linear(rows, expert_offsets, up, up_bias)
    hidden = self._apply_gate(hidden) if gated else self.act_fn(hidden)
    rows = ops._grouped_linear(hidden.to(rows.dtype), expert_offsets, down, down_bias)
    if self.has_post_expert_norm:
        rows = self.post_expert_norm(rows)
    return ops.unpermute(rows, row_map, top_k_weights).to(dtype)


_registered: set[str] = set()


def register(name: str = "moe_ext") -> None:
    """Makes `experts_implementation=name` mean moe_ext.

    Importing this module registers "moe_ext". Registering "grouped_mm", transformers' default, too
    switches models whose implementation nobody chooses, `transformers serve` for one.
    """
    ExpertsInterface.register(name, experts_forward)
    _registered.add(name)


def _find_router(
    above: Sequence[nn.Module],
) -> tuple[nn.Module, Callable[[object], Tensor]] | tuple[None, None]:
    """The router of experts, and what takes its output to the probabilities [T, E].

    The model names the class of its routers, and which of their outputs are the logits, for
    `output_router_logits`. What it does with the logits only the router's code tells: it takes
    either their softmax or their sigmoid. (None, None) where one of these is not known: for
    transformers 5.23 DeepSeek-V4, Inkling 2, Muse Spark, Cohere 2 MoE (functions chosen by the
    config), PhiMoE (a function of its own) and Ernie 4.5 VL (the block gives the logits).

    Args:
        above: the modules above the experts, the nearest first.
    """
    recorded = (getattr(module, "_can_record_outputs", None) or {} for module in above)
    named = next(
        (outputs["router_logits"] for outputs in recorded if "router_logits" in outputs), []
    )
    classes = {}
    for recorder in named if isinstance(named, list) else [named]:
        # transformers' OutputRecorder, or a class whose second output is meant.
        target = getattr(recorder, "target_class", recorder)
        if isinstance(target, type):
            classes[target] = getattr(recorder, "index", 1)
    for block in above:
        modules = list(block.modules())
        if sum(hasattr(module, "is_transposed") for module in modules) > 1:  # others' routers
            break
        routers = [module for module in modules if isinstance(module, tuple(classes))]
        if len(routers) == 1:
            (router,) = routers
            index = next(classes[c] for c in classes if isinstance(router, c))
            used = inspect.unwrap(type(router).forward).__code__.co_names
            functions = [name for name in ("softmax", "sigmoid") if name in used]
            if len(functions) == 1:
                return router, partial(_router_probs, index, functions[0])
    return None, None


def _router_probs(index: int, function: str, output: object) -> Tensor:
    """Probabilities [T, E] as `moe_ext.routers.RouterOutput` has them, of a router's output."""
    logits = output[index] if isinstance(output, (tuple, list)) else output
    logits = logits.detach().reshape(-1, logits.shape[-1])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if function == "sigmoid":
        scores = logits.sigmoid()
        return scores / scores.sum(-1, keepdim=True)
    # Some give probabilities as logits: Gemma 4, Mixtral and the Qwen MoEs in transformers 5.0.
    are_probs = (logits >= 0).all() & ((logits.sum(-1) - 1).abs() < 0.01).all()
    return torch.where(are_probs, logits, logits.softmax(-1))


def _watch_experts(module: nn.Module, above: Sequence[nn.Module]) -> monitor.Watched | None:
    """For `moe_ext.monitor`: experts that run on moe_ext."""
    config = getattr(module, "config", None)
    if not (
        hasattr(module, "is_transposed")  # use_experts_implementation's
        and getattr(config, "_experts_implementation", None) in _registered
    ):
        return None
    top_k = getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k", 1)
    return monitor.Watched(module, module, top_k, *_find_router(above))


register()
monitor.WATCHERS.append(_watch_experts)
