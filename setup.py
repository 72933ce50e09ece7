"""Builds moe_ext._C against the torch that is installed.

With `pip install .` the build environment holds the same torch as the target environment (see
build_backend.py); with `--no-build-isolation` it is the target environment.

Environment: MOE_EXT_CUDA=0 or 1 overrides whether the CUDA operators are built (default: if torch
has CUDA and a CUDA toolkit is found); MAX_JOBS and TORCH_CUDA_ARCH_LIST are torch's own.
"""

import os
import re
import shutil
import subprocess
from glob import glob

import torch
from setuptools import setup


def toolkit_home() -> str | None:
    """The CUDA toolkit's own folder, as nvcc names it: torch takes the one above nvcc's, where a
    wrapper may lie with no libraries beside it. None without a toolkit."""
    home = os.environ.get("CUDA_HOME")
    nvcc = os.path.join(home, "bin", "nvcc") if home else shutil.which("nvcc")
    if not nvcc or not os.path.exists(nvcc):
        return None
    steps = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", steps.stdout + steps.stderr, re.MULTILINE)
    return os.path.realpath(top[1].strip()) if top else home


def wants_cuda() -> bool:
    """Whether CUDA operators are to be built; sets CUDA_HOME if so."""
    home = toolkit_home()
    has_cuda = torch.version.cuda is not None and home is not None
    wanted = os.environ.get("MOE_EXT_CUDA", str(int(has_cuda))) == "1"
    if wanted and not has_cuda:
        raise SystemExit(
            "moe_ext: MOE_EXT_CUDA=1 needs a torch with CUDA (this one has "
            f"{torch.version.cuda}) and a CUDA toolkit (found: {home})"
        )
    if wanted:
        os.environ["CUDA_HOME"] = home
    return wanted


with_cuda = wants_cuda()
# It reads CUDA_HOME when it is imported.
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402

sources = sorted(glob("csrc/**/*.cpp", recursive=True))
compile_args = ["-O3", "-fopenmp", "-fvisibility=hidden", "-Wall"]
if with_cuda:
    # Without a GPU at hand torch cannot guess the architectures.
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0+PTX;9.0a")
    extension = CUDAExtension
    sources += sorted(glob("csrc/**/*.cu", recursive=True))
    nvcc_args = ["-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fvisibility=hidden"]
    compile_args = {"cxx": [*compile_args, "-DMOE_EXT_WITH_CUDA"], "nvcc": nvcc_args}
else:
    extension = CppExtension
    sources = [source for source in sources if not source.startswith("csrc/cuda/")]

setup(
    ext_modules=[
        extension(
            name="moe_ext._C",
            sources=sources,
            depends=sorted(
                glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.cuh", recursive=True)
            ),
            include_dirs=[os.path.abspath("csrc")],
            extra_compile_args=compile_args,
            extra_link_args=["-fopenmp"],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
