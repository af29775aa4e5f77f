"""FP8 products of rows sorted by expert, every expert's rows a whole number of blocks of 128.

Letters: M rows, E experts, K width, N outputs, T tiles of 128 along K, B blocks of 128 along N; I
and O the two widths of a weight, R tiles of 128 rows.
"""

import jax
import jax.numpy as jnp

from dsv3_jax.precision.fp8 import product
from dsv3_jax.precision.policy import Fp8Recipe
from pallas_kernels import grouped_fp8_matmul, grouped_fp8_weight_gradient
from pallas_kernels.quantize.reference import BLOCK


def grouped_product(
    q_MK: jax.Array,
    s_MT: jax.Array,
    q_ENK: jax.Array,
    s_EBT: jax.Array,
    sizes_E: jax.Array,
    recipe: Fp8Recipe,
) -> jax.Array:
    """y_MN bfloat16, zeros after the last expert's rows; see `pallas_kernels.grouped_fp8_matmul`.

    Args:
      sizes_E: int32 rows of each expert, multiples of 128.
    """
    if recipe.promotion:
        operands = (q_MK, s_MT, q_ENK, s_EBT, sizes_E)
        return grouped_fp8_matmul(*operands, jnp.bfloat16, recipe.implementation)
    ends_E = jnp.cumsum(sizes_E)

    def one_block(block, y_MN):
        row = block * BLOCK
        expert = jnp.searchsorted(ends_E, row, side="right")
        q_RK, s_RT = (jax.lax.dynamic_slice_in_dim(a, row, BLOCK) for a in (q_MK, s_MT))
        y_RN = product(q_RK, s_RT, q_ENK[expert], s_EBT[expert], jnp.bfloat16, recipe)
        return jax.lax.dynamic_update_slice_in_dim(y_MN, y_RN, row, axis=0)

    y_MN = jnp.zeros((q_MK.shape[0], q_ENK.shape[1]), jnp.bfloat16)
    return jax.lax.fori_loop(0, ends_E[-1] // BLOCK, one_block, y_MN)


def grouped_weight_gradient(
    q_IM: jax.Array,
    s_IR: jax.Array,
    q_OM: jax.Array,
    s_OR: jax.Array,
    sizes_E: jax.Array,
    recipe: Fp8Recipe,
) -> jax.Array:
    """dw_EIO float32, zeros for an expert without rows; see `grouped_fp8_weight_gradient`."""
    if recipe.promotion:
        operands = (q_IM, s_IR, q_OM, s_OR, sizes_E)
        return grouped_fp8_weight_gradient(*operands, implementation=recipe.implementation)
    ends_E = jnp.cumsum(sizes_E) // BLOCK
    tile_R = jnp.arange(s_IR.shape[1])

    def one_expert(segment):
        start, end = segment
        own_s_IR = jnp.where((tile_R >= start) & (tile_R < end), s_IR, 0.0)
        return product(q_IM, own_s_IR, q_OM, s_OR, jnp.float32, recipe)

    return jax.lax.map(one_expert, (ends_E - sizes_E // BLOCK, ends_E))
