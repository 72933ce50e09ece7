"""What the experts of a training run do, step by step: load, drops, entropy, losses, speed.

    with moe_ext.monitor.Monitor(model, "monitor.jsonl") as monitor:
        for batch in batches:
            train_step(batch)
            monitor.step()
    monitor.draw("monitor.png")

or, without a line in the loop, `Monitor(model, "monitor.jsonl", optimizer=optimizer)`. It watches
`moe_ext.MoE` layers and, after `import moe_ext.integrations.transformers`, the experts of Hugging
Face models that run on moe_ext. Layers that nobody watches do none of this. The figures come out of
the layers' own forwards; on a GPU they are read later than they are written, so that nothing waits
for the device.
"""

import json
import math
import os
import resource
import time
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TextIO

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_ext.layers import MONITORED, MoE

MOST_RECORDS = 1000  # in memory


class Watched(NamedTuple):
    """A module that adds to its attribute _monitor_totals (`layers.add_to_monitor`) if it has one,
    the module with its experts' weights, and K."""

    module: nn.Module
    experts: nn.Module
    top_k: int


def _watch_moe(module: nn.Module) -> Watched | None:
    return Watched(module, module.experts, module.top_k) if isinstance(module, MoE) else None


# Each tells whether it knows a module; integrations add theirs.
WATCHERS: list[Callable[[nn.Module], Watched | None]] = [_watch_moe]


def _find_watched(model: nn.Module) -> dict[str, Watched]:
    found = {}
    for name, module in model.named_modules():
        for watcher in WATCHERS:
            watched = watcher(module)
            if watched is not None:
                found[name or "moe"] = watched
    return found


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
                    layer["entropy"] is not None and layer["entropy"] < self.min_entropy,
                    "the entropy of the router's probabilities fell to "
                    f"{layer['entropy'] or 0:.2f} of "
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
    top_k = {watched.experts: watched.top_k for watched in _find_watched(model).values()}
    flops = 0.0
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            continue
        share = 1.0
        if module in top_k:
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

    A record is made of every `every` steps. It is a dict, kept in `records` (the last 1000),
    written as a line of JSON to `path`, and to TensorBoard if asked for:

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
            (None in both where the layer does not know it, as in Hugging Face models)

    Only forwards in training mode count, each once, checkpointed and compiled ones too. Layers move
    to their device before a monitor is made.

    Args:
        model: with at least one layer that can be watched.
        path: the file of JSON lines, overwritten; None: none.
        every: steps of a record.
        optimizer: step() is called by itself after each of its steps.
        tensorboard: a folder for TensorBoard's files (needs the package tensorboard).
        flops_per_token: default: `active_flops_per_token`.
        peak_flops: of one rank; default: `measure_ceiling` in the dtype of the experts, 0.1 s.
        guard: sees every record; "default": `CollapseGuard()`; None: none.
        window: steps that the latencies are taken over.
        resume_at: the steps done before, by an earlier run that wrote to path: its records up to
            there are kept, and the count goes on.
        process_group: ranks whose counts are added up; all of them make a monitor, step it alike
            and get the same counts; the first one writes and warns. None: this process's.

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
        process_group: "dist.ProcessGroup | None" = None,
    ) -> None:
        self.layers = _find_watched(model)
        if not self.layers:
            raise ValueError("Monitor: model must have a layer of moe_ext, got none")
        for name, value in {"every": every, "window": window}.items():
            if value < 1:
                raise ValueError(f"Monitor: {name} must be >= 1, got {value!r}")
        for name, layer in self.layers.items():
            if getattr(layer.module, "_monitor_totals", None) is not None:
                raise ValueError(f"Monitor: model must have one monitor, got a second for {name!r}")
        first = next(iter(self.layers.values())).experts.down_proj
        self.process_group = process_group
        world, writes = 1, True
        if process_group is not None:
            world, writes = process_group.size(), process_group.rank() == 0
        if flops_per_token is None:
            flops_per_token = active_flops_per_token(model)
        if peak_flops is None:
            peak_flops = measure_ceiling(first.device, first.dtype)
        self.every = every
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops * world
        self.guard = CollapseGuard() if guard == "default" else guard
        if not writes:
            self.guard = None
        self.records: deque[dict] = deque(maxlen=MOST_RECORDS)
        self.step_count = resume_at or 0
        self._device = first.device
        self._file = self._writer = None
        self._seconds: deque[float] = deque(maxlen=window)
        self._since_record, self._steps_since_record = 0.0, 0
        self._pending: deque[tuple[dict, Tensor, torch.cuda.Event | None]] = deque()
        if tensorboard is not None and writes:
            self._writer = _open_tensorboard(tensorboard)
        if path is not None and writes:
            self._file = _open_log(Path(path), resume_at)
        for layer in self.layers.values():
            weight = layer.experts.down_proj
            size = weight.shape[0] + len(MONITORED)
            totals = torch.zeros(size, dtype=torch.float64, device=weight.device)
            layer.module._monitor_totals = totals
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
            layer.module._monitor_totals = None
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
        """A picture of the whole run (without a file, of the records that are kept): every layer's
        experts over time, and the curves of load, entropy, drops and speed. Needs matplotlib."""
        from moe_ext._monitor_figure import MOST_COLUMNS, draw

        self._finish(wait=True)
        if self._file is None:
            lines = [json.dumps(record) for record in self.records]
        else:
            lines = Path(self._file.name).read_text().splitlines()
        stride = max(1, -(-len(lines) // MOST_COLUMNS))
        draw([json.loads(line) for line in lines[::-1][::stride][::-1]], path)

    # --- from the layers' totals to records ---

    def _record(self) -> None:
        """Takes the layers' totals; they become a record when they are on the host."""
        each = [layer.module._monitor_totals for layer in self.layers.values()]
        totals = torch.cat(each)
        for layer_totals in each:
            layer_totals.zero_()
        if self.process_group is not None:
            dist.all_reduce(totals, group=self.process_group)
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
        sizes = [x.experts.down_proj.shape[0] + len(MONITORED) for x in self.layers.values()]
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


def _open_log(path: Path, resume_at: int | None) -> TextIO:
    """An empty file, or the one that is there with its records up to a step."""
    if resume_at is None or not path.exists():
        return open(path, "w")
    partial = path.with_name(path.name + ".partial")
    with open(path) as old, open(partial, "w") as new:
        for line in old:
            try:
                step = json.loads(line)["step"]
            except json.JSONDecodeError:  # cut off
                break
            if step <= resume_at:
                new.write(line)
    os.replace(partial, path)
    return open(path, "a")


def _layer_record(name: str, counts: list[int], scalars: dict[str, float]) -> dict:
    mean = max(sum(counts) / len(counts), 1e-9)
    slots = sum(counts) + scalars["dropped"]
    forwards = max(scalars["forwards"], 1.0)
    entropy = scalars["entropy"] / max(scalars["tokens"], 1.0)
    if len(counts) > 1:
        entropy /= math.log(len(counts))
    return {
        "name": name,
        "tokens_per_expert": counts,
        "max_over_mean": max(counts) / mean,
        "min_over_mean": min(counts) / mean,
        "idle_experts": counts.count(0),
        "dropped": int(scalars["dropped"]),
        "drop_rate": scalars["dropped"] / max(slots, 1.0),
        "entropy": None if math.isnan(scalars["entropy"]) else entropy,
        "aux_loss": None if math.isnan(scalars["loss"]) else scalars["loss"] / forwards,
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
