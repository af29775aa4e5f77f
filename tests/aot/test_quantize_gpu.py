"""The quantisation kernels lowered for an H200, without the hardware."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

from pallas_kernels.quantize import gpu
from pallas_kernels.quantize.gpu import Config

try:
    from jax.sharding import AbstractDevice
except ImportError:  # jax < 0.11
    AbstractDevice = None

pytestmark = pytest.mark.skipif(
    AbstractDevice is None, reason="jax before 0.11 lowers Triton kernels on a GPU only"
)
SHAPES = [(4096, 7168), (32768, 7168), (1000, 576), (7, 300)]
CONFIGS = [
    *gpu.DEFAULTS.items(),
    ("quantize_tiles", Config(rows=16, columns=512, warps=8)),
    ("quantize_columns", Config(rows=256, columns=32, warps=2)),
    ("retile", Config(rows=128, columns=128, warps=16)),
]


def lowered(function, *operands):
    h200 = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="cuda")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=h200)):
        return jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()


def operands_of(operation, shape, dtype):
    M, K = shape
    array = jax.ShapeDtypeStruct
    if operation == "retile":
        return array(shape, jnp.float8_e4m3fn), array((M, -(-K // 128)), jnp.float32)
    if operation == "swiglu_quantize_tiles":
        return array((M, 2 * K), dtype), array((M, 1), jnp.float32)
    return (array(shape, dtype),)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("operation", "config"), CONFIGS)
def test_kernels_lower_for_the_chip(operation, config, shape, dtype):
    run = partial(getattr(gpu, f"{operation}_hopper"), power_of_two=True, config=config)
    program = lowered(run, *operands_of(operation, shape, dtype))
    assert program.count("__gpu$xla.gpu.triton") == 1
