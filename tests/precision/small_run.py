"""A model small enough to compile in seconds, with ragged widths, and runs of its train step."""

from dataclasses import replace

import jax
import numpy as np
from jax.sharding import Mesh

from dsv3_jax import configs
from dsv3_jax.config import ModelConfig
from dsv3_jax.parallel.mesh import AXES, batch_sharding
from dsv3_jax.train.state import abstract_state
from dsv3_jax.train.step import make_train_step

RATE, SPEED, WEIGHT = np.float32(0.003), np.float32(0.001), np.float32(0.3)
MODEL = ModelConfig(
    vocab_size=64,
    width=160,
    num_layers=2,
    num_dense_layers=1,
    dense_ffn_width=96,
    expert_ffn_width=64,
    num_heads=2,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    q_latent_dim=48,
    kv_latent_dim=32,
    num_experts=4,
    num_shared_experts=1,
    experts_per_token=2,
    init_std=0.08,
)


def make_config(compute="fp8", layout="zero1_ep", remat="none", data=1, expert=1, model=MODEL):
    tiny = configs.get("tiny")
    return replace(
        tiny,
        model=model,
        parallel=replace(tiny.parallel, data=data, expert=expert, layout=layout),
        precision=replace(tiny.precision, compute=compute, remat=remat),
        data=replace(tiny.data, sequence_length=32, sequences_per_step=32),
    )


def make_mesh(data=1, expert=1):
    return Mesh(np.array(jax.devices()[: data * expert]).reshape(1, data, expert), AXES)


def make_batch(sequences, microbatches=1):
    """Tokens that the ones before tell much about, so that there is something to learn."""
    rng = np.random.default_rng()
    walk = np.cumsum(rng.integers(1, 4, (sequences, 33)), axis=1) % MODEL.vocab_size
    return {"tokens": walk.astype(np.int32).reshape(microbatches, -1, 33)}


def run(config, start, batches):
    """State and metrics of each step."""
    mesh = make_mesh(config.parallel.data, config.parallel.expert)
    graphdef, template = abstract_state(config, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, template)
    step = make_train_step(config, graphdef, shardings)
    state, history = jax.device_put(start, shardings), []
    for batch in batches:
        batch = jax.device_put(batch, batch_sharding(mesh, leading=1))
        state, metrics = step(state, batch, RATE, SPEED, WEIGHT)
        assert jax.tree.map(lambda x: x.sharding, state) == shardings
        history.append(jax.device_get((state, metrics)))
    return history
