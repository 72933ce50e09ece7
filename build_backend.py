"""The build backend of `pip install .`: setuptools, plus the torch of the target environment.

An extension only loads with the torch it was compiled against, while pip builds in an empty
environment of its own. So the torch of the environment that pip runs for is asked for there, in
its version; where there is none, the supported range. What comes may be a torch with CUDA where the
target's has none: then no CUDA operators are built. What was built requires the minor version of
torch that it was built against (setup.py), so that no other is installed beside it.

What a build lacks is said in one line, which SystemExit carries through pip.
"""

import os
import re
import shutil
import sys
import sysconfig
from importlib.util import find_spec

if sys.version_info < (3, 10):  # noqa: UP036  pip builds before it reads requires-python
    raise SystemExit(
        f"moe_ext: Python 3.10 or newer is needed, this is {sys.version.split()[0]} "
        f"({sys.executable}): run pip with a newer one"
    )

from importlib.metadata import distributions

SETUPTOOLS = "setuptools>=77"

try:
    from setuptools import __version__ as _setuptools_version
except ImportError:
    _setuptools_version = None
if not _setuptools_version or int(_setuptools_version.split(".")[0]) < int(SETUPTOOLS[-2:]):
    raise SystemExit(
        f"moe_ext: a build without isolation needs {SETUPTOOLS} in the environment, which has "
        f"{_setuptools_version or 'none'}: [uv] pip install '{SETUPTOOLS}' ninja numpy"
    )

from setuptools import build_meta  # noqa: E402
from setuptools.build_meta import (  # noqa: E402, F401
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

# The one place that says so: the first minor version, and the first that is too new.
OLDEST_TORCH, NEXT_TORCH = (2, 11), (2, 16)
SUPPORTED_TORCH = "torch>={}.{},<{}.{}".format(*OLDEST_TORCH, *NEXT_TORCH)

# setup.py reads it: an archive of the sources is made without torch and serves every supported one.
making_sdist = False


def _target_torch() -> str | None:
    """The version of the torch that the result is for, its local label included."""
    # Under build isolation sys.path is pip's, but sysconfig still names the target's own folders.
    paths = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    for distribution in distributions(name="torch", path=paths):
        return distribution.version
    return None


def check_torch(version: str) -> str:
    """The requirement of what is built against this version of torch: its minor version alone.

    Raises SystemExit if it is not supported.
    """
    public = version.split("+")[0]
    major, minor = map(int, public.split(".")[:2])
    if not OLDEST_TORCH <= (major, minor) < NEXT_TORCH:
        raise SystemExit(
            f"moe_ext: {SUPPORTED_TORCH} is needed, but torch {version} is installed: "
            f"[uv] pip install '{SUPPORTED_TORCH}'"
        )
    # A pre-release, such as the 2.13.0a0 of a build from source, comes before 2.13.
    oldest = public if re.search("a|b|rc|dev", public) else f"{major}.{minor}"
    return f"torch>={oldest},<{major}.{minor + 1}"


def check_compiler() -> None:
    """Raises SystemExit if there is no C++ compiler or there are no headers of Python."""
    compiler = os.environ.get("CXX", "c++")
    if not shutil.which((compiler.split() or [""])[0]):
        raise SystemExit(
            f"moe_ext: there is no C++ compiler ({compiler}): install one "
            "(Debian: apt install g++), or name yours in the environment variable CXX"
        )
    headers = sysconfig.get_path("include")
    if not os.path.exists(os.path.join(headers, "Python.h")):
        raise SystemExit(
            f"moe_ext: there are no headers of Python (Python.h in {headers}): install them "
            "(Debian: apt install python3-dev)"
        )


def check_tools() -> None:
    """Raises SystemExit if something but torch is missing that setup.py compiles with."""
    check_compiler()
    # A venv that is not activated has its ninja there.
    os.environ["PATH"] = os.pathsep.join(
        [*os.environ.get("PATH", os.defpath).split(os.pathsep), sysconfig.get_path("scripts")]
    )
    if not shutil.which("ninja"):
        raise SystemExit("moe_ext: a build without isolation needs ninja: [uv] pip install ninja")


def require_torch() -> str:
    """check_torch of the torch that is compiled against.

    Raises SystemExit if there is none or it is not supported.
    """
    if find_spec("torch") is None:
        raise SystemExit(
            "moe_ext: a build without isolation needs torch in the environment: "
            f"[uv] pip install '{SUPPORTED_TORCH}'"
        )
    import torch

    return check_torch(torch.__version__)


def _torch_requirement() -> str:
    version = _target_torch()
    if version is None:
        return SUPPORTED_TORCH
    check_torch(version)
    # Without the local label: no registry but torch's own has a "2.13.0+cpu".
    return f"torch=={version.split('+')[0]}"


def _match_target() -> None:
    if (_target_torch() or "").endswith("+cpu"):
        os.environ.setdefault("MOE_EXT_CUDA", "0")


def build_wheel(*arguments, **options) -> str:
    _match_target()
    return build_meta.build_wheel(*arguments, **options)


def build_editable(*arguments, **options) -> str:
    _match_target()
    return build_meta.build_editable(*arguments, **options)


def build_sdist(*arguments, **options) -> str:
    global making_sdist
    making_sdist = True
    return build_meta.build_sdist(*arguments, **options)


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    check_compiler()  # before a torch of several GB is fetched for it
    # setuptools' own hook is left out: it runs setup.py, which needs torch already.
    return [_torch_requirement(), "ninja", "numpy"]


get_requires_for_build_editable = get_requires_for_build_wheel


def get_requires_for_build_sdist(config_settings=None) -> list[str]:
    return []
