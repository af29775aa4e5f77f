"""SIGKILL while saving: the newest complete checkpoint is always there, whole and right."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from saver import SHAPE, state_of

from dsv3_jax.checkpoint.manager import CheckpointManager
from dsv3_jax.checkpoint.reader import open_checkpoint, steps_in

ROOT = Path(__file__).parents[2]
TEMPLATE = {"w": np.empty(SHAPE), "step": np.array(0)}


def start(directory, point):
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("saver.py")), str(directory), point],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def check(directory, at_least):
    """Restores as the next start would; returns the step."""
    manager = CheckpointManager(directory, keep=2)
    state, extra, step = manager.restore(TEMPLATE)
    manager.close()
    assert manager.rejected == ()
    assert step >= at_least and extra == {"step": step}
    np.testing.assert_array_equal(state["w"], state_of(step)["w"])
    assert state["step"] == step
    assert all(path.name.isdecimal() for path in Path(directory).iterdir())
    return step


@pytest.mark.parametrize(
    ("point", "expected"),
    [
        ("before_manifest", 3),
        ("after_manifest", 3),
        ("after_rename", 4),
        ("in_deletion", 4),
        ("between_renames", 3),
    ],
)
def test_killed_at_every_stage_of_the_commit(tmp_path, point, expected):
    process = start(tmp_path, point)
    process.communicate(timeout=120)
    assert process.returncode == -9
    assert any(not path.name.isdecimal() for path in tmp_path.iterdir()) or point == "after_rename"
    assert check(tmp_path, 0) == expected
    for step in steps_in(tmp_path):
        assert open_checkpoint(tmp_path, step).step == step


def kill_at_random(directory, trials, seed):
    rng = random.Random(seed)
    complete = 0
    for _ in range(trials):
        process = start(directory, "none")
        for _ in range(2 + rng.randrange(3)):
            line = process.stdout.readline()
            if line.strip().isdecimal():
                complete = max(complete, int(line))
        time.sleep(rng.random() * 0.1)
        process.kill()
        process.wait()
        for line in process.stdout:
            if line.strip().isdecimal():
                complete = max(complete, int(line))
        process.stdout.close()
        complete = check(directory, complete)
    assert complete > trials


def test_killed_at_random_moments(tmp_path):
    kill_at_random(tmp_path, 3, seed=0)


@pytest.mark.slow
def test_killed_at_many_random_moments(tmp_path):
    kill_at_random(tmp_path, 100, seed=1)
