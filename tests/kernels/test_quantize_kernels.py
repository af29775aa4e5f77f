"""The Hopper kernels against the definitions, bit for bit: interpreted, and on the chip."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantize_cases import hard_matrix

from pallas_kernels.checking import assert_same
from pallas_kernels.quantize import gpu, reference
from pallas_kernels.quantize.gpu import Config
from pallas_kernels.quantize.reference import SMALLEST_GRADIENT_MAX

on_the_chip = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU"),
]
SHAPES = [(256, 256), (200, 300), (7, 130)]
CHIP_SHAPES = [(4096, 7168), (1000, 1536), (333, 7168), (130, 576), (5, 300), (257, 1111)]
TILES = [Config(rows=32, columns=128, warps=4), Config(rows=16, columns=256, warps=4)]
COLUMNS = [Config(rows=128, columns=32, warps=4), Config(rows=256, columns=128, warps=8)]
CASES = [
    *[("quantize_tiles", config) for config in TILES],
    *[("quantize_columns", config) for config in COLUMNS],
    *[("retile", config) for config in COLUMNS],
]
DEFAULTS = [case for case in gpu.DEFAULTS.items() if case[0] != "swiglu_quantize_tiles"]


def operands_of(operation, shape, dtype):
    x_MK = jnp.asarray(hard_matrix(np.random.default_rng(), shape, dtype))
    return reference.quantize_tiles_reference(x_MK) if operation == "retile" else (x_MK,)


def expected_of(operation, operands, power_of_two, **kwargs):
    """By the definition on the CPU: a GPU's division is not rounded exactly."""
    with jax.default_device(jax.devices("cpu")[0]):
        define = getattr(reference, f"{operation}_reference")
        operands = [np.asarray(x) for x in operands]
        return jax.jit(partial(define, power_of_two=power_of_two, **kwargs))(*operands)


def kernel(operation, config, power_of_two, **kwargs):
    run = getattr(gpu, f"{operation}_hopper")
    return jax.jit(partial(run, power_of_two=power_of_two, config=config, **kwargs))


class TestInterpreted:
    @pytest.fixture(autouse=True)
    def on_the_cpu(self):
        """Where the interpreter divides as the definition does."""
        with jax.default_device(jax.devices("cpu")[0]):
            yield

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize(("operation", "config"), CASES)
    def test_kernels_equal_the_definition(self, operation, config, shape):
        for power_of_two, dtype in [(False, jnp.bfloat16), (True, jnp.float32)]:
            operands = operands_of(operation, shape, dtype)
            actual = kernel(operation, config, power_of_two, interpret=True)(*operands)
            assert_same(actual, expected_of(operation, operands, power_of_two))

    @pytest.mark.parametrize("operation", [name for name, _ in DEFAULTS])
    def test_gradients_are_quantised_however_small(self, operation):
        """Their tiles get scales of their own far below the bound for activations."""
        (x_MK,) = operands_of("quantize_tiles", (200, 140), jnp.float32)
        operands = (x_MK * 2.0**-40,)
        if operation == "retile":
            operands = reference.quantize_tiles_reference(
                *operands, smallest_max=SMALLEST_GRADIENT_MAX
            )
        kwargs = {"smallest_max": SMALLEST_GRADIENT_MAX}
        expected = expected_of(operation, operands, False, **kwargs)
        run = getattr(gpu, f"{operation}_hopper")
        actual = jax.jit(partial(run, interpret=True, **kwargs))(*operands)
        assert_same(actual, expected)

    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("config", TILES)
    def test_swiglu_equals_the_definition(self, config, weighted):
        rng = np.random.default_rng()
        run = kernel("swiglu_quantize_tiles", config, False, interpret=True)
        define = jax.jit(reference.swiglu_quantize_tiles_reference)
        for M, F in SHAPES:
            h_M2F = jnp.asarray(hard_matrix(rng, (M, 2 * F), jnp.bfloat16))
            weight_M1 = jnp.asarray(rng.random((M, 1)), jnp.float32) if weighted else None
            assert_same(run(h_M2F, weight_M1), define(h_M2F, weight_M1))

    def test_under_vmap_each_matrix_is_quantised_alone(self):
        x_EMK = jnp.asarray(np.random.default_rng().normal(size=(3, 200, 140)), jnp.bfloat16)
        actual = jax.vmap(partial(gpu.quantize_columns_hopper, interpret=True))(x_EMK)
        assert_same(actual, jax.vmap(reference.quantize_columns_reference)(x_EMK))


@pytest.mark.parametrize("shape", [(0, 256), (256, 0)])
def test_nothing_launches_nothing(shape):
    M, K = shape
    q_MK, s_MT, q_KM, s_KR = gpu.quantize_tiles_and_columns_hopper(jnp.zeros(shape, jnp.bfloat16))
    assert q_MK.shape == (M, K) and s_MT.shape == (M, -(-K // 128))
    assert q_KM.shape == (K, M) and s_KR.shape == (K, -(-M // 128))
    for run in (gpu.quantize_tiles_hopper, gpu.quantize_columns_hopper):
        assert all(x.size == 0 for x in run(jnp.zeros(shape, jnp.bfloat16)))
    assert all(x.size == 0 for x in gpu.retile_hopper(q_MK, s_MT))
    assert all(x.size == 0 for x in gpu.swiglu_quantize_tiles_hopper(jnp.zeros((M, 2 * K))))


def test_a_matrix_too_large_for_its_offsets_is_refused():
    x_MK = jax.ShapeDtypeStruct((2**17, 2**14), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="131072 x 16384 elements"):
        jax.eval_shape(gpu.quantize_tiles_hopper, x_MK)


class TestOnTheChip:
    pytestmark = on_the_chip

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float16])
    @pytest.mark.parametrize("shape", CHIP_SHAPES)
    @pytest.mark.parametrize(("operation", "config"), DEFAULTS)
    def test_kernels_equal_the_definition(self, operation, config, shape, dtype):
        for power_of_two in (False, True):
            operands = operands_of(operation, shape, dtype)
            actual = kernel(operation, config, power_of_two)(*operands)
            assert_same(actual, expected_of(operation, operands, power_of_two))

    @pytest.mark.parametrize(("operation", "config"), CASES)
    def test_so_do_other_configs(self, operation, config):
        operands = operands_of(operation, (1000, 1536), jnp.bfloat16)
        actual = kernel(operation, config, False)(*operands)
        assert_same(actual, expected_of(operation, operands, False))

    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("shape", CHIP_SHAPES)
    def test_swiglu_is_near_its_float64_reading(self, shape, weighted):
        rng = np.random.default_rng()
        M, F = shape
        h_M2F = jnp.asarray(4 * rng.normal(size=(M, 2 * F)), jnp.bfloat16)
        weight_M1 = rng.random((M, 1), np.float32) if weighted else None
        config = gpu.DEFAULTS["swiglu_quantize_tiles"]
        q_MF, s_MT = kernel("swiglu_quantize_tiles", config, False)(h_M2F, weight_M1)
        gate_MF, up_MF = np.split(np.asarray(h_M2F, np.float64), 2, axis=1)
        expected_MF = gate_MF / (1 + np.exp(-gate_MF)) * up_MF * (weight_M1 if weighted else 1)
        s_MF = np.repeat(np.asarray(s_MT, np.float64), 128, axis=1)[:, :F]
        # Half a step of E4M3 (2^-4, or 2^-10 of the scale) and half a step of bfloat16.
        bound_MF = np.abs(expected_MF) * (2**-4 + 2**-8) + s_MF * 2**-10
        assert (np.abs(np.asarray(q_MF, np.float64) * s_MF - expected_MF) <= bound_MF).all()
        largest_MT = np.maximum.reduceat(np.abs(expected_MF), range(0, F, 128), axis=1)
        np.testing.assert_allclose(s_MT, np.maximum(largest_MT, 1e-4) / 448, rtol=2**-8)

    def test_swiglu_spoils_the_tile_of_what_is_no_number(self):
        h_M2F = jnp.ones((40, 600), jnp.bfloat16).at[3, 200].set(jnp.nan).at[5, 310].set(jnp.inf)
        q_MF, s_MT = jax.jit(gpu.swiglu_quantize_tiles_hopper)(h_M2F)
        expected = expected_of("swiglu_quantize_tiles", (h_M2F,), False)
        assert_same((s_MT,), expected[1:])
        assert np.isnan(s_MT).sum() == 2
        np.testing.assert_array_equal(np.isnan(q_MF), np.isnan(expected[0]))
