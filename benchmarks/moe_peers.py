"""The same layer of experts by everyone who has one: what bench_moe_cpu.py and bench_moe_cuda.py
compare."""

import os
from collections.abc import Callable
from dataclasses import dataclass

# Without it zentorch packs in place: it overwrites the weights it is given.
os.environ.setdefault("ZENDNNL_MATMUL_WEIGHT_CACHE", "1")

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

import moe_ext  # noqa: E402
from moe_ext import reference  # noqa: E402

try:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
except ImportError:
    Qwen3MoeExperts = None
try:
    import zentorch
except ImportError:
    zentorch = None


@dataclass(frozen=True)
class Work:
    """T tokens through a layer of E gated experts (silu), K per token."""

    H: int
    I: int
    E: int
    K: int
    T: int
    dtype: torch.dtype = torch.bfloat16
    skew: bool = False

    def __str__(self):
        name = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[self.dtype]
        return f"{name}-H{self.H}-I{self.I}-E{self.E}-K{self.K}-T{self.T}" + "-skewed" * self.skew

    @property
    def flops(self) -> int:
        """Of a forward; a train step has three times as many."""
        return 6 * self.T * self.K * self.H * self.I

    def ids(self) -> Tensor:
        scores = torch.rand(self.T, self.E)
        if self.skew:  # the first experts get most of the tokens
            scores = scores.log() * torch.linspace(0.1, 1, self.E) ** 2
        return scores.topk(self.K).indices

    def active_bytes(self, ids: Tensor) -> int:
        """The experts' weights that a forward reads."""
        return ids.unique().numel() * 3 * self.H * self.I * self.dtype.itemsize


@dataclass
class Inputs:
    tokens: Tensor
    weights: Tensor
    ids: Tensor
    gate_up: Tensor
    down: Tensor
    grad: Tensor

    @classmethod
    def make(cls, work: Work, train: bool, device: str = "cpu") -> "Inputs":
        torch.manual_seed(0)
        with torch.device(device):
            # Every expert's weights are the same numbers, which no one's speed depends on.
            gate_up = torch.randn(1, 2 * work.I, work.H).mul_(work.H**-0.5).to(work.dtype)
            down = torch.randn(1, work.H, work.I).mul_(work.I**-0.5).to(work.dtype)
            return cls(
                torch.randn(work.T, work.H).to(work.dtype).requires_grad_(train),
                torch.rand(work.T, work.K).softmax(-1).requires_grad_(train),
                work.ids(),
                gate_up.repeat(work.E, 1, 1).requires_grad_(train),
                down.repeat(work.E, 1, 1).requires_grad_(train),
                torch.randn(work.T, work.H).to(work.dtype),
            )


def _moe_ext(work: Work, x: Inputs):
    return lambda: moe_ext.moe_ffn(x.tokens, x.weights, x.ids, x.gate_up, x.down)


def _reference(work: Work, x: Inputs):
    return lambda: reference.moe_ffn(x.tokens, x.weights, x.ids, x.gate_up, x.down)


def _transformers(implementation: str):
    def make(work: Work, x: Inputs):
        config = Qwen3MoeConfig(
            num_experts=work.E, hidden_size=work.H, moe_intermediate_size=work.I
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            experts = Qwen3MoeExperts(config)
        for name, weight in {"gate_up_proj": x.gate_up, "down_proj": x.down}.items():
            parameter = torch.nn.Parameter(weight.detach(), weight.requires_grad)
            setattr(experts, name, parameter)
        x.parameters = [experts.gate_up_proj, experts.down_proj]
        return lambda: experts(x.tokens, x.ids, x.weights.to(work.dtype))

    return make


def _zentorch(work: Work, x: Inputs):
    ids = x.ids.int()

    def run():
        out = torch.empty_like(x.tokens)
        torch.ops.zentorch.zentorch_fused_moe(
            out, x.tokens, x.gate_up, x.down, None, None, x.weights, ids, False, "silu"
        )
        return out

    return run


def _dense(work: Work, x: Inputs):
    """One FFN, K experts wide, for every token: the same FLOPs without routing."""
    width = work.K * work.I
    train = x.gate_up.requires_grad
    with torch.device(x.tokens.device):
        gate_up = torch.randn(2 * width, work.H).mul_(work.H**-0.5).to(work.dtype)
        down = torch.randn(work.H, width).mul_(width**-0.5).to(work.dtype)
    x.parameters = [gate_up.requires_grad_(train), down.requires_grad_(train)]

    def run():
        gate, up = F.linear(x.tokens, gate_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, down)

    return run


def _unfused(work: Work, x: Inputs):
    """Our own operators one by one, every intermediate in memory."""

    def run():
        rows, row_map, offsets = moe_ext.permute(x.tokens, x.ids, work.E)
        linear = torch.ops.moe_ext._grouped_linear
        gate, up = linear(rows, offsets, x.gate_up).chunk(2, dim=-1)
        return moe_ext.unpermute(linear(F.silu(gate) * up, offsets, x.down), row_map, x.weights)

    return run


PEERS: dict[str, Callable] = {"moe_ext": _moe_ext, "reference": _reference, "dense": _dense}
PEERS["unfused"] = _unfused
if Qwen3MoeExperts is not None:
    PEERS["eager"] = _transformers("eager")
    PEERS["grouped_mm"] = _transformers("grouped_mm")
    PEERS["batched_mm"] = _transformers("batched_mm")
if zentorch is not None:
    PEERS["zentorch"] = _zentorch


def forget() -> None:
    """Frees what peers keep of weights that are gone."""
    if zentorch is not None:
        torch.ops.zentorch.zentorch_flush_moe_weight_cache()


def forward(peer: str, work: Work, x: Inputs):
    run = PEERS[peer](work, x)

    @torch.inference_mode()
    def call():
        return run()

    return call


def train_step(peer: str, work: Work, x: Inputs):
    """Forward and all gradients: of the tokens, their weights and the experts."""
    x.parameters = [x.gate_up, x.down]
    run = PEERS[peer](work, x)
    leaves = [x.tokens, *([x.weights] if peer != "dense" else []), *x.parameters]

    def call():
        return torch.autograd.grad(run(), leaves, x.grad)

    return call
