"""The machine's ceilings, measured by ceilings.cpp: built with the C++ compiler on first use."""

import ctypes
import functools
import os
import subprocess
import tempfile
from pathlib import Path

import torch


@functools.cache
def _probe() -> ctypes.CDLL:
    source = Path(__file__).with_name("ceilings.cpp")
    library = Path(tempfile.mkdtemp()) / "ceilings.so"
    compiler = os.environ.get("CXX", "c++")
    command = [compiler, "-O3", "-fopenmp", "-shared", "-fPIC", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    probe = ctypes.CDLL(str(library))
    probe.moe_flops.restype = ctypes.c_double
    probe.moe_flops.argtypes = [ctypes.c_int, ctypes.c_int]
    probe.moe_read.restype = ctypes.c_double
    probe.moe_read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    return probe


def flops_per_second(dtype: torch.dtype) -> float:
    """Multiply-adds count as two. fp16 and fp32 share fp32's units."""
    return _probe().moe_flops(dtype == torch.bfloat16, torch.get_num_threads())


@functools.cache
def _far_memory() -> torch.Tensor:
    return torch.ones(2**29, dtype=torch.uint8)  # beyond every cache


def read_bytes_per_second() -> float:
    memory = _far_memory()
    return _probe().moe_read(memory.data_ptr(), memory.numel(), torch.get_num_threads())
