"""Gradients in FP8 do not depend on the size of the loss: a mean over millions of tokens is safe.

Their tiles are far smaller than the bound that activations' maxima get (spec §5.1).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_run import MODEL

from dsv3_jax.model import rope
from dsv3_jax.model.block import Block
from dsv3_jax.model.router import RouterBias
from dsv3_jax.model.runtime import Runtime
from dsv3_jax.precision.policy import PUBLISHED

SIZE = 2.0**-36  # a power of two, so that nothing but the size changes


@pytest.mark.parametrize("moe", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_smaller_gradient_is_the_same_but_smaller(moe):
    runtime = Runtime(compute_dtype=jnp.dtype(jnp.bfloat16), fp8=PUBLISHED)
    block = Block(MODEL, moe=moe, runtime=runtime, rngs=nnx.Rngs(0))
    graphdef, params, bias = nnx.split(block, nnx.Param, RouterBias)
    x_BTD, dy_BTD = (
        jnp.asarray(np.random.default_rng().normal(size=(2, 32, MODEL.width)), jnp.bfloat16)
        for _ in range(2)
    )
    cos_sin = rope.cos_sin(rope.positions(32, None), MODEL)

    @jax.jit
    def gradients(params, x_BTD, dy_BTD):
        def forward(params, x_BTD):
            return nnx.merge(graphdef, params, bias)(x_BTD, cos_sin=cos_sin)[0]

        return jax.vjp(forward, params, x_BTD)[1](dy_BTD)

    of_ones = gradients(params, x_BTD, dy_BTD)
    of_small = gradients(params, x_BTD, dy_BTD * SIZE)
    for one, small in zip(jax.tree.leaves(of_ones), jax.tree.leaves(of_small), strict=True):
        assert np.any(np.asarray(one, np.float32)) or not np.any(np.asarray(small, np.float32))
        np.testing.assert_array_equal(np.asarray(small, np.float32) / SIZE, one.astype(jnp.float32))
