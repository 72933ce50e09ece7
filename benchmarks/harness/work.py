"""Sizes and inputs of a layer of experts."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

MODELS = {  # (H, I, E, K)
    "DeepSeek-V3": (7168, 2048, 256, 8),
    "DeepSeek-V3 H4096": (4096, 2048, 256, 8),
    "Qwen3-30B-A3B": (2048, 768, 128, 8),
    "OLMoE": (2048, 1024, 64, 8),
    "Mixtral": (4096, 14336, 8, 2),
}


@dataclass(frozen=True)
class Work:
    """T tokens through a layer of E gated experts (silu), K per token. skewed: a few experts get
    most of them; transposed: the weights lie in memory as [E, H, 2I] and [E, I, H], GPT-OSS's way.
    """

    H: int
    I: int
    E: int
    K: int
    T: int
    dtype: torch.dtype = torch.bfloat16
    skew: bool = False
    transposed: bool = False

    def __str__(self):
        name = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[self.dtype]
        flags = "-skewed" * self.skew + "-transposed" * self.transposed
        return f"{name}-H{self.H}-I{self.I}-E{self.E}-K{self.K}-T{self.T}{flags}"

    def smoke(self) -> "Work":
        """The same kind of work in no time, to try a benchmark."""
        return dataclasses.replace(self, H=64, I=32, E=8, K=2, T=min(self.T, 128))

    def flops(self, kind: str = "forward") -> int:
        """Of the products: of a forward, a backward, or a train step, which has both."""
        return {"forward": 6, "backward": 12, "train": 18}[kind] * self.T * self.K * self.H * self.I

    def ids(self) -> Tensor:
        """Experts of every token at random, [T, K], on torch's default device."""
        scores = torch.rand(self.T, self.E)
        if self.skew:  # the first experts get most of the tokens
            scores = scores.log() * torch.linspace(0.1, 1, self.E) ** 2
        return scores.topk(self.K).indices

    def active_bytes(self, ids: Tensor) -> int:
        """The experts' weights that a forward reads."""
        return ids.unique().numel() * 3 * self.H * self.I * self.dtype.itemsize


@dataclass
class Inputs:
    """Of a layer, and the gradient of its output. Numbers are random: products of zeros are
    faster on a GPU."""

    tokens: Tensor
    weights: Tensor
    ids: Tensor
    gate_up: Tensor
    down: Tensor
    grad: Tensor

    @classmethod
    def make(cls, work: Work, train: bool, device: str = "cpu") -> "Inputs":
        """The same numbers each time; with train all but the ids and grad require gradients."""
        torch.manual_seed(0)
        with torch.device(device):
            # Multiples of one expert: quickly made, and a mix-up of experts shows.
            share = torch.linspace(0.5, 1, work.E).to(work.dtype).view(-1, 1, 1)
            gate_up = torch.randn(1, 2 * work.I, work.H).mul_(work.H**-0.5).to(work.dtype)
            down = torch.randn(1, work.H, work.I).mul_(work.I**-0.5).to(work.dtype)
            weights = [gate_up * share, down * share]
            if work.transposed:
                weights = [weight.mT.contiguous().mT for weight in weights]
            return cls(
                torch.randn(work.T, work.H).to(work.dtype).requires_grad_(train),
                torch.rand(work.T, work.K).softmax(-1).requires_grad_(train),
                work.ids(),
                *(weight.requires_grad_(train) for weight in weights),
                torch.randn(work.T, work.H).to(work.dtype),
            )

    def rotated(self, work: Work, count: int) -> list["Inputs"]:
        """These inputs, then others with new tokens and ids; all share the experts' weights."""
        inputs = [self]
        for seed in range(1, count):
            torch.manual_seed(seed)
            with torch.device(self.tokens.device):
                tokens = torch.randn(work.T, work.H).to(work.dtype)
                tokens.requires_grad_(self.tokens.requires_grad)
                inputs.append(dataclasses.replace(self, tokens=tokens, ids=work.ids()))
        return inputs

    @property
    def leaves(self) -> list[Tensor]:
        return [self.tokens, self.weights, self.gate_up, self.down]
