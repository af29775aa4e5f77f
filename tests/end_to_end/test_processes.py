"""The real command as two processes of one job (gloo on CPU): train, save, and continue."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from test_pretrain import SMALL

ROOT = Path(__file__).parents[2]
PROCESSES = 2


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


def test_two_processes_train_and_continue(tmp_path):
    arguments = ("--set=parallel.data=2", f"--set=data.cache_dir={tmp_path}/cache")
    first, second = launch(tmp_path, *arguments)
    assert "data 2 x expert 2 = 4 cpu devices" in first
    assert "step 3/4" in first and "step 3/4" not in second  # process 0 speaks for all
    before = records(tmp_path)
    assert [r["step"] for r in before] == [0, 1, 2, 3]
    launch(tmp_path, *arguments, "--set=run.num_steps=6", "--set=optim.total_tokens=256")
    after = records(tmp_path)
    assert [r["step"] for r in after] == [0, 1, 2, 3, 4, 5]
    assert after[:4] == before
