"""The FP8 products lowered for an H200 without the hardware: layouts, shared memory, copies."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

from pallas_kernels import specs
from pallas_kernels.fp8_matmul.gpu import fp8_matmul_hopper
from pallas_kernels.grouped_fp8_matmul import gpu as grouped
from pallas_kernels.hopper_configs import dense

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the Hopper products need jax 0.11"
)
RAGGED = (specs.Dense(M=1000, N=577, K=576), specs.Dense(M=7, N=1, K=3))


def lowers(function, operands):
    h200 = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="cuda")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=h200)):
        lowered = jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",))
    return "mosaic_gpu" in lowered.as_text()


def shapes_of(spec):
    return jax.eval_shape(lambda: spec.operands(0))


@pytest.mark.parametrize("out_dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
    "spec", [*specs.V3, specs.SQUARE, *specs.DECODE[-2:], *RAGGED], ids=lambda spec: spec.name
)
def test_products_of_blocks_lower(spec, out_dtype):
    assert lowers(lambda *x: fp8_matmul_hopper(*x, out_dtype), shapes_of(spec))


@pytest.mark.parametrize("spec", specs.WEIGHT_GRADIENTS[:2], ids=lambda spec: spec.name)
def test_products_of_tiles_lower(spec):
    gradient = jax.ShapeDtypeStruct((spec.M, spec.N), jnp.float32)
    assert lowers(lambda *x: fp8_matmul_hopper(*x, jnp.float32), shapes_of(spec))
    assert lowers(
        lambda *x: fp8_matmul_hopper(*x[:4], jnp.float32, x[4]), (*shapes_of(spec), gradient)
    )


@pytest.mark.parametrize("spec", [*specs.GROUPED[:2], specs.SMALL_GROUPED[0]], ids=lambda s: s.name)
def test_products_of_groups_lower(spec):
    assert lowers(grouped.grouped_fp8_matmul_hopper, shapes_of(spec))


@pytest.mark.parametrize("spec", specs.GROUPED_GRADIENTS[:2], ids=lambda spec: spec.name)
def test_weight_gradients_of_groups_lower(spec):
    add_GIO = jax.ShapeDtypeStruct((len(spec.sizes), spec.I, spec.O), jnp.float32)
    assert lowers(grouped.grouped_fp8_weight_gradient_hopper, (*shapes_of(spec), add_GIO))


@pytest.mark.parametrize("spec", [*specs.MASKED, *specs.SMALL_MASKED], ids=lambda spec: spec.name)
def test_masked_products_lower(spec):
    assert lowers(grouped.masked_fp8_matmul_hopper, shapes_of(spec))


def test_every_tuned_configuration_is_taken():
    for spec in (*specs.V3, specs.SQUARE, *specs.DECODE):
        config = dense(spec.M, spec.N, spec.K, by_block=True, out_dtype=jnp.bfloat16)
        assert config.rows <= 192 and config.columns <= 192, (spec.name, config)
