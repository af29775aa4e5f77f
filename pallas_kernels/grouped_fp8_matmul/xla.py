"""Grouped FP8 products in plain XLA: a loop over the blocks of 128 rows that hold rows.

For training by emulation on a CPU, and where no kernel takes the operands. A group of n rows owns
ceil(n / 128) consecutive blocks, each multiplied by its group's weight alone.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.fp8_matmul.reference import fp8_matmul_reference
from pallas_kernels.quantize.reference import BLOCK


def grouped_fp8_matmul_xla(
    q_MK: jax.Array,
    s_MT: jax.Array,
    q_GNK: jax.Array,
    s_GBT: jax.Array,
    group_sizes_G: jax.Array,
    out_dtype: jnp.dtype = jnp.bfloat16,
) -> jax.Array:
    """As `grouped_fp8_matmul_reference`; a group of any size, an empty one costs nothing."""
    num_rows, num_groups = q_MK.shape[0], q_GNK.shape[0]
    row_end_G, blocks_G = jnp.cumsum(group_sizes_G), -(-group_sizes_G // BLOCK)
    block_end_G = jnp.cumsum(blocks_G)
    row_start_G, block_start_G = row_end_G - group_sizes_G, block_end_G - blocks_G
    # The last block of a group may reach over the end.
    q_MK, s_MT = (jnp.pad(a, ((0, BLOCK), (0, 0))) for a in (q_MK, s_MT))

    def one_block(block, y_MN):
        group = jnp.minimum(jnp.sum(block >= block_end_G), num_groups - 1)
        row = row_start_G[group] + (block - block_start_G[group]) * BLOCK
        q_RK, s_RT = (jax.lax.dynamic_slice_in_dim(a, row, BLOCK) for a in (q_MK, s_MT))
        y_RN = fp8_matmul_reference(q_RK, s_RT, q_GNK[group], s_GBT[group], out_dtype)
        # Rows of later groups are written by their own blocks, which come later.
        inside_R = row + jnp.arange(BLOCK) < row_end_G[group]
        y_RN = jnp.where(inside_R[:, None], y_RN, jnp.zeros((), out_dtype))
        return jax.lax.dynamic_update_slice_in_dim(y_MN, y_RN, row, axis=0)

    y_MN = jnp.zeros((num_rows + BLOCK, q_GNK.shape[1]), out_dtype)
    return jax.lax.fori_loop(0, block_end_G[-1], one_block, y_MN)[:num_rows]


def grouped_fp8_weight_gradient_xla(
    q_IM: jax.Array,
    s_IR: jax.Array,
    q_OM: jax.Array,
    s_OR: jax.Array,
    group_sizes_G: jax.Array,
    add_GIO: jax.Array | None = None,
) -> jax.Array:
    """As `grouped_fp8_weight_gradient_reference`."""
    end_G = jnp.cumsum(group_sizes_G // BLOCK)
    q_IM, q_OM = (jnp.pad(q, ((0, 0), (0, -q.shape[1] % BLOCK))) for q in (q_IM, q_OM))

    def one_tile(tile, dw_GIO):
        group = jnp.minimum(jnp.sum(tile >= end_G), len(end_G) - 1)
        operands = []
        for q, s in ((q_IM, s_IR), (q_OM, s_OR)):
            operands.append(jax.lax.dynamic_slice_in_dim(q, tile * BLOCK, BLOCK, axis=1))
            operands.append(jax.lax.dynamic_slice_in_dim(s, tile, 1, axis=1))
        dw_IO = fp8_matmul_reference(*operands, jnp.float32, dw_GIO[group])
        return jax.lax.dynamic_update_index_in_dim(dw_GIO, dw_IO, group, 0)

    dw_GIO = jnp.zeros((len(end_G), q_IM.shape[0], q_OM.shape[0]), jnp.float32)
    dw_GIO = jax.lax.fori_loop(0, end_G[-1], one_tile, dw_GIO)
    return dw_GIO if add_GIO is None else add_GIO + dw_GIO
