"""A configuration small enough to compile in seconds, for post-training."""

from dataclasses import replace

import jax
import numpy as np
from jax.sharding import Mesh
from small_model import SMALL_MODEL

from dsv3_jax import configs
from dsv3_jax.config import Config
from dsv3_jax.parallel.mesh import AXES

MODEL = replace(SMALL_MODEL, vocab_size=320)


def small_config(*, mesh: tuple[int, int] = (1, 1), **fields) -> Config:
    """Float32, on data x expert devices; `fields` replace those of the sections they name."""
    tiny = configs.get("tiny")
    config = replace(
        tiny,
        model=MODEL,
        balance=replace(tiny.balance, sequence_weight=0.01),
        parallel=replace(tiny.parallel, data=mesh[0], expert=mesh[1]),
        precision=replace(tiny.precision, compute="float32", moments="float32", remat="none"),
        data=replace(tiny.data, sequence_length=12, sequences_per_step=8),
    )
    for section, values in fields.items():
        config = replace(config, **{section: replace(getattr(config, section), **values)})
    return config


def small_mesh(config: Config) -> Mesh:
    shape = (1, config.parallel.data, config.parallel.expert)
    return Mesh(np.array(jax.devices()[: shape[1] * shape[2]]).reshape(shape), AXES)
