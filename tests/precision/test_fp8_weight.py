"""FP8 weights: what they hold, under jit, scan and recomputation, and where gradients go."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from readings import assert_close, draw, linear, quantized

from dsv3_jax.errors import UserError
from dsv3_jax.model.layers import Linear
from dsv3_jax.model.runtime import Runtime
from dsv3_jax.precision.block_scaled import BlockScaled
from dsv3_jax.precision.fp8 import fp8_linear
from dsv3_jax.precision.fp8_weight import Fp8Weight, as_fp8, with_masters
from dsv3_jax.precision.policy import PUBLISHED, Fp8Recipe
from pallas_kernels import quantize_blocks


def masters(*shape):
    rng = np.random.default_rng()
    return jnp.asarray(draw(rng, *shape[-2:]) * rng.normal(size=(*shape[:-2], 1, 1)), jnp.float32)


@pytest.mark.parametrize(("recipe", "tile"), [(PUBLISHED, 128), (Fp8Recipe(scales="tensor"), None)])
def test_holds_every_matrix_quantised_alone_both_ways(recipe, tile):
    master = masters(2, 3, 200, 150)
    weight = jax.jit(as_fp8, static_argnums=1)(master, recipe)
    assert weight.shape == master.shape and weight.ndim == 4 and weight.dtype == jnp.float32
    assert weight.codes_IO.dtype == weight.codes_OI.dtype == jnp.float8_e4m3fn
    assert weight.scales_IO.shape == (2, 3, 2, 2)
    np.testing.assert_array_equal(weight.codes_OI, jnp.swapaxes(weight.codes_IO, -1, -2))
    seen = weight.astype(jnp.float32)
    for i in np.ndindex(2, 3):
        expected = quantized(master[i], tile, tile)
        np.testing.assert_allclose(seen[i], expected, rtol=1e-6)
    one = weight[1, 2]
    assert isinstance(one, Fp8Weight) and one.shape == (200, 150)
    np.testing.assert_array_equal(one.astype(jnp.bfloat16), weight.astype(jnp.bfloat16)[1, 2])
    np.testing.assert_array_equal(one.master, master[1, 2])
    assert as_fp8(weight) is weight and weight[...].shape == weight.shape


@pytest.mark.slow
def test_released_codes_are_taken_as_they_are_and_do_not_train():
    w_IO = masters(200, 256)
    codes, scales = quantize_blocks(w_IO)
    scales = scales * 1.5  # not what quantising would give
    for segments in (1, 2):
        weight = as_fp8(BlockScaled(codes, scales, segments))
        np.testing.assert_array_equal(weight.codes_IO, codes)
        np.testing.assert_array_equal(weight.scales_IO, scales)
    x = jnp.ones((4, 200), jnp.bfloat16)
    assert jnp.isfinite(fp8_linear(x, weight, PUBLISHED)).all()
    with pytest.raises(UserError, match="do not train"):
        jax.grad(lambda x: fp8_linear(x, weight, PUBLISHED).sum().astype(jnp.float32))(x)


def test_released_halves_that_no_block_fits_are_quantised_again():
    halves = [quantize_blocks(half) for half in (masters(200, 96), masters(200, 96))]
    codes, scales = (jnp.concatenate(parts, axis=-1) for parts in zip(*halves, strict=True))
    released = BlockScaled(codes, scales, segments=2)
    weight = as_fp8(released)
    assert weight.scales_IO.shape == (2, 2)
    expected = quantized(released.astype(jnp.float32), 128, 128)
    np.testing.assert_allclose(weight.astype(jnp.float32), expected, rtol=1e-6)


@pytest.mark.parametrize("once", [True, False], ids=["quantised before", "quantised in Linear"])
@pytest.mark.parametrize("remat", [False, True])
def test_layers_scanned_and_recomputed_give_the_gradient_of_the_master(remat, once):
    """Two layers x W_0 W_1 whose weights are stacked, against float64 layer by layer."""
    stacked = masters(2, 160, 160) / 16
    rng = np.random.default_rng()
    x_MI = jnp.asarray(rng.normal(size=(140, 160)), jnp.bfloat16)
    dy_MO = jnp.asarray(rng.normal(size=(140, 160)), jnp.bfloat16)
    runtime = Runtime(compute_dtype=jnp.dtype(jnp.bfloat16), fp8=PUBLISHED)
    module = nnx.eval_shape(lambda: Linear(nnx.Rngs(0), 160, 160, (None, None), 1.0, runtime, "wo"))
    graphdef, _ = nnx.split(module)

    def layer(x_MI, kernel):
        y_MO = nnx.merge(graphdef, {"kernel": kernel})(x_MI)
        return y_MO, y_MO

    codes = {"kernel": as_fp8(stacked) if once else stacked}

    @jax.jit
    def gradients(x_MI, params):
        def run(x_MI, params):
            kernel = with_masters(codes, params)["kernel"]
            body = jax.checkpoint(layer, prevent_cse=False) if remat else layer
            y_MO, between = jax.lax.scan(body, x_MI, kernel)
            return y_MO, between[0]

        (y_MO, hidden_MO), backward = jax.vjp(run, x_MI, params)
        return y_MO, hidden_MO, backward((dy_MO, jnp.zeros_like(hidden_MO)))

    y_MO, hidden_MO, (dx_MI, d_params) = gradients(x_MI, {"kernel": stacked})
    expected_y, d_hidden, expected_dw_1 = linear(hidden_MO, stacked[1], dy_MO, power_of_two=True)
    assert_close(y_MO, expected_y, 2.0**-8)
    assert jax.tree.map(jnp.shape, d_params) == {"kernel": stacked.shape}
    assert_close(d_params["kernel"][1], expected_dw_1, 2e-5)
    # The first layer's dY is the second's dX, rounded to bfloat16 by one and not by the other.
    d_hidden = d_hidden.astype(jnp.bfloat16)
    expected_hidden, expected_dx, expected_dw_0 = linear(x_MI, stacked[0], d_hidden, True)
    assert_close(hidden_MO, expected_hidden, 2.0**-8)
    # A code that falls the other way is a step of E4M3 (2**-3) of one of 140 terms.
    assert_close(dx_MI, expected_dx, 0.04)
    assert_close(d_params["kernel"][0], expected_dw_0, 0.04)


@pytest.mark.slow
def test_roles_that_stay_out_of_fp8_multiply_as_before():
    x, runtime = masters(3, 64).astype(jnp.bfloat16), Runtime(compute_dtype=jnp.dtype(jnp.bfloat16))
    outputs = {}
    for role in ("mtp_proj", "wo"):
        for recipe in (None, PUBLISHED):
            with_recipe = Runtime(compute_dtype=runtime.compute_dtype, fp8=recipe)
            module = Linear(nnx.Rngs(0), 64, 48, (None, None), 1.0, with_recipe, role)
            outputs[role, recipe] = np.asarray(module(x))
            assert outputs[role, recipe].dtype == jnp.bfloat16
    np.testing.assert_array_equal(outputs["mtp_proj", None], outputs["mtp_proj", PUBLISHED])
    assert (outputs["wo", None] != outputs["wo", PUBLISHED]).any()
