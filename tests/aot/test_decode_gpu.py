"""The step of decoding, compiled for an H200 that is not there: our kernel, on the pages."""

import dataclasses
import importlib.util
import re

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
from dsv3_jax.plan import aot
from dsv3_jax.serve import programs
from dsv3_jax.serve.requests import EngineOptions

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        not any(map(importlib.util.find_spec, ("jax_cuda13_plugin", "jax_cuda12_plugin"))),
        reason="needs the GPU compiler: pip install 'dsv3-jax[aot]'",
    ),
]
ROWS, PAGES = 32, 600
CONFIG = dataclasses.replace(
    tiny().model, num_layers=3, kv_latent_dim=512, qk_rope_head_dim=64, mtp_depth=1
)


def compiled_step(cache_dtype: str) -> jax.stages.Compiled:
    """With one draft, layers in arrays of their own."""
    mesh = aot.described_mesh("h200:1x1x1", ParallelConfig())
    runtime = Runtime(mesh=mesh, compute_dtype=jnp.dtype(jnp.bfloat16))
    model = nnx.eval_shape(lambda: DeepSeekV3(CONFIG, runtime=runtime, rngs=nnx.Rngs(0)))
    graphdef, weights, bias = nnx.split(model, nnx.Param, RouterBias)
    weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), weights)
    model = nnx.eval_shape(lambda: programs.layers_apart(nnx.merge(graphdef, weights, bias)))
    options = EngineOptions(
        max_rows=ROWS, context_tokens=1024, num_draft_tokens=1, cache_dtype=cache_dtype
    )
    graphdef, weights = programs.split_model(model)
    state = jax.eval_shape(lambda: programs.new_state(CONFIG, options, PAGES, mesh))
    row = jax.ShapeDtypeStruct((ROWS,), jnp.int32)
    tokens, pages = (jax.ShapeDtypeStruct((ROWS, count), jnp.int32) for count in (2, 16))
    inputs = programs.DecodeInputs(
        tokens, row, row, pages, jax.ShapeDtypeStruct((ROWS,), jnp.bool_)
    )
    whole = NamedSharding(mesh, PartitionSpec())
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), (weights, state, inputs)
    )
    lowered = programs.decode.lower(*arguments, graphdef=graphdef, mesh=mesh, num_drafts=1)
    return lowered.compile()


@pytest.mark.parametrize("cache_dtype", ["bfloat16", "fp8"])
def test_the_kernel_reads_pages_where_they_are(cache_dtype):
    step = compiled_step(cache_dtype)
    calls = re.findall(r"custom-call\(.*mla_decode", step.as_text())
    assert len(calls) == CONFIG.num_layers + 1  # a module's of the draft
    layer_bytes = PAGES * 64 * (1152 if cache_dtype == "bfloat16" else 656)
    assert step.memory_analysis().temp_size_in_bytes < layer_bytes
