"""Experts on a GPU: ours, everyone else's, and the GPU's ceilings, taken in turns.

    python benchmarks/bench_moe_cuda.py                 everything: about an hour
    python benchmarks/bench_moe_cuda.py --quick         a row of each kind: a minute or two
    python benchmarks/bench_moe_cuda.py --only decode   or forward, backward, train, rounding
    python benchmarks/bench_moe_cuda.py --profile trace.json   a train step under torch's profiler

Every row is kept in benchmarks/results/moe_cuda-<GPU>.json and drawn beside it. A row's rounds go
through all competitors one after the other; each call is timed by CUDA events after the L2 cache
was filled with something else, on one of several inputs in turn; the median counts. Numbers are
random: matrix products of zeros are faster. A competitor that runs out of memory is left out of its
row. Under Nsight Systems the operators' names are there by `--profile nvtx`.

    python benchmarks/bench_moe_cuda.py --device cpu --smoke   tries the script, keeps nothing
"""

import argparse
import copy
import dataclasses
import gc
import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from moe_peers import PEERS, Inputs, Work
from rich.progress import track

import moe_ext
from moe_ext import reference

ops = torch.ops.moe_ext
RESULTS = Path(__file__).parent / "results"

MODELS = {  # (H, I, E, K)
    "DeepSeek-V3": (7168, 2048, 256, 8),
    "DeepSeek-V3 H4096": (4096, 2048, 256, 8),
    "Qwen3-30B-A3B": (2048, 768, 128, 8),
    "OLMoE": (2048, 1024, 64, 8),
    "Mixtral": (4096, 14336, 8, 2),
}
TOKENS = (4096, 8192, 16384, 32768)
EIGHT = Work(2048, 8192, 8, 2, 16384)
DECODE_TOKENS = (1, 4, 16, 64, 256)
TILES = (None, 64, 128, 256)
SECONDS = 2.0  # of a row


def bmm(work: Work, x: Inputs):
    """The products alone, every expert with equally many rows: torch.bmm."""
    rows = torch.randn(work.E, -(-work.T * work.K // work.E), work.H, device=x.tokens.device)
    rows = rows.to(work.dtype).requires_grad_(x.tokens.requires_grad)
    x.parameters = [x.gate_up, x.down]
    x.leaves = [rows, *x.parameters]
    x.grad = torch.randn_like(rows)

    def run():
        hidden = torch.bmm(rows, x.gate_up.transpose(1, 2))
        return torch.bmm(hidden[..., : work.I], x.down.transpose(1, 2))

    return run


def grouped_products(work: Work, x: Inputs):
    """The products alone, by torch's grouped product."""
    counts = ops._tokens_per_expert(x.ids, work.E)
    offsets = counts.cumsum(0).int()
    rows = torch.randn(work.T * work.K, work.H, device=x.tokens.device)
    rows = rows.to(work.dtype).requires_grad_(x.tokens.requires_grad)
    x.leaves = [rows, x.gate_up, x.down]
    x.grad = torch.randn_like(rows)

    def run():
        hidden = torch._grouped_mm(rows, x.gate_up.transpose(1, 2), offs=offsets)
        activated = hidden[:, : work.I].contiguous()
        return torch._grouped_mm(activated, x.down.transpose(1, 2), offs=offsets)

    return run


def compiled_reference(work: Work, x: Inputs):
    compiled = torch.compile(reference.moe_ffn)
    return lambda: compiled(x.tokens, x.weights, x.ids, x.gate_up, x.down)


COMPETITORS = {
    "moe_ext": PEERS["moe_ext"],
    "grouped_mm": PEERS.get("grouped_mm"),
    "eager": PEERS.get("eager"),
    "reference": PEERS["reference"],
    "compiled reference": compiled_reference,
    "_grouped_mm alone": grouped_products,
    "dense": PEERS["dense"],
    "bmm": bmm,
}
COMPETITORS = {name: make for name, make in COMPETITORS.items() if make}
SLOW = {"eager", "reference", "compiled reference"}  # they go expert by expert


class Device:
    """How to wait, to time and to count memory there."""

    def __init__(self, name: str):
        self.name = name
        self.is_cuda = name == "cuda"
        self.scratch = torch.zeros(2**26 if self.is_cuda else 1, device=name)  # 256 MiB

    def seconds(self, call: Callable) -> float:
        """Of one call, with nothing of it in the L2 cache."""
        self.scratch.zero_()
        if not self.is_cuda:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def peak_bytes(self, call: Callable) -> int:
        """What a call has at most beyond what is there before it."""
        if not self.is_cuda:
            return 0
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def kept_bytes(self, forward: Callable) -> int:
        """What a forward keeps for backward, its output aside."""
        if not self.is_cuda:
            return 0
        before = torch.cuda.memory_allocated()
        out = forward()
        return torch.cuda.memory_allocated() - before - out.nbytes

    def copy_bytes_per_second(self) -> float:
        """Read and written."""
        size = 2**30 if self.is_cuda else 2**20
        a, b = (torch.empty(size, dtype=torch.uint8, device=self.name) for _ in range(2))
        return 2 * size / statistics.median(self.seconds(lambda: b.copy_(a)) for _ in range(10))


def in_turns(device: Device, calls: dict[str, list[Callable]], smoke: bool) -> dict[str, float]:
    """Median seconds of every competitor; a list holds the same call on several inputs."""
    times = {name: [] for name in calls}
    for name, each in list(calls.items()):
        try:
            for call in each:
                call()  # warm-up: libraries, compilers, allocator
            times[name].append(device.seconds(each[0]))
        except torch.cuda.OutOfMemoryError:
            print(f"  {name}: out of memory")
            del calls[name], times[name]
            gc.collect()
            torch.cuda.empty_cache()
    one_round = sum(sum(t) for t in times.values())
    rounds = 1 if smoke else max(5, min(200, int(SECONDS / one_round)))
    times = {name: [] for name in times}
    for turn in range(rounds):
        for name, each in calls.items():
            times[name].append(device.seconds(each[turn % len(each)]))
    return {name: statistics.median(each) for name, each in times.items()}


def leaves_of(x: Inputs) -> list[torch.Tensor]:
    if hasattr(x, "leaves"):
        return x.leaves
    weights = [] if hasattr(x, "dense") else [x.weights]
    return [x.tokens, *weights, *getattr(x, "parameters", [x.gate_up, x.down])]


def make_call(kind: str, name: str, work: Work, x: Inputs) -> Callable:
    if name == "dense":
        x.dense = True
    run = COMPETITORS[name](work, x)
    if kind == "forward":

        def forward():
            with torch.inference_mode():
                return run()

        return forward
    if kind == "train":
        return lambda: torch.autograd.grad(run(), leaves_of(x), x.grad)
    out = run()  # backward alone
    return lambda: torch.autograd.grad(out, leaves_of(x), x.grad, retain_graph=True)


def compare(device: Device, kind: str, label: str, work: Work, names: list[str], smoke: bool):
    """A row: time and model TFLOP/s of all, memory of ours and of transformers' best."""
    train = kind != "forward"
    # Rotated where they are small: tokens and ids anew, the same weights.
    first = Inputs.make(work, train, device.name)
    inputs = [first]
    for seed in range(1, 3):
        torch.manual_seed(seed)
        with torch.device(device.name):
            tokens = torch.randn(work.T, work.H).to(work.dtype).requires_grad_(train)
            inputs.append(dataclasses.replace(first, tokens=tokens, ids=work.ids()))
    calls = {}
    for name in names:
        several = inputs if kind == "forward" else inputs[:1]  # gradients fill the memory
        try:
            calls[name] = [make_call(kind, name, work, copy.copy(x)) for x in several]
        except torch.cuda.OutOfMemoryError:
            print(f"  {name}: out of memory")
    seconds = in_turns(device, calls, smoke)
    flops = work.flops * {"forward": 1, "backward": 2, "train": 3}[kind]
    row = {
        "kind": kind,
        "model": label,
        "work": str(work),
        "ms": {name: t * 1e3 for name, t in seconds.items()},
        "tflops": {name: flops / t / 1e12 for name, t in seconds.items()},
        "faster_than": {
            name: t / seconds["moe_ext"] for name, t in seconds.items() if name != "moe_ext"
        },
    }
    if train:
        for name in ("moe_ext", "grouped_mm"):
            if name in seconds:
                x = copy.copy(first)
                run = COMPETITORS[name](work, x)
                row.setdefault("kept_bytes", {})[name] = device.kept_bytes(run)
        if kind == "train":
            row["peak_bytes"] = {
                name: device.peak_bytes(calls[name][0])
                for name in ("moe_ext", "grouped_mm")
                if name in seconds
            }
    return row


def graphed(call: Callable) -> Callable:
    """The same work replayed by one launch, as servers do it."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def decode(device: Device, label: str, work: Work, smoke: bool):
    """A row: bytes of the active experts' weights per second, beside a copy's."""
    x = Inputs.make(work, False, device.name)
    names = [n for n in ("moe_ext", "grouped_mm") if n in COMPETITORS]
    calls = {name: [make_call("forward", name, work, copy.copy(x))] for name in names}
    for name in names if device.is_cuda else []:
        try:
            calls[f"{name}, graph"] = [graphed(calls[name][0])]
        except RuntimeError as error:
            print(f"  {name}: no graph of it: {str(error).splitlines()[0]}")
    seconds = in_turns(device, calls, smoke)
    moved, ceiling = work.active_bytes(x.ids), device.copy_bytes_per_second()
    return {
        "kind": "decode",
        "model": label,
        "work": str(work),
        "ms": {name: t * 1e3 for name, t in seconds.items()},
        "gbytes_per_s": {name: moved / t / 1e9 for name, t in seconds.items()},
        "copy_gbytes_per_s": ceiling / 1e9,
        "share_of_copy": {name: moved / t / ceiling for name, t in seconds.items()},
    }


def rounding(device: Device, label: str, work: Work, smoke: bool):
    """A row: a train step with token rounding, off and by tile, and what it drops and pads."""
    x = Inputs.make(work, True, device.name)
    logits = torch.randn(work.T, work.E, device=device.name)
    weights, ids, probs = moe_ext.topk_router(logits, work.K)
    leaves = [x.tokens, x.gate_up, x.down]

    def step(tile):
        def call():
            if tile is None:
                out = moe_ext.moe_ffn(x.tokens, weights, ids, x.gate_up, x.down)
            else:
                tokens, experts, slots, _ = ops._round_tokens(probs, weights, ids, tile_size=tile)
                pair_weights = ops._pair_weights(
                    weights, probs, tokens, experts, slots, work.E, 1.0
                )
                out = ops._moe_ffn_pairs(x.tokens, pair_weights, experts, tokens, x.gate_up, x.down)
            return torch.autograd.grad(out, leaves, x.grad)

        return call

    tiles = [t for t in TILES if t is None or work.T >= t]
    seconds = in_turns(device, {str(tile): [step(tile)] for tile in tiles}, smoke)
    rates = {}
    for tile in tiles[1:]:
        tokens, _, slots, kept = ops._round_tokens(probs, weights, ids, tile_size=tile)
        rates[str(tile)] = {
            "dropped": (kept < 0).double().mean().item(),
            "padded": ((slots < 0) & (tokens >= 0)).sum().item() / kept.numel(),
        }
    return {
        "kind": "rounding",
        "model": label,
        "work": str(work),
        "ms": {name: t * 1e3 for name, t in seconds.items()},
        "tflops": {name: 3 * work.flops / t / 1e12 for name, t in seconds.items()},
        "rates": rates,
    }


def rows_to_run(quick: bool, smoke: bool):
    """(kind, model, work) of every row."""
    works = [
        (model, Work(*sizes, T, skew=skew))
        for model, sizes in MODELS.items()
        for T in TOKENS
        for skew in (False, True)
    ]
    works.append(("8 experts", EIGHT))
    rows = [(kind, *each) for kind in ("forward", "backward", "train") for each in works]
    rows += [("rounding", model, work) for model, work in works if not work.skew]
    rows += [
        ("decode", model, Work(*sizes, T)) for model, sizes in MODELS.items() for T in DECODE_TOKENS
    ]
    if quick:
        wanted = {"Qwen3-30B-A3B", "OLMoE"}
        rows = [
            row
            for row in rows
            if row[1] in wanted
            and row[2].T in (16384, 1, 16)
            and not row[2].skew
            and (row[1] == "Qwen3-30B-A3B" or row[0] in ("forward", "train"))
        ]
    if smoke:
        small = {"H": 64, "I": 32, "E": 4, "K": 2}
        rows = [
            (kind, model, dataclasses.replace(work, T=min(work.T, 128), **small))
            for kind, model, work in {row[0]: row for row in rows}.values()
        ]
    return rows


def run_row(device: Device, kind: str, model: str, work: Work, smoke: bool) -> dict:
    if kind == "decode":
        return decode(device, model, work, smoke)
    if kind == "rounding":
        return rounding(device, model, work, smoke)
    names = [n for n in COMPETITORS if n not in SLOW or (work.E <= 64 and work.T <= 16384)]
    if kind != "forward":
        names = [n for n in names if n != "compiled reference"]
    return compare(device, kind, model, work, names, smoke)


def say(row: dict) -> None:
    unit = "gbytes_per_s" if "gbytes_per_s" in row else "tflops"
    each = "  ".join(
        f"{name} {row['ms'][name]:.3f} ms {value:.0f}" for name, value in row[unit].items()
    )
    print(f"{row['kind']:9} {row['model']:18} {row['work']:42} [{unit}] {each}", flush=True)


def machine_of(device: Device) -> dict:
    facts = {"torch": torch.__version__, "moe_ext": moe_ext.__version__}
    if device.is_cuda:
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": properties.name,
            "memory_gib": round(properties.total_memory / 2**30),
            "cuda": torch.version.cuda,
        }
    try:
        import transformers

        facts["transformers"] = transformers.__version__
    except ImportError:
        pass
    return facts


def keep(machine: dict, row: dict) -> None:
    """Puts the row in the results of this GPU, in place of the same row of an earlier run."""
    slug = re.sub(r"[^a-z0-9]+", "-", machine["gpu"].lower()).strip("-")
    path = RESULTS / f"moe_cuda-{slug}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    key = (row["kind"], row["model"], row["work"])
    rows = [old for old in rows if (old["kind"], old["model"], old["work"]) != key] + [row]
    rows.sort(key=lambda row: (row["kind"], row["model"], row["work"]))
    path.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    draw(machine, rows, path.with_suffix(".png"))


def draw(machine: dict, rows: list[dict], path: Path) -> None:
    """TFLOP/s of every competitor in training and forward."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = [row for row in rows if row["kind"] in ("forward", "backward", "train")]
    if not drawn:
        return
    figure, axes = plt.subplots(figsize=(9, 0.5 * len(drawn) + 1.2), layout="constrained")
    height = 0.8 / len(COMPETITORS)
    for i, name in enumerate(COMPETITORS):
        places = [y + (i - len(COMPETITORS) / 2 + 0.5) * height for y in range(len(drawn))]
        axes.barh(places, [row["tflops"].get(name, 0) for row in drawn], height, label=name)
    labels = [f"{row['kind']} {row['model']} {row['work']}" for row in drawn]
    axes.set_yticks(range(len(drawn)), labels, fontsize=7)
    axes.set_ylim(len(drawn) - 0.5, -0.5)
    axes.set_xlabel("model TFLOP/s")
    axes.set_title(f"{machine.get('gpu', 'CPU')}, torch {machine['torch']}", fontsize=9)
    figure.legend(fontsize=8, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def profile(device: Device, path: str, work: Work) -> None:
    """A train step of a layer: the operators by name, and the kernels below them."""
    torch.manual_seed(0)
    with torch.device(device.name):
        options = {"dtype": work.dtype, "inject_aux_loss": True}
        layer = moe_ext.MoE(work.H, work.I, work.E, work.K, **options)
        tokens = torch.randn(work.T, work.H).to(work.dtype).requires_grad_()

    def step():
        layer(tokens).square().mean().backward()

    step()
    if path == "nvtx":
        with torch.autograd.profiler.emit_nvtx():
            step()
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.is_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        step()
    order = "self_device_time_total" if device.is_cuda else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=order, row_limit=25))
    profiler.export_chrome_trace(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--quick", action="store_true", help="one row of each kind")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, nothing is kept")
    parser.add_argument("--only", nargs="+", default=[], help="kinds of rows")
    parser.add_argument("--profile", metavar="FILE", help="a trace of one train step; or nvtx")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; --device cpu --smoke tries the script without one")
    if options.device == "cpu" and not (options.smoke or options.profile):
        parser.error("--device cpu is for --smoke and --profile; bench_moe_cpu.py measures CPUs")
    device = Device(options.device)
    if options.profile:
        work = Work(64, 32, 4, 2, 128) if options.smoke else Work(*MODELS["OLMoE"], 4096)
        return profile(device, options.profile, work)
    machine = machine_of(device)
    print(machine)
    rows = rows_to_run(options.quick, options.smoke)
    if options.only:
        rows = [row for row in rows if row[0] in options.only]
    for kind, model, work in track(rows, disable=options.smoke):
        try:
            row = run_row(device, kind, model, work, options.smoke)
        except torch.cuda.OutOfMemoryError:
            print(f"{kind} {model} {work}: out of memory")
            continue
        finally:
            gc.collect()
            if device.is_cuda:
                torch.cuda.empty_cache()
        say(row)
        if not options.smoke:
            keep(machine, row)


if __name__ == "__main__":
    main()
