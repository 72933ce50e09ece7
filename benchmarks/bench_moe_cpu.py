"""Experts on the CPU: ours, everyone else's, and the machine's ceilings, taken in turns.

`make bench-cpu` keeps every row in benchmarks/results/moe_cpu-<CPU model>.json and .png.
Peers that are not installed are left out (zentorch is no dependency of ours: pip install it beside
torch).
Each row's rounds go through all competitors one after the other, so that a noisy machine is noisy
for all of them; the best round of each counts.
"""

import copy
import dataclasses
import gc
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import ceilings
import pytest
import torch
from conftest import cpu_model
from moe_peers import PEERS, Inputs, Work, forget, forward, train_step

import moe_ext

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SECONDS = 3.0  # of a row
WIDE = ["moe_ext", "grouped_mm", "zentorch", "dense", "reference", "eager", "batched_mm"]
CLOSE = ["moe_ext", "grouped_mm", "zentorch", "dense"]

BIG = [Work(2048, 768, 128, 8, 1024), Work(2048, 1024, 64, 8, 512), Work(1024, 3584, 8, 2, 1024)]
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


def shrink(work: Work) -> Work:
    """The same kind of work in no time, for --benchmark-disable."""
    return dataclasses.replace(work, H=64, I=32, E=8, K=2, T=min(work.T, 16))


def take_turns(benchmark, calls: dict, ceiling) -> tuple[dict, float]:
    """Best seconds of every call and the best of the ceiling, all in turns; ours by benchmark."""
    best = {}
    for name, call in calls.items():
        start = time.perf_counter()
        call()
        best[name] = time.perf_counter() - start
    if benchmark.disabled:
        benchmark(calls["moe_ext"])
        return best, float("nan")
    rounds = max(3, min(2000, int(SECONDS / sum(best.values()))))
    best = dict.fromkeys(calls, float("inf"))
    peak = [0.0]
    turns = [0]

    def others():
        turns[0] += 1
        if turns[0] % max(1, rounds // 30) == 0:
            peak[0] = max(peak[0], ceiling())
        for name, call in calls.items():
            if name != "moe_ext":
                start = time.perf_counter()
                call()
                best[name] = min(best[name], time.perf_counter() - start)

    benchmark.pedantic(calls["moe_ext"], setup=others, rounds=rounds, warmup_rounds=1)
    best["moe_ext"] = benchmark.stats.stats.min
    return best, max(peak[0], ceiling())


def report(benchmark, kind: str, work: Work, best: dict, peak: float, *, flops=0, moved=0):
    """A row: work per second, in multiply-adds' flops or in bytes moved, beside its ceiling."""
    unit, share = ("gflops", "of_ceiling") if flops else ("gbytes_per_s", "of_read_ceiling")
    ours = best["moe_ext"]
    row = {
        "kind": kind,
        "work": str(work),
        "best_ms": {name: t * 1e3 for name, t in best.items()},
        unit: {name: (flops or moved) / t / 1e9 for name, t in best.items()},
        f"ceiling_{unit}": peak / 1e9,
        share: (flops or moved) / ours / peak,
        "faster_than": {name: t / ours for name, t in best.items() if name != "moe_ext"},
    }
    benchmark.extra_info.update(row)
    if not benchmark.disabled:
        keep(row)
        versus = "  ".join(f"{n} {x:.2f}x" for n, x in row["faster_than"].items())
        print(
            f"\n{kind:9} {work!s:38} {ours * 1e3:9.3f} ms {row[unit]['moe_ext']:6.1f} {unit} "
            f"= {row[share]:.2f} of ceiling | {versus}"
        )


def compare(benchmark, kind: str, work: Work, peers: list[str]):
    if benchmark.disabled:
        work = shrink(work)
    train = kind == "train"
    x = Inputs.make(work, train)
    make = train_step if train else forward
    calls = {p: make(p, work, copy.copy(x)) for p in peers if p in PEERS}
    best, peak = take_turns(benchmark, calls, lambda: ceilings.flops_per_second(work.dtype))
    report(benchmark, kind, work, best, peak, flops=work.flops * (3 if train else 1))


@pytest.mark.parametrize("work", FORWARD, ids=str)
def test_forward(benchmark, work):
    # batched_mm copies an expert's weights for every row: only where that is possible at all.
    peers = WIDE if work.T * work.K <= 64 else [p for p in WIDE if p != "batched_mm"]
    compare(benchmark, "forward", work, peers if work in BIG or work.T <= 64 else CLOSE)


@pytest.mark.parametrize("work", TRAIN, ids=str)
def test_train(benchmark, work):
    peers = [p for p in CLOSE if p != "zentorch"]  # which has no backward
    if work.E == 8 and work.dtype != FP16:  # with many experts eager takes minutes
        peers += ["reference", "eager"]
    if work.dtype == FP16 and work.flops > 1e10:  # at which torch takes minutes
        peers = ["moe_ext"]
    compare(benchmark, "train", work, peers)


@pytest.mark.parametrize("kind", ["forward", "train"])
@pytest.mark.parametrize("work", SMALL, ids=str)
def test_small(benchmark, work, kind):
    compare(benchmark, kind, work, [p for p in WIDE if kind == "forward" or p != "zentorch"])


@pytest.mark.parametrize("name", list(DECODE))
def test_decode(benchmark, name):
    """A layer after the other, as a model does, so that no cache holds the weights; or just one."""
    work, layers = DECODE[name]
    if benchmark.disabled:
        work = shrink(work)
    inputs = [Inputs.make(work, train=False) for _ in range(layers)]
    for layer, x in enumerate(inputs):
        torch.manual_seed(layer)
        x.ids = work.ids()
    peers = [p for p in CLOSE if p in PEERS and p != "dense"]
    each = {p: [forward(p, work, copy.copy(x)) for x in inputs] for p in peers}
    calls = {p: (lambda layers=layers: [call() for call in layers]) for p, layers in each.items()}
    best, peak = take_turns(benchmark, calls, ceilings.read_bytes_per_second)
    moved = sum(work.active_bytes(x.ids) for x in inputs)
    report(benchmark, f"decode {name}", work, best, peak, moved=moved)


@pytest.mark.parametrize("kind", ["forward", "train"])
@pytest.mark.parametrize("work", ABLATION, ids=str)
def test_ablation(benchmark, work, kind):
    """What each step brings: instruction sets, and fusing."""
    if benchmark.disabled:
        work = shrink(work)
    x = Inputs.make(work, kind == "train")
    make = train_step if kind == "train" else forward
    ours = make("moe_ext", work, copy.copy(x))
    chosen = moe_ext.cpu_isa()

    def on(isa):
        def call():
            moe_ext.set_cpu_isa(isa)
            ours()
            moe_ext.set_cpu_isa(chosen)

        return call

    calls = {"moe_ext": ours, "unfused": make("unfused", work, copy.copy(x))}
    calls.update({isa: on(isa) for isa in ISAS[: ISAS.index(chosen)]})
    best, peak = take_turns(benchmark, calls, lambda: ceilings.flops_per_second(work.dtype))
    flops = work.flops * (3 if kind == "train" else 1)
    report(benchmark, f"ablation {kind}", work, best, peak, flops=flops)


def test_peak_memory(benchmark):
    work = BIG[0] if not benchmark.disabled else shrink(BIG[0])
    sizes = [str(size) for size in (work.H, work.I, work.E, work.K, work.T)]
    script = str(Path(__file__).with_name("peak_memory.py"))

    def measure(peer):
        command = [sys.executable, script, peer, *sizes]
        # Without make's allocator settings: what is freed is to be gone.
        result = subprocess.run(command, env={}, check=True, capture_output=True, text=True)
        return float(result.stdout)

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
    """Puts the row in the results of this CPU model, in place of the same row of an earlier run."""
    slug = re.sub(r"[^a-z0-9]+", "-", cpu_model().lower()).strip("-")
    path = Path(__file__).parent / "results" / f"moe_cpu-{slug}.json"
    machine = {
        "cpu": cpu_model(),
        "instruction_set": moe_ext.cpu_isa(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "peers": sorted(PEERS),
    }
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    key = (row["kind"], row["work"])
    rows = [old for old in rows if (old["kind"], old["work"]) != key] + [row]
    rows.sort(key=lambda row: (row["kind"], row["work"]))
    path.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    draw(machine, rows, path.with_suffix(".png"))


def draw(machine: dict, rows: list[dict], path: Path) -> None:
    """Share of the ceiling of every competitor, for the rows with one."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = [r for r in rows if "ceiling_gflops" in r and not r["kind"].startswith("ablation")]
    drawn = [r for r in drawn if r["of_ceiling"] > 0.2]
    names = [n for n in ("moe_ext", "zentorch", "grouped_mm", "dense") if n in PEERS]
    figure, axes = plt.subplots(figsize=(9, 0.42 * len(drawn) + 1.2), layout="constrained")
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        places = [y + (i - len(names) / 2 + 0.5) * height for y in range(len(drawn))]
        shares = [r["gflops"].get(name, 0) / r["ceiling_gflops"] for r in drawn]
        axes.barh(places, shares, height, label=name)
    axes.set_yticks(range(len(drawn)), [f"{r['kind']} {r['work']}" for r in drawn], fontsize=7)
    axes.set_ylim(len(drawn) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the measured multiply-add ceiling")
    axes.set_title(
        f"{machine['cpu']}, {machine['threads']} threads, {machine['instruction_set']}, "
        f"torch {machine['torch']}",
        fontsize=9,
    )
    figure.legend(fontsize=8, loc="outside lower center", ncols=len(names))
    figure.savefig(path, dpi=120)
    plt.close(figure)
