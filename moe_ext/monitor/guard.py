"""Warns when experts collapse."""

from collections.abc import Callable
from dataclasses import dataclass

from moe_ext._messages import warn


@dataclass
class CollapseGuard:
    """Warns, once for each layer and reason, when a layer's experts collapse.

    Args:
        max_load: the most that max/mean load may be.
        min_load: an expert below this share of the mean load starves.
        min_entropy: the least entropy of the router's probabilities, as a share of log E.
        patience: so many records in a row must be beyond a bound.
        warn: called with the text; default: a UserWarning at the user's line.
    """

    max_load: float = 4.0
    min_load: float = 0.05
    min_entropy: float = 0.1
    patience: int = 10
    warn: Callable[[str], None] = warn

    def __post_init__(self) -> None:
        for name, holds, must_be in (
            ("max_load", self.max_load >= 1, ">= 1"),
            ("min_load", 0 <= self.min_load <= 1, "in [0, 1]"),
            ("min_entropy", 0 <= self.min_entropy <= 1, "in [0, 1]"),
            ("patience", self.patience >= 1, ">= 1"),
        ):
            if not holds:
                value = getattr(self, name)
                raise ValueError(f"CollapseGuard: {name} must be {must_be}, got {value!r}")
        self._in_a_row: dict[tuple[str, str], int] = {}
        self._warned: set[tuple[str, str]] = set()

    def check(self, record: dict) -> None:
        """Looks at a record of the monitor."""
        for layer in record["layers"]:
            counts = layer["tokens_per_expert"]
            mean = sum(counts) / len(counts)
            if mean == 0:
                continue
            starving = [e for e, count in enumerate(counts) if count < self.min_load * mean]
            shown = ", ".join(map(str, starving[:8])) + (", ..." if len(starving) > 8 else "")
            reasons = {
                "starving": (
                    bool(starving),
                    f"{len(starving)} of {len(counts)} experts get less than {self.min_load:.0%} "
                    f"of the mean load (experts {shown}). They learn nothing. Try a larger "
                    "aux_loss_coef, balance='bias', a z-loss (z_loss_coef=1e-3), jitter, or "
                    "NoisyTopKRouter",
                ),
                "load": (
                    layer["max_over_mean"] > self.max_load,
                    f"the busiest expert has {layer['max_over_mean']:.1f} times the mean load "
                    f"(bound {self.max_load:g}). Try a larger aux_loss_coef, balance='bias' with "
                    "a larger bias_update_rate, ExpertChoiceRouter, or a capacity_factor to bound "
                    "the cost",
                ),
                "entropy": (
                    layer["entropy"] is not None and layer["entropy"] < self.min_entropy,
                    "the entropy of the router's probabilities fell to "
                    f"{layer['entropy'] or 0:.2f} of "
                    f"log E (bound {self.min_entropy:g}): it no longer explores. Try a z-loss "
                    "(z_loss_coef=1e-3), a higher temperature, a lower learning rate for the "
                    "router, or weight decay on it",
                ),
            }
            for reason, (is_beyond, text) in reasons.items():
                key = (layer["name"], reason)
                self._in_a_row[key] = self._in_a_row.get(key, 0) + 1 if is_beyond else 0
                if self._in_a_row[key] >= self.patience and key not in self._warned:
                    self._warned.add(key)
                    self.warn(f"moe_ext.monitor: step {record['step']}, {layer['name']}: {text}.")
