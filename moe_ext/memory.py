"""The memory of large results on the CPU: blocks on huge pages that are kept and reused.

What a system gives fresh it maps and clears while it is first written, which for the weights'
gradients of many experts takes as long as computing them. So results and scratch memory of 1 MiB
and more of the CPU operators lie in blocks of their own, on huge pages where the system allows them
on request, and a block whose tensor is gone is held for the next that needs about as much. What is
held goes back by itself:

- as soon as the process would otherwise need more memory than it had at its highest without it;
- when blocks of four times what there is were asked for since, or ten seconds have passed (noticed
  at the next call of an operator).

All functions may be called from any thread. A forked child has a cache of its own.
"""

from moe_ext import _C
from moe_ext._messages import need_int

_NO_LIMIT = 2**63 - 1


def memory_stats() -> dict[str, int | float]:
    """Of the process: `bytes_in_use` by blocks of tensors that are there, `bytes_held` by blocks
    kept for reuse, `hits` and `misses` (requests that a held block served, and those that were
    mapped anew), and `hit_rate` (hits / requests; 0.0 before the first)."""
    stats = _C.memory_stats()
    requests = stats["hits"] + stats["misses"]
    return {**stats, "hit_rate": stats["hits"] / requests if requests else 0.0}


def empty_cache() -> None:
    """Gives all held blocks back to the system."""
    _C.empty_cache()


def set_memory_limit(bytes: int | None) -> None:
    """The most that is held, in bytes: 0 turns reuse off (huge pages stay), None, the default, is
    no limit beyond the process's own peak.

    Raises ValueError for anything else than None or an integer >= 0.
    """
    if bytes is not None:
        need_int("set_memory_limit", "bytes", bytes, least=0)
    _C.set_memory_limit(_NO_LIMIT if bytes is None else min(bytes, _NO_LIMIT))
