"""Faults on purpose, for tests of real processes: armed by the environment, nothing otherwise.

    DSV3_FAULT=POINT[@STEP]=ACTION[,...]    e.g. `before_step@5=hang`

A point is a name that the code reaches, `STEP` the step at which it acts (`*`: every time; without
one: the first time). `kill` is SIGKILL, `hang` sleeps for ever, `raise` raises OSError, `spike` and
`nan` give the factor by which the caller spoils its number, `flip` asks the caller to flip a bit.
With DSV3_FAULT_ONCE=FOLDER a fault acts once however often the run is started again.
"""

import errno
import os
import signal
import time
from pathlib import Path
from typing import Any

VARIABLE = "DSV3_FAULT"
ACTIONS = ("kill", "hang", "raise", "spike", "nan", "flip")
_fired: set[str] = set()


def reach(point: str, step: int | None = None) -> str | None:
    """Acts if this point is armed; returns the action that the caller must take, else None."""
    armed = os.environ.get(VARIABLE)
    if not armed:
        return None
    for entry in armed.split(","):
        where, _, action = entry.partition("=")
        name, _, at = where.partition("@")
        due = str(step) == at if at else entry not in _fired
        if name != point or not (due or at == "*"):
            continue
        _fired.add(entry)
        if (once := os.environ.get(f"{VARIABLE}_ONCE")) is not None:
            note = Path(once, entry)
            if note.exists():
                continue
            note.touch()
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if action == "hang":
            time.sleep(10**6)
        if action == "raise":
            raise OSError(errno.ENOSPC, f"fault at {point}")
        if action not in ACTIONS:
            raise ValueError(f"{VARIABLE}: unknown action {action!r}; allowed: {ACTIONS}")
        return action
    return None


def flip_bit(tree: Any) -> Any:
    """The tree with a bit of its first float32 leaf flipped, on the first device alone."""
    import jax
    import numpy as np

    leaves, treedef = jax.tree.flatten(tree)
    shards = leaves[0].addressable_shards
    spoiled = np.array(shards[0].data)
    spoiled.view(np.uint32).reshape(-1)[0] ^= 1 << 22  # the highest bit of the mantissa
    arrays = [jax.device_put(spoiled, shards[0].device), *(shard.data for shard in shards[1:])]
    leaves[0] = jax.make_array_from_single_device_arrays(
        leaves[0].shape, leaves[0].sharding, arrays
    )
    return jax.tree.unflatten(treedef, leaves)
