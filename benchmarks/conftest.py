"""pytest's side of the harness. `make bench` runs all; ARGS=--benchmark-json=FILE keeps it."""

import pytest
import torch
from harness.results import cpu_model, machine
from harness.timing import Turns


def pytest_benchmark_update_json(config, benchmarks, output_json):
    for row in output_json["benchmarks"]:
        row["stats"].pop("data")  # every single round


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.pop("node")
    machine_info |= {key: fact for key, fact in machine().items() if key != "cpu"}
    machine_info["cpu_model"] = cpu_model()


def pytest_report_header(config):
    facts = machine()
    return (
        f"{facts['cpu']}, {facts['threads']} threads, {facts['instruction_set']}, "
        f"torch {facts['torch']}, moe_ext {facts['moe_ext']} at {facts['commit']}"
    )


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def take_turns(benchmark):
    """take_turns(calls, row=, flops=, bytes_moved=, **options of Turns) -> Turns, all its rounds
    taken. The row's contender is timed by pytest-benchmark; its best GFLOP/s and GB/s join the row.
    """

    def take_turns(calls, row="moe_ext", *, flops=0, bytes_moved=0, **options) -> Turns:
        rounds = 1 if benchmark.disabled else None
        turns = Turns(calls, **{"rounds": rounds} | options)
        (call,) = turns.calls[row]
        if benchmark.disabled:
            benchmark(call)
            return turns.run()
        others = [name for name in turns.calls if name != row]
        alive = []  # as in Device.seconds: the clock stops before the result is freed

        def between():
            alive.clear()
            turns.round(others)
            turns.before(row)

        benchmark.pedantic(lambda: alive.append(call()), setup=between, rounds=turns.rounds)
        turns.times[row] = benchmark.stats.stats.data
        best = benchmark.stats.stats.min
        if flops:
            benchmark.extra_info["gflops"] = round(flops / best / 1e9, 1)
        if bytes_moved:
            benchmark.extra_info["gbytes_per_s"] = round(bytes_moved / best / 1e9, 1)
        return turns

    return take_turns
