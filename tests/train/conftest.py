"""A model small enough to compile in seconds, and batches for it."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from small_model import SMALL_MODEL

from dsv3_jax import configs
from dsv3_jax.parallel.mesh import AXES


@pytest.fixture(scope="session")
def small_config():
    """Float32, one dense and one MoE layer, one MTP module, batches of 8 sequences of 8 tokens."""
    tiny = configs.get("tiny")
    return replace(
        tiny,
        model=SMALL_MODEL,
        balance=replace(tiny.balance, sequence_weight=0.01),
        parallel=replace(tiny.parallel, data=1, expert=1),
        precision=replace(tiny.precision, compute="float32", moments="float32", remat="none"),
        data=replace(tiny.data, sequence_length=8, sequences_per_step=8),
    )


@pytest.fixture(scope="session")
def small_mesh():
    """`small_mesh(data, expert)` is a mesh over the first data * expert devices."""

    def make(data: int, expert: int) -> Mesh:
        return Mesh(np.array(jax.devices()[: data * expert]).reshape(1, data, expert), AXES)

    return make


@pytest.fixture(scope="session")
def small_batch():
    """`small_batch(seed, A)`: "tokens" [A, 8 / A, 9], the same rows for every A."""

    def make(seed: int, microbatches: int = 1) -> dict[str, np.ndarray]:
        tokens = np.random.default_rng(seed).integers(0, SMALL_MODEL.vocab_size, (8, 9))
        return {"tokens": tokens.astype(np.int32).reshape(microbatches, -1, 9)}

    return make
