"""Runs a jax function on the CPU, whatever devices there are.

Checkpoints are converted there: a GPU's division is not rounded exactly, and the bytes of a file
must not depend on the machine that wrote it. JAX takes a second to import, so that happens at the
first call.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from dsv3_jax.errors import UserError


def on_cpu(function: Callable[..., Any], *arrays: np.ndarray, **settings: Any) -> Any:
    """`function(*arrays, **settings)`, compiled once for each shape; arrays come back as numpy's.

    Raises:
      UserError: the environment forbids JAX to use the CPU.
    """
    import jax

    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        raise UserError(
            f"JAX_PLATFORMS={jax.config.jax_platforms} leaves out the CPU, where checkpoints are "
            f"converted; add it: JAX_PLATFORMS={jax.config.jax_platforms},cpu"
        ) from None
    with jax.default_device(device):
        return jax.tree.map(np.asarray, _compiled(function, **settings)(*arrays))


@functools.cache
def _compiled(function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    import jax

    return jax.jit(functools.partial(function, **settings))
