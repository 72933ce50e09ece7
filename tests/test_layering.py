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
    "cpu": {"allowed": {"common", "ops", "cpu", "cpu/kernels", "cpu/memory"}, "torch": True},
    "cpu/memory": {"allowed": {"cpu/memory"}, "torch": False},
    "cpu/kernels": {
        "allowed": {
            "common",
            "cpu/kernels",
            "cpu/kernels/gemm",
            "cpu/kernels/gemm/formats",
            "cpu/kernels/simd",
        },
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
        "allowed": {"cpu/kernels/gemm"},
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
    "python": {"allowed": {"autograd", "python"}, "torch": True},
    # schema.cpp, module.cpp
    "": {"allowed": {"cpu/kernels", "cpu/memory", "python"}, "torch": True},
}
TORCH = re.compile(r"^(ATen|c10|torch)/")
INCLUDE = re.compile(r'^\s*#\s*include\s+[<"]([^>"]+)[>"]', re.MULTILINE)

# Module of the package -> modules of it that it may import; a package's name is its __init__.
ROUTER = {"ops", "_messages", "routers.output", "routers.topk"}
PYTHON_LAYERS = {
    "__init__": {
        "_C",
        "_flops",
        "_version",
        "aux_loss",
        "experts",
        "memory",
        "moe",
        "ops",
        "packing",
        "reference",
        "routers",
        "training",
    },
    "_C": set(),
    "_buffers": set(),
    "_flops": set(),
    "_messages": set(),
    "_version": set(),
    "memory": {"_C", "_messages"},
    "ops": {"_C"},
    "reference": set(),
    "aux_loss": {"_buffers", "_messages", "ops"},
    "experts": {"_messages", "ops"},
    "packing": {"experts"},
    "statistics": {"ops"},
    "routers.output": set(),
    "routers.limits": {"_messages", "ops", "routers.output"},
    "routers.balance": {"_buffers", "_messages", "ops", "routers.output"},
    "routers.topk": {"_messages", "ops", "routers.balance", "routers.limits", "routers.output"},
    "routers.expert_choice": ROUTER,
    "routers.given_ids": ROUTER,
    "routers.hierarchical": ROUTER,
    "routers.noisy": ROUTER,
    "routers": {
        "routers.expert_choice",
        "routers.given_ids",
        "routers.hierarchical",
        "routers.noisy",
        "routers.output",
        "routers.topk",
    },
    "moe": {"_buffers", "_messages", "aux_loss", "experts", "ops", "routers", "statistics"},
    "training": {"_messages", "moe", "routers"},
    "monitor.watch": {"moe", "ops", "statistics"},
    "monitor.flops": {"monitor.watch"},
    "monitor.guard": {"_messages"},
    "monitor.records": {"_messages"},
    "monitor.figure": set(),
    "monitor.monitor": {
        "_messages",
        "monitor.figure",
        "monitor.flops",
        "monitor.guard",
        "monitor.records",
        "monitor.watch",
    },
    "monitor": {"monitor.flops", "monitor.guard", "monitor.monitor", "monitor.watch"},
    "integrations": set(),
    "integrations.transformers": {"ops", "statistics", "monitor"},
}
# Modules that may name torch.ops.moe_ext: Python reaches C++ in one way.
NAMES_OPERATORS = {"ops", "_flops"}


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


def imported_modules(node: ast.AST) -> list[str]:
    """The modules of the package that a statement imports, without the package's name in front;
    the package itself is "__init__"."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.level:
        return ["by a relative path"]
    elif isinstance(node, ast.ImportFrom):
        below = [f"{node.module}.{alias.name}" for alias in node.names]
        names = [x if x.removeprefix("moe_ext.") in PYTHON_LAYERS else node.module for x in below]
    else:
        names = []
    ours = [name for name in names if name.split(".")[0] == "moe_ext"]
    return [name.removeprefix("moe_ext.").replace("moe_ext", "__init__") for name in ours]


def python_violations(root: Path) -> list[str]:
    """Lines `module: what is wrong` for the Python sources below root."""
    wrong = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[1:] and parts[-1] == "__init__" else parts)
        for node in ast.walk(ast.parse(path.read_text())):
            for module in imported_modules(node):
                if module not in PYTHON_LAYERS[name]:
                    wrong.append(f"{name}: imports {module}")
            # Also by ops._ops, the name that ops.py has for it.
            is_attribute = isinstance(node, ast.Attribute) and node.attr in {"moe_ext", "_ops"}
            is_import = isinstance(node, ast.ImportFrom) and (
                node.module == "torch.ops" or "_ops" in [alias.name for alias in node.names]
            )
            if (is_attribute or is_import) and name not in NAMES_OPERATORS:
                wrong.append(f"{name}: names torch.ops.moe_ext in line {node.lineno}")
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
        ("ops.py", "from moe_ext import moe"),
        ("ops.py", "from moe_ext import MoE"),
        ("ops.py", "from moe_ext.moe import MoE"),
        ("reference.py", "import moe_ext"),
        ("ops.py", "from . import reference"),
        ("routers/topk.py", "import moe_ext.moe"),
        ("routers/topk.py", "from moe_ext import routers"),
        ("routers/topk.py", "from moe_ext.routers import noisy"),
        ("routers/__init__.py", "from moe_ext.moe import MoE"),
        ("moe.py", "from moe_ext.monitor import Monitor"),
        ("moe.py", "torch.ops.moe_ext._add_once(total, value)"),
        ("moe.py", "from torch import ops\n_ops = ops.moe_ext"),
        ("moe.py", "from torch.ops import moe_ext"),
        ("moe.py", "from moe_ext.ops import _ops"),
        ("moe.py", "ops._ops.permute.default(tokens, ids, 4)"),
    ],
)
def test_the_checker_sees_python(tmp_path, file, line):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(line + "\n")
    assert python_violations(tmp_path)
