"""The main job: it learns, resumes on the same curve, and agrees with plain PyTorch."""

import dataclasses
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
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


def test_bad_arguments():
    with pytest.raises(SystemExit):
        train_lm.main(["--ffn=sparse"])


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
    # Noise is drawn anew after a resume.
    if changes.get("router") != "noisy":
        resumed = train_lm.train(options, out=tmp_path, resume=True, quiet=True)
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
