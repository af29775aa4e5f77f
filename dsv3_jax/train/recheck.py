"""Silent data corruption: a step computed twice must give the same bits.

Every `guard.recheck_interval` steps the step is rehearsed (guards.REHEARSAL: nothing changes) by
the same program on the same devices, then made. Losses, counts and an integer checksum of every
gradient leaf must be equal. A program of XLA for one device assignment is deterministic on CPU and
TPU, on GPU with `--xla_gpu_deterministic_ops=true`.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

EXIT_CORRUPTION = 16  # two results differed: the run may continue elsewhere, from its checkpoint
EXIT_CORRUPTION_AGAIN = 17  # for the second time in this run: suspect the hardware or the program
CORRUPTION_FILE = "corruption.jsonl"
_COMPARED = ("loss", "loss_mtp", "loss_balance", "grad_norm", "counts", "leaf_checksums")


class SilentCorruption(Exception):
    """Two computations of one step gave different bits."""


def leaf_checksums(grads: Any) -> jax.Array:
    """uint32 [leaves]: of each leaf, its float32 words' sum modulo 2^32, whatever the order."""
    return jnp.stack(
        [
            jnp.sum(jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32))
            for leaf in jax.tree.leaves(grads)
        ]
    )


def compare(step: int, rehearsed: dict[str, Any], made: dict[str, Any], leaves: list[str]) -> None:
    """Waits for both.

    Raises:
      SilentCorruption: they differ.
    """
    first, second = jax.device_get([{k: m[k] for k in _COMPARED} for m in (rehearsed, made)])
    differing = [k for k in _COMPARED if first[k].tobytes() != second[k].tobytes()]
    if not differing:
        return
    changed = np.flatnonzero(first["leaf_checksums"] != second["leaf_checksums"])
    names = [leaves[i] for i in changed]
    raise SilentCorruption(
        f"step {step} was computed twice and differs in {', '.join(differing)}"
        + (f" (gradients of {', '.join(names[:3])})" if names else "")
    )


def record(workdir: Path, error: SilentCorruption) -> int:
    """Notes the event in the run's folder. Returns the exit code."""
    path = workdir / CORRUPTION_FILE
    again = path.exists()
    if jax.process_index() == 0:
        devices = [str(device) for device in jax.devices()]
        with path.open("a") as file:
            file.write(json.dumps({"error": str(error), "devices": devices}) + "\n")
    return EXIT_CORRUPTION_AGAIN if again else EXIT_CORRUPTION
