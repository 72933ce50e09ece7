"""What train_lm.py shows while it runs and writes when it ends."""

import contextlib
import dataclasses
import json
import math
import platform
import sys
import time
from pathlib import Path

import lm_checkpoint
import matplotlib
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

import moe_ext

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


class PlainProgress:
    """A line now and then, where the output is no terminal."""

    def __init__(self, trainer) -> None:
        self.trainer, self.shown = trainer, -math.inf

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        pass

    def show(self) -> None:
        if time.monotonic() - self.shown > 10 or self.trainer.step == self.trainer.o.steps:
            self.shown = time.monotonic()
            print(
                f"step {self.trainer.step}/{self.trainer.o.steps}  {status(self.trainer)}",
                flush=True,
            )


class LiveProgress:
    """A bar with the figures of the moment."""

    def __init__(self, trainer) -> None:
        self.trainer = trainer
        self.progress = Progress(
            TextColumn("{task.completed}/{task.total}"),
            BarColumn(bar_width=None),  # what the rest leaves; 80 columns hold all of it
            TextColumn("{task.description}"),
            TimeRemainingColumn(compact=True),
            expand=True,
        )

    def __enter__(self):
        self.progress.start()
        self.task = self.progress.add_task("", total=self.trainer.o.steps)
        return self

    def __exit__(self, *exception) -> None:
        self.progress.stop()

    def show(self) -> None:
        self.progress.update(
            self.task, completed=self.trainer.step, description=status(self.trainer)
        )


class NoProgress(contextlib.nullcontext):
    def __enter__(self):
        return self

    def show(self) -> None:
        pass


def make_progress(trainer, quiet: bool):
    if quiet:
        return NoProgress()
    return (LiveProgress if sys.stdout.isatty() else PlainProgress)(trainer)


def tokens_per_second(trainer) -> float:
    return trainer.step * trainer.o.batch * trainer.o.context / max(trainer.seconds, 1e-9)


def status(trainer) -> str:
    """The moment in a line: a token is a byte; max load is over the mean, in the worst layer."""
    recent = trainer.history["loss"][-20:]
    text = f"loss {sum(recent) / len(recent):.3f}  {tokens_per_second(trainer):,.0f} bytes/s"
    if trainer.history["held_out"]:
        text += f"  held-out {trainer.history['held_out'][-1]['bits_per_byte']:.3f} bits"
    if trainer.model.moe_layers():
        text += f"  max load {trainer.balance:.2f}"
    if trainer.monitor is not None and (now := trainer.monitor.summary()):
        entropy = min(layer["entropy"] for layer in now["layers"])
        dropped = max(layer["drop_rate"] for layer in now["layers"])
        text += (
            f"  entropy {entropy:.2f}  dropped {dropped:.1%}  P95 {now['step_ms']['p95']:.0f} ms"
            f"  {now['flops_utilization']:.0%} of peak"
        )
    return text


def cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def make_report(trainer) -> dict:
    last = trainer.history["experts"][-1]["share"] if trainer.history["experts"] else []
    return {
        "options": dataclasses.asdict(trainer.o),
        "machine": {
            "cpu": cpu_model(),
            "threads": torch.get_num_threads(),
            "device": trainer.device,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "moe_ext": moe_ext.__version__,
        },
        "parameters": {"total": trainer.total_parameters, "active": trainer.active_parameters},
        "steps": trainer.step,
        "bytes_seen": trainer.step * trainer.o.batch * trainer.o.context,
        "seconds": trainer.seconds,
        "tokens_per_second": tokens_per_second(trainer),
        "held_out_bits_per_byte": trainer.history["held_out"][-1]["bits_per_byte"],
        "max_over_mean_load": trainer.balance,
        "smallest_expert_share": min((min(share) for share in last), default=None),
        "monitor": trainer.monitor.summary() if trainer.monitor is not None else None,
        "history": trainer.history,
    }


def smooth(values: list[float], window: int = 20) -> list[float]:
    return [
        sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))
    ]


def draw_curves(trainer, path: Path) -> None:
    """The loss, and each layer's share of tokens per expert over time."""
    history, layers = trainer.history, trainer.model.moe_layers()
    figure, axes = plt.subplots(
        1 + len(layers),
        1,
        figsize=(9, 3.6 + 1.3 * len(layers)),
        sharex=True,
        squeeze=False,
        layout="constrained",
        height_ratios=[3] + [1] * len(layers),
    )
    axes = axes[:, 0]
    bits = [loss / math.log(2) for loss in history["loss"]]
    steps = range(1, len(bits) + 1)
    axes[0].plot(steps, bits, color="0.85", linewidth=0.8, label="training, each step")
    axes[0].plot(steps, smooth(bits), label="training, mean of 20 steps")
    axes[0].plot(
        [h["step"] for h in history["held_out"]],
        [h["bits_per_byte"] for h in history["held_out"]],
        "o-",
        label="held-out",
    )
    axes[0].set(
        ylabel="bits per byte",
        ylim=(0.95 * min(bits), 1.02 * max(smooth(bits))),
        title=f"{trainer.o.ffn}: {trainer.active_parameters / 1e6:.1f} M active of "
        f"{trainer.total_parameters / 1e6:.1f} M parameters",
    )
    axes[0].legend()
    axes[0].grid(alpha=0.3)
    if layers and history["experts"]:
        at = [h["step"] for h in history["experts"]]
        for index in range(len(layers)):
            shares = torch.tensor([h["share"][index] for h in history["experts"]]).T
            image = axes[1 + index].imshow(
                (shares * trainer.o.experts).numpy(),
                aspect="auto",
                cmap="RdBu_r",
                vmin=0,
                vmax=2,
                interpolation="nearest",
                extent=(0, at[-1], trainer.o.experts - 0.5, -0.5),
            )
            axes[1 + index].set(ylabel=f"layer {index}\nexpert")
        figure.colorbar(image, ax=list(axes[1:]), label="load over the mean (1 is balanced)")
    axes[-1].set(xlabel="step")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_comparison(reports: dict[str, dict], out: Path) -> None:
    """Draws, writes and prints the reports of several models, by their names."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    kept = ("parameters", "steps", "seconds", "tokens_per_second", "held_out_bits_per_byte")
    rows = [
        {"model": name, **{key: report[key] for key in kept}} for name, report in reports.items()
    ]
    for name, report in reports.items():
        curve = smooth([loss / math.log(2) for loss in report["history"]["loss"]])
        axes[0].plot(range(1, len(curve) + 1), curve, label=name)
        axes[1].plot(report["history"]["seconds"], curve, label=name)
    axes[0].set(xlabel="step", ylabel="training bits per byte (mean of 20 steps)", ylim=(None, 5))
    axes[1].set(xlabel="seconds of training")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(out / "compare.png", dpi=110)
    plt.close(figure)
    machine = next(iter(reports.values()))["machine"]
    comparison = json.dumps({"machine": machine, "rows": rows}, indent=1)
    lm_checkpoint.write_file(out / lm_checkpoint.COMPARISON, comparison.encode())
    print(f"\n{'model':28} {'parameters':>12} {'active':>12} {'bytes/s':>9} {'bits/byte':>10}")
    for row in rows:
        print(
            f"{row['model']:28} {row['parameters']['total']:12,} {row['parameters']['active']:12,}"
            f" {row['tokens_per_second']:9,.0f} {row['held_out_bits_per_byte']:10.3f}"
        )
    print(f"\nwrote compare.png and compare.json to {out}")
