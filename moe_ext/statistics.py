"""What a layer tells of its forwards: to the user, and to `moe_ext.monitor`."""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_ext import ops


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
