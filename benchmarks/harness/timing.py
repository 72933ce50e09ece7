"""Contenders timed in turns, after their outputs were compared."""

import statistics
from collections.abc import Callable, Iterable

import torch

from .device import Device

# Between two contenders' outputs, max|a - b| / max|b|. Enough for sums in other orders and for
# intermediates that are rounded or not; a wrong result is off by about 1.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2**-5, torch.float16: 2**-8}
SAMPLE = 2**20  # values of an output that are compared


class Disagreement(AssertionError):
    """A contender's output is not that of the others."""


class Agreement:
    """Every contender's output must be finite, and all but `unlike` those of the first one."""

    def __init__(self, dtype: torch.dtype = torch.float32, unlike: Iterable[str] = ()):
        self.tolerance = TOLERANCE[dtype]
        self.unlike = set(unlike)
        self._first: tuple[str, list] | None = None

    def check(self, name: str, output) -> None:
        values = [_sample(tensor) for tensor in _tensors(output)]
        if not all(value.isfinite().all() for value in values):
            raise Disagreement(f"{name}: values are not finite")
        if name in self.unlike:
            return
        if self._first is None:
            self._first = (name, values)
            return
        first, expected = self._first
        if [value.shape for value in values] != [value.shape for value in expected]:
            raise Disagreement(f"{name}: other outputs than {first}'s")
        for i, (a, b) in enumerate(zip(values, expected, strict=True)):
            if a.numel() == 0:
                continue
            error = ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()
            if error > (self.tolerance if b.is_floating_point() else 0):
                raise Disagreement(f"{name}: output {i} differs from {first}'s by {error:.2g}")


def _tensors(output) -> list[torch.Tensor]:
    """Of a call's output, in its lists and tuples too."""
    if isinstance(output, torch.Tensor):
        return [output.detach()]
    parts = output if isinstance(output, (list, tuple)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Values from all over the tensor, on the CPU; few, since some gradients are gigabytes."""
    step = -(-tensor.numel() // SAMPLE) | 1  # odd, or they would be of a few columns only
    values = tensor.reshape(-1)[::step].cpu()
    return values.double() if values.is_floating_point() else values.long()


class Turns:
    """Calls of several contenders, timed one after the other in rounds, so that a noisy machine
    is noisy for all of them.

    calls: by contender, a call, or several of the same work on other inputs, taken in turn.
    seconds: for all rounds together; rounds: their number instead.
    agreement: what holds the contenders' outputs against each other.
    before: is told the contender's name before each of its calls; not timed.
    ceiling: is measured between rounds, up to 30 times; `peak` is the best.
    """

    def __init__(
        self,
        calls: dict[str, Callable | list[Callable]],
        device: Device | None = None,
        *,
        seconds: float = 2.0,
        rounds: int | None = None,
        agreement: Agreement | None = None,
        before: Callable[[str], None] = lambda name: None,
        ceiling: Callable[[], float] | None = None,
    ):
        self.calls = {n: each if isinstance(each, list) else [each] for n, each in calls.items()}
        self.device = device or Device()
        self.before = before
        self.ceiling = ceiling
        self.peak = 0.0
        self.times: dict[str, list[float]] = {}
        self._turn = 0
        one_round = self._warm_up(agreement or Agreement())
        self.rounds = rounds or max(3, min(2000, int(seconds / one_round)))

    def _warm_up(self, agreement: Agreement) -> float:
        """Sets up libraries, compilers and allocators, compares the outputs, and returns the
        seconds of a round. A contender that runs out of a GPU's memory is left out."""
        one_round = 0.0
        for name, each in list(self.calls.items()):
            try:
                self.before(name)
                agreement.check(name, each[0]())
                for call in each[1:]:
                    call()
                one_round += self.device.seconds(each[0])
                self.times[name] = []
            except torch.cuda.OutOfMemoryError:
                print(f"  {name}: out of memory")
                del self.calls[name]
                self.device.release()
        return one_round

    def round(self, names: Iterable[str] | None = None) -> None:
        """Every contender once, or those named."""
        if self.ceiling and self._turn % max(1, self.rounds // 30) == 0:
            self.peak = max(self.peak, self.ceiling())
        for name in self.calls if names is None else names:
            self.before(name)
            each = self.calls[name]
            self.times[name].append(self.device.seconds(each[self._turn % len(each)]))
        self._turn += 1

    def run(self) -> "Turns":
        for _ in range(self.rounds):
            self.round()
        return self

    def best(self) -> dict[str, float]:
        """Seconds of every contender's best call."""
        return {name: min(times) for name, times in self.times.items()}

    def median(self) -> dict[str, float]:
        return {name: statistics.median(times) for name, times in self.times.items()}

    def mean(self) -> dict[str, float]:
        """For calls of which some do more than others."""
        return {name: statistics.mean(times) for name, times in self.times.items()}
