"""The pipeline's fused pair alone: a loop over layers, one MoE block forward and one backward.

Block, split and order are those of a run (`parallel/pipeline/`); sizes are small, so that it
compiles in seconds.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.configs.tiny import tiny
from dsv3_jax.model import rope
from dsv3_jax.model.block import Block, remat
from dsv3_jax.model.router import RouterBias
from dsv3_jax.model.runtime import Runtime
from dsv3_jax.parallel.pipeline.split import split_layer

LAYERS, SLOTS, LENGTH = 4, 2, 512
ROWS, WIDTH = 8, 1024
RING_BYTES = SLOTS * ROWS * LENGTH * WIDTH * 2  # of the block's kept inputs, in default dims
RANKS = ("pipe", "data", "expert")


def lower_fused_layers(mesh: Mesh, *, rows: int = ROWS):
    """Lowers the loop: `rows` sequences a device, in bfloat16, everything recomputed."""
    config = replace(
        tiny().model,
        width=WIDTH,
        expert_ffn_width=WIDTH // 2,
        num_experts=2 * mesh.shape["expert"],
        num_groups=1,
        num_groups_kept=1,
    )
    runtime = Runtime(shard_of=mesh, compute_dtype=jnp.dtype(jnp.bfloat16), remat="full")
    block = nnx.eval_shape(lambda: Block(config, moe=True, runtime=runtime, rngs=nnx.Rngs(0)))
    graphdef, params, bias = nnx.split(block, nnx.Param, RouterBias)
    bias = jax.tree.map(lambda b: jnp.zeros(b.shape, b.dtype), bias)

    def layer(params, cos_sin, x_BTD):
        def run(x_BTD, params):
            y_BTD, _ = nnx.merge(graphdef, params, bias)(x_BTD, cos_sin=cos_sin)
            return y_BTD, None

        return remat(run, runtime, in_scan=True)(x_BTD, params)

    def body(split, cos_sin, derived, i, carry):
        x_BTD, dy_BTD, ring, sums = carry
        last = LAYERS - 1 - i
        residuals = jax.tree.map(lambda kept: kept[last % SLOTS], ring)
        residuals, ring = jax.lax.optimization_barrier((residuals, ring))
        ahead, behind = (jax.tree.map(lambda w, n=n: w[n], derived) for n in (i, last))
        (y_BTD, _, kept), dx_BTD, gradients = split.forward_and_backward(
            (ahead, cos_sin, x_BTD), (behind, cos_sin, residuals, dy_BTD)
        )
        ring = jax.tree.map(lambda slots, new: slots.at[last % SLOTS].set(new), ring, kept)
        sums = jax.tree.map(lambda total, new: total.at[last].add(new), sums, gradients)
        return y_BTD, dx_BTD, ring, sums

    @partial(jax.jit, donate_argnums=(0, 1, 2, 3))
    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(RANKS), P(RANKS), P(RANKS), P(RANKS), P(RANKS)),
        out_specs=(P(RANKS), P(RANKS), P(RANKS), P(RANKS)),
        check_vma=False,
    )
    def step(x_BTD, dy_BTD, ring, sums, weights):
        cos_sin = rope.cos_sin(rope.positions(LENGTH), config)
        split = split_layer(layer, jax.tree.map(lambda w: w[0], weights), cos_sin, x_BTD)
        assert len(split.residual_shapes) == 1  # the input of the block
        derived = jax.lax.map(split.prepare, weights)
        carry = (x_BTD, dy_BTD, ring, sums)
        x_BTD, dy_BTD, (kept,), sums = jax.lax.fori_loop(
            0, LAYERS, partial(body, split, cos_sin, derived), carry
        )
        return x_BTD, dy_BTD, [kept], sums

    def placed(shape, dtype):
        """Of every device its own."""
        sharding = NamedSharding(mesh, P(RANKS))
        return jax.ShapeDtypeStruct((mesh.size * shape[0], *shape[1:]), dtype, sharding=sharding)

    def stacked(param):
        """float32, of all layers; of experts those of one device."""
        shape = param.shape
        if param.ndim == 3:
            shape = (shape[0] // mesh.shape["expert"], *shape[1:])
        return placed((LAYERS, *shape), jnp.float32)

    x = placed((rows, LENGTH, WIDTH), jnp.bfloat16)
    ring = [placed((SLOTS, rows, LENGTH, WIDTH), jnp.bfloat16)]
    weights = jax.tree.map(stacked, params)
    return step.lower(x, x, ring, weights, weights)
