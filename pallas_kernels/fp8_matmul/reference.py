"""The product of two FP8 operands in plain jax.numpy: the definition (spec §5.1, §5.2).

Letters: M and N rows of the operands, K the width they share, T its tiles of 128, B blocks of 128
along N.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.quantize.reference import BLOCK

_INSTRUCTION = 32  # products that a Hopper tensor core adds at once
_FRACTION_BITS = 13  # that its accumulator keeps


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

    def add(y_MN, step):
        partial_MN, scale_MN = _scaled_product(step)
        return y_MN + partial_MN * scale_MN, None

    y_MN = _sum_over_steps(add, BLOCK, q_MK, s_MT, q_NK, s_BT)
    return (y_MN if add_MN is None else add_MN + y_MN).astype(out_dtype)


def fp8_matmul_unpromoted_reference(
    q_MK: jax.Array,
    s_MT: jax.Array,
    q_NK: jax.Array,
    s_BT: jax.Array,
    out_dtype: jnp.dtype = jnp.bfloat16,
) -> jax.Array:
    """The same sum without promotion: a model of Hopper's accumulator over all of K (spec §5.2).

    Every 32 products are added, exactly here, to an accumulator that keeps 13 fraction bits and
    cuts off the rest. For ablations: no kernel computes this.
    """
    kept_bits = ~jnp.uint32(2 ** (23 - _FRACTION_BITS) - 1)

    def add(y_MN, step):
        partial_MN, scale_MN = _scaled_product(step)
        bits_MN = jax.lax.bitcast_convert_type(y_MN + partial_MN * scale_MN, jnp.uint32)
        return jax.lax.bitcast_convert_type(bits_MN & kept_bits, jnp.float32), None

    return _sum_over_steps(add, _INSTRUCTION, q_MK, s_MT, q_NK, s_BT).astype(out_dtype)


def _sum_over_steps(add, depth, q_MK, s_MT, q_NK, s_BT):
    """`add` scanned over steps of `depth` along K: y_MN float32 from zeros."""
    num_rows, num_tiles = q_NK.shape[0], s_MT.shape[1]
    steps_per_tile = BLOCK // depth
    s_NT = s_BT
    if s_BT.shape[0] != num_rows:
        s_NT = jnp.repeat(s_BT, BLOCK, axis=0)[:num_rows]

    def codes(q_RK):
        q_RK = jnp.pad(q_RK.astype(jnp.float32), ((0, 0), (0, -q_RK.shape[1] % BLOCK)))
        q_RSD = q_RK.reshape(len(q_RK), num_tiles * steps_per_tile, depth)
        return jnp.moveaxis(q_RSD, 1, 0)

    def scales(s_RT):
        return jnp.repeat(s_RT.T, steps_per_tile, axis=0)

    y_MN = jnp.zeros((q_MK.shape[0], num_rows), jnp.float32)
    steps = (codes(q_MK), scales(s_MT), codes(q_NK), scales(s_NT))
    # A CPU takes a third less time for 2 to 4 tiles without the loop, which are what `tiny` has.
    return jax.lax.scan(add, y_MN, steps, unroll=4)[0]


def _scaled_product(step):
    """The product of the codes of one step, and its scales."""
    q_MD, s_M, q_ND, s_N = step
    # E4M3 has 4 significant bits: the products are exact in any matmul precision.
    partial_MN = jnp.einsum("md,nd->mn", q_MD, q_ND, preferred_element_type=jnp.float32)
    return partial_MN, s_M[:, None] * s_N
