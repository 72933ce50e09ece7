"""Who takes the auxiliary losses, and that none is lost, stale or counted twice."""

import copy
import warnings
import weakref

import pytest
import torch
from conftest import leaf, relative_error
from torch import nn
from torch.utils.checkpoint import checkpoint

import moe_ext
from moe_ext import total_aux_loss

pytestmark = pytest.mark.usefixtures("on_device", "fresh_compiler")

H, I, E, K = 12, 8, 6, 2


def make_layer(**options) -> moe_ext.MoE:
    torch.manual_seed(0)
    options = {"init_std": 0.5, "aux_loss_coef": 0.5, "z_loss_coef": 0.1, **options}
    return moe_ext.MoE(H, I, E, K, **options)


def router_grad(layer, run) -> torch.Tensor:
    layer.zero_grad()
    run(leaf(torch.randn(20, H, generator=torch.Generator().manual_seed(1)))).backward()
    return layer.router.weight.grad.clone()


@pytest.fixture
def messages():
    """The texts and places of the warnings so far."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


# --- every forward counts once ------------------------------------------------------------------


def test_a_layer_that_did_not_run_adds_nothing():
    """LayerDrop: the loss of the last step is over."""
    model = nn.ModuleList([make_layer(), make_layer()])
    x = torch.randn(9, H)
    for used in ([0, 1], [0], [1], [], [0, 1]):
        y = x
        for index in used:
            y = y + model[index](y)
        total = total_aux_loss(model)
        assert total.item() == pytest.approx(
            sum(model[index].last_aux_loss.item() for index in used)
        )
        (y.sum() + total).backward() if used else None


def test_a_branch_not_taken_in_a_single_layer_model():
    layer, x = make_layer(), leaf(torch.randn(9, H))
    (layer(x).sum() + total_aux_loss(layer)).backward()
    (2 * x.sum() + total_aux_loss(layer)).backward()
    assert total_aux_loss(layer) == 0


def test_backward_through_the_loss_alone_uses_it_up():
    layer = make_layer()
    y = layer(torch.randn(9, H))
    total_aux_loss(layer).backward()
    assert total_aux_loss(layer) == 0 and y.requires_grad


@pytest.mark.parametrize("keep_outputs", [True, False])
def test_every_call_in_a_forward_counts(keep_outputs):
    layer, x = make_layer(), [torch.randn(9, H) for _ in range(3)]
    outputs = [layer(part) if keep_outputs else layer(part).shape for part in x]
    alone = [layer(part, return_aux_loss=True)[1].item() for part in x]
    layer = make_layer()
    outputs = [layer(part) if keep_outputs else layer(part).shape for part in x]
    assert total_aux_loss(layer).item() == pytest.approx(sum(alone))
    assert len(outputs) == 3

    def shared(x):
        y = layer(layer(layer(x)))
        return (0 * y).sum() + total_aux_loss(layer)

    def returned(x):
        x, a = layer(x, return_aux_loss=True)
        x, b = layer(x, return_aux_loss=True)
        x, c = layer(x, return_aux_loss=True)
        return (0 * x).sum() + a + b + c

    assert relative_error(router_grad(layer, shared), router_grad(layer, returned)) < 1e-6


def test_asked_twice_it_is_the_same():
    layer = make_layer()
    y = layer(torch.randn(9, H))
    first = total_aux_loss(layer)
    with torch.no_grad():
        assert torch.equal(total_aux_loss(layer), first)
    again = total_aux_loss(layer)
    assert torch.equal(first, again) and torch.equal(layer.last_aux_loss, again)
    (y.sum() + again).backward()
    assert total_aux_loss(layer) == 0


def test_taken_after_the_backward_of_everything_else():
    """Whoever keeps the graph may take the loss later; the gradients are those of one backward."""
    layer = make_layer()
    expected = router_grad(layer, lambda x: layer(x).sum() + total_aux_loss(layer))

    def later(x):
        layer(x).sum().backward(retain_graph=True)
        return total_aux_loss(layer)

    assert relative_error(router_grad(layer, later), expected) < 1e-6


def test_what_was_returned_is_not_totalled_beside_others():
    model = nn.ModuleList([make_layer(), make_layer()])
    x = torch.randn(9, H)
    y, loss = model[0](x, return_aux_loss=True)
    y = model[1](y)
    assert torch.equal(total_aux_loss(model), model[1].last_aux_loss)
    assert y.requires_grad and loss > 0


def test_a_layer_dropped_after_a_step_without_its_loss():
    """Step 1 takes no loss; in step 2, where the second layer does not run, its old one is over."""
    model = nn.ModuleList([make_layer(), make_layer()])
    x = torch.randn(9, H)
    model[1](model[0](x)).sum().backward()
    with pytest.warns(UserWarning, match="never used"):
        y = model[0](x)
    total = total_aux_loss(model)
    assert torch.equal(total, model[0].last_aux_loss)
    (y.sum() + total).backward()
    model[1](x).sum().backward()
    model.eval()
    model[0](x)
    assert total_aux_loss(model) == 0


class TotalInside(nn.Module):
    """A model that adds its layers' loss itself, as many do."""

    def __init__(self, calls: int):
        super().__init__()
        self.layer, self.calls = make_layer(), calls

    def forward(self, x):
        for _ in range(self.calls):
            x = self.layer(x)
        return x.square().sum() + total_aux_loss(self)


def test_a_total_inside_of_what_is_compiled(messages):
    model, x = TotalInside(1), torch.randn(9, H)
    expected = router_grad(model.layer, lambda x: model(x))
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(3):
        assert relative_error(router_grad(model.layer, lambda x: run(x)), expected) < 1e-5
        optimizer.step()
    model.eval()
    assert torch.equal(model(x), model.layer(x).square().sum())  # nothing of training is left
    assert total_aux_loss(model) == 0 and not messages


def test_several_calls_and_a_total_inside_of_what_is_compiled():
    model = TotalInside(2)
    expected = router_grad(model.layer, lambda x: model(x))
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="must return its auxiliary loss"):
        run(torch.randn(9, H))
    torch.compiler.reset()
    broken = torch.compile(model, backend="aot_eager")  # falls back, and counts both
    assert relative_error(router_grad(model.layer, lambda x: broken(x)), expected) < 1e-5


def test_two_losses_of_two_forwards():
    """Each total has its own forward's."""
    layer, parts = make_layer(), [torch.randn(9, H), torch.randn(9, H)]
    losses = []
    for part in parts:
        y = layer(part)
        losses.append(y.sum() + total_aux_loss(layer))
    sum(losses).backward()
    grads = layer.router.weight.grad.clone()
    layer.zero_grad()
    for part in parts:
        (layer(part).sum() + total_aux_loss(layer)).backward()
    assert relative_error(grads, layer.router.weight.grad) < 1e-6


def test_micro_batches_whose_loss_nobody_takes_do_not_come_back():
    layer = make_layer()
    layer(torch.randn(9, H)).sum().backward()
    with pytest.warns(UserWarning, match="never used"):
        y = layer(torch.randn(9, H))
    assert torch.equal(total_aux_loss(layer), layer.last_aux_loss)
    (y.sum() + total_aux_loss(layer)).backward()


def test_memory_of_forwards_that_nobody_takes():
    """Forwards in training mode, without backward, do not pile up."""
    layer = make_layer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(20):
            layer(torch.randn(9, H))
    assert len(layer._kept) <= 3


# --- evaluation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["eval", "no_grad", "inject eval"])
def test_a_validation_loss_stays_what_it_is(how):
    layer = make_layer(inject_aux_loss="inject" in how)
    layer.train("eval" not in how)
    with torch.set_grad_enabled(how != "no_grad"):
        layer(torch.randn(9, H))
        assert total_aux_loss(layer) == 0
        assert layer.last_aux_loss > 0
        shown = total_aux_loss(layer, evaluation=True)
        assert torch.equal(shown, layer.last_aux_loss) and not shown.requires_grad


def test_evaluation_between_forward_and_total():
    layer = make_layer()
    y = layer(torch.randn(9, H))
    expected = layer.last_aux_loss.item()
    layer.eval()(torch.randn(30, H))
    assert total_aux_loss(layer.train()).item() == expected and y.requires_grad


@pytest.fixture
def computed(monkeypatch):
    """The names of the losses computed so far."""
    names = []
    for name in ("load_balancing_loss", "router_z_loss"):
        function = getattr(moe_ext.ops, name)

        def call(*args, _name=name, _function=function, **kwargs):
            names.append(_name)
            return _function(*args, **kwargs)

        monkeypatch.setattr(moe_ext.ops, name, call)
    return names


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_computes_a_loss_when_it_is_asked_for(computed, mode):
    layer, x = make_layer().eval(), torch.randn(2, 9, H)
    with mode():
        expected = layer(x, return_aux_loss=True)[1].item()
        computed.clear()
        layer(torch.randn(4, H))
        layer(x)
        assert computed == []
    assert layer.last_aux_loss.item() == expected > 0
    assert not layer.last_aux_loss.requires_grad
    assert total_aux_loss(layer, evaluation=True).item() == expected
    assert computed == ["load_balancing_loss", "router_z_loss"]
    assert copy.deepcopy(layer).last_aux_loss is None


def test_evaluation_computes_at_once_what_would_be_much_to_keep(computed, monkeypatch):
    monkeypatch.setattr(moe_ext.moe, "_MOST_SCORES", 20 * E)
    layer = make_layer().eval()
    with torch.no_grad():
        layer(torch.randn(20, H))
        assert computed == []
        layer(torch.randn(21, H))
        assert computed == ["load_balancing_loss", "router_z_loss"]


def test_evaluation_computes_at_once_what_hangs_on_tensors_of_the_user(computed):
    layer, ids = make_layer().eval(), torch.zeros(9, K, dtype=torch.int64)
    x, mask = torch.randn(9, H), torch.ones(9, dtype=torch.bool)
    for options in ({"token_mask": mask}, {"topk_ids": ids}):
        computed.clear()
        with torch.no_grad():
            layer(x, **options)
        assert len(computed) == 2
        expected = layer.last_aux_loss.item()
        mask[:5], ids[:] = False, 1
        assert layer.last_aux_loss.item() == expected


def test_a_loss_that_waits_does_not_keep_its_layer():
    layer = make_layer().eval()
    with torch.no_grad():
        layer(torch.randn(9, H))
    gone = weakref.ref(layer)
    del layer
    assert gone() is None


def test_a_loss_without_coefficient_is_never_computed(computed):
    layer, x = make_layer(aux_loss_coef=0.0, z_loss_coef=0.0), torch.randn(9, H)
    layer(x)
    assert layer(x, return_aux_loss=True)[1] == 0 == layer.last_aux_loss
    make_layer(aux_loss_coef=0.0)(x, return_aux_loss=True)
    assert computed == ["router_z_loss"]


# --- reentrant checkpointing --------------------------------------------------------------------


def test_reentrant_checkpointing_is_no_silent_loss():
    layer = make_layer()

    def run(x, **how):
        y = checkpoint(layer, x, **how) if how else layer(x)
        return (0 * y).sum() + total_aux_loss(layer)

    expected = router_grad(layer, run)
    assert expected.any()
    assert torch.equal(router_grad(layer, lambda x: run(x, use_reentrant=False)), expected)
    with pytest.raises(RuntimeError, match="MoE: the auxiliary loss has no gradient under reentra"):
        router_grad(layer, lambda x: run(x, use_reentrant=True))


def test_reentrant_checkpointing_with_an_injected_loss():
    layer = make_layer(inject_aux_loss=True)
    expected = router_grad(layer, lambda x: (0 * layer(x)).sum())
    for reentrant in (False, True):
        run = lambda x: (0 * checkpoint(layer, x, use_reentrant=reentrant)).sum()  # noqa: E731, B023
        assert torch.equal(router_grad(layer, run), expected)


def test_reentrant_checkpointing_of_a_returned_loss():
    layer = make_layer()

    def forward(x):
        return layer(x, return_aux_loss=True)

    expected = router_grad(layer, lambda x: sum(part.sum() for part in forward(x)))
    actual = router_grad(
        layer, lambda x: sum(part.sum() for part in checkpoint(forward, x, use_reentrant=True))
    )
    assert torch.equal(actual, expected)


def test_reentrant_checkpointing_warns_where_nobody_takes_the_loss(messages):
    layer = make_layer()
    for _ in range(2):
        router_grad(layer, lambda x: checkpoint(layer, x, use_reentrant=True).sum())
    assert len([m for m in messages if "never used" in str(m.message)]) == 1


# --- warnings -----------------------------------------------------------------------------------


def train(step, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        step().backward()
        optimizer.step()


def test_the_warning_points_to_the_users_line(messages):
    model = nn.Sequential(nn.Identity(), make_layer())
    x = torch.randn(9, H)
    for _ in range(4):
        model(x).sum().backward()
    texts = [m for m in messages if "never used" in str(m.message)]
    assert len(texts) == 1 and texts[0].filename == __file__


@pytest.mark.parametrize("compiled", ["layer", "module", "step"])
def test_a_compiled_layer_warns_once(messages, compiled):
    model = nn.Sequential(nn.Identity(), make_layer())
    x = torch.randn(9, H)
    run = model
    if compiled == "layer":
        model[1].compile(backend="aot_eager")
    elif compiled == "module":
        run = torch.compile(model, backend="aot_eager", fullgraph=True)
    else:
        run = torch.compile(lambda x: model(x), backend="aot_eager", fullgraph=True)
    train(lambda: run(x).sum(), torch.optim.SGD(model.parameters(), lr=0.01))
    texts = [m for m in messages if "never used" in str(m.message)]
    assert len(texts) == 1 and texts[0].filename == __file__


def test_a_compiled_layer_whose_loss_is_taken_does_not_warn(messages):
    model = nn.Sequential(nn.Identity(), make_layer())
    run = torch.compile(model, backend="aot_eager")
    x = torch.randn(9, H)
    other = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step():
        y = run(x)
        other.step()  # another model's, between this one's forward and its total
        return y.sum() + total_aux_loss(model)

    train(step, optimizer)
    assert not [m for m in messages if "never used" in str(m.message)]


def test_a_compiled_layer_that_runs_several_times_says_so(messages):
    layer = make_layer()
    layer.compile(backend="aot_eager")
    y = layer(torch.randn(9, H)) + layer(torch.randn(9, H))
    total_aux_loss(layer)
    assert y.requires_grad
    texts = [m for m in messages if "ran 2 times" in str(m.message)]
    assert len(texts) == 1 and texts[0].filename == __file__


# --- injected losses and scales -----------------------------------------------------------------


def test_an_injected_loss_is_scaled_like_the_others():
    """Under a GradScaler, and over micro-batches."""
    plain, injected = make_layer(), make_layer(inject_aux_loss=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    expected = router_grad(
        plain, lambda x: scaler.scale((plain(x).sum() + total_aux_loss(plain)) / 4)
    )
    moe_ext.set_aux_loss_scale(injected, scaler.get_scale() / 4)
    actual = router_grad(injected, lambda x: scaler.scale(injected(x).sum() / 4))
    assert relative_error(actual, expected) < 1e-5
    moe_ext.set_aux_loss_scale(injected, None)
    unscaled = router_grad(injected, lambda x: scaler.scale((0 * injected(x)).sum() / 4))
    assert relative_error(unscaled, actual) > 0.5


def test_an_unscaled_injection_in_float16_warns_once(messages):
    layer = make_layer(inject_aux_loss=True)
    x = leaf(torch.randn(9, H))
    with torch.autocast(x.device.type, dtype=torch.float16):
        for _ in range(3):
            layer(x)
        moe_ext.set_aux_loss_scale(layer, 2.0)
        layer(x)
    texts = [m for m in messages if "set_aux_loss_scale" in str(m.message)]
    assert len(texts) == 1 and texts[0].filename == __file__


# --- dtypes and devices -------------------------------------------------------------------------


def test_the_loss_is_float32_whatever_the_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        layer = make_layer(dtype=torch.float32, balance="none", z_loss_coef=0.0)
        _, loss = layer(torch.randn(9, H, dtype=torch.float32), return_aux_loss=True)
        assert loss.dtype == torch.float32
        assert total_aux_loss(nn.Linear(2, 2)).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_loss_lies_where_the_layers_are():
    layer = make_layer(device="cpu")
    x = torch.randn(9, H, device="cpu")
    with torch.device("meta"):
        assert total_aux_loss(layer).device.type == "cpu"
        y = layer(x)
        assert total_aux_loss(layer).device.type == "cpu" and y.device.type == "cpu"


def test_layers_on_two_devices():
    """The first layer's device has the sum. (meta stands for the second device.)"""
    model = nn.ModuleList([make_layer(device="cpu"), make_layer(device="meta")])
    outputs = [
        model[0](torch.randn(9, H, device="cpu")),
        model[1](torch.randn(9, H, device="meta")),
    ]
    total = total_aux_loss(model[::-1])
    assert total.device.type == "meta" and len(outputs) == 2


# --- copies -------------------------------------------------------------------------------------


def test_copies_have_no_losses_and_work():
    layer = make_layer()
    y = layer(torch.randn(9, H))
    twin = copy.deepcopy(layer)
    assert twin.last_aux_loss is None and total_aux_loss(twin) == 0 and y.requires_grad
    y = twin(torch.randn(9, H))
    assert total_aux_loss(twin) > 0 and y.requires_grad
