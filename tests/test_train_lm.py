"""The main job: it learns, resumes on the same curve, and agrees with plain PyTorch; checkpoints
survive kills and full disks, and those of others do no harm."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
import lm_checkpoint  # noqa: E402
import train_lm  # noqa: E402

TINY = train_lm.Options(
    hidden_size=32,
    intermediate_size=24,
    experts=4,
    layers=2,
    heads=2,
    context=32,
    batch=4,
    steps=20,
)
TINY_ARGUMENTS = [
    f"--{field.name.replace('_', '-')}={getattr(TINY, field.name)}"
    for field in dataclasses.fields(TINY)
    if field.name != "steps"
]


@pytest.fixture(autouse=True)
def one_thread():
    """Steps of a tiny model last longer with several, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def losses(**changes):
    return train_lm.train(dataclasses.replace(TINY, **changes), quiet=True).history["loss"]


@pytest.mark.parametrize("dtype,tolerance", [("float64", 1e-9), ("float32", 1e-4)])
def test_agrees_with_the_reference(dtype, tolerance):
    ours = losses(dtype=dtype, ffn="moe_ext")
    expected = losses(dtype=dtype, ffn="reference")
    assert len(ours) == 20
    for a, b in zip(ours, expected, strict=True):
        assert abs(a - b) <= tolerance * abs(b)


def test_the_same_seed_gives_the_same_bits():
    first = losses()
    assert losses() == first
    assert losses(seed=1) != first
    assert losses(recompute="hidden") == pytest.approx(first, rel=1e-5)


def test_learns_and_uses_every_expert():
    trainer = train_lm.Trainer(dataclasses.replace(TINY, steps=150))
    before = trainer.evaluate(4)
    for _ in range(150):
        trainer.train_step()
    assert before == pytest.approx(8, abs=0.3)  # bits of a byte nobody knows anything about
    assert trainer.evaluate(4) < 0.7 * before
    assert min(min(share) for share in trainer.history["experts"][-1]["share"]) > 0.05


def test_bfloat16():
    assert losses(dtype="bfloat16")[-1] == pytest.approx(losses()[-1], rel=0.05)


def test_resume_in_process(tmp_path):
    full = losses()
    trainer = train_lm.Trainer(TINY)
    for _ in range(7):
        trainer.train_step()
    trainer.save(tmp_path / "checkpoint.safetensors")
    resumed = train_lm.train(TINY, out=tmp_path, resume=True, quiet=True)
    assert resumed.history["loss"] == full
    assert list(tmp_path.iterdir()) == [tmp_path / "checkpoint.safetensors"]


def test_resume_errors(tmp_path):
    with pytest.raises(SystemExit, match="nothing to resume"):
        train_lm.train(TINY, out=tmp_path, resume=True, quiet=True)
    train_lm.Trainer(TINY).save(tmp_path / "checkpoint.safetensors")
    other = dataclasses.replace(TINY, top_k=1, lr=1.0)
    with pytest.raises(SystemExit, match=r"top_k: 2 there, 1 here; lr: 0.002 there, 1.0 here"):
        train_lm.train(dataclasses.replace(other, lr=1.0), out=tmp_path, resume=True, quiet=True)


def test_ctrl_c_and_resume(tmp_path):
    """A real SIGINT, then --resume: the same curve as an uninterrupted run."""
    command = [
        sys.executable,
        str(EXAMPLES / "train_lm.py"),
        *TINY_ARGUMENTS,
        "--threads=1",
        "--steps=400",
        f"--out={tmp_path}",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("step 1/400")
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "--resume goes on" in output
    stopped_at = json.loads((tmp_path / "report.json").read_text())["steps"]
    assert 1 <= stopped_at < 400
    subprocess.run([*command, "--resume"], check=True, capture_output=True)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["steps"] == 400 and len(report["history"]["loss"]) == 400

    again = tmp_path / "again"
    command[-1] = f"--out={again}"
    subprocess.run(command, check=True, capture_output=True)
    full = json.loads((again / "report.json").read_text())
    assert report["history"]["loss"] == full["history"]["loss"]
    assert report["held_out_bits_per_byte"] == full["held_out_bits_per_byte"]
    assert (again / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert (again / "sample.txt").read_text().startswith("def ")


def test_seconds_stop_cleanly(tmp_path):
    trainer = train_lm.train(
        dataclasses.replace(TINY, steps=10**6), out=tmp_path, seconds=1.0, quiet=True
    )
    assert 1 <= trainer.step < 10**6
    assert (tmp_path / "checkpoint.safetensors").exists()


def test_text_is_split_by_file():
    train, held_out = train_lm.text_files()
    assert not set(train) & set(held_out)
    assert 0.03 < len(held_out) / len(train) < 0.3
    assert train_lm.text_files() == (train, held_out)


def test_dense_twins_have_the_size_they_claim():
    moe = train_lm.Trainer(TINY)
    active = train_lm.Trainer(dataclasses.replace(TINY, ffn="dense", dense_match="active"))
    equal = train_lm.Trainer(dataclasses.replace(TINY, ffn="dense", dense_match="parameters"))
    routers = TINY.layers * TINY.experts * TINY.hidden_size
    assert active.total_parameters == moe.active_parameters - routers
    assert equal.total_parameters == moe.total_parameters - routers


def test_compare(tmp_path, capsys):
    train_lm.main([*TINY_ARGUMENTS, "--steps=6", f"--out={tmp_path}", "--compare"])
    rows = json.loads((tmp_path / "compare.json").read_text())["rows"]
    assert [row["steps"] for row in rows] == [6, 6, 6]
    assert all(math.isfinite(row["held_out_bits_per_byte"]) for row in rows)
    assert (tmp_path / "compare.png").exists() and "dense, equal" in capsys.readouterr().out


def test_bad_arguments(capsys):
    with pytest.raises(SystemExit):
        train_lm.main(["--ffn=sparse"])
    with pytest.raises(SystemExit):
        train_lm.main(["--compare", "--resume"])
    assert "--compare trains from the start: leave out --resume" in capsys.readouterr().err


def test_monitor_and_routers(tmp_path, capsys):
    """--monitor shows the experts live, in the report and in a picture, over a resumed run too."""
    arguments = [*TINY_ARGUMENTS, "--monitor", f"--out={tmp_path}", "--capacity-factor=1.0"]
    train_lm.main([*arguments, "--steps=20"])
    assert "entropy" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["monitor"]["step"] == 20 and len(report["monitor"]["layers"]) == 2
    assert (tmp_path / "monitor.png").stat().st_size > 10_000
    records = (tmp_path / "monitor.jsonl").read_text().splitlines()
    assert [json.loads(record)["step"] for record in records] == [10, 20]


@pytest.mark.parametrize(
    "changes",
    [
        {"router": "sigmoid", "balance": "bias"},
        {"router": "noisy"},
        {"router": "expert_choice", "balance": "none"},
        {"router": "hierarchical", "capacity_factor": 1.25},
        {"router": "hash", "balance": "none"},
        {"balance": "sequence"},
        {"tile_size": 8},
    ],
)
def test_every_router_learns_and_resumes(tmp_path, changes):
    options = dataclasses.replace(TINY, **changes)
    whole = train_lm.train(options, quiet=True)
    losses = whole.history["loss"]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    train_lm.train(options, out=tmp_path, seconds=0, quiet=True)  # one step
    torch.rand(3)  # whatever else draws numbers meanwhile
    resumed = train_lm.train(options, out=tmp_path, resume=True, quiet=True, monitor=True)
    assert resumed.history["loss"] == losses
    if options.balance == "bias":
        layer = whole.model.moe_layers()[0]
        assert layer.router.expert_bias.any() and not layer.last_aux_loss


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--ffn=dense", "--router=hash"], "--router needs --ffn moe_ext"),
        (["--ffn=reference", "--monitor"], "--monitor needs --ffn moe_ext"),
        (["--router=expert_choice", "--tile-size=64"], "tile_size"),
        (["--router=hierarchical", "--balance=bias"], "bias_update_rate must be left out"),
    ],
)
def test_bad_routing_options(arguments, message, capsys):
    with pytest.raises(SystemExit):
        train_lm.main(arguments)
    assert message in capsys.readouterr().err


def test_compare_routers(tmp_path, capsys):
    import compare_routers

    compare_routers.main(
        ["--steps=12", "--only", "bias", "hash", f"--out={tmp_path}", "--threads=2"]
    )
    out = capsys.readouterr().out
    rows = json.loads((tmp_path / "routers.json").read_text())["rows"]
    assert [row["method"] for row in rows] == [
        n for n in compare_routers.METHODS if "bias" in n or "hash" in n
    ]
    for row in rows:
        assert row["method"] in out and 3 < row["held_out_bits_per_byte"] < 8
        assert 0 <= row["min_over_mean"] <= 1 <= row["max_over_mean"] <= 4
    assert (tmp_path / "routers.png").stat().st_size > 10_000
    with pytest.raises(SystemExit):
        compare_routers.main(["--only", "nothing"])
    assert "--only must name one of: top-2, no balance" in capsys.readouterr().err


# --- checkpoints of others ---------------------------------------------------------------------

CHECKPOINT = "checkpoint.safetensors"


@pytest.fixture(scope="module")
def seven_steps(tmp_path_factory):
    """(trainer, its checkpoint's file, tensors and metadata) after 7 steps."""
    trainer = train_lm.Trainer(TINY)
    for _ in range(7):
        trainer.train_step()
    trainer.evaluate(1)
    path = tmp_path_factory.mktemp("seven") / CHECKPOINT
    trainer.save(path)
    with safetensors.safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        return trainer, path, tensors, file.metadata()


def values(trainer):
    """Everything that a checkpoint may change, as bytes."""
    tensors = [*trainer.model.state_dict().values()]
    for parameter in trainer.model.parameters():
        tensors += trainer.optimizer.state[parameter].values()
    return [tensor.numpy().tobytes() for tensor in tensors], trainer.step, str(trainer.history)


def refused(trainer, path, match=""):
    """That it is not loaded, with one sentence, and nothing of it installed."""
    before = values(trainer)
    with pytest.raises(SystemExit, match=match) as refusal:
        trainer.load(path)
    sentence = str(refusal.value)
    assert sentence.startswith("train_lm: ") and "\n" not in sentence and len(sentence) < 500
    assert values(trainer) == before


EMBEDDING = "embedding.weight"


@pytest.mark.parametrize(
    "name,tensor,message",
    [
        (f"optimizer.exp_avg.{EMBEDDING}", torch.zeros(1), "must be .256, 32. torch.float32, got"),
        (f"optimizer.exp_avg_sq.{EMBEDDING}", torch.zeros(1), "must be .256, 32."),
        (f"optimizer.exp_avg.{EMBEDDING}", torch.zeros(256, 32).half(), "torch.float16"),
        (f"optimizer.exp_avg.{EMBEDDING}", None, "lacks tensor 'optimizer.exp_avg.embedding"),
        (f"optimizer.step.{EMBEDDING}", torch.zeros(2), r"must be \[\] torch.float32"),
        (f"optimizer.step.{EMBEDDING}", torch.tensor(7), "torch.int64"),
        (f"optimizer.step.{EMBEDDING}", torch.tensor(-5.0), "must be its step, 7"),
        (f"optimizer.max_exp_avg_sq.{EMBEDDING}", torch.zeros(256, 32), "foreign tensor"),
        ("optimizer", torch.zeros(1), "foreign tensor 'optimizer'"),
        (f"model.{EMBEDDING}", torch.zeros(255, 32), "must be .256, 32."),
        (f"model.{EMBEDDING}", torch.zeros(256, 32).double(), "torch.float64"),
        (f"model.{EMBEDDING}", torch.zeros(256, 32, dtype=torch.int64), "torch.int64"),
        (f"model.{EMBEDDING}", None, "lacks tensor"),
        ("model.\33[2J" + 999 * "x", torch.zeros(1), r"foreign tensor 'model.\\x1b"),
    ],
)
def test_foreign_tensors_are_refused(seven_steps, tmp_path, name, tensor, message):
    """Fused AdamW would run past the end of states that are smaller than their parameters."""
    trainer, _, tensors, metadata = seven_steps
    tensors = {**tensors, name: tensor}
    if tensor is None:
        del tensors[name]
    safetensors.torch.save_file(tensors, tmp_path / CHECKPOINT, metadata)
    refused(trainer, tmp_path / CHECKPOINT, message)


def changed(key, change):
    """A function of metadata: with one JSON value of it changed."""
    return lambda metadata: {**metadata, key: json.dumps(change(json.loads(metadata[key])))}


def with_entry(entry):
    return lambda history: {**history, "experts": [entry]}


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda metadata: None, "no checkpoint of train_lm"),
        (lambda metadata: {"format": "pt"}, "no checkpoint of train_lm"),
        (lambda metadata: {**metadata, "options": "{"}, "options are no JSON"),
        (lambda metadata: {**metadata, "history": "[" * 10**5}, "history are no JSON"),
        (lambda metadata: {**metadata, "progress": "9" * 10**4}, "progress are no JSON"),
        (lambda metadata: {**metadata, "text": "another"}, "another text"),
        (changed("options", lambda old: []), "options must be a JSON object"),
        (changed("options", lambda old: {}), "another version"),
        (changed("options", lambda old: {**old, "more": 1}), "another version"),
        (changed("options", lambda old: {**old, "lr": "\n" * 10**5}), r"lr: '\\n"),
        (changed("progress", lambda old: 7), "progress must be a JSON object"),
        *(
            (changed("progress", lambda old, step=step: {**old, "step": step}), message)
            for step, message in [
                (-5, "step must be an integer from 0 to 20, got -5"),
                (7.0, "got 7.0"),
                (True, "got True"),
                ("7", "got '7'"),
                (None, "got None"),
                (21, "got 21"),
                (10**30, "from 0 to 20"),
                (8, "loss must be 8 finite numbers"),
                (0, "loss must be 0 finite numbers"),
            ]
        ),
        *(
            (changed("progress", lambda old, s=seconds: {**old, "seconds": s}), "seconds")
            for seconds in (-1.0, math.nan, math.inf, "1", None)
        ),
        (changed("history", lambda old: {}), "history must have experts, held_out, loss, seconds"),
        (changed("history", lambda old: {**old, "loss": old["loss"][:-1]}), "loss must be 7"),
        (changed("history", lambda old: {**old, "loss": 7}), "loss must be 7"),
        (changed("history", lambda old: {**old, "loss": [math.nan] * 7}), "loss must be 7"),
        (changed("history", lambda old: {**old, "loss": [10**400] * 7}), "loss must be 7"),
        (changed("history", lambda old: {**old, "seconds": [[]] * 7}), "seconds must be 7"),
        (changed("history", lambda old: {**old, "held_out": [{}]}), "held_out must have a step"),
        (changed("history", lambda old: {**old, "held_out": 5}), "held_out must be a list"),
        (changed("history", with_entry({"step": 10, "share": [[0.25] * 4] * 2})), "up to 7"),
        (changed("history", with_entry({"step": 5, "share": [[0.25] * 4]})), "share"),
        (changed("history", with_entry({"step": 5, "share": [[0.25] * 3] * 2})), "share"),
        (changed("history", with_entry({"step": 5, "share": [[None] * 4] * 2})), "share"),
    ],
)
def test_foreign_metadata_is_refused(seven_steps, tmp_path, change, message):
    trainer, _, tensors, metadata = seven_steps
    safetensors.torch.save_file(tensors, tmp_path / CHECKPOINT, change(metadata))
    refused(trainer, tmp_path / CHECKPOINT, message)


def test_files_that_are_no_checkpoints_are_refused(seven_steps, tmp_path):
    trainer, good, *_ = seven_steps
    path = tmp_path / CHECKPOINT
    data = good.read_bytes()
    for junk in (b"", bytes(8), os.urandom(5000), b"{}", data[:4], data[:5000], data[:-1]):
        path.write_bytes(junk)
        refused(trainer, path, "cut off, damaged or no safetensors file|no checkpoint of train_lm")
    path.unlink()
    path.mkdir()
    refused(trainer, path, "nothing to resume")


def test_damaged_headers_do_no_harm(seven_steps, tmp_path):
    """Single bytes of the header changed: loaded as valid, or refused with one sentence."""
    trainer, good, *_ = seven_steps
    data = good.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    path = tmp_path / CHECKPOINT
    draw = random.Random(0)
    seen = 0
    for _ in range(300):
        damaged = bytearray(data)
        damaged[draw.randrange(header)] = draw.choice(b'0179-.,:"[]{}eE x\0\xff')
        path.write_bytes(damaged)
        try:
            trainer.load(path)
        except SystemExit as refusal:
            seen += 1
            assert str(refusal).startswith("train_lm: ") and "\n" not in str(refusal)
        assert trainer.step == len(trainer.history["loss"]) == 7
    assert 200 < seen  # digits of numbers may change unseen
    trainer.load(good)
    assert trainer.train_step() == pytest.approx(losses()[7])
    trainer.load(good)


def test_resume_from_the_first_step(tmp_path):
    train_lm.Trainer(TINY).save(tmp_path / CHECKPOINT)
    resumed = train_lm.train(TINY, out=tmp_path, resume=True, quiet=True)
    assert resumed.history["loss"] == losses()


# --- runs and their folder ---------------------------------------------------------------------

SHORT = [*TINY_ARGUMENTS, "--steps=20"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@contextlib.contextmanager
def nearly_full_disk(room=100_000):
    """The system refuses files of more than so many bytes, as it does when a disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_run_is_not_overwritten_unasked(tmp_path, capsys):
    arguments = [*SHORT, f"--out={tmp_path}"]
    train_lm.main([*arguments, "--seconds=0", "--monitor"])  # interrupted after a step
    before = (tmp_path / CHECKPOINT).read_bytes()
    message = f"{tmp_path} has a run: --resume goes on, --overwrite starts over; or name another"
    with pytest.raises(SystemExit, match=message):
        train_lm.main(arguments)
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    train_lm.main([*arguments, "--overwrite", "--resume"])  # make demo ARGS=--resume
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["steps"] == 20 and report["history"]["loss"] == losses()
    with pytest.raises(SystemExit, match=message):
        train_lm.main(arguments)
    capsys.readouterr()
    train_lm.main([*arguments, "--overwrite", "--seconds=0"])
    assert capsys.readouterr().out.startswith(f"starting over: the run in {tmp_path} is given up")
    assert json.loads((tmp_path / "report.json").read_text())["steps"] == 1
    # Of the first run no records are left, which a resumed run would take for its own.
    assert not (tmp_path / "monitor.jsonl").exists()
    train_lm.main([*arguments, "--resume", "--monitor"])
    records = [json.loads(x) for x in (tmp_path / "monitor.jsonl").read_text().splitlines()]
    assert [(record["step"], record["steps"]) for record in records] == [(11, 10), (20, 9)]


def test_a_comparison_is_not_overwritten_unasked(tmp_path, monkeypatch):
    (tmp_path / "compare.json").write_text("kept")
    compared = []
    monkeypatch.setattr(train_lm, "compare", lambda *arguments: compared.append(arguments))
    with pytest.raises(SystemExit, match="has a run: --overwrite starts over; or name another"):
        train_lm.main([*SHORT, "--compare", f"--out={tmp_path}"])
    assert (tmp_path / "compare.json").read_text() == "kept" and not compared
    train_lm.main([*SHORT, "--compare", "--overwrite", f"--out={tmp_path}"])
    assert len(compared) == 1


def test_one_run_at_a_time_until_it_is_killed(tmp_path):
    command = [sys.executable, str(EXAMPLES / "train_lm.py"), *TINY_ARGUMENTS, "--steps=1000000"]
    process = subprocess.Popen([*command, f"--out={tmp_path}"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline().startswith("step 1/1000000")
        for more in ([], ["--overwrite"], ["--resume"], ["--compare"]):
            with pytest.raises(SystemExit, match=f"another run is writing to {tmp_path}: wait"):
                train_lm.main([*SHORT, f"--out={tmp_path}", *more])
    finally:
        process.kill()
        process.communicate()
    train_lm.main([*SHORT, f"--out={tmp_path}"])
    assert json.loads((tmp_path / "report.json").read_text())["steps"] == 20


def test_a_folder_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, capsys):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with lm_checkpoint.claim(tmp_path):
        assert "cannot be locked (No locks available)" in capsys.readouterr().out


def test_a_kill_while_saving_leaves_nothing_for_ever(tmp_path):
    """The kernel kills the process at the 100,000th byte of its second checkpoint."""
    train_lm.main([*SHORT, "--seconds=0", f"--out={tmp_path}"])
    before, files = (tmp_path / CHECKPOINT).read_bytes(), names(tmp_path)
    program = """
import resource, signal, sys
import train_lm
def save(self, path, whole=train_lm.Trainer.save):
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    whole(self, path)
train_lm.Trainer.save = save
train_lm.main(sys.argv[1:])
"""
    killed = subprocess.run(
        [sys.executable, "-c", program, *SHORT, "--resume", f"--out={tmp_path}"],
        env={**os.environ, "PYTHONPATH": f"{EXAMPLES}:{EXAMPLES.parent}"},
        capture_output=True,
    )
    assert killed.returncode == -signal.SIGXFSZ, killed.stderr
    assert len(names(tmp_path)) == len(files) + 1  # the cut-off one
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    train_lm.main([*SHORT, "--resume", f"--out={tmp_path}"])
    assert names(tmp_path) == files
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["history"]["loss"] == losses()


def test_a_disk_without_room_is_noticed_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(train_lm.Trainer, "train_step", lambda self: pytest.fail("trained"))
    for more in ([], ["--compare"]):
        with nearly_full_disk(), pytest.raises(SystemExit) as stop:
            train_lm.main([*SHORT, f"--out={tmp_path}", *more])
        assert str(stop.value) == f"train_lm: {tmp_path}: File too large"
    assert not [name for name in names(tmp_path) if not name.startswith(".lock")]
    file = tmp_path / "file"
    file.touch()
    for out, message in [
        ("/proc/self/runs", "No such file"),
        (file, "File exists"),
        (file / "x", "Not a directory"),
    ]:
        for more in ([], ["--resume"], ["--compare"]):
            with pytest.raises(SystemExit, match=f"train_lm: {out}: {message}"):
                train_lm.main([*SHORT, f"--out={out}", *more])


def test_a_disk_that_fills_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    train_lm.main([*SHORT, "--seconds=0", f"--out={tmp_path}"])
    before, files = (tmp_path / CHECKPOINT).read_bytes(), names(tmp_path)
    whole_save = train_lm.Trainer.save

    def save(self, path):
        with nearly_full_disk():
            whole_save(self, path)

    monkeypatch.setattr(train_lm.Trainer, "save", save)
    with pytest.raises(SystemExit) as stop:
        train_lm.main([*SHORT, "--resume", f"--out={tmp_path}"])
    assert "File too large" in str(stop.value) and "last checkpoint is whole" in str(stop.value)
    assert (tmp_path / CHECKPOINT).read_bytes() == before and names(tmp_path) == files
    monkeypatch.undo()
    train_lm.main([*SHORT, "--resume", f"--out={tmp_path}"])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["history"]["loss"] == losses()
