"""Experts on a GPU: ours, everyone else's, and the GPU's ceilings, taken in turns.

    python benchmarks/bench_moe_cuda.py                 everything: about an hour
    python benchmarks/bench_moe_cuda.py --quick         a row of each kind: a minute or two
    python benchmarks/bench_moe_cuda.py --only decode   or forward, backward, train, rounding
    python benchmarks/bench_moe_cuda.py --profile trace.json   a train step under torch's profiler

Every row is kept in benchmarks/results/moe_cuda-<GPU>.json and drawn beside it. A row's rounds go
through all competitors one after the other; each call is timed by CUDA events after the L2 cache
was filled with something else, on one of several inputs in turn; the median counts. Numbers are
random: matrix products of zeros are faster. A competitor that runs out of memory is left out of its
row; a row whose outputs disagree is not kept, and fails the run. Ctrl-C loses the row it meets.
Under Nsight Systems the operators' names are there by `--profile nvtx`.

    python benchmarks/bench_moe_cuda.py --device cpu --smoke   tries the script, keeps nothing
"""

import argparse
import sys
from collections.abc import Callable

import torch
from harness.ceilings import Ceilings
from harness.device import Device
from harness.figures import draw_bars
from harness.peers import PEERS, UNLIKE, call_of
from harness.results import (
    faster_than,
    keep_row,
    machine,
    milliseconds,
    path_of,
    per_second,
    say,
)
from harness.timing import Agreement, Disagreement, Turns
from harness.work import MODELS, Inputs, Work
from rich.progress import track

import moe_ext

ops = torch.ops.moe_ext

TOKENS = (4096, 8192, 16384, 32768)
EIGHT = Work(2048, 8192, 8, 2, 16384)
DECODE_TOKENS = (1, 4, 16, 64, 256)
TILES = (None, 64, 128, 256)
COMPETITORS = [
    "moe_ext",
    "grouped_mm",
    "eager",
    "reference",
    "compiled reference",
    "_grouped_mm alone",
    "dense",
    "bmm",
]
COMPETITORS = [name for name in COMPETITORS if name in PEERS]
SLOW = {"eager", "reference", "compiled reference"}  # they go expert by expert
OURS_AND_THEIRS = [name for name in ("moe_ext", "grouped_mm") if name in PEERS]


def row_of(kind: str, model: str, work: Work, seconds: dict[str, float], **more) -> dict:
    row = {"kind": kind, "model": model, "work": str(work), "ms": milliseconds(seconds)}
    return row | more


def compare(device: Device, kind: str, model: str, work: Work, smoke: bool) -> dict:
    """A row: time and model TFLOP/s of all, beside a big product's; memory of ours and of
    transformers' best."""
    names = [n for n in COMPETITORS if n not in SLOW or (work.E <= 64 and work.T <= 16384)]
    first = Inputs.make(work, kind != "forward", device.name)
    if kind == "forward":
        inputs = first.rotated(work, 3)
    else:  # gradients fill the memory
        inputs = [first]
        names = [n for n in names if n != "compiled reference"]
    calls = {}
    for name in names:
        try:
            calls[name] = [call_of(kind, PEERS[name](work, x)) for x in inputs]
        except torch.cuda.OutOfMemoryError:
            print(f"  {name}: out of memory")
    ceilings = Ceilings(device)
    turns = Turns(
        calls,
        device,
        rounds=1 if smoke else None,
        agreement=Agreement(work.dtype, UNLIKE),
        ceiling=lambda: ceilings.flops_per_second(work.dtype),
    ).run()
    seconds = turns.median()
    tflops = per_second(work.flops(kind), seconds, 1e12)
    row = row_of(kind, model, work, seconds, tflops=tflops, faster_than=faster_than(seconds))
    row["ceiling_tflops"] = turns.peak / 1e12
    say(f"{kind:9} {model:18} {work}", seconds, tflops, "tflops", row["ceiling_tflops"])
    names = [name for name in OURS_AND_THEIRS if name in seconds and kind != "forward"]
    if names:
        layers = {name: PEERS[name](work, first) for name in names}
        row["kept_bytes"] = {name: device.kept_bytes(layer.run) for name, layer in layers.items()}
    if kind == "train":
        row["peak_bytes"] = {name: device.peak_bytes(calls[name][0]) for name in names}
    return row


def graphed(call: Callable) -> Callable:
    """The same work replayed by one launch, as servers do it."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()

    def replay():
        graph.replay()
        return out

    return replay


def decode(device: Device, model: str, work: Work, smoke: bool) -> dict:
    """A row: bytes of the active experts' weights per second, beside a copy's."""
    x = Inputs.make(work, False, device.name)
    calls = {name: call_of("forward", PEERS[name](work, x)) for name in OURS_AND_THEIRS}
    for name in OURS_AND_THEIRS if device.is_cuda else []:
        try:
            calls[f"{name}, graph"] = graphed(calls[name])
        except RuntimeError as error:
            print(f"  {name}: no graph of it: {str(error).splitlines()[0]}")
    turns = Turns(
        calls,
        device,
        rounds=1 if smoke else None,
        agreement=Agreement(work.dtype),
        ceiling=Ceilings(device).bytes_per_second,
    ).run()
    seconds = turns.median()
    rates = per_second(work.active_bytes(x.ids), seconds, 1e9)
    ceiling = turns.peak / 1e9
    say(f"decode    {model:18} {work}", seconds, rates, "gbytes_per_s", ceiling)
    return row_of(
        "decode",
        model,
        work,
        seconds,
        gbytes_per_s=rates,
        copy_gbytes_per_s=ceiling,
        share_of_copy={name: rate / ceiling for name, rate in rates.items()},
    )


def rounding(device: Device, model: str, work: Work, smoke: bool) -> dict:
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
    calls = {str(tile): step(tile) for tile in tiles}
    unlike = Agreement(work.dtype, unlike=calls)  # other pairs are chosen
    seconds = Turns(calls, device, rounds=1 if smoke else None, agreement=unlike).run().median()
    rates = {}
    for tile in tiles[1:]:
        tokens, _, slots, kept = ops._round_tokens(probs, weights, ids, tile_size=tile)
        rates[str(tile)] = {
            "dropped": (kept < 0).double().mean().item(),
            "padded": ((slots < 0) & (tokens >= 0)).sum().item() / kept.numel(),
        }
    tflops = per_second(work.flops("train"), seconds, 1e12)
    say(f"rounding  {model:18} {work}", seconds, tflops, "tflops")
    return row_of("rounding", model, work, seconds, tflops=tflops, rates=rates)


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
        one_of_each = {row[0]: row for row in rows}.values()
        rows = [(kind, model, work.smoke()) for kind, model, work in one_of_each]
    return rows


def run_row(device: Device, kind: str, model: str, work: Work, smoke: bool) -> dict:
    if kind == "decode":
        return decode(device, model, work, smoke)
    if kind == "rounding":
        return rounding(device, model, work, smoke)
    return compare(device, kind, model, work, smoke)


def keep(facts: dict, row: dict) -> None:
    """Puts the row into this GPU's results, and draws every competitor's TFLOP/s."""
    path = path_of("moe_cuda", facts["gpu"])
    rows = keep_row(path, facts, row, ("kind", "model", "work"))
    drawn = [r for r in rows if r["kind"] in ("forward", "backward", "train")]
    if drawn:
        draw_bars(
            path.with_suffix(".png"),
            [f"{r['kind']} {r['model']} {r['work']}" for r in drawn],
            {name: [r["tflops"].get(name, 0) for r in drawn] for name in COMPETITORS},
            title=f"{facts['gpu']}, torch {facts['torch']}",
            unit="model TFLOP/s",
        )


def measure(device: Device, facts: dict, kind: str, model: str, work: Work, smoke: bool) -> bool:
    """A row, kept if it is no smoke; False for one whose competitors disagree."""
    try:
        row = run_row(device, kind, model, work, smoke)
    except torch.cuda.OutOfMemoryError:
        print(f"{kind} {model} {work}: out of memory")
    except Disagreement as error:
        print(f"{kind} {model} {work}: {error}")
        return False
    else:
        if not smoke:
            keep(facts, row)
    finally:
        device.release()
    return True


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
    facts = machine(options.device)
    print(facts)
    rows = rows_to_run(options.quick, options.smoke)
    if options.only:
        rows = [row for row in rows if row[0] in options.only]
    failed = False
    try:
        for row in track(rows, disable=options.smoke):
            failed |= not measure(device, facts, *row, options.smoke)
    except KeyboardInterrupt:
        sys.exit("stopped")
    sys.exit(failed)


if __name__ == "__main__":
    main()
