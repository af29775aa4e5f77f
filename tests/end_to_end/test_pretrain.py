"""`python -m experiments.pretrain` as a user runs it."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hurry import COMMAND_FLAGS

ROOT = Path(__file__).parents[2]
SMALL = [
    f"--set={item}"
    for item in (
        "run.num_steps=4", "run.eval_interval=2", "run.eval_batches=1", "run.num_samples=1",
        "run.sample_tokens=4", "model.vocab_size=300", "model.width=16", "model.num_layers=2",
        "model.dense_ffn_width=16", "model.expert_ffn_width=8", "model.num_heads=2",
        "model.q_latent_dim=8", "model.kv_latent_dim=8", "model.qk_nope_head_dim=4",
        "model.qk_rope_head_dim=4", "model.v_head_dim=4", "parallel.data=1", "parallel.expert=2",
        "precision.compute=float32", "precision.remat=none", "data.max_documents=20",
        "data.sequence_length=16", "data.sequences_per_step=4", "checkpoint.interval_steps=2",
    )
]  # fmt: skip


def pretrain(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    # The experiment itself asks for the devices it needs.
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": COMMAND_FLAGS}
    environment = {**os.environ, "PYTHONPATH": path, **flags}
    return subprocess.run(
        [sys.executable, "-m", "experiments.pretrain", *arguments],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_a_run_from_the_command_line(tmp_path):
    done = pretrain(*SMALL, f"--set=data.cache_dir={tmp_path}/cache", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    workdir = tmp_path / "runs" / "tiny"
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
    assert [r["step"] for r in records] == [0, 1, 2, 3]
    assert sorted(os.listdir(workdir / "checkpoints")) == ["2", "4"]
    assert {"run.json", "samples.jsonl", "tensorboard", "tokenizer.json"} <= set(
        os.listdir(workdir)
    )
    told = ("parameters", "FLOP a token", "a device", "expert 2 = 2 cpu devices", "64 tokens",
            "compiling", "step 3/4", "ETA", "MaxVio", "validation loss", "sample")  # fmt: skip
    for shown in told:
        assert shown in done.stdout, shown
    figure = subprocess.run(
        [sys.executable, "-m", "tools.plot_run", str(workdir)],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert figure.returncode == 0, figure.stderr
    assert (workdir / "run.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) for name in ("tiny", "small", "v2_lite_16b")]
    + ["deepseek_v3_671b"],
)
def test_dry_run_needs_no_devices_and_leaves_nothing(name, tmp_path):
    done = pretrain("--dry_run", f"--config={name}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "parameters" in done.stdout and "tokens a step" in done.stdout
    if name == "deepseek_v3_671b":
        assert "671,026,419,200 total, 37,552,297,472 active" in done.stdout
        assert "250.46 GFLOP" in done.stdout
    assert not list(tmp_path.iterdir())


def processor_seconds() -> float:
    """Of the processes waited for so far: other work on the machine does not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.fixture(scope="module")
def import_seconds() -> float:
    """Processor time that the libraries alone take to import here."""
    before = processor_seconds()
    libraries = "import dsv3_jax.train.loop, jax; jax.devices()"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", libraries], cwd=ROOT, env=environment, check=True)
    return processor_seconds() - before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config=tinny"], "did you mean 'tiny'?"),
        (["--set=optim.peak_rl=1"], "did you mean 'optim.peak_lr'?"),
        (["--set=optim.peak_lr=high"], "must be a number"),
        (["--set=data.microbatch_sequences=12"], "is not a multiple of"),
        (["--set=parallel.data=64", "--set=data.sequences_per_step=256"], "needs 256 devices"),
        (["--set=data.sources=text:missing/*.txt"], "missing/*.txt"),
        (["--set=data.prepared=missing"], "missing"),
        (["--workdir=file/run"], "cannot be written"),
        (["--wrkdir=x"], "wrkdir"),
        (["tiny"], "--set KEY=VALUE"),
    ],
)
def test_a_mistake_costs_one_line_and_seconds(arguments, expected, tmp_path, import_seconds):
    """Exit code 2, one line that names the mistake, under 5 s, nothing left behind.

    On a slow machine: under twice what the imports take.
    """
    (tmp_path / "file").touch()
    before = processor_seconds()
    done = pretrain(*arguments, cwd=tmp_path)
    used = processor_seconds() - before
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and expected in line
    assert not done.stdout
    assert os.listdir(tmp_path) == ["file"]
    assert used < max(5, 2 * import_seconds)
