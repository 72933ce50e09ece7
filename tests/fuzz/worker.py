"""The child process: cases one after the other, each announced before it runs.

It writes lines to a pipe: "start CASE", then "end CASE {what came of it}".
"""

import json
import os
import random
import resource
import time

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


def run_hostile(rng: random.Random) -> dict:
    case = hostile.make_case(rng, WITHOUT)
    text = case.describe()
    outcome, problems = hostile.run_case(case, rng)
    return {
        "operator": case.call.operator,
        "outcome": outcome,
        "problems": problems,
        "call": text,
        "expected": case.expected,
    }


def run_differential(rng: random.Random) -> dict:
    from . import differential

    return differential.run_case(rng)


KINDS = {"hostile": run_hostile, "differential": run_differential}


def describe(seed: int, kind: str, number: int) -> str:
    """The call of a case that cannot be run in this process."""
    if kind != "hostile":
        return f"{kind} case"
    try:
        return hostile.make_case(case_rng(seed, kind, number), WITHOUT).describe()
    except Exception as error:  # the fuzzer's own, which its worker reported
        return f"cannot be made: {error!r}"


def work(kind: str, seed: int, first: int, seconds: float, count: int | None, pipe: int) -> None:
    import moe_ext  # noqa: F401  registers the operators

    torch.set_num_threads(2)
    torch.ones(1 << 20).exp()  # threads start, and modules are imported, before memory is limited
    with hostile.filled_memory():
        torch.empty(1)
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):
        limit_memory()
    end, number = time.monotonic() + seconds, first
    while time.monotonic() < end and (count is None or number < first + count):
        os.write(pipe, f"start {number}\n".encode())
        result = KINDS[kind](case_rng(seed, kind, number))
        if not result["problems"]:
            result = {key: result[key] for key in ("operator", "outcome", "problems")}
        os.write(pipe, f"end {number} {json.dumps(result)}\n".encode())
        number += 1
