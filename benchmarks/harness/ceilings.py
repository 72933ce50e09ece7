"""What the machine can do at most: operations per second, and bytes per second of its memory.

A CPU's by ceilings.cpp, built with the C++ compiler on first use: multiply-adds in registers, and
reading what no cache holds. A GPU's by torch: the product of big matrices, and a copy.
"""

import ctypes
import functools
import os
import subprocess
import tempfile
from pathlib import Path

import torch

from moe_ext.monitor import measure_ceiling

from .device import Device


class Ceilings:
    """Of a device. What they need is made on first use, and goes with the object."""

    def __init__(self, device: Device):
        self.device = device

    def flops_per_second(self, dtype: torch.dtype) -> float:
        """Multiply-adds count as two. On a CPU fp16 and fp32 share fp32's units."""
        if self.device.is_cuda:
            return measure_ceiling(self.device.name, dtype)
        return _probe().moe_flops(dtype == torch.bfloat16, torch.get_num_threads())

    def bytes_per_second(self) -> float:
        """A CPU's bytes are read, a GPU's read and written."""
        if self.device.is_cuda:
            source, target = self._memory.chunk(2)
            return self._memory.nbytes / self.device.seconds(lambda: target.copy_(source))
        threads = torch.get_num_threads()
        return _probe().moe_read(self._memory.data_ptr(), self._memory.nbytes, threads)

    @functools.cached_property
    def _memory(self) -> torch.Tensor:
        """Beyond every cache."""
        size = 2**31 if self.device.is_cuda else 2**29
        return torch.ones(size, dtype=torch.uint8, device=self.device.name)


@functools.cache
def _probe() -> ctypes.CDLL:
    source = Path(__file__).with_name("ceilings.cpp")
    compiler = os.environ.get("CXX", "c++")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "ceilings.so"
        command = [compiler, "-O3", "-fopenmp", "-shared", "-fPIC", str(source), "-o", str(library)]
        subprocess.run(command, check=True)
        probe = ctypes.CDLL(str(library))
    probe.moe_flops.restype = ctypes.c_double
    probe.moe_flops.argtypes = [ctypes.c_int, ctypes.c_int]
    probe.moe_read.restype = ctypes.c_double
    probe.moe_read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    return probe
