"""FP8 products of rows sorted by group against float64, a group after another."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    checking,
    grouped_fp8_matmul,
    grouped_fp8_weight_gradient,
    masked_fp8_matmul,
    quantize_columns,
    specs,
)
from pallas_kernels.checking import relative_error

IMPLEMENTATIONS = ("xla", "reference")


def draw(spec):
    return spec.operands(np.random.default_rng().integers(99))


@partial(jax.jit, static_argnums=1)
def product(operands, implementation):
    """float32, and rounded."""
    return [
        grouped_fp8_matmul(*operands, dtype, implementation)
        for dtype in (jnp.float32, jnp.bfloat16)
    ]


@partial(jax.jit, static_argnums=2)
def gradient(operands, add_GIO, implementation):
    """Alone, and added."""
    return [grouped_fp8_weight_gradient(*operands, add, implementation) for add in (None, add_GIO)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("spec", specs.SMALL_GROUPED, ids=lambda spec: spec.name)
def test_rows_meet_the_weight_of_their_group(spec, implementation):
    operands = draw(spec)
    y_MN, rounded_MN = product(operands, implementation)
    assert relative_error(y_MN, checking.grouped_product(*operands)) <= 1e-6
    assert rounded_MN.dtype == jnp.bfloat16 and relative_error(rounded_MN, y_MN) <= 2.0**-8
    assert not np.asarray(y_MN)[sum(spec.sizes) :].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("spec", specs.SMALL_GROUPED_GRADIENTS, ids=lambda spec: spec.name)
def test_weight_gradients_sum_the_rows_of_their_group(spec, implementation):
    operands = draw(spec)
    add_GIO = jax.random.normal(jax.random.key(0), (len(spec.sizes), spec.I, spec.O))
    dw_GIO, added_GIO = gradient(operands, add_GIO, implementation)
    expected_GIO = checking.grouped_weight_gradient(*operands)
    assert relative_error(dw_GIO, expected_GIO) <= 1e-6
    assert relative_error(added_GIO, np.asarray(add_GIO) + expected_GIO) <= 1e-6
    for size, dw_IO in zip(spec.sizes, dw_GIO, strict=True):
        assert size or not dw_IO.any()


@pytest.mark.parametrize("spec", specs.SMALL_MASKED, ids=lambda spec: spec.name)
def test_masked_rows_are_zeros(spec):
    operands = draw(spec)
    y_GMN = jax.jit(partial(masked_fp8_matmul, out_dtype=jnp.float32))(*operands)
    assert relative_error(y_GMN, checking.masked_product(*operands)) <= 1e-6
    for y_MN, n in zip(np.asarray(y_GMN), spec.num_rows, strict=True):
        assert not y_MN[n:].any() and y_MN[:n].any() == (n > 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sizes_that_only_the_program_knows_are_cut_off_at_the_rows(implementation):
    spec = specs.SMALL_GROUPED[0]
    *operands, sizes_G = draw(spec)
    M = len(operands[0])
    for bad, read_as in (
        ([70, 0, 1, 2**30, 64], [70, 0, 1, M - 71, 0]),
        ([M + 1, 5, 5, 5, 5], [M, 0, 0, 0, 0]),
        ([70, -3, 1, 129, 64], [70, 0, 1, 129, 64]),
    ):
        y_MN, _ = product((*operands, jnp.int32(bad)), implementation)
        assert relative_error(y_MN, checking.grouped_product(*operands, np.array(read_as))) <= 1e-6
    spec = specs.SMALL_GROUPED_GRADIENTS[0]
    *operands, sizes_G = draw(spec)
    add_GIO = jnp.zeros((3, spec.I, spec.O))
    for bad, read_as in (
        ([128, 2**30, 256], [128, 256, 0]),
        ([200, -5, 256], [128, 0, 256]),
        ([10**6, 0, 128], [384, 0, 0]),
    ):
        dw_GIO, _ = gradient((*operands, jnp.int32(bad)), add_GIO, implementation)
        expected_GIO = checking.grouped_weight_gradient(*operands, np.array(read_as))
        assert relative_error(dw_GIO, expected_GIO) <= 1e-6


def test_masked_counts_past_the_room_are_the_whole_room():
    spec = specs.SMALL_MASKED[0]
    *operands, _ = draw(spec)
    y_GMN = jax.jit(masked_fp8_matmul)(*operands, jnp.int32([25, -1, 7]))
    np.testing.assert_array_equal(y_GMN, masked_fp8_matmul(*operands, jnp.int32([24, 0, 7])))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_is_no_number_stays_in_its_group(implementation):
    spec = specs.SMALL_GROUPED[0]
    q_MK, s_MT, *weights = draw(spec)
    y_MN, _ = product((q_MK, s_MT.at[20, 1].set(jnp.nan), *weights), implementation)
    assert np.isnan(y_MN[20]).all() and np.isfinite(np.delete(y_MN, 20, 0)).all()

    x_MI, dy_MO = np.random.default_rng().normal(size=(2, 434, 72)).astype(np.float32)
    x_MI[200, 3], dy_MO[430] = np.inf, np.nan  # the second group; rows of none
    operands = *quantize_columns(x_MI), *quantize_columns(dy_MO)
    sizes_G = jnp.int32([128, 0, 256])
    dw_GIO, _ = gradient((*operands, sizes_G), jnp.zeros((3, 72, 72)), implementation)
    assert np.isnan(dw_GIO[2, 3]).all() and np.isnan(dw_GIO).sum() == 72


def test_large_spec_sizes_are_those_promised():
    for spec in specs.GROUPED + specs.GROUPED_GRADIENTS:
        assert sum(spec.sizes) == 32 * 1024 and len(spec.sizes) == 32
    assert all(n % 128 == 0 for spec in specs.GROUPED_GRADIENTS for n in spec.sizes)
    assert all(0 in spec.sizes for spec in specs.GROUPED if "uneven" in spec.name)
    assert all(max(spec.num_rows) <= spec.M for spec in specs.MASKED)
