"""Autocast casts the operands of the experts' products and nothing else."""

import pytest
import torch
from conftest import EMULATED
from torch.utils._python_dispatch import TorchDispatchMode

import moe_ext  # noqa: F401  registers the operators

pytestmark = pytest.mark.skipif(EMULATED, reason="casts do not depend on the operators' device")

T, H, INTER, E, K = 5, 8, 6, 3, 2
PROJECTIONS = {"gate_up_proj", "down_proj", "gate_up_bias", "down_bias"}
CAST = {"tokens", "rows", "weight", "bias"} | PROJECTIONS
KEPT = {"topk_weights", "pair_weights", "row_weights"}
VALUES = {
    "tokens": torch.randn(T, H),
    "rows": torch.randn(T, H),
    "weight": torch.randn(E, INTER, H),
    "bias": torch.randn(E, INTER),
    "gate_up_proj": torch.randn(E, 2 * INTER, H),
    "down_proj": torch.randn(E, H, INTER),
    "gate_up_bias": torch.randn(E, 2 * INTER),
    "down_bias": torch.randn(E, H),
    "topk_weights": torch.rand(T, K),
    "pair_weights": torch.rand(T),
    "row_weights": torch.rand(T),
    "topk_ids": torch.randint(E, (T, K)),
    "pair_experts": torch.randint(E, (T,)),
    "pair_tokens": torch.arange(T),
    "expert_offsets": torch.tensor([0, 2, 4, 5], dtype=torch.int32),
}


class Seen(TorchDispatchMode):
    """The dtypes of the floating arguments that arrive below autocast and autograd."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "moe_ext":
            for value in [*args, *(kwargs or {}).values()]:
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    self.dtypes.append(value.dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["_grouped_linear", "expert_ffn", "moe_ffn", "_moe_ffn_pairs"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_the_operands(name, dtype):
    op = getattr(torch.ops.moe_ext, name).default
    tensors = [a.name for a in op._schema.arguments if "Tensor" in str(a.type)]
    floating = [name for name in tensors if VALUES[name].is_floating_point()]
    assert set(floating) <= CAST | KEPT  # a new argument says whether it is cast
    arguments = {name: VALUES[name] for name in tensors}
    with torch.autocast("cpu", dtype=dtype), Seen() as seen:
        out = op(**arguments)
    assert out.dtype == dtype
    expected = [dtype if name in CAST else torch.float32 for name in floating]
    assert sorted(map(str, seen.dtypes)) == sorted(map(str, expected))
    wide = {n: v.double() if v.is_floating_point() else v for n, v in arguments.items()}
    with torch.autocast("cpu", dtype=dtype):
        assert op(**wide).dtype == torch.float64
