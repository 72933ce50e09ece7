"""The parent process: starts workers, outlives their crashes and hangs, counts and reports."""

import json
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# For one call; a worker may take ten times as long to start.
SECONDS_PER_CALL = float(os.environ.get("MOE_EXT_FUZZ_CALL_SECONDS", "120"))
TESTS = Path(__file__).resolve().parent.parent


@dataclass
class Finding:
    kind: str
    seed: int
    case: int
    what: str
    call: str

    def __str__(self) -> str:
        replay = f"PYTHONPATH=tests python -m fuzz --only {self.kind} --seed {self.seed}"
        return f"{self.what}\n  {self.call}\n  again: {replay} --case {self.case}"


@dataclass
class Report:
    kind: str
    calls: int = 0
    outcomes: Counter = field(default_factory=Counter)
    operators: Counter = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        counts = ", ".join(f"{name} {n}" for name, n in self.outcomes.most_common())
        least = min(self.operators.values(), default=0)
        return (
            f"{self.kind}: {self.calls} calls of {len(self.operators)} operators in "
            f"{self.seconds:.0f} s (at least {least} of each): {counts}; "
            f"{len(self.findings)} findings"
        )


def lines(pipe: int, timeout: float) -> Iterator[str]:
    """The lines of a pipe; TimeoutError after `timeout` seconds without any (ten times that before
    the first)."""
    buffer, wait = b"", 10 * timeout
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            if not selector.select(wait):
                raise TimeoutError
            data = os.read(pipe, 1 << 16)
            if not data:
                return
            wait = timeout
            *whole, buffer = (buffer + data).split(b"\n")
            yield from (line.decode() for line in whole)


def ended(process: subprocess.Popen, errors) -> str:
    """How a worker died, with the last of what it said."""
    code = process.wait()
    name = signal.Signals(-code).name if code < 0 else f"exit {code}"
    errors.seek(0)
    said = errors.read().decode(errors="replace").strip().split("\n")
    sanitizer = re.compile("ERROR: AddressSanitizer|runtime error:")
    report = [n for n, line in enumerate(said) if sanitizer.search(line)]
    told = said[report[0] :][:10] if report else said[-12:]
    return "\n    ".join([f"crashed: {name}", *(line[:200] for line in told)])


def start(kind: str, seed: int, first: int, seconds: float, count, pipe: int, errors):
    options = [f"--{k}={v}" for k, v in (("only", kind), ("seed", seed), ("first", first))]
    options += [f"--seconds={seconds}", f"--pipe={pipe}"]
    if count is not None:
        options.append(f"--count={count}")
    path = os.pathsep.join([str(TESTS), *filter(None, sys.path)])
    return subprocess.Popen(
        [sys.executable, "-X", "faulthandler", "-m", "fuzz", *options],
        pass_fds=[pipe],
        stdout=subprocess.DEVNULL,
        stderr=errors,
        env={**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"},
    )


def run(kind: str, seed: int, seconds: float, first: int = 0, count: int | None = None) -> Report:
    """Cases from `first` on, for so many seconds (and cases)."""
    report, began, number = Report(kind), time.monotonic(), first
    while True:
        left = seconds - (time.monotonic() - began)
        if left <= 0 or (count is not None and number >= first + count):
            break
        read, write = os.pipe()
        with tempfile.TemporaryFile() as errors:
            remaining = None if count is None else first + count - number
            process = start(kind, seed, number, left, remaining, write, errors)
            os.close(write)
            running, call, failed = None, "", None
            try:
                for line in lines(read, SECONDS_PER_CALL):
                    event, case, what = line.split(" ", 2)
                    number, value = int(case), json.loads(what)
                    if event == "start":
                        running, call = number, "the fuzzer's own, before the call"
                    elif event == "call":
                        call = value
                    else:
                        note(report, seed, number, value)
                        running, number = None, number + 1
            except TimeoutError:
                failed = f"hung for {SECONDS_PER_CALL:.0f} s"
                process.kill()
            finally:
                os.close(read)
            died = ended(process, errors)
        if running is None and process.returncode != 0:
            raise RuntimeError(f"the worker failed outside a call: {died}")
        if running is not None:
            report.findings.append(Finding(kind, seed, running, failed or died, call))
            report.calls += 1
            report.outcomes["hung" if failed else "crashed"] += 1
            number = running + 1
    report.seconds = time.monotonic() - began
    return report


def note(report: Report, seed: int, case: int, result: dict) -> None:
    report.calls += 1
    report.outcomes[result["outcome"]] += 1
    report.operators[result["operator"]] += 1
    if result["problems"]:
        what = "; ".join(result["problems"])
        report.findings.append(Finding(report.kind, seed, case, what, result["call"]))
