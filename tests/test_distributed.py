"""Two gloo processes, DDP and FSDP2: gradients, losses and biases of one on all the tokens."""

import copy
import json
import os
import pickle
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import relative_error
from torch import nn
from torch.utils.checkpoint import checkpoint

import moe_ext
from moe_ext.monitor import Monitor

H, WORLD = 16, 2


class Block(nn.Module):
    def __init__(self, fuse_grad_accumulation=False):
        super().__init__()
        self.norm = nn.LayerNorm(H)
        options = {"bias": True, "fuse_grad_accumulation": fuse_grad_accumulation}
        self.moe = moe_ext.MoE(H, 12, 5, 2, init_std=0.3, shared_intermediate_size=8, **options)

    def forward(self, x):
        return x + self.moe(self.norm(x))


def make_model(**options) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(**options), Block(**options))


def make_tokens(rank: int, step: int) -> torch.Tensor:
    return torch.randn(24, H, generator=torch.Generator().manual_seed(10 * step + rank))


def loss_of(model, x):
    # The balance loss is not linear in the tokens, so each process's own one counts, as in DDP.
    return model(x).square().mean() + moe_ext.total_aux_loss(model)


def single_process_gradients(steps=(0,)) -> dict[str, torch.Tensor]:
    """What two processes average to."""
    model = make_model()
    for step in steps:
        for rank in range(WORLD):
            (loss_of(model, make_tokens(rank, step)) / WORLD).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def check(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(actual[name], value) < 1e-5, name


def ddp(rank: int) -> None:
    model = nn.parallel.DistributedDataParallel(make_model())
    loss_of(model, make_tokens(rank, 0)).backward()
    check({n: p.grad for n, p in model.module.named_parameters()}, single_process_gradients())
    counts = model.module[0].moe.last_stats.tokens_per_expert
    assert counts.sum() == 24 * 2
    model.zero_grad()
    with model.no_sync():
        loss_of(model, make_tokens(rank, 0)).backward()
    loss_of(model, make_tokens(rank, 1)).backward()
    check({n: p.grad for n, p in model.module.named_parameters()}, single_process_gradients((0, 1)))


def gather(parameters) -> dict[str, torch.Tensor]:
    return {name: p.grad.full_tensor() for name, p in parameters}


def fsdp(rank: int, folder: str) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (WORLD,))

    def shard(model):
        for block in model:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    model = shard(make_model())
    expected = single_process_gradients()
    loss_of(model, make_tokens(rank, 0)).backward()
    check(gather(model.named_parameters()), expected)

    plain = make_model()
    for name, parameter in plain.named_parameters():
        parameter.grad = expected[name].clone()
    norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
    sharded_norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1).full_tensor()
    assert relative_error(sharded_norm, norm) < 1e-5
    check(gather(model.named_parameters()), {n: p.grad for n, p in plain.named_parameters()})

    # Gradients of two steps, reduced once.
    model.zero_grad()
    model.set_requires_gradient_sync(False)
    loss_of(model, make_tokens(rank, 0)).backward()
    model.set_requires_gradient_sync(True)
    loss_of(model, make_tokens(rank, 1)).backward()
    check(gather(model.named_parameters()), single_process_gradients((0, 1)))

    torch.optim.AdamW(model.parameters(), lr=1e-2).step()
    x = make_tokens(0, 3)
    with torch.no_grad():
        expected_output = model(x)
    dcp.save(get_model_state_dict(model), checkpoint_id=folder)
    torch.manual_seed(5)
    other = shard(nn.Sequential(Block(), Block()))
    state = get_model_state_dict(other)
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(other, state)
    with torch.no_grad():
        assert torch.equal(other(x), expected_output)


class CountsAdded(torch.utils._python_dispatch.TorchDispatchMode):
    """How many backward passes added weights' gradients in place."""

    added = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.added += func is torch.ops.moe_ext._expert_ffn_backward_into.default
        return func(*args, **(kwargs or {}))


def fused_accumulation(rank: int) -> None:
    """DDP's hooks need the gradients: a warning, and plain accumulation. FSDP2 reads them after
    backward, so micro-batches that are not reduced are added in place."""
    from torch.distributed.fsdp import fully_shard

    expected = single_process_gradients((0, 1))
    model = nn.parallel.DistributedDataParallel(make_model(fuse_grad_accumulation=True))
    with CountsAdded() as mode, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with model.no_sync():
            loss_of(model, make_tokens(rank, 0)).backward()
        loss_of(model, make_tokens(rank, 1)).backward()
    check({n: p.grad for n, p in model.module.named_parameters()}, expected)
    assert mode.added == 0
    assert any("fuse_grad_accumulation has no effect on" in str(w.message) for w in caught)

    model = make_model(fuse_grad_accumulation=True)
    mesh = dist.init_device_mesh("cpu", (WORLD,))
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with CountsAdded() as mode:
        model.set_requires_gradient_sync(False)
        loss_of(model, make_tokens(rank, 0)).backward()
        model.set_requires_gradient_sync(True)
        loss_of(model, make_tokens(rank, 1)).backward()
    check(gather(model.named_parameters()), expected)
    assert mode.added == 2


def balanced_layer(**options) -> moe_ext.MoE:
    torch.manual_seed(0)
    router = moe_ext.TopKRouter(H, 5, 2, init_std=0.5, **options)
    return moe_ext.MoE(H, 12, 5, 2, init_std=0.3, router=router)


def bias(rank: int) -> None:
    """Two ranks, two micro-batches each, DDP and checkpointing: the bias of one process."""
    plain = balanced_layer(bias_update_rate=0.1)
    layer = balanced_layer(bias_update_rate=0.1, process_group=dist.group.WORLD)
    model = nn.parallel.DistributedDataParallel(layer)
    for step in range(3):
        batches = [make_tokens(r, 2 * step + part) for r in range(WORLD) for part in range(2)]
        mine = batches[2 * rank : 2 * rank + 2]
        with model.no_sync():
            model(mine[0]).sum().backward()
        checkpoint(model, mine[1].requires_grad_(), use_reentrant=False).sum().backward()
        for batch in batches:
            plain(batch)
        plain.router._warned.add("ranks")  # it is alone on purpose
        own = sum(
            torch.bincount(layer.router.eval()(x).topk_ids.flatten(), minlength=5) for x in mine
        )
        layer.router.train()
        counters = layer.router._counters
        assert torch.equal(counters[0] - counters[1], own)  # no buffer of rank 0's came over it
        layer.router.update_expert_bias()
        plain.router.update_expert_bias()
        assert torch.equal(layer.router.expert_bias, plain.router.expert_bias)
    assert layer.router.expert_bias.any()
    alone = balanced_layer(bias_update_rate=0.1)
    with pytest.warns(UserWarning, match="there are 2 ranks and no process_group"):
        alone.router.update_expert_bias()
    # A copy belongs to the same ranks; a pickle to none.
    assert copy.deepcopy(layer).router.process_group is dist.group.WORLD
    assert pickle.loads(pickle.dumps(layer)).router.process_group is None


def aux_loss_over_all_ranks(rank: int) -> None:
    """Its mean over ranks, and the averaged gradient, are those of all tokens in one process."""
    layer = balanced_layer(process_group=dist.group.WORLD)
    model = nn.parallel.DistributedDataParallel(layer)
    plain = balanced_layer()
    for masked in (False, True):
        layer.zero_grad()
        plain.zero_grad()
        x = [make_tokens(r, 0) for r in range(WORLD)]
        # As many tokens on each rank, since a rank's own mean over them is P.
        masks = [torch.arange(24).roll(5 * r) % 3 > 0 if masked else None for r in range(WORLD)]
        y, loss = model(x[rank], return_aux_loss=True, token_mask=masks[rank])
        (loss + 0 * y.sum()).backward()  # DDP waits for every parameter
        mask = torch.cat(masks) if masked else None
        _, expected = plain(torch.cat(x), return_aux_loss=True, token_mask=mask)
        expected.backward()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        assert relative_error(mean / WORLD, expected.detach()) < 1e-5
        assert relative_error(layer.router.weight.grad, plain.router.weight.grad) < 1e-4


def monitored(rank: int, folder: str) -> None:
    """The counts of both ranks, written once."""
    layer = balanced_layer()
    path = Path(folder).with_suffix(".jsonl")
    with Monitor(layer, path, every=2, peak_flops=1e12, process_group=dist.group.WORLD) as monitor:
        expected = torch.zeros(5, dtype=torch.int64)
        for step in range(2):
            for r in range(WORLD):
                ids = layer.router(make_tokens(r, step)).topk_ids
                expected += torch.bincount(ids.flatten(), minlength=5)
            layer(make_tokens(rank, step), return_aux_loss=True)
            monitor.step(1.0)
    (record,) = monitor.records
    assert record["layers"][0]["tokens_per_expert"] == expected.tolist()
    assert record["tokens_per_second"] == WORLD * 24 and monitor.peak_flops == WORLD * 1e12
    dist.barrier()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [record] or rank > 0


def monitored_without_a_group(rank: int, folder: str) -> None:
    """Each rank its own tokens, in files of its own, and one of them says so."""
    layer = balanced_layer()
    path = Path(folder).with_suffix(".jsonl")
    options = {"path": path, "every": 1, "peak_flops": 1e12, "guard": None}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monitor = Monitor(layer, tensorboard=Path(folder) / "tb", **options)
    assert len(caught) == (rank == 0)
    for warning in caught:
        assert "there are 2 ranks and no process_group" in str(warning.message)
        assert warning.filename == __file__
    for step in range(200):
        layer(make_tokens(rank, step), return_aux_loss=True)
        monitor.step(1.0)
    monitor.close()
    pytest.importorskip("matplotlib")
    monitor.draw(Path(folder).with_suffix(".png"))
    dist.barrier()
    own = path if rank == 0 else path.with_name("checkpoint.rank1.jsonl")
    assert [json.loads(line) for line in own.read_text().splitlines()] == list(monitor.records)
    assert own.with_suffix(".png").stat().st_size > 10_000
    events = Path(folder) / "tb" / ("" if rank == 0 else "rank1")
    assert len(list(events.glob("events*"))) == 1
    dist.barrier()
    # A run goes on in its own file.
    with Monitor(layer, resume_at=150, **options) as monitor:
        layer(make_tokens(rank, 0), return_aux_loss=True)
        monitor.step(1.0)
    steps = [json.loads(line)["step"] for line in own.read_text().splitlines()]
    assert steps == list(range(1, 152))
    # Groups of one rank each, pipeline stages say, do not meet in one file either.
    groups = [dist.new_group([r]) for r in range(WORLD)]
    path.unlink(missing_ok=True)
    dist.barrier()
    with Monitor(layer, process_group=groups[rank], **options) as monitor:
        layer(make_tokens(rank, 0), return_aux_loss=True)
        monitor.step(1.0)
    assert [json.loads(line) for line in own.read_text().splitlines()] == list(monitor.records)


def run_rank(rank: int, store: str, job, arguments) -> None:
    torch.set_num_threads(1)
    # A store in a file has no thread that could outlive the process group.
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    try:
        job(rank, *arguments)
    finally:
        dist.destroy_process_group()
    # Everything is checked. Torch's own threads are sometimes not joined yet when the interpreter
    # goes (an abort after FSDP's job, without a Python frame, about once in fifteen runs).
    os._exit(0)


WITH_FILES = (fsdp, monitored, monitored_without_a_group)


@pytest.mark.parametrize(
    "job",
    [
        ddp,
        fsdp,
        fused_accumulation,
        bias,
        aux_loss_over_all_ranks,
        monitored,
        monitored_without_a_group,
    ],
)
def test_equals_one_process(job, tmp_path):
    arguments = (str(tmp_path / "checkpoint"),) if job in WITH_FILES else ()
    mp.spawn(run_rank, (str(tmp_path / "store"), job, arguments), nprocs=WORLD)
