"""Codes and scales as one message a row."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from quantize_cases import hard_matrix

from pallas_kernels import dequantize_tiles, pack_rows, quantize_tiles, unpack_rows
from pallas_kernels.checking import assert_same


def quantized(shape):
    x_MK = hard_matrix(np.random.default_rng(), shape, jnp.bfloat16)
    return jax.jit(quantize_tiles)(x_MK)


@pytest.mark.parametrize("shape", [(40, 256), (7, 300), (1, 1), (0, 256)])
def test_unpacking_gives_what_was_packed(shape):
    M, K = shape
    q_MK, s_MT = quantized(shape) if M else quantize_tiles(jnp.zeros(shape))
    payload_MW = jax.jit(pack_rows)(q_MK, s_MT)
    assert payload_MW.shape == (M, K + 4 * s_MT.shape[1]) and payload_MW.dtype == jnp.uint8
    again_MK, again_MT = jax.jit(unpack_rows, static_argnums=1)(payload_MW, K)
    for again, packed in ((again_MK, q_MK), (again_MT, s_MT)):
        assert again.shape == packed.shape and again.dtype == packed.dtype
        np.testing.assert_array_equal(  # bits, also of NaN
            np.asarray(again).view(np.uint8), np.asarray(packed).view(np.uint8)
        )


def test_a_row_is_its_codes_then_its_scales():
    q_MK, s_MT = map(np.asarray, quantized((5, 300)))
    expected = [q.tobytes() + s.tobytes() for q, s in zip(q_MK, s_MT, strict=True)]
    assert [np.asarray(row).tobytes() for row in pack_rows(q_MK, s_MT)] == expected


def test_zero_bytes_are_zeros():
    q_MK, s_MT = unpack_rows(jnp.zeros((3, 300 + 4 * 3), jnp.uint8), 300)
    np.testing.assert_array_equal(dequantize_tiles(q_MK, s_MT), np.zeros((3, 300)))


def test_rows_travel_between_devices():
    mesh = Mesh(np.array(jax.devices()[:4]), "expert")
    q_MK, s_MT = quantized((64, 384))

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
    def exchange(q_MK, s_MT):
        payload_MW = pack_rows(q_MK, s_MT)
        received_MW = jax.lax.all_to_all(payload_MW, "expert", 0, 0, tiled=True)
        return unpack_rows(received_MW, q_MK.shape[1])

    def moved(x):  # block i of device j is block j of device i afterwards
        return np.asarray(x).reshape(4, 4, 4, -1).swapaxes(0, 1).reshape(x.shape)

    assert_same(exchange(q_MK, s_MT), (moved(q_MK), moved(s_MT)))
