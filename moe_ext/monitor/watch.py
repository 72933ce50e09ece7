"""Which modules of a model can be watched, and what they add up while they are."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_ext import ops
from moe_ext.moe import MoE
from moe_ext.statistics import MONITORED


class Watched(NamedTuple):
    """A module that adds to its attribute _monitor_totals, if it has one, by
    `statistics.add_to_monitor`; the module with its experts' weights, and K. Where the module does
    not know the entropy: its router, if there is one, and what takes the router's output to the
    probabilities [T, E]."""

    module: nn.Module
    experts: nn.Module
    top_k: int
    router: nn.Module | None = None
    router_probs: Callable[[object], Tensor] | None = None

    @property
    def device(self) -> torch.device:
        """Of the experts' weights. On meta are layers that wait for their weights: they come to a
        device or don't run, so for them it is the CPU."""
        device = self.experts.down_proj.device
        return torch.device("cpu") if device.type == "meta" else device


def _watch_moe(module: nn.Module, above: Sequence[nn.Module]) -> Watched | None:
    if not isinstance(module, MoE):
        return None
    experts = module.experts
    while hasattr(experts, "base_layer"):  # wrapped, by an adapter say
        experts = experts.base_layer
    return Watched(module, experts, module.top_k)


# Each tells whether it knows a module, given those above it, the nearest first; integrations add
# theirs.
WATCHERS: list[Callable[[nn.Module, Sequence[nn.Module]], Watched | None]] = [_watch_moe]


def find_watched(model: nn.Module) -> dict[str, Watched]:
    """The modules of a model that can be watched, by their names."""
    found = {}
    for name, module in model.named_modules():
        parts = name.split(".") if name else []
        above = [model.get_submodule(".".join(parts[:n])) for n in reversed(range(len(parts)))]
        for watcher in WATCHERS:
            watched = watcher(module, above)
            if watched is not None:
                found[name or "moe"] = watched
    return found


def _add_entropy(
    totals: Tensor, router_probs: Callable[[object], Tensor], router: nn.Module, _, output: object
) -> None:
    """A router's forward hook: adds to totals [2] the entropies of its tokens, each as a share of
    log E, and their number."""
    if not router.training:
        return
    probs = router_probs(output)
    entropy = ops._router_entropy(probs)
    tokens = probs.new_full((), probs.shape[0])
    share = entropy * tokens / math.log(max(probs.shape[1], 2))
    ops._add_once(totals, torch.stack([share, tokens]).to(totals))


class Totals:
    """What watched layers add up until it is taken: float64, on each layer's device."""

    def __init__(self, layers: dict[str, Watched]) -> None:
        self._layers = layers
        self._routers = {name: x for name, x in layers.items() if x.router is not None}

        def zeros(size: int, layer: Watched) -> Tensor:
            return torch.zeros(size, dtype=torch.float64, device=layer.device)

        self._of_layers = [
            zeros(x.experts.down_proj.shape[0] + len(MONITORED), x) for x in layers.values()
        ]
        self._of_routers = [zeros(2, x) for x in self._routers.values()]
        self._hooks = []

    @property
    def devices(self) -> set[torch.device]:
        return {totals.device for totals in self._of_layers}

    def start(self) -> None:
        """From now on the layers add."""
        for layer, totals in zip(self._layers.values(), self._of_layers, strict=True):
            layer.module._monitor_totals = totals
        for layer, totals in zip(self._routers.values(), self._of_routers, strict=True):
            hook = partial(_add_entropy, totals, layer.router_probs)
            self._hooks.append(layer.router.register_forward_hook(hook))

    def stop(self) -> None:
        """The layers add no more, and nothing is left on them."""
        for hook in self._hooks:
            hook.remove()
        for layer in self._layers.values():
            if isinstance(layer.module, MoE):
                layer.module._monitor_totals = None
            else:
                del layer.module._monitor_totals

    def take(self, group: "dist.ProcessGroup | None") -> Tensor:
        """All totals, one behind the other, added up over the ranks of a group. They begin again at
        zero."""
        # Layers may be on several devices; what a process group can add up is on an accelerator.
        parts = self._of_layers + self._of_routers
        devices = [part.device for part in parts]
        device = next((device for device in devices if device.type != "cpu"), devices[0])
        totals = torch.cat([part.to(device) for part in parts])
        for part in parts:
            part.zero_()
        if group is not None:
            dist.all_reduce(totals, group=group)
        return totals

    def read(self, totals: Tensor) -> Iterator[tuple[str, list[int], dict[str, float]]]:
        """Of what `take` gave, on the host: each layer's name, counts [E] and scalars of MONITORED;
        among these the entropy as the tokens' mean share of log E, NaN if it is unknown."""
        sizes = [part.numel() for part in self._of_layers + self._of_routers]
        parts = [part.tolist() for part in totals.split(sizes)]
        of_routers = dict(zip(self._routers, parts[len(self._layers) :], strict=True))
        for name, values in zip(self._layers, parts, strict=False):
            counts = [int(count) for count in values[: -len(MONITORED)]]
            scalars = dict(zip(MONITORED, values[-len(MONITORED) :], strict=True))
            if name in of_routers:
                entropies, tokens = of_routers[name]
                scalars["entropy"] = entropies / tokens if tokens else math.nan
            else:
                scalars["entropy"] /= max(scalars["tokens"], 1.0)
                if len(counts) > 1:
                    scalars["entropy"] /= math.log(len(counts))
            yield name, counts, scalars
