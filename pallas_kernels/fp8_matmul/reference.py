"""The product of two FP8 operands in plain jax.numpy: the definition (spec §5.1, §5.2).

Letters: M and N rows of the operands, K the width they share, T its tiles of 128, B blocks of 128
along N.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.quantize.reference import BLOCK


def fp8_matmul_reference(
    q_MK: jax.Array,
    s_MT: jax.Array,
    q_NK: jax.Array,
    s_BT: jax.Array,
    out_dtype: jnp.dtype = jnp.bfloat16,
    add_MN: jax.Array | None = None,
) -> jax.Array:
    """y = sum over tiles t of (q_M . q_N over 128) * s_M * s_N, added in float32 [+ add].

    The scales vary along K, so every 128-long partial product is scaled before it is added; one
    product over all of K is not the same (spec §5.2).

    Args:
      q_MK, s_MT: codes and 1x128 scales of the left operand.
      q_NK, s_BT: codes of the right operand, with a scale a block of 128x128 [ceil(N / 128), T]
        (Fprop, Dgrad), or a row [N, T] (Wgrad).
      add_MN: float32, a gradient to add to; `out_dtype` is float32 then.

    Returns:
      y_MN in `out_dtype`, rounded once.
    """
    num_rows, num_tiles = q_NK.shape[0], s_MT.shape[1]
    s_NT = s_BT
    if s_BT.shape[0] != num_rows:
        s_NT = jnp.repeat(s_BT, BLOCK, axis=0)[:num_rows]

    def by_tile(q_RK):
        q_RK = jnp.pad(q_RK.astype(jnp.float32), ((0, 0), (0, -q_RK.shape[1] % BLOCK)))
        return jnp.moveaxis(q_RK.reshape(-1, num_tiles, BLOCK), 1, 0)

    def add(y_MN, tile):
        a_M128, s_M, b_N128, s_N = tile
        # E4M3 has 4 significant bits: the products are exact in any matmul precision.
        partial_MN = jnp.einsum("mk,nk->mn", a_M128, b_N128, preferred_element_type=jnp.float32)
        return y_MN + partial_MN * (s_M[:, None] * s_N), None

    y_MN = jnp.zeros((q_MK.shape[0], num_rows), jnp.float32)
    y_MN, _ = jax.lax.scan(add, y_MN, (by_tile(q_MK), s_MT.T, by_tile(q_NK), s_NT.T))
    return (y_MN if add_MN is None else add_MN + y_MN).astype(out_dtype)
