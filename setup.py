"""Builds moe_ext._C against the torch that is installed.

With `pip install .` the build environment holds the same torch as the target environment (see
build_backend.py); with `--no-build-isolation` it is the target environment.

Environment: MOE_EXT_CUDA=0 or 1 overrides whether the CUDA operators are built (default: if torch
has CUDA and a CUDA toolkit is found); MOE_EXT_DEBUG=1 keeps debug information (80 MB more);
MAX_JOBS and TORCH_CUDA_ARCH_LIST are torch's own.
"""

import os
import re
import shutil
import subprocess
from glob import glob

import build_backend  # isort: skip  first, since it says so if setuptools is missing or too old
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


def wants_cuda(torch_cuda: str | None) -> bool:
    """Whether CUDA operators are to be built, given torch's CUDA; sets CUDA_HOME if so."""
    home = toolkit_home()
    has_cuda = torch_cuda is not None and home is not None
    wanted = os.environ.get("MOE_EXT_CUDA", str(int(has_cuda))) == "1"
    if wanted and not has_cuda:
        raise SystemExit(
            f"moe_ext: MOE_EXT_CUDA=1 needs a torch with CUDA (this one has {torch_cuda}) "
            f"and a CUDA toolkit (found: {home})"
        )
    if wanted:
        os.environ["CUDA_HOME"] = home
    return wanted


def extension_options() -> dict[str, object]:
    """The arguments of setup() for moe_ext._C, and the torch that it loads with."""
    build_backend.check_tools()
    requirement = build_backend.require_torch()
    import torch

    with_cuda = wants_cuda(torch.version.cuda)
    # It reads CUDA_HOME when it is imported.
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    sources = sorted(glob("csrc/**/*.cpp", recursive=True))
    # Python's own flags ask for debug information.
    debug = "-g" if os.environ.get("MOE_EXT_DEBUG") == "1" else "-g0"
    compile_args = ["-O3", debug, "-fopenmp", "-fvisibility=hidden", "-Wall"]
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
    headers = glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.cuh", recursive=True)
    return {
        "install_requires": [requirement],
        "ext_modules": [
            extension(
                name="moe_ext._C",
                sources=sources,
                depends=sorted(headers),
                include_dirs=[os.path.abspath("csrc")],
                extra_compile_args=compile_args,
                extra_link_args=["-fopenmp"],
            )
        ],
        "cmdclass": {"build_ext": BuildExtension},
    }


if build_backend.making_sdist:
    setup(install_requires=[build_backend.SUPPORTED_TORCH])
else:
    setup(**extension_options())
