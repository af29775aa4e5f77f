"""Between Hugging Face folders and runs of ours; the whole model passes through host memory."""

import math
import os
import re
from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from dsv3_jax.checkpoint import manifest
from dsv3_jax.checkpoint.hf_config import read_model_config
from dsv3_jax.checkpoint.hf_folder import open_folder
from dsv3_jax.checkpoint.hf_load import load_folder
from dsv3_jax.checkpoint.hf_save import save_folder
from dsv3_jax.checkpoint.manager import CheckpointManager
from dsv3_jax.checkpoint.pretrained import load_model
from dsv3_jax.checkpoint.reader import locate, steps_in
from dsv3_jax.config import Config, RunConfig
from dsv3_jax.errors import UserError
from dsv3_jax.model.router import RouterBias
from dsv3_jax.overrides import to_dict
from dsv3_jax.plan.parameters import weights
from dsv3_jax.train.workdir import CHECKPOINTS, TOKENIZER


def import_run(source: Path, destination: Path) -> None:
    """Writes a folder's weights, dequantised to float32, as step 0 of a run.

    Args:
      source: a Hugging Face folder.
      destination: the working directory to make; one that an earlier call left unfinished is
        continued.

    Raises:
      UserError: the source cannot be loaded, the destination holds something, or the model is
        larger than this machine's memory.
    """
    if not _is_unfinished(destination):
        raise UserError(f"{destination} exists; delete it or give another destination")
    folder = open_folder(source)
    described = read_model_config(folder.config, str(folder.path / "config.json"))
    # The second copy is the one being written.
    _check_memory(2 * 4 * sum(weight.size for weight in weights(described)), source)
    model = load_folder(source)
    manager = CheckpointManager(destination / CHECKPOINTS, keep=1)
    if tokenizer := model.source.files.get(TOKENIZER):
        (destination / TOKENIZER).write_bytes(tokenizer)
    _, params, router_bias = nnx.split(model, nnx.Param, RouterBias)
    state = {"params": nnx.to_pure_dict(params), "router_bias": nnx.to_pure_dict(router_bias)}
    # A config must have a length; no step was taken.
    config = Config(run=RunConfig(name=destination.name, num_steps=1), model=model.config)
    manager.save(0, state, {"config": to_dict(config)}, wait=True)
    manager.close()


def export_run(source: Path, destination: Path, dtype: str, max_shard_bytes: int) -> None:
    """Writes the newest checkpoint of a run that verifies as a Hugging Face folder.

    Args:
      source: a run's working directory, its `checkpoints` folder or one step in it.
      destination, dtype, max_shard_bytes: as `hf_save.save_folder` takes them.

    Raises:
      UserError: as `load_model` and `save_folder`, or the model is larger than this machine's
        memory.
    """
    if os.path.lexists(destination):
        raise UserError(f"{destination} exists; delete it or give another destination")
    directory, step = locate(source)
    try:
        contents = manifest.read(directory / str(steps_in(directory)[-1] if step is None else step))
        saved = [a["shape"] for n, a in contents["arrays"].items() if n.startswith("params.")]
    except manifest.DamagedCheckpoint:
        saved = []  # loading tells which steps are damaged
    _check_memory(2 * 4 * sum(map(math.prod, saved)), source)
    model = load_model(source, jnp.float32)
    save_folder(model, destination, dtype, max_shard_bytes=max_shard_bytes)


def _is_unfinished(workdir: Path) -> bool:
    """Whether a working directory is missing, or is what an interrupted `import_run` leaves."""
    if not os.path.lexists(workdir):
        return True
    known = {CHECKPOINTS, TOKENIZER}
    return (
        workdir.is_dir()
        and {path.name for path in workdir.iterdir()} <= known
        and not steps_in(workdir / CHECKPOINTS)
    )


def _check_memory(needed: int, source: Path) -> None:
    if needed > (available := _available_bytes()):
        raise UserError(
            f"{source} needs {needed / 1e9:,.0f} GB of memory in this conversion, but "
            f"{available / 1e9:,.0f} GB are available; use a larger machine"
        )


def _available_bytes() -> int:
    try:  # what can be had without swapping, file caches included
        text = Path("/proc/meminfo").read_text()
        return int(re.search(r"^MemAvailable: *(\d+) kB", text, re.MULTILINE)[1]) * 1024
    except (OSError, TypeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
