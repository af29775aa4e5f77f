"""Block quantisation against numpy and ml_dtypes, bit for bit, compiled and not."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import checking, dequantize_blocks, quantize_blocks

E4M3 = ml_dtypes.float8_e4m3fn
SHAPES = [(1, 1), (128, 128), (256, 384), (100, 300), (129, 127), (576, 257)]


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu():
    """Where checkpoints are converted; a GPU's division is not rounded exactly."""
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def by_numpy(w_NK, power_of_two=False):
    return checking.quantize(w_NK, 128, 128, power_of_two)


def assert_same_bits(actual, expected):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    np.testing.assert_array_equal(actual.view(np.uint8), expected.view(np.uint8))


def special_values(rng, shape):
    """Blocks that go wrong first: zeros, float32 subnormals, powers of two, a huge value."""
    N, K = shape
    w_NK = rng.normal(size=shape).astype(np.float32)
    w_NK[:128, :128] = 0
    w_NK[:128, 128:256] = 1e-40
    w_NK[128:256, :128] = 2.0 ** rng.integers(-20, 9, w_NK[128:256, :128].shape)
    w_NK[128:256, 128:256] *= np.float32(1e34)
    w_NK[256:384, :128] = 448 * rng.choice([-1, 1], w_NK[256:384, :128].shape)
    w_NK[256:384, 128:256] = np.float32(2e-5) * w_NK[256:384, 128:256]
    return w_NK


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float16])
def test_codes_and_scales_equal_numpy(dtype, power_of_two, compiled):
    rng = np.random.default_rng()
    quantize = partial(quantize_blocks, power_of_two=power_of_two)
    quantize = jax.jit(quantize) if compiled else quantize
    inputs = [rng.normal(size=shape) * 10.0 ** rng.integers(-3, 3) for shape in SHAPES]
    if dtype != jnp.float16:
        inputs.append(special_values(rng, (400, 300)))
    for w_NK in inputs:
        w_NK = jnp.asarray(w_NK, dtype)
        q_NK, s_BT = quantize(w_NK)
        expected_q_NK, expected_s_BT = by_numpy(w_NK, power_of_two)
        assert_same_bits(s_BT, expected_s_BT)
        assert_same_bits(q_NK, expected_q_NK)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("out_dtype", [jnp.bfloat16, jnp.float32, jnp.float16])
def test_every_code_dequantises_as_numpy(out_dtype, compiled):
    rng = np.random.default_rng()
    codes = np.array([c for c in range(256) if c & 0x7F != 0x7F], np.uint8)  # all but the NaNs
    dequantize = partial(dequantize_blocks, out_dtype=out_dtype)
    dequantize = jax.jit(dequantize) if compiled else dequantize
    for N, K in SHAPES:
        q_NK = rng.choice(codes, (N, K)).view(E4M3)
        s_BT = rng.uniform(1e-5, 1e-2, (-(-N // 128), -(-K // 128))).astype(np.float32)
        expected_NK = q_NK.astype(np.float32)
        expected_NK *= np.repeat(np.repeat(s_BT, 128, 0), 128, 1)[:N, :K]
        actual_NK = dequantize(jnp.asarray(q_NK), jnp.asarray(s_BT))
        assert_same_bits(actual_NK, expected_NK.astype(out_dtype))


def test_power_of_two_scales_never_clip():
    w_NK = np.random.default_rng().normal(size=(256, 256)).astype(np.float32)
    w_NK[0, 0] = 448 * 2.0**-3  # its scale is a power of two already
    q_NK, s_BT = quantize_blocks(jnp.asarray(w_NK), power_of_two=True)
    fraction_BT, _ = np.frexp(np.asarray(s_BT))
    np.testing.assert_array_equal(fraction_BT, 0.5)
    assert s_BT[0, 0] == 2.0**-3 and np.asarray(q_NK, np.float32)[0, 0] == 448
    max_BT = np.abs(w_NK).reshape(2, 128, 2, 128).max((1, 3))
    assert (max_BT / s_BT <= 448).all() and (max_BT / s_BT > 224).all()


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_spoils_its_block_alone(bad, power_of_two):
    w_NK = np.random.default_rng().normal(size=(200, 300)).astype(np.float32)
    w_NK[150, 140] = bad
    q_NK, s_BT = jax.jit(quantize_blocks, static_argnums=1)(w_NK, power_of_two)
    assert np.isnan(s_BT).sum() == 1 and np.isnan(s_BT[1, 1])
    is_nan_NK = np.isnan(np.asarray(q_NK, np.float32))
    assert is_nan_NK[128:, 128:256].all() and is_nan_NK.sum() == 72 * 128


def test_under_vmap_each_matrix_is_quantised_alone():
    w_ENK = jnp.asarray(np.random.default_rng().normal(size=(3, 200, 140)), jnp.bfloat16)
    q_ENK, s_EBT = jax.jit(jax.vmap(quantize_blocks))(w_ENK)
    y_ENK = jax.jit(jax.vmap(dequantize_blocks))(q_ENK, s_EBT)
    for e, w_NK in enumerate(w_ENK):
        q_NK, s_BT = by_numpy(w_NK)
        assert_same_bits(q_ENK[e], q_NK)
        assert_same_bits(s_EBT[e], s_BT)
        assert_same_bits(y_ENK[e], dequantize_blocks(jnp.asarray(q_NK), jnp.asarray(s_BT)))
