"""The fuzzer for half a minute of each kind, and that it sees what it is there to see."""

import os
import random

import pytest
import torch

import moe_ext  # noqa: F401  registers the operators

from . import calls, differential, hostile, loops, supervisor, worker

SEED = 0
SECONDS = float(os.environ.get("MOE_EXT_FUZZ_SECONDS", "30"))
# What half a minute is enough for on two quiet cores, so that the cases are the same everywhere.
CASES = {"hostile": 12_000, "differential": 3000}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", sorted(worker.KINDS))
def test_no_findings(kind, capsys):
    report = supervisor.run(kind, SEED, SECONDS, count=CASES[kind])
    with capsys.disabled():
        print(f"\n{report}")
    assert not report.findings, "\n".join(map(str, report.findings))
    operators = calls.OPERATORS if kind == "hostile" else differential.OPERATORS
    assert len(report.operators) == len(operators)


def test_every_operator_has_a_generator():
    assert hostile.missing_operators() == set()


def test_a_new_operator_is_noticed():
    library = torch.library.Library("moe_ext", "FRAGMENT")
    library.define("_brand_new(Tensor x) -> Tensor")
    assert hostile.missing_operators() == {"_brand_new"}
    library._destroy()
    assert hostile.missing_operators() == set()


@pytest.mark.parametrize("operator", sorted(calls.OPERATORS))
def test_good_calls_are_good(operator):
    for number in range(12):
        rng = random.Random(f"{operator} {number}")
        case = hostile.Case(calls.good_call(operator, rng), hostile.RETURNS, "plain")
        outcome, problems = hostile.run_case(case, rng)
        assert (outcome, problems) == ("returned", []), case.describe()


# What the fuzzer must see: each is an operator that does the wrong thing in place of permute.


def outcome_of(monkeypatch, function, expected=hostile.RETURNS) -> str:
    """The problems of a good call of permute if `function` were the operator."""
    monkeypatch.setattr(torch.ops.moe_ext, "_permute_for_test", function, raising=False)
    call = calls.good_call("permute", random.Random("a good call"))
    call.operator = "_permute_for_test"
    _, problems = hostile.run_case(hostile.Case(call, expected, "plain"), random.Random(0))
    return "; ".join(problems)


def raising(error: Exception):
    def function(**arguments):
        raise error

    return function


def permuted(change):
    def function(tokens, topk_ids, num_experts):
        return change(*torch.ops.moe_ext.permute(tokens, topk_ids, num_experts), tokens)

    return function


@pytest.mark.parametrize(
    "function,problem",
    [
        (permuted(lambda rows, *rest: (rows.double().half(), *rest[:2])), "output 0 is"),
        (permuted(lambda rows, *rest: (rows[:-1], *rest[:2])), "output 0 is"),
        (permuted(lambda rows, *rest: (rows.to("meta"), *rest[:2])), "output 0 is"),
        (permuted(lambda rows, row_map, offsets, tokens: (rows, row_map)), "2 outputs"),
        (permuted(lambda *all: (torch.empty_like(all[0]), *all[1:3])), "differs from run to run"),
        (
            permuted(lambda *all: (all[0], all[1], all[2].add_(all[3].zero_().sum().int()))),
            "wrote into tokens",
        ),
        (raising(RuntimeError("permute: bad")), "raised for a good call"),
        (raising(MemoryError("permute: bad")), "raised a MemoryError"),
        (raising(KeyError("permute: bad")), "raised a KeyError"),
    ],
)
def test_a_wrong_operator_is_noticed(monkeypatch, function, problem):
    assert problem in outcome_of(monkeypatch, function)


@pytest.mark.parametrize(
    "function,problem",
    [
        (permuted(lambda *all: all[:3]), "the contract asks for an error"),
        (raising(RuntimeError("vector::_M_default_append")), "names no operator"),
        (raising(RuntimeError("permute_for_test: tokens must be")), ""),
    ],
)
def test_a_missing_error_is_noticed(monkeypatch, function, problem):
    assert problem in outcome_of(monkeypatch, function, hostile.RAISES)
    if not problem:
        assert outcome_of(monkeypatch, function, hostile.RAISES) == ""


# A worker that dies or sleeps in its third case.
WORKER = """
import os, sys, time
pipe, first = (int(x) for x in sys.argv[1:3])
for case in range(first, 6):
    os.write(pipe, f'start {case} null\\ncall {case} "permute()"\\n'.encode())
    if case == 2: %s
    end = '{"operator": "permute", "outcome": "returned", "problems": []}'
    os.write(pipe, f"end {case} {end}\\n".encode())
"""


@pytest.mark.parametrize(
    "fate,finding",
    [
        ("os.abort()", "crashed: SIGABRT"),
        ("sys.exit(7)", "crashed: exit 7"),
        ("time.sleep(100)", "hung"),
    ],
)
def test_a_crash_or_a_hang_is_a_finding_and_not_the_end(monkeypatch, fate, finding):
    def start(kind, seed, first, seconds, count, pipe, errors):
        arguments = [supervisor.sys.executable, "-c", WORKER % fate, str(pipe), str(first)]
        return supervisor.subprocess.Popen(arguments, pass_fds=[pipe], stderr=errors)

    monkeypatch.setattr(supervisor, "start", start)
    monkeypatch.setattr(supervisor, "SECONDS_PER_CALL", 3.0)
    report = supervisor.run("hostile", 0, 60, count=6)
    assert report.calls == 6
    (found,) = report.findings
    assert found.case == 2 and found.what.startswith(finding)
    assert found.call == "permute()" and "--seed 0 --case 2" in str(found)


@pytest.mark.parametrize(
    "name,change",
    [
        ("router_logits", lambda y: y * (1 + 1e-3)),
        ("moe_ffn", lambda y: y * 1.05),
        ("expert_ffn", lambda y: y.roll(1, 0)),
        ("grouped_linear", lambda y: y + 0.05),
        ("router_z_loss", lambda y: y * 1.01),
        ("load_balancing_loss", lambda y: y * 1.01),
        ("apply_capacity", lambda kept: [[-1 for _ in row] for row in kept]),
        ("tokens_per_expert", lambda counts: counts[::-1]),
        ("expert_choice", lambda pairs: pairs[:-1]),
    ],
)
def test_a_wrong_result_is_noticed(monkeypatch, name, change):
    loop = getattr(loops, name)
    monkeypatch.setattr(loops, name, lambda *a, **k: change(loop(*a, **k)))
    build = {build.__name__: build for build in differential.OPERATORS}[name]
    monkeypatch.setattr(differential, "OPERATORS", [build])
    results = [differential.run_case(random.Random(n)) for n in range(8)]
    assert any(result["outcome"] == "differs" for result in results)


def test_a_wrong_gradient_is_noticed(monkeypatch):
    loop = loops.unpermute

    def wrong(rows, row_map, weights):
        return loop(rows, row_map, weights if weights is None else weights.detach() + 0 * weights)

    monkeypatch.setattr(loops, "unpermute", wrong)
    monkeypatch.setattr(differential, "OPERATORS", [differential.unpermute])
    problems = [differential.run_case(random.Random(n))["problems"] for n in range(20)]
    assert any("the gradient of weights" in "".join(found) for found in problems)
