"""Buffers that a forward writes in place."""

import torch
from torch import Tensor, nn


def writable(module: nn.Module, name: str, like: Tensor) -> Tensor:
    """The module's attribute `name`, a tensor that may be written now, on like's device.

    It is made anew where it is still on the meta device (a checkpoint was loaded with assign=True,
    and this is in none), with zeros, or where it comes from inference mode, outside of which
    nobody may write to it.
    """
    tensor = module._buffers.get(name)  # a tenth of what a module's getattr takes
    if tensor is None:
        tensor = getattr(module, name)
    if torch.compiler.is_compiling():
        return tensor
    if tensor.is_meta and not like.is_meta:
        tensor = torch.zeros_like(tensor, device=like.device)
    elif tensor.is_inference() and not torch.is_inference_mode_enabled():
        tensor = tensor.clone()
    else:
        return tensor
    setattr(module, name, tensor)
    return tensor
