"""The monitor of a training run."""

import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_ext._messages import need_int, warn
from moe_ext.monitor.flops import active_flops_per_token, measure_ceiling
from moe_ext.monitor.guard import CollapseGuard
from moe_ext.monitor.records import (
    Log,
    TensorBoard,
    layer_record,
    of_rank,
    parse_record,
    peak_memory,
    step_times,
)
from moe_ext.monitor.watch import Totals, find_watched

MOST_RECORDS = 1000  # in memory


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
        ValueError: for options, or if the model has no such layer or another monitor watches it.
        TypeError: for an optimizer that is none.
        OSError: if path cannot be written.

    Nothing is left on the model then, and path is as it was.
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
        self.layers = find_watched(model)
        if not self.layers:
            raise ValueError("Monitor: model must have a layer of moe_ext, got none")
        for name, value in {"every": every, "window": window}.items():
            need_int("Monitor", name, value, least=1)
        for name, layer in self.layers.items():
            if getattr(layer.module, "_monitor_totals", None) is not None:
                raise ValueError(f"Monitor: model must have one monitor, got a second for {name!r}")
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
            first = next(iter(self.layers.values()))
            peak_flops = measure_ceiling(first.device, first.experts.down_proj.dtype)
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
        self._totals = Totals(self.layers)
        self._log: Log | None = None
        self._sinks: list[Log | TensorBoard] = []
        self._hook = None
        has_files = path is not None or tensorboard is not None
        if ranks > 1 and process_group is None and self._rank == 0 and has_files:
            _warn_of_ranks(ranks)
        # What can fail comes before anything is on the model.
        self._open(path, tensorboard, optimizer, resume_at)
        self._totals.start()
        self._watching = True
        self._started = time.perf_counter()

    def _open(
        self,
        path: str | Path | None,
        tensorboard: str | Path | None,
        optimizer: torch.optim.Optimizer | None,
        resume_at: int | None,
    ) -> None:
        """Hooks itself to the optimizer and opens the files, or leaves all as it was. The log,
        which is overwritten, comes last."""
        with ExitStack() as undo:
            if optimizer is not None:
                self._hook = _hook_steps(optimizer, lambda *_: self.step())
                undo.callback(self._hook.remove)
            if tensorboard is not None and self._writes:
                folder = Path(tensorboard)
                self._sinks.append(
                    TensorBoard(folder / f"rank{self._rank}" if self._rank else folder)
                )
                undo.callback(self._sinks[0].close)
            if path is not None and self._writes:
                self._log = Log(of_rank(path, self._rank), resume_at)
                self._sinks.append(self._log)
            undo.pop_all()

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
        self._totals.stop()
        if self._steps_since_record:
            self._record()
        self._finish(wait=True)
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
        from moe_ext.monitor.figure import MOST_COLUMNS, draw

        self._finish(wait=True)
        if not self._writes:
            return
        lines = self._log.read() if self._log in self._sinks else None
        if lines is None:
            records, parse = list(self.records), lambda record: record
        else:
            records, parse = lines, parse_record
        # One of every `stride`, the last among them.
        records.reverse()
        stride = max(1, -(-len(records) // MOST_COLUMNS))
        parts = [records[i : i + stride] for i in range(0, len(records), stride)]
        drawn = [next(filter(None, map(parse, part)), None) for part in reversed(parts)]
        draw([record for record in drawn if record is not None], of_rank(path, self._rank))

    # --- from the layers' totals to records ---

    def _record(self) -> None:
        """Takes the layers' totals; they become a record when they are on the host."""
        totals = self._totals.take(self.process_group)
        event = None
        if totals.is_cuda:
            event, device = torch.cuda.Event(), totals.device
            totals = torch.empty_like(totals, device="cpu", pin_memory=True).copy_(
                totals, non_blocking=True
            )
            event.record(torch.cuda.current_stream(device))
        record = {
            "step": self.step_count,
            "steps": self._steps_since_record,
            "seconds": self._since_record,
            "step_ms": step_times(self._seconds),
            "peak_memory_bytes": peak_memory(self._totals.devices),
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
        for name, counts, scalars in self._totals.read(totals.cpu()):
            layers.append(layer_record(name, counts, scalars))
            tokens = max(tokens, scalars["tokens"])
        record["tokens_per_second"] = tokens / max(record.pop("seconds"), 1e-9)
        flops = record["tokens_per_second"] * self.flops_per_token
        record["flops_utilization"] = flops / self.peak_flops
        record["layers"] = layers
        self.records.append(record)
        self._to_sinks(lambda sink: sink.write(record))
        if self.guard is not None:
            self.guard.check(record)

    def _to_sinks(self, do: Callable[[Log | TensorBoard], None]) -> None:
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


def _warn_of_ranks(ranks: int) -> None:
    warn(
        f"moe_ext.monitor: there are {ranks} ranks and no process_group, so each watches its own "
        "tokens and writes its own files (rank 1 to monitor.rank1.jsonl for monitor.jsonl, say). "
        "With process_group=torch.distributed.group.WORLD counts are added up and written once."
    )
