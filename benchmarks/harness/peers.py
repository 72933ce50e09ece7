"""The same layer of experts by everyone who has one, and products of equal FLOPs without routing.
Peers that are not installed are left out."""

import os
from collections.abc import Callable
from dataclasses import dataclass

# Without it zentorch packs in place: it overwrites the weights it is given.
os.environ.setdefault("ZENDNNL_MATMUL_WEIGHT_CACHE", "1")

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

import moe_ext  # noqa: E402
from moe_ext import ops, reference  # noqa: E402

from .work import Inputs, Work  # noqa: E402

try:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
except ImportError:
    Qwen3MoeExperts = None
try:
    import zentorch
except ImportError:
    zentorch = None


MODULES = {"moe_ext": moe_ext, "reference": reference}  # they have the same functions


@dataclass
class Layer:
    """A forward of nothing, the leaves to differentiate it by, and its output's gradient."""

    run: Callable[[], Tensor]
    leaves: list[Tensor]
    grad: Tensor


def _moe_ext(work: Work, x: Inputs) -> Layer:
    run = lambda: moe_ext.moe_ffn(x.tokens, x.weights, x.ids, x.gate_up, x.down)  # noqa: E731
    return Layer(run, x.leaves, x.grad)


def _packed(work: Work, x: Inputs) -> Layer:
    """Has no backward. Holds a copy of the weights, of which the plain ones serve the peers."""
    packed = ops._pack_weights(x.gate_up.detach(), True), ops._pack_weights(x.down.detach(), False)
    options = {"gate_up_bias": None, "down_bias": None, "intermediate_size": work.I}
    options |= {"activation": "silu", "gated": True}
    run = lambda: ops._moe_ffn_packed(  # noqa: E731
        x.tokens, x.weights, x.ids, None, *packed, **options
    )
    return Layer(run, [], x.grad)


def _reference(work: Work, x: Inputs) -> Layer:
    run = lambda: reference.moe_ffn(x.tokens, x.weights, x.ids, x.gate_up, x.down)  # noqa: E731
    return Layer(run, x.leaves, x.grad)


def _compiled_reference(work: Work, x: Inputs) -> Layer:
    compiled = torch.compile(reference.moe_ffn)
    run = lambda: compiled(x.tokens, x.weights, x.ids, x.gate_up, x.down)  # noqa: E731
    return Layer(run, x.leaves, x.grad)


def _transformers(implementation: str):
    def make(work: Work, x: Inputs) -> Layer:
        config = Qwen3MoeConfig(
            num_experts=work.E, hidden_size=work.H, moe_intermediate_size=work.I
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            experts = Qwen3MoeExperts(config)
        for name, weight in {"gate_up_proj": x.gate_up, "down_proj": x.down}.items():
            parameter = torch.nn.Parameter(weight.detach(), weight.requires_grad)
            setattr(experts, name, parameter)
        run = lambda: experts(x.tokens, x.ids, x.weights.to(work.dtype))  # noqa: E731
        return Layer(run, [x.tokens, x.weights, experts.gate_up_proj, experts.down_proj], x.grad)

    return make


def _zentorch(work: Work, x: Inputs) -> Layer:
    """Has no backward."""
    ids = x.ids.int()

    def run():
        out = torch.empty_like(x.tokens)
        torch.ops.zentorch.zentorch_fused_moe(
            out, x.tokens, x.gate_up, x.down, None, None, x.weights, ids, False, "silu"
        )
        return out

    return Layer(run, [], x.grad)


def _unfused(work: Work, x: Inputs) -> Layer:
    """Our own operators one by one, every intermediate in memory."""

    def run():
        rows, row_map, offsets = moe_ext.permute(x.tokens, x.ids, work.E)
        gate, up = ops._grouped_linear(rows, offsets, x.gate_up).chunk(2, dim=-1)
        rows = ops._grouped_linear(F.silu(gate) * up, offsets, x.down)
        return moe_ext.unpermute(rows, row_map, x.weights)

    return Layer(run, x.leaves, x.grad)


def _dense(work: Work, x: Inputs) -> Layer:
    """One FFN, K experts wide, for every token: the same FLOPs without routing."""
    width = work.K * work.I
    train = x.gate_up.requires_grad
    with torch.device(x.tokens.device):
        gate_up = torch.randn(2 * width, work.H).mul_(work.H**-0.5).to(work.dtype)
        down = torch.randn(work.H, width).mul_(width**-0.5).to(work.dtype)
    weights = [gate_up.requires_grad_(train), down.requires_grad_(train)]

    def run():
        gate, up = F.linear(x.tokens, gate_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, down)

    return Layer(run, [x.tokens, *weights], x.grad)


def _rows(work: Work, x: Inputs, *shape: int) -> tuple[Tensor, Tensor]:
    """Rows as permute would make them, and the gradient of the products' output."""
    with torch.device(x.tokens.device):
        rows = torch.randn(*shape, work.H).to(work.dtype).requires_grad_(x.tokens.requires_grad)
        return rows, torch.randn_like(rows)


def _bmm(work: Work, x: Inputs) -> Layer:
    """The products alone, every expert with equally many rows: torch.bmm."""
    rows, grad = _rows(work, x, work.E, -(-work.T * work.K // work.E))

    def run():
        hidden = torch.bmm(rows, x.gate_up.transpose(1, 2))
        return torch.bmm(hidden[..., : work.I], x.down.transpose(1, 2))

    return Layer(run, [rows, x.gate_up, x.down], grad)


def _grouped_products(work: Work, x: Inputs) -> Layer:
    """The products alone, by torch's grouped product."""
    offsets = ops._tokens_per_expert(x.ids, work.E).cumsum(0).int()
    rows, grad = _rows(work, x, work.T * work.K)

    def run():
        hidden = torch._grouped_mm(rows, x.gate_up.transpose(1, 2), offs=offsets)
        activated = hidden[:, : work.I].contiguous()
        return torch._grouped_mm(activated, x.down.transpose(1, 2), offs=offsets)

    return Layer(run, [rows, x.gate_up, x.down], grad)


PEERS: dict[str, Callable[[Work, Inputs], Layer]] = {"moe_ext": _moe_ext}
PEERS |= {"unfused": _unfused, "reference": _reference, "compiled reference": _compiled_reference}
if Qwen3MoeExperts is not None:
    PEERS |= {name: _transformers(name) for name in ("eager", "grouped_mm", "batched_mm")}
if zentorch is not None:
    PEERS["zentorch"] = _zentorch
PEERS["moe_ext packed"] = _packed
PEERS |= {"dense": _dense, "bmm": _bmm, "_grouped_mm alone": _grouped_products}
UNLIKE = {"dense", "bmm", "_grouped_mm alone"}  # as much work, another result


def call_of(kind: str, layer: Layer) -> Callable:
    """A forward, a train step (a forward and the gradients of all leaves, in the leaves' own
    layout, as an optimizer finds them), or a backward alone."""
    if kind == "forward":
        return torch.inference_mode()(layer.run)

    def train():
        layer.run().backward(layer.grad)
        grads = [leaf.grad for leaf in layer.leaves]
        for leaf in layer.leaves:
            leaf.grad = None
        return grads

    if kind == "train":
        return train
    out = layer.run()
    return lambda: torch.autograd.grad(out, layer.leaves, layer.grad, retain_graph=True)


def forget() -> None:
    """Frees what peers keep of weights that are gone."""
    if zentorch is not None:
        torch.ops.zentorch.zentorch_flush_moe_weight_cache()
