"""How to time a call and count its memory, on a CPU or a GPU."""

import gc
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import moe_ext


class Device:
    def __init__(self, name: str = "cpu"):
        self.name = name
        self.is_cuda = name == "cuda"
        self._scratch = torch.zeros(2**26 if self.is_cuda else 1, device=name)  # 256 MiB

    def seconds(self, call: Callable) -> float:
        """Of one call; its result is freed after that. A GPU's by events, with nothing of it in
        the L2 cache."""
        if not self.is_cuda:
            start = time.perf_counter()
            _alive = call()
            return time.perf_counter() - start
        self._scratch.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        _alive = call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def peak_bytes(self, call: Callable) -> int:
        """What a call has at most beyond what is there before it, its result included. The peak
        of a CPU is the process's (Linux): exact only in a process that has done little else."""
        if not self.is_cuda:
            before = _status("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
            _alive = call()
            return _status("VmHWM") - before
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _alive = call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def kept_bytes(self, forward: Callable) -> int:
        """What a forward keeps for backward, its output aside; 0 for a CPU, which cannot tell."""
        if not self.is_cuda:
            return 0
        before = torch.cuda.memory_allocated()
        out = forward()
        return torch.cuda.memory_allocated() - before - out.nbytes

    def release(self) -> None:
        """Gives back the memory of what is gone."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()


def separate_peaks(num_bytes: int) -> None:
    """Lets the process need so much memory once: what contenders that take turns need together.

    Our cache keeps no freed memory that would raise the process's peak. Beside a peer that needs as
    much memory that is nothing, as would never happen in a process that has only one of them.
    """
    ballast = torch.ones(num_bytes // 4)
    rows, row_map = torch.ones(1024, 512), torch.arange(1024, dtype=torch.int32).view(-1, 1)
    for _ in range(3):  # the cache looks at the process every few milliseconds
        moe_ext.unpermute(rows, row_map)
        time.sleep(0.005)
    del ballast


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def in_own_process(script: Path, *arguments) -> float:
    """The number that a script prints."""
    command = [sys.executable, str(script), *map(str, arguments)]
    result = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return float(result.stdout)
