"""Experts on the CPU: ours, everyone else's, and the machine's ceilings, taken in turns.

`make bench-cpu` keeps every row in benchmarks/results/moe_cpu-<CPU model>.json and .png. Rows are
of the default environment; those of a process with a tuned allocator say so in their kind.
Peers that are not installed are left out (zentorch is no dependency of ours: pip install it beside
torch).
The outputs of all competitors are compared before; the best round of each counts.
"""

import dataclasses
import gc
from pathlib import Path

import pytest
import torch
from harness.ceilings import Ceilings
from harness.device import Device, in_own_process, separate_peaks
from harness.figures import draw_bars
from harness.peers import PEERS, UNLIKE, call_of, forget
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
from harness.timing import Agreement, Turns
from harness.work import MODELS, Inputs, Work

import moe_ext

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SECONDS = 3.0  # of a row
CEILINGS = Ceilings(Device())
WIDE = ["moe_ext", "grouped_mm", "zentorch", "dense", "reference", "eager", "batched_mm"]
CLOSE = ["moe_ext", "grouped_mm", "zentorch", "dense"]
PACKED = ["moe_ext", "moe_ext packed", "zentorch"]

BIG = [
    Work(*MODELS["Qwen3-30B-A3B"], 1024),
    Work(*MODELS["OLMoE"], 512),
    Work(1024, 3584, 8, 2, 1024),
]
FORWARD = [
    *[dataclasses.replace(work, dtype=dtype) for dtype in (BF16, FP32) for work in BIG],
    dataclasses.replace(BIG[1], skew=True),
    *[Work(1024, 768, 32, 4, T) for T in (1, 8, 64, 512, 8192)],
    # 4, 12 and 32 rows per expert.
    *[Work(2048, 768, 64, 4, T, dtype) for dtype in (BF16, FP32) for T in (64, 192, 512)],
    # Equal work per row, more and more experts, 64 and 32 rows each.
    *[Work(1024, 512, E, 8, rows * E // 8) for rows in (64, 32) for E in (8, 64, 512)],
]
TRAIN = [
    *[dataclasses.replace(work, dtype=dtype) for dtype in (BF16, FP32) for work in BIG],
    dataclasses.replace(BIG[1], skew=True),
    Work(512, 512, 8, 2, 256, FP16),
    Work(1024, 3584, 8, 2, 1024, FP16),
    # Equal work per row, more and more experts, 64 rows each.
    *[Work(1024, 512, E, 8, 64 * E // 8) for E in (8, 64, 512)],
]
TRANSPOSED = [  # GPT-OSS's layout
    (kind, Work(768, 768, 32, 4, T, dtype, transposed=True))
    for dtype in (BF16, FP32)
    for kind, T in (("forward", 1), ("forward", 64), ("forward", 512), ("train", 512))
]
# 4 to 128 rows per expert, plain and packed.
PACK = [
    *[Work(1024, 512, 64, 8, rows * 8) for rows in (4, 8, 16, 32, 64, 128)],
    *[Work(1024, 512, 64, 8, rows * 8, FP32) for rows in (4, 16, 64)],
    *[Work(2048, 1024, 64, 8, rows * 8) for rows in (32, 64, 128)],
]
SMALL = [Work(64, 128, 8, 2, T, FP32) for T in (1, 64)]
DECODE = {  # name: (work, layers in turn)
    "memory": (Work(2048, 768, 128, 8, 1), 4),
    "memory-T8": (Work(2048, 768, 128, 8, 8), 2),
    "memory-fp32": (Work(2048, 768, 128, 8, 1, FP32), 2),
    "cache": (Work(512, 256, 16, 4, 1), 1),
}
ABLATION = [Work(1024, 1024, 8, 2, 1024, dtype) for dtype in (BF16, FP32)]
ISAS = ["generic", "avx2", "avx512", "avx512_bf16"]


def report(benchmark, kind: str, work: Work, turns: Turns, *, flops=0, moved=0):
    """A row: work per second, in multiply-adds' flops or in bytes moved, beside its ceiling."""
    unit, share = ("gflops", "of_ceiling") if flops else ("gbytes_per_s", "of_read_ceiling")
    best = turns.best()
    rates = per_second(flops or moved, best, 1e9)
    row = {
        "kind": kind,
        "work": str(work),
        "best_ms": milliseconds(best),
        unit: rates,
        f"ceiling_{unit}": turns.peak / 1e9,
        share: rates["moe_ext"] * 1e9 / turns.peak,
        "faster_than": faster_than(best),
    }
    benchmark.extra_info.update(row)
    if not benchmark.disabled:
        keep(row)
        print()
        say(f"{kind:9} {work}", best, rates, unit, turns.peak / 1e9)


def make_inputs(work: Work, train: bool) -> Inputs:
    """With train, contenders may keep the memory of their gradients between turns."""
    x = Inputs.make(work, train)
    if train:
        separate_peaks(3 * sum(leaf.nbytes for leaf in x.leaves))  # two steps' gradients, and more
    return x


def compare(benchmark, take_turns, kind: str, work: Work, peers: list[str]):
    if benchmark.disabled:
        work = work.smoke()
    x = make_inputs(work, kind == "train")
    direction = "train" if kind == "train" else "forward"
    calls = {p: call_of(direction, PEERS[p](work, x)) for p in peers if p in PEERS}
    turns = in_turns(take_turns, calls, work)
    report(benchmark, kind, work, turns, flops=work.flops(direction))


def in_turns(take_turns, calls: dict, work: Work, **options) -> Turns:
    ceiling = lambda: CEILINGS.flops_per_second(work.dtype)  # noqa: E731
    options = {"ceiling": ceiling, "agreement": Agreement(work.dtype, UNLIKE)} | options
    return take_turns(calls, seconds=SECONDS, **options)


@pytest.mark.parametrize("work", FORWARD, ids=str)
def test_forward(benchmark, take_turns, work):
    # batched_mm copies an expert's weights for every row: only where that is possible at all.
    peers = WIDE if work.T * work.K <= 64 else [p for p in WIDE if p != "batched_mm"]
    compare(benchmark, take_turns, "forward", work, peers if work in BIG or work.T <= 64 else CLOSE)


@pytest.mark.parametrize("work", PACK, ids=str)
def test_packed(benchmark, take_turns, work):
    """What `moe_ext.pack_` brings where packing the weights every time is much of the work."""
    compare(benchmark, take_turns, "packed", work, PACKED)


@pytest.mark.parametrize("work", TRAIN, ids=str)
def test_train(benchmark, take_turns, work):
    peers = [p for p in CLOSE if p != "zentorch"]  # which has no backward
    if work.E == 8 and work.dtype != FP16:  # with many experts eager takes minutes
        peers += ["reference", "eager"]
    if work.dtype == FP16 and work.flops() > 1e10:  # at which torch takes minutes
        peers = ["moe_ext"]
    compare(benchmark, take_turns, "train", work, peers)


@pytest.mark.parametrize("kind", ["forward", "train"])
@pytest.mark.parametrize("work", SMALL, ids=str)
def test_small(benchmark, take_turns, work, kind):
    compare(
        benchmark, take_turns, kind, work, [p for p in WIDE if kind == "forward" or p != "zentorch"]
    )


@pytest.mark.parametrize("name", list(DECODE))
def test_decode(benchmark, take_turns, name):
    """A layer after the other, as a model does, so that no cache holds the weights; or just one."""
    work, layers = DECODE[name]
    if benchmark.disabled:
        work = work.smoke()
    inputs = [Inputs.make(work, train=False) for _ in range(layers)]
    for layer, x in enumerate(inputs):
        torch.manual_seed(layer)
        x.ids = work.ids()
    peers = [p for p in [*CLOSE, "moe_ext packed"] if p in PEERS and p != "dense"]
    each = {p: [call_of("forward", PEERS[p](work, x)) for x in inputs] for p in peers}
    calls = {p: (lambda layers=layers: [call() for call in layers]) for p, layers in each.items()}
    turns = in_turns(take_turns, calls, work, ceiling=CEILINGS.bytes_per_second)
    moved = sum(work.active_bytes(x.ids) for x in inputs)
    report(benchmark, f"decode {name}", work, turns, moved=moved)


@pytest.mark.parametrize("kind", ["forward", "train"])
@pytest.mark.parametrize("work", ABLATION, ids=str)
def test_ablation(benchmark, take_turns, work, kind):
    """What each step brings: instruction sets, and fusing."""
    if benchmark.disabled:
        work = work.smoke()
    x = Inputs.make(work, kind == "train")
    ours, unfused = (call_of(kind, PEERS[p](work, x)) for p in ("moe_ext", "unfused"))
    chosen = moe_ext.cpu_isa()
    slower = ISAS[: ISAS.index(chosen)]
    calls = {"moe_ext": ours, "unfused": unfused, **dict.fromkeys(slower, ours)}

    def choose(name):
        moe_ext.set_cpu_isa(name if name in slower else chosen)

    try:
        turns = in_turns(take_turns, calls, work, before=choose)
    finally:
        moe_ext.set_cpu_isa(chosen)
    report(benchmark, f"ablation {kind}", work, turns, flops=work.flops(kind))


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
def test_memory(benchmark, take_turns, dtype):
    """What reusing freed memory brings a training step. Huge pages stay on."""
    work = dataclasses.replace(BIG[0], dtype=dtype)
    if benchmark.disabled:
        work = work.smoke()
    x = make_inputs(work, train=True)
    step = call_of("train", PEERS["moe_ext"](work, x))

    def choose(name):
        moe_ext.set_memory_limit(0 if name == "no cache" else None)
        if name == "moe_ext":
            step()  # fills what the other's turn emptied

    try:
        turns = in_turns(take_turns, {"moe_ext": step, "no cache": step}, work, before=choose)
    finally:
        moe_ext.set_memory_limit(None)
    report(benchmark, "ablation memory train", work, turns, flops=work.flops("train"))


@pytest.mark.parametrize("kind, work", TRANSPOSED, ids=str)
def test_transposed(benchmark, take_turns, kind, work):
    """Weights whose rows and columns are exchanged in memory, beside the usual layout."""
    if benchmark.disabled:
        work = work.smoke()
    train = kind == "train"
    x = make_inputs(work, train)
    usual = Inputs.make(dataclasses.replace(work, transposed=False), train)
    inputs = {"moe_ext": ("moe_ext", x), "grouped_mm": ("grouped_mm", x)}
    inputs["row-major"] = ("moe_ext", usual)
    calls = {
        name: call_of(kind, PEERS[peer](work, x))
        for name, (peer, x) in inputs.items()
        if peer in PEERS
    }
    turns = in_turns(take_turns, calls, work)
    report(benchmark, kind, work, turns, flops=work.flops(kind))


def test_peak_memory(benchmark):
    work = BIG[0] if not benchmark.disabled else BIG[0].smoke()
    script = Path(__file__).with_name("peak_memory.py")

    def measure(peer):
        return in_own_process(script, peer, work.H, work.I, work.E, work.K, work.T)

    peers = [p for p in ("moe_ext", "grouped_mm") if p in PEERS]
    mib = benchmark.pedantic(lambda: {peer: measure(peer) for peer in peers}, rounds=1)
    benchmark.extra_info["peak_mib"] = mib
    if not benchmark.disabled:
        keep({"kind": "peak memory of a train step", "work": str(work), "mib": mib})
        print(f"\npeak memory {work}: {mib} MiB beyond inputs, parameters and gradients")


@pytest.fixture(autouse=True)
def _forget():
    yield
    gc.collect()
    forget()


def keep(row: dict) -> None:
    """Puts the row into this CPU model's results, and draws every contender's share of the
    ceiling, for the rows with one."""
    path = path_of("moe_cpu", cpu_model())
    facts = machine() | {"peers": sorted(PEERS)}
    rows = keep_row(path, facts, with_allocator(row), ("kind", "work"))
    drawn = [r for r in rows if "ceiling_gflops" in r and not r["kind"].startswith("ablation")]
    drawn = [r for r in drawn if r["of_ceiling"] > 0.2]
    names = [n for n in ("moe_ext", "zentorch", "grouped_mm", "dense") if n in PEERS]
    if drawn:
        draw_bars(
            path.with_suffix(".png"),
            [f"{r['kind']} {r['work']}" for r in drawn],
            {n: [r["gflops"].get(n, 0) / r["ceiling_gflops"] for r in drawn] for n in names},
            title=f"{facts['cpu']}, {facts['threads']} threads, {facts['instruction_set']}, "
            f"torch {facts['torch']}",
            unit="share of the measured multiply-add ceiling",
            limit=1,
        )
