"""Trains a small byte-level language model with Mixture-of-Experts layers on real text.

The text is what every machine with Python has: the standard library's own sources, split by file
into training and held-out parts. `make demo` runs this; about 3 minutes on 2 CPU cores.

    python examples/train_lm.py                       train, evaluate, write a sample
    python examples/train_lm.py --resume              go on after Ctrl-C, on the same curve
    python examples/train_lm.py --overwrite           start over where a run is
    python examples/train_lm.py --ffn dense           the same with a dense feed-forward network
    python examples/train_lm.py --compare             MoE beside two dense models
    python examples/train_lm.py --monitor             what the experts do, live and in the report
    python examples/train_lm.py --router expert_choice --balance none     see --help for more

Into --out (default runs/train_lm) go checkpoint.safetensors, report.json, curves.png, sample.txt;
with --monitor also monitor.jsonl and monitor.png.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import signal
import sysconfig
import time
import zlib
from pathlib import Path

import lm_checkpoint
import lm_report
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe_ext
from moe_ext import reference
from moe_ext.monitor import Monitor

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


@dataclasses.dataclass
class Options:
    """What decides the result; all of it is kept in the checkpoint."""

    ffn: str = "moe_ext"  # moe_ext, reference (plain PyTorch, same parameters) or dense
    dense_match: str = "active"  # dense only: equal active FLOPs, or equal parameters
    hidden_size: int = 192
    intermediate_size: int = 192  # of one expert
    experts: int = 8
    top_k: int = 2
    layers: int = 4
    heads: int = 4
    context: int = 256
    batch: int = 4  # sequences a step
    steps: int = 1300
    lr: float = 2e-3
    recompute: str = "activation"  # what the MoE layers recompute: activation or hidden
    router: str = "topk"  # topk, sigmoid, noisy, expert_choice, hierarchical or hash
    balance: str = "aux_loss"  # aux_loss, sequence (that loss per sequence), bias or none
    capacity_factor: float = 0.0  # 0: dropless
    tile_size: int = 0  # of token rounding; 0: none
    dtype: str = "float32"  # float64, or bfloat16 through autocast
    seed: int = 0


# --- the model ---------------------------------------------------------------------------------


class DenseFFN(nn.Module):
    """down(silu(gate(x)) * up(x)): what an MoE layer replaces."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class ReferenceMoE(moe_ext.MoE):
    """The same layer with the same parameters, in plain PyTorch."""

    last_stats = None

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, self.hidden_size)
        logits = reference.router_logits(tokens, self.router.weight)
        weights, ids, probs = reference.topk_router(logits, self.top_k)
        loss = self.aux_loss_coef * reference.load_balancing_loss(probs, ids)
        counts = torch.bincount(ids.flatten(), minlength=self.num_experts)
        self.last_stats = moe_ext.statistics.MoEStats(counts, counts.new_zeros(()))
        experts = self.experts
        y = reference.moe_ffn(tokens, weights, ids, experts.gate_up_proj, experts.down_proj)
        y, _ = self._hand_out(y, loss, is_taken=False)  # to total_aux_loss, like the other
        return y.reshape(x.shape)


def make_ffn(o: Options) -> nn.Module:
    if o.ffn == "moe_ext":  # what swaps a dense FFN for ours; the first four would do
        return moe_ext.MoE(
            o.hidden_size,
            o.intermediate_size,
            o.experts,
            o.top_k,
            recompute=o.recompute,
            router=make_router(o),
            balance="aux_loss" if o.balance == "sequence" else o.balance,
        )
    if o.ffn == "reference":
        return ReferenceMoE(o.hidden_size, o.intermediate_size, o.experts, o.top_k)
    count = o.top_k if o.dense_match == "active" else o.experts
    return DenseFFN(o.hidden_size, count * o.intermediate_size)


def make_router(o: Options) -> moe_ext.TopKRouter | None:
    """The router of the options; None: the layer's own."""
    options = {}
    if o.balance == "bias":
        options["bias_update_rate"] = 1e-3
    if o.balance == "sequence":
        options["balance_per"] = "sequence"
    if o.capacity_factor:
        options |= {"capacity_factor": o.capacity_factor, "drop_policy": "probs"}
    if o.tile_size:
        options["tile_size"] = o.tile_size
    if o.router == "topk" and not options:
        return None
    cls = moe_ext.TopKRouter
    if o.router == "sigmoid":
        options["score_function"] = "sigmoid"
    elif o.router != "topk":
        cls = {
            "noisy": moe_ext.NoisyTopKRouter,
            "expert_choice": moe_ext.ExpertChoiceRouter,
            "hierarchical": moe_ext.HierarchicalRouter,
            "hash": moe_ext.GivenIdsRouter,
        }[o.router]
    if o.router == "hierarchical":
        options["num_groups"] = 2
    return cls(o.hidden_size, o.experts, o.top_k, **options)


class Attention(nn.Module):
    """Causal self-attention with rotary position embedding."""

    def __init__(self, hidden_size: int, heads: int, context: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)
        half = hidden_size // heads // 2
        angles = torch.arange(context)[:, None] * 10000.0 ** (-torch.arange(half) / half)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def rotate(self, x: Tensor) -> Tensor:
        cos, sin = self.cos[: x.shape[2]].to(x.dtype), self.sin[: x.shape[2]].to(x.dtype)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, o: Options) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(o.hidden_size)
        self.attention = Attention(o.hidden_size, o.heads, o.context)
        self.ffn_norm = nn.RMSNorm(o.hidden_size)
        self.ffn = make_ffn(o)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.ffn(self.ffn_norm(x))


class LanguageModel(nn.Module):
    """A decoder-only transformer over bytes."""

    def __init__(self, o: Options) -> None:
        super().__init__()
        self.context = o.context
        self.embedding = nn.Embedding(256, o.hidden_size)
        self.blocks = nn.ModuleList(Block(o) for _ in range(o.layers))
        self.norm = nn.RMSNorm(o.hidden_size)
        self.head = nn.Linear(o.hidden_size, 256, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        for index, layer in enumerate(self.moe_layers()):
            if isinstance(layer.router, moe_ext.GivenIdsRouter):
                ids = moe_ext.hash_ids(tokens, layer.num_experts, layer.top_k, seed=index)
                layer.router.give(ids)
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def moe_layers(self) -> list[moe_ext.MoE]:
        return [module for module in self.modules() if isinstance(module, moe_ext.MoE)]


def count_parameters(model: LanguageModel, o: Options) -> tuple[int, int]:
    """All parameters, and those that work on one token."""
    total = sum(parameter.numel() for parameter in model.parameters())
    in_experts = sum(p.numel() for layer in model.moe_layers() for p in layer.experts.parameters())
    return total, total - in_experts + in_experts * o.top_k // o.experts


# --- the text ----------------------------------------------------------------------------------


def text_files() -> tuple[list[Path], list[Path]]:
    """The standard library's source files: (training, held-out), split by a hash of the name."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
    train, held_out = [], []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if skipped.isdisjoint(name.parts):
            is_held_out = zlib.crc32(name.as_posix().encode()) % 10 == 0
            (held_out if is_held_out else train).append(path)
    if not train or not held_out:
        raise SystemExit(f"train_lm: no Python sources found in the standard library at {root}")
    return train, held_out


def read_text(files: list[Path]) -> Tensor:
    return torch.frombuffer(
        bytearray(b"".join(path.read_bytes() for path in files)), dtype=torch.uint8
    )


def make_batch(text: Tensor, o: Options, seed: int, device: str) -> tuple[Tensor, Tensor]:
    """Inputs and next bytes [batch, context]: a function of the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - o.context, (o.batch,), generator=generator)
    rows = text[starts[:, None] + torch.arange(o.context + 1)].long().to(device)
    return rows[:, :-1], rows[:, 1:]


# --- training ----------------------------------------------------------------------------------


class Trainer:
    """A training run that can stop after any step and go on from its checkpoint."""

    def __init__(self, o: Options, device: str = "cpu") -> None:
        self.o, self.device = o, device
        torch.manual_seed(o.seed)
        self.model = LanguageModel(o).to(device)
        if o.dtype == "float64":
            self.model.double()
        self.total_parameters, self.active_parameters = count_parameters(self.model, o)
        self.optimizer = torch.optim.AdamW(
            moe_ext.param_groups(self.model, lr=o.lr, weight_decay=0.1),
            betas=(0.9, 0.95),
            fused=True,
        )
        train, held_out = text_files()
        self.text, self.held_out = read_text(train), read_text(held_out)
        self.text_id = f"{zlib.crc32(self.text.numpy()):08x}"
        self.step = 0
        self.seconds = 0.0
        self.monitor: Monitor | None = None
        self.balance = 1.0  # the largest load of an expert over the mean, in the worst layer
        self.history = {"loss": [], "seconds": [], "held_out": [], "experts": []}

    def autocast(self) -> contextlib.AbstractContextManager:
        enabled = self.o.dtype == "bfloat16"
        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=enabled)

    def learning_rate(self) -> float:
        """Linear warm-up over 5 % of the steps, then a cosine to a tenth."""
        warm_up = max(1, self.o.steps // 20)
        if self.step < warm_up:
            return self.o.lr * (self.step + 1) / warm_up
        progress = (self.step - warm_up) / max(1, self.o.steps - warm_up)
        return self.o.lr * (0.55 + 0.45 * math.cos(math.pi * progress))

    def train_step(self) -> float:
        started = time.perf_counter()
        o = self.o
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        # Batch and noise are functions of seed and step: no random state to keep, nor to trust.
        seed = o.seed * 1_000_003 + self.step
        torch.manual_seed(~seed)  # for routers with noise; of another stream than the batch's
        inputs, targets = make_batch(self.text, o, seed, self.device)
        with self.autocast():
            logits = self.model(inputs)
        if logits.dtype != torch.float64:
            logits = logits.float()
        task_loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss = task_loss + moe_ext.total_aux_loss(self.model)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        if o.balance == "bias":
            moe_ext.update_expert_bias(self.model)
        self.step += 1
        seconds = time.perf_counter() - started
        self.seconds += seconds
        if self.monitor is not None:
            self.monitor.step(seconds)
        self.history["loss"].append(task_loss.item())
        self.history["seconds"].append(self.seconds)
        counts = [layer.last_stats.tokens_per_expert for layer in self.model.moe_layers()]
        shares = [(c.double() / c.sum()).tolist() for c in counts]
        self.balance = max((max(share) * len(share) for share in shares), default=1.0)
        if self.step % 10 == 0 or self.step == o.steps:
            self.history["experts"].append({"step": self.step, "share": shares})
        return self.history["loss"][-1]

    @torch.no_grad()
    def evaluate(self, batches: int) -> float:
        """Bits per byte on held-out text; always the same batches."""
        self.model.eval()
        total = 0.0
        for index in range(batches):
            inputs, targets = make_batch(self.held_out, self.o, index, self.device)
            with self.autocast():
                logits = self.model(inputs)
            total += F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()).item()
        self.model.train()
        bits = total / batches / math.log(2)
        self.history["held_out"].append({"step": self.step, "bits_per_byte": bits})
        return bits

    @torch.no_grad()
    def sample(self, prompt: bytes, length: int) -> str:
        """Continues the prompt by drawing bytes at temperature 0.7."""
        self.model.eval()
        generator = torch.Generator().manual_seed(self.o.seed)
        tokens = torch.tensor([list(prompt)], device=self.device)
        for _ in range(length):
            with self.autocast():
                logits = self.model(tokens[:, -self.o.context :])[0, -1]
            probs = (logits.float() / 0.7).softmax(-1).cpu()
            token = torch.multinomial(probs, 1, generator=generator).to(self.device)
            tokens = torch.cat([tokens, token[None]], dim=1)
        self.model.train()
        return bytes(tokens[0].tolist()).decode(errors="replace")

    def save(self, path: Path) -> None:
        """Writes everything that the next step depends on; the old file stays until it is done."""
        lm_checkpoint.save(self, path)

    def load(self, path: Path) -> None:
        """Goes on from a checkpoint of the same options, from wherever it comes."""
        lm_checkpoint.load(self, path)


class Interrupt:
    """Ctrl-C asks to stop after the step; a second one stops at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "Interrupt":
        self.old = signal.signal(signal.SIGINT, self.handle)
        return self

    def handle(self, signum, frame) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self.old)

    def __exit__(self, *exception) -> None:
        signal.signal(signal.SIGINT, self.old)


def train(
    o: Options,
    *,
    out: Path | None = None,
    resume: bool = False,
    seconds: float = math.inf,
    device: str = "cpu",
    quiet: bool = False,
    monitor: bool = False,
) -> Trainer:
    """Trains to o.steps, for so many seconds, or until Ctrl-C; then the run's state is in out.

    Without resume, an earlier run's files in out are removed first. main() asks before that.
    """
    trainer = Trainer(o, device)
    checkpoint = out / lm_checkpoint.CHECKPOINT if out else None
    if resume:
        trainer.load(checkpoint)
    if out:
        lm_checkpoint.require_space(out, lm_checkpoint.size(trainer))
        if not resume:
            lm_checkpoint.clear(out)
    if monitor:
        log = out / "monitor.jsonl" if out else None
        trainer.monitor = Monitor(trainer.model, log, resume_at=trainer.step)
    evaluate_every = max(1, o.steps // 10)
    deadline = time.monotonic() + seconds
    saved_at = time.monotonic()
    with Interrupt() as interrupt, lm_report.make_progress(trainer, quiet) as progress:
        while trainer.step < o.steps:
            trainer.train_step()
            if trainer.step % evaluate_every == 0 and trainer.step < o.steps:
                trainer.evaluate(4)
            progress.show()
            if interrupt.asked or time.monotonic() > deadline:
                break
            if checkpoint and time.monotonic() - saved_at > 60:
                trainer.save(checkpoint)
                saved_at = time.monotonic()
    if checkpoint:
        trainer.save(checkpoint)
    if trainer.monitor is not None:
        trainer.monitor.close()
    return trainer


# --- the command -------------------------------------------------------------------------------


def compare(o: Options, out: Path, device: str) -> None:
    """Trains the MoE, a dense model of equal active FLOPs and one of equal parameters."""
    variants = {
        "MoE": dataclasses.replace(o, ffn="moe_ext"),
        "dense, equal active FLOPs": dataclasses.replace(o, ffn="dense", dense_match="active"),
        "dense, equal parameters": dataclasses.replace(o, ffn="dense", dense_match="parameters"),
    }
    lm_checkpoint.require_space(out, 2**20)  # for a picture and a table
    reports = {}
    for name, options in variants.items():
        print(f"== {name}")
        trainer = train(options, device=device)
        if trainer.step < options.steps:
            raise SystemExit("train_lm: stopped; nothing is compared")
        trainer.evaluate(64)
        reports[name] = lm_report.make_report(trainer)
    lm_report.write_comparison(reports, out)


def parse_arguments(arguments: list[str] | None) -> tuple[Options, argparse.Namespace]:
    choices = {
        "ffn": ["moe_ext", "reference", "dense"],
        "dense_match": ["active", "parameters"],
        "recompute": ["activation", "hidden"],
        "dtype": list(DTYPES),
        "router": ["topk", "sigmoid", "noisy", "expert_choice", "hierarchical", "hash"],
        "balance": ["aux_loss", "sequence", "bias", "none"],
    }
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for field in dataclasses.fields(Options):
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            type=field.type,
            default=field.default,
            choices=choices.get(field.name),
            help=f"default {field.default}",
        )
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop training after")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=Path("runs/train_lm"))
    parser.add_argument("--resume", action="store_true", help="go on from --out's checkpoint")
    parser.add_argument(
        "--overwrite", action="store_true", help="remove a run in --out, unless --resume is given"
    )
    parser.add_argument("--compare", action="store_true", help="train the dense twins too")
    parser.add_argument("--monitor", action="store_true", help="watch the experts")
    parsed = parser.parse_args(arguments)
    routing = ("router", "balance", "capacity_factor", "tile_size")
    changed = [name for name in routing if getattr(parsed, name) != getattr(Options, name)]
    if parsed.ffn != "moe_ext" and (changed or parsed.monitor):
        parser.error(f"--{(changed or ['monitor'])[0].replace('_', '-')} needs --ffn moe_ext")
    if parsed.compare and parsed.resume:
        parser.error("--compare trains from the start: leave out --resume")
    options = Options(**{f.name: getattr(parsed, f.name) for f in dataclasses.fields(Options)})
    if options.ffn == "moe_ext":
        try:
            make_router(options)
        except (TypeError, ValueError) as error:  # an option that this router has not
            parser.error(str(error))
    return options, parsed


def main(arguments: list[str] | None = None) -> None:
    o, run = parse_arguments(arguments)
    if run.threads:
        torch.set_num_threads(run.threads)
    with lm_checkpoint.claim(run.out):
        refuse_to_overwrite(run)
        if run.compare:
            compare(o, run.out, run.device)
        else:
            train_and_report(o, run)


def refuse_to_overwrite(run: argparse.Namespace) -> None:
    """Ends the program rather than a run that it was not told to give up."""
    names = [lm_checkpoint.COMPARISON] if run.compare else lm_checkpoint.RESULTS
    if run.resume or not any((run.out / name).exists() for name in names):
        return
    if not run.overwrite:
        remedy = "" if run.compare else "--resume goes on, "
        raise SystemExit(
            f"train_lm: {run.out} has a run: {remedy}--overwrite starts over; or name another --out"
        )
    print(f"starting over: the run in {run.out} is given up")


def train_and_report(o: Options, run: argparse.Namespace) -> None:
    trainer = train(
        o,
        out=run.out,
        resume=run.resume,
        seconds=run.seconds,
        device=run.device,
        monitor=run.monitor,
    )
    if trainer.step < o.steps:
        print(f"stopped at step {trainer.step} of {o.steps}; --resume goes on from here")
    bits = trainer.evaluate(64)
    sample = trainer.sample(b"def ", 320)
    report = json.dumps(lm_report.make_report(trainer), indent=1)
    lm_checkpoint.write_file(run.out / "sample.txt", sample.encode())
    lm_checkpoint.write_file(run.out / lm_checkpoint.REPORT, report.encode())
    lm_report.draw_curves(trainer, run.out / "curves.png")
    print(f"\n--- a sample ---\n{sample}\n---\n\n{lm_report.status(trainer)}")
    print(
        f"held-out: {bits:.3f} bits per byte after {trainer.seconds:.0f} s of training, "
        f"{trainer.active_parameters:,} active of {trainer.total_parameters:,} parameters"
    )
    files = ["checkpoint.safetensors", "report.json", "curves.png", "sample.txt"]
    if trainer.monitor is not None and trainer.monitor.records:
        trainer.monitor.draw(run.out / "monitor.png")
        files += ["monitor.jsonl", "monitor.png"]
    print(f"wrote {', '.join(files)} to {run.out}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # the second Ctrl-C, or one after training; the checkpoint is there
        raise SystemExit("train_lm: interrupted") from None
