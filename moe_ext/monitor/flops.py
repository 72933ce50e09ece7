"""FLOPs of a model, and of a device."""

import math
import time

import torch
from torch import nn

from moe_ext.monitor.watch import find_watched


def active_flops_per_token(model: nn.Module) -> int:
    """FLOPs of training on one token: 6 for every weight that works on it (PaLM, arXiv 2204.02311,
    appendix B, without attention's products). Of E experts K work; embeddings are looked up."""
    top_k = {watched.experts: watched.top_k for watched in find_watched(model).values()}
    flops = 0.0
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            continue
        share = 1.0
        if module in top_k:
            share = top_k[module] / module.down_proj.shape[0]
        for parameter in module.parameters(recurse=False):
            if parameter.dim() >= 2:
                flops += 6 * share * parameter.numel()
    return round(flops)


def measure_ceiling(device: torch.device | str, dtype: torch.dtype) -> float:
    """The FLOP/s of torch.matmul on a device: the best of several large products."""
    device = torch.device(device)
    n, repeats = (8192, 10) if device.type == "cuda" else (1024, 5)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best = math.inf
    for _ in range(repeats):
        _synchronize(device)
        started = time.perf_counter()
        a @ b
        _synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
