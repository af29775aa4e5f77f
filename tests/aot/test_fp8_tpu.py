"""The FP8 kernels compiled for TPU generations with and without FP8 units, without the hardware."""

import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from pallas_kernels import specs
from pallas_kernels.fp8_matmul.tpu import fp8_matmul_tpu
from pallas_kernels.grouped_fp8_matmul import tpu as grouped
from pallas_kernels.quantize import tpu as quantize
from pallas_kernels.tpu_gemm import Config

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install libtpu"
)
PRODUCTS = [
    (fp8_matmul_tpu, specs.V3[0]),
    (fp8_matmul_tpu, specs.DECODE[0]),
    (fp8_matmul_tpu, specs.Dense(M=1000, N=1536, K=576, scales="tiles")),
    (grouped.grouped_fp8_matmul_tpu, specs.GROUPED[0]),
    (grouped.grouped_fp8_weight_gradient_tpu, specs.GROUPED_GRADIENTS[0]),
    (grouped.masked_fp8_matmul_tpu, specs.MASKED[-1]),
]
MATRICES = [specs.QUANTIZE[0], specs.Quantize(M=1000, K=576)]


def assert_compiles(device, function, *operands):
    """To one kernel, with whatever XLA does around it."""
    placed = partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(device))
    operands = [placed(x.shape, x.dtype) for x in operands]
    hlo = jax.jit(function).lower(*operands).compile().as_text()
    assert hlo.count('custom_call_target="tpu_custom_call"') == 1


@pytest.mark.parametrize(("product", "spec"), PRODUCTS, ids=lambda x: getattr(x, "name", ""))
def test_products_compile(device, product, spec):
    operands = jax.eval_shape(lambda: spec.operands(0))
    config = Config(device_kind=device.device_kind)
    assert_compiles(device, partial(product, config=config), *operands)


def test_weight_gradients_compile_where_they_are_added(device):
    config = Config(device_kind=device.device_kind)
    spec, added = specs.WEIGHT_GRADIENTS[-1], specs.GROUPED_GRADIENTS[-1]
    operands = jax.eval_shape(lambda: spec.operands(0))
    add_MN = jax.ShapeDtypeStruct((spec.M, spec.N), jnp.float32)

    def dense(*operands):
        *operands, add_MN = operands
        return fp8_matmul_tpu(*operands, jnp.float32, add_MN, config=config)

    assert_compiles(device, dense, *operands, add_MN)
    operands = jax.eval_shape(lambda: added.operands(0))
    add_GIO = jax.ShapeDtypeStruct((len(added.sizes), added.I, added.O), jnp.float32)
    run = partial(grouped.grouped_fp8_weight_gradient_tpu, config=config)
    assert_compiles(device, run, *operands, add_GIO)


@pytest.mark.parametrize("spec", MATRICES, ids=lambda spec: spec.name)
def test_quantisation_compiles(device, spec):
    x_MK = jax.ShapeDtypeStruct((spec.M, spec.K), jnp.bfloat16)
    w_NK = jax.ShapeDtypeStruct((spec.M, spec.K), jnp.float32)
    weight_M1 = jax.ShapeDtypeStruct((spec.M, 1), jnp.float32)
    gain_K = jax.ShapeDtypeStruct((spec.K,), jnp.float32)
    codes = jax.eval_shape(partial(quantize.quantize_tiles_tpu, interpret=True), x_MK)
    assert_compiles(device, quantize.quantize_tiles_tpu, x_MK)
    assert_compiles(device, partial(quantize.quantize_columns_tpu, power_of_two=True), x_MK)
    assert_compiles(device, quantize.quantize_tiles_and_columns_tpu, x_MK)
    assert_compiles(device, quantize.quantize_blocks_tpu, w_NK)
    assert_compiles(device, partial(quantize.retile_tpu, power_of_two=True), *codes)
    assert_compiles(device, quantize.swiglu_quantize_tiles_tpu, x_MK, weight_M1)
    norm = partial(quantize.rms_norm_quantize_tiles_tpu, epsilon=1e-6)
    assert_compiles(device, norm, x_MK, gain_K)
