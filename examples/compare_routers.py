"""Trains the small language model of train_lm.py with several routers and balance methods.

Equal data, steps and parameters of the experts; only routing differs. About 7 minutes on 2 CPU
cores.

    python examples/compare_routers.py                        all of them, 300 steps each
    python examples/compare_routers.py --steps 1300           as long as the demo
    python examples/compare_routers.py --only "bias" "hash"   those whose name has one of the words

Into --out (default runs/compare_routers) go routers.png and routers.json.

How to read it: held-out loss is what counts; it is taken with the routing of evaluation. The
training loss of expert choice flatters it, since an expert's choice looks at later bytes. The load
says what an accelerator would pay: a step lasts as long as its busiest expert.
"""

import argparse
import json
import math
from pathlib import Path

import lm_report
import matplotlib.pyplot as plt
import torch
import train_lm

METHODS = {  # name: options of train_lm that differ
    "top-2, no balance": {"balance": "none"},
    "top-2, balance loss": {},
    "top-2, loss per sequence": {"balance": "sequence"},
    "top-2, bias": {"balance": "bias"},
    "sigmoid top-2, bias (DeepSeek-V3)": {"router": "sigmoid", "balance": "bias"},
    "top-2, capacity 1.0": {"capacity_factor": 1.0},
    "top-2, rounding to 64": {"tile_size": 64},
    "noisy top-2, balance loss": {"router": "noisy"},
    "hierarchical 2 x 4, balance loss": {"router": "hierarchical"},
    "expert choice": {"router": "expert_choice", "balance": "none"},
    "hash of the byte": {"router": "hash", "balance": "none"},
}


def run(name: str, options: train_lm.Options, device: str) -> dict:
    """One method's row: what is drawn and written."""
    trainer = train_lm.train(options, device=device, monitor=True)
    if trainer.step < options.steps:
        raise SystemExit("compare_routers: stopped; nothing is compared")
    trainer.history["held_out"].clear()
    bits = trainer.evaluate(64)
    # Of evaluation's routing: its last batch, in the worst layer.
    counts = [layer.last_stats.tokens_per_expert.double() for layer in trainer.model.moe_layers()]
    records = list(trainer.monitor.records)
    late = records[-max(1, len(records) // 10) :]

    def worst(key: str, pick=max) -> float:
        """In the worst layer, the mean of the last tenth of the run."""
        return pick(
            sum(record["layers"][i][key] for record in late) / len(late) for i in range(len(counts))
        )

    return {
        "method": name,
        "held_out_bits_per_byte": bits,
        "ms_per_step": 1000 * trainer.seconds / trainer.step,
        "max_over_mean": worst("max_over_mean"),
        "min_over_mean": worst("min_over_mean", min),
        "max_over_mean_in_evaluation": max((c.max() / c.mean()).item() for c in counts),
        "drop_rate": worst("drop_rate"),
        "entropy": worst("entropy", min),
        "loss": [loss / math.log(2) for loss in trainer.history["loss"]],
        "steps": [record["step"] for record in records],
        "load": [max(x["max_over_mean"] for x in record["layers"]) for record in records],
    }


def draw(rows: list[dict], path: Path, title: str) -> None:
    """Loss and load over time, and what came of them, side by side."""
    figure, axes = plt.subplots(2, 2, figsize=(13, 9.5), layout="constrained")
    colors = {
        row["method"]: plt.get_cmap("tab20")(2 * i % 20 + i // 10) for i, row in enumerate(rows)
    }
    curve, load, quality, balance = axes.flat
    for row in rows:
        smooth = lm_report.smooth(row["loss"])
        style = {"color": colors[row["method"]], "linewidth": 1.2}
        curve.plot(range(1, len(smooth) + 1), smooth, label=row["method"], **style)
        load.plot(row["steps"], row["load"], **style)
    late = [
        value for row in rows for value in lm_report.smooth(row["loss"])[len(row["loss"]) // 6 :]
    ]
    curve.set(
        ylabel="bits per byte",
        xlabel="step",
        title="training loss (mean of 20 steps)",
        ylim=(0.98 * min(late), 1.02 * max(late)),
    )
    curve.legend(fontsize=8)
    load.set(
        ylabel="load over the mean", xlabel="step", title="busiest expert, worst layer (training)"
    )
    load.axhline(1, color="0.6", linewidth=0.8)
    ordered = sorted(rows, key=lambda row: -row["held_out_bits_per_byte"])
    names = [row["method"] for row in ordered]
    bits = [row["held_out_bits_per_byte"] for row in ordered]
    quality.barh(names, bits, color=[colors[name] for name in names])
    for y, row in enumerate(ordered):
        value = row["held_out_bits_per_byte"]
        quality.text(value, y, f" {value:.3f}", va="center", fontsize=8)
    low, high = min(bits), max(bits)
    margin = max(high - low, 0.01)
    quality.set(
        xlim=(low - 0.3 * margin, high + 0.2 * margin),
        title="held-out bits per byte (less is better)",
    )
    for y, row in enumerate(ordered):
        color = colors[row["method"]]
        ends = [row["min_over_mean"], row["max_over_mean"]]
        balance.plot(ends, [y, y], "s-", color=color, linewidth=5, markersize=5)
        balance.plot(row["max_over_mean_in_evaluation"], y, "k|", markersize=12)
        if row["drop_rate"]:
            balance.text(
                row["max_over_mean"] + 0.05, y + 0.15, f"drops {row['drop_rate']:.1%}", fontsize=8
            )
    balance.axvline(1, color="0.6", linewidth=0.8)
    balance.set(
        yticks=range(len(rows)),
        yticklabels=[],
        xlabel="load over the mean",
        xlim=(0, None),
        title="idlest to busiest expert at the end, worst layer; mark: busiest in evaluation",
    )
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.title.set_fontsize(9)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="methods whose name has one")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=Path("runs/compare_routers"))
    parsed = parser.parse_args(arguments)
    words = parsed.only or [""]
    chosen = {n: o for n, o in METHODS.items() if any(word in n for word in words)}
    if not chosen:
        parser.error(f"--only must name one of: {', '.join(METHODS)}")
    if parsed.threads:
        torch.set_num_threads(parsed.threads)
    parsed.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, changes in chosen.items():
        print(f"== {name}", flush=True)
        options = train_lm.Options(steps=parsed.steps, seed=parsed.seed, **changes)
        rows.append(run(name, options, parsed.device))
    machine = {
        "cpu": lm_report.cpu_model(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    (parsed.out / "routers.json").write_text(
        json.dumps({"machine": machine, "steps": parsed.steps, "rows": rows}) + "\n"
    )
    title = f"{parsed.steps} steps each; {machine['cpu']}, {machine['threads']} threads"
    draw(rows, parsed.out / "routers.png", title)
    print(f"\n{'method':36} bits/byte  ms/step  max load  min load   drops")
    for row in sorted(rows, key=lambda row: row["held_out_bits_per_byte"]):
        print(
            f"{row['method']:36} {row['held_out_bits_per_byte']:9.3f} {row['ms_per_step']:8.0f} "
            f"{row['max_over_mean']:9.2f} {row['min_over_mean']:9.2f} {row['drop_rate']:7.1%}"
        )
    print(f"\nwrote routers.png and routers.json to {parsed.out}")


if __name__ == "__main__":
    main()
