"""Quantisation to E4M3 with float32 scales in plain jax.numpy: the definition (spec §5.1, §5.3).

Letters: M or N rows and K columns of a matrix; R or B and T its tiles of 128 along them, the last
of which may be ragged.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

BLOCK = 128
E4M3_MAX = 448.0
# A block's maximum counts as at least this, which keeps the scale of zeros away from 0 (spec §5.1).
SMALLEST_MAX = 1e-4
# Gradients of a mean over a batch of tokens are smaller than that almost everywhere: theirs.
SMALLEST_GRADIENT_MAX = 2.0**-64


def quantize_tiles_reference(
    x_MK: jax.Array, power_of_two: bool = False, smallest_max: float = SMALLEST_MAX
) -> tuple[jax.Array, jax.Array]:
    """E4M3 codes of activations, a scale a row and 128 columns (1x128): x is about q * s.

    s = max|x| / 448 over a tile, the maximum taken as at least `smallest_max`; q = x / s in
    float32, clipped to +-448 and rounded once. A NaN or infinity makes its tile's scale one too.

    Args:
      x_MK: [M, K] of any float dtype.
      power_of_two: round each scale up to a power of two.
      smallest_max: of a tile; `SMALLEST_GRADIENT_MAX` for gradients.

    Returns:
      q_MK: [M, K] float8_e4m3fn.
      s_MT: [M, ceil(K / 128)] float32.
    """
    return _quantize(x_MK, 1, power_of_two, smallest_max)


def quantize_columns_reference(
    x_MK: jax.Array, power_of_two: bool = False, smallest_max: float = SMALLEST_MAX
) -> tuple[jax.Array, jax.Array]:
    """E4M3 codes with a scale a column and 128 rows (128x1), transposed: operands of Wgrad.

    The rows are what Wgrad reduces over, so they become the contiguous dim.

    Returns:
      q_KM: [K, M] float8_e4m3fn.
      s_KR: [K, ceil(M / 128)] float32.
    """
    return _quantize(x_MK.T, 1, power_of_two, smallest_max)


def retile_reference(
    q_MK: jax.Array,
    s_MT: jax.Array,
    power_of_two: bool = False,
    smallest_max: float = SMALLEST_MAX,
) -> tuple[jax.Array, jax.Array]:
    """1x128 to 128x1 (spec §5.1): dequantised in float32, transposed, quantised again.

    Returns:
      q_KM and s_KR, as `quantize_columns_reference`.
    """
    return quantize_columns_reference(
        dequantize_tiles_reference(q_MK, s_MT, jnp.float32), power_of_two, smallest_max
    )


def quantize_tiles_and_columns_reference(
    x_MK: jax.Array, power_of_two: bool = False, smallest_max: float = SMALLEST_MAX
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Both layouts of one matrix, as the gradient of an output needs them (Dgrad and Wgrad).

    Returns:
      q_MK and s_MT, as `quantize_tiles_reference`; q_KM and s_KR, as `quantize_columns_reference`.
    """
    return (
        *quantize_tiles_reference(x_MK, power_of_two, smallest_max),
        *quantize_columns_reference(x_MK, power_of_two, smallest_max),
    )


def swiglu_quantize_tiles_reference(
    h_M2F: jax.Array, weight_M1: jax.Array | None = None, power_of_two: bool = False
) -> tuple[jax.Array, jax.Array]:
    """`quantize_tiles_reference` of silu(gate) * up [* weight], which is rounded to h's dtype.

    Args:
      h_M2F: [M, 2F], gate columns first.
      weight_M1: [M, 1] float32, of the routed rows.

    Returns:
      q_MF: [M, F] float8_e4m3fn.
      s_MT: [M, ceil(F / 128)] float32.
    """
    product_MF = gated(*jnp.split(h_M2F.astype(jnp.float32), 2, axis=-1), weight_M1)
    return quantize_tiles_reference(product_MF.astype(h_M2F.dtype), power_of_two)


def gated(
    gate: jax.Array,
    up: jax.Array,
    weight: jax.Array | None = None,
    silu: Callable[[jax.Array], jax.Array] = jax.nn.silu,
) -> jax.Array:
    """silu(gate) * up [* weight] (spec §1)."""
    product = silu(gate) * up
    return product if weight is None else product * weight


def rms_norm_quantize_tiles_reference(
    x_MD: jax.Array, gain_D: jax.Array, epsilon: float, power_of_two: bool = False
) -> tuple[jax.Array, jax.Array]:
    """`quantize_tiles_reference` of x / rms(x) * gain, in float32, rounded to x's dtype (spec §1).

    Returns:
      q_MD: [M, D] float8_e4m3fn.
      s_MT: [M, ceil(D / 128)] float32.
    """
    x32_MD = x_MD.astype(jnp.float32)
    inverse_M1 = jax.lax.rsqrt(jnp.mean(x32_MD * x32_MD, axis=-1, keepdims=True) + epsilon)
    return quantize_tiles_reference((x32_MD * inverse_M1 * gain_D).astype(x_MD.dtype), power_of_two)


def quantize_blocks_reference(
    w_NK: jax.Array, power_of_two: bool = False, smallest_max: float = SMALLEST_MAX
) -> tuple[jax.Array, jax.Array]:
    """E4M3 codes of weights, a scale a block of 128x128; otherwise as `quantize_tiles_reference`.

    Returns:
      q_NK: [N, K] float8_e4m3fn.
      s_BT: [ceil(N / 128), ceil(K / 128)] float32.
    """
    return _quantize(w_NK, BLOCK, power_of_two, smallest_max)


def quantize_blocks_both_reference(w_IO: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Codes of weights for both products they are in: Dgrad reduces over O, Fprop over I.

    Args:
      w_IO: [..., I, O] of any float dtype; a matrix for every index of the leading dims.

    Returns:
      q_IO: [..., I, O] float8_e4m3fn.
      q_OI: [..., O, I], the same codes.
      s_BT: [..., ceil(I / 128), ceil(O / 128)] float32.
    """
    quantize = quantize_blocks_reference
    for _ in range(w_IO.ndim - 2):
        quantize = jax.vmap(quantize)
    q_IO, s_BT = quantize(w_IO)
    return q_IO, jnp.swapaxes(q_IO, -1, -2), s_BT


def dequantize_tiles_reference(
    q_MK: jax.Array, s_MT: jax.Array, out_dtype: jnp.dtype = jnp.bfloat16
) -> jax.Array:
    """q * s in float32, rounded once to `out_dtype`; tiles of 1x128."""
    return _dequantize(q_MK, s_MT, 1, out_dtype)


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
    return _dequantize(q_NK, s_BT, BLOCK, out_dtype)


def _quantize(x_NK, rows, power_of_two, smallest_max):
    """Blocks of `rows` x 128."""
    x_BRTC = _in_blocks(x_NK, rows)
    s_BT = scales(_largest(x_BRTC).astype(jnp.float32), power_of_two, smallest_max)
    # Fused with the cast, the maximum over a block is taken 4 times slower on a CPU.
    x_BRTC, s_BT = jax.lax.optimization_barrier((x_BRTC, s_BT))
    x_BRTC = divide(x_BRTC.astype(jnp.float32), s_BT[:, None, :, None])
    # XLA casts values above 464 to NaN, so they are clipped first.
    q_BRTC = jnp.clip(x_BRTC, -E4M3_MAX, E4M3_MAX).astype(jnp.float8_e4m3fn)
    return _from_blocks(q_BRTC, x_NK.shape), s_BT


def divide(x: jax.Array, y: jax.Array | float) -> jax.Array:
    """x / y, rounded once.

    XLA turns a division by a constant or by a broadcast value into a product with its rounded
    reciprocal, which moves about one code in 2000; it must not see that y does not vary with x.
    """
    return x / (y + 0 * x)


def scales(
    max_BT: jax.Array,
    power_of_two: bool,
    smallest_max: float,
    divide: Callable[[jax.Array, float], jax.Array] = divide,
) -> jax.Array:
    """The float32 scales of blocks whose largest magnitudes are `max_BT` (spec §5.1)."""
    # Not `maximum`, for the reason given at `_largest`.
    s_BT = divide(jnp.where(max_BT < smallest_max, smallest_max, max_BT), E4M3_MAX)
    return _next_power_of_two(s_BT) if power_of_two else s_BT


def _dequantize(q_NK, s_BT, rows, out_dtype):
    x_BRTC = _in_blocks(q_NK, rows).astype(jnp.float32) * s_BT[:, None, :, None]
    return _from_blocks(x_BRTC.astype(out_dtype), q_NK.shape)


def _in_blocks(x_NK: jax.Array, rows: int) -> jax.Array:
    """[B, rows, T, 128], ragged edges filled with zeros."""
    N, K = x_NK.shape
    x_NK = jnp.pad(x_NK, ((0, -N % rows), (0, -K % BLOCK)))
    return x_NK.reshape(-(-N // rows), rows, -(-K // BLOCK), BLOCK)


def _from_blocks(x_BRTC: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    B, rows, T, _ = x_BRTC.shape
    return x_BRTC.reshape(B * rows, T * BLOCK)[: shape[0], : shape[1]]


def _largest(w_BRTC: jax.Array) -> jax.Array:
    """max|w| of every block, NaN where a block holds one.

    Compared as integers, absolute values have the same order and NaN comes last; as floats, XLA's
    maximum on a CPU may pass over a NaN, and takes 3 times longer.
    """
    unsigned = jnp.dtype(f"uint{8 * w_BRTC.dtype.itemsize}")
    bits_BRTC = jax.lax.bitcast_convert_type(jnp.abs(w_BRTC), unsigned)
    bits_BT = jnp.max(jnp.max(bits_BRTC, axis=1), axis=-1)
    return jax.lax.bitcast_convert_type(bits_BT, w_BRTC.dtype)


def _next_power_of_two(x: jax.Array) -> jax.Array:
    """Rounds positive normal float32 up: any mantissa bit carries into the exponent. NaN stays."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    up = jax.lax.bitcast_convert_type((bits + 0x7FFFFF) & 0x7F800000, jnp.float32)
    return jnp.where(jnp.isnan(x), x, up)
