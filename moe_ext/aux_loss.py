"""The auxiliary losses of layers: from the forward that makes one to the loss that takes it."""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from moe_ext import ops
from moe_ext._buffers import writable
from moe_ext._messages import warn_once

# So many losses of forwards whose outputs are gone are held: they may be several calls of one
# step, but each holds the memory of what came before its layer.
_MOST_LOOSE = 2


class _InjectGradient(torch.autograd.Function):
    """Passes y on; in backward the loss receives the gradient `scale`."""

    @staticmethod
    def forward(ctx, y: Tensor, loss: Tensor, scale: float | Tensor) -> Tensor:
        ctx.scale = scale
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        scale = torch.as_tensor(ctx.scale, dtype=torch.float32, device=grad.device)
        return grad, scale.reshape(()), None


def in_backward() -> bool:
    """Whether this forward is a recomputation inside a running backward (checkpointing)."""
    return torch._C._current_graph_task_id() != -1


class _Kept:
    """A forward's loss, or what computes it when it is asked for, and what became of it."""

    forwards = 0  # of all layers

    def __init__(self, loss: Tensor | Callable[[], Tensor], output: Tensor | None) -> None:
        _Kept.forwards += 1
        self._loss = loss
        self.is_used = False  # somebody looked at it
        self.is_taken = False  # it was returned, or is in a total
        self.spent_at: int | None = None  # forwards when backward came through its graph
        self._passage = None
        if output is not None and output.requires_grad:
            passage = _Passage(self)
            output.register_hook(passage)  # the graph of the output holds it, and nobody else
            self._passage = weakref.ref(passage)

    @property
    def loss(self) -> Tensor:
        if not isinstance(self._loss, Tensor):
            self._loss = self._loss()
        return self._loss

    def take(self) -> Tensor:
        self.is_used = self.is_taken = True
        return self.loss

    def can_be_taken(self) -> bool:
        """Whether its graph may still be there. After backward it is for who kept it and takes the
        loss right away; a later step finds what is over."""
        if self.spent_at is None:
            return True
        return not self.is_taken and self.spent_at == _Kept.forwards

    def is_loose(self) -> bool:
        """Whether the output that belongs to it is gone."""
        return self._passage is None or self._passage() is None


class _Passage:
    """A hook that tells a kept loss that backward came by."""

    def __init__(self, kept: _Kept) -> None:
        self._kept = weakref.ref(kept)

    def __call__(self, grad: Tensor) -> None:
        kept = self._kept()
        if kept is not None:
            kept.spent_at = _Kept.forwards


class HasAuxLoss(nn.Module):
    """A layer with a loss beside its output, which somebody has to take: it is returned, totalled
    (`total_aux_loss`) or injected. One that trains while nobody does warns once.

    Attributes: inject_aux_loss; aux_loss_scale, what the gradient of an injected loss is multiplied
    by (a number or a scalar tensor; None: 1).
    """

    def __init__(self, inject_aux_loss: bool, device: torch.device | str | None) -> None:
        super().__init__()
        self.inject_aux_loss = inject_aux_loss
        self.aux_loss_scale: float | Tensor | None = None
        # Written in place: that works in a compiled checkpoint, where assigning a tensor to an
        # attribute does not.
        with torch.inference_mode(False):
            injected = torch.zeros((), device=device, dtype=torch.float32)
            calls = torch.zeros((), device=device, dtype=torch.int64)
        self.register_buffer("_injected_loss", injected, persistent=False)
        self.register_buffer("_compiled_calls", calls, persistent=False)
        self.__dict__.update(self._no_losses())
        _layers.add(self)

    @staticmethod
    def _no_losses() -> dict:
        """The attributes of a layer that has not run."""
        return {
            "_last": None,  # _Kept
            "_kept": [],  # of training, in order: what may be part of a loss
            "_compiled_loss": None,
            "_compiled_in_training": False,
            "_compiled_twice": False,  # before the loss was taken
            "_warned": set(),
        }

    def __getstate__(self) -> dict:
        # The losses hang on their graphs, which can be neither copied nor pickled.
        return {**self.__dict__, **self._no_losses()}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        _layers.add(self)

    def _apply(self, fn, recurse: bool = True) -> "HasAuxLoss":
        were_meta = [name for name, buffer in self._buffers.items() if buffer.is_meta]
        super()._apply(fn, recurse)
        for name in were_meta:  # to_empty leaves anything in them
            self._buffers[name].zero_()
        return self

    @property
    def last_aux_loss(self) -> Tensor | None:
        """The last forward's losses, coefficients applied: a float32 scalar; None before one.

        With inject_aux_loss it carries no gradient, since backward already adds it. A compiled
        forward with return_aux_loss only returns it and leaves this as it was.
        """
        if self.inject_aux_loss:
            return self._injected_loss
        if torch.compiler.is_compiling():
            return self._compiled_loss
        self._adopt_compiled()
        if self._last is None:
            return None
        self._last.is_used = True
        return self._last.loss

    def _hand_out(self, y: Tensor, loss: Tensor, is_taken: bool) -> tuple[Tensor, Tensor]:
        """Injects the loss of a forward, or keeps it unless it is_taken (returned, or none at all);
        y and the loss that may be returned."""
        if self.inject_aux_loss:
            return self._inject(y, loss)
        if torch.compiler.is_compiling():
            self._keep_compiled(loss, is_taken)
        elif in_backward():
            self._check_recomputed(loss, is_taken)
        else:
            self._keep(y, loss, is_taken)
        return y, loss

    def _inject(self, y: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
        if self.aux_loss_scale is None and y.dtype == torch.float16 and y.requires_grad:
            warn_once(
                self._warned,
                "scale",
                "MoE: inject_aux_loss adds the gradient of the loss as it is, and a GradScaler, "
                "which float16 needs, multiplies all others by its scale. Call "
                "moe_ext.set_aux_loss_scale(model, scaler.get_scale()) before each forward, or "
                "use moe_ext.total_aux_loss(model).",
            )
        scale = 1.0 if self.aux_loss_scale is None else self.aux_loss_scale
        y = _InjectGradient.apply(y, loss, scale)
        loss = loss.detach()
        writable(self, "_injected_loss", loss).copy_(loss)
        return y, loss

    def _keep(self, y: Tensor, loss: Tensor, is_taken: bool) -> None:
        """Holds the loss. What earlier forwards left and nobody can take any more goes."""
        self._adopt_compiled()
        if self._kept:
            self._let_go()
        counts = self.training and loss.requires_grad
        last = _Kept(loss, y if counts else None)
        if counts:
            self._kept.append(last)
        if is_taken:
            last.take()
        self.__dict__["_last"] = last  # Module.__setattr__ takes a microsecond

    def _keep_unmade(self, make_loss: Callable[[], Tensor]) -> None:
        """Holds what computes the loss of a forward in evaluation, which nobody may ask for."""
        self._adopt_compiled()
        if self._kept:
            self._let_go()
        self.__dict__["_last"] = _Kept(make_loss, None)

    def _let_go(self) -> None:
        left = [kept for kept in self._kept if kept.spent_at is None and not kept.is_taken]
        loose = [kept for kept in left if kept.is_loose()]
        for kept in loose[:-_MOST_LOOSE]:
            left.remove(kept)
        if any(not kept.is_used for kept in self._kept if kept not in left):
            self._warn_unused()
        self._kept[:] = left

    def _keep_compiled(self, loss: Tensor, is_taken: bool) -> None:
        # Inside a compiled checkpoint this assignment is refused, and a returned loss does without
        # it; an exported program has no attributes. (The flag itself: before torch 2.13
        # is_exporting() says True to every compilation.)
        if is_taken or torch.compiler._is_exporting_flag:
            return
        self._compiled_twice = self._compiled_loss is not None
        self._compiled_loss = loss
        self._compiled_in_training = self.training
        if self.training and loss.requires_grad:
            one = torch.ones_like(self._compiled_calls)
            ops._add_once(self._compiled_calls, one)

    def _adopt_compiled(self) -> None:
        """Keeps what compiled forwards, which can only assign, have left: the last one's loss."""
        loss = self._compiled_loss
        if loss is None:
            return
        self._compiled_loss = None
        self._last = _Kept(loss, None)
        counts = self._compiled_in_training and loss.requires_grad
        self._kept = [self._last] if counts else []
        if self._compiled_calls.device.type == "cpu":  # elsewhere reading it would wait
            calls = self._compiled_calls.item()
            self._compiled_calls.zero_()
            if calls > 1:
                warn_once(
                    self._warned,
                    "calls",
                    f"MoE: a compiled layer ran {calls} times since its auxiliary loss was last "
                    "taken, and only the last loss is known. Use return_aux_loss=True or "
                    "inject_aux_loss=True.",
                )

    def _check_recomputed(self, loss: Tensor, is_taken: bool) -> None:
        """Reentrant checkpointing runs a forward first without grad, so what it kept then has no
        gradient, and nobody sees what it makes now."""
        first = self._last
        if is_taken or first is None or first.loss.requires_grad or not loss.requires_grad:
            return
        if first.is_used:
            raise RuntimeError(
                "MoE: the auxiliary loss has no gradient under reentrant activation "
                "checkpointing, which runs the forward without grad first. Use "
                "checkpoint(..., use_reentrant=False), or the layer with inject_aux_loss=True."
            )
        self._warn_unused()

    def _warn_unused(self) -> None:
        warn_once(
            self._warned,
            "unused",
            "MoE: a forward's auxiliary loss was never used, so the experts may collapse. Add "
            "moe_ext.total_aux_loss(model) to the loss, or use return_aux_loss=True, "
            "inject_aux_loss=True or balance='none'.",
        )


# A compiled forward can't warn. Whether its loss was taken shows when its optimizer has stepped.
_layers: "weakref.WeakSet[HasAuxLoss]" = weakref.WeakSet()


def _look_after_compiled(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    for layer in list(_layers):
        if layer._compiled_loss is None or "unused" in layer._warned:
            continue
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        is_its = any(id(parameter) in trained for parameter in layer.parameters())
        if is_its and layer._compiled_in_training and layer._compiled_loss.requires_grad:
            layer._warn_unused()


register_optimizer_step_post_hook(_look_after_compiled)


def total_aux_loss(model: nn.Module, *, evaluation: bool = False) -> Tensor:
    """The sum of the losses of a model's MoE layers: a float32 scalar to add to the loss.

    Every training forward counts once: those since the losses were last taken, all of them where a
    layer was called several times. What was taken and backward has gone through is over, so a step
    in which a layer did not run has nothing of it. Asked again before backward, it gives the same
    losses again.
    Forwards in evaluation or under no_grad do not count, so that a validation loss stays what it
    is. Layers that inject their losses add the value of their last forward in training, without
    gradient. It may be taken inside of what is compiled; a layer that runs several times there has
    to return or inject its loss.

    Args:
        model: any module; one without such layers gives zero.
        evaluation: True: the last forward's losses of all layers, whatever mode they ran in,
            without gradient.

    Returns:
        A scalar on the device of the first of these layers.
    """
    layers = [module for module in model.modules() if isinstance(module, HasAuxLoss)]
    if evaluation:
        losses = [_last_value(layer) for layer in layers]
    elif torch.compiler.is_compiling():
        losses = [_take_compiled(layer) for layer in layers if layer.training]
    else:
        losses = _take_kept(layers)
        losses += [x._injected_loss for x in layers if x.inject_aux_loss and x.training]
    losses = [loss for loss in losses if loss is not None]
    if not losses:
        device = layers[0]._injected_loss.device if layers else "cpu"
        return torch.zeros((), dtype=torch.float32, device=device)
    return sum((loss.to(losses[0].device) for loss in losses[1:]), start=losses[0])


def _last_value(layer: HasAuxLoss) -> Tensor | None:
    loss = layer._injected_loss if layer.inject_aux_loss else layer.last_aux_loss
    return None if loss is None else loss.detach()


def _take_compiled(layer: HasAuxLoss) -> Tensor | None:
    """What the layer kept in the graph that is being compiled, and nothing is left behind."""
    if layer.inject_aux_loss:
        return layer._injected_loss
    if layer._compiled_twice:  # not in a full graph, this is run again without compiling
        raise RuntimeError(
            "MoE: a compiled layer that runs several times must return its auxiliary loss "
            "(return_aux_loss=True) or inject it (inject_aux_loss=True)"
        )
    loss, layer._compiled_loss = layer._compiled_loss, None
    layer._compiled_calls.zero_()
    return loss


def _take_kept(layers: list[HasAuxLoss]) -> list[Tensor]:
    """What the layers' training forwards kept, as far as it can still be differentiated."""
    for layer in layers:
        layer._adopt_compiled()
        if layer._last is not None:
            layer._last.is_used = True
    live = [kept for layer in layers for kept in layer._kept if kept.can_be_taken()]
    chosen = [kept for kept in live if not kept.is_taken] or live
    for kept in chosen:
        if not kept.is_taken:
            kept.loss.register_hook(_Passage(kept))  # backward may come by the loss alone
    return [kept.take() for kept in chosen]


def set_aux_loss_scale(model: nn.Module, scale: float | Tensor | None) -> None:
    """What the gradients of injected losses (`MoE(inject_aux_loss=True)`) are multiplied by, from
    the next forward on: a GradScaler's scale, divided by the number of micro-batches; None: 1."""
    for module in model.modules():
        if isinstance(module, HasAuxLoss):
            module.aux_loss_scale = scale
