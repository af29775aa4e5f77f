"""The FP8 product against float64 sums of scaled partial products, from quantisation on."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantize_cases import hard_matrix

from pallas_kernels import checking, fp8_matmul, quantize_blocks, quantize_tiles, specs
from pallas_kernels.checking import assert_same, relative_error
from pallas_kernels.fp8_matmul.reference import fp8_matmul_unpromoted_reference

DTYPES = (jnp.bfloat16, jnp.float32, jnp.float16)


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu():
    """A GPU's division is not rounded exactly."""
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def assert_product(y_MN, operands):
    """Within 1e-6 of float64: all together, and each number by the magnitudes it sums."""
    expected_MN = checking.product(*operands)
    if min(expected_MN.shape) >= 8:  # the terms of a few sums may cancel
        assert relative_error(y_MN, expected_MN) <= 1e-6
    error_MN = np.abs(np.asarray(y_MN, np.float64) - expected_MN)
    assert (error_MN <= 1e-6 * checking.magnitude(*operands)).all()


def one_product_over_all_of_k(q_MK, s_MT, q_NK, s_BT):
    """The wrong formula (spec §5.2): the scales of a row, and of a block, averaged."""
    y_MN = np.asarray(q_MK, np.float64) @ np.asarray(q_NK, np.float64).T
    s_N = np.repeat(np.asarray(s_BT).mean(1), 128)[: len(q_NK)]
    return y_MN * np.asarray(s_MT).mean(1)[:, None] * s_N


@partial(jax.jit, static_argnums=2)
def quantize_and_multiply(x_MK, w_NK, power_of_two):
    operands = *quantize_tiles(x_MK, power_of_two), *quantize_blocks(w_NK, power_of_two)
    return operands, fp8_matmul(*operands, jnp.float32, "reference")


def cut(operands, y_MN, M, N, K):
    """The part that belongs to a problem in the corner of a larger one."""
    q_MK, s_MT, q_NK, s_BT = map(np.asarray, operands)
    T, B = -(-K // 128), -(-N // 128)
    return (q_MK[:M, :K], s_MT[:M, :T], q_NK[:N, :K], s_BT[:B, :T]), np.asarray(y_MN)[:M, :N]


@pytest.mark.parametrize("part", range(4))
def test_codes_are_those_of_ml_dtypes_and_products_those_of_float64(part):
    """50 shapes a part. Each compiled program gets a problem of its own size, then four smaller
    ones in its corner, padded with zeros as callers pad."""
    rng = np.random.default_rng()
    wrong = []
    for program in range(10):
        dtype, power_of_two = DTYPES[program % 3], bool(part % 2)
        largest = [rng.integers(1, 260), rng.integers(1, 260), rng.integers(129, 400)]
        shapes = [largest, *(rng.integers(1, np.add(largest, 1)) for _ in range(4))]
        for M, N, K in shapes:
            x_MK, w_NK = (hard_matrix(rng, (n, K), dtype, finite=True) for n in (M, N))
            padded = (
                np.pad(a, ((0, n - len(a)), (0, largest[2] - K)))
                for a, n in ((x_MK, largest[0]), (w_NK, largest[1]))
            )
            operands, y_MN = quantize_and_multiply(*padded, power_of_two)
            operands, y_MN = cut(operands, y_MN, M, N, K)
            expected = (
                *checking.quantize(x_MK, 1, power_of_two=power_of_two),
                *checking.quantize(w_NK, 128, power_of_two=power_of_two),
            )
            assert_same(operands, expected)
            assert_product(y_MN, expected)
            if K > 128:
                wrong.append(relative_error(one_product_over_all_of_k(*expected), y_MN))
    # What the bound is for.
    assert np.median(wrong) > 1e-2 and np.mean(np.array(wrong) > 1e-6) > 0.9


def test_one_product_over_all_of_k_fails():
    operands = specs.Dense(M=40, N=200, K=384).operands(seed=np.random.default_rng().integers(99))
    assert_product(jax.jit(fp8_matmul, static_argnums=4)(*operands, jnp.float32), operands)
    with pytest.raises(AssertionError):
        assert_product(one_product_over_all_of_k(*operands), operands)


@jax.jit
def multiply_in_every_way(operands, add_MN):
    y_MN = fp8_matmul(*operands, jnp.float32)
    return y_MN, fp8_matmul(*operands), fp8_matmul(*operands, jnp.float32, add_MN=add_MN)


@pytest.mark.parametrize("spec", specs.SMALL, ids=lambda spec: spec.name)
def test_products_by_blocks_and_by_tiles(spec):
    rng = np.random.default_rng()
    operands = spec.operands(rng.integers(99))
    assert operands[3].shape[0] == (spec.N if spec.scales == "tiles" else -(-spec.N // 128))
    add_MN = jnp.asarray(rng.normal(size=(spec.M, spec.N)), jnp.float32)
    y_MN, rounded_MN, added_MN = multiply_in_every_way(operands, add_MN)
    assert_product(y_MN, operands)
    assert rounded_MN.dtype == jnp.bfloat16 and added_MN.dtype == jnp.float32
    assert relative_error(rounded_MN, y_MN) <= 2.0**-8
    assert relative_error(added_MN, np.asarray(add_MN) + np.asarray(y_MN)) <= 1e-6


@pytest.mark.parametrize("shape", [(0, 40, 256), (30, 0, 256), (30, 40, 0)])
def test_nothing_multiplied_is_nothing_or_zeros(shape):
    M, N, K = shape
    _, y_MN = quantize_and_multiply(jnp.ones((M, K)), jnp.ones((N, K)), False)
    np.testing.assert_array_equal(y_MN, np.zeros((M, N)))


def test_what_is_no_number_reaches_its_row_alone():
    rng = np.random.default_rng()
    x_MK, w_NK = rng.normal(size=(20, 300)), rng.normal(size=(150, 300))
    x_MK[3, 200], x_MK[7, 299], w_NK[140, 5] = np.nan, np.inf, -np.inf
    x_MK[9] = 0
    operands, y_MN = quantize_and_multiply(np.float32(x_MK), np.float32(w_NK), False)
    spoiled_MN = np.zeros(y_MN.shape, bool)
    spoiled_MN[[3, 7]] = spoiled_MN[:, 128:] = True  # and the block of the weight
    np.testing.assert_array_equal(np.isnan(y_MN), spoiled_MN)
    assert not y_MN[9, :128].any()
    expected_MN = checking.product(*operands)
    assert relative_error(y_MN[~spoiled_MN], expected_MN[~spoiled_MN]) <= 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_values_are_clipped_and_not_lost(dtype):
    """XLA's cast turns what exceeds 464 into NaN."""
    rng = np.random.default_rng()
    x_MK = rng.normal(size=(64, 256)) * 10.0 ** rng.integers(-3, 3, (64, 1))
    x_MK[::4, 7] = float(jnp.finfo(dtype).max)
    for power_of_two in (False, True):
        q_MK, s_MT = quantize_tiles(x_MK.astype(dtype), power_of_two)
        largest_MT = np.abs(np.float32(q_MK)).reshape(64, 2, 128).max(-1)
        assert np.isfinite(s_MT).all() and np.isfinite(largest_MT).all()
        assert (largest_MT >= (224 if power_of_two else 448)).all() and largest_MT.max() == 448


def test_without_promotion_the_error_grows_with_the_width():
    """Why partial sums leave the tensor cores every 128 (spec §5.2)."""
    unpromoted = jax.jit(partial(fp8_matmul_unpromoted_reference, out_dtype=jnp.float32))
    errors = []
    for K in (256, 4096):
        x_MK, w_NK = np.random.default_rng().normal(size=(2, 64, K)).astype(np.float32)
        operands, y_MN = quantize_and_multiply(x_MK, w_NK, False)
        assert_product(y_MN, operands)
        errors.append(relative_error(unpromoted(*operands), checking.product(*operands)))
    assert 1e-5 < errors[0] < errors[1] / 3 < 1e-2, errors


def test_products_are_accepted_by_the_published_measure():
    """diff < 1e-3 against the product of what was quantised (spec §5.7)."""
    x_MK, w_NK = np.random.default_rng().normal(size=(2, 100, 512)).astype(np.float32)
    _, y_MN = quantize_and_multiply(x_MK, w_NK, False)
    assert 1e-5 < checking.difference(y_MN, np.float64(x_MK) @ np.float64(w_NK).T) < 1e-3
