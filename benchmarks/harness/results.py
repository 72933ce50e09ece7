"""Files of results, each with the machine that its last row is from, and a line for each row."""

import functools
import json
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

import torch

import moe_ext

RESULTS = Path(__file__).parents[1] / "results"
# What exchanges or tunes the allocator of a process.
ALLOCATOR_VARIABLES = ("GLIBC_TUNABLES", "LD_PRELOAD", "MALLOC_CONF", "THP_MEM_ALLOC_ENABLE")


@functools.cache
def cpu_model() -> str:
    """The name; family and model too, since some names say little."""
    facts = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    if "model name" not in facts:
        return platform.machine()
    return f"{facts['model name']} family {facts.get('cpu family')} model {facts.get('model')}"


def _commit() -> str | None:
    """Of the checkout; "-dirty" for one with changes."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        result = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, check=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


@functools.cache
def machine(device: str = "cpu") -> dict:
    """What numbers depend on: of the machine and of the software."""
    facts = {
        "cpu": cpu_model(),
        "instruction_set": moe_ext.cpu_isa(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "moe_ext": moe_ext.__version__,
        "commit": _commit(),
    }
    for peer in ("transformers", "zentorch"):
        try:
            facts[peer] = metadata.version(peer)
        except metadata.PackageNotFoundError:
            pass
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = properties.name
        facts["memory_gib"] = round(properties.total_memory / 2**30)
        facts["cuda"] = torch.version.cuda
    return facts


def with_allocator(row: dict) -> dict:
    """The row; of a process whose allocator is tuned it says so, in its kind too, so that it
    doesn't replace the row of the default environment."""
    tuned = {name: os.environ[name] for name in ALLOCATOR_VARIABLES if os.environ.get(name)}
    if not tuned:
        return row
    return row | {"kind": f"{row['kind']}, tuned allocator", "environment": tuned}


def path_of(name: str, model: str = "") -> Path:
    """The file of a benchmark's results, of one model of CPU or GPU."""
    slug = re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")
    return RESULTS / f"{name}{'-' * bool(slug)}{slug}.json"


def _read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def keep(path: Path, facts: dict, name: str, figures) -> None:
    """Puts figures into the file by their name, and the machine's facts; whole or not at all."""
    results = {"machine": facts} | _read(path) | {"machine": facts, name: figures}
    new = path.with_suffix(".new")
    new.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(new, path)


def keep_row(path: Path, facts: dict, row: dict, key: tuple[str, ...]) -> list[dict]:
    """Puts the row in place of the file's row with the same key; returns all of them, sorted.
    A row has its commit, since those of a file may be from several."""
    identity = lambda each: tuple(each[field] for field in key)  # noqa: E731
    rows = [old for old in _read(path).get("rows", []) if identity(old) != identity(row)]
    rows = sorted([*rows, row | {"commit": facts["commit"]}], key=identity)
    keep(path, facts, "rows", rows)
    return rows


def per_second(amount: float, seconds: dict[str, float], unit: float) -> dict[str, float]:
    return {name: amount / t / unit for name, t in seconds.items()}


def milliseconds(seconds: dict[str, float]) -> dict[str, float]:
    return {name: t * 1e3 for name, t in seconds.items()}


def faster_than(seconds: dict[str, float], ours: str = "moe_ext") -> dict[str, float]:
    """The others' time over ours; of nobody if ours is missing."""
    others = seconds if ours in seconds else {}
    return {name: t / seconds[ours] for name, t in others.items() if name != ours}


def say(label: str, seconds: dict, rates: dict, unit: str, ceiling: float | None = None) -> None:
    """A line: the first contender's time, rate, share of the ceiling; the others' time over it."""
    ours = next(iter(seconds))
    share = f" = {rates[ours] / ceiling:.2f} of ceiling" if ceiling else ""
    versus = "  ".join(f"{name} {x:.2f}x" for name, x in faster_than(seconds, ours).items())
    ours = f"{ours} {seconds[ours] * 1e3:9.3f} ms {rates[ours]:6.1f} {unit}"
    print(f"{label:48} {ours}{share} | {versus}", flush=True)
