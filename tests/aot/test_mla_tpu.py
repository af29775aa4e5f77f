"""MLA's attention and decoding at V3's shapes compiled for TPUs, without the hardware."""

import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from dsv3_jax.config import ParallelConfig
from dsv3_jax.model import attention
from dsv3_jax.parallel.mesh import BATCH_AXES, make_mesh
from pallas_kernels.mla_attention import mla_attention
from pallas_kernels.mla_decode import mla_decode

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install libtpu"
)
KERNEL = 'custom_call_target="tpu_custom_call"'


def inputs_of_attention(batch, num_tokens, num_heads, sharding):
    """The five inputs, and documents."""
    array = partial(jax.ShapeDtypeStruct, sharding=sharding)
    shapes = [(batch, num_tokens, num_heads, width) for width in (128, 64, 128, 128)]
    shapes.insert(3, (batch, num_tokens, 64))
    inputs = [array(shape, jnp.bfloat16) for shape in shapes]
    return inputs, array((batch, num_tokens), jnp.int32)


def compiled_gradients(attend, inputs, segments_BT):
    def loss(inputs, segments_BT):
        return attend(*inputs, scale=0.1, segments_BT=segments_BT).astype(jnp.float32).sum()

    return jax.jit(jax.grad(loss)).lower(inputs, segments_BT).compile()


@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "with_documents"),
    [(4096, 128, False), (4096, 128, True), (200, 5, True), (131072, 16, True)],
)
def test_attention_compiles(device, num_tokens, num_heads, with_documents):
    sharding = SingleDeviceSharding(device)
    inputs, segments_BT = inputs_of_attention(1, num_tokens, num_heads, sharding)
    segments_BT = segments_BT if with_documents else None
    attend = partial(mla_attention, implementation="tpu")
    hlo = compiled_gradients(attend, inputs, segments_BT).as_text()
    assert hlo.count(KERNEL) == 3  # forward, queries, keys and values


def test_attention_of_the_model_compiles_on_a_mesh(devices):
    """Each device its own sequences: nothing is sent."""
    mesh = make_mesh(ParallelConfig(data=2, expert=2), devices[:4])
    sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    inputs, segments_BT = inputs_of_attention(4, 4096, 128, sharding)

    def attend(*inputs, scale, segments_BT):
        kernels = attention.on_mesh(attention.IMPLEMENTATIONS["tpu"], mesh, 4)
        return kernels.attend(*inputs, segments_BT, scale)

    hlo = compiled_gradients(attend, inputs, segments_BT).as_text()
    assert hlo.count(KERNEL) == 3
    assert not [name for name in ("all-gather", "all-to-all", "permute") if f"{name}(" in hlo]


@pytest.mark.parametrize(
    ("rows", "num_tokens", "num_heads", "num_new", "page_tokens"),
    [
        (128, 4096, 128, 1, 64),
        (128, 4096, 128, 2, 64),
        (128, 4096, 16, 1, 64),
        (1, 4096, 16, 2, 1024),
        (16, 131072, 128, 2, 16),  # as many pages as a table may have
    ],
)
def test_decoding_compiles(device, rows, num_tokens, num_heads, num_new, page_tokens):
    """Without a copy of the cache, where the caller keeps it in rows."""
    sharding = SingleDeviceSharding(device)
    in_rows = Format(Layout((0, 1, 2, 3)), sharding)
    array, pages = jax.ShapeDtypeStruct, num_tokens // page_tokens
    queries = [
        array((rows, num_new, num_heads, width), jnp.bfloat16, sharding=sharding)
        for width in (512, 64)
    ]
    shape = (2, 1 + rows * pages, page_tokens)
    cache = [array((*shape, width), jnp.bfloat16, sharding=in_rows) for width in (512, 64)]
    integers = [
        array(shape, jnp.int32, sharding=sharding) for shape in ((), (rows, pages), (rows, num_new))
    ]

    def decode(*operands):
        return mla_decode(*operands, 0.1, implementation="tpu")

    compiled = jax.jit(decode).lower(*queries, *cache, *integers).compile()
    assert compiled.as_text().count(KERNEL) == 1
    cache_bytes = sum(x.size * x.dtype.itemsize for x in cache)
    assert compiled.memory_analysis().temp_size_in_bytes < cache_bytes / 20
