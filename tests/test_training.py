"""What a script does with a whole model: parameter groups, and the recipe of docs/muon.md."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import moe_ext

DOCS = Path(__file__).resolve().parent.parent / "docs"
H, I, E, K = 12, 8, 6, 2


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(16, H)
        self.norm = nn.LayerNorm(H)
        self.moe = moe_ext.MoE(H, I, E, K, bias=True, shared_intermediate_size=8)
        self.head = nn.Linear(H, 16)

    def forward(self, ids):
        return self.head(self.moe(self.norm(self.embedding(ids))))


def named_groups(model, **options) -> dict[str, set[str]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = moe_ext.param_groups(model, **{"lr": 1.0, "weight_decay": 0.1, **options})
    return {group["name"]: {names[p] for p in group["params"]} for group in groups}


def test_groups():
    assert named_groups(Block()) == {
        "routers": {"moe.router.weight"},
        "experts": {
            "moe.experts.gate_up_proj",
            "moe.experts.down_proj",
            "moe.shared_expert.gate_up_proj",
            "moe.shared_expert.down_proj",
        },
        "experts, no decay": {"moe.experts.gate_up_proj_bias", "moe.experts.down_proj_bias"},
        "weights": {"embedding.weight", "head.weight"},
        "no decay": {"norm.weight", "norm.bias", "head.bias"},
    }


def test_rates():
    groups = {
        group["name"]: (group["lr"], group["weight_decay"])
        for group in moe_ext.param_groups(
            Block(), lr=1.0, weight_decay=0.1, router_lr=0.5, router_weight_decay=0, expert_lr=2.0
        )
    }
    assert groups == {
        "routers": (0.5, 0),
        "experts": (2.0, 0.1),
        "experts, no decay": (2.0, 0.0),
        "weights": (1.0, 0.1),
        "no decay": (1.0, 0.0),
    }


def test_frozen_and_shared_parameters():
    model = Block()
    model.head.weight = model.embedding.weight
    model.moe.router.requires_grad_(False)
    groups = named_groups(model)
    assert "routers" not in groups and groups["weights"] == {"embedding.weight"}
    total = sum(len(names) for names in groups.values())
    assert total == sum(p.requires_grad for p in model.parameters())


def test_hugging_face_experts():
    transformers = pytest.importorskip("transformers")
    config = transformers.GptOssConfig(
        vocab_size=16,
        hidden_size=H,
        intermediate_size=I,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=6,
        num_local_experts=E,
        num_experts_per_tok=K,
    )
    groups = named_groups(transformers.GptOssForCausalLM(config))
    at = "model.layers.0.mlp.experts"
    assert groups["experts"] == {f"{at}.gate_up_proj", f"{at}.down_proj"}
    assert groups["experts, no decay"] == {f"{at}.gate_up_proj_bias", f"{at}.down_proj_bias"}


def test_adapters_on_experts():
    """Their weights have two dimensions and lie in a wrapper beside the stack."""

    class Wrapper(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer = base
            self.lora_a = nn.Parameter(torch.zeros(2 * E, H))

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.zeros(E, 2 * I, H))

    model = nn.ModuleDict({"experts": Wrapper(Wrapper(Stack())), "head": nn.Linear(H, 2)})
    assert named_groups(model)["experts"] == {
        "experts.lora_a",
        "experts.base_layer.lora_a",
        "experts.base_layer.base_layer.gate_up_proj",
    }


def test_an_optimizer_takes_the_groups():
    model, ids = Block(), torch.randint(16, (4, 7))
    optimizer = torch.optim.AdamW(moe_ext.param_groups(model, lr=1e-2, weight_decay=0.1))
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        optimizer.zero_grad()
        (loss + moe_ext.total_aux_loss(model)).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def muon() -> dict:
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "muon.md").read_text(), re.DOTALL)
    recipe = {}
    exec(code, recipe)
    return recipe


def test_muon_orthogonalizes_every_expert_by_itself():
    recipe = muon()
    update = torch.randn(5, 6, 10) * torch.logspace(-3, 3, 5).view(5, 1, 1)
    values = torch.linalg.svdvals(recipe["orthogonalize"](update))
    assert values.shape == (5, 6) and 0.5 < values.min() and values.max() < 1.5
    alone = recipe["orthogonalize"](update[3])
    assert (recipe["orthogonalize"](update)[3] - alone).abs().max() < 1e-5


def test_muon_trains():
    model, ids = Block(), torch.randint(16, (4, 7))
    optimizers = muon()["make_optimizers"](model)
    owned = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    assert len(owned) == len(set(owned)) == len(list(model.parameters()))
    losses = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        model.zero_grad()
        (loss + moe_ext.total_aux_loss(model)).backward()
        for optimizer in optimizers:
            assert optimizer.step(lambda loss=loss: loss) is loss  # as frameworks call it
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
