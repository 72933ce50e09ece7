"""Routers: modules that map tokens [T, H] to a `RouterOutput`. No mathematics of their own."""

from moe_ext.routers.expert_choice import ExpertChoiceRouter
from moe_ext.routers.given_ids import GivenIdsRouter, hash_ids
from moe_ext.routers.hierarchical import HierarchicalRouter
from moe_ext.routers.noisy import NoisyTopKRouter
from moe_ext.routers.output import RouterOutput
from moe_ext.routers.topk import TopKRouter

__all__ = [
    "ExpertChoiceRouter",
    "GivenIdsRouter",
    "HierarchicalRouter",
    "NoisyTopKRouter",
    "RouterOutput",
    "TopKRouter",
    "hash_ids",
]
