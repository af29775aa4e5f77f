"""The K-grouped weight gradient: the reference against numpy, the kernel on the chip or lowered."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_weight_gradient import (
    grouped_weight_gradient_hopper,
    grouped_weight_gradient_reference,
)

SIZES = np.array([70, 0, 1, 129, 64, 300], np.int32)  # empty, single, unaligned groups


def _operands(num_rows: int, width_in: int, width_out: int):
    rng = np.random.default_rng(7)
    x_MI = jnp.asarray(rng.normal(size=(num_rows, width_in)), jnp.bfloat16)
    dy_MO = jnp.asarray(rng.normal(size=(num_rows, width_out)), jnp.bfloat16)
    return x_MI, dy_MO


def _by_numpy(x_MI, dy_MO):
    x_MI, dy_MO = np.asarray(x_MI, np.float64), np.asarray(dy_MO, np.float64)
    ends = np.cumsum(SIZES)
    return np.stack(
        [x_MI[e - n : e].T @ dy_MO[e - n : e] for n, e in zip(SIZES, ends, strict=True)]
    )


def test_reference_equals_a_loop_over_groups():
    x_MI, dy_MO = _operands(int(SIZES.sum()) + 9, 16, 24)  # 9 rows belong to no group
    dw_GIO = grouped_weight_gradient_reference(x_MI, dy_MO, jnp.asarray(SIZES))
    np.testing.assert_allclose(dw_GIO, _by_numpy(x_MI, dy_MO), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("width_out", [64, 128, 192, 768])
def test_kernel_lowers_for_cuda(width_out):
    x_MI, dy_MO = _operands(600, 128, width_out)
    jax.jit(grouped_weight_gradient_hopper).trace(x_MI, dy_MO, jnp.asarray(SIZES)).lower(
        lowering_platforms=("cuda",)
    )


def test_kernel_refuses_what_it_cannot_tile():
    x_MI, dy_MO = _operands(600, 96, 128)
    with pytest.raises(NotImplementedError, match="96 x 128"):
        grouped_weight_gradient_hopper(x_MI, dy_MO, jnp.asarray(SIZES))
    with pytest.raises(NotImplementedError, match="float32"):
        grouped_weight_gradient_hopper(x_MI.astype(jnp.float32), dy_MO, jnp.asarray(SIZES))


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a Hopper GPU")
@pytest.mark.parametrize("width_out", [64, 128, 192, 768])
def test_kernel_on_the_chip(width_out):
    x_MI, dy_MO = _operands(int(SIZES.sum()), 256, width_out)
    dw_GIO = np.asarray(jax.jit(grouped_weight_gradient_hopper)(x_MI, dy_MO, jnp.asarray(SIZES)))
    expected = _by_numpy(x_MI, dy_MO)
    assert np.linalg.norm(dw_GIO - expected) <= 1e-5 * np.linalg.norm(expected)
    assert not dw_GIO[1].any()
