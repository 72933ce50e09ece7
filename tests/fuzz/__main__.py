"""`make fuzz`: fuzzes for a while, or runs one case again."""

import argparse
import sys
from functools import partial

import moe_ext  # noqa: F401  registers the operators

from . import supervisor, worker


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="for each kind of case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=sorted(worker.KINDS), help="this kind of case alone")
    parser.add_argument("--case", type=int, help="run this case again, in this process")
    parser.add_argument("--first", type=int, default=0, help="start with this case")
    parser.add_argument("--count", type=int, help="stop after so many cases")
    parser.add_argument("--pipe", type=int, help=argparse.SUPPRESS)  # a worker's
    options = parser.parse_args()
    if options.case is not None:
        kind = options.only or "hostile"
        rng = worker.case_rng(options.seed, kind, options.case)
        result = worker.KINDS[kind](rng, partial(print, flush=True))
        print(result["outcome"], *result["problems"], sep="\n")
        return bool(result["problems"])
    if options.pipe is not None:
        worker.work(
            options.only,
            options.seed,
            options.first,
            options.seconds,
            options.count,
            options.pipe,
        )
        return 0
    failed = False
    for kind in [options.only] if options.only else sorted(worker.KINDS):
        report = supervisor.run(kind, options.seed, options.seconds, options.first, options.count)
        print(*report.findings, report, sep="\n", flush=True)
        failed = failed or bool(report.findings)
    return failed


if __name__ == "__main__":
    sys.exit(main())
