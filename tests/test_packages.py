"""AOTInductor: a layer and a whole model, compiled into a package and run in a fresh process."""

import subprocess
import sys

import pytest
import torch
from conftest import relative_error

import moe_ext

H, I, E, K = 16, 24, 4, 2

RUN = """
import sys
import torch
import moe_ext

package, inputs, output = sys.argv[1:]
model = torch._inductor.aoti_load_package(package)
with torch.no_grad():
    torch.save([model(*arguments) for arguments in torch.load(inputs)], output)
"""


def run_packaged(program: torch.export.ExportedProgram, inputs: list[tuple], folder) -> list:
    """What the package gives for the inputs in a process of its own."""
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(folder / "model.pt2")
    )
    torch.save(inputs, folder / "inputs.pt")
    subprocess.run(
        [sys.executable, "-c", RUN, package, folder / "inputs.pt", folder / "output.pt"], check=True
    )
    return torch.load(folder / "output.pt")


@pytest.mark.parametrize(
    "options",
    [{}, {"shared_intermediate_size": 8, "bias": True, "eval_capacity_factor": 1.0}],
    ids=["plain", "everything"],
)
def test_layer(options, tmp_path):
    layer = moe_ext.MoE(H, I, E, K, init_std=0.5, **options).eval()
    with torch.no_grad():
        program = torch.export.export(
            layer, (torch.randn(4, H),), dynamic_shapes=({0: torch.export.Dim("T", min=2)},)
        )
    inputs = [(torch.randn(T, H),) for T in (2, 7)]
    with torch.no_grad():
        expected = [layer(*arguments) for arguments in inputs]
    for actual, value in zip(run_packaged(program, inputs, tmp_path), expected, strict=True):
        assert relative_error(actual, value) < 1e-5


def test_hugging_face_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    import moe_ext.integrations.transformers  # noqa: F401

    config = transformers.Qwen3MoeConfig(
        vocab_size=32,
        hidden_size=H,
        intermediate_size=I,
        moe_intermediate_size=I,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=E,
        num_experts_per_tok=K,
        attn_implementation="eager",
        experts_implementation="moe_ext",
    )
    model = transformers.Qwen3MoeForCausalLM(config).eval()

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids, use_cache=False).logits

    ids = torch.randint(32, (2, 6))
    with torch.no_grad():
        program = torch.export.export(Logits(), (ids,), strict=False)
        (actual,) = run_packaged(program, [(ids,)], tmp_path)
        assert relative_error(actual, model(ids, use_cache=False).logits) < 1e-4
