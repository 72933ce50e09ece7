"""Packed weights: experts for evaluation, in the order in which the CPU's products read them."""

from collections import Counter

from torch import nn

from moe_ext.experts import _Experts


def pack_(module: nn.Module) -> nn.Module:
    """Packs the weights of all experts in a module, in place, for evaluation on the CPU.

    A product of many rows otherwise packs an expert's weights every time, which costs as much as 4
    to 7 rows of it. The packed form replaces gate_up_proj (up_proj) and down_proj of every
    `GroupedExperts` and shared expert, the experts of `MoE` among them; biases stay. It takes as
    much memory, but for I and H being rounded up to whole blocks: I of gated projections to a
    multiple of 32, other columns to one of 64, and of bfloat16 a row's terms to an even number.
    Weights are packed one at a time, so no more memory than twice the largest is added meanwhile.

    Results are those of the weights as they were: the same bits where a product packs them anyway,
    which is where an expert has more than 32 rows, within rounding elsewhere. With packed weights a
    token's bits depend on its own row and its experts alone, not on the tokens beside it. The
    packed form is the same for every instruction set.

    While packed: forward raises in training mode and, in grad mode, where an input requires grad.
    `state_dict` gives the plain weights, unpacked for it. `load_state_dict`, and `.to()` another
    dtype or device, raise. Copies, pickles and `torch.compile` are as ever. Packed modules are left
    as they are.

    Args:
        module: any module with experts of this package in it.

    Returns:
        module.

    Raises:
        ValueError: module holds no such experts.
        RuntimeError: a weight is not on the CPU, is shared by two modules, or is not a plain
            parameter (sharded, or computed by torch.nn.utils.parametrize).
    """
    found = _find(module, "pack_")
    owners = Counter(id(p) for child in module.modules() for p in child._parameters.values())
    for name, experts in found:
        if not experts.is_packed:
            experts._check_packable(name, owners)
    for _, experts in found:
        if not experts.is_packed:
            experts._pack()
    return module


def unpack_(module: nn.Module) -> nn.Module:
    """Takes `pack_` back, bit by bit: the same parameters, contiguous. Others are left as they are.

    Args:
        module: any module with experts of this package in it.

    Returns:
        module.

    Raises:
        ValueError: module holds no such experts.
    """
    for _, experts in _find(module, "unpack_"):
        if experts.is_packed:
            experts._unpack()
    return module


def _find(module: nn.Module, who: str) -> list[tuple[str, _Experts]]:
    found = [(name, child) for name, child in module.named_modules() if isinstance(child, _Experts)]
    if not found:
        got = type(module).__name__
        raise ValueError(f"{who}: module must hold experts (moe_ext.GroupedExperts), got {got}")
    return found
