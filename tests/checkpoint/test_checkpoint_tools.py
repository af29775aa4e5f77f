"""tools.inspect_checkpoint and tools.verify_checkpoint, as commands."""

import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.checkpoint.manager import CheckpointManager

ROOT = Path(__file__).parents[2]


def run(tool, *args):
    return subprocess.run(
        [sys.executable, "-m", f"tools.{tool}", *map(str, args)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    manager = CheckpointManager(workdir / "checkpoints", keep=3)
    rng = np.random.default_rng(0)
    state = {
        "params": {"table": rng.normal(size=(100, 30)).astype(np.float32)},
        "moments": {"table": rng.normal(size=(100, 30)).astype(ml_dtypes.bfloat16)},
        "step": np.array(3, np.int32),
    }
    for step in (1, 2):
        manager.save(step, state, {}, wait=True)
    manager.close()
    return workdir


def test_inspect_prints_every_array_and_totals(workdir):
    result = run("inspect_checkpoint", workdir)
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0][:2] == ["step", "2"]
    assert "params.table float32 100 x 30 3,000 12,000".split() in lines
    assert "moments.table bfloat16 100 x 30 3,000 6,000".split() in lines
    assert "step int32 scalar 1 4".split() in lines
    assert "total 3 arrays 6,001 18,004".split() in lines


def test_verify_reports_each_step_and_damage(workdir):
    result = run("verify_checkpoint", workdir)
    assert result.returncode == 0, result.stderr
    assert [line.partition(":")[0] for line in result.stdout.splitlines()] == ["step 1", "step 2"]
    victim = next(p for p in (workdir / "checkpoints/1/d").rglob("*") if p.is_file())
    intact = victim.read_bytes()
    victim.write_bytes(intact[:-1] + bytes([intact[-1] ^ 4]))
    result = run("verify_checkpoint", workdir)
    victim.write_bytes(intact)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "step 1 is damaged" in result.stderr and victim.name in result.stderr
    assert "step 2" in result.stdout


@pytest.mark.parametrize("tool", ["inspect_checkpoint", "verify_checkpoint"])
def test_wrong_arguments_are_one_line(tool, tmp_path):
    for args in ([], [tmp_path], [tmp_path / "missing"]):
        result = run(tool, *args)
        assert result.returncode == 2 and result.stderr.startswith("error: ")
        assert len(result.stderr.splitlines()) == 1
