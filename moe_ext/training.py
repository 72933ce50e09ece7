"""What a training script does with a whole model: its optimizer's parameter groups, and the update
of all expert biases."""

from collections.abc import Iterator

from torch import nn

from moe_ext._messages import need, need_number
from moe_ext.moe import MoE
from moe_ext.routers import TopKRouter


def param_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    router_lr: float | None = None,
    router_weight_decay: float | None = None,
    expert_lr: float | None = None,
) -> list[dict]:
    """The parameters of a model in groups for an optimizer: `AdamW(param_groups(model, ...))`.

    A rule by `isinstance(module, nn.Linear)` misses routers and experts, one by `dim() >= 2` decays
    the experts' biases [E, .]. Here biases and vectors (norms) have no weight decay, everything
    else has.

    Args:
        model: any module; layers of this package and the stacked experts of others (three
            dimensions) are told apart from the rest.
        lr, weight_decay: of all groups where nothing else is said.
        router_lr, router_weight_decay: of the routers' weights; None: lr, weight_decay.
        expert_lr: of the experts' weights and biases; None: lr.

    Returns:
        Dicts with name ("routers", "experts", "experts, no decay", "weights", "no decay"), params,
        lr and weight_decay. Every parameter that requires a gradient is in one; groups without
        parameters are left out.
    """
    options = {
        "lr": lr,
        "weight_decay": weight_decay,
        "router_lr": router_lr,
        "router_weight_decay": router_weight_decay,
        "expert_lr": expert_lr,
    }
    for name, value in options.items():
        if value is not None or name in ("lr", "weight_decay"):
            need_number("param_groups", name, value)
            need("param_groups", value >= 0, name, ">= 0", value)
    router_lr = lr if router_lr is None else router_lr
    expert_lr = lr if expert_lr is None else expert_lr
    router_decay = weight_decay if router_weight_decay is None else router_weight_decay
    settings = {
        "routers": (router_lr, router_decay),
        "experts": (expert_lr, weight_decay),
        "experts, no decay": (expert_lr, 0.0),
        "weights": (lr, weight_decay),
        "no decay": (lr, 0.0),
    }
    params: dict[str, list[nn.Parameter]] = {name: [] for name in settings}
    kinds = dict(_kinds(model))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_bias = parameter.dim() < 2 or name.rpartition(".")[2].endswith("bias")
            kind = kinds.get(parameter) or ("experts" if parameter.dim() > 2 else "weights")
            if is_bias:
                kind = "experts, no decay" if kind == "experts" else "no decay"
            params[kind].append(parameter)
    return [
        {"name": name, "params": params[name], "lr": rate, "weight_decay": decay}
        for name, (rate, decay) in settings.items()
        if params[name]
    ]


def _kinds(model: nn.Module) -> Iterator[tuple[nn.Parameter, str]]:
    """The parameters of this package's layers, and of modules with stacked experts."""
    for module in model.modules():
        if isinstance(module, MoE):
            for parameter in module.experts.parameters():
                yield parameter, "experts"
            if module.shared_expert is not None:
                for parameter in module.shared_expert.parameters():
                    yield parameter, "experts"
            for parameter in module.router.parameters():
                yield parameter, "routers"
        else:
            base = module
            while hasattr(base, "base_layer"):  # an adapter's wrapper, whose own weights are small
                base = base.base_layer
            if any(parameter.dim() == 3 for parameter in base.parameters(recurse=False)):
                for parameter in module.parameters():
                    yield parameter, "experts"


def update_expert_bias(model: nn.Module) -> int:
    """Calls `update_expert_bias` of every router of a model that balances by a bias; to be called
    after an optimizer step. See `TopKRouter.update_expert_bias`.

    Returns how many there were. Raises RuntimeError if there was none, since nothing would balance
    the experts then.
    """
    routers = [
        module
        for module in model.modules()
        if isinstance(module, TopKRouter) and module.expert_bias is not None
    ]
    if not routers:
        raise RuntimeError(
            "update_expert_bias: model must have a router with bias_update_rate (or "
            "MoE(balance='bias')), got none"
        )
    for router in routers:
        router.update_expert_bias()
    return len(routers)
