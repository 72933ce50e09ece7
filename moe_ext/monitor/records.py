"""Records: how they are made of numbers, and where they go."""

import json
import math
import os
import resource
from collections.abc import Iterable
from pathlib import Path

import torch

from moe_ext._messages import warn


def step_times(seconds: Iterable[float]) -> dict[str, float]:
    """Mean and percentiles of the steps' times, in milliseconds."""
    ordered = sorted(seconds)
    times = {"mean": sum(ordered) / len(ordered)}
    for q in (50, 95, 99):
        times[f"p{q}"] = ordered[min(len(ordered) - 1, math.ceil(q / 100 * len(ordered)) - 1)]
    return {name: round(1000 * value, 3) for name, value in times.items()}


def layer_record(name: str, counts: list[int], scalars: dict[str, float]) -> dict:
    """A layer's part of a record, see `Monitor`, of what `Totals.read` gives."""
    mean = max(sum(counts) / len(counts), 1e-9)
    slots = sum(counts) + scalars["dropped"]
    forwards = max(scalars["forwards"], 1.0)
    return {
        "name": name,
        "tokens_per_expert": counts,
        "max_over_mean": max(counts) / mean,
        "min_over_mean": min(counts) / mean,
        "idle_experts": counts.count(0),
        "dropped": int(scalars["dropped"]),
        "drop_rate": scalars["dropped"] / max(slots, 1.0),
        "entropy": None if math.isnan(scalars["entropy"]) else scalars["entropy"],
        "aux_loss": None if math.isnan(scalars["loss"]) else scalars["loss"] / forwards,
    }


def peak_memory(devices: set[torch.device]) -> int:
    """In bytes: of the allocators of the GPUs, or of the process where there is no GPU."""
    on_gpus = [torch.cuda.max_memory_allocated(x) for x in devices if x.type == "cuda"]
    return sum(on_gpus) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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


def parse_record(line: bytes) -> dict | None:
    """The record of a line of JSON; None if it is something else."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        return None
    return record if _matches(record, _RECORD) else None


def of_rank(path: str | Path, rank: int) -> Path:
    """The path for a rank: rank 0's is the path itself."""
    path = Path(path)
    return path.with_name(f"{path.stem}.rank{rank}{path.suffix}") if rank else path


def _open_existing(path: str, flags: int) -> int:
    return os.open(path, flags & ~os.O_CREAT)


class Log:
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
                    record = parse_record(line)
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


class TensorBoard:
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
