"""Hugging Face models with experts_implementation="moe_ext" against their own eager experts."""

import copy
import math

import pytest
import torch
from conftest import relative_error
from torch import nn

transformers = pytest.importorskip("transformers")

from transformers.integrations.moe import use_experts_implementation  # noqa: E402

import moe_ext  # noqa: E402
import moe_ext.integrations.transformers as integration  # noqa: E402
from moe_ext.monitor import Monitor, active_flops_per_token  # noqa: E402

try:
    from transformers.utils.output_capturing import OutputRecorder
except ImportError:  # transformers 5.0
    from transformers.utils.generic import OutputRecorder

pytestmark = pytest.mark.usefixtures("on_device")

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20},
    ),
    "olmoe": ("OlmoeConfig", {"num_experts": 6, "num_experts_per_tok": 3}),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_group": 4,
            "topk_group": 2,
            "moe_intermediate_size": 20,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "num_key_value_heads": 4,
        },
    ),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "nemotron_h": (
        "NemotronHConfig",
        {
            "layers_block_type": ["mamba", "moe", "attention", "moe"],
            "num_hidden_layers": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "moe_shared_expert_intermediate_size": 24,
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 2,
            "chunk_size": 8,
        },
    ),
}


def make_model(name, implementation="eager", dtype=torch.float32):
    config_name, extra = MODELS[name]
    config = getattr(transformers, config_name)(**{**COMMON, **extra})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, experts_implementation=implementation, attn_implementation="eager", dtype=dtype
    )
    return model.eval()


@pytest.fixture
def calls(monkeypatch):
    """How often our function ran, and which operators it used."""
    seen = []
    for op in ("moe_ffn", "permute"):
        function = getattr(integration.ops, op)
        monkeypatch.setattr(
            integration.ops,
            op,
            lambda *args, op=op, function=function, **kw: seen.append(op) or function(*args, **kw),
        )
    return seen


def run(model, ids):
    model.zero_grad()
    out = model(ids)
    logits = out.logits
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(logits.shape, generator=generator, device="cpu")
    logits.backward(grad.to(logits))
    return logits.detach(), {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@pytest.mark.parametrize("name", list(MODELS))
def test_model(name, calls):
    """Logits, all gradients and greedy generation equal the eager model's."""
    eager, ours = make_model(name), make_model(name, "moe_ext")
    ours.load_state_dict(eager.state_dict())
    ids = torch.randint(3, 64, (2, 12))
    logits, grads = run(eager, ids)
    assert not calls
    our_logits, our_grads = run(ours, ids)
    assert set(calls) == {"permute" if name == "gpt_oss" else "moe_ffn"}
    assert relative_error(our_logits, logits) < 1e-5
    assert grads.keys() == our_grads.keys()
    biggest = max(grad.abs().max() for grad in grads.values() if grad is not None)
    for parameter, grad in grads.items():
        if grad is None:
            assert our_grads[parameter] is None or not our_grads[parameter].any(), parameter
        elif grad.abs().max() > 1e-6 * biggest:
            assert relative_error(our_grads[parameter], grad) < 1e-4, parameter
        else:  # zero but for rounding, a bias before a softmax say
            assert our_grads[parameter].abs().max() < 1e-5 * biggest, parameter
    prompt = ids[:, :4]
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    assert torch.equal(ours.generate(prompt, **options), eager.generate(prompt, **options))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_model_in_fp64(name):
    eager, ours = make_model(name).double(), make_model(name, "moe_ext").double()
    ours.load_state_dict(eager.state_dict())
    ids = torch.randint(3, 64, (2, 12))
    logits, grads = run(eager, ids)
    our_logits, our_grads = run(ours, ids)
    # Parts of the models stay in fp32 (the rotary embedding, the norms).
    assert relative_error(our_logits, logits) < 1e-9
    for parameter, grad in grads.items():
        if grad is not None and grad.abs().max() > 1e-9:
            assert relative_error(our_grads[parameter], grad) < 1e-6, parameter


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_bf16_and_autocast(device, name):
    exact = make_model(name, "moe_ext")
    coarse = make_model(name, "moe_ext", dtype=torch.bfloat16)
    eager = make_model(name, dtype=torch.bfloat16)
    coarse.load_state_dict(exact.state_dict())
    eager.load_state_dict(exact.state_dict())
    ids = torch.randint(3, 64, (2, 12))
    with torch.no_grad():
        expected, out = exact(ids).logits, coarse(ids).logits
        assert out.dtype == torch.bfloat16
        # No worse than the model's own bf16, give or take a flipped choice of an expert.
        error, eager_error = (
            relative_error(out, expected),
            relative_error(eager(ids).logits, expected),
        )
        assert error < max(2 * eager_error, 0.05)
    with torch.autocast(device, dtype=torch.bfloat16):
        logits = exact(ids).logits
        logits.float().square().mean().backward()
    assert relative_error(logits.detach(), expected) < max(2 * eager_error, 0.05)
    for parameter, value in exact.named_parameters():
        if value.grad is not None:
            assert value.grad.dtype == torch.float32 and value.grad.isfinite().all(), parameter


class Config:
    _experts_implementation = "moe_ext"


def make_experts(
    *,
    is_transposed=False,
    has_bias=False,
    has_gate=True,
    is_concatenated=True,
    has_post_expert_norm=False,
    own_gate=False,
    act=None,
):
    """A made-up experts module with the decorator's flags, and its own forward as the oracle."""
    E, H, I = 5, 12, 7

    class Experts(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts = E
            width = 2 * I if has_gate else I

            def weight(rows, columns):
                shape = (E, columns, rows) if is_transposed else (E, rows, columns)
                return nn.Parameter(torch.randn(shape, dtype=torch.float64) / columns**0.5)

            up = "gate_up_proj" if has_gate else "up_proj"
            setattr(self, up, weight(width, H))
            self.down_proj = weight(H, I)
            if has_bias:
                setattr(self, f"{up}_bias", nn.Parameter(torch.randn(E, width).double()))
                self.down_proj_bias = nn.Parameter(torch.randn(E, H).double())
            self.act_fn = act or nn.SiLU()
            self.post_expert_norm = nn.RMSNorm(H, eps=1e-6).double()

        def forward(self, hidden_states, top_k_index, top_k_weights):
            up = "gate_up_proj" if has_gate else "up_proj"
            out = torch.zeros_like(hidden_states)
            for k in range(top_k_index.shape[1]):
                for t in range(len(hidden_states)):
                    e = int(top_k_index[t, k])
                    if e >= self.num_experts:
                        continue

                    def linear(x, name, e=e):
                        w = getattr(self, name)[e]
                        y = x @ (w if is_transposed else w.T)
                        return y + getattr(self, f"{name}_bias")[e] if has_bias else y

                    h = linear(hidden_states[t], up)
                    if not has_gate:
                        h = self.act_fn(h)
                    elif own_gate or not is_concatenated:
                        h = self._apply_gate(h)
                    else:
                        h = self.act_fn(h[:I]) * h[I:]
                    y = linear(h, "down_proj")
                    if has_post_expert_norm:
                        y = self.post_expert_norm(y)
                    out = out.index_add(
                        0, torch.tensor([t]), (y * top_k_weights[t, k])[None].to(out.dtype)
                    )
            return out

    if own_gate or not is_concatenated:
        Experts._apply_gate = lambda self, h: torch.tanh(h[..., ::2]) * (h[..., 1::2] + 1)
    eager = Experts.forward
    decorated = use_experts_implementation(
        is_transposed=is_transposed,
        has_bias=has_bias,
        has_gate=has_gate,
        is_concatenated=is_concatenated,
        has_post_expert_norm=has_post_expert_norm,
    )(Experts)
    return decorated(Config()), eager


FLAGS = [
    {},
    {"has_bias": True},
    {"is_transposed": True},
    {"is_transposed": True, "has_bias": True, "is_concatenated": False},
    {"has_gate": False, "act": transformers.activations.ReLUSquaredActivation()},
    {"has_gate": False, "has_bias": True, "act": nn.Tanh()},  # not one of ours
    {"has_post_expert_norm": True},
    {"own_gate": True},
    {"own_gate": True, "is_transposed": True, "has_post_expert_norm": True, "has_bias": True},
    {"act": transformers.activations.GELUTanh()},
    {"act": transformers.activations.NewGELUActivation()},
    {"act": transformers.activations.GELUActivation()},
    {"act": nn.functional.gelu},
    {"act": nn.Mish()},
]


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: "-".join(flags) or "default")
@pytest.mark.parametrize("sentinels", [False, True])
def test_every_flag(flags, sentinels):
    experts, eager = make_experts(**flags)
    tokens = torch.randn(9, 12, dtype=torch.float64)
    ids = torch.rand(9, 5).argsort(1)[:, :3]
    weights = torch.rand(9, 3)  # another dtype than the tokens
    if sentinels:  # expert parallelism: some slots belong to other ranks
        experts._is_expert_parallel = True
        drop = torch.rand(9, 3) < 0.5
        drop[4] = True
        ids, weights = ids.masked_fill(drop, 5), weights.masked_fill(drop, 0)
    results = []
    for forward in (experts.__class__.forward, eager):
        experts.zero_grad()
        x, w = tokens.clone().requires_grad_(), weights.clone().requires_grad_()
        out = forward(experts, x, ids, w)
        out.square().sum().backward()
        grads = {name: p.grad for name, p in experts.named_parameters() if p.grad is not None}
        results.append({"out": out.detach(), "x": x.grad, "w": w.grad.double(), **grads})
    ours, expected = results
    for name, value in expected.items():
        tolerance = 1e-6 if name == "w" else 1e-7  # the weights are fp32
        assert relative_error(ours[name], value) < tolerance, name
    if sentinels:
        assert not ours["out"][4].any() and not ours["x"][4].any()
        assert not ours["w"][drop].any()


def test_frozen_experts():
    experts, _ = make_experts(has_bias=True)
    experts.requires_grad_(False)
    x = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    experts(x, torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1)).sum().backward()
    assert x.grad is not None and all(p.grad is None for p in experts.parameters())


def test_gradient_checkpointing():
    model = make_model("qwen3_moe", "moe_ext").train()
    ids = torch.randint(3, 64, (2, 12))
    logits, grads = run(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again, grads_again = run(model, ids)
    assert torch.equal(logits, again)
    for name, grad in grads.items():
        assert torch.equal(grad, grads_again[name]), name


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_compile(name):
    model = make_model(name, "moe_ext")
    ids = torch.randint(3, 64, (2, 12))
    compiled = torch.compile(
        lambda ids: model(ids, use_cache=False).logits, fullgraph=True, backend="aot_eager"
    )
    with torch.no_grad():
        assert relative_error(compiled(ids), model(ids).logits) < 1e-5
    compiled(ids).square().mean().backward()
    assert model.model.layers[0].mlp.experts.gate_up_proj.grad.any()


def test_training_and_saving(tmp_path):
    model = make_model("mixtral", "moe_ext").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.randint(3, 64, (4, 12))
    losses = []
    for _ in range(15):
        loss = model(ids, labels=ids, output_router_logits=True).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    model.save_pretrained(tmp_path)
    assert "moe_ext" not in (tmp_path / "config.json").read_text()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, experts_implementation="moe_ext"
    )
    with torch.no_grad():
        assert relative_error(loaded(ids).logits, model.eval()(ids).logits) < 1e-5


def test_names():
    model = make_model("mixtral")
    model.set_experts_implementation("moe_ext")
    assert model.config._experts_implementation == "moe_ext"
    with pytest.raises(ValueError):
        model.set_experts_implementation("no_such_thing")


def entropy_share(probs) -> float:
    """The mean over tokens of -sum p log p, as a share of log E."""
    probs = probs.detach().double()
    return (-(probs * probs.log()).sum(-1).mean() / math.log(probs.shape[-1])).item()


def routers_of(model) -> list[nn.Module]:
    return [m for m in model.modules() if type(m).__name__.endswith(("TopKRouter", "TopkRouter"))]


def everything_on(model) -> list:
    return [
        (sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()
    ]


HOWS = ["reentrant", "non-reentrant", "compiled", "autocast"]


@pytest.mark.parametrize(
    "name,how", [*((name, "plain") for name in MODELS), *(("mixtral", how) for how in HOWS)]
)
def test_monitors_entropy(name, how, device):
    """By hand from the routers' weights and inputs; once, in training only, and nothing stays."""
    model = make_model(name, "moe_ext").train()
    if "reentrant" in how:
        model.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
        model.enable_input_require_grads()  # else the reentrant one has no backward
    ids = torch.randint(3, 60, (2, 9))
    inputs = []
    hooks = [
        r.register_forward_hook(lambda _, x, y: inputs.append(x[0])) for r in routers_of(model)
    ]
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=how == "autocast"):
        model(ids, use_cache=False)
    [hook.remove() for hook in hooks]
    expected = []
    for router, x in zip(routers_of(model), inputs, strict=True):
        x, weight = x.detach().reshape(18, -1), router.weight.detach()
        if how == "autocast":
            x, weight = x.bfloat16(), weight.bfloat16()
        logits = nn.functional.linear(x, weight).float() + getattr(router, "bias", 0)
        probs = logits.softmax(-1)
        if name in ("deepseek_v3", "nemotron_h"):
            probs = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
        expected.append(entropy_share(probs))

    def forward(ids):
        return model(ids, use_cache=False).logits

    if how == "compiled":  # before the monitor comes
        forward = torch.compile(forward, fullgraph=True, backend="aot_eager")
        forward(ids).sum().backward()
    before = everything_on(model)
    with Monitor(model, every=1, peak_flops=1e12, guard=None) as monitor:
        with torch.autocast(device, torch.bfloat16, enabled=how == "autocast"):
            for _ in range(2):
                forward(ids).sum().backward()
            with torch.no_grad():
                model.eval()(ids)
        monitor.step(1.0)
        model.train()
    assert [x["entropy"] for x in monitor.records[0]["layers"]] == pytest.approx(expected, rel=1e-5)
    assert 0.1 < min(expected) and max(expected) < 0.999
    assert monitor.records[0]["tokens_per_second"] == 36
    assert everything_on(model) == before
    forward(ids).sum().backward()
    torch.compiler.reset()


@pytest.mark.parametrize("name,function", [("mixtral", "softmax"), ("deepseek_v3", "sigmoid")])
def test_entropy_is_that_of_our_layer(name, function):
    model = make_model(name, "moe_ext").train()
    router, inputs = routers_of(model)[-1], []
    E, H = router.weight.shape
    ours = moe_ext.MoE(H, 8, E, 2, score_function=function, balance="none")
    ours.router.weight.data.copy_(router.weight)
    router.register_forward_hook(lambda _, x, y: inputs.append(x[0].detach()))
    with Monitor(model, every=1, guard=None) as monitor, Monitor(ours, every=1, guard=None) as mine:
        model(torch.randint(3, 60, (2, 9)))
        ours(inputs[0])
        monitor.step()
        mine.step()
    entropy = monitor.records[0]["layers"][-1]["entropy"]
    assert entropy == pytest.approx(mine.records[0]["layers"][0]["entropy"], rel=1e-5)


class TestUnusualRouters:
    """What is not known is None; what is known, is right."""

    class Softmax(nn.Module):
        def forward(self, x):
            return (x.softmax(-1),)

    class Both(nn.Module):
        def forward(self, x):
            return (x.sigmoid() if self.training else x.softmax(-1),)

    class Neither(nn.Module):
        def forward(self, x):
            return (x,)

    def entropy(self, router, routers=1, runs=True, named=True):
        experts, _ = make_experts()
        model = nn.Module()
        model.block = nn.Module()
        model.block.experts = experts
        for i in range(routers):
            model.block.add_module(f"router{i}", router())
        if named:
            recorder = OutputRecorder(router, index=0)
            model._can_record_outputs = {"router_logits": recorder}
        logits = torch.randn(9, 5, dtype=torch.float64)
        with Monitor(model, every=1, peak_flops=1e12) as monitor:
            if runs:
                model.block.router0(logits)
            experts(torch.randn(9, 12).double(), logits.topk(2).indices, torch.rand(9, 2))
            monitor.step()
        return monitor.records[0]["layers"][0]["entropy"], entropy_share(logits.softmax(-1))

    def test_probabilities_named_logits(self):  # Gemma 4, transformers 5.0's Mixtral
        entropy, expected = self.entropy(self.Softmax)
        assert entropy == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize(
        "router,options",
        [
            ("Both", {}),
            ("Neither", {}),
            ("Softmax", {"routers": 2}),
            ("Softmax", {"runs": False}),
            ("Softmax", {"named": False}),
        ],
    )
    def test_unknown(self, router, options):
        entropy, _ = self.entropy(getattr(self, router), **options)
        assert entropy is None


def test_copies_of_a_watched_model(tmp_path):
    """Its hooks can be copied and pickled, and a copy adds nothing to the monitor."""
    model = make_model("mixtral", "moe_ext").train()
    with Monitor(model, every=1, guard=None) as monitor:
        torch.save(model, tmp_path / "model.pt")
        copy.deepcopy(model)(torch.randint(3, 60, (2, 9)))
        monitor.step()
    assert monitor.records[0]["layers"][0]["entropy"] is None


def test_trainer(tmp_path):
    """The optimizer that Trainer gives its callbacks, wrapped by accelerate."""
    pytest.importorskip("accelerate")
    model = make_model("mixtral", "moe_ext")
    data = [{"input_ids": x, "labels": x} for x in torch.randint(3, 60, (16, 8), device="cpu")]
    monitors = []

    class Watch(transformers.TrainerCallback):
        def on_train_begin(self, *arguments, model, optimizer, **rest):
            monitors.append(Monitor(model, every=1, optimizer=optimizer, guard=None))

    arguments = transformers.TrainingArguments(
        tmp_path,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=3,
        report_to="none",
        use_cpu=True,
    )
    with torch.device("cpu"):
        trainer = transformers.Trainer(model.cpu(), arguments, train_dataset=data)
        trainer.add_callback(Watch)
        trainer.train()
    (monitor,) = monitors
    monitor.close()
    assert [record["step"] for record in monitor.records] == [1, 2, 3]
    for layer in monitor.records[1]["layers"]:
        assert sum(layer["tokens_per_expert"]) == 4 * 8 * 2 and 0 < layer["entropy"] < 1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_monitor(checkpointing):
    """moe_ext.monitor sees the experts of a Hugging Face model, each forward once."""
    model = make_model("mixtral", "moe_ext").train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(3, 60, (2, 9))
    logits = model(ids, output_router_logits=True).router_logits
    with Monitor(model, every=1, peak_flops=1e12) as monitor:
        model(ids, labels=ids).loss.backward()
        monitor.step(1.0)
    (record,) = monitor.records
    assert [layer["name"] for layer in record["layers"]] == [
        f"model.layers.{i}.mlp.experts" for i in range(2)
    ]
    for layer, z in zip(record["layers"], logits, strict=True):
        expected = torch.bincount(z.topk(2).indices.flatten(), minlength=4)
        assert layer["tokens_per_expert"] == expected.tolist()
        assert layer["entropy"] == pytest.approx(entropy_share(z.softmax(-1)), rel=1e-5)
        assert layer["aux_loss"] is None and layer["dropped"] == 0
    assert record["tokens_per_second"] == 18
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    others = sum(
        p.numel()
        for n, p in model.named_parameters()
        if ".experts." not in n and p.dim() >= 2 and "embed" not in n
    )
    assert active_flops_per_token(model) == 6 * (others + experts // 2)
    eager = make_model("mixtral", "eager")
    with pytest.raises(ValueError, match="Monitor: model must have a layer of moe_ext"):
        Monitor(eager)
