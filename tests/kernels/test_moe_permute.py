"""Rows to the slots of their experts and back: kernels against the definitions, in bits."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.parallel.permute import align, sort_pairs, spread
from pallas_kernels import pack_rows, quantize_tiles
from pallas_kernels.moe_permute import gpu, permute_packed_rows, unpermute_sum

R, K, EXPERTS = 45, 3, 7


def routes(rng, num_rows=R, num_experts=EXPERTS):
    """Aligned slots of random choices, some of which go nowhere."""
    ids_RK = np.stack([rng.permutation(num_experts + 2)[:K] for _ in range(num_rows)])
    ids_RK = jnp.asarray(np.minimum(ids_RK, num_experts), jnp.int32)
    return align(*sort_pairs(ids_RK, num_experts), 8)[0]


def messages(rng, width, num_rows=R):
    x_RD = jnp.asarray(rng.standard_normal((num_rows, width)), jnp.bfloat16)
    return pack_rows(*quantize_tiles(x_RD))


@pytest.mark.parametrize("width", [128, 384, 7168])
def test_permuted_codes_and_scales_are_those_of_the_rows(width):
    rng = np.random.default_rng()
    payload_RW, rows = messages(rng, width), routes(rng)
    wanted = permute_packed_rows(payload_RW, rows.row_M, width, implementation="reference")
    config = gpu.Config(rows=8, columns=64 if width < 1024 else 512)
    found = gpu.permute_packed_rows_hopper(
        payload_RW, rows.row_M, width, config=config, interpret=True
    )
    for a, b in zip(found, wanted, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))
    empty_M = np.asarray(rows.row_M) >= R
    assert empty_M.any()
    assert not np.asarray(found[0], np.float32)[empty_M].any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_sums_of_slots_equal_the_definition(dtype):
    rng = np.random.default_rng()
    rows = routes(rng)
    y_MD = jnp.asarray(rng.standard_normal((rows.row_M.shape[0], 384)), dtype)
    wanted = unpermute_sum(y_MD, rows.slot_XK, implementation="reference")
    for config in (gpu.Config(rows=1, columns=256), gpu.Config(rows=4, columns=128)):
        found = gpu.unpermute_sum_hopper(y_MD, rows.slot_XK, config=config, interpret=True)
        assert found.dtype == dtype
        np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))


def test_a_sum_in_float64_is_met():
    rng = np.random.default_rng()
    rows = routes(rng)
    y_MD = rng.standard_normal((rows.row_M.shape[0], 128))
    padded_MD = np.concatenate([y_MD, np.zeros((1, 128))])
    slot_XK = np.minimum(np.asarray(rows.slot_XK), len(y_MD))
    wanted_XD = padded_MD[slot_XK].sum(1)
    found_XD = unpermute_sum(jnp.asarray(y_MD, jnp.float32), rows.slot_XK)
    np.testing.assert_allclose(found_XD, wanted_XD, rtol=1e-5, atol=1e-5)


def test_operands_that_do_not_fit_are_named():
    rng = np.random.default_rng()
    payload_RW, rows = messages(rng, 128), routes(rng)
    with pytest.raises(ValueError, match=r"uint8\[\*, 264\]"):
        permute_packed_rows(payload_RW, rows.row_M, 256)
    with pytest.raises(NotImplementedError, match="multiple of 128"):
        unpermute_sum(jnp.ones((4, 1)), jnp.zeros((2, 2), jnp.int32), implementation="hopper")


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("width", [1024, 7168])
def test_on_the_chip(width):
    rng = np.random.default_rng()
    rows = routes(rng, 1031, 32)
    payload_RW = messages(rng, width, 1031)
    y_MD = jnp.asarray(rng.standard_normal((rows.row_M.shape[0], width)), jnp.bfloat16)
    for function, operands in (
        (partial(permute_packed_rows, width=width), (payload_RW, rows.row_M)),
        (unpermute_sum, (y_MD, rows.slot_XK)),
    ):
        found, wanted = (
            jax.tree.map(np.asarray, jax.jit(partial(function, implementation=name))(*operands))
            for name in ("hopper", "reference")
        )
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
def test_gradients_on_the_chip():
    """The derivative of `spread`, which the kernel computes, is its transpose."""
    rng = np.random.default_rng()
    rows = routes(rng, 64, 8)
    x_XD = jnp.asarray(rng.standard_normal((64, 256)), jnp.float32)
    dy_MD = jnp.asarray(rng.standard_normal((rows.row_M.shape[0], 256)), jnp.float32)
    y_MD, backward = jax.vjp(lambda x: spread(x, rows), x_XD)
    np.testing.assert_allclose(jnp.vdot(backward(dy_MD)[0], x_XD), jnp.vdot(dy_MD, y_MD), rtol=1e-4)
