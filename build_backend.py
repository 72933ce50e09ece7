"""The build backend of `pip install .`: setuptools, plus the torch of the target environment.

An extension only loads with the torch it was compiled against, while pip builds in an empty
environment of its own. So the torch of the environment that pip runs for is asked for there, in
its version; where there is none, the supported range. What comes may be a torch with CUDA where the
target's has none: then no CUDA operators are built.
"""

import os
import sysconfig
from importlib.metadata import distributions

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401
    build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

SUPPORTED_TORCH = "torch>=2.11,<2.14"


def _target_torch() -> str | None:
    """The version of the torch that the result is for, its local label included."""
    # Under build isolation sys.path is pip's, but sysconfig still names the target's own folders.
    paths = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    for distribution in distributions(name="torch", path=paths):
        return distribution.version
    return None


def _torch_requirement() -> str:
    version = _target_torch()
    # Without the local label: no registry but torch's own has a "2.13.0+cpu".
    return f"torch=={version.split('+')[0]}" if version else SUPPORTED_TORCH


def _match_target() -> None:
    if (_target_torch() or "").endswith("+cpu"):
        os.environ.setdefault("MOE_EXT_CUDA", "0")


def build_wheel(*arguments, **options) -> str:
    _match_target()
    return build_meta.build_wheel(*arguments, **options)


def build_editable(*arguments, **options) -> str:
    _match_target()
    return build_meta.build_editable(*arguments, **options)


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    # setuptools' own hook is left out: it runs setup.py, which needs torch already.
    return [_torch_requirement(), "ninja", "numpy"]


get_requires_for_build_editable = get_requires_for_build_wheel
get_requires_for_build_sdist = get_requires_for_build_wheel  # it runs setup.py too
