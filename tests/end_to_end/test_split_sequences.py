"""Sequences split over devices, by the commands that a user runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from flax import nnx
from hurry import COMMAND_FLAGS
from test_pretrain import ROOT, SMALL

SPLIT = ["--set=parallel.context=2"]


def command(name: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": COMMAND_FLAGS}
    return subprocess.run(
        [sys.executable, "-m", f"experiments.{name}", *arguments],
        cwd=cwd, env={**os.environ, "PYTHONPATH": path, **flags}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip


def records(folder: Path) -> list[dict]:
    assert json.loads((folder / "run.json").read_text())["mesh"]["context"] == 2
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def test_extension_with_split_sequences(tmp_path):
    """On context 2 x expert 2, with evaluations."""
    from dsv3_jax import DeepSeekV3
    from dsv3_jax.model.runtime import Runtime
    from dsv3_jax.overrides import load_config

    settings = [argument.removeprefix("--set=") for argument in SMALL]
    model = load_config("tiny", settings).model
    DeepSeekV3(model, runtime=Runtime(), rngs=nnx.Rngs(0)).save_pretrained(tmp_path / "base")
    extension = [
        f"--set={item}"
        for item in (
            "checkpoint.initial_weights=base", "model.yarn.original_length=16",
            "model.yarn.factor=4", "extend.first_length=32", "extend.second_length=0",
            "extend.steps=2", "run.num_samples=0", f"data.cache_dir={tmp_path}/cache",
        )
    ]  # fmt: skip
    run = ("--config=tiny", *SMALL, *SPLIT, *extension, "--workdir=extended")
    done = command("extend_context", *run, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "pipe 1 x data 1 x context 2 x expert 2 = 4 cpu devices" in done.stdout
    losses = [record["loss"] for record in records(tmp_path / "extended" / "phase_1_32")]
    assert len(losses) == 2 and all(0 < loss < 10 for loss in losses)


@pytest.mark.slow
def test_pretraining_with_split_sequences_reads_and_learns_the_same(tmp_path):
    """Losses of the run on data 1 x expert 2, and samples at the end, of whole sequences."""
    shared = [*SMALL, f"--set=data.cache_dir={tmp_path}/cache", "--set=run.num_steps=2"]
    for name, split in (("split", SPLIT), ("whole", [])):
        done = command("pretrain", *shared, *split, f"--workdir={name}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "split" / "samples.jsonl").read_text()
    whole = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").open()]
    for got, want in zip(records(tmp_path / "split"), whole, strict=True):
        for key in ("loss", "loss_mtp", "loss_balance", "grad_norm", "validation_loss"):
            assert got.get(key) == pytest.approx(want.get(key), rel=1e-5), key


def test_a_mistake_is_one_line(tmp_path):
    arguments = [*SMALL, *SPLIT, "--set=data.sequence_length=18"]
    done = command("pretrain", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "data.sequence_length=18 is not a multiple of 2*parallel.context=4" in line
    assert not list(tmp_path.iterdir())
