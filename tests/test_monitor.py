"""The monitor counts what happened, once, and says when experts collapse."""

import json
import math
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

import moe_ext
from moe_ext.monitor import CollapseGuard, Monitor, active_flops_per_token, measure_ceiling

pytestmark = pytest.mark.usefixtures("on_device")
H, I, E, K = 16, 8, 4, 2


def make_model(layers=2, **options) -> nn.Sequential:
    torch.manual_seed(0)
    options = {"init_std": 0.3, "aux_loss_coef": 0.5, **options}
    return nn.Sequential(*(moe_ext.MoE(H, I, E, K, **options) for _ in range(layers)))


def watch(model, *arguments, **options) -> Monitor:
    return Monitor(model, *arguments, **{"peak_flops": 1e12, "guard": None, **options})


def train_step(model, x, forward=None) -> float:
    loss = (forward or model)(x).square().mean() + moe_ext.total_aux_loss(model)
    loss.backward()
    return loss.item()


def test_records(tmp_path):
    model = make_model(capacity_factor=0.8)
    expected = []
    with watch(model, tmp_path / "m.jsonl", every=2, flops_per_token=10) as monitor:
        for _ in range(5):
            train_step(model, torch.randn(40, H))
            expected.append(
                [
                    (*layer.last_stats.tokens_per_expert.tolist(), layer.last_stats.dropped.item())
                    for layer in model
                ]
            )
            monitor.step(0.5)
    assert [(r["step"], r["steps"]) for r in monitor.records] == [(2, 2), (4, 2), (5, 1)]
    lines = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert lines == list(monitor.records)
    for record in monitor.records:
        steps = expected[record["step"] - record["steps"] : record["step"]]
        for index, layer in enumerate(record["layers"]):
            *counts, dropped = (
                sum(column) for column in zip(*(s[index] for s in steps), strict=True)
            )
            assert layer["name"] == str(index)
            assert layer["tokens_per_expert"] == counts and layer["dropped"] == dropped > 0
            mean = sum(counts) / E
            assert layer["max_over_mean"] == pytest.approx(max(counts) / mean)
            assert layer["min_over_mean"] == pytest.approx(min(counts) / mean)
            assert layer["idle_experts"] == 0
            assert layer["drop_rate"] == pytest.approx(dropped / (record["steps"] * 40 * K))
        assert record["tokens_per_second"] == pytest.approx(80)
        assert record["flops_utilization"] == pytest.approx(80 * 10 / 1e12)
        assert record["step_ms"] == {"mean": 500, "p50": 500, "p95": 500, "p99": 500}
        assert record["peak_memory_bytes"] > 50e6
    summary = monitor.summary()
    assert summary["step"] == 5 and "tokens_per_expert" not in summary["layers"][0]


def test_entropy_and_loss():
    model = make_model(1)
    layer = model[0]
    with watch(model, every=2) as monitor:
        entropies, losses = [], []
        for tokens in (30, 60):
            x = torch.randn(tokens, H)
            mask = torch.arange(tokens) % 3 > 0
            probs = layer.router(x).router_probs[mask]
            entropies += torch.special.entr(probs).sum(1).tolist()
            _, loss = layer(x, token_mask=mask, return_aux_loss=True)
            losses.append(loss.item())
            monitor.step(1.0)
    (record,) = monitor.records
    expected = sum(entropies) / 60 / math.log(E)
    assert record["layers"][0]["entropy"] == pytest.approx(expected, rel=1e-5)
    assert record["layers"][0]["aux_loss"] == pytest.approx(sum(losses) / 2, rel=1e-6)
    assert record["tokens_per_second"] == pytest.approx(30)


@pytest.mark.parametrize(
    "how", ["checkpoint", "compiled", "compiled before", "compiled checkpoint", "accumulated"]
)
def test_counts_every_training_forward_once(how):
    x = torch.randn(40, H)
    records = []
    for special in (False, True):
        model = make_model(inject_aux_loss=True)
        before = None
        if special and how == "compiled before":
            before = torch.compile(model, fullgraph=True, backend="aot_eager")
            before(x).sum().backward()
        with watch(model, every=1) as monitor:
            forward = before or model
            if special and "checkpoint" in how:
                forward = lambda x, m=model: checkpoint(m, x, use_reentrant=False)  # noqa: E731
            if special and "compiled" in how and before is None:
                forward = torch.compile(forward, fullgraph=True, backend="aot_eager")
            parts = x.chunk(4) if special and how == "accumulated" else [x]
            for part in parts:
                forward(part.clone().requires_grad_()).sum().backward()
            with torch.no_grad():
                model.eval()(x)  # not training
            monitor.step(1.0)
        records += monitor.records
        torch.compiler.reset()
    for a, b in zip(records[0]["layers"], records[1]["layers"], strict=True):
        assert a["tokens_per_expert"] == b["tokens_per_expert"]
        assert a["entropy"] == pytest.approx(b["entropy"], rel=1e-5)
    assert records[0]["tokens_per_second"] == records[1]["tokens_per_second"] == 40


def test_pairs_and_rounding():
    model = make_model(1, tile_size=8)
    with watch(model, every=1) as monitor:
        train_step(model, torch.randn(60, H))
        monitor.step()
    (layer,) = monitor.records[0]["layers"]
    assert all(count % 8 == 0 for count in layer["tokens_per_expert"])
    assert 0 <= layer["drop_rate"] < 0.2


def test_it_changes_no_result():
    x = torch.randn(40, H)
    results = []
    for watched in (False, True):
        model = make_model()
        monitor = watch(model) if watched else None
        train_step(model, x)
        results.append([model(x).detach(), *(p.grad for p in model.parameters())])
        if watched:
            monitor.close()
            assert all(layer._monitor_totals is None for layer in model)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_optimizer_hook_and_close(tmp_path):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = watch(model, tmp_path / "m.jsonl", every=3, optimizer=optimizer)
    for _ in range(6):
        train_step(model, torch.randn(10, H))
        optimizer.step()
    assert [r["step"] for r in monitor.records] == [3, 6]
    monitor.close()
    monitor.close()
    optimizer.step()
    assert len(monitor.records) == 2 and monitor.step_count == 6
    watch(model).close()  # another one may follow


class Accelerated(torch.optim.Optimizer):
    """Wraps an optimizer as accelerate does, without torch's __init__; every second step waits."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.calls = 0

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def step(self, closure=None):
        self.calls += 1
        if self.calls % 2 == 0:
            self.optimizer.step(closure)


class Foreign:
    """Wraps an optimizer as DeepSpeed does: it is no torch.optim.Optimizer."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups

    def step(self, closure=None):
        self.optimizer.step(closure)


@pytest.mark.parametrize(
    "wrap",
    [Accelerated, Foreign, lambda optimizer: Accelerated(Foreign(optimizer))],
    ids=["accelerated", "foreign", "both"],
)
def test_wrapped_optimizer(wrap):
    """The steps of the optimizer inside count."""
    model = make_model(1)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = wrap(inner)
    taken = []
    inner.register_step_post_hook(lambda *_: taken.append(1))
    with watch(model, optimizer=optimizer) as monitor:
        for _ in range(6):
            train_step(model, torch.randn(10, H))
            optimizer.step()
        assert monitor.step_count == len(taken) == (6 if wrap is Foreign else 3)
    optimizer.step()
    optimizer.step()
    assert monitor.step_count < len(taken)


def test_accelerate(device):
    """Accumulation's and a GradScaler's skipped steps are none."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=device == "cpu", gradient_accumulation_steps=2)
    model = make_model(1)
    scaler = torch.amp.GradScaler(device, init_scale=8.0)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = accelerate.optimizer.AcceleratedOptimizer(inner, scaler=scaler)
    scheduler = torch.optim.lr_scheduler.ConstantLR(inner)
    with watch(model, optimizer=optimizer) as monitor:
        counts = []
        for step in range(6):
            with accelerator.accumulate(model):
                loss = model(torch.randn(10, H)).square().mean() + moe_ext.total_aux_loss(model)
                scaler.scale(loss * (math.inf if step == 3 else 1)).backward()
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            counts.append(monitor.step_count)
    assert counts == [0, 1, 1, 1, 1, 2]


def test_no_optimizer():
    model = make_model(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for wrong, name in (
        (model, "Sequential"),
        (torch.optim.lr_scheduler.ConstantLR(optimizer), "ConstantLR"),
        (Foreign(Foreign(type("Own", (), {"param_groups": []}))), "Foreign"),
    ):
        with pytest.raises(TypeError, match=f"Monitor: optimizer must be a .*got {name}; without"):
            watch(model, optimizer=wrong)


@pytest.mark.parametrize("failure", ["optimizer", "tensorboard", "path", "ceiling", "warning"])
def test_a_failed_constructor_leaves_nothing(failure, tmp_path, monkeypatch):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    path = tmp_path / "m.jsonl"
    path.write_text("an earlier run\n")
    options = {"path": path, "optimizer": optimizer, "peak_flops": 1e12}
    if failure == "optimizer":
        options["optimizer"] = model
    elif failure == "tensorboard":
        pytest.importorskip("tensorboard")
        options["tensorboard"] = path  # a file
    elif failure == "path":
        options["path"] = tmp_path / "no_such_folder" / "m.jsonl"
        options["tensorboard"] = tmp_path / "tb"
        pytest.importorskip("tensorboard")
    elif failure == "ceiling":
        options["peak_flops"] = None
        monkeypatch.setattr(moe_ext.monitor.monitor, "measure_ceiling", lambda *_: 1 / 0)
    elif failure == "warning":
        options["resume_at"] = 3
    with warnings.catch_warnings(), pytest.raises(Exception):  # noqa: B017 (each its own)
        warnings.simplefilter("error")
        Monitor(model, **options)
    assert path.read_text() == "an earlier run\n" and not list(tmp_path.glob("*.partial"))
    assert not optimizer._optimizer_step_post_hooks
    assert all(layer._monitor_totals is None for layer in model)
    opened = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    assert not [name for name in opened if name.startswith(str(tmp_path))]
    watch(model).close()


def run_steps(monitor, model, steps):
    for _ in range(steps):
        train_step(model, torch.randn(10, H))
        monitor.step()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's
@pytest.mark.parametrize("how", ["full", "deleted", "tensorboard"])
def test_goes_on_without_its_files(how, tmp_path):
    """One warning, at the user's line; what is in memory stays."""
    model = make_model()
    path = Path("/dev/full") if how == "full" else tmp_path / "m.jsonl"
    folder = tmp_path / "tb" if how == "tensorboard" else None
    if folder:
        pytest.importorskip("tensorboard")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monitor = watch(model, path, every=1, tensorboard=folder)
        if how == "full":
            run_steps(monitor, model, 1)
        if how == "deleted":
            path.unlink()
        if folder:
            shutil.rmtree(folder)
        run_steps(monitor, model, 3)
        monitor.close()
    (warning,) = (w for w in caught if "moe_ext.monitor" in str(w.message))
    lost = folder or path
    assert f"{lost} cannot be written" in str(warning.message) and warning.filename == __file__
    assert len(monitor.records) == (4 if how == "full" else 3)
    assert how != "deleted" or not path.exists()
    assert how != "tensorboard" or len(path.read_text().splitlines()) == 3
    pytest.importorskip("matplotlib")
    monitor.draw(tmp_path / "m.png")
    assert (tmp_path / "m.png").stat().st_size > 10_000


def test_foreign_lines(tmp_path):
    """They are left out and counted, and nothing after them is lost; pictures leave them out."""
    path, model = tmp_path / "m.jsonl", make_model()
    with watch(model, path, every=1) as monitor:
        run_steps(monitor, model, 4)
    good = path.read_bytes().splitlines()
    text = json.dumps(monitor.records[0])
    foreign = [
        b'{"step": 2, "cut o',
        b"no JSON",
        b"",
        b"\xff\xfe\x00\x80garbage",
        b"[" * 100_000,
        b"[1, 2]",
        b"null",
        b'{"steps": 1}',
        b'{"step": "2"}',
        b'{"step": 2}',
        text.replace('"step": 1', '"step": null').encode(),
        text.replace('"name": "0"', '"name": 7').encode(),
        text.replace('"tokens_per_expert": [', '"tokens_per_expert": [1e999, ').encode(),
        json.dumps({**monitor.records[0], "layers": []}).encode(),
    ]
    path.write_bytes(b"\n".join([good[0], *foreign, *good[1:]]))  # the last has no end of line
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monitor = watch(model, path, every=1, resume_at=4)
    (warning,) = (w for w in caught if "moe_ext.monitor" in str(w.message))
    assert f"{path} has lines that are no records: {len(foreign)} left out" in str(warning.message)
    assert warning.filename == __file__
    run_steps(monitor, model, 1)
    assert path.read_bytes().splitlines()[:4] == good
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5]
    pytest.importorskip("matplotlib")
    monitor.draw(tmp_path / "before.png")
    lines = path.read_bytes().splitlines()
    other = json.dumps({**monitor.records[0], "layers": monitor.records[0]["layers"][:1]})
    path.write_bytes(b"\n".join([other.encode(), *lines[:2], *foreign, *lines[2:], foreign[0]]))
    monitor.draw(tmp_path / "after.png")
    assert (tmp_path / "before.png").read_bytes() == (tmp_path / "after.png").read_bytes()


def test_layer_on_meta():
    """One layer's weights are still to come, or are elsewhere: the others are watched."""
    model = make_model()
    model[1].to("meta")
    with watch(model, every=1, peak_flops=None) as monitor:
        model[0](torch.randn(40, H), return_aux_loss=True)
        monitor.step(1.0)
    first, second = monitor.records[0]["layers"]
    assert sum(first["tokens_per_expert"]) == 40 * K and not any(second["tokens_per_expert"])


class Elsewhere(torch.Tensor):
    """A tensor on a device that there is not, with its values on the CPU."""

    @staticmethod
    def __new__(cls, values):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, values.shape, dtype=values.dtype, device="ipu:0"
        )
        tensor.values = values
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return TwoDevices().__torch_dispatch__(func, types, args, kwargs)


class TwoDevices(TorchDispatchMode):
    """The CPU and another device, which take no tensors of each other."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        away = [isinstance(x, Elsewhere) for x in tensors]
        goes = func is torch.ops.aten._to_copy.default and kwargs.get("device") is not None
        if any(away) and not all(away):
            raise RuntimeError(f"{func}: all tensors must be on the same device")
        to_away = torch.device(kwargs.pop("device")).type != "cpu" if goes else any(away)
        args, kwargs = tree_map(
            lambda x: x.values if isinstance(x, Elsewhere) else x, (args, kwargs)
        )
        out = func(*args, **kwargs)
        if not to_away or not goes and not any(away):
            return out
        return tree_map(lambda x: Elsewhere(x) if isinstance(x, torch.Tensor) else x, out)


@pytest.mark.parametrize("first", [0, 1])
def test_layers_on_two_devices(first, device, monkeypatch):
    """Their totals come together, whichever is the first."""
    model = make_model()
    x = torch.randn(40, H)
    if device == "cuda":
        model[1 - first].to("cpu")
        with watch(model, every=1) as monitor:
            for layer in model:
                layer(x.to(layer.router.weight.device), return_aux_loss=True)
            monitor.step(1.0)
        expected = [layer.last_stats.tokens_per_expert.tolist() for layer in model]
    else:
        # Without a second device: the totals of one layer are on it, as if it had counted there.
        totals, zeros = [], torch.zeros

        def place(*arguments, **options):
            values = zeros(*arguments, **options)
            totals.append(Elsewhere(values) if len(totals) == first else values)
            return totals[-1]

        monkeypatch.setattr(torch, "zeros", place)
        monitor = watch(model, every=1)
        monkeypatch.undo()
        away = totals[first].values
        expected = [[0] * E, [0] * E]
        expected[first] = [7, 5, 0, 2]
        away[:E] = torch.tensor(expected[first])
        with TwoDevices():
            monitor.step(1.0)
        assert not away.any()
    layers = monitor.records[0]["layers"]
    assert [layer["tokens_per_expert"] for layer in layers] == expected


def test_resume(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "m.jsonl"
    model = make_model()

    def run(steps, **options):
        with watch(model, path, every=2, **options) as monitor:
            for _ in range(steps):
                train_step(model, torch.randn(10, H))
                monitor.step()
        monitor.draw(tmp_path / "whole.png")
        return [json.loads(line)["step"] for line in path.read_text().splitlines()]

    assert run(6) == [2, 4, 6]
    with open(path, "a") as file:
        file.write('{"step": 8, "cut o')
    assert run(4, resume_at=5) == [2, 4, 7, 9]  # the record of steps 5 and 6 reaches past
    assert run(2) == [2]
    assert run(2, resume_at=0) == [2]


def test_percentiles():
    monitor = watch(make_model(1), every=100)
    for milliseconds in range(100, 0, -1):
        monitor.step(milliseconds / 1000)
    assert monitor.records[0]["step_ms"] == {"mean": 50.5, "p50": 50, "p95": 95, "p99": 99}


def test_tensorboard(tmp_path):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    model = make_model()
    with watch(model, every=1, tensorboard=tmp_path) as monitor:
        train_step(model, torch.randn(10, H))
        monitor.step()
    events = event_accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {"moe/tokens_per_second", "moe/step_ms/p95", "moe/0/max_over_mean"} <= set(tags)
    (value,) = events.Scalars("moe/1/entropy")
    assert value.step == 1
    assert value.value == pytest.approx(monitor.records[0]["layers"][1]["entropy"], rel=1e-5)


@pytest.mark.parametrize("layers", [1, 3, 30])
def test_picture(tmp_path, layers):
    plt = pytest.importorskip("matplotlib.pyplot")
    model = make_model(layers, capacity_factor=1.0)
    with watch(model, every=1) as monitor:
        for _ in range(3):
            train_step(model, torch.randn(20, H))
            monitor.step()
    monitor.draw(tmp_path / "monitor.png")
    picture = plt.imread(tmp_path / "monitor.png")
    assert picture.shape[0] > 500 and picture.shape[1] > 1000
    assert picture[..., :3].std() > 0.05
    # A long run, and an idle expert.
    first = monitor.records[0]
    monitor.records.extend(dict(first, step=s + 4, steps=1) for s in range(1500))
    assert len(monitor.records) == 1000
    monitor.records[0]["layers"][0]["tokens_per_expert"] = [0, 0, 0, 9]
    monitor.draw(tmp_path / "long.png")
    with pytest.raises(ValueError, match="Monitor.draw: there must be at least one record"):
        watch(make_model()).draw(tmp_path / "none.png")


def test_flops_and_ceiling():
    model = nn.Sequential(nn.Embedding(100, H), nn.Linear(H, H), *make_model())
    per_layer = E * H + K * 3 * H * I  # router, and K experts
    assert active_flops_per_token(model) == 6 * (H * H + 2 * per_layer)
    assert 1e8 < measure_ceiling("cpu", torch.float32) < 1e14


@pytest.mark.parametrize(
    "options,message",
    [
        ({"every": 0}, "Monitor: every must be >= 1, got 0"),
        ({"window": 0}, "Monitor: window must be >= 1, got 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError) as caught:
        watch(make_model(), **options)
    assert str(caught.value) == message


def test_bad_models():
    with pytest.raises(ValueError, match="model must have a layer of moe_ext, got none"):
        watch(nn.Linear(3, 3))
    model = make_model()
    watch(model)
    with pytest.raises(ValueError, match="model must have one monitor, got a second for '0'"):
        watch(model)


class TestGuard:
    def record(self, counts, entropy=0.9, step=1) -> dict:
        mean = sum(counts) / len(counts)
        return {
            "step": step,
            "layers": [
                {
                    "name": "ffn",
                    "tokens_per_expert": counts,
                    "max_over_mean": max(counts) / mean if mean else 0.0,
                    "entropy": entropy,
                }
            ],
        }

    def said(self, records, **options) -> list[str]:
        texts: list[str] = []
        guard = CollapseGuard(warn=texts.append, **{"patience": 1, **options})
        for record in records:
            guard.check(record)
        return texts

    def test_starving(self):
        (text,) = self.said([self.record([50, 1, 50, 0])] * 3)
        assert "step 1, ffn: 2 of 4 experts get less than 5% of the mean load" in text
        assert "(experts 1, 3)" in text and "balance='bias'" in text
        assert not self.said([self.record([50, 5, 50, 5])])
        assert self.said([self.record([50, 5, 50, 5])], min_load=0.2)

    def test_load(self):
        (text,) = self.said([self.record([90, 10, 10, 10])], max_load=2.5)
        assert "the busiest expert has 3.0 times the mean load (bound 2.5). Try" in text
        assert not self.said([self.record([90, 10, 10, 10])])

    def test_entropy(self):
        (text,) = self.said([self.record([10] * 4, entropy=0.05)])
        assert "fell to 0.05 of log E (bound 0.1)" in text and "z_loss_coef" in text

    def test_patience(self):
        good, bad = self.record([10] * 4), self.record([40, 0, 0, 0])
        assert not self.said([bad, bad, good, bad, bad], patience=3)
        assert len(self.said([bad, bad, bad, bad], patience=3, max_load=3)) == 2

    def test_no_tokens(self):
        assert not self.said([self.record([0, 0, 0, 0], entropy=0.0)])

    def test_in_the_monitor(self):
        model = make_model(1, balance="none")
        with torch.no_grad():
            model[0].router.weight.zero_()
            model[0].router.weight[0] = 10  # one expert for positive tokens, others by the tie
        with (
            pytest.warns(UserWarning, match="experts get less than 5% of the mean load"),
            watch(model, every=1, guard=CollapseGuard(patience=2)) as monitor,
        ):
            for _ in range(2):
                model(torch.rand(20, H))
                monitor.step()
        with warnings.catch_warnings(), watch(make_model(1), every=1, guard=None) as monitor:
            warnings.simplefilter("error")
            train_step(make_model(1), torch.randn(20, H))
            monitor.step()

    @pytest.mark.parametrize("how", ["step", "optimizer", "check"])
    def test_warns_at_the_users_line(self, how):
        model = make_model(1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.optim.lr_scheduler.ConstantLR(optimizer)  # wraps optimizer.step
        guard = CollapseGuard(patience=1, max_load=1.0)
        watched = optimizer if how == "optimizer" else None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with watch(model, every=1, guard=guard, optimizer=watched) as monitor:
                train_step(model, torch.randn(20, H))
                if how == "step":
                    monitor.step()
                elif how == "optimizer":
                    optimizer.step()
                else:
                    guard.check(self.record([40, 30, 30, 30]))
        (warning,) = (w for w in caught if "the busiest expert" in str(w.message))
        line = Path(__file__).read_text().splitlines()[warning.lineno - 1].strip()
        assert warning.filename == __file__
        assert (
            line
            == {
                "step": "monitor.step()",
                "optimizer": "optimizer.step()",
                "check": "guard.check(self.record([40, 30, 30, 30]))",
            }[how]
        )

    @pytest.mark.parametrize(
        "options,message",
        [
            ({"max_load": 0.5}, "max_load must be >= 1, got 0.5"),
            ({"min_load": 2}, r"min_load must be in \[0, 1\], got 2"),
            ({"min_entropy": -1}, r"min_entropy must be in \[0, 1\], got -1"),
            ({"patience": 0}, "patience must be >= 1, got 0"),
        ],
    )
    def test_bad_options(self, options, message):
        with pytest.raises(ValueError, match="CollapseGuard: " + message):
            CollapseGuard(**options)


def test_experts_that_an_adapter_wraps():
    class Wrapper(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer = base

        def forward(self, *arguments):
            return self.base_layer(*arguments)

    layer = moe_ext.MoE(8, 4, 4, 2)
    layer.experts = Wrapper(layer.experts)
    with Monitor(layer, every=1, peak_flops=1.0) as watching:
        layer(torch.randn(9, 8), return_aux_loss=True)
        watching.step()
    assert sum(watching.records[0]["layers"][0]["tokens_per_expert"]) == 18
