"""Where train_lm.py keeps a run: a folder that one run at a time holds, and its checkpoint.

A checkpoint may come from anybody. It is a safetensors file, so it holds no code, and everything in
it is checked against the run that takes it over before anything is installed: torch's fused AdamW
goes by the parameters' sizes and would run past the end of smaller states. What cannot be done ends
the program with one sentence, "train_lm: ...", and leaves the checkpoint that was there before.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import reprlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

CHECKPOINT, REPORT, COMPARISON = "checkpoint.safetensors", "report.json", "compare.json"
RUN_FILES = (CHECKPOINT, REPORT, "curves.png", "sample.txt", "monitor.jsonl", "monitor.png")
RESULTS = (CHECKPOINT, REPORT)  # without one of these, a folder has no run worth keeping
PROBE = "probe"
SHORT = reprlib.Repr()  # of what a file says: on one line, however long it is
SHORT.maxstring = 80

# --- the folder --------------------------------------------------------------------------------


@contextlib.contextmanager
def claim(out: Path) -> Iterator[None]:
    """Holds a folder for this run alone, and removes what runs that were killed left unfinished.

    The kernel lets go of the lock however the process ends. An OSError in the body, of a full disk
    for instance, becomes the sentence that the program ends with.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with open(out / ".lock", "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SystemExit(
                    f"train_lm: another run is writing to {out}: wait for it, or name another --out"
                ) from None
            except OSError as error:  # some network file systems have no locks
                print(f"train_lm: {out} cannot be locked ({error.strerror}): start one run in it")
            for name in (PROBE, COMPARISON, *RUN_FILES):
                partial_path(out / name).unlink(missing_ok=True)
            yield
    except OSError as error:
        kept = "; the last checkpoint is whole" if os.path.exists(out / CHECKPOINT) else ""
        raise SystemExit(
            f"train_lm: {error.filename or out}: {error.strerror or error}{kept}"
        ) from None


def require_space(out: Path, size: int) -> None:
    """Raises OSError now, not hours later, unless a file of so many bytes can be written."""
    probe = partial_path(out / PROBE)
    try:
        with open(probe, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
            os.fsync(file.fileno())
    finally:
        probe.unlink(missing_ok=True)


def clear(out: Path) -> None:
    """Removes an earlier run, so that nothing of it is taken for a part of the next."""
    for name in RUN_FILES:
        (out / name).unlink(missing_ok=True)


def write_file(path: Path, data: bytes) -> None:
    """Puts a file into place when all of it is on the disk; until then the old one stays."""
    partial = partial_path(path)
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def partial_path(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


# --- the checkpoint ----------------------------------------------------------------------------


def named_tensors(trainer) -> dict[str, Tensor]:
    """The tensors that the next step depends on, by their names in the file: the run's own, no
    copies. AdamW's are made, as AdamW would, if it has taken no step."""
    tensors = {f"model.{name}": value for name, value in trainer.model.state_dict().items()}
    for name, parameter in trainer.model.named_parameters():
        state = trainer.optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        tensors |= {f"optimizer.{key}.{name}": value for key, value in state.items()}
    return tensors


def size(trainer) -> int:
    """About the bytes of a run's files, most of them the checkpoint's."""
    return sum(tensor.nbytes for tensor in named_tensors(trainer).values()) + 2**20


def save(trainer, path: Path) -> None:
    metadata = {
        "options": json.dumps(dataclasses.asdict(trainer.o)),
        "text": trainer.text_id,
        "progress": json.dumps({"step": trainer.step, "seconds": trainer.seconds}),
        "history": json.dumps(trainer.history),
    }
    tensors = {name: tensor.contiguous() for name, tensor in named_tensors(trainer).items()}
    write_file(path, to_bytes(tensors, metadata))


class UnfitError(Exception):
    """Why a checkpoint cannot be taken over."""


def require(holds: bool, what: str) -> None:
    if not holds:
        raise UnfitError(what)


def load(trainer, path: Path) -> None:
    """Goes on from a checkpoint of the same options; installs all of it or nothing."""
    if not path.is_file():
        raise SystemExit(f"train_lm: nothing to resume: there is no {path}")
    try:
        with safe_open(path, "pt") as file:
            progress, history = read_metadata(file.metadata() or {}, trainer)
            tensors = read_tensors(file, named_tensors(trainer), progress["step"])
            with torch.no_grad():
                for own, found in tensors:
                    own.copy_(found)
    except UnfitError as error:
        raise SystemExit(f"train_lm: cannot resume {path}: {error}") from None
    except SafetensorError:
        raise SystemExit(
            f"train_lm: cannot resume {path}: it is cut off, damaged or no safetensors file"
        ) from None
    except OSError as error:
        raise SystemExit(f"train_lm: cannot read {path}: {error.strerror or error}") from None
    trainer.step, trainer.seconds = progress["step"], progress["seconds"]
    trainer.history = history


def read_metadata(metadata: dict[str, str], trainer) -> tuple[dict, dict]:
    """The progress and the history, after all checks."""
    keys = ("options", "text", "progress", "history")
    require(all(key in metadata for key in keys), "it is no checkpoint of train_lm")
    options, progress, history = (
        parse(metadata, key) for key in ("options", "progress", "history")
    )
    mine = dataclasses.asdict(trainer.o)
    require(options.keys() == mine.keys(), "it is of another version of train_lm")
    differing = [
        f"{name}: {SHORT.repr(options[name])} there, {value} here"
        for name, value in mine.items()
        if options[name] != value
    ]
    require(not differing, f"it is of other options ({'; '.join(differing)})")
    require(metadata["text"] == trainer.text_id, "it is of another Python's library, another text")
    step, steps = progress.get("step"), trainer.o.steps
    require(
        type(step) is int and 0 <= step <= steps,
        f"its step must be an integer from 0 to {steps}, got {SHORT.repr(step)}",
    )
    require(is_number(progress.get("seconds")), "its seconds must be a number >= 0")
    check_history(history, step, (len(trainer.model.moe_layers()), trainer.o.experts))
    return progress, history


def parse(metadata: dict[str, str], key: str) -> dict:
    try:
        value = json.loads(metadata[key])
    except (ValueError, RecursionError):
        raise UnfitError(f"its {key} are no JSON") from None
    require(isinstance(value, dict), f"its {key} must be a JSON object")
    return value


def is_number(value: object) -> bool:
    """A float that curves can be drawn of: not NaN, not infinite, nor close to that."""
    return type(value) is float and 0 <= value < 1e30


def are_numbers(values: object, count: int) -> bool:
    return isinstance(values, list) and len(values) == count and all(map(is_number, values))


def check_history(history: dict, step: int, share_shape: tuple[int, int]) -> None:
    """Raises UnfitError unless it is what a run of so many steps has written."""
    expected = {"loss", "seconds", "held_out", "experts"}
    require(history.keys() == expected, f"its history must have {', '.join(sorted(expected))}")
    for key in ("loss", "seconds"):
        require(
            are_numbers(history[key], step),
            f"its history's {key} must be {step} finite numbers >= 0, one a step",
        )

    def is_share(value: object) -> bool:
        layers, experts = share_shape
        is_list = isinstance(value, list) and len(value) == layers
        return is_list and all(are_numbers(row, experts) for row in value)

    for key, field, holds in (
        ("held_out", "bits_per_byte", is_number),
        ("experts", "share", is_share),
    ):
        entries, last = history[key], 0
        require(isinstance(entries, list), f"its history's {key} must be a list")
        for entry in entries:
            require(
                isinstance(entry, dict)
                and entry.keys() == {"step", field}
                and type(entry["step"]) is int
                and last <= entry["step"] <= step
                and holds(entry[field]),
                f"its history's {key} must have a step up to {step}, in order, and the {field} of "
                f"this model, got {SHORT.repr(entry)}",
            )
            last = entry["step"]


def read_tensors(file, own: dict[str, Tensor], step: int) -> list[tuple[Tensor, Tensor]]:
    """(the run's tensor, the file's), all of them alike in name, shape and dtype."""
    names = set(file.keys())
    for differing, what in ((own.keys() - names, "lacks"), (names - own.keys(), "has a foreign")):
        require(not differing, f"it {what} tensor {SHORT.repr(min(differing, default=None))}")
    pairs = []
    for name, mine in own.items():
        found = file.get_tensor(name)
        require(
            (found.shape, found.dtype) == (mine.shape, mine.dtype),
            f"{name} must be {list(mine.shape)} {mine.dtype}, "
            f"got {list(found.shape)} {found.dtype}",
        )
        if name.startswith("optimizer.step."):  # AdamW counts in float32, up to 2**24
            require(found.item() == min(step, 2**24), f"{name} must be its step, {step}")
        pairs.append((mine, found))
    return pairs
