"""The three FP8 products of a Linear against float64, alone, in variants, and on a mesh."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from readings import assert_close, draw, linear, quantized

from dsv3_jax.parallel.mesh import AXES, BATCH_AXES
from dsv3_jax.precision import fp8
from dsv3_jax.precision.fp8_weight import as_fp8
from dsv3_jax.precision.policy import PUBLISHED, Fp8Recipe
from pallas_kernels import dequantize_tiles

BF16 = 2.0**-8  # half a unit in the last place, relative


def operands(shape, d_in, d_out, dtype=jnp.bfloat16):
    rng = np.random.default_rng()
    x = jnp.asarray(draw(rng, int(np.prod(shape)), d_in), dtype).reshape(*shape, d_in)
    w_IO = jnp.asarray(draw(rng, d_in, d_out), jnp.float32)
    dy = jnp.asarray(draw(rng, int(np.prod(shape)), d_out), jnp.bfloat16).reshape(*shape, d_out)
    return x, w_IO, dy


@partial(jax.jit, static_argnums=(3, 4, 5))
def y_dx_dw(x, w_IO, dy, recipe=PUBLISHED, power_of_two=False, mesh=None):
    """A Linear and its gradients for a cotangent dy."""

    def forward(x, w_IO):
        weight = as_fp8(w_IO, recipe)
        return fp8.fp8_linear(x, weight, recipe, power_of_two=power_of_two, mesh=mesh)

    y, backward = jax.vjp(forward, x, w_IO)
    return y, *backward(dy)


def check(found, expected):
    (y, dx, dw_IO), (y_MO, dx_MI, expected_dw_IO) = found, expected
    assert y.dtype == jnp.bfloat16 and dw_IO.dtype == jnp.float32
    assert_close(y.reshape(y_MO.shape), y_MO, BF16)
    assert_close(dx.reshape(dx_MI.shape), dx_MI, BF16)
    assert_close(dw_IO, expected_dw_IO, 2e-5)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize(
    ("shape", "d_in", "d_out"), [((2, 128), 128, 256), ((3, 67), 288, 96), ((1,), 96, 160)]
)
def test_products_and_gradients_equal_float64(shape, d_in, d_out, power_of_two):
    x, w_IO, dy = operands(shape, d_in, d_out)
    found = y_dx_dw(x, w_IO, dy, PUBLISHED, power_of_two)
    assert found[0].shape == dy.shape and found[1].shape == x.shape
    assert found[1].dtype == jnp.bfloat16
    rows = (x.reshape(-1, d_in), w_IO, dy.reshape(-1, d_out))
    check(found, linear(*rows, power_of_two))


def test_float32_activations_get_float32_gradients_and_nan_is_not_hidden():
    x, w_IO, dy = operands((130,), 200, 72, jnp.float32)
    found = y_dx_dw(x, w_IO, dy)
    assert found[1].dtype == jnp.float32
    check(found, linear(x, w_IO, dy))
    y, dx, dw_IO = y_dx_dw(x.at[3, 150].set(jnp.nan), w_IO, dy.at[5, 1].set(jnp.inf))
    assert jnp.isnan(y[3]).all() and not jnp.isnan(y[jnp.arange(130) != 3]).any()
    assert not jnp.isfinite(dx[5]).any() and not jnp.isfinite(dw_IO[150]).any()


def test_tile_scales_for_gradients_are_what_the_ablation_takes_away():
    x, w_IO, dy = operands((200,), 160, 140)
    dy = dy.at[::9].multiply(1e6)  # outlying tokens (spec §5.7): the others fall below the codes
    blocks = y_dx_dw(x, w_IO, dy, Fp8Recipe(gradient_scales="blocks"))
    check(blocks, linear(x, w_IO, dy, gradient_rows=128))
    fine = y_dx_dw(x, w_IO, dy)
    for ours, theirs in zip((blocks[0], blocks[2]), (fine[0], fine[2]), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    exact_dx = np.asarray(dy, np.float64) @ quantized(w_IO, 128, 128).T
    quiet = np.arange(200) % 9 != 0
    errors = [
        np.abs(np.asarray(dx, np.float64) - exact_dx)[quiet].mean() for _, dx, _ in (blocks, fine)
    ]
    assert errors[0] > 2 * errors[1]


def test_one_scale_a_tensor():
    x, w_IO, dy = operands((150,), 288, 96)
    check(y_dx_dw(x, w_IO, dy, Fp8Recipe(scales="tensor")), linear(x, w_IO, dy, tile=None))


def test_power_of_two_scales_make_the_re_tiling_exact():
    """What spec §5.3 asks them for: nothing is lost between Fprop and Wgrad but tiny values."""
    x = jnp.asarray(np.random.default_rng().normal(size=(256, 128)), jnp.bfloat16)

    def lost(power_of_two):
        q_MK, s_MT = fp8.tiles(x, PUBLISHED, power_of_two)
        q_KM, s_KR = fp8.columns_of_tiles(q_MK, s_MT, PUBLISHED, power_of_two)
        before = dequantize_tiles(q_MK, s_MT, jnp.float32)
        after = dequantize_tiles(q_KM, s_KR, jnp.float32).T
        return np.mean(np.asarray(before != after))

    assert lost(True) < 0.01 < 0.3 < lost(False)


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()[:8]).reshape(1, 2, 4), AXES)


def test_eight_devices_equal_one(mesh):
    x, w_IO, dy = operands((8, 128), 288, 96)
    one = y_dx_dw(x, w_IO, dy)
    rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    split_x, split_dy = jax.device_put((x, dy), rows)
    for spec in (PartitionSpec(), PartitionSpec(BATCH_AXES)):  # the weights of zero1_ep, fsdp_ep
        split_w_IO = jax.device_put(w_IO, NamedSharding(mesh, spec))
        y, dx, dw_IO = y_dx_dw(split_x, split_w_IO, split_dy, PUBLISHED, False, mesh)
        assert y.sharding.is_equivalent_to(rows, 3) and dx.sharding.is_equivalent_to(rows, 3)
        np.testing.assert_array_equal(y, one[0])
        np.testing.assert_array_equal(dx, one[1])
        assert_close(dw_IO, np.asarray(one[2], np.float64), 1e-6)


def test_fewer_rows_than_devices(mesh):
    x, w_IO, dy = operands((3, 1), 288, 96)
    y, dx, _ = y_dx_dw(x, w_IO, dy, PUBLISHED, True, mesh)
    expected = linear(x.reshape(3, -1), w_IO, dy.reshape(3, -1), power_of_two=True)
    assert_close(y[:, 0], expected[0], BF16)
    assert_close(dx[:, 0], expected[1], BF16)
