"""The TPU products, interpreted, against their float64 readings."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import checking, specs
from pallas_kernels.fp8_matmul.tpu import fp8_matmul_tpu
from pallas_kernels.grouped_fp8_matmul.tpu import (
    grouped_fp8_matmul_tpu,
    grouped_fp8_weight_gradient_tpu,
    masked_fp8_matmul_tpu,
)
from pallas_kernels.tpu_gemm import Config

WIDENED = Config(rows=64, columns=128, depth=256, device_kind="TPU v5")
NATIVE = Config(rows=64, columns=128, depth=256, device_kind="TPU7x")


def seed():
    return int(np.random.default_rng().integers(2**31))


def interpreted(function, config=WIDENED, **settings):
    return jax.jit(partial(function, config=config, interpret=True, **settings))


def normal(shape):
    return jnp.asarray(np.random.default_rng().normal(size=shape), jnp.float32)


@pytest.mark.parametrize("spec", specs.SMALL, ids=lambda spec: spec.name)
def test_dense_product(spec):
    operands = spec.operands(seed())
    expected = checking.product(*operands)
    config = NATIVE if spec.scales == "tiles" else WIDENED
    y_MN = interpreted(fp8_matmul_tpu, config, out_dtype=jnp.float32)(*operands)
    assert checking.relative_error(y_MN, expected) <= 1e-6


def test_dense_product_rounds_its_sum_once():
    operands = specs.Dense(M=70, N=130, K=300).operands(seed())
    y_MN = interpreted(fp8_matmul_tpu)(*operands)
    assert y_MN.dtype == jnp.bfloat16
    assert checking.relative_error(y_MN, checking.product(*operands)) <= 2.0**-8


def test_dense_product_adds_to_a_gradient():
    operands = specs.Dense(M=70, N=130, K=300, scales="tiles").operands(seed())
    add_MN = normal((70, 130))
    y_MN = interpreted(fp8_matmul_tpu, out_dtype=jnp.float32)(*operands, add_MN=add_MN)
    expected = checking.product(*operands) + np.asarray(add_MN)
    assert checking.relative_error(y_MN, expected) <= 1e-6


def test_scales_beyond_one_register_of_lanes():
    operands = specs.Dense(M=3, N=5, K=130 * 128).operands(seed())
    config = Config(rows=32, columns=128, depth=1024, device_kind="TPU v5")
    y_MN = interpreted(fp8_matmul_tpu, config, out_dtype=jnp.float32)(*operands)
    assert checking.relative_error(y_MN, checking.product(*operands)) <= 1e-6


@pytest.mark.parametrize("config", [WIDENED, NATIVE])
def test_nan_spoils_its_row_alone(config):
    q_MK, *others = specs.Dense(M=70, N=130, K=300).operands(seed())
    clean_MN = interpreted(fp8_matmul_tpu, config)(q_MK, *others)
    y_MN = interpreted(fp8_matmul_tpu, config)(q_MK.at[7, 299].set(jnp.nan), *others)
    assert np.isnan(y_MN[7]).all()
    np.testing.assert_array_equal(np.delete(y_MN, 7, 0), np.delete(clean_MN, 7, 0))


def test_native_products_where_the_chip_has_them():
    assert NATIVE.code_dtype == jnp.float8_e4m3fn
    assert WIDENED.code_dtype == Config(device_kind="TPU v6 lite").code_dtype == jnp.bfloat16


def test_float16_is_left_to_others():
    operands = specs.Dense(M=70, N=130, K=300).operands(0)
    with pytest.raises(NotImplementedError, match="the result is float16"):
        fp8_matmul_tpu(*operands, jnp.float16)


GROUPED = next(spec for spec in specs.SMALL_GROUPED if spec.name == "ragged")  # 273 rows
SIZES = [GROUPED.sizes, (0, 0, 0, 0, 0), (0, 0, 273, 0, 0), (64, 64, 128, 0, 0), (1, 1, 1, 1, 200)]


@pytest.fixture(scope="module")
def grouped():
    return interpreted(grouped_fp8_matmul_tpu, out_dtype=jnp.float32)


@pytest.mark.parametrize("sizes", SIZES)
def test_grouped_product(grouped, sizes):
    """Groups that share tiles, are empty, or leave rows over: one program for all."""
    *operands, _ = GROUPED.operands(seed())
    y_MN = grouped(*operands, jnp.int32(sizes))
    expected = checking.grouped_product(*operands, np.array(sizes))
    assert checking.relative_error(y_MN, expected) <= 1e-6
    assert not np.asarray(y_MN)[sum(sizes) :].any()


def test_grouped_product_keeps_groups_apart(grouped):
    *operands, sizes_G = GROUPED.operands(seed())
    clean_MN = np.asarray(grouped(*operands, sizes_G))
    operands[3] = operands[3].at[3].set(jnp.nan)  # weights of the 129 rows from 71 on
    y_MN = np.asarray(grouped(*operands, sizes_G))
    assert np.isnan(y_MN[71:200]).all()
    np.testing.assert_array_equal(np.delete(y_MN, np.s_[71:200], 0)[:70], clean_MN[:70])
    np.testing.assert_array_equal(y_MN[200:], clean_MN[200:])


@pytest.mark.parametrize("spec", specs.SMALL_GROUPED[1:], ids=lambda spec: spec.name)
def test_grouped_product_in_bfloat16(spec):
    operands = spec.operands(seed())
    y_MN = interpreted(grouped_fp8_matmul_tpu)(*operands)
    assert y_MN.dtype == jnp.bfloat16
    assert checking.relative_error(y_MN, checking.grouped_product(*operands)) <= 2.0**-8


GRADIENT = specs.GroupedGradient(name="", sizes=(128, 0, 384, 256, 0), I=72, O=130, spare=50)


@pytest.mark.parametrize("added", [False, True])
def test_weight_gradient(added):
    *operands, _ = GRADIENT.operands(seed())
    run = interpreted(grouped_fp8_weight_gradient_tpu)
    for sizes in [GRADIENT.sizes, (0, 0, 0, 0, 0), (0, 0, 0, 0, 768), (0, 128, 128, 128, 0)]:
        add_GIO = normal((5, 72, 130)) if added else None
        dw_GIO = run(*operands, jnp.int32(sizes), add_GIO)
        expected = checking.grouped_weight_gradient(*operands, np.array(sizes))
        if added:
            expected = expected + np.asarray(add_GIO)
        assert checking.relative_error(dw_GIO, expected) <= 1e-6


def test_weight_gradient_ignores_what_no_group_owns():
    q_IM, s_IR, q_OM, s_OR, sizes_G = GRADIENT.operands(seed())
    run = interpreted(grouped_fp8_weight_gradient_tpu)
    spoilt = run(q_IM.at[:, 768:].set(jnp.nan), s_IR, q_OM, s_OR.at[:, 6:].set(jnp.nan), sizes_G)
    np.testing.assert_array_equal(spoilt, run(q_IM, s_IR, q_OM, s_OR, sizes_G))


def test_masked_product():
    spec = specs.Masked(name="", M=100, num_rows=(100, 0, 7, 64, 65), N=136, K=200)
    *operands, num_rows_G = spec.operands(seed())
    run = interpreted(masked_fp8_matmul_tpu, out_dtype=jnp.float32)
    for num_rows in [spec.num_rows, (0, 0, 0, 0, 0), (100, 100, 100, 100, 100)]:
        y_GMN = run(*operands, jnp.int32(num_rows))
        expected = checking.masked_product(*operands, np.array(num_rows))
        assert checking.relative_error(y_GMN, expected) <= 1e-6
        real_GM = np.arange(100) < np.array(num_rows)[:, None]
        assert not np.asarray(y_GMN)[~real_GM].any()


def test_nothing_launches_nothing():
    e4m3, f32 = jnp.float8_e4m3fn, jnp.float32
    rows = jnp.zeros((0, 256), e4m3), jnp.zeros((0, 2), f32)
    weights = jnp.zeros((3, 130, 256), e4m3), jnp.zeros((3, 2, 2), f32)
    none_G = jnp.zeros(3, jnp.int32)
    assert fp8_matmul_tpu(*rows, weights[0][0], weights[1][0]).shape == (0, 130)
    assert grouped_fp8_matmul_tpu(*rows, *weights, none_G).shape == (0, 130)
    buffer = jnp.zeros((3, 0, 256), e4m3), jnp.zeros((3, 0, 2), f32)
    assert masked_fp8_matmul_tpu(*buffer, *weights, none_G).shape == (3, 0, 130)
    columns = jnp.zeros((256, 0), e4m3), jnp.zeros((256, 0), f32)
    dw_GIO = grouped_fp8_weight_gradient_tpu(*columns, *columns, none_G)
    assert dw_GIO.shape == (3, 256, 256) and not dw_GIO.any()
