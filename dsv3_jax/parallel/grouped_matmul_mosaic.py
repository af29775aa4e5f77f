"""Grouped matmul on Hopper GPUs: jax's own Pallas kernel for products, ours for weight gradients.

Both read bf16 and accumulate in float32; ours also leaves in float32, which jax's does not. They
are imported on first use: other platforms need not have them.
"""

import jax
import jax.numpy as jnp

from dsv3_jax.parallel.grouped_matmul_blocks import zero_after_groups

_ROWS = 128  # of an output tile
_DEPTH = 64  # of a block of the contraction
_STAGES = 4  # blocks in flight
_SNAKE = 2  # tiles side by side before the next row of tiles: they share their rows in L2


def accepts(d_in: int, d_out: int, dtype: jnp.dtype) -> bool:
    """Whether the kernels take the widths; either can be the tile's side in the backward pass."""
    return d_in % 128 == 0 and d_out % 128 == 0 and jnp.dtype(dtype) == jnp.bfloat16


def product(x_MI, w_GIO, sizes_G, *, transposed):
    from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot

    d_out = w_GIO.shape[1 if transposed else 2]
    missing = -x_MI.shape[0] % _ROWS
    y_MO = ragged_dot(
        jnp.pad(x_MI, ((0, missing), (0, 0))) if missing else x_MI,
        w_GIO,
        group_sizes=sizes_G,
        block_m=_ROWS,
        # Wide tiles reuse more of what they load.
        block_n=192 if d_out >= 192 else 128,
        block_k=_DEPTH,
        max_concurrent_steps=_STAGES,
        grid_block_n=_SNAKE,
        transpose_rhs=transposed,
    )
    return zero_after_groups(y_MO[: x_MI.shape[0]], sizes_G)


def weight_gradient(x_MI: jax.Array, dy_MO: jax.Array, sizes_G: jax.Array) -> jax.Array:
    from pallas_kernels.grouped_weight_gradient import grouped_weight_gradient_hopper

    return grouped_weight_gradient_hopper(x_MI, dy_MO, sizes_G)
