"""A prefill in two halves, compiled for H200s that are not there: what runs while tokens travel."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax.config import ParallelConfig
from dsv3_jax.configs.tiny import tiny
from dsv3_jax.model.router import RouterBias
from dsv3_jax.model.runtime import Runtime
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.plan import aot, hlo, overlap
from dsv3_jax.serve import programs
from dsv3_jax.serve.programs import STATE_SPECS, PrefillInputs
from dsv3_jax.serve.requests import EngineOptions

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        not any(map(importlib.util.find_spec, ("jax_cuda13_plugin", "jax_cuda12_plugin"))),
        reason="needs the GPU compiler: pip install 'dsv3-jax[aot]'",
    ),
]
WIDTH, CHUNK, ROWS = 1024, 512, 4
CONFIG = dataclasses.replace(
    tiny().model, width=WIDTH, expert_ffn_width=WIDTH // 2, num_experts=16, mtp_depth=0
)
OPTIONS = EngineOptions(max_rows=64, context_tokens=1024, prefill_chunk=CHUNK, prefill_rows=ROWS)


def lower_prefill(mesh):
    """The engine's program, its layers in arrays of their own."""
    runtime = Runtime(mesh=mesh, compute_dtype=jnp.dtype(jnp.bfloat16))
    make = nnx.eval_shape(lambda: DeepSeekV3(CONFIG, runtime=runtime, rngs=nnx.Rngs(0)))
    graphdef, weights, bias = nnx.split(make, nnx.Param, RouterBias)
    weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), weights)
    model = nnx.eval_shape(lambda: programs.layers_apart(nnx.merge(graphdef, weights, bias)))
    local, weights = programs.split_model(model)

    def placed(x, spec):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    weights = jax.tree.map(placed, weights, programs.weight_specs(weights, mesh))
    state = jax.eval_shape(lambda: programs.new_state(CONFIG, OPTIONS, 128, mesh))
    specs = [jax.tree.map(lambda _, s=s: s, x) for x, s in zip(state, STATE_SPECS, strict=True)]
    state = jax.tree.map(placed, state, programs.State(*specs))
    count = ROWS * mesh.size
    i32, flag = jnp.int32, jnp.bool_
    inputs = PrefillInputs(
        tokens_BT=jax.ShapeDtypeStruct((count, CHUNK + 1), i32),
        position_B=jax.ShapeDtypeStruct((count,), i32),
        count_B=jax.ShapeDtypeStruct((count,), i32),
        last_B=jax.ShapeDtypeStruct((count,), flag),
        limit_B=jax.ShapeDtypeStruct((count,), i32),
        row_B=jax.ShapeDtypeStruct((count,), i32),
        pages_BZ=jax.ShapeDtypeStruct((count, 16), i32),
        logprobs_B=jax.ShapeDtypeStruct((count,), flag),
    )
    inputs = jax.tree.map(lambda x: placed(x, PartitionSpec(("data", "expert"))), inputs)
    return programs.prefill.lower(weights, state, inputs, graphdef=local, mesh=mesh, num_drafts=0)


def test_tokens_of_a_half_travel_beside_matmuls_of_the_other():
    with jax.default_matmul_precision("default"):  # the rest of the suite asks for float32
        mesh = aot.described_mesh("h200:1x1x8", ParallelConfig(expert=8))
        compiled = lower_prefill(mesh).compile(aot.overlap_options(mesh))
    rows = CHUNK * ROWS // 2 * WIDTH * 2  # bytes of a half's tokens
    found = overlap.transfers(hlo.parse(compiled.as_text()))
    moves = [move for move in found if move.num_bytes >= rows]
    assert len(moves) == 4 * CONFIG.num_moe_layers, found
    assert all(move.asynchronous for move in moves)
    # In each layer only the last combine has nothing of the other half left to hide it.
    hidden = [move for move in moves if move.other_chunk_matmuls]
    assert len(hidden) >= 3 * CONFIG.num_moe_layers, moves
