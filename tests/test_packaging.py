"""What installing relies on; the installations themselves are too slow for the suite."""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import moe_ext

ROOT = Path(__file__).resolve().parent.parent

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    tomllib = pytest.importorskip("tomli")


@pytest.fixture
def backend(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    import build_backend

    return build_backend


def test_the_build_asks_for_the_torch_of_the_target(backend, monkeypatch, tmp_path):
    version = torch.__version__.split("+")[0]
    assert backend.get_requires_for_build_wheel()[0] == f"torch=={version}"
    assert backend.get_requires_for_build_editable()[0] == f"torch=={version}"
    monkeypatch.setattr(backend.sysconfig, "get_path", lambda name: str(tmp_path))
    assert backend.get_requires_for_build_wheel()[0] == backend.SUPPORTED_TORCH
    metadata = tmp_path / "torch-2.12.1+cu130.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torch\nVersion: 2.12.1+cu130\n"
    )
    assert backend.get_requires_for_build_wheel()[0] == "torch==2.12.1"


@pytest.mark.parametrize("version,expected", [("2.13.0+cpu", "0"), ("2.12.1+cu130", None)])
@pytest.mark.parametrize("hook", ["build_wheel", "build_editable"])
def test_a_target_without_cuda_gets_none(backend, monkeypatch, version, expected, hook):
    seen = []
    monkeypatch.setenv("MOE_EXT_CUDA", "")  # so that what is set here is undone
    monkeypatch.delenv("MOE_EXT_CUDA")
    monkeypatch.setattr(backend, "_target_torch", lambda: version)
    monkeypatch.setattr(
        backend.build_meta, hook, lambda *_: seen.append(os.environ.get("MOE_EXT_CUDA"))
    )
    getattr(backend, hook)("folder")
    assert seen == [expected]
    monkeypatch.setenv("MOE_EXT_CUDA", "1")  # whoever says so, knows better
    getattr(backend, hook)("folder")
    assert seen[1] == "1"


def test_the_toolkit_is_where_nvcc_says(tmp_path):
    """Not above a wrapper of it."""
    wrapper = tmp_path / "wrapped" / "bin" / "nvcc"
    wrapper.parent.mkdir(parents=True)
    wrapper.write_text(f"#!/bin/sh\necho '#$ TOP={tmp_path}/real/bin/..' >&2\n")
    wrapper.chmod(0o755)
    (tmp_path / "real" / "bin").mkdir(parents=True)
    source = (ROOT / "setup.py").read_text().split("with_cuda = wants_cuda()")[0]
    script = source + "\nprint(toolkit_home())\n"
    environment = {**os.environ, "CUDA_HOME": str(tmp_path / "wrapped")}
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == str(tmp_path / "real")


def test_project_metadata():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dependencies"] == ["torch>=2.11"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", moe_ext.__version__)
    assert f"## {moe_ext.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_sdist_holds_every_source(tmp_path):
    subprocess.run(
        [
            sys.executable,
            "-c",
            f"import build_backend; build_backend.build_sdist({str(tmp_path)!r})",
        ],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (archive,) = tmp_path.glob("moe_ext-*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    wanted = [
        *ROOT.glob("csrc/**/*.*"),
        *ROOT.glob("moe_ext/**/*.py"),
        ROOT / "LICENSE",
        ROOT / "README.md",
        ROOT / "setup.py",
        ROOT / "build_backend.py",
    ]
    missing = [p for p in wanted if p.relative_to(ROOT).as_posix() not in names]
    assert not missing
    assert not [name for name in names if name.endswith(".so")]


def test_source_folder_without_the_extension_says_what_to_do(tmp_path):
    package = tmp_path / "moe_ext"
    package.mkdir()
    for path in (ROOT / "moe_ext").glob("*.py"):
        (package / path.name).write_text(path.read_text())
    # An editable installation is found before the working folder; this is about others.
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)]; "
        "import moe_ext"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "shadows the installed package" in result.stderr
    assert "pip install --no-build-isolation ." in result.stderr
