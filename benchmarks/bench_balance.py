"""Capacity, token rounding, expert choice and the monitor: what they cost, and what rounding does.

Rates and megabytes are printed and go into benchmarks/results/balance.json (not in a smoke run).
"""

import sys
from pathlib import Path

import pytest
import torch
from harness.device import in_own_process
from harness.results import keep, machine, path_of
from harness.timing import Agreement, Turns
from loss_memory import PEERS

import moe_ext
from moe_ext.monitor import Monitor

ops = torch.ops.moe_ext
RESULTS = path_of("balance")
SHAPES = [(1024, 8, 2), (4096, 128, 8), (16384, 64, 6)]  # T, E, K


def make_choice(T, E, K, skew):
    """router_probs, topk_weights, topk_ids; skew 0 is balanced but for chance."""
    logits = torch.randn(T, E) + skew * torch.linspace(1, -1, E)
    weights, ids, probs = moe_ext.topk_router(logits, K)
    return probs, weights, ids


def sort_columns(probs, weights, ids, tile_size):
    """Token rounding as one would write it: a sort of every expert's column of T x E."""
    T, E = probs.shape
    chosen = torch.zeros(T, E, dtype=torch.bool).scatter_(1, ids, True)
    scores = (probs - 1).scatter(1, ids, weights)
    order = scores.argsort(dim=0, descending=True, stable=True)
    counts = chosen.sum(0)
    rounded = torch.div(counts + (tile_size - 1) // 2, tile_size, rounding_mode="floor") * tile_size
    keep = torch.arange(T).unsqueeze(1) < rounded.clamp(max=T // tile_size * tile_size)
    return order.T[keep.T], keep.T.nonzero()[:, 0]


OPERATORS = ["topk_router", "capacity", "rounding", "sort", "expert_choice"]


@pytest.mark.parametrize("what", OPERATORS)
@pytest.mark.parametrize("T,E,K", SHAPES)
def test_operators(take_turns, what, T, E, K):
    logits = torch.randn(T, E)
    probs, weights, ids = make_choice(T, E, K, 0.3)
    factor = torch.tensor(1.0, dtype=torch.float64)
    calls = {
        "topk_router": lambda: moe_ext.topk_router(logits, K),  # what all of them come after
        "capacity": lambda: ops._apply_capacity(weights, ids, factor, E),
        "rounding": lambda: ops._round_tokens(probs, weights, ids, tile_size=128),
        "sort": lambda: sort_columns(probs, weights, ids, 128),
        "expert_choice": lambda: ops._expert_choice(probs, None, K),
    }
    # Different operators; below, the sort is held against rounding.
    take_turns(calls, what, bytes_moved=4 * T * E, agreement=Agreement(unlike=OPERATORS))


def test_the_sort_does_the_same():
    probs, weights, ids = make_choice(1024, 8, 2, 0.3)
    tokens, experts, _, _ = ops._round_tokens(probs, weights, ids, tile_size=64)
    expected = sort_columns(probs, weights, ids, 64)
    pairs = set(zip(tokens.tolist(), experts.tolist(), strict=True)) - {(-1, -1)}
    assert pairs == set(zip(*(x.tolist() for x in expected), strict=True))


def rates(T, E, K, skew, tile_size, rounding) -> dict[str, float]:
    """Shares of the T K slots that were dropped, and padded."""
    choice = make_choice(T, E, K, skew)
    noise = torch.rand(E, dtype=torch.float64) if rounding == "stochastic" else None
    tokens, _, slots, kept = ops._round_tokens(
        *choice, tile_size=tile_size, rounding=rounding, noise=noise
    )
    padded = ((tokens >= 0) & (slots < 0)).sum().item()
    return {"drop": (kept < 0).sum().item() / (T * K), "pad": padded / (T * K)}


def test_rounding_rates(benchmark):
    rows = []
    for T, E, K in SHAPES:
        for tile_size in (64, 128, 256):
            for skew in (0.0, 0.5):
                row = {"T": T, "E": E, "K": K, "tile_size": tile_size, "skew": skew}
                row["rows_per_tile"] = T * K / (E * tile_size)  # below 2 the layer does not round
                # Without rounding a tile of every expert is half empty.
                row["waste_without"] = E * tile_size / (2 * T * K)
                for rounding in ("nearest", "balanced", "up", "down", "stochastic"):
                    row[rounding] = rates(T, E, K, skew, tile_size, rounding)
                rows.append(row)
    benchmark.pedantic(rates, (*SHAPES[0], 0.0, 64, "nearest"), rounds=3)
    benchmark.extra_info["rates"] = rows
    if benchmark.disabled:
        return
    keep(RESULTS, machine(), "rounding", rows)
    print(f"\n{'T E K':>14} tile skew rows/tile  waste | nearest drop/pad  up pad  down drop")
    for r in rows:
        print(
            f"{r['T']:6} {r['E']:4} {r['K']:2} {r['tile_size']:4} {r['skew']:4} "
            f"{r['rows_per_tile']:9.1f} {r['waste_without']:6.1%} | "
            f"{r['nearest']['drop']:8.2%} {r['nearest']['pad']:6.2%} "
            f"{r['up']['pad']:9.2%} {r['down']['drop']:9.2%}"
        )


def test_loss_memory(benchmark):
    T, E = (131072, 256) if not benchmark.disabled else (1024, 16)
    script = Path(__file__).with_name("loss_memory.py")

    def measure():
        return {
            loss: {peer: round(in_own_process(script, loss, peer, T, E), 1) for peer in peers}
            for loss, peers in PEERS.items()
        }

    mib = benchmark.pedantic(measure, rounds=1)
    benchmark.extra_info["peak_mib"] = mib
    if not benchmark.disabled:
        figures = {"T": T, "E": E, "probabilities": 4 * T * E / 2**20, **mib}
        keep(RESULTS, machine(), "loss_memory_mib", figures)
        print(f"\nlosses of {T} x {E} ({4 * T * E >> 20} MiB of probabilities): {mib}")


def test_monitor_cost(benchmark):
    """Steps of the demo's model with and without a monitor, in turns."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    import train_lm

    trainer = train_lm.Trainer(train_lm.Options())
    layers = trainer.model.moe_layers()
    monitor = Monitor(trainer.model, peak_flops=1e12, guard=None)
    totals = {layer: layer._monitor_totals for layer in layers}
    rounds = 40 if not benchmark.disabled else 1

    def watch(who: str) -> None:
        on = who == "watched"
        trainer.monitor = monitor if on else None
        for layer in layers:
            layer._monitor_totals = totals[layer] if on else None

    def in_turns(step, rounds: int) -> dict[str, float]:
        """The median seconds of a step, watched and not."""
        calls = dict.fromkeys(["alone", "watched"], step)
        unlike = Agreement(unlike=calls)  # each step starts where the last one ended
        return Turns(calls, rounds=rounds, before=watch, agreement=unlike).run().median()

    steps = benchmark.pedantic(lambda: in_turns(trainer.train_step, rounds), rounds=1)
    # A step's noise is larger than the cost: what is added is timed by itself, too.
    with torch.no_grad():
        routed, loss = layers[0].router(torch.randn(1024, 192)), torch.zeros(())
        record = in_turns(lambda: layers[0]._record(routed, None, loss), 8 * rounds)
    watch("watched")
    per_step = Turns({"step": lambda: monitor.step(0.1)}, rounds=100).run().mean()["step"]
    added = len(layers) * (record["watched"] - record["alone"]) + per_step
    figures = {
        "step_ms": 1000 * steps["alone"],
        "step_ms_monitored": 1000 * steps["watched"],
        "added_us": 1e6 * added,
        "added_share": added / steps["alone"],
    }
    benchmark.extra_info["monitor"] = figures
    if not benchmark.disabled:
        keep(RESULTS, machine(), "monitor", figures)
        print(f"\nmonitor: {figures}")
