"""Writes tests/golden/run_FORMAT.tar.xz: two steps of a very small run, to be readable for ever.

    python -m tools.make_checkpoint_fixture FORMAT

FORMAT is a new name, e.g. format_1: a fixture shows what was once written, so none is replaced.
Beside it run_FORMAT.json tells the run's overrides and the sha256 of its state.
"""

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from dsv3_jax.errors import UserError, run_main

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
KEPT = ("checkpoints", "run.json", "tokenizer.json")
CHANGES = (
    "run.num_steps=2", "run.eval_batches=0", "run.num_samples=0", "model.vocab_size=300",
    "model.width=16", "model.num_layers=2", "model.dense_ffn_width=16", "model.expert_ffn_width=4",
    "model.num_heads=2", "model.q_latent_dim=8", "model.kv_latent_dim=8",
    "model.qk_nope_head_dim=4", "model.qk_rope_head_dim=4", "model.v_head_dim=4",
    "parallel.data=1", "parallel.expert=2", "data.max_documents=20", "data.sequence_length=16",
    "data.sequences_per_step=4", "optim.warmup_steps=1",
)  # fmt: skip


def restored_hash(workdir: Path, changes: list[str]) -> str:
    """sha256 of the whole training state of a run, read onto the mesh of its config."""
    from dsv3_jax.checkpoint.hashing import state_hash
    from dsv3_jax.checkpoint.reader import open_checkpoint
    from dsv3_jax.overrides import load_config
    from dsv3_jax.parallel.mesh import make_mesh
    from dsv3_jax.train.state import abstract_state

    config = load_config("tiny", changes)
    template = abstract_state(config, make_mesh(config.parallel))[1]
    checkpoint = open_checkpoint(workdir / "checkpoints")
    assert checkpoint is not None and checkpoint.step == 2, checkpoint
    return state_hash(checkpoint.restore(vars(template)))


def main(argv: list[str]) -> None:
    if len(argv) != 2:
        raise UserError("give one name: python -m tools.make_checkpoint_fixture FORMAT")
    target = GOLDEN / f"run_{argv[1]}.tar.xz"
    if target.exists():
        raise UserError(f"{target} exists and stays; give another name")
    with tempfile.TemporaryDirectory() as folder:
        workdir, cache = Path(folder) / "run", f"data.cache_dir={folder}/cache"
        command = [sys.executable, "-m", "experiments.pretrain", f"--workdir={workdir}"]
        command += [f"--set={change}" for change in (*CHANGES, cache)]
        subprocess.run(command, check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
        os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
        told = {"changes": CHANGES, "state_sha256": restored_hash(workdir, list(CHANGES))}
        with tarfile.open(target, "w:xz") as archive:
            for name in KEPT:
                archive.add(workdir / name, name)
    target.with_name(f"run_{argv[1]}.json").write_text(json.dumps(told, indent=1) + "\n")
    print(f"{target}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    run_main(main)
