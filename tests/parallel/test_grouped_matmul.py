"""Grouped matmul: every implementation against a numpy loop over rows, forwards and backwards."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.parallel.grouped_matmul import best_implementation, grouped_matmul

M, I, O = 300, 24, 40
GROUP_SIZES = {
    "uneven": [10, 0, 133, 1, 70],
    "full": [0, 64, 0, 128, 108],
    "one group has all": [0, 0, 300, 0, 0],
    "no rows": [0, 0, 0, 0, 0],
}


def by_numpy(x_MI, w_GIO, sizes_G, dy_MO):
    x_MI, w_GIO, dy_MO = (np.asarray(a, np.float64) for a in (x_MI, w_GIO, dy_MO))
    y_MO, dx_MI, dw_GIO = np.zeros((M, O)), np.zeros((M, I)), np.zeros(w_GIO.shape)
    for row, group in enumerate(np.repeat(np.arange(len(sizes_G)), sizes_G)):
        y_MO[row] = x_MI[row] @ w_GIO[group]
        dx_MI[row] = w_GIO[group] @ dy_MO[row]
        dw_GIO[group] += np.outer(x_MI[row], dy_MO[row])
    return y_MO, dx_MI, dw_GIO


@pytest.fixture(scope="module", params=["ragged", "padded", "loop", "rows"])
def run(request):
    # Excess precision would hide a result that is rounded to bf16 and widened again.
    @partial(jax.jit, compiler_options={"xla_allow_excess_precision": False})
    def value_and_gradients(x_MI, w_GIO, sizes_G, dy_MO):
        def function(x_MI, w_GIO):
            return grouped_matmul(
                x_MI,
                w_GIO,
                sizes_G,
                compute_dtype=x_MI.dtype,
                implementation=request.param,
            )

        y_MO, transpose = jax.vjp(function, x_MI, w_GIO)
        return y_MO, *transpose(dy_MO)

    return value_and_gradients


def operands(dtype, sizes):
    rng = np.random.default_rng(0)
    x_MI, dy_MO = rng.normal(size=(M, I)), rng.normal(size=(M, O))
    # Rows of no group may hold anything: a worst-case receive buffer does.
    x_MI[sum(sizes) :] = np.nan
    w_GIO = rng.normal(size=(len(sizes), I, O)).astype(np.float32)
    return x_MI.astype(dtype), w_GIO, np.array(sizes, np.int32), dy_MO.astype(dtype)


@pytest.mark.parametrize("name", GROUP_SIZES)
def test_product_and_gradients(run, name):
    x_MI, w_GIO, sizes_G, dy_MO = operands(np.float32, GROUP_SIZES[name])
    results = run(x_MI, w_GIO, sizes_G, dy_MO)
    for result, expected in zip(results, by_numpy(x_MI, w_GIO, sizes_G, dy_MO), strict=True):
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-4)
        assert not np.any(np.asarray(result)[expected == 0])  # exactly zero after the last group


def test_bf16_operands_give_float32_weight_gradients(run):
    x_MI, w_GIO, sizes_G, dy_MO = operands(jnp.bfloat16, GROUP_SIZES["uneven"])
    y_MO, dx_MI, dw_GIO = run(x_MI, w_GIO, sizes_G, dy_MO)
    assert (y_MO.dtype, dx_MI.dtype, dw_GIO.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    low_w_GIO = w_GIO.astype(jnp.bfloat16)
    expected_y, expected_dx, expected_dw = by_numpy(x_MI, low_w_GIO, sizes_G, dy_MO)
    # bf16 results carry one rounding; the weight gradient carries none.
    np.testing.assert_allclose(np.float64(y_MO), expected_y, rtol=2**-8, atol=1e-3)
    np.testing.assert_allclose(np.float64(dx_MI), expected_dx, rtol=2**-8, atol=1e-3)
    np.testing.assert_allclose(dw_GIO, expected_dw, rtol=1e-5, atol=1e-4)


def test_choice_of_implementation():
    bf16, f32 = jnp.bfloat16, jnp.float32
    assert best_implementation("tpu", 9, (8, 100, 100), f32) == "ragged"
    assert best_implementation("cpu", 9, (8, 128, 128), bf16) == "loop"
    assert best_implementation("gpu", 9, (8, 1024, 768), bf16) == "mosaic_gpu"
    assert best_implementation("gpu", 9, (8, 1024, 768), f32) == "padded"  # kernels take bf16 only
    assert best_implementation("gpu", 9, (8, 1024, 100), bf16) == "padded"
    assert best_implementation("gpu", 8, (32, 1024, 768), bf16) == "rows"
    assert best_implementation("gpu", 9, (32, 1024, 768), bf16) == "mosaic_gpu"


def test_gpu_kernels_lower_forwards_and_backwards():
    def loss(x_MI, w_GIO, sizes_G):
        y_MO = grouped_matmul(
            x_MI, w_GIO, sizes_G, compute_dtype=jnp.bfloat16, implementation="mosaic_gpu"
        )
        return y_MO.astype(jnp.float32).sum()

    shapes = (
        jax.ShapeDtypeStruct((1000, 256), jnp.bfloat16),
        jax.ShapeDtypeStruct((8, 256, 384), jnp.float32),
        jax.ShapeDtypeStruct((8,), jnp.int32),
    )
    traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(*shapes)
    traced.lower(lowering_platforms=("cuda",))
    dx_MI, dw_GIO = traced.out_info
    assert (dx_MI.shape, dx_MI.dtype) == ((1000, 256), jnp.bfloat16)
    assert (dw_GIO.shape, dw_GIO.dtype) == ((8, 256, 384), jnp.float32)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a Hopper GPU")
@pytest.mark.parametrize("sizes", [[10, 0, 133, 1, 156], [0, 0, 0, 7, 0], [300, 0, 0, 0, 0]])
def test_gpu_kernels_on_the_chip(sizes):
    rng = np.random.default_rng(0)
    x_MI, dy_MO = (jnp.asarray(rng.normal(size=(300, 256)), jnp.bfloat16) for _ in range(2))
    w_GIO = jnp.asarray(rng.normal(size=(5, 256, 256)), jnp.float32)
    sizes_G = jnp.asarray(sizes, jnp.int32)

    def value_and_gradients(implementation):
        def function(x_MI, w_GIO):
            return grouped_matmul(
                x_MI,
                w_GIO,
                sizes_G,
                compute_dtype=jnp.bfloat16,
                implementation=implementation,
            )

        y_MO, transpose = jax.vjp(function, x_MI, w_GIO)
        return y_MO, *transpose(dy_MO)

    kernels, plain = map(jax.jit(value_and_gradients, static_argnums=0), ("mosaic_gpu", "padded"))
    for result, expected in zip(kernels, plain, strict=True):
        result, expected = np.float64(result), np.float64(expected)
        np.testing.assert_allclose(result, expected, rtol=2**-7, atol=2**-7 * abs(expected).max())
