"""Rows of E4M3 codes and their scales as one message of bytes in plain jax.numpy (spec §5.6).

Letters: M rows and K columns of a matrix, T its tiles of 128 columns, W bytes of a row.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.quantize.reference import BLOCK

_SCALE_BYTES = 4


def pack_rows_reference(q_MK: jax.Array, s_MT: jax.Array) -> jax.Array:
    """Bytes of the codes of a row, then those of its scales.

    Args:
      q_MK: [M, K] float8_e4m3fn.
      s_MT: [M, ceil(K / 128)] float32.

    Returns:
      [M, K + 4 * ceil(K / 128)] uint8. A row of zero bytes stands for zeros.
    """
    codes_MK = lax.bitcast_convert_type(q_MK, jnp.uint8)
    scales_MT4 = lax.bitcast_convert_type(s_MT, jnp.uint8)
    M, T, _ = scales_MT4.shape
    return jnp.concatenate([codes_MK, scales_MT4.reshape(M, T * _SCALE_BYTES)], axis=1)


def row_bytes(K: int) -> int:
    """Length of a row of K codes and their scales."""
    return K + -(-K // BLOCK) * _SCALE_BYTES


def unpack_rows_reference(payload_MW: jax.Array, K: int) -> tuple[jax.Array, jax.Array]:
    """What `pack_rows_reference` packed, K codes a row: q_MK and s_MT."""
    q_MK = lax.bitcast_convert_type(payload_MW[:, :K], jnp.float8_e4m3fn)
    scales_MT4 = payload_MW[:, K:].reshape(len(payload_MW), -(-K // BLOCK), _SCALE_BYTES)
    return q_MK, lax.bitcast_convert_type(scales_MT4, jnp.float32)
