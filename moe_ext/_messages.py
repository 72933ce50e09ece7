"""How the modules check their options and warn: `who: argument must be ..., got ...`, and a warning
at the user's own line."""

import math
import numbers
import os
import sys
import sysconfig
import warnings
from pathlib import Path

import torch

# The code of these is not the user's: what is installed, what torch compiles, and this package
# wherever it lies.
_NOT_THE_USERS = (
    "<",
    *(
        str(folder) + os.sep
        for folder in (
            Path(__file__).parent,
            Path(torch.__file__).parent,
            *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")),
        )
    ),
)


def warn(text: str) -> None:
    """A UserWarning at the user's line that led here, whatever lies between: the call of a layer,
    the step of an optimizer."""
    frame, level = sys._getframe(1), 2
    while frame is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=2 if frame is None else level)


def warn_once(warned: set[str], reason: str, text: str) -> None:
    """`warn`, unless the reason is among those warned of; never while torch compiles."""
    if not torch.compiler.is_compiling() and reason not in warned:
        warned.add(reason)
        warn(text)


def need(who: str, condition: bool, argument: str, must_be: str, got: object) -> None:
    """Raises ValueError unless the condition holds."""
    if not condition:
        raise ValueError(f"{who}: {argument} must be {must_be}, got {got!r}")


def need_int(who: str, argument: str, got: object, least: int) -> None:
    """Raises ValueError unless it is an integer, no smaller than `least`."""
    is_int = isinstance(got, numbers.Integral) and not isinstance(got, bool)
    need(who, is_int, argument, "an integer", got)
    need(who, got >= least, argument, f">= {least}", got)


def need_sizes(who: str, **sizes: object) -> None:
    """Raises ValueError unless all are integers above 0, and top_k, if it is one of them, is no
    larger than num_experts."""
    for name, size in sizes.items():
        need_int(who, name, size, least=1)
    if "top_k" in sizes:
        top_k, num_experts = sizes["top_k"], sizes["num_experts"]
        need(who, top_k <= num_experts, "top_k", f"in [1, num_experts={num_experts}]", top_k)


def need_number(who: str, argument: str, got: object) -> None:
    """Raises ValueError unless it is a finite number."""
    is_number = isinstance(got, numbers.Real) and not isinstance(got, bool)
    need(who, is_number and math.isfinite(got), argument, "a finite number", got)


def need_bool(who: str, argument: str, got: object) -> None:
    """Raises ValueError unless it is True or False."""
    need(who, isinstance(got, bool), argument, "True or False", got)


def need_choice(who: str, argument: str, got: object, *choices: str) -> None:
    """Raises ValueError unless it is one of the names."""
    names = f"{', '.join(choices[:-1])} or {choices[-1]}"
    need(who, isinstance(got, str) and got in choices, argument, names, got)
