"""MLA's attention and the rows of cross-entropy lowered for an H200 without the hardware."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

from pallas_kernels.cross_entropy.gpu import cross_entropy_rows_hopper
from pallas_kernels.mla_attention import mla_attention
from pallas_kernels.mla_decode import mla_decode

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

    # Forward, queries, keys, values.
    assert lowered(gradients, inputs, segments_BT).count("@mosaic_gpu") == 4


def lowered(function, *operands):
    h200 = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="cuda")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=h200)):
        return jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("rows", "num_heads", "num_new", "page_tokens", "has_codes"),
    [
        (128, 128, 1, 64, False),
        (128, 16, 2, 16, False),
        (1, 128, 2, 128, False),
        (128, 16, 1, 64, True),
        (1, 128, 2, 32, True),
    ],
)
def test_decoding_lowers(rows, num_heads, num_new, page_tokens, has_codes):
    array, pages = jax.ShapeDtypeStruct, 4096 // page_tokens
    queries = [array((rows, num_new, num_heads, width), jnp.bfloat16) for width in (512, 64)]
    shape = (2, 1 + rows * pages, page_tokens)
    latent = array((*shape, 512), jnp.float8_e4m3fn if has_codes else jnp.bfloat16)
    cache = [latent, array((*shape, 64), jnp.bfloat16)]
    integers = [array(s, jnp.int32) for s in ((), (rows, pages), (rows, num_new))]
    scales = array((*shape[:2], 4, page_tokens), jnp.float32) if has_codes else None

    def decode(scales, *operands):
        options = dict(latent_scale_YZCS=scales, implementation="hopper")
        return mla_decode(*operands, 0.1, **options)

    assert lowered(decode, scales, *queries, *cache, *integers).count("@mosaic_gpu") == 1


@pytest.mark.parametrize("shape", [(1024, 129280), (4096, 32768), (3, 1000)])
def test_rows_of_cross_entropy_lower(shape):
    array = jax.ShapeDtypeStruct
    operands = [array(shape, jnp.float32)] + [array(shape[:1], t) for t in (jnp.int32, jnp.float32)]
    text = lowered(lambda *x: cross_entropy_rows_hopper(*x, jnp.bfloat16), *operands)
    assert "triton" in text
