"""Mistakes in a call of the two commands: one line, exit code 2, nothing left behind."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "command, arguments, message",
    [
        ("sft", [], "checkpoint.initial_weights is empty"),
        ("sft", ["--set=sft.epoch=3"], "did you mean 'sft.epochs'"),
        ("grpo", [], "checkpoint.initial_weights is empty"),
        ("grpo", ["--set=grpo.form=tokens"], "did you mean 'token'"),
    ],
)
def test_a_mistake_is_one_line(command, arguments, message, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{command}", *arguments, f"--workdir={tmp_path}/run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
