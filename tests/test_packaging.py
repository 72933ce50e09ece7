"""What installing relies on; the installations themselves are too slow for the suite."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

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


def run(code: str, folder=ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Python code in a process of its own, its folder first on the path."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def run_setup(*arguments: str, before="", **environment: str) -> subprocess.CompletedProcess:
    """setup.py as pip's hooks run it, after some code."""
    code = (
        f"import runpy, sys; {before}\nsys.argv = {['setup.py', *arguments]}; "
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    return run(code, **environment)


def assert_one_line(result: subprocess.CompletedProcess, *parts: str):
    """It ended with one line of ours and no traceback."""
    assert result.returncode == 1
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("moe_ext: "), result.stderr
    for part in parts:
        assert part in lines[0]


def fake_package(folder: Path, name: str, source: str) -> str:
    """A package that comes before the real one if the path that is returned is in PYTHONPATH."""
    package = folder / name
    package.mkdir()
    (package / "__init__.py").write_text(source)
    return str(folder)


def fake_torch(folder: Path, version: str) -> str:
    """An installed torch, for what only reads its version."""
    metadata = folder / f"torch-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    return fake_package(folder, "torch", f"__version__ = {version!r}\n")


def requires_torch(metadata: str) -> Requirement:
    (requirement,) = re.findall(r"^Requires-Dist: (torch\b[^;\n]*)$", metadata, re.MULTILINE)
    return Requirement(requirement)


def test_the_build_asks_for_the_torch_of_the_target(backend, monkeypatch, tmp_path):
    version = torch.__version__.split("+")[0]
    assert backend.get_requires_for_build_wheel()[0] == f"torch=={version}"
    assert backend.get_requires_for_build_editable()[0] == f"torch=={version}"
    monkeypatch.setattr(backend, "check_compiler", lambda: None)
    monkeypatch.setattr(backend.sysconfig, "get_path", lambda name: str(tmp_path))
    assert backend.get_requires_for_build_wheel()[0] == backend.SUPPORTED_TORCH
    fake_torch(tmp_path, "2.12.1+cu130")
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


@pytest.mark.parametrize("version", ["2.10.2", "1.13.1+cu117", "2.16.0+cpu", "2.17.0.dev20270201"])
def test_an_unsupported_torch_of_the_target_is_named(backend, monkeypatch, tmp_path, version):
    fake_torch(tmp_path, version)
    monkeypatch.setattr(backend, "check_compiler", lambda: None)
    monkeypatch.setattr(backend.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(SystemExit, match=f"moe_ext: .*but torch {re.escape(version)} is installed"):
        backend.get_requires_for_build_wheel()


@pytest.mark.parametrize(
    "version,loads,others",
    [
        ("2.13.0+cpu", ["2.13.0", "2.13.1+cu130"], ["2.12.1", "2.14.0", "2.14.0.dev1", "2.15.0"]),
        ("2.11.2", ["2.11.0"], ["2.10.2", "2.12.0"]),
        ("2.15.0+cu132", ["2.15.0", "2.15.1"], ["2.14.1", "2.16.0", "2.16.0.dev1"]),
        # As in images of vendors: pip must not take a release in its place.
        ("2.13.0a0+1f2e3d", ["2.13.0a0+1f2e3d"], ["2.12.1", "2.14.0"]),
    ],
)
def test_what_is_built_requires_the_torch_it_loads_with(backend, version, loads, others):
    specifier = Requirement(backend.check_torch(version)).specifier
    assert all(specifier.contains(one, prereleases=True) for one in loads)
    assert not any(specifier.contains(one, prereleases=True) for one in others)


def test_a_wheel_says_which_torch_it_was_built_for(tmp_path):
    code = (
        f"import build_backend; build_backend.prepare_metadata_for_build_wheel({str(tmp_path)!r})"
    )
    result = run(code)
    assert result.returncode == 0, result.stderr
    (metadata,) = tmp_path.glob("*.dist-info/METADATA")
    major, minor = map(int, torch.__version__.split(".")[:2])
    expected = Requirement(f"torch>={major}.{minor},<{major}.{minor + 1}")
    assert requires_torch(metadata.read_text()).specifier == expected.specifier


def test_one_range_of_torch(backend):
    """Nothing in the project says another: the rest follows from the backend's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "dependencies" not in project["project"]
    assert "dependencies" in project["project"]["dynamic"]
    assert project["build-system"]["requires"] == [backend.SETUPTOOLS]
    assert backend.SETUPTOOLS in (ROOT / "Makefile").read_text()
    supported = Requirement(backend.SUPPORTED_TORCH).specifier
    (pinned,) = re.findall("^torch==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    (matrix,) = re.findall(r"^MATRIX \?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    tested = [tuple(map(int, version.split(".")[:2])) for version in matrix.split()]
    assert min(tested) == backend.OLDEST_TORCH
    assert all(version in supported for version in matrix.split())
    assert f"{max(tested)[0]}.{max(tested)[1] + 1}.0" not in supported
    assert pinned in supported
    backend.check_torch(pinned)
    for version in ["2.10.2", "2.16.0"]:
        assert version not in supported
        with pytest.raises(SystemExit):
            backend.check_torch(version)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_changes_to_the_torch_that_is_asked_for(tmp_path):
    """What was built for another is not tested in its place."""
    (tmp_path / "constraints.txt").write_text("torch==2.13.0\n")
    for stamp in [".torch", ".built"]:
        (tmp_path / stamp).touch()
    for version, is_set_up in [("2.13.0", False), ("2.14.1", True)]:
        result = subprocess.run(
            ["make", "--dry-run", "setup", f"VENV={tmp_path}", f"TORCH=torch=={version}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        assert (f"setting up {tmp_path}: torch=={version}" in result.stdout) == is_set_up


def test_an_old_python_is_named():
    result = run("import sys; sys.version_info = (3, 9, 18); import build_backend")
    assert_one_line(result, "Python 3.10 or newer is needed")


@pytest.mark.parametrize(
    "source,found",
    [("__version__ = '65.5.0'", "65.5.0"), ("raise ImportError('no setuptools')", "none")],
)
def test_an_old_or_missing_setuptools_is_named(tmp_path, source, found):
    folder = fake_package(tmp_path, "setuptools", source)
    environment = {"PYTHONPATH": folder, "SETUPTOOLS_USE_DISTUTILS": "stdlib"}
    remedy = "pip install 'setuptools>=77' ninja numpy"
    assert_one_line(run("import build_backend", **environment), f"which has {found}", remedy)
    assert_one_line(run_setup("--name", **environment), f"which has {found}", remedy)


def test_a_missing_torch_is_named():
    result = run_setup("--name", before="sys.modules['torch'] = None")
    assert_one_line(result, "without isolation needs torch", "pip install 'torch>=")


def test_an_unsupported_torch_of_the_build_is_named(tmp_path):
    result = run_setup("--name", PYTHONPATH=fake_torch(tmp_path, "2.16.0+cpu"))
    assert_one_line(result, "but torch 2.16.0+cpu is installed", "pip install 'torch>=")


def test_a_missing_compiler_is_named(backend, monkeypatch, tmp_path):
    assert_one_line(
        run_setup("--name", CXX="no-such-compiler -O2"), "(no-such-compiler -O2)", "CXX"
    )
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    # Under isolation before torch is fetched.
    with pytest.raises(SystemExit, match=r"moe_ext: there is no C\+\+ compiler \(c\+\+\)"):
        backend.get_requires_for_build_wheel()


def test_missing_headers_of_python_are_named(backend, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", sys.executable)  # a program that is there
    monkeypatch.setattr(backend.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(SystemExit, match="moe_ext: there are no headers of Python .*python3-dev"):
        backend.check_compiler()


def test_ninja_is_found_beside_python_or_asked_for(backend, monkeypatch, tmp_path):
    """Also in a venv that is not activated."""
    paths = {"scripts": str(tmp_path / "scripts")}
    monkeypatch.setattr(backend, "check_compiler", lambda: None)
    monkeypatch.setattr(backend.sysconfig, "get_path", paths.get)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="moe_ext: .*needs ninja: .* pip install ninja"):
        backend.check_tools()
    ninja = tmp_path / "scripts" / "ninja"
    ninja.parent.mkdir()
    ninja.touch(mode=0o755)
    backend.check_tools()
    assert shutil.which("ninja") == str(ninja)  # for torch, which looks for it again


@pytest.mark.parametrize("debug,expected", [("0", "-g0"), ("1", "-g")])
def test_debug_information_is_left_out_unless_asked_for(tmp_path, debug, expected):
    """Seen by a compiler that writes down its arguments and fails."""
    compiler = tmp_path / "c++"
    # What torch asks besides is the version.
    compiler.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/log\n'
        'case "$*" in *" -c "*) exit 1;; *) echo 13.0.0;; esac\n'
    )
    compiler.chmod(0o755)
    folders = ["--build-temp", str(tmp_path / "temp"), "--build-lib", str(tmp_path / "lib")]
    environment = {"CXX": str(compiler), "MOE_EXT_CUDA": "0", "MOE_EXT_DEBUG": debug}
    assert run_setup("build_ext", "--force", *folders, MAX_JOBS="1", **environment).returncode == 1
    (line,) = [one for one in (tmp_path / "log").read_text().splitlines() if " -c " in one]
    assert [flag for flag in line.split() if re.fullmatch(r"-g\d?", flag)][-1] == expected


@pytest.mark.skipif(os.environ.get("MOE_EXT_DEBUG") == "1", reason="debug information asked for")
def test_the_library_has_no_debug_information():
    """It is 80 MB beside 4 MB of code."""
    assert b".debug_info" not in Path(moe_ext._C.__file__).read_bytes()


def test_the_toolkit_is_where_nvcc_says(tmp_path):
    """Not above a wrapper of it."""
    wrapper = tmp_path / "wrapped" / "bin" / "nvcc"
    wrapper.parent.mkdir(parents=True)
    wrapper.write_text(f"#!/bin/sh\necho '#$ TOP={tmp_path}/real/bin/..' >&2\n")
    wrapper.chmod(0o755)
    (tmp_path / "real" / "bin").mkdir(parents=True)
    source = (ROOT / "setup.py").read_text().split("if build_backend.making_sdist")[0]
    script = source + "\nprint(toolkit_home())\n"
    environment = {**os.environ, "CUDA_HOME": str(tmp_path / "wrapped")}
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == str(tmp_path / "real")


def test_every_package_is_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = [path.parent.relative_to(ROOT) for path in ROOT.glob("moe_ext/**/*.py")]
    assert set(project["tool"]["setuptools"]["packages"]) == {".".join(x.parts) for x in folders}


def test_the_version_is_in_the_changelog():
    assert re.fullmatch(r"\d+\.\d+\.\d+", moe_ext.__version__)
    assert f"## {moe_ext.__version__}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The folder of an unpacked source archive, which was made without torch."""
    folder = tmp_path_factory.mktemp("sdist")
    result = run(
        "import sys; sys.modules['torch'] = None; import build_backend; "
        f"assert build_backend.get_requires_for_build_sdist() == []; "
        f"build_backend.build_sdist({str(folder)!r})"
    )
    assert result.returncode == 0, result.stderr
    (archive,) = folder.glob("moe_ext-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def test_sdist_holds_what_is_needed_to_build_test_and_measure(sdist):
    wanted = [
        *ROOT.glob("csrc/**/*.*"),
        *ROOT.glob("moe_ext/**/*.py"),
        *ROOT.glob("examples/**/*.py"),
        *ROOT.glob("benchmarks/**/*.py"),
        *ROOT.glob("tests/**/*.py"),
        *ROOT.glob("tests/**/*.cpp"),
        *ROOT.glob("tests/**/*.h"),
        *(ROOT / name for name in ["LICENSE", "Makefile", "README.md", "CHANGELOG.md"]),
        *(ROOT / name for name in ["setup.py", "build_backend.py", "constraints.txt"]),
    ]
    assert ROOT / "tests" / "conftest.py" in wanted
    missing = [path for path in wanted if not (sdist / path.relative_to(ROOT)).is_file()]
    assert not missing
    built = [path for path in sdist.rglob("*") if path.suffix in (".so", ".pyc")]
    assert not built


def test_sdist_serves_every_supported_torch(sdist, backend):
    metadata = (sdist / "PKG-INFO").read_text()
    expected = Requirement(backend.SUPPORTED_TORCH).specifier
    assert requires_torch(metadata).specifier == expected
    # So that installers ask the backend, which narrows it.
    assert "Dynamic: requires-dist" in metadata


def test_the_tests_of_an_sdist_are_found(sdist):
    """By pytest from the folder above, with the installed package."""
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "--collect-only",
            "-q",
            "-p",
            "no:cacheprovider",
            sdist / "tests",
        ],
        cwd=sdist.parent,
        env={**os.environ, "PYTHONPATH": str(Path(moe_ext.__path__[0]).parent)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found = {line.split("::")[0] for line in result.stdout.splitlines() if "::" in line}
    assert {path.name for path in (ROOT / "tests").glob("test_*.py")} <= {
        Path(name).name for name in found
    }


@pytest.fixture
def copied_package(tmp_path):
    """The Python files of moe_ext alone; `import moe_ext` finds them in the folder returned."""
    for path in (ROOT / "moe_ext").glob("*.py"):
        (tmp_path / "moe_ext").mkdir(exist_ok=True)
        (tmp_path / "moe_ext" / path.name).write_text(path.read_text())
    return tmp_path


# An editable installation is found before the working folder; these are about others.
IMPORT = (
    "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)]; "
    "import moe_ext"
)


def test_source_folder_without_the_extension_says_what_to_do(copied_package):
    result = run(IMPORT, copied_package)
    assert result.returncode == 1
    assert "shadows the installed package" in result.stderr
    assert "pip install --no-build-isolation ." in result.stderr


@pytest.mark.parametrize("required", ["torch<2.13,>=2.12", None])
def test_a_library_that_does_not_load_says_which_torch_it_was_built_for(copied_package, required):
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    (copied_package / "moe_ext" / f"_C{suffix}").write_bytes(b"not a library")
    metadata = copied_package / "moe_ext-0.1.0.dist-info"
    metadata.mkdir()
    lines = ["Metadata-Version: 2.1", "Name: moe_ext", "Version: 0.1.0"]
    lines += [f"Requires-Dist: {required}"] if required else []
    (metadata / "METADATA").write_text("\n".join(lines) + "\n")
    result = run(IMPORT, copied_package)
    assert result.returncode == 1
    said = f"with torch {torch.__version__}; it was built for {required or 'another torch'} ("
    assert said in result.stderr
    assert "pip install ." in result.stderr
