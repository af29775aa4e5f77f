"""The TPU quantisation kernels, interpreted, against the definitions bit for bit."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from quantize_cases import hard_matrix

from pallas_kernels.checking import assert_same
from pallas_kernels.quantize import reference, tpu
from pallas_kernels.quantize.tpu import Config

SHAPES = [(256, 256), (200, 300), (7, 130)]
CONFIG = Config(rows=128, columns=256)
OPERATIONS = [
    "quantize_tiles",
    "quantize_columns",
    "quantize_tiles_and_columns",
    "quantize_blocks",
    "retile",
]


@pytest.fixture(autouse=True)
def on_the_cpu():
    """Where the interpreter divides as the definition does."""
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def assert_equals_the_definition(operation, operands, config=CONFIG, **settings):
    run = getattr(tpu, f"{operation}_tpu")
    actual = jax.jit(partial(run, config=config, interpret=True, **settings))(*operands)
    define = getattr(reference, f"{operation}_reference")
    assert_same(actual, jax.jit(partial(define, **settings))(*operands))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_kernels_equal_the_definition(operation, shape):
    rng = np.random.default_rng()
    for power_of_two, dtype in [(False, jnp.bfloat16), (True, jnp.float32)]:
        operands = (jnp.asarray(hard_matrix(rng, shape, dtype)),)
        if operation == "retile":
            operands = reference.quantize_tiles_reference(*operands)
        assert_equals_the_definition(operation, operands, power_of_two=power_of_two)


@pytest.mark.parametrize("operation", ["quantize_tiles", "quantize_blocks", "retile"])
def test_scales_beyond_one_register_of_lanes(operation):
    operands = (jnp.asarray(hard_matrix(np.random.default_rng(), (3, 130 * 128), jnp.bfloat16)),)
    if operation == "retile":
        operands = reference.quantize_tiles_reference(*operands)
    assert_equals_the_definition(operation, operands, Config(rows=128, columns=1024))


@pytest.mark.parametrize(("F", "weighted"), [(512, True), (512, False), (300, True)])
def test_swiglu_equals_the_definition(F, weighted):
    rng = np.random.default_rng()
    operands = [jnp.asarray(hard_matrix(rng, (150, 2 * F), jnp.bfloat16))]
    if weighted:
        operands.append(jnp.asarray(rng.random((150, 1)), jnp.float32))
    assert_equals_the_definition("swiglu_quantize_tiles", operands)


def test_rms_norm_equals_the_definition():
    rng = np.random.default_rng()
    x_MD = jnp.asarray(hard_matrix(rng, (150, 300), jnp.bfloat16))
    gain_D = jnp.asarray(rng.random(300), jnp.float32)
    assert_equals_the_definition("rms_norm_quantize_tiles", (x_MD, gain_D), epsilon=1e-6)


def test_under_vmap_each_matrix_is_quantised_alone():
    x_EMK = jnp.asarray(np.random.default_rng().normal(size=(3, 200, 140)), jnp.bfloat16)
    run = partial(tpu.quantize_tiles_and_columns_tpu, config=CONFIG, interpret=True)
    define = reference.quantize_tiles_and_columns_reference
    assert_same(jax.jit(jax.vmap(run))(x_EMK), jax.jit(jax.vmap(define))(x_EMK))


@pytest.mark.parametrize("shape", [(0, 256), (256, 0)])
def test_nothing_launches_nothing(shape):
    M, K = shape
    q_MK, s_MT, q_KM, s_KR = tpu.quantize_tiles_and_columns_tpu(jnp.zeros(shape, jnp.bfloat16))
    assert q_MK.shape == (M, K) and s_MT.shape == (M, -(-K // 128))
    assert q_KM.shape == (K, M) and s_KR.shape == (K, -(-M // 128))
    assert tpu.quantize_blocks_tpu(jnp.zeros(shape))[1].size == 0
    assert all(x.size == 0 for x in tpu.retile_tpu(q_MK, s_MT))
    assert all(x.size == 0 for x in tpu.swiglu_quantize_tiles_tpu(jnp.zeros((M, 2 * K))))


def test_float16_is_left_to_others():
    with pytest.raises(NotImplementedError, match="the matrix is float16"):
        tpu.quantize_columns_tpu(jnp.ones((128, 128), jnp.float16))


def test_division_is_rounded_once_where_the_chips_own_is_not():
    """The chip's is x * (1 / y): here with quotients next to where codes part."""
    rng = np.random.default_rng(0)  # one quotient in some millions may still be rounded twice
    codes = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    ties = (codes[1:] + codes[:-1]) / 2
    y = np.exp(rng.uniform(-15, 15, (100, 1))).astype(np.float32)
    x = y * ties
    x = np.concatenate([x, np.nextafter(x, np.float32(0)), np.nextafter(x, np.float32(np.inf))])
    y = np.broadcast_to(np.tile(y, (3, 1)), x.shape)
    expected = x / y
    np.testing.assert_array_equal(jax.jit(tpu.quotient)(x, y, 1 / y), expected)
    e4m3 = ml_dtypes.float8_e4m3fn
    assert ((x * (1 / y)).astype(e4m3) != expected.astype(e4m3)).any()
