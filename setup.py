"""Builds moe_ext._C against the torch that is installed.

With `pip install .` the build environment holds the same torch as the target environment (see
build_backend.py); with `--no-build-isolation` it is the target environment.

Environment: MOE_EXT_CUDA=0 or 1 overrides whether the CUDA operators are built (default: if torch
has CUDA and a CUDA toolkit is found); MAX_JOBS and TORCH_CUDA_ARCH_LIST are torch's own.
"""

import os
from glob import glob

from setuptools import setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

cuda_sources = sorted(glob("csrc/**/*.cu", recursive=True))
with_cuda = (
    bool(cuda_sources) and os.environ.get("MOE_EXT_CUDA", str(int(CUDA_HOME is not None))) == "1"
)

compile_args = ["-O3", "-fopenmp", "-fvisibility=hidden", "-Wall"]
if with_cuda:
    # Without a GPU at hand torch cannot guess the architectures.
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0+PTX;9.0a")
    extension, extra_sources = CUDAExtension, cuda_sources
    compile_args = {"cxx": [*compile_args, "-DMOE_EXT_WITH_CUDA"], "nvcc": ["-O3"]}
else:
    extension, extra_sources = CppExtension, []

setup(
    ext_modules=[
        extension(
            name="moe_ext._C",
            sources=sorted(glob("csrc/**/*.cpp", recursive=True)) + extra_sources,
            depends=sorted(glob("csrc/**/*.h", recursive=True)),
            include_dirs=[os.path.abspath("csrc")],
            extra_compile_args=compile_args,
            extra_link_args=["-fopenmp"],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
