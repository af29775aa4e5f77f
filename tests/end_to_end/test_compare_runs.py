"""The comparison of two runs as a user calls it, on the files that runs leave."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.errors import UserError
from dsv3_jax.overrides import load_config, to_dict
from dsv3_jax.train.compare import relative_gaps
from tools.compare_runs import check_comparable, plot, read_run

ROOT = Path(__file__).parents[2]
NUM_STEPS = 40  # 30 of them warm-up


def write_run(path, losses, tokens_per_second, *overrides):
    config = to_dict(load_config("tiny", overrides))
    path.mkdir()
    (path / "run.json").write_text(json.dumps({"config": config}))
    records = [
        {"step": step, "loss": loss, "tokens_per_second": tokens_per_second}
        for step, loss in enumerate(losses)
    ]
    records[0]["tokens_per_second"] = 1.0  # compiling
    records[0]["validation_loss"], records[-1]["validation_loss"] = 7.0, losses[-1]
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def compare(*arguments):
    command = [sys.executable, "-m", "tools.compare_runs", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.fixture
def losses():
    return np.linspace(6, 4, NUM_STEPS) + np.random.default_rng().normal(0, 0.1, NUM_STEPS)


def test_gaps_and_times(tmp_path, losses):
    worse = losses.copy()
    worse[:10] *= 3  # in warm-up, forgotten after 20 more steps
    worse[33] *= 1.5
    write_run(tmp_path / "a", losses.tolist(), 3000.0, "precision=bf16")
    write_run(tmp_path / "b", worse.tolist(), 2000.0, "precision=fp8", "precision.remat=none")
    done = compare(tmp_path / "a", tmp_path / "b", f"--figure={tmp_path / 'figure.png'}")
    assert done.returncode == 0, done.stderr
    gaps = relative_gaps(worse, losses)
    last, largest, validation, speed = done.stdout.splitlines()[4:8]
    assert "| precision.compute | bfloat16 | fp8 |" in done.stdout
    assert "| precision.remat | paper | none |" in done.stdout
    assert "step 39" in last and f"{gaps[-1]:+.3%}" in last
    worst = 30 + gaps[30:].argmax()
    assert f"step {worst}" in largest and "from step 30" in largest
    assert f"{gaps[worst]:+.3%}" in largest
    assert f"{losses[-1]:.4f} | {worse[-1]:.4f}" in validation
    assert "3,000 | 2,000 | step time x 1.500" in speed
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_runs_that_cannot_be_compared_are_named(tmp_path, losses):
    write_run(tmp_path / "a", losses.tolist(), 1.0)
    write_run(tmp_path / "short", losses[:30].tolist(), 1.0)
    write_run(tmp_path / "other", losses.tolist(), 1.0, "run.seed=3", "optim.peak_lr=1e-4")
    write_run(tmp_path / "unconfigured", losses.tolist(), 1.0)
    (tmp_path / "unconfigured" / "run.json").unlink()
    run = read_run(tmp_path / "a")
    for name, told in {
        "nowhere": "nowhere/metrics.jsonl",
        "unconfigured": "unconfigured/run.json",
        "short": "step 29",
        "other": "optim.peak_lr=0.002 and 0.0001, run.seed=0 and 3",
    }.items():
        with pytest.raises(UserError, match=told):
            check_comparable(run, read_run(tmp_path / name))
    with pytest.raises(UserError, match="--figure=.*cannot be written"):
        plot(run, run, tmp_path / "nowhere" / "figure.png")


def test_a_mistake_is_one_line(tmp_path):
    failed = compare(tmp_path)
    assert failed.returncode == 2
    assert "two working directories" in failed.stderr and failed.stderr.count("\n") == 1
