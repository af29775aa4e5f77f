"""A model small enough to compile in seconds, and batches for it."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from dsv3_jax import configs
from dsv3_jax.config import ModelConfig
from dsv3_jax.parallel.mesh import AXES

SMALL_MODEL = ModelConfig(
    vocab_size=64,
    width=16,
    num_layers=2,
    num_dense_layers=1,
    dense_ffn_width=32,
    expert_ffn_width=16,
    num_heads=2,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    q_latent_dim=8,
    kv_latent_dim=8,
    num_experts=8,
    num_shared_experts=1,
    experts_per_token=2,
    num_groups=4,
    num_groups_kept=2,
    init_std=0.3,
)


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
