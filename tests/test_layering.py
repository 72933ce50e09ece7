"""The layering: who may include and import whom. Read from the files themselves."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Folder of csrc -> folders of csrc it may include; "torch": whether it may include torch at all.
CPP_LAYERS = {
    "common": {"allowed": {"common"}, "torch": False},
    "ops": {"allowed": {"common", "ops"}, "torch": True},
    "cpu": {"allowed": {"common", "ops", "cpu", "cpu/kernels"}, "torch": True},
    "cpu/kernels": {
        "allowed": {"common", "cpu/kernels", "cpu/kernels/gemm", "cpu/kernels/simd"},
        "torch": False,
    },
    "cpu/kernels/gemm": {
        "allowed": {
            "cpu/kernels",
            "cpu/kernels/gemm",
            "cpu/kernels/gemm/formats",
            "cpu/kernels/simd",
        },
        "torch": False,
    },
    "cpu/kernels/gemm/formats": {
        "allowed": {"common", "cpu/kernels/gemm", "cpu/kernels/simd"},
        "torch": False,
    },
    "cpu/kernels/simd": {"allowed": {"cpu/kernels", "cpu/kernels/simd"}, "torch": False},
    "cuda": {"allowed": {"common", "ops", "cuda", "cuda/kernels"}, "torch": True},
    "cuda/kernels": {"allowed": {"common", "cuda/kernels"}, "torch": False},
    "cuda/kernels/gemm": {
        "allowed": {"common", "cuda/kernels", "cuda/kernels/gemm"},
        "torch": False,
    },
    "meta": {"allowed": {"ops"}, "torch": True},
    "autograd": {"allowed": {"autograd"}, "torch": True},
    "autocast": {"allowed": {"ops"}, "torch": True},
    "functorch": {"allowed": set(), "torch": True},
    "": {"allowed": {"cpu/kernels"}, "torch": True},  # schema.cpp, module.cpp
}
TORCH = re.compile(r"^(ATen|c10|torch)/")
INCLUDE = re.compile(r'^\s*#\s*include\s+[<"]([^>"]+)[>"]', re.MULTILINE)

# Module of the package -> modules of it that it may import.
PYTHON_LAYERS = {
    "__init__": {
        "_C",
        "_flops",
        "_version",
        "aux_loss",
        "layers",
        "ops",
        "reference",
        "routers",
        "training",
    },
    "_buffers": set(),
    "_messages": set(),
    "_version": set(),
    "_flops": set(),
    "ops": set(),
    "reference": set(),
    "routers": {"_buffers", "_messages", "ops"},
    "aux_loss": {"_buffers", "_messages"},
    "layers": {"_buffers", "_messages", "aux_loss", "ops", "routers"},
    "training": {"_messages", "layers", "routers"},
    "monitor": {"_messages", "layers", "_monitor_figure"},
    "_monitor_figure": set(),
    "integrations/__init__": set(),
    "integrations/transformers": {"__init__", "ops", "layers", "monitor"},
}


def cpp_violations(root: Path) -> list[str]:
    """Lines `file: what is wrong` for the C++ sources below root."""
    wrong = []
    for path in sorted(root.rglob("*")):
        if path.suffix not in {".h", ".cpp", ".cu", ".cuh"}:
            continue
        folder = path.parent.relative_to(root).as_posix()
        layer = CPP_LAYERS["" if folder == "." else folder]
        text = path.read_text()
        for include in INCLUDE.findall(text):
            owner = Path(include).parent.as_posix()
            if owner in CPP_LAYERS and owner != "." and owner not in layer["allowed"]:
                wrong.append(f"{path.relative_to(root)}: includes {include}")
            if TORCH.match(include) and not layer["torch"]:
                wrong.append(f"{path.relative_to(root)}: includes {include}")
            if include in {"torch/extension.h", "torch/all.h"}:
                wrong.append(f"{path.relative_to(root)}: includes {include}, 20 s a file")
        if folder == "autograd" and re.search(r"(\.|->)(sym_)?(sizes\(|size\([^)])", text):
            wrong.append(f"{path.relative_to(root)}: reads a size")
    return wrong


def python_violations(root: Path) -> list[str]:
    wrong = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).with_suffix("").as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                modules = (
                    [alias.name for alias in node.names]
                    if node.module == "moe_ext"
                    else [(node.module or "").removeprefix("moe_ext.")]
                    if (node.module or "").startswith("moe_ext.")
                    else []
                )
            elif isinstance(node, ast.Import):
                modules = [
                    alias.name.removeprefix("moe_ext.").replace("moe_ext", "__init__")
                    for alias in node.names
                    if alias.name.split(".")[0] == "moe_ext"
                ]
            else:
                continue
            allowed = PYTHON_LAYERS[name]
            wrong += [f"{name}: imports {module}" for module in modules if module not in allowed]
    return wrong


def test_cpp():
    assert not cpp_violations(ROOT / "csrc")


def test_python():
    assert not python_violations(ROOT / "moe_ext")


@pytest.mark.parametrize(
    "file,line",
    [
        ("common/a.h", "#include <ATen/core/Tensor.h>"),
        ("common/a.h", '#include "ops/permute.h"'),
        ("ops/a.h", '#include "cpu/plan.h"'),
        ("cpu/a.cpp", '#include "autograd/function.h"'),
        ("cpu/kernels/a.cpp", "#include <torch/library.h>"),
        ("cpu/kernels/simd/a.h", '#include "cpu/kernels/gemm/tile.h"'),
        ("cpu/kernels/gemm/a.h", '#include "cpu/plan.h"'),
        ("meta/a.cpp", '#include "cpu/plan.h"'),
        ("autograd/a.cpp", '#include "ops/permute.h"'),
        ("autograd/a.cpp", "int64_t n = tokens.size(0);"),
        ("cpu/a.cpp", "#include <torch/extension.h>"),
    ],
)
def test_the_checker_sees_cpp(tmp_path, file, line):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    assert cpp_violations(tmp_path)


@pytest.mark.parametrize(
    "file,line",
    [
        ("ops.py", "from moe_ext import layers"),
        ("ops.py", "from moe_ext.layers import MoE"),
        ("reference.py", "import moe_ext"),
        ("routers.py", "import moe_ext.layers"),
    ],
)
def test_the_checker_sees_python(tmp_path, file, line):
    (tmp_path / file).write_text(line + "\n")
    assert python_violations(tmp_path)
