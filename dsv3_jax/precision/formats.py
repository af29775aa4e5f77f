"""E5M6: twelve bits a value, for the one activation that two backward passes read (spec §5.5).

Sign, 5 exponent bits, 6 mantissa bits: float16 with a shorter mantissa. Only the width of the
fields and the power-of-two scale a 1x128 tile are published; chosen here (spec §13):

* the bias is float16's, 15, and there are subnormals;
* a tile's scale puts its largest magnitude into 2^14 <= |x| / scale < 2^15. The largest finite
  value is 65024, so that no rounding overflows, and 34 binades lie below for the others;
* a scale is stored as one byte, the float32 exponent of that largest magnitude, at least 15: less
  would need a factor that float32 lacks. 255, of NaN and infinity, makes the whole tile NaN;
* the codes of columns j and j + H share three bytes, H being half the width: byte j is the low
  byte of the first, byte H + j that of the second, byte 2H + j both high halves, first one low.

Letters: K columns, T tiles of 128 of them, C bytes; leading dims are free.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.quantize.reference import BLOCK

_SMALLEST_EXPONENT = 15
_LARGEST_BINADE = 14  # the largest magnitude of a tile is scaled into this one
_BIASES = 127 - 15  # float32's exponent bias over E5M6's
_DROPPED = 23 - 6  # mantissa bits


def pack_e5m6(x_K: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rounds to E5M6, ties to even, a power-of-two scale a 1x128 tile: [..., K] of any float dtype.

    Returns:
      bytes_C: uint8 [..., 3 ceil(K / 2)].
      exponents_T: uint8 [..., ceil(K / 128)].
    """
    leading, width = x_K.shape[:-1], x_K.shape[-1]
    padding = [(0, 0)] * len(leading)
    x_K = jnp.pad(x_K.astype(jnp.float32), (*padding, (0, -width % BLOCK)))
    bits_TC = _bits(x_K).reshape(*leading, -1, BLOCK)
    # As integers, magnitudes have the order that they have as floats, and NaN comes last.
    exponents_T = jnp.max(bits_TC & 0x7FFFFFFF, axis=-1) >> 23
    exponents_T = jnp.maximum(exponents_T, _SMALLEST_EXPONENT)
    inverse_T = _power_of_two(2 * 127 + _LARGEST_BINADE - exponents_T)
    scaled_TC = jnp.abs(x_K.reshape(bits_TC.shape)) * inverse_T[..., None]
    rounded_TC = _bits(scaled_TC)
    rounded_TC += (1 << (_DROPPED - 1)) - 1 + ((rounded_TC >> _DROPPED) & 1)
    normal_TC = (rounded_TC >> _DROPPED) - (_BIASES << 6)
    subnormal_TC = jnp.round(scaled_TC * 2.0**20).astype(jnp.uint32)  # 64, if it rounds up to one
    codes_TC = jnp.where(scaled_TC < 2.0**-14, subnormal_TC, normal_TC)
    # What is no number would spill into the half byte of the column that it is packed with.
    codes_TC = codes_TC & 0x7FF | (bits_TC >> 31) << 11
    even = width + width % 2
    first, second = jnp.split(codes_TC.reshape(*leading, -1)[..., :even], 2, axis=-1)
    bytes_C = jnp.concatenate([first, second, first >> 8 | second >> 8 << 4], axis=-1)
    return bytes_C.astype(jnp.uint8), exponents_T.astype(jnp.uint8)


def unpack_e5m6(
    bytes_C: jax.Array, exponents_T: jax.Array, width: int, dtype: jnp.dtype
) -> jax.Array:
    """The values of `pack_e5m6`, exact in float32 and bfloat16: [..., K] in `dtype`.

    Args:
      width: K.
    """
    first, second, high = jnp.split(bytes_C.astype(jnp.uint32), 3, axis=-1)
    codes_K = jnp.concatenate([first | (high & 15) << 8, second | high >> 4 << 8], axis=-1)
    codes_K = codes_K[..., :width]
    normal_K = jax.lax.bitcast_convert_type(
        ((codes_K & 0x7FF) + (_BIASES << 6)) << _DROPPED, jnp.float32
    )
    subnormal_K = (codes_K & 63).astype(jnp.float32) * 2.0**-20
    magnitude_K = jnp.where(codes_K & 0x7C0, normal_K, subnormal_K)
    scale_T = _power_of_two(exponents_T.astype(jnp.uint32) - _LARGEST_BINADE)
    scale_T = jnp.where(exponents_T == 255, jnp.nan, scale_T)
    scale_K = jnp.repeat(scale_T, BLOCK, axis=-1)[..., :width]
    return (jnp.where(codes_K >> 11, -magnitude_K, magnitude_K) * scale_K).astype(dtype)


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


def _power_of_two(biased_exponent: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(biased_exponent << 23, jnp.float32)
