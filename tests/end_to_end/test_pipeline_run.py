"""The main job through a pipeline: its loss curve, stopping and continuing, two processes."""

from pathlib import Path

import numpy as np
import pytest
from test_pretrain import SMALL
from test_processes import launch

from dsv3_jax.overrides import load_config
from dsv3_jax.train.loop import train
from dsv3_jax.train.metrics import read_records

# Six layers, evaluations at 0, 4, 8 and the end; one row a device in a micro-batch.
COMMON = [
    *SMALL, "--set=run.num_steps=10", "--set=run.eval_interval=4", "--set=run.num_samples=0",
    "--set=model.num_layers=6", "--set=checkpoint.interval_steps=100",
    "--set=data.sequences_per_step=32", "--set=data.microbatch_sequences=4",
    "--set=optim.total_tokens=5120", "--set=optim.warmup_steps=3",
]  # fmt: skip
PIPELINE = [
    "--set=parallel.pipe=2", "--set=parallel.data=2", "--set=parallel.expert=2",
    "--set=parallel.schedule=dualpipe",
]  # fmt: skip
ALONE = ["--set=parallel.data=1", "--set=parallel.expert=2"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    """The corpus is prepared once."""
    return f"--set=data.cache_dir={tmp_path_factory.mktemp('cache')}"


@pytest.fixture(scope="module")
def without_pipeline(cache, tmp_path_factory) -> list[dict]:
    return finished(tmp_path_factory.mktemp("alone"), cache, *ALONE)


def finished(workdir: Path, *arguments: str) -> list[dict]:
    """Trains in this process, with its flags for fast compilation."""
    overrides = [argument.removeprefix("--set=") for argument in (*COMMON, *arguments)]
    assert train(load_config("tiny", overrides), workdir) == 0
    return read_records(workdir / "metrics.jsonl")


def assert_same_curve(got: list[dict], want: list[dict]):
    """Training and validation losses of every step to 1e-5."""
    assert [record["step"] for record in got] == [record["step"] for record in want]
    for record, expected in zip(got, want, strict=True):
        for name in ("loss", "loss_mtp", "loss_balance", "validation_loss"):
            assert (name in record) == (name in expected)
            if name in expected:
                np.testing.assert_allclose(record[name], expected[name], rtol=1e-5, err_msg=name)


@pytest.mark.slow
def test_its_loss_curve_is_that_without_a_pipeline(without_pipeline, cache, tmp_path):
    """Stopped after 7 of its 10 steps, and continued without the pipeline."""
    assert [r["step"] for r in without_pipeline if "validation_loss" in r] == [0, 4, 8, 9]
    assert without_pipeline[-1]["loss"] < without_pipeline[0]["loss"]
    finished(tmp_path, cache, *PIPELINE, "--set=run.num_steps=7")
    records = finished(tmp_path, cache, *ALONE)
    del records[6]["validation_loss"]  # the last step of a run is evaluated, too
    assert_same_curve(records, without_pipeline)


@pytest.mark.slow
def test_two_processes_share_a_pipeline(without_pipeline, cache, tmp_path):
    """Each holds the four devices of a pipeline rank, and both read the same rows."""
    first, _ = launch(tmp_path, *COMMON[len(SMALL) :], cache, *PIPELINE)
    assert "pipe 2 x data 2 x expert 2 = 8 cpu devices" in first
    assert_same_curve(read_records(tmp_path / "runs/tiny/metrics.jsonl"), without_pipeline)
