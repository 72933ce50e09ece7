"""What the benchmarks share. `make bench` runs them; ARGS=--benchmark-json=FILE keeps them."""

import platform
from pathlib import Path

import pytest
import torch


def cpu_model() -> str:
    """The name; family and model too, since some names say little."""
    facts = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    if "model name" not in facts:
        return platform.machine()
    return f"{facts['model name']} family {facts.get('cpu family')} model {facts.get('model')}"


def pytest_benchmark_update_json(config, benchmarks, output_json):
    for row in output_json["benchmarks"]:
        row["stats"].pop("data")  # every single round


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.pop("node")
    machine_info["cpu_model"] = cpu_model()
    machine_info["threads"] = torch.get_num_threads()
    machine_info["torch"] = torch.__version__


def pytest_report_header(config):
    return f"{cpu_model()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def run(benchmark):
    """run(fn, flops=, bytes_moved=): times fn and adds its best GFLOP/s and GB/s to the row."""

    def run(fn, *, flops: int = 0, bytes_moved: int = 0):
        fn()  # allocations and caches of the first call
        benchmark(fn)
        if benchmark.disabled:
            return
        best = benchmark.stats.stats.min
        if flops:
            benchmark.extra_info["gflops"] = round(flops / best / 1e9, 1)
        if bytes_moved:
            benchmark.extra_info["gbytes_per_s"] = round(bytes_moved / best / 1e9, 1)

    return run
