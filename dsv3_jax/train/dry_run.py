"""A run checked without devices: the block that `train` would show, and the step's trace."""

import jax
import jax.numpy as jnp

from dsv3_jax.config import Config
from dsv3_jax.parallel.mesh import abstract_mesh
from dsv3_jax.train.progress import describe
from dsv3_jax.train.state import abstract_state
from dsv3_jax.train.step import make_train_step


def dry_run(config: Config) -> str:
    """Traces one step on an abstract mesh; no array is made and no device is needed.

    Returns:
      The description of the run.
    """
    mesh = abstract_mesh(config.parallel)
    graphdef, state = abstract_state(config, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = make_train_step(config, graphdef, shardings)
    rows = config.microbatch_sequences
    shape = (config.data.sequences_per_step // rows, rows, config.data.sequence_length + 1)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    jax.eval_shape(step, state, {"tokens": tokens}, scalar, scalar, scalar)
    return f"{describe(config, 'planned')}\nthe configuration is valid and its step can be traced"
