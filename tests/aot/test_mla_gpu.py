"""MLA's attention lowered for an H200 without the hardware: layouts, shared memory, copies."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

from pallas_kernels.mla_attention import mla_attention

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the Hopper kernels need jax 0.11"
)


@pytest.mark.parametrize("num_tokens", [200, 131072])
@pytest.mark.parametrize("with_documents", [False, True])
def test_both_passes_lower(num_tokens, with_documents):
    shapes = [(1, num_tokens, 128, width) for width in (128, 64, 128, 128)]
    shapes.insert(3, (1, num_tokens, 64))
    inputs = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    segments_BT = jax.ShapeDtypeStruct((1, num_tokens), jnp.int32) if with_documents else None

    def gradients(inputs, segments_BT):
        def loss(*inputs):
            o_BTNH = mla_attention(
                *inputs, scale=0.1, segments_BT=segments_BT, implementation="hopper"
            )
            return o_BTNH.astype(jnp.float32).sum()

        return jax.grad(loss, argnums=range(5))(*inputs)

    h200 = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="cuda")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=h200)):
        lowered = jax.jit(gradients).trace(inputs, segments_BT).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("@mosaic_gpu") == 4  # forward, queries, keys, values
