"""What the experts of a training run do, step by step: load, drops, entropy, losses, speed.

    with moe_ext.monitor.Monitor(model, "monitor.jsonl") as monitor:
        for batch in batches:
            train_step(batch)
            monitor.step()
    monitor.draw("monitor.png")

or, without a line in the loop, `Monitor(model, "monitor.jsonl", optimizer=optimizer)`. Layers that
nobody watches do none of this. The figures come out of the layers' own forwards; on a GPU they are
read a record later than they are written, so that nothing waits for the device.
"""

import json
import math
import resource
import time
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from moe_ext.layers import MONITORED, GroupedExperts, MoE


@dataclass
class CollapseGuard:
    """Warns, once for each layer and reason, when a layer's experts collapse.

    Args:
        max_load: the most that max/mean load may be.
        min_load: an expert below this share of the mean load starves.
        min_entropy: the least entropy of the router's probabilities, as a share of log E.
        patience: so many records in a row must be beyond a bound.
        warn: called with the text.
    """

    max_load: float = 4.0
    min_load: float = 0.05
    min_entropy: float = 0.1
    patience: int = 10
    warn: Callable[[str], None] = field(default=lambda text: warnings.warn(text, stacklevel=2))

    def __post_init__(self) -> None:
        for name, holds, must_be in (
            ("max_load", self.max_load >= 1, ">= 1"),
            ("min_load", 0 <= self.min_load <= 1, "in [0, 1]"),
            ("min_entropy", 0 <= self.min_entropy <= 1, "in [0, 1]"),
            ("patience", self.patience >= 1, ">= 1"),
        ):
            if not holds:
                value = getattr(self, name)
                raise ValueError(f"CollapseGuard: {name} must be {must_be}, got {value!r}")
        self._in_a_row: dict[tuple[str, str], int] = {}
        self._warned: set[tuple[str, str]] = set()

    def check(self, record: dict) -> None:
        """Looks at a record of the monitor."""
        for layer in record["layers"]:
            counts = layer["tokens_per_expert"]
            mean = sum(counts) / len(counts)
            if mean == 0:
                continue
            starving = [e for e, count in enumerate(counts) if count < self.min_load * mean]
            shown = ", ".join(map(str, starving[:8])) + (", ..." if len(starving) > 8 else "")
            reasons = {
                "starving": (
                    bool(starving),
                    f"{len(starving)} of {len(counts)} experts get less than {self.min_load:.0%} "
                    f"of the mean load (experts {shown}). They learn nothing. Try a larger "
                    "aux_loss_coef, balance='bias', a z-loss (z_loss_coef=1e-3), jitter, or "
                    "NoisyTopKRouter",
                ),
                "load": (
                    layer["max_over_mean"] > self.max_load,
                    f"the busiest expert has {layer['max_over_mean']:.1f} times the mean load "
                    f"(bound {self.max_load:g}). Try a larger aux_loss_coef, balance='bias' with "
                    "a larger bias_update_rate, ExpertChoiceRouter, or a capacity_factor to bound "
                    "the cost",
                ),
                "entropy": (
                    layer["entropy"] < self.min_entropy,
                    f"the entropy of the router's probabilities fell to {layer['entropy']:.2f} of "
                    f"log E (bound {self.min_entropy:g}): it no longer explores. Try a z-loss "
                    "(z_loss_coef=1e-3), a higher temperature, a lower learning rate for the "
                    "router, or weight decay on it",
                ),
            }
            for reason, (is_beyond, text) in reasons.items():
                key = (layer["name"], reason)
                self._in_a_row[key] = self._in_a_row.get(key, 0) + 1 if is_beyond else 0
                if self._in_a_row[key] >= self.patience and key not in self._warned:
                    self._warned.add(key)
                    self.warn(f"moe_ext.monitor: step {record['step']}, {layer['name']}: {text}.")


def active_flops_per_token(model: nn.Module) -> int:
    """FLOPs of training on one token: 6 for every weight that works on it (PaLM, arXiv 2204.02311,
    appendix B, without attention's products). Of E experts K work; embeddings are looked up."""
    top_k = {layer.experts: layer.top_k for layer in model.modules() if isinstance(layer, MoE)}
    flops = 0.0
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            continue
        share = 1.0
        if isinstance(module, GroupedExperts) and module in top_k:
            share = top_k[module] / module.down_proj.shape[0]
        for parameter in module.parameters(recurse=False):
            if parameter.dim() >= 2:
                flops += 6 * share * parameter.numel()
    return round(flops)


def measure_ceiling(device: torch.device | str, dtype: torch.dtype) -> float:
    """The FLOP/s of torch.matmul on a device: the best of several large products."""
    device = torch.device(device)
    n, repeats = (8192, 10) if device.type == "cuda" else (1024, 5)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best = math.inf
    for _ in range(repeats):
        _synchronize(device)
        started = time.perf_counter()
        a @ b
        _synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _percentile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]


class Monitor:
    """Watches the MoE layers of a model while it trains.

    A record is made of every `every` steps. It is a dict, kept in `records`, written as a line of
    JSON to `path`, and to TensorBoard if asked for:

        step, steps                    the last step, and how many the record is of
        step_ms                        mean, p50, p95, p99 of the last `window` steps
        tokens_per_second
        peak_memory_bytes              of the process (CPU) or the allocator (GPU)
        flops_utilization              tokens_per_second * flops_per_token / peak_flops
        layers                         for every layer, over the record's steps:
            name, tokens_per_expert    [E], after drops and rounding
            max_over_mean, min_over_mean, idle_experts    of these
            dropped, drop_rate         slots dropped by capacity or rounding
            entropy                    of the router's probabilities, as a share of log E
            aux_loss                   coefficients applied, the mean of the forwards

    Only forwards in training mode count, each once, checkpointed and compiled ones too. The counts
    are those of this process. Layers move to their device before a monitor is made.

    Args:
        model: with at least one `moe_ext.MoE`.
        path: the file of JSON lines, overwritten; None: none.
        every: steps of a record.
        optimizer: step() is called by itself after each of its steps.
        tensorboard: a folder for TensorBoard's files (needs the package tensorboard).
        flops_per_token: default: `active_flops_per_token`.
        peak_flops: default: `measure_ceiling` in the dtype of the experts, 0.1 s.
        guard: sees every record; "default": `CollapseGuard()`; None: none.
        window: steps that the latencies are taken over.
        resume_at: the steps done before, by an earlier run that wrote to path: its records up to
            there are kept, and the count goes on.

    Raises:
        ValueError for options, or if the model has no such layer or another monitor watches it.
    """

    def __init__(
        self,
        model: nn.Module,
        path: str | Path | None = None,
        *,
        every: int = 10,
        optimizer: torch.optim.Optimizer | None = None,
        tensorboard: str | Path | None = None,
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
        guard: CollapseGuard | None | str = "default",
        window: int = 1000,
        resume_at: int | None = None,
    ) -> None:
        self.layers = {n or "moe": m for n, m in model.named_modules() if isinstance(m, MoE)}
        if not self.layers:
            raise ValueError("Monitor: model must have a moe_ext.MoE layer, got none")
        for name, value in {"every": every, "window": window}.items():
            if value < 1:
                raise ValueError(f"Monitor: {name} must be >= 1, got {value!r}")
        for name, layer in self.layers.items():
            if layer.is_monitored:
                raise ValueError(f"Monitor: model must have one monitor, got a second for {name!r}")
        first = next(iter(self.layers.values())).experts.down_proj
        if flops_per_token is None:
            flops_per_token = active_flops_per_token(model)
        if peak_flops is None:
            peak_flops = measure_ceiling(first.device, first.dtype)
        self.every = every
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops
        self.guard = CollapseGuard() if guard == "default" else guard
        self.records: list[dict] = []
        self.step_count = resume_at or 0
        self._device = first.device
        self._file = self._writer = None
        self._seconds: deque[float] = deque(maxlen=window)
        self._since_record, self._steps_since_record = 0.0, 0
        self._pending: deque[tuple[dict, Tensor, torch.cuda.Event | None]] = deque()
        if tensorboard is not None:
            self._writer = _open_tensorboard(tensorboard)
        if path is not None:
            if resume_at is not None and Path(path).exists():
                self.records = _read_records(Path(path), resume_at)
            self._file = open(path, "w")
            self._file.writelines(json.dumps(record) + "\n" for record in self.records)
        for layer in self.layers.values():
            layer.start_monitoring()
        self._watching = True
        self._hook = None
        if optimizer is not None:
            self._hook = optimizer.register_step_post_hook(lambda *_: self.step())
        self._started = time.perf_counter()

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def step(self, seconds: float | None = None) -> None:
        """To be called after each training step. seconds: what it took; default: since the last
        call, whatever was done in between."""
        now = time.perf_counter()
        seconds = now - self._started if seconds is None else seconds
        self._started = now
        self.step_count += 1
        self._seconds.append(seconds)
        self._since_record += seconds
        self._steps_since_record += 1
        if self._steps_since_record == self.every:
            self._record()
        self._finish(wait=False)

    def close(self) -> None:
        """Makes a record of what is left, and stops watching. A second call does nothing."""
        if not self._watching:
            return
        self._watching = False
        if self._hook is not None:
            self._hook.remove()
        if self._steps_since_record:
            self._record()
        self._finish(wait=True)
        for layer in self.layers.values():
            layer.stop_monitoring()
        for sink in (self._file, self._writer):
            if sink is not None:
                sink.close()

    def summary(self) -> dict:
        """The last record without the experts' counts, for a report or a progress line; {} before
        there is one."""
        if not self.records:
            return {}
        layers = [
            {key: value for key, value in layer.items() if key != "tokens_per_expert"}
            for layer in self.records[-1]["layers"]
        ]
        return {**self.records[-1], "layers": layers}

    def draw(self, path: str | Path) -> None:
        """A picture of all records: every layer's experts over time, and the curves of load,
        entropy, drops and speed. Needs matplotlib."""
        from moe_ext._monitor_figure import draw

        self._finish(wait=True)
        draw(self.records, path)

    # --- from the layers' totals to records ---

    def _record(self) -> None:
        """Takes the layers' totals; they become a record when they are on the host."""
        totals = torch.cat([layer.take_monitor_totals() for layer in self.layers.values()])
        event = None
        if totals.is_cuda:
            event = torch.cuda.Event()
            totals = torch.empty_like(totals, device="cpu", pin_memory=True).copy_(
                totals, non_blocking=True
            )
            event.record()
        ordered = sorted(self._seconds)
        times = {"mean": sum(ordered) / len(ordered)}
        times |= {f"p{q}": _percentile(ordered, q / 100) for q in (50, 95, 99)}
        record = {
            "step": self.step_count,
            "steps": self._steps_since_record,
            "seconds": self._since_record,
            "step_ms": {name: round(1000 * value, 3) for name, value in times.items()},
            "peak_memory_bytes": _peak_memory(self._device),
        }
        self._since_record, self._steps_since_record = 0.0, 0
        self._pending.append((record, totals, event))

    def _finish(self, wait: bool) -> None:
        """Completes the records whose totals have arrived."""
        while self._pending:
            record, totals, event = self._pending[0]
            if event is not None:
                if wait:
                    event.synchronize()
                elif not event.query():
                    return
            self._pending.popleft()
            self._complete(record, totals)

    def _complete(self, record: dict, totals: Tensor) -> None:
        layers, tokens = [], 0.0
        sizes = [layer.num_experts + len(MONITORED) for layer in self.layers.values()]
        for name, part in zip(self.layers, totals.split(sizes), strict=True):
            values = part.tolist()
            counts = [int(count) for count in values[: -len(MONITORED)]]
            scalars = dict(zip(MONITORED, values[-len(MONITORED) :], strict=True))
            tokens = max(tokens, scalars["tokens"])
            layers.append(_layer_record(name, counts, scalars))
        record["tokens_per_second"] = tokens / max(record.pop("seconds"), 1e-9)
        flops = record["tokens_per_second"] * self.flops_per_token
        record["flops_utilization"] = flops / self.peak_flops
        record["layers"] = layers
        self.records.append(record)
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        if self._writer is not None:
            _write_scalars(self._writer, record)
        if self.guard is not None:
            self.guard.check(record)


def _read_records(path: Path, last_step: int) -> list[dict]:
    """The records up to a step; a line that was cut off ends them."""
    records = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if record["step"] <= last_step:
            records.append(record)
    return records


def _layer_record(name: str, counts: list[int], scalars: dict[str, float]) -> dict:
    mean = max(sum(counts) / len(counts), 1e-9)
    slots = sum(counts) + scalars["dropped"]
    forwards = max(scalars["forwards"], 1.0)
    entropy = scalars["entropy"] / max(scalars["tokens"], 1.0)
    return {
        "name": name,
        "tokens_per_expert": counts,
        "max_over_mean": max(counts) / mean,
        "min_over_mean": min(counts) / mean,
        "idle_experts": counts.count(0),
        "dropped": int(scalars["dropped"]),
        "drop_rate": scalars["dropped"] / max(slots, 1.0),
        "entropy": entropy / math.log(len(counts)) if len(counts) > 1 else 1.0,
        "aux_loss": scalars["loss"] / forwards,
    }


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _open_tensorboard(folder: str | Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            f"moe_ext.monitor: tensorboard=... needs a package: pip install tensorboard ({error})"
        ) from error
    return SummaryWriter(folder)


def _write_scalars(writer, record: dict) -> None:
    """The record's numbers; of the experts' counts only what the layers sum up."""
    step = record["step"]
    for name in ("tokens_per_second", "peak_memory_bytes", "flops_utilization"):
        writer.add_scalar(f"moe/{name}", record[name], step)
    for name, value in record["step_ms"].items():
        writer.add_scalar(f"moe/step_ms/{name}", value, step)
    for layer in record["layers"]:
        for name, value in layer.items():
            if isinstance(value, (int, float)):
                writer.add_scalar(f"moe/{layer['name']}/{name}", value, step)
