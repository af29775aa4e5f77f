"""FP8 products of rows sorted by group in plain jax.numpy: the definition (spec §5.1).

Letters: M rows, G groups, K width, N outputs, T tiles of 128 along K, B blocks of 128 along N; I
and O the two widths of a weight, R tiles of 128 rows.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.fp8_matmul.reference import fp8_matmul_reference
from pallas_kernels.quantize.reference import BLOCK


def grouped_fp8_matmul_reference(
    q_MK: jax.Array,
    s_MT: jax.Array,
    q_GNK: jax.Array,
    s_GBT: jax.Array,
    group_sizes_G: jax.Array,
    out_dtype: jnp.dtype = jnp.bfloat16,
) -> jax.Array:
    """y_m = x_m w_g^T for every row m of group g; zeros in the rows after the last group.

    Args:
      q_MK, s_MT: codes and 1x128 scales of the rows, those of group 0 first.
      q_GNK, s_GBT: codes and 128x128 scales of the groups' weights.
      group_sizes_G: int32 rows of each group, 0 allowed, at most M together.

    Returns:
      y_MN in `out_dtype`.
    """
    ends_G = jnp.cumsum(group_sizes_G)
    row_M = jnp.arange(q_MK.shape[0])

    def one_group(y_MN, group):
        q_NK, s_BT, start, end = group
        y_g_MN = fp8_matmul_reference(q_MK, s_MT, q_NK, s_BT, out_dtype)
        return jnp.where(((row_M >= start) & (row_M < end))[:, None], y_g_MN, y_MN), None

    y_MN = jnp.zeros((q_MK.shape[0], q_GNK.shape[1]), out_dtype)
    return jax.lax.scan(one_group, y_MN, (q_GNK, s_GBT, ends_G - group_sizes_G, ends_G))[0]


def grouped_fp8_weight_gradient_reference(
    q_IM: jax.Array,
    s_IR: jax.Array,
    q_OM: jax.Array,
    s_OR: jax.Array,
    group_sizes_G: jax.Array,
    add_GIO: jax.Array | None = None,
) -> jax.Array:
    """dW_g = sum over the rows m of group g of x_m^T dy_m, float32 [+ add].

    Args:
      q_IM, s_IR and q_OM, s_OR: x and dy from `quantize_columns`: codes transposed, scales 128x1.
      group_sizes_G: int32 rows of each group, multiples of 128, so that no tile straddles groups;
        rows after the last group are ignored.
      add_GIO: float32, gradients to add to.

    Returns:
      dw_GIO float32; zeros [or `add`] for an empty group.
    """
    ends_G = jnp.cumsum(group_sizes_G) // BLOCK
    tile_R = jnp.arange(s_IR.shape[1])
    tile_M = jnp.arange(q_IM.shape[1]) // BLOCK

    def one_group(group):
        start, end = group

        def own(x, tile):  # of another group, even NaN counts as nothing
            return jnp.where((tile >= start) & (tile < end), x, jnp.zeros((), x.dtype))

        x_codes, dy_codes = (
            (own(q, tile_M), own(s, tile_R)) for q, s in ((q_IM, s_IR), (q_OM, s_OR))
        )
        return fp8_matmul_reference(*x_codes, *dy_codes, jnp.float32)

    dw_GIO = jax.lax.map(one_group, (ends_G - group_sizes_G // BLOCK, ends_G))
    return dw_GIO if add_GIO is None else add_GIO + dw_GIO


def masked_fp8_matmul_reference(
    q_GMK: jax.Array,
    s_GMT: jax.Array,
    q_GNK: jax.Array,
    s_GBT: jax.Array,
    num_rows_G: jax.Array,
    out_dtype: jnp.dtype = jnp.bfloat16,
) -> jax.Array:
    """Decoding: a buffer of M rows a group, of which the first `num_rows` are real.

    Returns:
      y_GMN in `out_dtype`, zeros in the other rows.
    """
    y_GMN = jax.vmap(fp8_matmul_reference, in_axes=(0, 0, 0, 0, None))(
        q_GMK, s_GMT, q_GNK, s_GBT, out_dtype
    )
    real_GM = jnp.arange(q_GMK.shape[1]) < num_rows_G[:, None]
    return jnp.where(real_GM[..., None], y_GMN, jnp.zeros((), out_dtype))
