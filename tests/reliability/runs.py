"""Real runs of `experiments.pretrain` in processes, with faults armed by the environment."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from hurry import COMMAND_FLAGS

ROOT = Path(__file__).parents[2]
SUPERVISE = str(ROOT / "tools/launch/supervise.sh")
SMALL = (
    "run.eval_interval=5", "run.eval_batches=1", "run.num_samples=0", "model.vocab_size=300",
    "model.width=16", "model.num_layers=2", "model.dense_ffn_width=16", "model.expert_ffn_width=8",
    "model.num_heads=2", "model.q_latent_dim=8", "model.kv_latent_dim=8",
    "model.qk_nope_head_dim=4", "model.qk_rope_head_dim=4", "model.v_head_dim=4",
    "parallel.data=1", "parallel.expert=2", "precision.compute=float32", "precision.remat=none",
    "data.max_documents=20", "data.sequence_length=16", "data.sequences_per_step=4",
    "checkpoint.interval_steps=2", "run.num_steps=10", "optim.total_tokens=640",
)  # fmt: skip


def start(
    workdir: Path,
    *changes: str,
    supervised: bool = False,
    command: str = "pretrain",
    **environment: str,
) -> subprocess.Popen:
    """Starts a run; `changes` are KEY=VALUE. Both outputs come together."""
    command = [sys.executable, "-m", f"experiments.{command}", f"--workdir={workdir}"]
    cache = f"data.cache_dir={workdir.parent / 'cache'}"
    command += [f"--set={change}" for change in (*SMALL, cache, *changes)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    flags = {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": COMMAND_FLAGS}
    return subprocess.Popen(
        [SUPERVISE, *command] if supervised else command,
        env={**os.environ, **flags, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(workdir: Path, *changes: str, timeout: int = 300, **options: str) -> tuple[int, str]:
    """Exit code and output of a run that ends within `timeout` seconds."""
    process = start(workdir, *changes, **options)
    output = process.communicate(timeout=timeout)[0]
    return process.returncode, output


def start_two(workdir: Path, *changes: str, faults: tuple[str, str] = ("", ""), **options):
    """One run of two processes, with two devices each; `faults` of either."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [
        start(
            workdir,
            "parallel.data=2",
            *changes,
            JAX_COORDINATOR_ADDRESS=f"localhost:{port}",
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(index),
            DSV3_FAULT=faults[index],
            **options,
        )
        for index in range(2)
    ]


def records(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").open()]


def losses(workdir: Path) -> list[str]:
    """Every bit of the losses, by step."""
    found = records(workdir)
    assert [r["step"] for r in found] == list(range(len(found)))
    return [r["loss_hex"] for r in found]


def stop(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGTERM)
