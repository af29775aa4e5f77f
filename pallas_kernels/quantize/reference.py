"""Block quantisation to E4M3 in plain jax.numpy: the definition (spec §5.1).

Letters: N rows and K columns of a matrix, B and T its 128x128 blocks along them; the last block of
a row or column may be ragged.
"""

import jax
import jax.numpy as jnp

BLOCK = 128
E4M3_MAX = 448.0
_SMALLEST_MAX = 1e-4  # of a block: keeps the scale of a block of zeros away from 0 (spec §5.1)


def quantize_blocks_reference(
    w_NK: jax.Array, power_of_two: bool = False
) -> tuple[jax.Array, jax.Array]:
    """E4M3 codes and the scales that multiply them: w is about q * s.

    s = max|w| / 448 over a block, the maximum taken as at least 1e-4; q = w / s in float32, clipped
    to +-448 and rounded once. A NaN or infinity makes its block's scale one too.

    Args:
      w_NK: [N, K] of any float dtype.
      power_of_two: round each scale up to a power of two.

    Returns:
      q_NK: [N, K] float8_e4m3fn.
      s_BT: [ceil(N / 128), ceil(K / 128)] float32.
    """
    w_BRTC = _in_blocks(w_NK)
    max_BT = _largest(w_BRTC).astype(jnp.float32)
    # Not `maximum`, for the reason given at `_largest`.
    s_BT = _divide(jnp.where(max_BT < _SMALLEST_MAX, _SMALLEST_MAX, max_BT), E4M3_MAX)
    if power_of_two:
        s_BT = _next_power_of_two(s_BT)
    # Fused with the cast, the maximum over a block is taken 4 times slower on a CPU.
    w_BRTC, s_BT = jax.lax.optimization_barrier((w_BRTC, s_BT))
    x_BRTC = _divide(w_BRTC.astype(jnp.float32), s_BT[:, None, :, None])
    # XLA casts values above 464 to NaN, so they are clipped first.
    q_BRTC = jnp.clip(x_BRTC, -E4M3_MAX, E4M3_MAX).astype(jnp.float8_e4m3fn)
    return _from_blocks(q_BRTC, w_NK.shape), s_BT


def dequantize_blocks_reference(
    q_NK: jax.Array, s_BT: jax.Array, out_dtype: jnp.dtype = jnp.bfloat16
) -> jax.Array:
    """q * s in float32, rounded once to `out_dtype`.

    Args:
      q_NK: [N, K] float8_e4m3fn.
      s_BT: [ceil(N / 128), ceil(K / 128)] float32.

    Returns:
      [N, K] of `out_dtype`.
    """
    x_BRTC = _in_blocks(q_NK).astype(jnp.float32) * s_BT[:, None, :, None]
    return _from_blocks(x_BRTC.astype(out_dtype), q_NK.shape)


def _in_blocks(x_NK: jax.Array) -> jax.Array:
    """[B, 128, T, 128], ragged edges filled with zeros."""
    N, K = x_NK.shape
    x_NK = jnp.pad(x_NK, ((0, -N % BLOCK), (0, -K % BLOCK)))
    return x_NK.reshape(-(-N // BLOCK), BLOCK, -(-K // BLOCK), BLOCK)


def _from_blocks(x_BRTC: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    B, _, T, _ = x_BRTC.shape
    return x_BRTC.reshape(B * BLOCK, T * BLOCK)[: shape[0], : shape[1]]


def _largest(w_BRTC: jax.Array) -> jax.Array:
    """max|w| of every block, NaN where a block holds one.

    Compared as integers, absolute values have the same order and NaN comes last; as floats, XLA's
    maximum on a CPU may pass over a NaN, and takes 3 times longer.
    """
    unsigned = jnp.dtype(f"uint{8 * w_BRTC.dtype.itemsize}")
    bits_BRTC = jax.lax.bitcast_convert_type(jnp.abs(w_BRTC), unsigned)
    bits_BT = jnp.max(jnp.max(bits_BRTC, axis=1), axis=-1)
    return jax.lax.bitcast_convert_type(bits_BT, w_BRTC.dtype)


def _divide(x: jax.Array, y: jax.Array | float) -> jax.Array:
    """x / y, rounded once.

    XLA turns a division by a constant or by a broadcast value into a product with its rounded
    reciprocal, which moves about one code in 2000; it must not see that y does not vary with x.
    """
    return x / (y + 0 * x)


def _next_power_of_two(x: jax.Array) -> jax.Array:
    """Rounds positive normal float32 up: any mantissa bit carries into the exponent."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jax.lax.bitcast_convert_type((bits + 0x7FFFFF) & 0x7F800000, jnp.float32)
