"""Block quantisation to E4M3 in plain jax.numpy: the definition (spec §5.1)."""

import jax
import jax.numpy as jnp

BLOCK = 128
E4M3_MAX = 448.0
_SMALLEST_MAX = 1e-4  # of a block: keeps the scale of a block of zeros away from 0 (spec §5.1)


def quantize_blocks_reference(
    w_NK: jax.Array, power_of_two: bool = False
) -> tuple[jax.Array, jax.Array]:
    """E4M3 codes [N, K] and float32 scales [ceil(N/128), ceil(K/128)]; scales multiply."""
    raise NotImplementedError


def dequantize_blocks_reference(
    q_NK: jax.Array, s_BT: jax.Array, out_dtype: jnp.dtype = jnp.bfloat16
) -> jax.Array:
    """q * s, rounded once to `out_dtype`."""
    raise NotImplementedError
