"""What the batch-invariant mode costs: the same forward with it off and on, in turns."""

import pytest
import torch
from harness.timing import Agreement
from harness.work import Inputs, Work

import moe_ext

SIZES = [  # H, I, E, K, T
    (2048, 768, 128, 8, 1),  # decoding
    (2048, 768, 128, 8, 8),
    (2048, 768, 64, 4, 192),  # 12 rows per expert
    (1024, 3584, 8, 2, 256),  # 64
    (1024, 3584, 8, 2, 2048),  # 512
    (64, 128, 8, 2, 1),
]


@pytest.fixture
def switch_off_again():
    yield
    moe_ext.set_batch_invariant(False)


@pytest.mark.parametrize("mode", ["off", "on"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "-".join(map(str, sizes)))
def test_forward(switch_off_again, take_turns, mode, dtype, sizes):
    work = Work(*sizes, dtype)
    x = Inputs.make(work, train=False)

    def forward(enabled):
        moe_ext.set_batch_invariant(enabled)
        with torch.inference_mode():
            return moe_ext.moe_ffn(x.tokens, x.weights, x.ids, x.gate_up, x.down)

    calls = {"off": lambda: forward(False), "on": lambda: forward(True)}
    take_turns(calls, mode, agreement=Agreement(dtype))
