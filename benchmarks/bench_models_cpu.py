"""A model of the shape of Qwen3-MoE through transformers on the CPU: prefill, decoding and training
steps, with its experts by us and by transformers' own implementations, in turns.

`make bench-cpu` keeps every row in benchmarks/results/models_cpu-<CPU model>.json and .png. All
contenders run the same model object: only the implementation of its experts is switched. Their
outputs are compared before, for a training step in fp32 all gradients too.
"""

import dataclasses
import functools

import pytest
import torch
from harness.device import separate_peaks
from harness.figures import draw_bars
from harness.results import (
    cpu_model,
    faster_than,
    keep_row,
    machine,
    milliseconds,
    path_of,
    per_second,
    say,
    with_allocator,
)
from harness.timing import Agreement
from harness.work import Work

transformers = pytest.importorskip("transformers")

import moe_ext.integrations.transformers  # noqa: E402, F401

LAYERS, VOCABULARY, HEAD = 4, 4096, 64
NEW_TOKENS = 16
SECONDS = 5.0  # of a row
CONTENDERS = ["moe_ext", "grouped_mm", "eager"]
SHAPES = [(1024, 384, 64, 8), (768, 256, 64, 8)]  # (H, I, E, K)
DTYPES = [torch.bfloat16, torch.float32]
# Routers of random weights have near-ties. Where the implementations round differently, bf16 tips
# some of them, and those tokens go to another expert, which gradients of rare experts feel most. A
# mix-up is off by about 1.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.25}


@functools.lru_cache(maxsize=1)  # a module's parameters: pytest sorts the tests by them
def make_model(work: Work):
    """With that many experts of that size in each layer; work.T doesn't matter."""
    heads = max(4, work.H // HEAD)
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=work.H,
        moe_intermediate_size=work.I,
        num_experts=work.E,
        num_experts_per_tok=work.K,
        norm_topk_prob=True,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        num_key_value_heads=4,
        head_dim=work.H // heads,
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=work.dtype)


def model_and_ids(benchmark, shape, dtype, batch: int, length: int):
    """The model, token ids [batch, length], and both as a Work."""
    work = Work(*shape, batch * length, dtype)
    if benchmark.disabled:
        work = dataclasses.replace(work.smoke(), T=work.T)
    model = make_model(dataclasses.replace(work, T=0))
    torch.manual_seed(1)
    return model, torch.randint(VOCABULARY, (batch, length)), work


def compare(benchmark, take_turns, kind: str, work: Work, model, call, peers, tokens: int):
    turns = take_turns(
        {peer: call for peer in peers},
        seconds=SECONDS,
        before=model.set_experts_implementation,
        agreement=agreement(work),
    )
    best = turns.best()
    rates = per_second(tokens, best, 1)
    row = {
        "kind": kind,
        "work": str(work),
        "layers": LAYERS,
        "best_ms": milliseconds(best),
        "median_ms": milliseconds(turns.median()),
        "tokens_per_s": rates,
        "faster_than": faster_than(best),
    }
    benchmark.extra_info.update(row)
    if not benchmark.disabled:
        keep(row)
        print()
        say(f"{kind} {work}", best, rates, "tokens/s")


def agreement(work: Work) -> Agreement:
    agreement = Agreement(work.dtype)
    agreement.tolerance = TOLERANCE[work.dtype]
    return agreement


pytestmark = [
    pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp32"], scope="module"),
    pytest.mark.parametrize("shape", SHAPES, ids=["H1024-I384", "H768-I256"], scope="module"),
]


@pytest.mark.parametrize("length", [512, 64])
def test_prefill(benchmark, take_turns, shape, dtype, length):
    model, ids, work = model_and_ids(benchmark, shape, dtype, 1, length)
    model.eval()

    @torch.inference_mode()
    def prefill():
        return model(ids, use_cache=True, logits_to_keep=1).logits

    compare(benchmark, take_turns, "prefill", work, model, prefill, CONTENDERS, length)


@pytest.mark.parametrize("batch", [1, 8])
def test_decode(benchmark, take_turns, shape, dtype, batch):
    """Token by token with a cache of keys and values. The tokens are given, so that all contenders
    have the same work."""
    steps = NEW_TOKENS if not benchmark.disabled else 2
    model, ids, work = model_and_ids(benchmark, shape, dtype, batch, steps)
    work = dataclasses.replace(work, T=batch)
    model.eval()

    @torch.inference_mode()
    def decode():
        cache, logits = transformers.DynamicCache(config=model.config), []
        for token in ids.split(1, dim=1):
            out = model(token, past_key_values=cache, use_cache=True)
            logits.append(out.logits)
            out.logits.argmax(-1)  # what greedy decoding would take
        return logits

    # batched_mm copies an expert's weights for every row.
    peers = [*CONTENDERS, "batched_mm"] if batch == 1 else CONTENDERS
    compare(benchmark, take_turns, "decode", work, model, decode, peers, batch * steps)


def test_train(benchmark, take_turns, shape, dtype):
    """A step with AdamW, fused as Trainer has it by default. The contenders step on in turn; the
    steps are too small to tell their losses apart."""
    model, ids, work = model_and_ids(benchmark, shape, dtype, 2, 256)
    model.train()
    separate_peaks(3 * sum(parameter.nbytes for parameter in model.parameters()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-7, fused=True)

    def loss_and_backward():
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss.detach()

    def step():
        loss = loss_and_backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    gradients = agreement(work)
    for peer in CONTENDERS:
        model.set_experts_implementation(peer)
        loss = loss_and_backward()
        # A token that bf16 sends to another expert moves whole gradients.
        exact = dtype == torch.float32
        gradients.check(peer, [loss, *(p.grad for p in model.parameters() if exact)])
        optimizer.zero_grad()
    compare(benchmark, take_turns, "train", work, model, step, CONTENDERS, ids.numel())


def keep(row: dict) -> None:
    """Puts the row into this CPU model's results, and draws every contender's speed beside ours."""
    path = path_of("models_cpu", cpu_model())
    facts = machine()
    rows = keep_row(path, facts, with_allocator(row), ("kind", "work"))
    ours = [r["tokens_per_s"]["moe_ext"] for r in rows]
    draw_bars(
        path.with_suffix(".png"),
        [f"{r['kind']} {r['work']}" for r in rows],
        {
            name: [r["tokens_per_s"].get(name, 0) / own for r, own in zip(rows, ours, strict=True)]
            for name in [*CONTENDERS, "batched_mm"]
        },
        title=f"{LAYERS} layers, {facts['cpu']}, {facts['threads']} threads, torch "
        f"{facts['torch']}, transformers {facts['transformers']}",
        unit="tokens per second, ours = 1",
    )
