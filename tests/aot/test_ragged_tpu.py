"""The ragged back end compiled for a TPU slice, without the hardware."""

import dataclasses
import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh

from dsv3_jax.configs.tiny import tiny
from dsv3_jax.model.moe import MoE
from dsv3_jax.model.router import RouterBias
from dsv3_jax.model.runtime import Runtime
from dsv3_jax.parallel.mesh import AXES, batch_sharding
from dsv3_jax.parallel.rules import weight_sharding

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install libtpu"
)
CONFIG = dataclasses.replace(tiny().model, width=256, expert_ffn_width=128, num_experts=16)


@pytest.fixture(scope="module")
def mesh():
    # The first keeps libtpu from asking the network what it runs on, the second lets several
    # processes (test workers) load it.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    slice_of_4 = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1")
    return Mesh(np.array(slice_of_4.devices).reshape(1, 1, 4), AXES)


def lowered(mesh, *, gradient):
    runtime = Runtime(mesh=mesh, compute_dtype=jnp.dtype(jnp.bfloat16), dispatch="ragged")
    layer = nnx.eval_shape(lambda: MoE(CONFIG, runtime=runtime, rngs=nnx.Rngs(0)))
    graphdef, params, bias = nnx.split(layer, nnx.Param, RouterBias)

    def loss(params, bias, u_BTD):
        y_BTD, stats = nnx.merge(graphdef, params, bias)(u_BTD)
        return jnp.sum(y_BTD.astype(jnp.float32) ** 2) + stats.sequence_loss

    def placed(variable):
        axes = variable.get_metadata().get("axes", (None,))
        sharding = weight_sharding(mesh, variable.shape, axes, "zero1_ep")
        return variable.replace(
            jax.ShapeDtypeStruct(variable.shape, variable.dtype, sharding=sharding)
        )

    is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
    params, bias = (jax.tree.map(placed, s, is_leaf=is_variable) for s in (params, bias))
    u_BTD = jax.ShapeDtypeStruct(
        (8, 128, CONFIG.width), jnp.bfloat16, sharding=batch_sharding(mesh)
    )
    function = jax.grad(loss, argnums=(0, 2)) if gradient else loss
    return jax.jit(function).lower(params, bias, u_BTD)


@pytest.mark.parametrize(("gradient", "moves"), [(False, 3), (True, 6)])
def test_layer_compiles_with_ragged_moves(mesh, gradient, moves):
    """Rows and choices there, rows back; in the gradient the same three the other way."""
    program = lowered(mesh, gradient=gradient)
    assert program.as_text().count("ragged_all_to_all") == moves
    hlo = program.compile().as_text()
    assert "ragged-all-to-all" in hlo
