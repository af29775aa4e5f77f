"""The real command as two processes of one job (gloo on CPU): train, save, and continue."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from test_pretrain import SMALL

ROOT = Path(__file__).parents[2]
PROCESSES = 2
ROUNDED = {"loss", "loss_mtp", "loss_balance", "grad_norm", "validation_loss"}


def launch(cwd: Path, *arguments: str) -> list[str]:
    """Runs both processes to their end and returns what each printed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "JAX_PLATFORMS": "cpu",
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(PROCESSES),
    }
    environment.pop("XLA_FLAGS", None)
    command = [sys.executable, "-m", "experiments.pretrain", *SMALL, *arguments]
    running = [
        subprocess.Popen(
            command, cwd=cwd, env={**environment, "JAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in range(PROCESSES)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0] * PROCESSES, outputs
    return outputs


def records(cwd: Path) -> list[dict]:
    return [json.loads(line) for line in (cwd / "runs/tiny/metrics.jsonl").open()]


def run_as_one(cwd: Path, *arguments: str) -> None:
    """Runs the same mesh in one process, on the rows that the processes would read."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)
    script = Path(__file__).parent / "one_process.py"
    done = subprocess.run(
        [sys.executable, str(script), str(PROCESSES), *SMALL, *arguments],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_processes_train_as_one_and_continue(tmp_path):
    """Two processes of four devices each train as one process of eight does, up to rounding.

    Between processes gloo adds up four or eight numbers in another order than XLA does within
    one, so that a sum may differ in its last bit (6e-8 to 1.2e-7); sums of two are equal.
    """
    arguments = (
        "--set=parallel.data=2", "--set=parallel.expert=4", "--set=data.sequences_per_step=8",
        f"--set=data.cache_dir={tmp_path}/cache",
    )  # fmt: skip
    first, second = launch(tmp_path, *arguments)
    assert "data 2 x expert 4 = 8 cpu devices" in first
    assert "step 3/4" in first and "step 3/4" not in second  # process 0 speaks for all
    before = records(tmp_path)
    assert [r["step"] for r in before] == [0, 1, 2, 3]

    (tmp_path / "one").mkdir()
    run_as_one(tmp_path / "one", *arguments)
    for two, one in zip(before, records(tmp_path / "one"), strict=True):
        assert two.keys() == one.keys()
        for key in two.keys() & ROUNDED:
            assert two[key] == pytest.approx(one[key], rel=1e-6, abs=0), (two["step"], key)
        assert two["max_violation"] == one["max_violation"]  # of whole numbers of tokens

    launch(tmp_path, *arguments, "--set=run.num_steps=6", "--set=optim.total_tokens=512")
    after = records(tmp_path)
    assert [r["step"] for r in after] == [0, 1, 2, 3, 4, 5]
    assert after[:4] == before
