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
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_ext import ops
from moe_ext._messages import need_int, warn
from moe_ext.layers import MONITORED, MoE

MOST_RECORDS = 1000  # in memory


class Watched(NamedTuple):
    """A module that adds to its attribute _monitor_totals (`layers.add_to_monitor`) if it has one,
    the module with its experts' weights, and K. Where the module does not know the entropy: its
    router, if there is one, and what takes the router's output to the probabilities [T, E]."""

    module: nn.Module
    experts: nn.Module
    top_k: int
    router: nn.Module | None = None
    router_probs: Callable[[object], Tensor] | None = None


def _watch_moe(module: nn.Module, above: Sequence[nn.Module]) -> Watched | None:
    if not isinstance(module, MoE):
        return None
    experts = module.experts
    while hasattr(experts, "base_layer"):  # wrapped, by an adapter say
        experts = experts.base_layer
    return Watched(module, experts, module.top_k)


# Each tells whether it knows a module, given those above it, the nearest first; integrations add
# theirs.
WATCHERS: list[Callable[[nn.Module, Sequence[nn.Module]], Watched | None]] = [_watch_moe]


def _find_watched(model: nn.Module) -> dict[str, Watched]:
    found = {}
    for name, module in model.named_modules():
        parts = name.split(".") if name else []
        above = [model.get_submodule(".".join(parts[:n])) for n in reversed(range(len(parts)))]
        for watcher in WATCHERS:
            watched = watcher(module, above)
            if watched is not None:
                found[name or "moe"] = watched
    return found


def _add_entropy(
    totals: Tensor, router_probs: Callable[[object], Tensor], router: nn.Module, _, output: object
) -> None:
    """A router's forward hook: adds to totals [2] the entropies of its tokens, each as a share of
    log E, and their number."""
    if not router.training:
        return
    probs = router_probs(output)
    entropy = ops._router_entropy(probs)
    tokens = probs.new_full((), probs.shape[0])
    share = entropy * tokens / math.log(max(probs.shape[1], 2))
    ops._add_once(totals, torch.stack([share, tokens]).to(totals))


@dataclass
class CollapseGuard:
    """Warns, once for each layer and reason, when a layer's experts collapse.

    Args:
        max_load: the most that max/mean load may be.
        min_load: an expert below this share of the mean load starves.
        min_entropy: the least entropy of the router's probabilities, as a share of log E.
        patience: so many records in a row must be beyond a bound.
        warn: called with the text; default: a UserWarning at the user's line.
    """

    max_load: float = 4.0
    min_load: float = 0.05
    min_entropy: float = 0.1
    patience: int = 10
    warn: Callable[[str], None] = warn

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
            entropy                    of the router's probabilities, as a share of log E; None
                                       where they cannot be had (`integrations.transformers`)
            aux_loss                   coefficients applied, the mean of the forwards; None where
                                       the layer does not know it, as in Hugging Face models

    Only forwards in training mode count, each once, checkpointed and compiled ones too. Layers move
    to their devices before a monitor is made. A file that can no longer be written (a full disk, a
    deleted file) stops no training: the monitor warns once and goes on without it.

    Args:
        model: with at least one layer that can be watched.
        path: the file of JSON lines, overwritten; None: none.
        every: steps of a record.
        optimizer: step() is called by itself after each of its steps. May be wrapped (accelerate's,
            and others that keep the optimizer as `.optimizer`): the innermost one's steps count, so
            none that accumulation or a GradScaler skipped.
        tensorboard: a folder for TensorBoard's files (needs the package tensorboard).
        flops_per_token: default: `active_flops_per_token`.
        peak_flops: of one rank; default: `measure_ceiling` in the dtype of the experts, 0.1 s.
        guard: sees every record; "default": `CollapseGuard()`; None: none.
        window: steps that the latencies are taken over.
        resume_at: the steps done before, by an earlier run that wrote to path: its records up to
            there are kept, and the count goes on; lines that are no records are left out, with one
            warning.
        process_group: ranks whose counts are added up; all of them make a monitor, step it alike
            and get the same counts; the first one writes and warns. None: this process's; each rank
            then writes its own.

    No two ranks write to one file: rank 0 writes to path, to tensorboard and what `draw` is given,
    rank R, where it writes, to `monitor.rankR.jsonl` beside `monitor.jsonl` and so on.

    Raises:
        ValueError for options, or if the model has no such layer or another monitor watches it;
        TypeError for an optimizer that is none; OSError if path cannot be written. Nothing is left
        on the model then, and path is as it was.
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
            need_int("Monitor", name, value, least=1)
        for name, layer in self.layers.items():
            if getattr(layer.module, "_monitor_totals", None) is not None:
                raise ValueError(f"Monitor: model must have one monitor, got a second for {name!r}")
        weights = [layer.experts.down_proj for layer in self.layers.values()]
        # On meta are layers that wait for their weights: they come to a device or don't run.
        devices = ["cpu" if weight.is_meta else weight.device for weight in weights]
        self.process_group = process_group
        world, self._writes = 1, True
        if process_group is not None:
            world, self._writes = process_group.size(), process_group.rank() == 0
        self._rank, ranks = 0, 1
        if dist.is_available() and dist.is_initialized():
            self._rank, ranks = dist.get_rank(), dist.get_world_size()
        if flops_per_token is None:
            flops_per_token = active_flops_per_token(model)
        if peak_flops is None:
            peak_flops = measure_ceiling(devices[0], weights[0].dtype)
        self.every = every
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops * world
        self.guard = CollapseGuard() if guard == "default" else guard
        if not self._writes:
            self.guard = None
        self.records: deque[dict] = deque(maxlen=MOST_RECORDS)
        self.step_count = resume_at or 0
        self._seconds: deque[float] = deque(maxlen=window)
        self._since_record, self._steps_since_record = 0.0, 0
        self._pending: deque[tuple[dict, Tensor, torch.cuda.Event | None]] = deque()
        # Of the layers, then of the routers that are watched beside them.
        self._totals = [
            torch.zeros(weight.shape[0] + len(MONITORED), dtype=torch.float64, device=device)
            for weight, device in zip(weights, devices, strict=True)
        ]
        self._routers: dict[str, Watched] = {}
        for (name, layer), device in zip(self.layers.items(), devices, strict=True):
            if layer.router is not None:
                self._routers[name] = layer
                self._totals.append(torch.zeros(2, dtype=torch.float64, device=device))
        self._devices = {totals.device for totals in self._totals}
        self._log: _Log | None = None
        self._sinks: list[_Log | _TensorBoard] = []
        self._hooks = []
        files = path is not None or tensorboard is not None
        if ranks > 1 and process_group is None and self._rank == 0 and files:
            warn(
                f"moe_ext.monitor: there are {ranks} ranks and no process_group, so each watches "
                "its own tokens and writes its own files (rank 1 to monitor.rank1.jsonl for "
                "monitor.jsonl, say). With process_group=torch.distributed.group.WORLD counts are "
                "added up and written once."
            )
        # What can fail comes before anything is on the model, the log, which is overwritten, last.
        with ExitStack() as undo:
            if optimizer is not None:
                self._hooks.append(_hook_steps(optimizer, lambda *_: self.step()))
                undo.callback(self._hooks[0].remove)
            if tensorboard is not None and self._writes:
                folder = Path(tensorboard)
                self._sinks.append(
                    _TensorBoard(folder / f"rank{self._rank}" if self._rank else folder)
                )
                undo.callback(self._sinks[0].close)
            if path is not None and self._writes:
                self._log = _Log(_of_rank(path, self._rank), resume_at)
                self._sinks.append(self._log)
            undo.pop_all()
        for layer, totals in zip(self.layers.values(), self._totals, strict=False):
            layer.module._monitor_totals = totals
        for layer, totals in zip(
            self._routers.values(), self._totals[len(self.layers) :], strict=True
        ):
            hook = partial(_add_entropy, totals, layer.router_probs)
            self._hooks.append(layer.router.register_forward_hook(hook))
        self._watching = True
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
        for hook in self._hooks:
            hook.remove()
        if self._steps_since_record:
            self._record()
        self._finish(wait=True)
        for layer in self.layers.values():
            if isinstance(layer.module, MoE):
                layer.module._monitor_totals = None
            else:
                del layer.module._monitor_totals
        self._to_sinks(lambda sink: sink.close())

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
        experts over time, and the curves of load, entropy, drops and speed. Needs matplotlib. Lines
        of the file that are no records are left out. A rank that does not write draws nothing."""
        from moe_ext._monitor_figure import MOST_COLUMNS, draw

        self._finish(wait=True)
        if not self._writes:
            return
        lines = self._log.read() if self._log in self._sinks else None
        if lines is None:
            records, parse = list(self.records), lambda record: record
        else:
            records, parse = lines, _parse_record
        # One of every `stride`, the last among them.
        records.reverse()
        stride = max(1, -(-len(records) // MOST_COLUMNS))
        parts = [records[i : i + stride] for i in range(0, len(records), stride)]
        drawn = [next(filter(None, map(parse, part)), None) for part in reversed(parts)]
        draw([record for record in drawn if record is not None], _of_rank(path, self._rank))

    # --- from the layers' totals to records ---

    def _record(self) -> None:
        """Takes the layers' totals; they become a record when they are on the host."""
        # Layers may be on several devices; what a process group can add up is on an accelerator.
        devices = [totals.device for totals in self._totals]
        device = next((device for device in devices if device.type != "cpu"), devices[0])
        totals = torch.cat([totals.to(device) for totals in self._totals])
        for layer_totals in self._totals:
            layer_totals.zero_()
        if self.process_group is not None:
            dist.all_reduce(totals, group=self.process_group)
        event = None
        if totals.is_cuda:
            event = torch.cuda.Event()
            totals = torch.empty_like(totals, device="cpu", pin_memory=True).copy_(
                totals, non_blocking=True
            )
            event.record(torch.cuda.current_stream(device))
        ordered = sorted(self._seconds)
        times = {"mean": sum(ordered) / len(ordered)}
        times |= {f"p{q}": _percentile(ordered, q / 100) for q in (50, 95, 99)}
        record = {
            "step": self.step_count,
            "steps": self._steps_since_record,
            "seconds": self._since_record,
            "step_ms": {name: round(1000 * value, 3) for name, value in times.items()},
            "peak_memory_bytes": _peak_memory(self._devices),
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
        sizes = [part.numel() for part in self._totals]
        parts = [part.tolist() for part in totals.cpu().split(sizes)]
        routers = dict(zip(self._routers, parts[len(self.layers) :], strict=True))
        for name, values in zip(self.layers, parts, strict=False):
            counts = [int(count) for count in values[: -len(MONITORED)]]
            scalars = dict(zip(MONITORED, values[-len(MONITORED) :], strict=True))
            tokens = max(tokens, scalars["tokens"])
            layer = _layer_record(name, counts, scalars)
            if name in routers:
                entropies, routed = routers[name]
                entropy = entropies / routed if routed else math.nan
                layer["entropy"] = None if math.isnan(entropy) else entropy
            layers.append(layer)
        record["tokens_per_second"] = tokens / max(record.pop("seconds"), 1e-9)
        flops = record["tokens_per_second"] * self.flops_per_token
        record["flops_utilization"] = flops / self.peak_flops
        record["layers"] = layers
        self.records.append(record)
        self._to_sinks(lambda sink: sink.write(record))
        if self.guard is not None:
            self.guard.check(record)

    def _to_sinks(self, do: Callable[["_Log | _TensorBoard"], None]) -> None:
        """A sink that fails is given up, whatever its library raises: it must stop no training."""
        for sink in list(self._sinks):
            try:
                do(sink)
            except Exception as error:
                self._sinks.remove(sink)
                warn(
                    f"moe_ext.monitor: {sink.path} cannot be written ({error!r}). The monitor goes "
                    f"on without it; Monitor.records keeps the last {MOST_RECORDS} records."
                )


def _hook_steps(optimizer: object, hook: Callable):
    """Registers a hook after the steps of an optimizer, or of the one that it wraps."""
    inner = optimizer
    while hasattr(inner, "param_groups"):
        try:
            return inner.register_step_post_hook(hook)
        except AttributeError:  # a wrapper, which lacks the method or what Optimizer.__init__ sets
            inner = getattr(inner, "optimizer", None)
    raise TypeError(
        "Monitor: optimizer must be a torch.optim.Optimizer, or a wrapper with one as .optimizer, "
        f"got {type(optimizer).__name__}; without one, call Monitor.step() after each step"
    )


def _of_rank(path: str | Path, rank: int) -> Path:
    """The path for a rank: rank 0's is the path itself."""
    path = Path(path)
    return path.with_name(f"{path.stem}.rank{rank}{path.suffix}") if rank else path


def _open_existing(path: str, flags: int) -> int:
    return os.open(path, flags & ~os.O_CREAT)


class _Log:
    """A file of JSON lines: empty, or the one that is there with its records up to a step."""

    def __init__(self, path: Path, resume_at: int | None) -> None:
        self.path = path
        if resume_at is None or not path.is_file():
            open(path, "w").close()
            return
        partial, foreign = path.with_name(path.name + ".partial"), 0
        try:
            with open(path, "rb") as old, open(partial, "wb") as new:
                for line in old:
                    record = _parse_record(line)
                    if record is None:
                        foreign += 1
                    elif record["step"] <= resume_at:
                        new.write(line.rstrip() + b"\n")  # the last one may lack its end
            if foreign:
                warn(f"moe_ext.monitor: {path} has lines that are no records: {foreign} left out.")
            os.replace(partial, path)
        except BaseException:  # a warning may be one
            partial.unlink(missing_ok=True)
            raise

    def write(self, record: dict) -> None:
        # Opened each time and not created again: a file that was deleted is an error, not a file
        # that nobody finds.
        with open(self.path, "a", opener=_open_existing) as file:
            file.write(json.dumps(record) + "\n")

    def read(self) -> list[bytes] | None:
        """Its lines; None if they can't be read."""
        try:
            return self.path.read_bytes().splitlines()
        except OSError:
            return None

    def close(self) -> None:
        pass


_NUMBER = (int, float)
# What pictures read of a record.
_RECORD = {
    "step": int,
    "steps": int,
    "step_ms": {"p50": _NUMBER, "p95": _NUMBER, "p99": _NUMBER},
    "tokens_per_second": _NUMBER,
    "flops_utilization": _NUMBER,
    "layers": [
        {
            "name": str,
            "tokens_per_expert": [_NUMBER],
            "max_over_mean": _NUMBER,
            "min_over_mean": _NUMBER,
            "dropped": _NUMBER,
            "drop_rate": _NUMBER,
            "entropy": (*_NUMBER, type(None)),
        }
    ],
}


def _matches(value: object, pattern: object) -> bool:
    """Whether a JSON value has a pattern's keys and types; lists have at least one item."""
    if isinstance(pattern, dict):
        return isinstance(value, dict) and all(
            key in value and _matches(value[key], pattern[key]) for key in pattern
        )
    if isinstance(pattern, list):
        return (
            isinstance(value, list)
            and len(value) > 0
            and all(_matches(x, pattern[0]) for x in value)
        )
    if not isinstance(value, pattern) or isinstance(value, bool):
        return False
    return not isinstance(value, _NUMBER) or abs(value) < 1e300  # neither NaN nor too large to draw


def _parse_record(line: bytes) -> dict | None:
    """The record of a line of JSON; None if it is something else."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        return None
    return record if _matches(record, _RECORD) else None


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


def _peak_memory(devices: set[torch.device]) -> int:
    on_gpus = [torch.cuda.max_memory_allocated(x) for x in devices if x.type == "cuda"]
    return sum(on_gpus) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _TensorBoard:
    """A folder for TensorBoard."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "moe_ext.monitor: tensorboard=... needs a package: pip install tensorboard "
                f"({error})"
            ) from error
        self.path = folder
        self._writer = SummaryWriter(folder)

    def write(self, record: dict) -> None:
        """The record's numbers; of the experts' counts only what the layers sum up."""
        step = record["step"]
        for name in ("tokens_per_second", "peak_memory_bytes", "flops_utilization"):
            self._writer.add_scalar(f"moe/{name}", record[name], step)
        for name, value in record["step_ms"].items():
            self._writer.add_scalar(f"moe/step_ms/{name}", value, step)
        for layer in record["layers"]:
            for name, value in layer.items():
                if isinstance(value, (int, float)):
                    self._writer.add_scalar(f"moe/{layer['name']}/{name}", value, step)

    def close(self) -> None:
        self._writer.close()
