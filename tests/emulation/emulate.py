"""Runs tests with the CUDA operators in place of the CPU's, on a machine without a GPU.

`make test-emulated`. csrc/cuda is compiled for the host, with include/ in place of CUDA's headers,
and registered for CPU tensors, so that the tests of the operators, of autograd and of the layers
run its code. What only a GPU can show is not tested: nvcc's code, races between blocks, streams,
speed.
"""

import os
import sys
import warnings
from glob import glob
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def load() -> None:
    """Builds and registers csrc/cuda."""
    build = ROOT / "build" / "emulated"
    build.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MAX_JOBS", str(os.cpu_count()))
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # ninja's
    cpp_extension.load(
        name="moe_ext_emulated",
        sources=[
            *sorted(glob(str(ROOT / "csrc/cuda/*.cpp"))),
            # Whose results are CPU tensors here.
            str(ROOT / "csrc/cpu/empty_result.cpp"),
            *sorted(glob(str(ROOT / "csrc/cpu/memory/*.cpp"))),
            *sorted(glob(str(HERE / "*.cpp"))),
        ],
        extra_include_paths=[str(HERE / "include"), str(ROOT / "csrc")],
        extra_cflags=[
            "-O2",
            "-Wno-unknown-pragmas",
            "-fvisibility=hidden",
        ],
        build_directory=str(build),
        is_python_module=False,
    )
    # An IndexError of the CPU's operator.
    torch.ops.moe_ext.permute(torch.zeros(1, 1), torch.tensor([[-2]]), 1)


if __name__ == "__main__":
    import moe_ext  # noqa: F401  the CPU's come first, to be overridden

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load()
    os.environ["MOE_EXT_EMULATED"] = "1"
    sys.exit(pytest.main(sys.argv[1:]))
