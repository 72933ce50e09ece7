"""The benchmarks' own logic: turns, the comparison before them, and files of results."""

import dataclasses
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from harness import results
from harness.device import Device
from harness.peers import PEERS, UNLIKE, call_of
from harness.timing import Agreement, Disagreement, Turns
from harness.work import Inputs, Work

WORK = Work(H=32, I=16, E=4, K=2, T=24, dtype=torch.float32)
TRANSPOSED = dataclasses.replace(WORK, transposed=True)


class Clock:
    """A device on which the n-th call takes n seconds."""

    def __init__(self):
        self.ticks = itertools.count(1)

    def seconds(self, call):
        call()
        return float(next(self.ticks))


def test_contenders_take_turns_on_all_their_inputs():
    order = []

    def call(name):
        return lambda: order.append(name)

    turns = Turns({"a": [call("a0"), call("a1")], "b": call("b")}, Clock(), rounds=3)
    assert order == ["a0", "a1", "a0", "b", "b"]  # each warmed up, and timed for the estimate
    order.clear()
    turns.run()
    assert order == ["a0", "b", "a1", "b", "a0", "b"]
    assert turns.times == {"a": [3.0, 5.0, 7.0], "b": [4.0, 6.0, 8.0]}
    assert turns.best() == {"a": 3.0, "b": 4.0}
    assert turns.median() == turns.mean() == {"a": 5.0, "b": 6.0}


def test_a_result_is_freed_after_the_clock_stops(monkeypatch):
    events = []
    monkeypatch.setattr("time.perf_counter", lambda: events.append("clock") or 0.0)

    class Result:
        def __del__(self):
            events.append("freed")

    Device().seconds(Result)
    assert events == ["clock", "clock", "freed"]


def test_rounds_fill_the_seconds():
    call = {"a": lambda: None, "b": lambda: None}  # 1 and 2 seconds in the warm-up
    assert Turns(call, Clock(), seconds=30).rounds == 10
    assert Turns(call, Clock(), seconds=1).rounds == 3


def test_ceiling_is_the_best_of_those_between_rounds():
    ceilings = iter([2.0, 5.0, 3.0])
    turns = Turns({"a": lambda: None}, Clock(), rounds=3, ceiling=lambda: next(ceilings))
    assert turns.run().peak == 5.0


def test_before_is_told_who_is_next():
    told = []
    turns = Turns({"a": lambda: None, "b": lambda: None}, Clock(), rounds=1, before=told.append)
    told.clear()
    turns.run()
    assert told == ["a", "b"]


@pytest.mark.parametrize("work", [WORK, TRANSPOSED], ids=str)
@pytest.mark.parametrize("kind", ["forward", "train"])
def test_peers_agree(kind, work):
    x = Inputs.make(work, kind == "train")
    agreement = Agreement(WORK.dtype, UNLIKE)
    for name in ("moe_ext", "reference", "unfused", "grouped_mm", "eager", "dense", "bmm"):
        if name in PEERS:
            agreement.check(name, call_of(kind, PEERS[name](work, x))())


def test_transposed_weights_are_the_same_numbers():
    usual, transposed = (Inputs.make(work, train=True) for work in (WORK, TRANSPOSED))
    for name in ("gate_up", "down"):
        a, b = getattr(usual, name), getattr(transposed, name)
        assert torch.equal(a, b) and b.is_leaf
        assert a.is_contiguous() and b.mT.is_contiguous()


def test_a_train_step_leaves_no_gradients_and_gives_them_in_the_leaves_layout():
    layer = PEERS["reference"](TRANSPOSED, Inputs.make(TRANSPOSED, train=True))
    grads = call_of("train", layer)()
    assert [grad.stride() for grad in grads] == [leaf.stride() for leaf in layer.leaves]
    assert all(leaf.grad is None for leaf in layer.leaves)


def test_a_mix_up_of_experts_shows():
    x = Inputs.make(WORK, train=False)
    agreement = Agreement(WORK.dtype)
    agreement.check("moe_ext", call_of("forward", PEERS["moe_ext"](WORK, x))())
    x.ids = (x.ids + 1) % WORK.E
    with pytest.raises(Disagreement, match="wrong: output 0 differs from moe_ext's by"):
        agreement.check("wrong", call_of("forward", PEERS["reference"](WORK, x))())


@pytest.mark.parametrize(
    "other, complaint",
    [
        (torch.tensor([1.0, torch.nan]), "not finite"),
        (torch.ones(3), "other outputs"),
        ([torch.ones(2), torch.ones(2)], "other outputs"),
        (torch.tensor([1.0, 1.001]), "output 0 differs"),
    ],
)
def test_disagreement(other, complaint):
    agreement = Agreement()
    agreement.check("one", torch.ones(2))
    agreement.check("close", torch.ones(2) + 1e-5)
    with pytest.raises(Disagreement, match=complaint):
        agreement.check("other", other)


def test_whole_numbers_must_be_equal():
    agreement = Agreement()
    agreement.check("one", (torch.ones(2), torch.tensor([100_000, 7])))
    with pytest.raises(Disagreement, match="output 1"):
        agreement.check("other", (torch.ones(2), torch.tensor([100_001, 7])))


def test_a_row_replaces_its_like(tmp_path):
    path = tmp_path / "rows.json"
    facts = {"cpu": "some", "commit": "abc"}
    for work, ms in (("b", 1), ("a", 2), ("b", 3)):
        rows = results.keep_row(path, facts, {"kind": "train", "work": work, "ms": ms}, ("work",))
    assert [(row["work"], row["ms"], row["commit"]) for row in rows] == [
        ("a", 2, "abc"),
        ("b", 3, "abc"),
    ]
    results.keep(path, facts, "monitor", {"us": 1})
    assert json.loads(path.read_text()) == {"machine": facts, "rows": rows, "monitor": {"us": 1}}
    assert list(tmp_path.iterdir()) == [path]


def test_rows_of_a_tuned_allocator_say_so(monkeypatch):
    for variable in results.ALLOCATOR_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    row = {"kind": "train", "work": "a"}
    assert results.with_allocator(row) == row
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.mmap_max=0")
    marked = results.with_allocator(row)
    assert marked["kind"] == "train, tuned allocator" and marked["work"] == "a"
    assert marked["environment"] == {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=0"}


def test_results_of_a_model_have_a_file_of_their_own():
    assert results.path_of("moe_cpu", "AMD EPYC 7 (x)").name == "moe_cpu-amd-epyc-7-x.json"
    assert results.path_of("balance").name == "balance.json"


def test_the_machine_is_recorded():
    facts = results.machine()
    assert facts["cpu"] and facts["instruction_set"] and facts["moe_ext"]
    assert facts["threads"] == torch.get_num_threads() and facts["torch"] == torch.__version__
