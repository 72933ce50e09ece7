"""The child process: cases one after the other, each announced before it runs.

It writes lines to a pipe: "start CASE", "call CASE {the call}", "end CASE {what came of it}".
"""

import json
import os
import random
import resource
import time
from collections.abc import Callable
from functools import partial

import torch

from . import hostile

# Above what the process holds when it starts. Address sanitizing takes terabytes of addresses, and
# has its own limit for one allocation.
MEMORY = 3 << 30


def limit_memory() -> None:
    with open("/proc/self/statm") as statm:
        pages = int(statm.read().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def case_rng(seed: int, kind: str, number: int) -> random.Random:
    return random.Random(f"{seed} {kind} {number}")


# Mutations to leave out, to look past what is known.
WITHOUT = frozenset(os.environ.get("MOE_EXT_FUZZ_WITHOUT", "").split(","))


def run_hostile(rng: random.Random, announce: Callable[[str], None]) -> dict:
    case = hostile.make_case(rng, WITHOUT)
    text = f"expected: {case.expected}; {case.describe()}"
    announce(text)
    outcome, problems = hostile.run_case(case, rng)
    return {
        "operator": case.call.operator,
        "outcome": outcome,
        "problems": problems,
        "call": text,
    }


def run_differential(rng: random.Random, announce: Callable[[str], None]) -> dict:
    from . import differential

    return differential.run_case(rng, announce)


KINDS = {"hostile": run_hostile, "differential": run_differential}


def work(kind: str, seed: int, first: int, seconds: float, count: int | None, pipe: int) -> None:
    import moe_ext  # noqa: F401  registers the operators

    def write(event: str, case: int, what: object = None) -> None:
        os.write(pipe, f"{event} {case} {json.dumps(what)}\n".encode())

    torch.set_num_threads(2)
    torch.ones(1 << 20).exp()  # threads start, and modules are imported, before memory is limited
    with hostile.filled_memory():
        torch.empty(1)
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):
        limit_memory()
    end, number = time.monotonic() + seconds, first
    while time.monotonic() < end and (count is None or number < first + count):
        write("start", number)
        result = KINDS[kind](case_rng(seed, kind, number), partial(write, "call", number))
        write("end", number, result)
        number += 1
