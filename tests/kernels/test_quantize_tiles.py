"""The definitions of tile quantisation against numpy and ml_dtypes, over random shapes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from quantize_cases import hard_matrix

from dsv3_jax.model.layers import RMSNorm
from dsv3_jax.model.moe import gated_silu
from pallas_kernels import (
    checking,
    dequantize_tiles,
    quantize_blocks,
    quantize_blocks_both,
    quantize_columns,
    quantize_tiles,
    quantize_tiles_and_columns,
    retile,
    rms_norm_quantize_tiles,
    swiglu_quantize_tiles,
)
from pallas_kernels.checking import assert_same

DTYPES = (jnp.bfloat16, jnp.float32, jnp.float16)
EMPTY = [(0, 256), (256, 0)]


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu():
    """A GPU's division is not rounded exactly."""
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def tiles_by_numpy(x_MK, power_of_two=False):
    return checking.quantize(x_MK, 1, 128, power_of_two)


def random_matrices(count, finite=False):
    rng = np.random.default_rng()
    for i in range(count):
        shape = (rng.integers(1, 301), rng.integers(1, 401))
        yield hard_matrix(rng, shape, DTYPES[i % 3], finite)


@pytest.mark.parametrize("power_of_two", [False, True])
def test_tiles_equal_numpy(power_of_two):
    for x_MK in random_matrices(40):
        q_MK, s_MT = jax.jit(quantize_tiles, static_argnums=1)(x_MK, power_of_two)
        assert_same((q_MK, s_MT), tiles_by_numpy(x_MK, power_of_two))


@pytest.mark.parametrize("power_of_two", [False, True])
def test_columns_equal_numpy_over_the_transpose(power_of_two):
    for x_MK in random_matrices(40):
        actual = jax.jit(quantize_columns, static_argnums=1)(x_MK, power_of_two)
        assert_same(actual, tiles_by_numpy(x_MK.T, power_of_two))


@pytest.mark.parametrize("power_of_two", [False, True])
def test_retile_equals_numpy_over_the_dequantised(power_of_two):
    for x_MK in random_matrices(20):
        q_MK, s_MT = tiles_by_numpy(x_MK, power_of_two)
        x_MK = q_MK.astype(np.float32) * np.repeat(s_MT, 128, axis=1)[:, : x_MK.shape[1]]
        actual = jax.jit(retile, static_argnums=2)(q_MK, s_MT, power_of_two)
        assert_same(actual, tiles_by_numpy(x_MK.T, power_of_two))


def test_power_of_two_tiles_are_retiled_without_error():
    """Why the scales of some activations are powers of two (spec §5.3)."""

    def before_and_after(x_MK):
        q_MK, s_MT = quantize_tiles(x_MK, power_of_two=True)
        q_KM, s_KR = retile(q_MK, s_MT, power_of_two=True)
        before_MK = dequantize_tiles(q_MK, s_MT, jnp.float32)
        return before_MK.T, dequantize_tiles(q_KM, s_KR, jnp.float32), s_KR

    rng = np.random.default_rng()
    for M, K in [(130, 200), (256, 128), (50, 300)]:
        x_MK = rng.normal(size=(M, K)) * 10.0 ** rng.integers(-1, 2, (M, 1))
        before_KM, after_KM, s_KR = map(np.asarray, jax.jit(before_and_after)(jnp.float32(x_MK)))
        # What is far below the largest of its new tile is a subnormal code, or none.
        near_KM = np.abs(before_KM) >= np.repeat(s_KR, 128, axis=1)[:, :M] * 2.0**-6
        assert near_KM.mean() > 0.5
        np.testing.assert_array_equal(after_KM[near_KM], before_KM[near_KM])


@pytest.mark.parametrize("power_of_two", [False, True])
def test_both_layouts_at_once_equal_numpy(power_of_two):
    for x_MK in random_matrices(10):
        actual = jax.jit(quantize_tiles_and_columns, static_argnums=1)(x_MK, power_of_two)
        expected = tiles_by_numpy(x_MK, power_of_two) + tiles_by_numpy(x_MK.T, power_of_two)
        assert_same(actual, expected)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_swiglu_equals_the_model_then_numpy(power_of_two, weighted):
    rng = np.random.default_rng()
    for h_M2F in random_matrices(4, finite=True):
        h_M2F = h_M2F[:, : h_M2F.shape[1] // 2 * 2]
        weight_M1 = rng.random((len(h_M2F), 1), np.float32) if weighted else None
        product_MF = jax.jit(gated_silu)(h_M2F, weight_M1)
        fused = jax.jit(partial(swiglu_quantize_tiles, power_of_two=power_of_two))
        assert_same(fused(h_M2F, weight_M1), tiles_by_numpy(product_MF, power_of_two))


def test_swiglu_is_near_its_float64_reading():
    rng = np.random.default_rng()
    h_M2F = jnp.asarray(rng.normal(size=(60, 400)), jnp.bfloat16)
    weight_M1 = rng.random((60, 1), np.float32)
    q_MF, s_MT = swiglu_quantize_tiles(h_M2F, weight_M1)
    gate_MF, up_MF = np.split(np.asarray(h_M2F, np.float64), 2, axis=1)
    expected_MF = gate_MF / (1 + np.exp(-gate_MF)) * up_MF * weight_M1
    actual_MF = np.asarray(dequantize_tiles(q_MF, s_MT, jnp.float32))
    # Half a step of E4M3 (2^-4, or 2^-10 of the scale) and half a step of bfloat16.
    bound_MF = np.abs(expected_MF) * (2**-4 + 2**-8) + np.repeat(s_MT, 128, 1)[:, :200] * 2**-10
    assert (np.abs(actual_MF - expected_MF) <= bound_MF).all()


@pytest.mark.parametrize("power_of_two", [False, True])
def test_rms_norm_equals_the_layer_then_numpy(power_of_two):
    rng = np.random.default_rng()
    for x_MD in random_matrices(4, finite=True):
        layer = RMSNorm(x_MD.shape[1], epsilon=1e-6)
        layer.gain = nnx.Param(jnp.asarray(rng.random(x_MD.shape[1]), jnp.float32))
        fused = jax.jit(partial(rms_norm_quantize_tiles, epsilon=1e-6, power_of_two=power_of_two))
        expected = tiles_by_numpy(nnx.jit(layer)(jnp.asarray(x_MD)), power_of_two)
        assert_same(fused(x_MD, layer.gain[...]), expected)


def test_weights_are_coded_for_both_products():
    w_LEIO = jnp.asarray(np.random.default_rng().normal(size=(2, 3, 200, 140)), jnp.float32)
    q_LEIO, q_LEOI, s_LEBT = jax.jit(quantize_blocks_both)(w_LEIO)
    for layer, expert in np.ndindex(2, 3):
        q_IO, s_BT = quantize_blocks(w_LEIO[layer, expert])
        assert_same((q_LEIO[layer, expert], s_LEBT[layer, expert]), (q_IO, s_BT))
        assert_same((q_LEOI[layer, expert],), (q_IO.T,))


@pytest.mark.parametrize("shape", EMPTY)
def test_nothing_gives_nothing(shape):
    M, K = shape
    x_MK = jnp.zeros(shape, jnp.bfloat16)
    q_MK, s_MT, q_KM, s_KR = quantize_tiles_and_columns(x_MK)
    assert q_MK.shape == (M, K) and s_MT.shape == (M, -(-K // 128))
    assert q_KM.shape == (K, M) and s_KR.shape == (K, -(-M // 128))
    assert [x.shape for x in retile(q_MK, s_MT)] == [q_KM.shape, s_KR.shape]
    assert [x.shape for x in swiglu_quantize_tiles(jnp.zeros((M, 2 * K)))] == [(M, K), s_MT.shape]


def test_an_unknown_implementation_is_named_with_those_allowed():
    with pytest.raises(ValueError, match="no implementation 'cuda'; allowed: .*reference"):
        quantize_tiles(jnp.zeros((1, 128)), implementation="cuda")
