"""moe_ext: Mixture-of-Experts layers for PyTorch, on custom C++ operators.

The layer is `MoE`; the operators are functions of this module and of `torch.ops.moe_ext`.
Letters in the docstrings: T tokens, H hidden size, I intermediate size, E experts, K experts per
token, N = T K routed rows.
"""

import importlib.metadata
import importlib.util

import torch

from moe_ext._version import __version__

_REBUILD = (
    "Rebuild it against the torch that is installed: `pip install .` in the project's folder "
    "(or `pip install --no-build-isolation .`)."
)


def _built_for() -> str:
    """The torch that the installed package requires, which is the one it was built against."""
    try:
        required = importlib.metadata.requires("moe_ext") or []
    except importlib.metadata.PackageNotFoundError:
        required = []
    return next((name for name in required if name.startswith("torch")), "another torch")


try:
    from moe_ext import _C
except ImportError as error:
    if importlib.util.find_spec("moe_ext._C") is None:
        raise ImportError(
            f"moe_ext: {__path__[0]} has no compiled part for this Python. Either it is the source "
            "folder, which shadows the installed package (run from another folder, or install "
            f"with -e), or it was built for another Python. {_REBUILD}"
        ) from None
    raise ImportError(
        f"moe_ext: its compiled part cannot be loaded with torch {torch.__version__}; it was built "
        f"for {_built_for()} ({error}). {_REBUILD}"
    ) from None


def _check_torch(built: str, running: str) -> None:
    """Raises ImportError unless both torch versions have the same major.minor."""
    if built.split(".")[:2] != running.split(".")[:2]:
        raise ImportError(
            f"moe_ext: it was built for torch {built}, but torch {running} is running. {_REBUILD}"
        )


_check_torch(_C.build_info()["torch"], torch.__version__)

from moe_ext import _flops, reference  # noqa: E402, F401
from moe_ext.aux_loss import set_aux_loss_scale, total_aux_loss  # noqa: E402
from moe_ext.experts import GroupedExperts  # noqa: E402
from moe_ext.memory import empty_cache, memory_stats, set_memory_limit  # noqa: E402
from moe_ext.moe import MoE, MoEConfig  # noqa: E402
from moe_ext.ops import (  # noqa: E402
    expert_ffn,
    load_balancing_loss,
    moe_ffn,
    permute,
    router_z_loss,
    topk_router,
    unpermute,
)
from moe_ext.packing import pack_, unpack_  # noqa: E402
from moe_ext.routers import (  # noqa: E402
    ExpertChoiceRouter,
    GivenIdsRouter,
    HierarchicalRouter,
    NoisyTopKRouter,
    RouterOutput,
    TopKRouter,
    hash_ids,
)
from moe_ext.training import param_groups, update_expert_bias  # noqa: E402


def build_info() -> dict[str, object]:
    """What the compiled part was built with: `torch`, `compiler`, `cuda`, `openmp`."""
    return _C.build_info()


def cpu_isa() -> str:
    """The instruction set that the CPU operators run on: the best of generic, avx2, avx512 and
    avx512_bf16 that this machine and its operating system allow, or the one `set_cpu_isa` chose."""
    return _C.cpu_isa()


def set_cpu_isa(name: str) -> None:
    """Makes the CPU operators run on an instruction set: generic, avx2, avx512 or avx512_bf16.
    For tests and measurements; it holds for the whole process, from the next call on. Results on
    different instruction sets agree within rounding, not in bits.

    Raises ValueError if the name is unknown or the machine has no such instructions.
    """
    if not isinstance(name, str) or not _C.set_cpu_isa(name):
        raise ValueError(
            "set_cpu_isa: name must be generic, avx2, avx512 or avx512_bf16, and this machine "
            f"must have it, got {name!r}"
        )


def is_batch_invariant() -> bool:
    """Whether `set_batch_invariant` switched the batch-invariant mode on."""
    return _C.is_batch_invariant()


def set_batch_invariant(enabled: bool) -> None:
    """Switches the batch-invariant mode of the CPU operators on or off; off at first.

    In this mode the bits of a token's output depend on its own row, its experts' weights and the
    instruction set, not on the other tokens or their number: a token has the same bits alone and
    among 200. It holds for `MoE` with a top-k router (and its shared expert), `moe_ffn`,
    `expert_ffn`, `topk_router` and the router's logits, and for the gradients of tokens and routing
    weights; the gradient of a weight is a sum over its tokens. It can't hold where the choice of
    experts looks at other tokens: capacity, token rounding, expert choice.

    Products of few rows take the order of summing of many, which costs time where an expert has few
    rows. The results agree with those of the other mode within rounding.

    The switch is one for the whole process and may be set from any thread. Every operator reads it
    when it begins, also in a compiled or exported model. CUDA operators take no notice of it.

    Raises TypeError if `enabled` is not a bool.
    """
    if not isinstance(enabled, bool):
        raise TypeError(
            f"set_batch_invariant: enabled must be a bool, got {type(enabled).__name__}"
        )
    _C.set_batch_invariant(enabled)


__all__ = [
    "ExpertChoiceRouter",
    "GivenIdsRouter",
    "GroupedExperts",
    "HierarchicalRouter",
    "MoE",
    "MoEConfig",
    "NoisyTopKRouter",
    "RouterOutput",
    "TopKRouter",
    "__version__",
    "build_info",
    "cpu_isa",
    "empty_cache",
    "expert_ffn",
    "hash_ids",
    "is_batch_invariant",
    "load_balancing_loss",
    "memory_stats",
    "moe_ffn",
    "pack_",
    "param_groups",
    "permute",
    "reference",
    "router_z_loss",
    "set_aux_loss_scale",
    "set_batch_invariant",
    "set_cpu_isa",
    "set_memory_limit",
    "topk_router",
    "total_aux_loss",
    "unpack_",
    "unpermute",
    "update_expert_bias",
]
